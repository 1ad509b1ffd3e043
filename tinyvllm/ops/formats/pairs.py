"""Reading a quantized run's codes two at a time: words of two float16, as the matrix units of GPUs take them.

A code becomes a float16 without being converted, by one or two instructions for both:

- an integer, and the values in a grid: in the lowest bits of the mantissa of 1024, which makes it 1024 + code;
- an e4m3 or e2m1 float: its bits below the sign bit; the exponent is then too small by a constant;
- an index into a codebook: bytes of the codebook's values, if all are small integers times a power of two (IQ4, whose
  bytes then are integers as above); the two bytes of float16 values otherwise (NF4).

What the numbers stand for is their `CodeForm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import PANEL, Planes, ScalePlanes, code_lanes
from tinyvllm.ops.formats.runs import (
    E2M1_PLACE,
    E4M3_PLACE,
    FLIPPED,
    SIGNED,
    CodeForm,
    code_words,
    group_of,
    group_scale,
    groups_in_run,
    high_words,
    line,
    moved,
    packed_bits,
    require_covered,
    shifted_down,
    small_float_unit,
)
from tinyvllm.ops.kernel.body import F16, I32, U32
from tinyvllm.ops.kernel.lanes import HALF_PAIR, Mma

IN_HALF = 1024  # a code in a float16's mantissa makes it 1024 + code
PLACED_PAIR = 0x54005400  # two float16 of 64, whose mantissa's bit 4 is worth 1
BOTH = 0x00010001  # the lowest bit of both halves of a word
TWICE = "__byte_perm({0}, 0x64646464, 0x4040)"  # the lowest byte in the mantissa of 1024, in both halves
MAX_FOLDED = 256.0  # units that a scale is multiplied by: with larger ones it might exceed float16
FLOAT_PLACES = {8: E4M3_PLACE, 4: E2M1_PLACE}  # by a small float's bits


def code_order(fmt: Format, mma: Mma) -> tuple[int, ...]:
    """The order of four neighboring codes in `read_pairs`. Masking a word leaves every other code in its halves; an
    instruction that converts two codes takes neighbors."""
    return (0, 1, 2, 3) if _is_converted(fmt, mma) else (0, 2, 1, 3)


def _is_converted(fmt: Format, mma: Mma) -> bool:
    """Whether an instruction makes float16 of the codes."""
    return fmt.is_float8 and mma.has_float8 and mma.dtype == F16


def pair_form(fmt: Format, mma: Mma) -> CodeForm:
    """What the halves of `read_pairs` stand for."""
    require_covered(fmt)
    if _is_converted(fmt, mma):
        return CodeForm(1.0, 0.0)
    if unit := small_float_unit(fmt):
        return CodeForm(unit if mma.takes_subnormals else 1.0, 0.0)
    if known := line(fmt):
        return _integer_form(*known, 0)
    assert fmt.codebook is not None
    unit = byte_unit(fmt.codebook)
    return CodeForm(unit, unit * (IN_HALF + SIGNED)) if unit else CodeForm(1.0, 0.0)


def pair_forms(fmt: Format, mma: Mma) -> tuple[CodeForm, CodeForm]:
    """What the halves of words in place stand for: in the first half of a run, and in the second. 4-bit codes of the
    second lie four bits higher, and stay there: in the mantissa of 64, which makes it 64 + code."""
    form = pair_form(fmt, mma)
    known = line(fmt)
    if known is None or not _stays_in_place(fmt):
        return form, form
    step, first = known
    return form, CodeForm(step, (IN_HALF >> 4) * step - first)


def _stays_in_place(fmt: Format) -> bool:
    """Whether codes of the second half of a run are read where they lie."""
    return packed_bits(fmt) == (4, 0) and line(fmt) is not None and not small_float_unit(fmt)


def read_pairs(planes: Planes, row: UOp, run: UOp, num_runs: int, mma: Mma) -> list[UOp]:
    """A run's codes as words of two halves (`pair_form`), so that one instruction does two.

    The words are in groups of four neighboring columns, each in `code_order`: the first four of the run, the first four
    of its second half, the second four, and so on.
    """
    require_covered(planes.fmt)
    fmt, index = planes.fmt, row * num_runs + run
    fours = [i // 2 + i % 2 * 4 for i in range(PANEL // 4)]  # which four neighbors, in order
    tables = _byte_tables(fmt)
    if not tables:
        return [_spread_pair(planes, mma, index, four, odd) for four in fours for odd in range(2)]
    looked_up = [_look_up(planes, index, table, mma) for table in tables]
    if len(tables) == 1:
        (words,) = looked_up
        return [mma.to_halves(shifted_down(words[four], 8 * odd), 0xFF * BOTH) for four in fours for odd in range(2)]
    low, high = looked_up
    pairs = []
    for four in fours:
        pairs += _joined(low[four], high[four])
    return pairs


def _in_place(mma: Mma, word: UOp, half: int, odd: int) -> UOp:
    """Two codes of 4 bits, of the first or the second half of a run, where they lie in a word."""
    word = shifted_down(word, 8 * odd)
    return mma.to_halves(word, 0xF0 * BOTH, PLACED_PAIR) if half else mma.to_halves(word, 0xF * BOTH)


def read_quarter(planes: Planes, run: UOp, quarter: UOp, mma: Mma) -> list[UOp]:
    """The four words of `read_pairs` from number 4 * `quarter` on: four neighboring columns of the first half of a run,
    and four of the second. They stand for `pair_forms`."""
    fmt, (width, high_width) = planes.fmt, packed_bits(planes.fmt)
    count = code_lanes(fmt) // 4
    if count == 8:
        words = [planes.codes[run * 8 + quarter + i].load() for i in (0, 4)]
        words = words if fmt.is_float8 else [word ^ FLIPPED for word in words]
        parts = [(word, 0) for word in words]
    else:
        word = planes.codes[run * count + quarter % count].load()
        if count < 4:
            word = word >> (quarter // count * width).cast(U32)
        parts = [(word, 0), (word, 4 // count * width)]
    if tables := _byte_tables(fmt):
        found = [mma.look_up(parts[0][0], table) for table in tables]
        if len(tables) == 1:
            return [mma.to_halves(shifted_down(four, 8 * odd), 0xFF * BOTH) for four in found[0] for odd in range(2)]
        return [pair for low, high in zip(*found, strict=True) for pair in _joined(low, high)]
    if _is_converted(fmt, mma):
        return [mma.float8_pair(word, odd) for word, _ in parts for odd in range(2)]
    if unit := small_float_unit(fmt):
        pairs = [_small_floats(word, shift + odd * 8, width) for word, shift in parts for odd in range(2)]
        return pairs if mma.takes_subnormals else [mma.scaled(pair, unit) for pair in pairs]
    mask = ((1 << width) - 1) * BOTH
    if _stays_in_place(fmt):
        return [_in_place(mma, parts[0][0], half, odd) for half in range(2) for odd in range(2)]
    if not high_width or planes.high is None:
        return [mma.to_halves(shifted_down(word, shift + odd * 8), mask) for word, shift in parts for odd in range(2)]
    pairs = []
    for half, (word, shift) in enumerate(parts):
        # the bits of the half's 16 codes lie in a word of their own, or in half of one
        at = planes.high[run * high_width + half * high_width // 2].load()
        moved_by = quarter * (4 * high_width) + (16 if half and high_width == 1 else 0)
        if high_width == 4:
            at, moved_by = planes.high[run * 4 + half * 2 + quarter // 2].load(), quarter % 2 * 16
        high = at >> moved_by.cast(U32)
        for odd in range(2):
            bits = [(odd + side) * high_width for side in (0, 2)]
            pairs.append(
                mma.to_halves(*_with_high(shifted_down(word, shift + odd * 8), mask, [high], bits, width, high_width))
            )
    return pairs


def _joined(low: UOp, high: UOp) -> list[UOp]:
    """Four float16 values, from their low and their high bytes, as two words."""
    return [
        (low & 0x00FF00FF) | ((high << 8) & 0xFF00FF00),
        ((low >> 8) & 0x00FF00FF) | (high & 0xFF00FF00),
    ]


def read_halves(planes: Planes, row: UOp, run: UOp, num_cols: int, mma: Mma) -> list[UOp]:
    """A quantized run's weights, rounded to float16, as the operand of `Mma.multiply_pairs`: two instructions per pair,
    besides those that move it into place. A code's value is exact in float16 (NF4's is rounded), so its product with a
    float16 scale is rounded once."""
    require_covered(planes.fmt)
    fmt = planes.fmt
    pairs = _neighbors(planes, row * (num_cols // PANEL) + run, mma)
    is_folded = all(form.excess == 0.0 and form.unit <= MAX_FOLDED for _, form in pairs)
    factors = []
    for i in range(groups_in_run(fmt)):
        group = group_of(fmt, run, i)
        scale = group_scale(planes.scale, row, group, fmt, num_cols)
        factor = mma.both((scale * pairs[0][1].unit if is_folded else scale).cast(F16))
        addend = None
        if planes.minimum is not None:
            addend = mma.both(group_scale(planes.minimum, row, group, fmt, num_cols).cast(F16))
        factors.append((factor, addend))
    weights: list[UOp] = []
    for i, (word, form) in enumerate(pairs):
        factor, addend = factors[i * len(factors) // len(pairs)]
        code = mma.pair_of(word)
        if not is_folded:
            code = mma.fuse(code, mma.both(form.unit), mma.both(-form.excess) if form.excess else None)
        weights += mma.fuse(code, factor, addend)
    return weights


def _placed_pairs(planes: Planes, run: UOp, mma: Mma) -> list[UOp]:
    """The words of `read_pairs`, with codes of 4 bits where they lie: they stand for `pair_forms`."""
    words = code_words(planes, run)
    return [_in_place(mma, words[i // 2], i % 2, odd) for i in range(PANEL // 4) for odd in range(2)]


def read_placed(planes: Planes, run: UOp, scale_run: UOp, mma: Mma) -> list[UOp]:
    """A run's weights, rounded to float16, in the order of `read_pairs`. `scale_run`: its number in the planes of
    scales, which begin at another column than those of codes."""
    require_covered(planes.fmt)
    fmt, nil, forms = planes.fmt, UOp.const(0, I32), pair_forms(planes.fmt, mma)
    words = _placed_pairs(planes, run, mma) if _stays_in_place(fmt) else read_pairs(planes, nil, run, 0, mma)
    is_folded = all(form.excess == 0.0 and form.unit == forms[0].unit <= MAX_FOLDED for form in forms)
    factors = []
    for i in range(groups_in_run(fmt)):
        group = group_of(fmt, scale_run, i)
        factor = _group_pair(planes.scale, group, fmt, mma, forms[0].unit if is_folded else 1.0)
        factors.append((factor, None if planes.minimum is None else _group_pair(planes.minimum, group, fmt, mma, 1.0)))
    weights: list[UOp] = []
    for i, word in enumerate(words):
        form, (factor, addend) = forms[i // 2 % 2], factors[i // 2 % 2 * len(factors) // 2]
        code = mma.pair_of(word)
        if not is_folded:
            code = mma.fuse(code, mma.both(form.unit), mma.both(-form.excess) if form.excess else None)
        weights += mma.fuse(code, factor, addend)
    return weights


def _group_pair(scales: ScalePlanes | None, group: UOp, fmt: Format, mma: Mma, unit: float) -> UOp:
    """The scale (or minimum) of a group, rounded to float16, as both halves of a word."""
    assert scales is not None
    if scales.steps is None or scales.format.dtype != "float16" or scales.multiplier is not None or unit != 1.0:
        value = group_scale(scales, UOp.const(0, I32), group, fmt, 0)
        return mma.both((value if unit == 1.0 else value * unit).cast(F16))
    # the steps, integers of a byte, become float16 as codes do
    base = scales.base[group // (scales.format.span // fmt.group)].load()
    step = scales.steps[group].load()
    offset = float(SIGNED if step.dtype == dtypes.char else 0)
    byte = (step.cast(dtypes.uchar).cast(U32) ^ int(offset)) if offset else step.cast(U32)
    word = UOp(Ops.CUSTOM, U32, src=(byte,), arg=TWICE)
    (number,) = mma.fuse((word,), mma.both(1.0), mma.both(-IN_HALF - offset))
    return mma.fuse((number,), mma.both(base * scales.format.unit if scales.format.unit != 1.0 else base), None)[0]


# -- words of two codes ------------------------------------------------------------------------------------------------


def _spread_pair(planes: Planes, mma: Mma, run: UOp, four: int, odd: int) -> UOp:
    """A word of two codes of four neighbors: `odd` and `odd` + 2, which lie 16 bits apart in the same word, or as
    `code_order` says."""
    fmt, (width, high_width) = planes.fmt, packed_bits(planes.fmt)
    words, high = code_words(planes, run), high_words(planes, run)
    shift, word = four // len(words) * width + odd * 8, words[four % len(words)]
    if _is_converted(fmt, mma):
        return mma.float8_pair(word, odd)
    if unit := small_float_unit(fmt):
        pair = _small_floats(word, shift, width)
        return pair if mma.takes_subnormals else mma.scaled(pair, unit)
    mask = ((1 << width) - 1) * BOTH
    if not high:
        return mma.to_halves(shifted_down(word, shift), mask)
    bits = [(four * 4 + odd + side) * high_width for side in (0, 2)]
    return mma.to_halves(*_with_high(shifted_down(word, shift), mask, high, bits, width, high_width))


def _neighbors(planes: Planes, run: UOp, mma: Mma) -> list[tuple[UOp, CodeForm]]:
    """Words of two neighboring codes in the order of the columns, and what their halves stand for."""
    fmt, (width, _) = planes.fmt, packed_bits(planes.fmt)
    tables = _byte_tables(fmt)
    if tables:
        looked_up, form = [_look_up(planes, run, table, mma) for table in tables], pair_form(fmt, mma)
        if len(tables) == 1:
            return [(pair, form) for pair in _byte_pairs(looked_up[0], mma, HALF_PAIR >> 24)]
        low, high = (_byte_pairs(words, mma, 0) for words in looked_up)
        return [(a | b << 8, form) for a, b in zip(low, high, strict=True)]
    if _is_converted(fmt, mma):
        words = code_words(planes, run)
        return [(mma.float8_pair(word, which), CodeForm(1.0, 0.0)) for word in words for which in range(2)]
    if width == 8 and not fmt.is_float8:
        return [(pair, pair_form(fmt, mma)) for pair in _byte_pairs(code_words(planes, run), mma, HALF_PAIR >> 24)]
    shared = _byte_pairs(code_words(planes, run), mma, 0)  # pairs whose bytes several codes share
    parts = [(shared[i % len(shared)], i // len(shared) * width) for i in range(PANEL // 2)]
    if unit := small_float_unit(fmt):
        return [(_small_floats(pair, shift, width), CodeForm(unit, 0.0)) for pair, shift in parts]
    return _packed_neighbors(planes, run, mma, parts)


def _packed_neighbors(
    planes: Planes, run: UOp, mma: Mma, parts: Sequence[tuple[UOp, int]]
) -> list[tuple[UOp, CodeForm]]:
    """As `_neighbors`, of integers whose low bits are in `parts`: words, and the bit of both halves that they begin
    at."""
    fmt, (width, high_width) = planes.fmt, packed_bits(planes.fmt)
    high, mask, pairs, known = high_words(planes, run), ((1 << width) - 1) * BOTH, [], line(fmt)
    assert known is not None
    for i, (pair, shift) in enumerate(parts):
        if high:
            bits = [(2 * i + side) * high_width for side in range(2)]
            word = mma.to_halves(*_with_high(shifted_down(pair, shift), mask, high, bits, width, high_width))
            shift = 0
        else:  # left where they are, codes are larger by a power of two
            up = 0 if _is_half(_integer_form(*known, shift).excess) else 1
            shift += up
            word = mma.to_halves(pair << up if up else pair, mask << shift)
        pairs.append((word, _integer_form(*known, shift)))
    return pairs


def _integer_form(step: float, first: float, shift: int) -> CodeForm:
    """Of 1024 + (code << shift), where the code stands for first + code * step."""
    unit = step * 2.0**-shift
    return CodeForm(unit, IN_HALF * unit - first)


def _is_half(value: float) -> bool:
    """Whether float16 holds a value."""
    return float(np.float16(value)) == value


def _with_high(
    pair: UOp, mask: int, high: Sequence[UOp], bits: Sequence[int], width: int, high_width: int
) -> tuple[UOp, int]:
    """(a word with the low bits `mask` of two codes and their high ones, from the bits `bits` of the plane's words on,
    above them; the mask of all)."""
    above = (1 << high_width) - 1
    pair = pair & mask
    for side, bit in enumerate(bits):
        pair = pair | moved(high[bit // 32], bit % 32, above, width + side * 16)
    return pair, mask | (above * BOTH) << width


def _small_floats(word: UOp, start: int, bits: int) -> UOp:
    """Two floats of `bits` bits, from bit `start` of both halves on, as float16 that are too small by a constant."""
    rest = bits - 1
    return moved(word, start + rest, BOTH, 15) | moved(word, start, ((1 << rest) - 1) * BOTH, FLOAT_PLACES[bits])


def _byte_pairs(words: Sequence[UOp], mma: Mma, above: int) -> list[UOp]:
    """Words of two neighboring bytes, each extended by `above`."""
    return [mma.byte_pair(word, which, above) for word in words for which in range(2)]


# -- codebooks ---------------------------------------------------------------------------------------------------------


@cache
def _byte_tables(fmt: Format) -> tuple[tuple[int, ...], ...]:
    """The tables of 16 bytes that a codebook is looked up in: of integers plus 128, or of the low and the high bytes of
    float16. None without a codebook, or for e2m1."""
    if fmt.codebook is None or small_float_unit(fmt) or line(fmt):
        return ()
    if byte_unit(fmt.codebook):
        return (byte_table(fmt.codebook),)
    bits = np.array(fmt.codebook, np.float16).view(np.uint16)
    return tuple(int(value) for value in bits & 0xFF), tuple(int(value) for value in bits >> 8)


def byte_table(codebook: tuple[float, ...]) -> tuple[int, ...]:
    """The values in units of `byte_unit`, plus 128."""
    unit = byte_unit(codebook)
    return tuple(int(value / unit) + SIGNED for value in codebook)


@cache
def byte_unit(codebook: tuple[float, ...]) -> float:
    """The largest power of two of which all values are multiples by signed bytes; 0 if there is none."""
    for power in range(4, -8, -1):
        unit = 2.0**power
        if all(value % unit == 0.0 and -SIGNED <= value / unit < SIGNED for value in codebook):
            return unit
    return 0.0


def _look_up(planes: Planes, run: UOp, table: tuple[int, ...], mma: Mma) -> list[UOp]:
    """A run's codes of 4 bits looked up in a table of bytes: words of four neighbors."""
    parts = [mma.look_up(word, table) for word in code_words(planes, run)]
    return [low for low, _ in parts] + [high for _, high in parts]
