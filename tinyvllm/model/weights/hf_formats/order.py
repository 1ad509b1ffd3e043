"""The order of columns: groups must be neighbors."""

from __future__ import annotations

import numpy as np

from tinyvllm.model.weights.hf_formats.matrices import Groups, Parts


def require_order(parts: Parts, suffix: str, groups: Groups) -> None:
    """Check that neighboring columns share a scale. Raises UnsupportedModelError for act-order, where columns were
    sorted by their activations before they were grouped."""
    index = parts.read(suffix).reshape(-1)
    if not np.array_equal(index, np.arange(len(index)) // groups.stored):
        raise parts.unsupported(
            "was quantized in activation order (desc_act, actorder group), whose groups are not neighboring columns: "
            "take a file that was quantized without it, or the model's AWQ, GGUF or MLX file"
        )
