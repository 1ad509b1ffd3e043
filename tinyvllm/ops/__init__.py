"""The operations that a layer is made of, and every kernel that runs them.

The rooms above speak to a `Backend` (backend.py): a handful of fused operations. Inside, `kernel` is what kernels are
written in, `formats` how weights lie in memory, `cpu` and `gpu` the kernels of either kind of device, `sampling` what
follows the logits.
"""

import tinyvllm.device  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
