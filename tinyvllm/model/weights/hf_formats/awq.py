"""AWQ (AutoAWQ's gemm layout): `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out].

The eight 4-bit codes of a word are those of neighboring outputs, in the order 0 2 4 6 1 3 5 7:
https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tinyvllm.arrays import HostMatrix, LazyCodes
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    WORDS,
    Groups,
    HFFormat,
    Parts,
    groups_of,
    unsigned_integers,
)
from tinyvllm.model.weights.stored import StoredTensor

BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each code of a word, low bits first


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    settings = parts.settings
    layout = (settings.optional_text("version") or "gemm").lower()
    if layout != "gemm":
        settings.unsupported("version", "gemm: quantize it again with that version, or take its GPTQ or GGUF file")
    if (settings.get("bits") or settings.get("w_bit") or BITS) != BITS:
        settings.unsupported("bits", str(BITS))
    num_cols, words = parts.require_matrix(".qweight", (None, None), WORDS)
    num_groups, num_rows = parts.require_matrix(".scales", (None, words * PER_WORD), FLOATS)
    if num_cols % num_groups:
        raise parts.mismatch(".scales", f"qweight has {parts['.qweight'].shape}")
    if ".qzeros" in parts:
        parts.require_matrix(".qzeros", (num_groups, words), WORDS)
    groups = groups_of(parts, num_cols, num_cols // num_groups)
    name = f"awq-4bit-{groups.label}"
    return parts.stored((num_rows, num_cols), name, partial(_read, name, groups))


def _read(name: str, groups: Groups, parts: Parts) -> HostMatrix:
    words, scale = parts.read(".qweight"), groups.spread(parts.read(".scales").T)
    codes = LazyCodes(partial(_unpack, words), (len(scale), groups.num_cols))
    zeros = None
    if ".qzeros" in parts:
        zeros = groups.spread(_unpack(parts.read(".qzeros"), np.arange(len(scale))))
    return unsigned_integers(name, BITS, groups.group, codes, scale, zeros)


def _unpack(words: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """(K, out / 8) words -> (outputs, K) uint8."""
    place = np.argsort(ORDER)[outputs % PER_WORD]  # of an output's code in its word
    packed = np.ascontiguousarray(words).view(np.uint8)[:, outputs // PER_WORD * 4 + place // 2]
    codes: np.ndarray = (packed.T >> (place % 2 * BITS).astype(np.uint8)[:, None]) & 0xF
    return codes


FORMAT = HFFormat(".qweight", (".qzeros", ".scales"), build)
