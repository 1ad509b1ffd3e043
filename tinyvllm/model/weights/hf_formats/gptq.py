"""GPTQ: `qweight` [in * bits / 32, out], `qzeros` [groups, out * bits / 32], `scales` [groups, out], `g_idx` [in].

Codes of an output are a stream of bits along its column of words. qzeros are stored less 1, but in `gptq_v2`:
https://github.com/AutoGPTQ/AutoGPTQ/blob/main/auto_gptq/nn_modules/qlinear/qlinear_cuda.py
"""

from __future__ import annotations

from functools import partial

from tinyvllm.arrays import CODE_BITS, HostMatrix
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    INTEGERS,
    WORDS,
    Groups,
    HFFormat,
    Parts,
    groups_of,
    scaled_integers,
    stream_codes,
    unpack_bits,
    unsigned_integers,
)
from tinyvllm.model.weights.hf_formats.order import require_order
from tinyvllm.model.weights.stored import StoredTensor

LAYOUTS = ("gptq", "gptq_v2")


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    layout = parts.settings.choice("checkpoint_format", LAYOUTS, "gptq")
    num_groups, num_rows = parts.require_matrix(".scales", (None, None), FLOATS)
    bits = parts.require_matrix(".qzeros", (num_groups, None), WORDS)[1] * 32 // num_rows
    if bits not in CODE_BITS:
        known = ", ".join(map(str, CODE_BITS))
        raise parts.mismatch(".qzeros", f"{num_rows} rows with codes of {known} bits have others")
    num_cols = parts.require_matrix(".qweight", (None, num_rows), WORDS)[0] * 32 // bits
    groups = groups_of(parts, num_cols, -(-num_cols // num_groups))
    if groups.num_stored != num_groups:
        raise parts.mismatch(".scales", f"{num_cols} columns have {groups.num_stored} groups of {groups.stored}")
    if ".g_idx" in parts:
        parts.require(".g_idx", (num_cols,), INTEGERS)
        require_order(parts, ".g_idx", groups)
    name = f"gptq-{bits}bit-{groups.label}"
    return parts.stored((num_rows, num_cols), name, partial(_read, name, bits, groups, layout == "gptq"))


def _read(name: str, bits: int, groups: Groups, is_less_1: bool, parts: Parts) -> HostMatrix:
    words, group = parts.read(".qweight").T, groups.group
    codes = stream_codes(words, bits, groups.num_cols)
    scale = groups.spread(parts.read(".scales").T)
    zeros = groups.spread(unpack_bits(parts.read(".qzeros"), bits, len(words)).T)
    if not is_less_1:
        return unsigned_integers(name, bits, group, codes, scale, zeros)
    if bits < 8 or (zeros == 127).all():
        return unsigned_integers(name, bits, group, codes, scale, zeros + 1)
    # a zero of 256 is no uint8
    return scaled_integers(name, bits, group, codes, 1 - 128, scale, zeros)


FORMAT = HFFormat(".qweight", (".qzeros", ".scales", ".g_idx"), build)
