"""ggml's quantized blocks, split without loss into codes, scales and minimums (tinyvllm.arrays.QuantizedMatrix).

Block layouts: https://github.com/ggml-org/llama.cpp/blob/aca2e6ce7909064dbfbf3bd168e9ad3db1826e6c/ggml/src/ggml-common.h
To add a kind, write a function like those below and add an entry to QUANTIZED_KINDS: docs/EXTENDING.md has an example.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ml_dtypes import float8_e4m3fn, float8_e8m0fnu

from tinyvllm.arrays import E2M1, Format, LazyCodes, QuantizedMatrix, ScaleFormat, Scales
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.blocks import BlockKind, Parts, bit_fields, float16, nibbles, uint16, whole_rows
from tinyvllm.model.weights.grids import GRID_KINDS
from tinyvllm.storage.gguf_types import BLOCK_SIZES

PIECE_WEIGHTS = 1 << 22  # that are split at a time
LAZY_WEIGHTS = 1 << 26  # from which on codes are not kept: splitting twice takes longer
GROUP = 32  # weights of a legacy block, and of a group in Q4_K and Q5_K
SUPER = 256  # weights of a K quant's block
BLOCK_SCALE = ScaleFormat(GROUP)
SUPER_SCALE = ScaleFormat(SUPER)
STEPPED_SCALE = ScaleFormat(SUPER, has_steps=True)
NVFP4_SCALE = ScaleFormat(16, dtype="e4m3", has_multiplier=True)
IQ4 = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))  # kvalues_iq4nl


def decompose(ggml_type: str, raw: np.ndarray, shape: tuple[int, ...]) -> QuantizedMatrix:
    """Split a matrix's bytes. raw: all its bytes, uint8, any shape; shape (N, K).

    Raises UnsupportedModelError for an unknown type, ModelError if the number of bytes does not match.
    """
    if ggml_type not in QUANTIZED_KINDS:
        raise UnsupportedModelError(f"quantization {ggml_type} is not supported; known: {', '.join(QUANTIZED_KINDS)}")
    block_size, block_bytes = BLOCK_SIZES[ggml_type]
    if len(shape) != 2 or shape[1] % block_size != 0 or raw.size * block_size != shape[0] * shape[1] * block_bytes:
        raise ModelError(
            f"{raw.size} bytes are not a {ggml_type} matrix of shape {shape}: rows come in blocks of {block_size} "
            f"weights and {block_bytes} bytes"
        )
    kind = QUANTIZED_KINDS[ggml_type]
    return _split(kind, raw.reshape(shape[0], shape[1] // block_size, block_bytes), shape[1])


def _split(kind: BlockKind, blocks: np.ndarray, num_cols: int) -> QuantizedMatrix:
    """A matrix of these blocks. A large one is split some rows at a time: intermediate values would otherwise take
    several bytes a weight. The codes of the largest, a byte or two a weight, are split again when they are read."""
    step = max(1, PIECE_WEIGHTS // num_cols)
    if len(blocks) <= 2 * step:
        return QuantizedMatrix(kind.format, *kind.split(blocks))
    whole: QuantizedMatrix | None = None
    for first in range(0, len(blocks), step):
        piece = QuantizedMatrix(kind.format, *kind.split(blocks[first : first + step]))
        whole = whole or _empty_like(piece, _codes_of(kind, blocks, piece))
        if isinstance(whole.codes, LazyCodes):
            piece = replace(piece, codes=whole.codes)
        for target, source in zip(_arrays(whole), _arrays(piece), strict=True):
            target[first : first + step] = source
    assert whole is not None
    return whole


def _codes_of(kind: BlockKind, blocks: np.ndarray, piece: QuantizedMatrix) -> np.ndarray | LazyCodes:
    shape = len(blocks), piece.codes.shape[1]
    if len(blocks) * piece.shape[1] < LAZY_WEIGHTS:
        return np.empty(shape, piece.read_codes().dtype)
    return LazyCodes(lambda rows: kind.split(blocks[rows])[0], shape)


def _empty_like(piece: QuantizedMatrix, codes: np.ndarray | LazyCodes) -> QuantizedMatrix:
    """A matrix of these codes, whose arrays are to be written."""
    num_rows = codes.shape[0]

    def empty(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.empty((num_rows, *array.shape[1:]), array.dtype)

    def scales(like: Scales) -> Scales:
        base = np.empty((num_rows, *like.base.shape[1:]), like.base.dtype)
        return Scales(base, empty(like.steps), empty(like.multiplier))

    minimum = None if piece.minimum is None else scales(piece.minimum)
    return QuantizedMatrix(piece.format, codes, scales(piece.scale), minimum, empty(piece.signs))


def _arrays(matrix: QuantizedMatrix) -> list[np.ndarray]:
    """Those that are in memory."""
    codes = matrix.codes if isinstance(matrix.codes, np.ndarray) else None
    scales = [scales for scales in (matrix.scale, matrix.minimum) if scales is not None]
    of_scales = [array for scale in scales for array in (scale.base, scale.steps, scale.multiplier)]
    return [array for array in (codes, *of_scales, matrix.signs) if array is not None]


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


def _q2_k(blocks: np.ndarray) -> Parts:
    """16 bytes of scales and, above them, minimums, 4 bits each · 64 bytes of codes · d f16 · dmin f16."""
    packed = blocks[..., :16]
    scale = Scales(float16(blocks, 80), whole_rows(packed & 0x0F))
    return (
        whole_rows(bit_fields(blocks[..., 16:80], 2, 128)),
        scale,
        Scales(-float16(blocks, 82), whole_rows(packed >> 4)),
    )


def _q3_k(blocks: np.ndarray) -> Parts:
    """32 bytes of third bits, bit g of group g of 32 · 64 bytes of low bits · 12 of scales · d f16.

    The scales have 6 bits, less 32: the low four of scales 0-7 and, above them, of 8-15 in eight bytes; the high two of
    scales i, i + 4, i + 8 and i + 12 in byte i of the last four.
    """
    third = bit_fields(blocks[..., :32], 1, SUPER) << 2
    codes = whole_rows(bit_fields(blocks[..., 32:96], 2, 128) | third)
    steps = bit_fields(blocks[..., 96:104], 4, 16) | bit_fields(blocks[..., 104:108], 2, 16) << 4
    return codes, Scales(float16(blocks, 108), whole_rows(steps.view(np.int8) - np.int8(32))), None


def _iq4_nl(blocks: np.ndarray) -> Parts:
    """d f16 · 16 bytes of codes."""
    return whole_rows(nibbles(blocks[..., 2:], GROUP)), _block_scales(blocks, 0), None


def _iq4_xs(blocks: np.ndarray) -> Parts:
    """d f16 · 16 bits of scales' high two bits · 4 bytes of their low four · 128 bytes of codes. Scales are less 32."""
    shifts = np.arange(SUPER // GROUP, dtype=np.uint8)
    high = (uint16(blocks, 2)[..., None] >> 2 * shifts & 3).astype(np.uint8) << 4  # (N, B, 8)
    low = np.repeat(blocks[..., 4:8], 2, axis=-1) >> 4 * (shifts % 2) & 0x0F
    steps = (low | high).view(np.int8) - np.int8(32)
    return whole_rows(nibbles(blocks[..., 8:], GROUP)), Scales(float16(blocks, 0), whole_rows(steps)), None


def _mxfp4(blocks: np.ndarray) -> Parts:
    """scale e8m0 · 16 bytes of codes."""
    scale = np.ascontiguousarray(blocks[..., 0]).view(float8_e8m0fnu)
    return whole_rows(nibbles(blocks[..., 1:], GROUP)), Scales(scale), None


def _nvfp4(blocks: np.ndarray) -> Parts:
    """4 scales e4m3, without sign · 32 bytes of codes. ggml reads the scales' code of NaN as zero. The multiplier is a
    tensor of its own (`gguf.py`)."""
    scales = whole_rows(blocks[..., :4] & 0x7F)
    scales[scales == 0x7F] = 0
    multiplier = np.ones(len(blocks), np.float32)
    return whole_rows(nibbles(blocks[..., 4:], 16)), Scales(scales.view(float8_e4m3fn), None, multiplier), None


def _q1_0(blocks: np.ndarray) -> Parts:
    """d f16 · 16 bytes of codes, lowest bit first; 0 stands for -1."""
    return whole_rows(np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")), _block_scales(blocks, 0), None


def _q2_0(blocks: np.ndarray) -> Parts:
    """d f16 · 16 bytes of codes, lowest bits first."""
    codes = blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return whole_rows(codes), _block_scales(blocks, 0), None


def _tq1_0(blocks: np.ndarray) -> Parts:
    """48 bytes of 5 ternary digits each, then 4 bytes of 4 · d f16.

    A byte is a fraction of 256 in base 3, highest digit first. The digits of 32 bytes, of 16 and of 4 are interleaved:
    first the highest digit of each.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [
        blocks[..., None, begin:end] * powers[:count]  # modulo 256: without the higher digits
        for begin, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    fractions = np.concatenate([part.reshape(*blocks.shape[:2], -1) for part in parts], axis=-1)
    return whole_rows((fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8)), _block_scales(blocks, 52), None


def _tq2_0(blocks: np.ndarray) -> Parts:
    """64 bytes of codes · d f16."""
    return whole_rows(bit_fields(blocks[..., :64], 2, 128)), _block_scales(blocks, 64), None


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
        BlockKind(Format("Q2_K", 2, 16, scale=STEPPED_SCALE, minimum=STEPPED_SCALE), _q2_k),
        BlockKind(Format("Q3_K", 3, 16, offset=4, scale=STEPPED_SCALE), _q3_k),
        BlockKind(Format("IQ4_NL", 4, GROUP, scale=BLOCK_SCALE, codebook=IQ4), _iq4_nl),
        BlockKind(Format("IQ4_XS", 4, GROUP, scale=STEPPED_SCALE, codebook=IQ4), _iq4_xs),
        BlockKind(Format("MXFP4", 4, GROUP, scale=ScaleFormat(GROUP, dtype="e8m0"), codebook=E2M1), _mxfp4),
        BlockKind(Format("NVFP4", 4, 16, scale=NVFP4_SCALE, codebook=E2M1), _nvfp4),
        BlockKind(Format("Q1_0", 1, 128, scale=ScaleFormat(128), codebook=(-1.0, 1.0)), _q1_0),
        BlockKind(Format("Q2_0", 2, 64, offset=1, scale=ScaleFormat(64)), _q2_0),
        BlockKind(Format("TQ1_0", 2, 128, offset=1, scale=SUPER_SCALE), _tq1_0),
        BlockKind(Format("TQ2_0", 2, 128, offset=1, scale=SUPER_SCALE), _tq2_0),
        *GRID_KINDS,
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
