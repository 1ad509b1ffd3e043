"""ggml's quantised blocks taken apart, without loss, into codes, scales and minimums (tinyvllm.arrays.QuantizedMatrix).

Block layouts: https://github.com/ggml-org/llama.cpp/blob/aca2e6ce7909064dbfbf3bd168e9ad3db1826e6c/ggml/src/ggml-common.h
Every function below takes blocks (N, B, bytes of a block) uint8 of N rows of B blocks, K = B * weights of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tinyvllm.arrays import QuantizedMatrix, Scales
from tinyvllm.errors import ModelError, UnsupportedModelError

GROUP = 32  # weights of a legacy block, and of a group in Q4_K and Q5_K
SUPER = 256  # weights of a K quant's block


def decompose(ggml_type: str, raw: np.ndarray, shape: tuple[int, ...]) -> QuantizedMatrix:
    """Take a matrix's bytes apart. raw: all its bytes, uint8, any shape; shape (N, K).

    Raises UnsupportedModelError for a type that is not known, ModelError where the bytes are not those of the shape.
    """
    if ggml_type not in QUANTIZED_KINDS:
        raise UnsupportedModelError(f"quantisation {ggml_type} is not supported; known: {', '.join(QUANTIZED_KINDS)}")
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    if len(shape) != 2 or shape[1] % block_size != 0 or raw.size * block_size != shape[0] * shape[1] * block_bytes:
        raise ModelError(
            f"{raw.size} bytes are not a {ggml_type} matrix of shape {shape}: rows come in blocks of {block_size} "
            f"weights and {block_bytes} bytes"
        )
    return QUANTIZED_KINDS[ggml_type](raw.reshape(shape[0], shape[1] // block_size, block_bytes))


def _q4_0(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · 16 bytes of codes."""
    codes = _rows(_nibbles(blocks[..., 2:], GROUP))
    return QuantizedMatrix("Q4_0", codes, bits=4, group=GROUP, offset=8, scale=_legacy_scales(blocks, 0))


def _q4_1(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · m f16 · 16 bytes of codes."""
    codes = _rows(_nibbles(blocks[..., 4:], GROUP))
    scale, minimum = _legacy_scales(blocks, 0), _legacy_scales(blocks, 2)
    return QuantizedMatrix("Q4_1", codes, bits=4, group=GROUP, offset=0, scale=scale, minimum=minimum)


def _q5_0(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · 32 fifth bits · 16 bytes of low bits."""
    codes = _rows(_nibbles(blocks[..., 6:], GROUP) | _fifth_bits(blocks[..., 2:6]))
    return QuantizedMatrix("Q5_0", codes, bits=5, group=GROUP, offset=16, scale=_legacy_scales(blocks, 0))


def _q5_1(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · m f16 · 32 fifth bits · 16 bytes of low bits."""
    codes = _rows(_nibbles(blocks[..., 8:], GROUP) | _fifth_bits(blocks[..., 4:8]))
    scale, minimum = _legacy_scales(blocks, 0), _legacy_scales(blocks, 2)
    return QuantizedMatrix("Q5_1", codes, bits=5, group=GROUP, offset=0, scale=scale, minimum=minimum)


def _q8_0(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · 32 int8 codes."""
    codes = _rows(np.ascontiguousarray(blocks[..., 2:])).view(np.int8)
    return QuantizedMatrix("Q8_0", codes, bits=8, group=GROUP, offset=0, scale=_legacy_scales(blocks, 0))


def _q4_k(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · dmin f16 · 12 bytes of scales and minimums · 128 bytes of codes."""
    codes = _rows(_nibbles(blocks[..., 16:], 64))
    scale, minimum = _k_scales(blocks)
    return QuantizedMatrix("Q4_K", codes, bits=4, group=GROUP, offset=0, scale=scale, minimum=minimum)


def _q5_k(blocks: np.ndarray) -> QuantizedMatrix:
    """d f16 · dmin f16 · 12 bytes of scales and minimums · 32 of fifth bits, bit g of group g · 128 of low bits."""
    rows, per_row, _ = blocks.shape
    groups = np.arange(SUPER // GROUP, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> groups & 1) << 4  # (N, B, 8, 32)
    codes = _rows(_nibbles(blocks[..., 48:], 64) | fifth.reshape(rows, per_row, SUPER))
    scale, minimum = _k_scales(blocks)
    return QuantizedMatrix("Q5_K", codes, bits=5, group=GROUP, offset=0, scale=scale, minimum=minimum)


def _q6_k(blocks: np.ndarray) -> QuantizedMatrix:
    """128 bytes of low four bits · 64 bytes of high two bits · 16 int8 scales · d f16."""
    rows, per_row, _ = blocks.shape
    high = blocks[..., 128:192].reshape(rows, per_row, 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4  # (N, B, 2, 4, 32)
    codes = _rows(_nibbles(blocks[..., :128], 128) | high.reshape(rows, per_row, SUPER))
    scale = Scales(_float16(blocks, 208), _rows(np.ascontiguousarray(blocks[..., 192:208])).view(np.int8), SUPER)
    return QuantizedMatrix("Q6_K", codes, bits=6, group=16, offset=32, scale=scale)


QUANTIZED_KINDS: dict[str, Callable[[np.ndarray], QuantizedMatrix]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _rows(parts: np.ndarray) -> np.ndarray:
    """(N, B, parts of a block) -> (N, all parts of a row)."""
    return parts.reshape(parts.shape[0], -1)


def _nibbles(packed: np.ndarray, span: int) -> np.ndarray:
    """Four-bit codes, (N, B, 2 * bytes): of every `span` codes the low halves of the bytes hold the first, the high
    halves the second span / 2."""
    rows, per_row, num_bytes = packed.shape
    packed = packed.reshape(rows, per_row, num_bytes * 2 // span, span // 2)
    codes = np.empty((*packed.shape[:3], 2, span // 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return codes.reshape(rows, per_row, num_bytes * 2)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """(N, B, 4) bytes -> (N, B, 32), 16 where the weight's bit is set: weight i has bit i, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _float16(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The half-precision number at byte `begin` of each block, (N, B)."""
    return np.ascontiguousarray(blocks[..., begin : begin + 2]).view(np.float16)[..., 0]


def _legacy_scales(blocks: np.ndarray, begin: int) -> Scales:
    return Scales(_float16(blocks, begin), None, GROUP)


def _k_scales(blocks: np.ndarray) -> tuple[Scales, Scales]:
    """Scales and minimums of Q4_K and Q5_K, six bits each, eight of each in bytes 4 to 16 of a block.

    Bytes 0-3 hold the first four scales, 4-7 the first four minimums; 8-11 the low four bits of the other scales and,
    above them, of the other minimums, whose high two bits are on top of bytes 0-3 and 4-7.
    """
    first, second, low = (blocks[..., begin : begin + 4] for begin in (4, 8, 12))
    steps = np.concatenate([first & 0x3F, low & 0x0F | first >> 2 & 0x30], axis=-1)
    minimums = np.concatenate([second & 0x3F, low >> 4 | second >> 2 & 0x30], axis=-1)
    return Scales(_float16(blocks, 0), _rows(steps), SUPER), Scales(-_float16(blocks, 2), _rows(minimums), SUPER)
