"""ggml's quantized blocks, split without loss into codes, scales and minimums (tinyvllm.arrays.QuantizedMatrix).

Block layouts: https://github.com/ggml-org/llama.cpp/blob/aca2e6ce7909064dbfbf3bd168e9ad3db1826e6c/ggml/src/ggml-common.h
To add a kind, write a function like those below and add an entry to QUANTIZED_KINDS: docs/EXTENDING.md has an example.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tinyvllm.arrays import Format, QuantizedMatrix, ScaleFormat, Scales
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.blocks import BlockKind, Parts, float16, nibbles, whole_rows

GROUP = 32  # weights of a legacy block, and of a group in Q4_K and Q5_K
SUPER = 256  # weights of a K quant's block
BLOCK_SCALE = ScaleFormat(GROUP)
STEPPED_SCALE = ScaleFormat(SUPER, has_steps=True)


def decompose(ggml_type: str, raw: np.ndarray, shape: tuple[int, ...]) -> QuantizedMatrix:
    """Split a matrix's bytes. raw: all its bytes, uint8, any shape; shape (N, K).

    Raises UnsupportedModelError for an unknown type, ModelError if the number of bytes does not match.
    """
    if ggml_type not in QUANTIZED_KINDS:
        raise UnsupportedModelError(f"quantization {ggml_type} is not supported; known: {', '.join(QUANTIZED_KINDS)}")
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    if len(shape) != 2 or shape[1] % block_size != 0 or raw.size * block_size != shape[0] * shape[1] * block_bytes:
        raise ModelError(
            f"{raw.size} bytes are not a {ggml_type} matrix of shape {shape}: rows come in blocks of {block_size} "
            f"weights and {block_bytes} bytes"
        )
    kind = QUANTIZED_KINDS[ggml_type]
    return QuantizedMatrix(kind.format, *kind.split(raw.reshape(shape[0], shape[1] // block_size, block_bytes)))


def _q4_0(blocks: np.ndarray) -> Parts:
    """d f16 · 16 bytes of codes."""
    return whole_rows(nibbles(blocks[..., 2:], GROUP)), _block_scales(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Parts:
    """d f16 · m f16 · 16 bytes of codes."""
    return whole_rows(nibbles(blocks[..., 4:], GROUP)), _block_scales(blocks, 0), _block_scales(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Parts:
    """d f16 · 32 fifth bits · 16 bytes of low bits."""
    codes = whole_rows(nibbles(blocks[..., 6:], GROUP) | _fifth_bits(blocks[..., 2:6]))
    return codes, _block_scales(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Parts:
    """d f16 · m f16 · 32 fifth bits · 16 bytes of low bits."""
    codes = whole_rows(nibbles(blocks[..., 8:], GROUP) | _fifth_bits(blocks[..., 4:8]))
    return codes, _block_scales(blocks, 0), _block_scales(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Parts:
    """d f16 · 32 int8 codes."""
    return whole_rows(np.ascontiguousarray(blocks[..., 2:])).view(np.int8), _block_scales(blocks, 0), None


def _q4_k(blocks: np.ndarray) -> Parts:
    """d f16 · dmin f16 · 12 bytes of scales and minimums · 128 bytes of codes."""
    return whole_rows(nibbles(blocks[..., 16:], 64)), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> Parts:
    """d f16 · dmin f16 · 12 bytes of scales and minimums · 32 of fifth bits, bit g of group g · 128 of low bits."""
    rows, per_row, _ = blocks.shape
    groups = np.arange(SUPER // GROUP, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> groups & 1) << 4  # (N, B, 8, 32)
    codes = whole_rows(nibbles(blocks[..., 48:], 64) | fifth.reshape(rows, per_row, SUPER))
    return codes, *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> Parts:
    """128 bytes of low four bits · 64 bytes of high two bits · 16 int8 scales · d f16."""
    rows, per_row, _ = blocks.shape
    high = blocks[..., 128:192].reshape(rows, per_row, 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4  # (N, B, 2, 4, 32)
    codes = whole_rows(nibbles(blocks[..., :128], 128) | high.reshape(rows, per_row, SUPER))
    steps = whole_rows(np.ascontiguousarray(blocks[..., 192:208])).view(np.int8)
    return codes, Scales(float16(blocks, 208), steps), None


QUANTIZED_KINDS = {
    kind.format.name: kind
    for kind in (
        BlockKind(Format("Q4_0", 4, GROUP, offset=8, scale=BLOCK_SCALE), _q4_0),
        BlockKind(Format("Q4_1", 4, GROUP, scale=BLOCK_SCALE, minimum=BLOCK_SCALE), _q4_1),
        BlockKind(Format("Q5_0", 5, GROUP, offset=16, scale=BLOCK_SCALE), _q5_0),
        BlockKind(Format("Q5_1", 5, GROUP, scale=BLOCK_SCALE, minimum=BLOCK_SCALE), _q5_1),
        BlockKind(Format("Q8_0", 8, GROUP, scale=BLOCK_SCALE), _q8_0),
        BlockKind(Format("Q4_K", 4, GROUP, scale=STEPPED_SCALE, minimum=STEPPED_SCALE), _q4_k),
        BlockKind(Format("Q5_K", 5, GROUP, scale=STEPPED_SCALE, minimum=STEPPED_SCALE), _q5_k),
        BlockKind(Format("Q6_K", 6, 16, offset=32, scale=STEPPED_SCALE), _q6_k),
    )
}


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """(N, B, 4) bytes -> (N, B, 32), 16 where the weight's bit is set: weight i has bit i, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _block_scales(blocks: np.ndarray, begin: int) -> Scales:
    return Scales(float16(blocks, begin))


def _k_scales(blocks: np.ndarray) -> tuple[Scales, Scales]:
    """Scales and minimums of Q4_K and Q5_K, six bits each, eight of each in bytes 4 to 16 of a block.

    Bytes 0-3 hold the first four scales, 4-7 the first four minimums; 8-11 the low four bits of the other scales and,
    above them, of the other minimums, whose high two bits are on top of bytes 0-3 and 4-7.
    """
    first, second, low = (blocks[..., begin : begin + 4] for begin in (4, 8, 12))
    steps = np.concatenate([first & 0x3F, low & 0x0F | first >> 2 & 0x30], axis=-1)
    minimums = np.concatenate([second & 0x3F, low >> 4 | second >> 2 & 0x30], axis=-1)
    return Scales(float16(blocks, 0), whole_rows(steps)), Scales(-float16(blocks, 2), whole_rows(minimums))
