"""Every kernel and every fact about devices. Importing this package sets tinygrad's environment, so it must come first.

The rooms above speak to a `Backend` (backend.py): a handful of fused operations from which a transformer layer is made.
"""

from tinyvllm.ops.environment import prepare_environment

prepare_environment()
