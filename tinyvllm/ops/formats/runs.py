"""Reading a matrix in row layout by runs: consecutive columns of one row, which one lane of a GPU holds in registers.

Codes are not converted from integers, which is slow on GPUs. A code of b bits is put into the high bits of a float32's
mantissa, which makes it f = 1 + code / 2**b, and the group's factors take the rest back:
value = (code - offset) * scale + minimum = f * (scale * 2**b) + (minimum - scale * (2**b + offset)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import UOp
from tinygrad.dtype import DType

from tinyvllm.arrays import Format
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.formats.matrix import PANEL, Planes, ScalePlanes, float_of_scale, high_bits
from tinyvllm.ops.kernel.body import F16, F32, I32, balanced
from tinyvllm.ops.kernel.lanes import HALF_PAIR, Mma

ONE_BITS, MANTISSA_BITS = 0x3F800000, 23
IN_HALF = 1024  # a code in a float16's mantissa makes it 1024 + code
CODE_ORDER = (0, 2, 1, 3)  # of four neighboring codes in `read_pairs`: a word's halves hold every other one


COVERED_BITS, COVERED_GROUPS = (4, 5, 6, 8), (16, 32)


def covers(fmt: Format) -> bool:
    """Whether a matrix of this format can be read by runs. Other formats take the general form (`matrix.unpack`)."""
    if not fmt.is_quantized:
        return True
    has_integers = fmt.codebook is None and fmt.grid is None and not fmt.is_float8 and fmt.bits in COVERED_BITS
    has_halves = all(scale.dtype == "float16" and not scale.has_multiplier for scale in fmt.scales)
    return has_integers and has_halves and fmt.group in COVERED_GROUPS


def require_covered(fmt: Format) -> None:
    """Raise UnsupportedModelError for a format that `covers` does not."""
    if not covers(fmt):
        raise UnsupportedModelError(
            f"a fused kernel was given weights in format {fmt.name}, of {fmt.bits} bits in groups of {fmt.group}; it "
            f"reads integers of {_list(COVERED_BITS)} bits in groups of {_list(COVERED_GROUPS)} with float16 scales: "
            "use the general product, or --dequantize"
        )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


def run_cols(fmt: Format, dense_cols: int) -> int:
    """Columns of a run: quantized formats read as many codes as share their words and scales."""
    require_covered(fmt)
    return PANEL if fmt.is_quantized else dense_cols


@dataclass(frozen=True)
class Run:
    """One lane's consecutive weights. Dense: `floats` are the values and `factors` is empty. Quantized: value i is
    floats[i] * a + b, with (a, b) = factors[i // group]."""

    floats: list[UOp]
    factors: list[tuple[UOp, UOp]]

    @property
    def group(self) -> int:
        return len(self.floats) // len(self.factors)

    def values(self, dtype: DType) -> list[UOp]:
        """The weights, rounded to `dtype`."""
        if not self.factors:
            return [value.cast(dtype) for value in self.floats]
        scaled = []
        for i, value in enumerate(self.floats):
            a, b = self.factors[i // self.group]
            scaled.append((value * a + b).cast(dtype))
        return scaled

    def dot(self, x: Sequence[UOp], sums: Sequence[UOp]) -> UOp:
        """weights . x. `sums`: of x over each group (`group_sums`)."""
        products = [value * v for value, v in zip(self.floats, x, strict=True)]
        if not self.factors:
            return balanced(products)
        size = self.group
        parts = [
            a * balanced(products[i * size : (i + 1) * size]) + b * total
            for i, ((a, b), total) in enumerate(zip(self.factors, sums, strict=True))
        ]
        return balanced(parts)


def group_sums(fmt: Format, x: Sequence[UOp]) -> list[UOp]:
    """What `Run.dot` needs besides x: nothing for dense formats."""
    require_covered(fmt)
    if not fmt.is_quantized:
        return []
    return [balanced(x[i : i + fmt.group]) for i in range(0, len(x), fmt.group)]


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
    index = row * (num_cols // PANEL) + run
    floats = _byte_codes(planes, index) if fmt.bits == 8 else _packed_codes(planes, index)
    return Run(floats, _factors(planes, row, run, num_cols))


def _bfloat16_pair(word: UOp) -> list[UOp]:
    """Two neighboring values: a bfloat16 is the upper half of a float32."""
    return [(word << 16).bitcast(F32), (word & 0xFFFF0000).bitcast(F32)]


def _in_mantissa(bits: UOp) -> UOp:
    return (bits | ONE_BITS).bitcast(F32)


def _moved(word: UOp, start: int, width: int, target: int) -> UOp:
    """Bits [start, start + width) of a word, moved to bit `target`."""
    moved = word << (target - start) if target >= start else word >> (start - target)
    return moved & (((1 << width) - 1) << target)


def _byte_codes(planes: Planes, run: UOp) -> list[UOp]:
    """Signed bytes plus 128, which `_factors` subtracts."""
    words = [planes.codes[run * (PANEL // 4) + i].load() ^ 0x80808080 for i in range(PANEL // 4)]
    return [_in_mantissa(_moved(words[i // 4], i % 4 * 8, 8, MANTISSA_BITS - 8)) for i in range(PANEL)]


def _packed_codes(planes: Planes, run: UOp) -> list[UOp]:
    """Codes whose low 4 bits share a byte with another's; the 5th and 6th bits are in the high plane."""
    fmt, bits = planes.fmt, planes.fmt.bits
    half = PANEL // 2
    words = [planes.codes[run * (half // 4) + i].load() for i in range(half // 4)]
    low = MANTISSA_BITS - bits
    codes = [_moved(words[i % half // 4], i % 4 * 8 + i // half * 4, 4, low) for i in range(PANEL)]
    if planes.high is not None:
        width = high_bits(fmt)
        high = [planes.high[run * width + i].load() for i in range(width)]
        codes = [code | _moved(high[i * width // 32], i * width % 32, width, low + 4) for i, code in enumerate(codes)]
    return [_in_mantissa(code) for code in codes]


def read_pairs(planes: Planes, row: UOp, run: UOp, num_runs: int, to_halves: Callable[[UOp, int], UOp]) -> list[UOp]:
    """A run's codes as words of two halves, 1024 + code each (signed bytes: + 128), so that one instruction does two.

    `to_halves`: `Mma.to_halves`. The words are in groups of four neighboring columns, each in `CODE_ORDER`: the first
    four of the run, the first four of its second half, the second four, and so on.
    """
    require_covered(planes.fmt)
    fmt, index = planes.fmt, row * num_runs + run
    pairs = []
    if fmt.bits == 8:
        words = [planes.codes[index * (PANEL // 4) + i].load() ^ 0x80808080 for i in range(PANEL // 4)]
        for i in range(PANEL // 4):
            word = words[i // 2 + i % 2 * 4]
            pairs += [to_halves(word, 0x00FF00FF), to_halves(word >> 8, 0x00FF00FF)]
        return pairs
    count = PANEL // 8
    words = [planes.codes[index * count + i].load() for i in range(count)]
    high = []
    if planes.high is not None:
        high = [planes.high[index * high_bits(fmt) + i].load() for i in range(high_bits(fmt))]
    for i in range(PANEL // 4):
        for odd in range(2):
            shift = i % 2 * 4 + odd * 8
            pair, mask = words[i // 2] >> shift if shift else words[i // 2], 0x000F000F
            for place in range(2 if high else 0):
                bit = (i // 2 * 4 + i % 2 * (PANEL // 2) + odd + place * 2) * high_bits(fmt)
                pair = (pair & mask) | _moved(high[bit // 32], bit % 32, high_bits(fmt), 4 + place * 16)
                mask |= ((1 << high_bits(fmt)) - 1) << (4 + place * 16)
            pairs.append(to_halves(pair, mask))
    return pairs


def read_halves(planes: Planes, row: UOp, run: UOp, num_cols: int, mma: Mma) -> list[UOp]:
    """A quantized run's weights, rounded to float16, as the operand of `Mma.multiply_pairs`: two instructions per pair,
    besides the one or two that move it into place. (code - offset) is exact in float16, so its product with a float16
    scale is rounded once."""
    require_covered(planes.fmt)
    fmt, index = planes.fmt, row * (num_cols // PANEL) + run
    pairs = _byte_pairs(planes, index, mma) if fmt.bits == 8 else _packed_pairs(planes, index, mma)
    factors = []
    for i in range(PANEL // fmt.group):
        group = run * (PANEL // fmt.group) + i
        scales = [planes.scale] if planes.minimum is None else [planes.scale, planes.minimum]
        values = [group_scale(scale, row, group, fmt, num_cols).cast(F16) for scale in scales]
        factors.append((mma.both(values[0]), mma.both(values[1]) if len(values) > 1 else None))
    weights: list[UOp] = []
    for i, (word, unit) in enumerate(pairs):
        factor, addend = factors[i * 2 // fmt.group]
        code = mma.fuse(mma.pair_of(word), mma.both(1.0 / unit), mma.both(-float(IN_HALF // unit + _offset(fmt))))
        weights += mma.fuse(code, factor, addend)
    return weights


def _offset(fmt: Format) -> int:
    """What to subtract from a code; signed bytes are read as unsigned ones, 128 larger."""
    return fmt.offset + (128 if fmt.bits == 8 else 0)


def _byte_pairs(planes: Planes, run: UOp, mma: Mma) -> list[tuple[UOp, int]]:
    """As `_packed_pairs`."""
    words = [planes.codes[run * (PANEL // 4) + i].load() ^ 0x80808080 for i in range(PANEL // 4)]
    return [(mma.byte_pair(words[i // 2], i % 2, HALF_PAIR >> 24), 1) for i in range(PANEL // 2)]


def _packed_pairs(planes: Planes, run: UOp, mma: Mma) -> list[tuple[UOp, int]]:
    """Words of two neighboring codes as halves 1024 + code * unit, and that unit."""
    fmt, half = planes.fmt, PANEL // 2
    words = [planes.codes[run * (half // 4) + i].load() for i in range(half // 4)]
    low = [mma.byte_pair(words[i // 2], i % 2, 0) for i in range(half // 2)]
    if planes.high is None:
        return [(mma.to_halves(pair, 0xF000F * unit), unit) for unit in (1, 16) for pair in low]
    width = high_bits(fmt)
    high = [planes.high[run * width + i].load() for i in range(width)]
    pairs = []
    for i in range(PANEL // 2):
        pair = (low[i % (half // 2)] >> (i // (half // 2) * 4)) & 0xF000F
        for side in range(2):
            bit = (2 * i + side) * width
            pair = pair | _moved(high[bit // 32], bit % 32, width, 4 + side * 16)
        pairs.append((mma.to_halves(pair, 0xF000F | ((1 << width) - 1) * 0x100010), 1))
    return pairs


def _factors(planes: Planes, row: UOp, run: UOp, num_cols: int) -> list[tuple[UOp, UOp]]:
    fmt = planes.fmt
    offset = _offset(fmt)
    factors = []
    for i in range(PANEL // fmt.group):
        group = run * (PANEL // fmt.group) + i
        scale = group_scale(planes.scale, row, group, fmt, num_cols)
        shift = scale * -float((1 << fmt.bits) + offset)
        if planes.minimum is not None:
            shift = shift + group_scale(planes.minimum, row, group, fmt, num_cols)
        factors.append((scale * float(1 << fmt.bits), shift))
    return factors


def group_scale(scales: ScalePlanes | None, row: UOp, group: UOp, fmt: Format, num_cols: int) -> UOp:
    """The scale or minimum of one row's group of columns, as float32."""
    assert scales is not None
    span = scales.format.span
    base = scales.base[row * (num_cols // span) + group // (span // fmt.group)].load()
    value = float_of_scale(base, scales.format)
    if scales.steps is None:
        return value
    return value * scales.steps[row * (num_cols // fmt.group) + group].load().cast(I32).cast(F32)
