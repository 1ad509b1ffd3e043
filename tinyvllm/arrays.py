"""Weights on the host, as NumPy arrays: what the readers of checkpoints hand to the kernels' packers.

bfloat16 and the 8-bit floats are NumPy dtypes of the `ml_dtypes` package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e8m0fnu

from tinyvllm.config import usable_cores
from tinyvllm.errors import UnsupportedModelError

GROUPS = (16, 32, 64, 128)
CODE_BITS = (1, 2, 3, 4, 5, 6, 8)
MAX_CODEBOOK_BITS = 4
GRID_BITS, GRID_WIDTHS = (8, 9, 10, 12), (4, 8)
THREADED_BYTES = 1 << 26  # from which on copies take several threads
MOST_THREADS = 8
RUN = 32  # codes that are packed together
DENSE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # fp4's values
SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(bfloat16),
    "e8m0": np.dtype(float8_e8m0fnu),  # a power of two: MXFP4
    "e4m3": np.dtype(float8_e4m3fn),  # NVFP4
}


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales (or minimums) of a row's groups are stored. They may be negative."""

    span: int  # columns that one base covers: a multiple of the group
    has_steps: bool = False  # an integer per group multiplies the base (K quants)
    dtype: str = "float16"  # of the bases: a key of SCALE_DTYPES
    has_multiplier: bool = False  # a float32 per row multiplies all of them (NVFP4's global scale)
    unit: float = 1.0  # multiplies all of them, a power of two: a grid's values are integers, times this


@dataclass(frozen=True)
class Grid:
    """A table of vectors, of which a code is an index: a code stands for `width` neighboring columns (ggml's IQ1 to
    IQ3)."""

    name: str  # of the table: see grid_table
    bits: int  # of an index
    width: int  # values of a vector: 4 or 8
    has_signs: bool  # a bit per value, apart from the codes, says which are negated


@dataclass(frozen=True)
class Format:
    """How the values of a matrix are stored. Hashable: kernels are cached by it.

    Dense: `name` is the dtype, `group` 0. Quantized: `group` neighboring columns of a row share a scale, and perhaps a
    bias: value = code * scale + minimum. A code stands for an integer less `offset`, for an entry of `codebook`, for a
    float8, or for a vector of `grid`, of several columns. Raises UnsupportedModelError for what no kernel can read.
    """

    name: str
    bits: int  # of a code, or of a dense value
    group: int = 0
    offset: int = 0
    scale: ScaleFormat | None = None
    minimum: ScaleFormat | None = None
    codebook: tuple[float, ...] | None = None  # 2**bits values
    is_float8: bool = False  # codes are e4m3 floats
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise UnsupportedModelError(f"format {self.name} {problem}")

    def _problem(self) -> str | None:
        """What makes it unreadable for every kernel, if anything."""
        if not self.is_quantized:
            return (
                None
                if DENSE_BITS.get(self.name) == self.bits
                else f"is not a dense format: known are {_list(DENSE_BITS)}"
            )
        if self.group not in GROUPS:
            return f"has groups of {self.group} columns: supported are {_list(GROUPS)}"
        if self.grid is None and self.bits not in CODE_BITS:
            return f"has codes of {self.bits} bits: supported are {_list(CODE_BITS)}"
        if self.scale is None:
            return "has groups without scales"
        return self._code_problem() or next(filter(None, map(self._scale_problem, (self.scale, self.minimum))), None)

    def _code_problem(self) -> str | None:
        if self.grid is not None:
            return self._grid_problem(self.grid)
        if self.is_float8 and (self.bits != 8 or self.codebook is not None):
            return f"has float8 codes of {self.bits} bits{'' if self.codebook is None else ' and a codebook'}"
        if self.codebook is not None:
            if self.bits > MAX_CODEBOOK_BITS:
                return f"has a codebook of {self.bits} bits: supported are up to {MAX_CODEBOOK_BITS}"
            if len(self.codebook) != 1 << self.bits:
                return f"has a codebook of {len(self.codebook)} values for codes of {self.bits} bits"
        if self.offset and (self.codebook is not None or self.is_float8):
            return f"has an offset of {self.offset} to codes that are not integers"
        return None

    def _grid_problem(self, grid: Grid) -> str | None:
        if grid.bits not in GRID_BITS or grid.width not in GRID_WIDTHS:
            known = f"{_list(GRID_WIDTHS)} values and {_list(GRID_BITS)} bits"
            return f"has a grid of {grid.width} values and {grid.bits} bits: supported are {known}"
        if self.bits != grid.bits:
            return f"has codes of {self.bits} bits and a grid of {grid.bits}"
        if self.offset or self.codebook is not None or self.is_float8:
            return "has a grid and another meaning of codes"
        return None

    def _scale_problem(self, scale: ScaleFormat | None) -> str | None:
        if scale is None:
            return None
        if scale.dtype not in SCALE_DTYPES:
            return f"has scales in {scale.dtype}: supported are {_list(SCALE_DTYPES)}"
        if scale.span < self.group or scale.span % self.group:
            return f"has a scale for every {scale.span} columns, which are not whole groups of {self.group}"
        return None

    @property
    def is_quantized(self) -> bool:
        return self.group > 0

    @property
    def code_cols(self) -> int:
        """Columns that a code stands for."""
        return 1 if self.grid is None else self.grid.width

    @property
    def code_bits(self) -> float:
        """Bits of codes and signs per weight."""
        signs = 0 if self.grid is None or not self.grid.has_signs else 1
        return self.bits / self.code_cols + signs

    @property
    def scales(self) -> tuple[ScaleFormat, ...]:
        """The scale and the minimum, if the format has them."""
        return tuple(scale for scale in (self.scale, self.minimum) if scale is not None)

    @property
    def columns(self) -> int:
        """What a matrix's width must be a multiple of: whole scales, and whole runs of a grid's codes."""
        return math.lcm(*(scale.span for scale in self.scales), 1 if self.grid is None else RUN * self.grid.width)

    @property
    def needs_input_sum(self) -> bool:
        """A product needs sum(x) over each group, for the offset or the minimum."""
        return self.offset != 0 or self.minimum is not None


def _list(known: Any) -> str:
    return ", ".join(map(str, known))


@dataclass(frozen=True)
class Scales:
    """One factor per group: base[n, k // span], times steps[n, k // group] and multiplier[n] if the format has them."""

    base: np.ndarray  # (N, K // span), of ScaleFormat.dtype
    steps: np.ndarray | None = None  # (N, K // group) uint8 or int8
    multiplier: np.ndarray | None = None  # (N,) float32

    def expand(self, num_groups: int, unit: float = 1.0) -> np.ndarray:
        """(N, K // group) float32. `unit`: of the format."""
        factors = self.base.astype(np.float32) * np.float32(unit)
        if self.multiplier is not None:
            factors = factors * self.multiplier[:, None]
        factors = np.repeat(factors, num_groups // factors.shape[1], axis=1)
        return factors if self.steps is None else factors * self.steps.astype(np.float32)

    def rows(self, index: np.ndarray | slice) -> Scales:
        """The rows that `index` selects, in its order."""
        steps = None if self.steps is None else self.steps[index]
        return Scales(self.base[index], steps, None if self.multiplier is None else self.multiplier[index])

    @staticmethod
    def joined(parts: Sequence[Scales]) -> Scales:
        """The rows of all parts, which have the same format, one part after another."""
        base = np.concatenate([part.base for part in parts])
        return Scales(base, _joined([part.steps for part in parts]), _joined([part.multiplier for part in parts]))


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The rows of all arrays, or None if the arrays are None: all of them are, or none is."""
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None


@cache
def grid_table(name: str) -> np.ndarray:
    """(indices, width) int8: the vectors of a grid, from the gguf package, where `name` is the class that has them.

    IQ1_S has 2**12 vectors here, eight times ggml's: the highest bit of an index says whether an eighth is added to
    each value (0) or subtracted.
    """
    from gguf import quants  # here, because few models need it

    kind = getattr(quants, name)
    kind.init_grid()
    values: np.ndarray = kind.grid.reshape(kind.grid_shape)
    if name == "IQ1_S":
        values = np.concatenate([8 * values + 1, 8 * values - 1])
    return values.astype(np.int8)


class LazyCodes:
    """Codes (N, K) of a matrix that are unpacked from a file's bytes when they are read. Rows can be selected before,
    so that only a few are unpacked at a time."""

    def __init__(self, unpack: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int]) -> None:
        """`unpack` gives the codes of the rows (n,) that it is given."""
        self._sources: tuple[Callable[[np.ndarray], np.ndarray], ...] = (unpack,)
        self._source, self._row = np.zeros(shape[0], np.int32), np.arange(shape[0])  # of each row
        self._num_cols = shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._row), self._num_cols

    def __getitem__(self, index: np.ndarray | slice) -> LazyCodes:
        return self._of(self._sources, self._source[index], self._row[index])

    @staticmethod
    def joined(parts: Sequence[LazyCodes]) -> LazyCodes:
        """The rows of all parts, one part after another."""
        firsts = np.cumsum([0, *[len(part._sources) for part in parts]])  # of each part's sources
        source = np.concatenate([part._source + first for part, first in zip(parts, firsts, strict=False)])
        sources = tuple(source for part in parts for source in part._sources)
        return parts[0]._of(sources, source.astype(np.int32), np.concatenate([part._row for part in parts]))

    def _of(
        self, sources: tuple[Callable[[np.ndarray], np.ndarray], ...], source: np.ndarray, row: np.ndarray
    ) -> LazyCodes:
        made = LazyCodes(sources[0], (0, self._num_cols))
        made._sources, made._source, made._row = sources, source, row
        return made

    def read(self) -> np.ndarray:
        """(N, K), unpacked."""
        if len(self._sources) == 1:
            return self._sources[0](self._row)
        parts = {index: self._sources[index](self._row[self._source == index]) for index in np.unique(self._source)}
        codes = np.empty(self.shape, next(iter(parts.values())).dtype)
        for index, part in parts.items():
            codes[self._source == index] = part
        return codes


@dataclass(frozen=True)
class QuantizedMatrix:
    """value[n, k] = code[n, k] * scale[n, k // group] + minimum[n, k // group], in float32 as in ggml. What a code
    stands for is in `Format`."""

    format: Format
    # (N, K) uint8, unsigned codes of `bits` bits; 8 bits: int8, or float8_e4m3fn; grid: (N, K // width) uint16
    codes: np.ndarray | LazyCodes
    scale: Scales
    minimum: Scales | None = None
    signs: np.ndarray | None = None  # (N, K // 8) uint8, if a grid has them: bit j negates column 8 * i + j

    @property
    def shape(self) -> tuple[int, ...]:
        rows, cols = self.codes.shape
        return rows, cols * self.format.code_cols

    def read_codes(self) -> np.ndarray:
        return self.codes.read() if isinstance(self.codes, LazyCodes) else self.codes

    @property
    def code_values(self) -> np.ndarray:
        """(N, K) float32: what the codes stand for, before they are scaled."""
        if self.format.codebook is not None:
            looked_up: np.ndarray = np.array(self.format.codebook, np.float32)[self.read_codes()]
            return looked_up
        if self.format.grid is not None:
            return self._grid_values(self.format.grid)
        values: np.ndarray = self.read_codes().astype(np.float32) - self.format.offset
        return values

    def _grid_values(self, grid: Grid) -> np.ndarray:
        values: np.ndarray = grid_table(grid.name).astype(np.float32)[self.read_codes()].reshape(self.shape)
        if self.signs is not None:
            np.negative(values, out=values, where=np.unpackbits(self.signs, axis=1, bitorder="little").astype(bool))
        return values

    def rows(self, index: np.ndarray | slice) -> QuantizedMatrix:
        """The rows that `index` selects, in its order."""
        minimum = None if self.minimum is None else self.minimum.rows(index)
        signs = None if self.signs is None else self.signs[index]
        return QuantizedMatrix(self.format, self.codes[index], self.scale.rows(index), minimum, signs)

    @staticmethod
    def joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
        """The rows of all parts, which have the same format, one part after another. Codes are unpacked when they are
        read, if those of any part are."""
        codes: np.ndarray | LazyCodes
        if any(isinstance(part.codes, LazyCodes) for part in parts):
            codes = LazyCodes.joined([part.lazy_codes for part in parts])
        else:
            codes = np.concatenate([part.read_codes() for part in parts])
        scale = Scales.joined([part.scale for part in parts])
        minimums = [part.minimum for part in parts if part.minimum is not None]
        minimum = Scales.joined(minimums) if minimums else None
        return QuantizedMatrix(parts[0].format, codes, scale, minimum, _joined([part.signs for part in parts]))

    @property
    def lazy_codes(self) -> LazyCodes:
        """The codes, to be selected before they are read."""
        if isinstance(self.codes, LazyCodes):
            return self.codes
        rows, cols = self.codes.shape
        return LazyCodes(self.codes.__getitem__, (rows, cols))


HostMatrix = np.ndarray | QuantizedMatrix


def to_float32(matrix: HostMatrix) -> np.ndarray:
    """Every value, as float32."""
    if isinstance(matrix, np.ndarray):
        return matrix.astype(np.float32)
    group = matrix.format.group
    num_groups = matrix.shape[1] // group
    scale, minimum = matrix.format.scale, matrix.format.minimum
    assert scale is not None
    values: np.ndarray = matrix.code_values * np.repeat(matrix.scale.expand(num_groups, scale.unit), group, axis=1)
    if matrix.minimum is not None and minimum is not None:
        values += np.repeat(matrix.minimum.expand(num_groups, minimum.unit), group, axis=1)
    return values


def to_float16(matrix: HostMatrix) -> np.ndarray:
    """Every value, as float16. Values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return to_float32(matrix).astype(np.float16)


def take_rows(matrix: HostMatrix, index: np.ndarray | slice) -> HostMatrix:
    """The rows that `index` selects, in its order."""
    return matrix.rows(index) if isinstance(matrix, QuantizedMatrix) else matrix[index]


def join_rows(matrices: Sequence[HostMatrix]) -> HostMatrix:
    """The rows of all matrices, which have the same format, one matrix after another."""
    if len(matrices) == 1:
        return matrices[0]
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if quantized:
        assert len(quantized) == len(matrices), "quantized and dense matrices have no format in common"
        return QuantizedMatrix.joined(quantized)
    dense = [matrix for matrix in matrices if isinstance(matrix, np.ndarray)]
    joined = np.empty((sum(len(matrix) for matrix in dense), *dense[0].shape[1:]), dense[0].dtype)
    copy_all(np.split(joined, np.cumsum([len(matrix) for matrix in dense])[:-1]), dense)
    return joined


def copy_all(targets: Sequence[np.ndarray], sources: Sequence[np.ndarray]) -> None:
    """Copy each source to its target, of the same shape and dtype: large ones by several threads, which read a file's
    pages at the same time, too."""

    def copy(target: np.ndarray, source: np.ndarray) -> None:
        if source.dtype.kind == "V":  # bfloat16, which NumPy copies in one thread at a time
            target, source = (array.view(f"u{source.dtype.itemsize}") for array in (target, source))
        target[...] = source

    if sum(source.nbytes for source in sources) < THREADED_BYTES:
        list(map(copy, targets, sources))
        return
    with ThreadPoolExecutor(min(usable_cores(), MOST_THREADS)) as pool:
        list(pool.map(copy, targets, sources))


def stack_rows(matrices: Sequence[HostMatrix]) -> list[HostMatrix]:
    """The same rows in as few matrices as possible: neighbors of one format become one."""
    return [join_rows(list(group)) for _, group in groupby(matrices, key=format_of)]


def format_of(matrix: HostMatrix) -> Format | np.dtype[Any]:
    """What matrices that can be joined share."""
    return matrix.format if isinstance(matrix, QuantizedMatrix) else matrix.dtype
