"""Running step plans on the device: packed inputs, a graph per bucket, the pool's size, one output per step."""

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
