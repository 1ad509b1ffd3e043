"""Reading a matrix in row layout by runs: consecutive columns of one row, which one lane of a GPU holds in registers.

Codes are not converted from integers, which is slow on GPUs. A code of b bits is put into the high bits of a float32's
mantissa, which makes it f = 1 + code / 2**b, and the group's factors take the rest back:
value = (code - offset) * scale + minimum = f * (scale * 2**b) + (minimum - scale * (2**b + offset)).
Codes that are small floats (e4m3, e2m1) are moved into a float16 in the same way, whose exponent is then too small by a
constant. pairs.py has codes two at a time, in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp
from tinygrad.dtype import DType

from tinyvllm.arrays import E2M1, Format, Grid
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.formats.matrix import (
    PANEL,
    WORD,
    Planes,
    ScalePlanes,
    code_lanes,
    float_of_scale,
    high_bits,
    look_up,
    low_bits,
)
from tinyvllm.ops.kernel.body import F16, F32, I32, U16, U32, balanced
from tinyvllm.ops.kernel.lanes import load_cuda_words

ONE_BITS, MANTISSA_BITS = 0x3F800000, 23
SIGNED = 128  # what is added to signed bytes, to read them as unsigned ones
FLIPPED = 0x80808080  # adds it to the four bytes of a word
SPREAD = 1 | 1 << 7 | 1 << 14 | 1 << 21  # times four bits: bit i is bit 8 * i of the product
MAX_OFFSET = 512  # 1024 + 128 + offset is an integer that float16 holds
CODEBOOK = 16  # values of a codebook
# a small float's bits at the top of a float16's exponent and mantissa make its value smaller by this
# where the bits below the sign begin in a float16
E4M3_PLACE, E2M1_PLACE = 7, 9
FP8_UNIT, FP4_UNIT = 2.0**8, 2.0**14
FP4_TIMES = (0.5, 1.0, 2.0)  # ggml's codebook has twice e2m1's values
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # between the values of a codebook that is as good as integers


def uncovered(fmt: Format) -> str:
    """Why a matrix of this format cannot be read by runs, in words; "" if it can. Other formats take the general form
    (`matrix.unpack`)."""
    if abs(fmt.offset) > MAX_OFFSET:
        return f"an offset of {fmt.offset}"
    if fmt.codebook is not None and len(fmt.codebook) != CODEBOOK and line(fmt) is None:
        return f"a codebook of {len(fmt.codebook)}"
    return ""


def covers(fmt: Format) -> bool:
    """Whether a matrix of this format can be read by runs."""
    return not uncovered(fmt)


def require_covered(fmt: Format) -> None:
    """Raise UnsupportedModelError for a format that `covers` does not."""
    if reason := uncovered(fmt):
        raise UnsupportedModelError(
            f"a fused kernel was given weights in format {fmt.name}, which has {reason}; it reads offsets up to "
            f"{MAX_OFFSET} and codebooks of {CODEBOOK} values: use the general product, or --dequantize"
        )


def run_cols(fmt: Format, dense_cols: int) -> int:
    """Columns of a run: quantized formats read as many codes as share their words."""
    require_covered(fmt)
    return PANEL if fmt.is_quantized else dense_cols


# -- groups ------------------------------------------------------------------------------------------------------------


def groups_in_run(fmt: Format) -> int:
    """Groups of columns that a run of a quantized format touches: two of 16 columns, otherwise one."""
    return max(1, PANEL // fmt.group)


def group_of(fmt: Format, run: UOp, index: int) -> UOp:
    """The number of a run's group. Neighboring runs share a group of more than 32 columns."""
    return run * groups_in_run(fmt) + index if fmt.group <= PANEL else run // (fmt.group // PANEL)


def group_scale(scales: ScalePlanes | None, row: UOp, group: UOp, fmt: Format, num_cols: int) -> UOp:
    """The scale or minimum of one row's group of columns, as float32."""
    assert scales is not None
    span = scales.format.span
    base = scales.base[row * (num_cols // span) + group // (span // fmt.group)].load()
    if scales.format.dtype == "e4m3":  # a scale for every 16 columns: its subnormals are not worth a select
        value = _small_float(base.cast(U32), 8, E4M3_PLACE) * (FP8_UNIT * scales.format.unit)
    else:
        value = float_of_scale(base, scales.format)
    if scales.multiplier is not None:
        value = value * scales.multiplier[row].load()
    if scales.steps is None:
        return value
    return value * scales.steps[row * (num_cols // fmt.group) + group].load().cast(I32).cast(F32)


def group_sums(fmt: Format, x: Sequence[UOp]) -> list[UOp]:
    """What `Run.dot` needs besides x: its sum over each group of a run; nothing for dense formats."""
    require_covered(fmt)
    if not fmt.is_quantized:
        return []
    size = PANEL // groups_in_run(fmt)
    return [balanced(x[i : i + size]) for i in range(0, len(x), size)]


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeForm:
    """What a number that is cheap to make from a code stands for: the code's value is number * unit - excess."""

    unit: float
    excess: float

    @property
    def start(self) -> float:
        """The number that stands for 0."""
        return self.excess / self.unit


@dataclass(frozen=True)
class Run:
    """One lane's consecutive weights. Dense: `floats` are the values and `factors` is empty. Quantized: value i is
    floats[i] * a + b, with (a, b) = factors[i // group]; None as b is 0."""

    floats: list[UOp]
    factors: list[tuple[UOp, UOp | None]]

    @property
    def group(self) -> int:
        """Columns that share a factor, of this run."""
        return len(self.floats) // len(self.factors)

    @property
    def loaded(self) -> list[UOp]:
        """Everything that was read from memory for it."""
        return self.floats + [value for pair in self.factors for value in pair if value is not None]

    def values(self, dtype: DType) -> list[UOp]:
        """The weights, rounded to `dtype`."""
        if not self.factors:
            return [value.cast(dtype) for value in self.floats]
        scaled = []
        for i, value in enumerate(self.floats):
            a, b = self.factors[i // self.group]
            scaled.append((value * a if b is None else value * a + b).cast(dtype))
        return scaled

    def dot(self, x: Sequence[UOp], sums: Sequence[UOp]) -> UOp:
        """weights . x. `sums`: of x over each group (`group_sums`)."""
        products = [value * v for value, v in zip(self.floats, x, strict=True)]
        if not self.factors:
            return balanced(products)
        size, parts = self.group, []
        for i, ((a, b), total) in enumerate(zip(self.factors, sums, strict=True)):
            part = a * balanced(products[i * size : (i + 1) * size])
            parts.append(part if b is None else part + b * total)
        return balanced(parts)


def read_run(planes: Planes, row: UOp, run: UOp, num_cols: int, cols: int) -> Run:
    """Columns [run * cols, (run + 1) * cols) of a row."""
    require_covered(planes.fmt)
    fmt = planes.fmt
    start = row * num_cols + run * cols
    if fmt.name == "bfloat16":
        words = [planes.codes[row * (num_cols // 2) + run * (cols // 2) + i].load() for i in range(cols // 2)]
        return Run([half for word in words for half in _bfloat16_pair(word)], [])
    if not fmt.is_quantized:
        return Run([planes.codes[start + i].load().cast(F32) for i in range(cols)], [])
    floats, form = _code_floats(planes, row * (num_cols // PANEL) + run)
    return Run(floats, run_factors(planes, form, row, run, num_cols))


def _bfloat16_pair(word: UOp) -> list[UOp]:
    """Two neighboring values: a bfloat16 is the upper half of a float32."""
    return [(word << 16).bitcast(F32), (word & 0xFFFF0000).bitcast(F32)]


def run_factors(planes: Planes, form: CodeForm, row: UOp, run: UOp, num_cols: int) -> list[tuple[UOp, UOp | None]]:
    """(a, b) of each of a run's groups: a number of `form` stands for the weight number * a + b. None as b is 0."""
    fmt = planes.fmt
    factors: list[tuple[UOp, UOp | None]] = []
    for i in range(groups_in_run(fmt)):
        group = group_of(fmt, run, i)
        scale = group_scale(planes.scale, row, group, fmt, num_cols)
        shift = scale * -form.excess if form.excess else None
        if planes.minimum is not None:
            minimum = group_scale(planes.minimum, row, group, fmt, num_cols)
            shift = minimum if shift is None else shift + minimum
        factors.append((scale * form.unit, shift))
    return factors


# -- codes -------------------------------------------------------------------------------------------------------------


class PlaneReader:
    """A plane that is not a buffer of its own; elsewhere than in a buffer."""

    def at(self, index: UOp | int) -> UOp:
        """One element."""
        raise NotImplementedError

    def words(self, index: UOp | int, count: int) -> list[UOp]:
        """Neighboring words."""
        raise NotImplementedError

    def __getitem__(self, index: UOp | int) -> PlaneElement:
        return PlaneElement(self, index)


@dataclass(frozen=True)
class PlaneElement:
    plane: PlaneReader
    index: UOp | int

    def load(self) -> UOp:
        return self.plane.at(self.index)


class AlignedPlane(PlaneReader):
    """A plane of an aligned buffer on CUDA, whose compiler does not know of that: words are loaded in vectors."""

    def __init__(self, plane: UOp) -> None:
        self.plane = plane

    def at(self, index: UOp | int) -> UOp:
        return self.plane[index].load()

    def words(self, index: UOp | int, count: int) -> list[UOp]:
        if count > 2 and count % 4:
            return [self.at(index + i) for i in range(count)]
        return load_cuda_words(self.plane, UOp.const(0, I32) + index, count)


def aligned_planes(fmt: Format, planes: Sequence[UOp], kind: str) -> Planes:
    """A matrix's planes, whose words are loaded in vectors on CUDA. Dense values have vector loads of their own."""
    is_loaded = kind == "CUDA" and fmt.is_quantized
    return Planes(fmt, [AlignedPlane(plane) for plane in planes] if is_loaded else planes)


def load_words(plane: UOp | PlaneReader, start: UOp, count: int) -> list[UOp]:
    """Neighboring words of a plane."""
    if isinstance(plane, PlaneReader):
        return plane.words(start, count)
    return [plane[start + i].load() for i in range(count)]


def packed_bits(fmt: Format) -> tuple[int, int]:
    """The bits of a code in `code_words` and in `high_words`. What a grid's codes stand for are bytes."""
    return (low_bits(fmt), high_bits(fmt)) if fmt.grid is None else (8, 0)


def code_words(planes: Planes, run: UOp) -> list[UOp]:
    """The words of the first plane that a run's codes share; bytes of integers as unsigned ones, 128 larger."""
    fmt = planes.fmt
    if fmt.grid is not None:
        return _grid_words(planes, fmt.grid, run)
    count = code_lanes(fmt) // 4
    words = load_words(planes.codes, run * count, count)
    return [word ^ FLIPPED for word in words] if fmt.bits == 8 and not fmt.is_float8 else words


def high_words(planes: Planes, run: UOp) -> list[UOp]:
    """The words of the high plane that a run's codes share."""
    _, width = packed_bits(planes.fmt)
    return [] if planes.high is None or not width else load_words(planes.high, run * width, width)


def line(fmt: Format) -> tuple[float, float] | None:
    """(step, first) if a code in `code_words` stands for first + code * step: if it is an integer, or the values of the
    codebook are equally spaced, by a power of two."""
    if fmt.is_float8:
        return None
    if fmt.codebook is None:
        return 1.0, -float(fmt.offset + (SIGNED if sum(packed_bits(fmt)) == 8 else 0))
    first, second, *_ = fmt.codebook
    step = second - first
    is_even = all(value == first + i * step for i, value in enumerate(fmt.codebook))
    return (step, first) if is_even and step in STEPS and abs(first) <= MAX_OFFSET else None


def small_float_unit(fmt: Format) -> float:
    """If codes are e4m3 floats, or e2m1 floats times a power of two: how many times larger their values are than those
    of the float16 that holds their bits. 0 for other formats."""
    if fmt.is_float8:
        return FP8_UNIT
    if fmt.codebook is None or len(fmt.codebook) != CODEBOOK:
        return 0.0
    times = fmt.codebook[1] / E2M1[1]
    is_fp4 = times in FP4_TIMES and fmt.codebook == tuple(value * times for value in E2M1)
    return FP4_UNIT * times if is_fp4 else 0.0


def moved(word: UOp, start: int, mask: int, target: int) -> UOp:
    """The bits `mask` << `start` of a word, moved to bit `target`."""
    shifted = word << (target - start) if target > start else word >> (start - target) if target < start else word
    return shifted & (mask << target)


def _code_floats(planes: Planes, run: UOp) -> tuple[list[UOp], CodeForm]:
    """A run's codes as numbers of one form."""
    fmt = planes.fmt
    if unit := small_float_unit(fmt):
        place = E4M3_PLACE if fmt.is_float8 else E2M1_PLACE
        return [_small_float(code, fmt.bits, place) for code in _codes_at(planes, run, 0)], CodeForm(unit, 0.0)
    if known := line(fmt):
        step, first = known
        bits = sum(packed_bits(fmt))
        codes = _codes_at(planes, run, MANTISSA_BITS - bits)
        unit = step * (1 << bits)
        return [(code | ONE_BITS).bitcast(F32) for code in codes], CodeForm(unit, unit - first)
    assert fmt.codebook is not None
    return [look_up(code, fmt.codebook) for code in _codes_at(planes, run, 0)], CodeForm(1.0, 0.0)


def _codes_at(planes: Planes, run: UOp, target: int) -> list[UOp]:
    """A run's codes, each at bit `target` of its own word."""
    width, high_width = packed_bits(planes.fmt)
    words, high = code_words(planes, run), high_words(planes, run)
    lanes = len(words) * 4
    mask, high_mask = (1 << width) - 1, (1 << high_width) - 1
    codes = [moved(words[i % lanes // 4], i % 4 * 8 + i // lanes * width, mask, target) for i in range(PANEL)]
    if not high:
        return codes
    bits = [i * high_width for i in range(PANEL)]
    above = [moved(high[bit // 32], bit % 32, high_mask, target + width) for bit in bits]
    return [code | more for code, more in zip(codes, above, strict=True)]


def _grid_words(planes: Planes, grid: Grid, run: UOp) -> list[UOp]:
    """A run's values in a grid plus 128, as words of four neighboring bytes."""
    assert planes.table is not None
    count, width = PANEL // grid.width, high_bits(planes.fmt)  # of codes in a run, and of a code's high bits
    low = [planes.codes[run * (count // 4) + i].load() for i in range(count // 4)]
    codes = [moved(low[i // 4], i % 4 * 8, 0xFF, 0) for i in range(count)]
    if planes.high is not None:
        bit = run * (count * width)
        high = planes.high[bit // WORD].load() >> (bit % WORD).cast(U32)
        codes = [code | moved(high, i * width, (1 << width) - 1, 8) for i, code in enumerate(codes)]
    per_code = grid.width // 4
    places = [code.cast(I32) * per_code + i for code in codes for i in range(per_code)]
    words = [planes.table[place].load() ^ FLIPPED for place in places]
    if planes.signs is None:
        return words
    signs = planes.signs[run].load()
    return [_negated(word, moved(signs, i * 4, 0xF, 0)) for i, word in enumerate(words)]


def _negated(word: UOp, signs: UOp) -> UOp:
    """Bytes that are 128 more than signed ones, negated where one of four bits is set."""
    ones = (signs * SPREAD) & 0x01010101
    return (word ^ (ones * 0xFF)) + ones  # a byte is not 0, so no sum exceeds it


def _small_float(code: UOp, bits: int, target: int) -> UOp:
    """A float of `bits` bits, whose highest is the sign, as a float16 whose other bits begin at bit `target`."""
    rest = bits - 1
    half = moved(code, rest, 1, 15) | moved(code, 0, (1 << rest) - 1, target)
    return half.cast(U16).bitcast(F16).cast(F32)


def shifted_down(word: UOp, count: int) -> UOp:
    """A word shifted right by so many bits."""
    return word >> count if count else word
