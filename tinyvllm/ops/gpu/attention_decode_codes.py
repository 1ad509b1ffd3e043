"""Quantized keys and values in the decode kernel: what a lane loads of a tile of the context and makes into operands of
the matrix unit, and what it stores of the row's own token.

The order of a head's dimensions is free, as long as queries and keys have the same, and values and results. So a lane
reads neighboring codes, 16 bytes at once where it has as many, and of 4-bit codes whole bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu.attention_decode_row import GROUP, Row, Runs
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.gpu.attention_split import TILE_TOKENS
from tinyvllm.ops.gpu.kv_codes import (
    IN_HALF,
    QUAD,
    Codes,
    StoredHeads,
    over_lanes,
    quad_pairs,
    quantized,
    scaled_pair,
)
from tinyvllm.ops.kernel.body import F32, U16, U32
from tinyvllm.ops.kernel.kv_format import Q4_ZERO
from tinyvllm.ops.kernel.lanes import load_cuda_words_if
from tinyvllm.ops.kernel.tiles import FLOATS, pack_words

HALF_TILE = TILE_TOKENS // 2  # tokens that one instruction of the matrix unit scores
LOW, HIGH = 0x000F000F, 0x00F000F0  # codes of 4 bits in both halves of a word
PLACED_PAIR = 0x54005400  # two float16 of 64, in whose mantissa a code in the high half of a byte is worth itself
LOW_ZERO, HIGH_ZERO = IN_HALF + Q4_ZERO, (IN_HALF >> 4) + Q4_ZERO  # what float16 of the two are for the number 0
BYTES_OF_TWO = (0x5140, 0x7362)  # byte 0 of two words and their byte 1; their bytes 2 and 3
HALVES_OF_TWO = (0x5410, 0x7632)  # the low halves of two words; their high halves
PERMUTE_TWO = "__byte_perm({{0}}, {{1}}, {0:#x})"
# heads are half of the rows of a tile
MULTIPLY_HEADS = (
    'asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{{%0, %1, %2, %3}}}}, {{{{%4, %5, %6, %5}}}}, '
    '{{{{%7, %8}}}}, {{{{%0, %1, %2, %3}}}};" : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w) : '
    '"r"({{{0}}}), "r"(0u), "r"({{{1}}}), "r"({{{2}}}), "r"({{{3}}}));'
)
HEAD_SUMS = "[&]{{{{ float4 c = make_float4({{0}}, {{1}}, 0.0f, 0.0f); {0} return c; }}}}()"


def multiply_heads(left: Sequence[UOp], right: Sequence[UOp], sums: Sequence[UOp]) -> list[UOp]:
    """`sums`, the lane's two, plus the product of words of two halves: 8 heads times two words for each 16 terms."""
    lines, count = [], len(left)
    for i in range(0, count, 2):
        at = [2 + i, 3 + i, 2 + count + i, 3 + count + i]
        lines.append(MULTIPLY_HEADS.format(*at))
    block = UOp(Ops.CUSTOM, FLOATS, src=(*sums, *left, *right), arg=HEAD_SUMS.format(" ".join(lines)))
    return [UOp(Ops.CUSTOMI, F32, src=(block,), arg=f"{{0}}.{name}") for name in "xy"]


# -- keys --------------------------------------------------------------------------------------------------------------


def query_words(row: Row, query: Runs) -> list[list[UOp]]:
    """The lane's runs of its query, by chunk, as operands of products with `key_words`."""
    return [_in_order(row, [[v.cast(F32) for v in run[i : i + QUAD]] for i in (0, QUAD)]) for (run,) in query]


def _in_order(row: Row, quads: list[list[UOp]]) -> list[UOp]:
    """A run's words: of 4-bit codes the first and the third of four neighbors, and the second and the fourth."""
    ends = ((0, 2), (1, 3)) if row.spec.kv.keys.bits == 4 else ((0, 1), (2, 3))
    return [pack_words(quad[a], quad[b]) for quad in quads for a, b in ends]


def load_keys(row: Row, heads: StoredHeads, slot: UOp, half: int, is_used: UOp) -> list[UOp]:
    """The lane's codes, and then their scales, of the eight keys that one instruction scores. `slot`: of the tile's
    first token."""
    spec, lane = row.spec, row.group.lane
    place = heads.head(slot + half * HALF_TILE + lane // 4, row.group.kv_head)
    dims = [spec.run_dim(lane % 4, c) for c in range(0, spec.chunks, spec.runs_at_once)]
    if not heads.form.is_quantized:
        starts = [place * spec.head_dim + dim for dim in dims]
        return [word for at in starts for word in load_cuda_words_if(is_used, heads.codes, at, spec.key_words)]
    words = [word for dim in dims for word in heads.words(place, dim, spec.key_words)]
    scales = [heads.scale(place, dim) for dim in dims]
    return words + [scale for scale in scales if scale is not None]


def key_words(row: Row, heads: StoredHeads, loaded: list[UOp]) -> list[list[UOp]]:
    """What `load_keys` loaded as operands, by chunk."""
    spec, form = row.spec, heads.form
    if not form.is_quantized:
        return [loaded[i : i + spec.key_words] for i in range(0, len(loaded), spec.key_words)]
    loads = spec.chunks // spec.runs_at_once
    scales = loaded[loads * spec.key_words :]
    chunks: list[list[UOp]] = []
    for i in range(loads):
        codes = loaded[i * spec.key_words : (i + 1) * spec.key_words]
        factor = spec.mma.both(scales[i]) if scales else None
        if form.bits == 4:
            assert factor is not None
            quads = [_nibbles(row, word, factor, is_high=high) for high in (False, True) for word in codes]
        else:
            quads = [[word for (word,) in quad_pairs(form, code, factor, spec.lanes, spec.mma)] for code in codes]
        chunks += [[*quads[k], *quads[k + 1]] for k in range(0, len(quads), 2)]
    return chunks


def _nibbles(row: Row, word: UOp, factor: UOp, *, is_high: bool) -> list[UOp]:
    """The numbers of the codes in the low or the high halves of a word's bytes 0 and 2, and of those in bytes 1 and
    3."""
    mma = row.spec.mma
    found: list[UOp] = []
    for shifted in (word, word >> 8):
        half = mma.to_halves(shifted, HIGH, PLACED_PAIR) if is_high else mma.to_halves(shifted, LOW)
        found += scaled_pair((half,), HIGH_ZERO if is_high else LOW_ZERO, factor, mma)
    return found


# -- values ------------------------------------------------------------------------------------------------------------


def load_values(row: Row, heads: StoredHeads, slot: UOp, tokens: Sequence[UOp], is_used: UOp) -> list[list[UOp]]:
    """By token, the lane's codes and then their scale."""
    spec, column, loaded = row.spec, row.group.lane // 4, []
    dim = spec.value_dim(column, 0)
    for token in tokens:
        place = heads.head(slot + token, row.group.kv_head)
        if not heads.form.is_quantized:
            loaded.append(load_cuda_words_if(is_used, heads.codes, place * spec.head_dim + dim, spec.value_words))
            continue
        scale = heads.scale(place, dim)
        loaded.append(heads.words(place, dim, spec.value_words) + ([] if scale is None else [scale]))
    return loaded


def value_words(row: Row, heads: StoredHeads, loaded: list[list[UOp]]) -> list[list[UOp]]:
    """What `load_values` loaded of four tokens as operands: for each dimension of the lane, the words of the first two
    tokens and of the others."""
    return [list(pair) for pair in zip(*[_of_two(row, heads, loaded[i : i + 2]) for i in (0, 2)], strict=True)]


def _of_two(row: Row, heads: StoredHeads, loaded: list[list[UOp]]) -> list[UOp]:
    """For each dimension of the lane a word of both tokens' numbers."""
    spec, form, count = row.spec, heads.form, row.spec.value_words
    factor = None
    if form.group:
        low, high = (one[count].bitcast(U16).cast(U32) for one in loaded)
        factor = low | high << 16
    pairs = list(zip(loaded[0][:count], loaded[1][:count], strict=True))
    if not form.is_quantized:
        return [_permuted(a, b, places) for a, b in pairs for places in HALVES_OF_TWO]
    if form.bits == 8:
        quads = [_permuted(a, b, places) for a, b in pairs for places in BYTES_OF_TWO]
        return [word for quad in quads for (word,) in quad_pairs(form, quad, factor, spec.lanes, spec.mma)]
    assert factor is not None
    halves = [_permuted(a, b, places) for a, b in pairs for places in HALVES_OF_TWO]
    return [word for high in (False, True) for half in halves for word in _nibbles(row, half, factor, is_high=high)]


def _permuted(a: UOp, b: UOp, places: int) -> UOp:
    """Bytes of two words, by the numbers in the halves of `places`."""
    return UOp(Ops.CUSTOM, U32, src=(a, b), arg=PERMUTE_TWO.format(places))


# -- the row's own token -----------------------------------------------------------------------------------------------


def own_key(row: Row, heads: StoredHeads, key: Runs, is_writer: UOp) -> tuple[Runs, list[UOp]]:
    """(the lane's runs of a rotated key as they are read back, stores of the lane's codes and scales)."""
    spec, stores = row.spec, []
    numbers = [[list(run) for run in chunk] for chunk in key]
    place = row.own_head
    for group, masks in spec.key_groups:
        flat = [value for c, n in group for value in key[c][n]]
        codes = quantized(heads.form, flat, over_lanes(spec.lanes, flat, masks))
        for i, (c, n) in enumerate(group):
            numbers[c][n] = codes.numbers[i * RUN : (i + 1) * RUN]
        starts = [row.query_dims[c][n][0] for c, n in group]
        stores += _code_stores(heads, place, starts, RUN, codes, is_writer)
        stores += _scale_store(heads, place, starts[0], codes, is_writer)
    return numbers, stores


def own_value(
    row: Row, heads: StoredHeads, spans: list[list[UOp]], is_writer: UOp
) -> tuple[list[list[UOp]], list[UOp]]:
    """(the lane's spans of the row's value as they are read back, stores of the lane's codes and scales)."""
    spec, stores, size = row.spec, [], row.spec.head_dim // RUN
    place, numbers = row.own_head, []
    parts = [[0], [1]] if size == GROUP else [[0, 1]]  # spans that are in one group
    for part in parts:
        flat = [value for e in part for value in spans[e]]
        masks = (1,) if 2 * size < GROUP else ()
        codes = quantized(heads.form, flat, over_lanes(spec.lanes, flat, masks))
        halves = 2 if heads.form.bits == 4 else 1
        for i, e in enumerate(part):
            own = Codes(heads.form, codes.codes[i * size : (i + 1) * size], codes.scale)
            numbers.append(own.numbers)
            starts = [spec.value_dim(row.column + e, h * (size // halves)) for h in range(halves)]
            stores += _code_stores(heads, place, starts, size // halves, own, is_writer)
        stores += _scale_store(heads, place, spec.value_dim(row.column + part[0], 0), codes, is_writer)
    return numbers, stores


def _code_stores(
    heads: StoredHeads, place: UOp, starts: list[UOp], count: int, codes: Codes, is_writer: UOp
) -> list[UOp]:
    """Stores of runs of `count` dimensions. Of 4-bit codes, the second half of the runs lies in the bytes of the
    first."""
    quads, per_run = codes.quads(), count // QUAD
    if heads.form.bits == 4:
        half = len(quads) // 2
        quads = [low | high << 4 for low, high in zip(quads[:half], quads[half:], strict=True)]
        starts = starts[: len(starts) // 2]
    stores = []
    for i, start in enumerate(starts):
        at = heads.word_at(place, start)
        for j, word in enumerate(quads[i * per_run : (i + 1) * per_run]):
            stores.append(heads.codes[(at + j).valid(is_writer)].store(word))
    return stores


def _scale_store(heads: StoredHeads, place: UOp, start: UOp, codes: Codes, is_writer: UOp) -> list[UOp]:
    """The store of a group's scale by the lane that holds its first element."""
    if codes.scale is None or heads.scales is None:
        return []
    leads = is_writer & (start % heads.form.group).eq(0)
    return [heads.scales[heads.scale_at(place, start).valid(leads)].store(codes.scale)]
