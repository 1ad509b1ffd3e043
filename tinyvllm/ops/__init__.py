"""The operations that a layer is made of, and every kernel that runs them.

The rooms above use a `Backend` (backend.py): a handful of fused operations. Inside, `kernel` has the building blocks
of kernels, `formats` the layouts of weights in memory, `cpu` and `gpu` the backends and kernels of each kind of device,
and `sampling` what follows the logits.
"""

import tinyvllm.device  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
