"""tinygrad's settings are made before any test here imports tinygrad."""

import tinyvllm.ops  # noqa: F401
