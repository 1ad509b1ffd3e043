"""Model families: how a checkpoint becomes the operations of ops.Backend.

A new family is one file here and one line in the registry.
"""

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
