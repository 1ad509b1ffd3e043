"""Scales of a chunk of columns in threadgroup memory, read by words: kernels that stream a matrix take them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import PANEL, ScalePlanes, float_of_scale
from tinyvllm.ops.formats.runs import FLIPPED, groups_in_run
from tinyvllm.ops.gpu.plane_ring import CHUNK_COLS, SLOTS, SharedPlane, number
from tinyvllm.ops.kernel.body import F32, I32, U32, balanced

HALF_SPANS = (PANEL, 2 * PANEL)  # columns of a scale of 16 bits, of which a chunk's are some words
HALF_AT = "__byte_perm({0}, 0u, {1})"  # a half of a word, whose number is data
BYTE_FLOAT_AT = "(__uint_as_float(__byte_perm({0}, 0x4B000000, {1})) - %.1ff)"  # the byte is data
BYTE_FLOAT = "(__uint_as_float(__byte_perm({0}, 0x4B000000, %#x)) - %.1ff)"  # 2^23 + byte, less 2^23 (and an offset)


class ChunkScales:
    """The scales (or minimums) of a row's groups in a chunk. `common`: what all of them are multiplied by."""

    def __init__(self, scales: ScalePlanes | None, fmt: Format, chunk: UOp, unit: float = 1.0) -> None:
        assert scales is not None
        self.scales, self.format, self.chunk, self.common = scales, fmt, chunk, None
        self.unit = unit
        if scales.steps is not None and scales.format.span == CHUNK_COLS:
            self.common = self._base(entries(scales.base, chunk, 1)[0])

    def of_run(self, run: int, group: int) -> UOp:
        """The scale of a group of a run of the chunk."""
        col = run * PANEL + group * (PANEL // groups_in_run(self.format))

        def entry(plane: SharedPlane, span: int, *, is_number: bool = False) -> UOp:
            count = CHUNK_COLS // span
            return entries(plane, self.chunk * count, count, is_number=is_number)[col // span]

        return self._factor(entry)

    def at_group(self, group: UOp) -> UOp:
        """The scale of a group of the chunk, whose number is data."""

        def entry(plane: SharedPlane, span: int, *, is_number: bool = False) -> UOp:
            value = plane.at(self.chunk * (CHUNK_COLS // span) + group // (span // self.format.group))
            return value.cast(I32).cast(F32) if is_number else value

        return self._factor(entry)

    def _factor(self, entry: Callable[..., UOp]) -> UOp:
        if self.common is not None:
            return entry(self.scales.steps, self.format.group, is_number=True)
        value = self._base(entry(self.scales.base, self.scales.format.span))
        if self.scales.steps is None:
            return value
        return value * entry(self.scales.steps, self.format.group, is_number=True)

    def _base(self, stored: UOp) -> UOp:
        value = float_of_scale(stored, self.scales.format)
        value = value if self.unit == 1.0 else value * self.unit
        return value if self.scales.multiplier is None else value * self.scales.multiplier[0].load()


class LaneScales:
    """The scales (or minimums) of a row's groups in some neighboring chunks from `first` on: those of the runs `slot`
    and `slot` + 4 of each. Of bytes and of 16 bits, a lane loads all, and takes its own: with rows in the
    same banks, small loads take as long as large ones."""

    def __init__(self, scales: ScalePlanes | None, fmt: Format, first: UOp | int, count: int, slot: UOp) -> None:
        assert scales is not None
        self.scales, self.format, self.first, self.slot = scales, fmt, first, slot
        self.has_common = False
        self.bases: list[UOp] = []
        self.words: list[UOp] = []
        if scales.steps is not None and scales.format.span == CHUNK_COLS:
            self.has_common = True
            self.bases = entries(scales.base, number(first), count)
            size = CHUNK_COLS // fmt.group // 4  # words of a chunk
            self.words = scales.steps.words(number(first * size), count * size)
        elif scales.steps is None and scales.base.dtype.itemsize == 2 and scales.format.span in HALF_SPANS:
            size = CHUNK_COLS // scales.format.span // 2
            self.words = scales.base.words(number(first * size), count * size)

    def weigh(self, index: int, values: Sequence[Sequence[UOp]]) -> UOp:
        """The lane's sum of a chunk's `values` (by run and group), each times its scale."""
        terms = [
            value * self._factor(index, side, g) for side, groups in enumerate(values) for g, value in enumerate(groups)
        ]
        total = balanced(terms)
        return total * self._base(self.bases[index]) if self.has_common else total

    def _factor(self, index: int, side: int, group: int) -> UOp:
        fmt, per_run = self.format, groups_in_run(self.format)
        if self.has_common:
            assert self.scales.steps is not None
            words = self.words[index * 2 * per_run + side * per_run :][:per_run]  # of four runs each
            word, at = words[0], self.slot
            if per_run == 2:
                word, at = (self.slot < 2).where(*words), self.slot % 2 * 2 + group
            is_signed = self.scales.steps.dtype == dtypes.char
            offset = 8388608.0 + (128 if is_signed else 0)
            selector = (at + 0x7540).cast(U32)
            return UOp(
                Ops.CUSTOM, F32, src=(word ^ FLIPPED if is_signed else word, selector), arg=BYTE_FLOAT_AT % offset
            )
        if self.words:
            return self._base(self._half(index, side))
        col = (self.slot + 4 * side) * PANEL + group * (PANEL // per_run)

        def entry(plane: SharedPlane, span: int) -> UOp:
            return plane.at(number((self.first + index) * (CHUNK_COLS // span) + col // span))

        value = self._base(entry(self.scales.base, self.scales.format.span))
        if self.scales.steps is None:
            return value
        return value * entry(self.scales.steps, fmt.group).cast(I32).cast(F32)

    def _half(self, index: int, side: int) -> UOp:
        """The scale of a run, of 16 bits, which a lane has with those of the chunk's other runs."""
        dtype, runs = self.scales.base.dtype, self.scales.format.span // PANEL  # that share a scale
        size = SLOTS // runs // 2
        words = self.words[index * size : (index + 1) * size][side * size // 2 :]
        word, slot = words[0], self.slot // runs
        if runs == 1:
            word, slot = (slot < 2).where(words[0], words[1]), slot % 2
        half = UOp(Ops.CUSTOM, U32, src=(word, (slot * 0x22 + 0x4410).cast(U32)), arg=HALF_AT)
        half = half.cast(dtypes.ushort)
        return half if dtype == dtypes.ushort else half.bitcast(dtype)

    def _base(self, stored: UOp) -> UOp:
        value = float_of_scale(stored, self.scales.format)
        return value if self.scales.multiplier is None else value * self.scales.multiplier[0].load()


class Scaled:
    """A lane's sums of a chunk, of which all parts are multiplied by the chunk's common factor at the end."""

    def __init__(self, scales: ChunkScales) -> None:
        self.common, self.total = scales.common, None

    def add(self, value: UOp, factor: UOp) -> None:
        product = value * factor
        self.total = product if self.total is None else self.total + product

    def add_weighed(self, value: UOp) -> None:
        """Add products of scales."""
        self.total = value if self.total is None else self.total + value

    def added_to(self, total: UOp) -> UOp:
        if self.total is None:
            return total
        return total + (self.total if self.common is None else self.total * self.common)


def entries(plane: SharedPlane, first: UOp, count: int, *, is_number: bool = False) -> list[UOp]:
    """Neighboring entries of a plane (`first` is a multiple of `count`, a power of two), by one load or a few; bytes as
    floats, if they are numbers."""
    size = plane.dtype.itemsize
    if count == 1 and not is_number:
        return [plane.at(first)]
    if count * size < 4:
        short = SharedPlane(dtypes.ushort if count * size == 2 else dtypes.uchar, plane.place, plane.after)
        words = [short.at(first * size // short.dtype.itemsize).cast(U32)]
    else:
        words = plane.words(first * size // 4, count * size // 4)
    return [_entry(words[i * size // 4], plane.dtype, i, is_number=is_number) for i in range(count)]


def _entry(word: UOp, dtype: DType, index: int, *, is_number: bool) -> UOp:
    """Entry `index` of those of which a word holds some."""
    if dtype.itemsize == 4:
        return word if dtype == U32 else word.bitcast(dtype)
    if dtype.itemsize == 2:
        half = word >> 16 if index % 2 else word & 0xFFFF
        return half.cast(dtypes.ushort) if dtype == dtypes.ushort else half.cast(dtypes.ushort).bitcast(dtype)
    if is_number:
        is_signed = dtype == dtypes.char
        word = word ^ 0x80808080 if is_signed else word
        offset = 8388608.0 + (128 if is_signed else 0)
        return UOp(Ops.CUSTOM, F32, src=(word,), arg=BYTE_FLOAT % (0x7540 | index % 4, offset))
    return (word >> index % 4 * 8 & 0xFF).cast(dtype)
