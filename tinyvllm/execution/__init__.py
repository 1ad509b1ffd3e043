"""Plans become device work: input packing, captured graphs by bucket, the pool's size, one read back a step."""

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
