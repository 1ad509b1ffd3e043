"""Weight matrices in memory: which planes a format has, how each device lays them out, how a value is read back.

Three layouts with the same planes:

- `panel` (CPU): panels of 32 output rows, `[N/32][K][32]`. A vector lane is an output row, so that a product needs no
  horizontal sum, and the 32 weights of one column lie side by side.
- `dot` (CPU, for integer dot products): panels whose codes lie in words of neighboring columns, see dots.py.
- `row` (GPU): `[N][K]`, as checkpoints have it. Codes and bfloat16 values lie in 32-bit words, low bits first: tinygrad
  reads four words at once, and bytes one by one.

Quantized matrices keep their bits. Codes lie in runs of 32: the low 1, 2, 4 or 8 bits in bytes that 8, 4, 2 or 1 of a
run's codes share, the bits above in a plane of their own. Scales lie as they are stored. docs/FORMATS.md draws the
planes. Readers here are general: they read every `Format`, in either layout. What fused kernels read is in runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import (
    DENSE_BITS,
    MOST_THREADS,
    RUN,
    Format,
    Grid,
    HostMatrix,
    QuantizedMatrix,
    ScaleFormat,
    Scales,
    grid_table,
    to_float32,
)
from tinyvllm.config import usable_cores
from tinyvllm.device.handle import has_half, upload
from tinyvllm.device.meta import has_memory
from tinyvllm.errors import InvariantError, UnsupportedModelError
from tinyvllm.ops.formats.dots import dot_code, dot_cols, pack_dots, unpack_dots
from tinyvllm.ops.kernel.body import F16, F32, I32, U32

PANEL = RUN  # output rows of a panel, and codes of one packed run
HALF = PANEL // 2
CHUNK_WEIGHTS = 1 << 21  # that are packed at a time, by each of up to MOST_THREADS threads
WORD = 32  # bits of a word of the high plane: the bits of a run of 32 codes fill one word, two or four
SIGNS = 8  # columns whose signs share a byte, where signs are apart
SIGN_BIT = 0x80000000
E4M3_UNIT = 256.0  # what `half_of_e4m3` leaves out
LEAST_E8M0 = 0x400000  # the bits of 2**-127, which an exponent of 0 stands for


def low_bits(fmt: Format) -> int:
    """Bits of a code in the first plane: 1, 2, 4 or 8."""
    return max(bits for bits in (1, 2, 4, 8) if bits <= fmt.bits)


def high_bits(fmt: Format) -> int:
    """Bits of a code in the high plane: 0, 1, 2 or 4."""
    return fmt.bits - low_bits(fmt) if fmt.is_quantized else 0


def has_dots(fmt: Format) -> bool:
    """Whether the format can have the `dot` layout: its codes are integers, and its groups are whole runs of words."""
    widths = [low_bits(fmt), *([high_bits(fmt)] if high_bits(fmt) else [])]
    is_integer = fmt.is_quantized and fmt.grid is None and fmt.codebook is None and not fmt.is_float8
    return is_integer and all(fmt.group % dot_cols(width) == 0 for width in widths)


def reads_dots(host: HostMatrix) -> bool:
    """Whether a matrix can have the `dot` layout."""
    return isinstance(host, QuantizedMatrix) and has_dots(host.format)


def panel_unit(fmt: Format) -> float:
    """What `Planes.panel_code` leaves to be multiplied, once for a group: of float8 codes, which are read as halves."""
    return E4M3_UNIT if fmt.is_float8 and has_half("CPU") else 1.0


def code_lanes(fmt: Format) -> int:
    """Codes of a run that are read by one expression, each from its own byte: the others share those bytes."""
    return PANEL * low_bits(fmt) // 8 if fmt.is_quantized else PANEL


@dataclass(frozen=True)
class Matrix:
    """A weight matrix on a device, (N, K). `planes` are flat tensors in `Planes`' order."""

    format: Format
    num_rows: int  # N, a multiple of 32 (zero rows follow `used_rows`)
    num_cols: int  # K
    used_rows: int
    layout: str  # "panel", "dot" or "row"
    planes: tuple[Tensor, ...]
    row_shards: tuple[Matrix, ...] = ()  # each core's rows, if several cores hold them; `planes` is empty then
    maps: Tensor | None = None  # the planes' tensor maps, for kernels of Hopper that copy by them
    num_experts: int = 0  # each with the same number of rows, one after the other; 0: no axis of experts

    @property
    def shards(self) -> tuple[Matrix, ...]:
        """Each core's rows: the whole matrix if one core holds it."""
        return self.row_shards or (self,)

    @property
    def nbytes(self) -> int:
        """Without the table of a grid, which all matrices of a device share."""
        if self.row_shards:
            return sum(shard.nbytes for shard in self.row_shards)
        return sum(plane.nbytes() for plane in self.own_planes)

    @property
    def own_planes(self) -> tuple[Tensor, ...]:
        """The planes that no other matrix shares: all but the table of a grid."""
        return self.planes if self.format.grid is None else self.planes[:-1]

    @property
    def expert_size(self) -> int:
        """Rows of one expert."""
        return self.num_rows // self.num_experts

    def expert(self, index: int) -> Matrix:
        """The matrix of one expert: views of its part of the planes. Experts' rows are whole panels, so that the planes
        of a matrix are those of its experts one after the other, in either layout."""
        if not 0 <= index < self.num_experts:
            raise InvariantError(f"expert {index} of a matrix with {self.num_experts}")
        if self.row_shards:
            return join_shards([shard.expert(index) for shard in self.row_shards])
        rows = self.expert_size
        planes = tuple(plane.reshape(self.num_experts, -1)[index] for plane in self.own_planes)
        planes += self.planes[len(planes) :]
        return replace(self, num_rows=rows, used_rows=rows, planes=planes, num_experts=0)


def without_values(matrix: Matrix) -> Matrix:
    """Its form alone, for whom its values would be a second place where they are found."""
    return replace(matrix, planes=(), row_shards=(), maps=None)


def join_shards(shards: Sequence[Matrix]) -> Matrix:
    """Matrices of the same format and width, each on its core, as one matrix of all their rows (of each expert's)."""
    if len(shards) == 1:
        return shards[0]
    num_rows, used_rows = sum(shard.num_rows for shard in shards), sum(shard.used_rows for shard in shards)
    return replace(shards[0], num_rows=num_rows, used_rows=used_rows, planes=(), row_shards=tuple(shards))


@dataclass(frozen=True)
class ScalePlanes:
    """The planes of a format's scales (or minimums), be they Tensors or UOps."""

    format: ScaleFormat
    base: Any
    steps: Any | None
    multiplier: Any | None

    def at(self, row: UOp, per_row: int, column: UOp, layout: str) -> UOp:
        """The place of a row's entry `column` in a plane that has `per_row` of them a row."""
        if layout == "row":
            return row * per_row + column
        return (row // PANEL * per_row + column) * PANEL + row % PANEL


class Planes:
    """Names for a matrix's planes, be they Tensors or the UOps that stand for them in a kernel."""

    def __init__(self, fmt: Format, planes: Sequence[Any]) -> None:
        rest = list(planes)
        self.fmt = fmt
        self.codes = rest.pop(0)  # or the values, when not quantized
        self.high = rest.pop(0) if high_bits(fmt) else None
        self.signs = rest.pop(0) if fmt.grid is not None and fmt.grid.has_signs else None
        self.table = rest.pop() if fmt.grid is not None else None
        self.scale = self._scales(fmt.scale, rest)
        self.minimum = self._scales(fmt.minimum, rest)
        if rest:
            raise InvariantError(f"format {fmt.name} left {len(rest)} planes over")

    @staticmethod
    def _scales(fmt: ScaleFormat | None, rest: list[Any]) -> ScalePlanes | None:
        if fmt is None:
            return None
        base = rest.pop(0)
        steps = rest.pop(0) if fmt.has_steps else None
        return ScalePlanes(fmt, base, steps, rest.pop(0) if fmt.has_multiplier else None)

    @staticmethod
    def count(fmt: Format) -> int:
        """The number of planes of a matrix of this format."""
        of_grid = 0 if fmt.grid is None else 1 + fmt.grid.has_signs
        return 1 + (high_bits(fmt) > 0) + of_grid + sum(1 + s.has_steps + s.has_multiplier for s in fmt.scales)

    # -- reading, in the panel layout --------------------------------------------------------------------------------

    def panel_code(self, panel: UOp, col: UOp, lane: UOp | int, num_cols: int, part: int = 0) -> UOp:
        """What one weight's code stands for in units of `panel_unit`, as float32. `lane` is a row inside part `part` of
        the panel, which has PANEL / code_lanes parts whose codes share bytes."""
        run = panel * num_cols + col
        fmt, lanes, width = self.fmt, code_lanes(self.fmt), low_bits(self.fmt)
        stored = self.codes[run * lanes + lane].load()
        if lanes < PANEL:
            low = stored >> part * width if part else stored
            low = (low if (part + 1) * width == 8 else low & ((1 << width) - 1)).cast(I32)
            code = low if self.high is None else low + self._high_bits(run, lane + part * lanes)
            return code.cast(F32) if fmt.codebook is None else look_up(code, fmt.codebook)
        if fmt.name == "bfloat16":
            return float_of_bfloat16(stored)
        if fmt.is_float8:
            return float_of_e4m3(stored) if panel_unit(fmt) == 1.0 else half_of_e4m3(stored).cast(F32)
        return stored.cast(F32)

    def panel_vector(self, panel: UOp, vector: UOp, lane: UOp, num_cols: int) -> list[UOp]:
        """What one code of a grid stands for: the values of a row's neighboring columns, as float32."""
        grid = self.fmt.grid
        assert grid is not None and self.table is not None
        run = panel * (num_cols // grid.width) + vector
        code = self._full_code(self.codes[run * PANEL + lane].load().cast(I32), run, lane)
        words = [self.table[code * (grid.width // 4) + i].load() for i in range(grid.width // 4)]
        values = [signed_byte(words[i // 4], i % 4).cast(F32) for i in range(grid.width)]
        if self.signs is None:
            return values
        first = vector * grid.width
        signs = self.signs[(panel * (num_cols // SIGNS) + first // SIGNS) * PANEL + lane].load().cast(U32)
        signs = signs >> (first % SIGNS).cast(U32)
        return [negated_if(value, signs << (31 - i) & SIGN_BIT) for i, value in enumerate(values)]

    def _high_bits(self, run: UOp, lane: UOp | int) -> UOp:
        """The bits of a run's code `lane` that lie in the high plane, shifted into place."""
        assert self.high is not None
        width = high_bits(self.fmt)
        bit = lane * width
        word = self.high[run * width + bit // WORD].load()
        shift = bit % WORD if isinstance(bit, int) else (bit % WORD).cast(U32)
        return ((word >> shift) & ((1 << width) - 1)).cast(I32) << low_bits(self.fmt)

    def panel_factor(self, which: str, panel: UOp, group: UOp, lane: int | UOp, num_cols: int) -> UOp:
        """The scale (or minimum) of one row's group of columns, as float32."""
        scales = self.scale if which == "scale" else self.minimum
        assert scales is not None
        fmt = scales.format
        per_base = fmt.span // self.fmt.group
        base = scales.base[(panel * (num_cols // fmt.span) + group // per_base) * PANEL + lane].load()
        factor = float_of_scale(base, fmt)
        if scales.multiplier is not None:
            factor = factor * scales.multiplier[panel * PANEL + lane].load()
        if scales.steps is not None:
            groups = num_cols // self.fmt.group
            factor = factor * scales.steps[(panel * groups + group) * PANEL + lane].load().cast(I32).cast(F32)
        return factor

    # -- reading, in either layout -----------------------------------------------------------------------------------

    def value(self, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """One value, as float32, of a row that depends on data (an embedding row)."""
        if self.fmt.grid is not None:
            return self._scaled(self._grid_value(self.fmt.grid, row, col, num_cols, layout), row, col, num_cols, layout)
        if layout == "row":
            return self._row_value(row, col, num_cols)
        if layout == "dot":
            return self._scaled(self._dot_value(row, col, num_cols), row, col, num_cols, layout)
        fmt, run, lane = self.fmt, row // PANEL * num_cols + col, row % PANEL
        lanes, width = code_lanes(fmt), low_bits(fmt)
        if not fmt.is_quantized or fmt.is_float8:
            value = self.codes[run * PANEL + lane].load()
            if fmt.is_float8:
                return self._scaled(float_of_e4m3(value), row, col, num_cols, layout)
            return float_of_bfloat16(value) if fmt.name == "bfloat16" else value.cast(F32)
        if fmt.bits == 8:
            code = self.codes[run * PANEL + lane].load().cast(I32)
        else:
            byte = self.codes[run * lanes + lane % lanes].load().cast(I32)
            code = (byte >> (lane // lanes * width).cast(I32)) & ((1 << width) - 1)
        return self._scaled(self._code_value(code, run, lane), row, col, num_cols, layout)

    def _dot_value(self, row: UOp, col: UOp, num_cols: int) -> UOp:
        """What a code stands for in the `dot` layout."""
        fmt = self.fmt
        code = dot_code(self.codes, low_bits(fmt), row, col, num_cols)
        if fmt.bits == 8:
            code = (code ^ 0x80) - 0x80
        if self.high is not None:
            code = code + (dot_code(self.high, high_bits(fmt), row, col, num_cols) << low_bits(fmt))
        return (code - fmt.offset).cast(F32)

    def _row_value(self, row: UOp, col: UOp, num_cols: int) -> UOp:
        """`value` in row layout, whose codes are words."""
        fmt, index = self.fmt, row * num_cols + col
        if fmt.name == "bfloat16":
            word = self.codes[index // 2].load()
            return ((word >> (index % 2 * 16).cast(U32)) << 16).bitcast(F32)
        if not fmt.is_quantized:
            return self.codes[index].load().cast(F32)
        run, lane = index // PANEL, index % PANEL
        if fmt.bits == 8:
            byte = (self.codes[index // 4].load() >> (lane % 4 * 8).cast(U32)) & 0xFF
            if fmt.is_float8:
                return self._scaled(float_of_e4m3(byte), row, col, num_cols, "row")
            code = (byte ^ 0x80).cast(I32) - 0x80
        else:
            lanes, width = code_lanes(fmt), low_bits(fmt)
            word = self.codes[run * (lanes // 4) + lane % lanes // 4].load()
            code = ((word >> (lane % 4 * 8 + lane // lanes * width).cast(U32)) & ((1 << width) - 1)).cast(I32)
        return self._scaled(self._code_value(code, run, lane), row, col, num_cols, "row")

    def _grid_value(self, grid: Grid, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """One value of a vector that a code stands for."""
        assert self.table is not None
        vector, per_row = col // grid.width, num_cols // grid.width
        if layout == "row":
            run, lane = (row * per_row + vector) // RUN, (row * per_row + vector) % RUN
            code = self.codes[run * (RUN // 4) + lane // 4].load() >> (lane % 4 * 8).cast(U32) & 0xFF
        else:
            run, lane = row // PANEL * per_row + vector, row % PANEL
            code = self.codes[run * PANEL + lane].load()
        place = self._full_code(code.cast(I32), run, lane) * grid.width + col % grid.width
        value = signed_byte(self.table[place // 4].load(), place % 4).cast(F32)
        if self.signs is None:
            return value
        if layout == "row":
            index = row * num_cols + col
            signs = self.signs[index // WORD].load() >> (index % WORD).cast(U32)
        else:
            signs = self.signs[(row // PANEL * (num_cols // SIGNS) + col // SIGNS) * PANEL + row % PANEL].load()
            signs = signs.cast(U32) >> (col % SIGNS).cast(U32)
        return negated_if(value, signs << 31)

    def _full_code(self, code: UOp, run: UOp, lane: UOp) -> UOp:
        """A code, given its low bits."""
        return code if self.high is None else code + self._high_bits(run, lane)

    def _code_value(self, code: UOp, run: UOp, lane: UOp) -> UOp:
        """What a code stands for, given its low bits."""
        code = self._full_code(code, run, lane)
        if self.fmt.codebook is not None:
            return look_up(code, self.fmt.codebook)
        return (code - self.fmt.offset).cast(F32)

    def _scaled(self, value: UOp, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """Scale what a code stands for."""
        value = value * self._factor(self.scale, row, col, num_cols, layout)
        if self.minimum is not None:
            value = value + self._factor(self.minimum, row, col, num_cols, layout)
        return value

    def _factor(self, scales: ScalePlanes | None, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """The scale or minimum that covers one value."""
        assert scales is not None
        span, group = scales.format.span, self.fmt.group
        base = scales.base[scales.at(row, num_cols // span, col // span, layout)].load()
        factor = float_of_scale(base, scales.format)
        if scales.multiplier is not None:
            factor = factor * scales.multiplier[row].load()
        if scales.steps is None:
            return factor
        step = scales.steps[scales.at(row, num_cols // group, col // group, layout)].load()
        return factor * step.cast(I32).cast(F32)


# -- numbers: of Tensors and of UOps alike -----------------------------------------------------------------------------


def look_up(code: Any, codebook: Sequence[float]) -> Any:
    """codebook[code] as float32, by a tree of selects, which vectorizes; loads from a table would be a gather. If the
    upper half of the codebook is the lower half negated (fp4), half of the tree is enough."""
    half = len(codebook) // 2
    lower, upper = codebook[:half], codebook[half:]
    is_upper = (code & half).ne(0)
    if half == 1:
        return is_upper.where(*[const_like(code, value) for value in (upper[0], lower[0])])
    low = look_up(code, lower)
    if tuple(upper) == tuple(-value for value in lower):
        return is_upper.where(-low, low)
    return is_upper.where(look_up(code, upper), low)


def const_like(code: Any, value: float) -> Any:
    """A float32 constant of the kind that `code` is."""
    return UOp.const(value, F32) if isinstance(code, UOp) else value


def signed_byte(word: UOp, index: UOp | int) -> UOp:
    """Byte `index` of a 32-bit word, as a signed integer."""
    shift = 24 - index * 8
    return (word << (shift if isinstance(shift, int) else shift.cast(U32))).bitcast(I32) >> 24


def negated_if(value: UOp, sign: UOp) -> UOp:
    """A float32, negated if the highest bit of `sign` is set, whose other bits are zero."""
    return (value.bitcast(U32) ^ sign).bitcast(F32)


def float_of_bfloat16(bits: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    return (bits.cast(U32) << 16).bitcast(F32)


def float_of_e4m3(byte: Any) -> Any:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities. The code of NaN is read as 480."""
    bits = byte.cast(U32)
    size, sign = bits & 0x7F, (bits & 0x80) << 24
    normal = ((size << 20) + (120 << 23)) | sign
    small = size.cast(F32) * 2.0**-9
    return (size < 8).where((sign.ne(0)).where(-small, small), normal.bitcast(F32))


def half_of_e4m3(byte: UOp) -> UOp:
    """The value / 256 as a float16, which has one bit more of exponent and the same order of bits. Subnormal numbers
    stay so, and processors convert them to float32 in one instruction."""
    return ((byte.cast(dtypes.char).cast(dtypes.short) << 7) & 0xBFFF).cast(dtypes.ushort).bitcast(F16)


def float_of_scale(base: Any, fmt: ScaleFormat) -> Any:
    """A stored scale as float32, in its unit. Devices without half precision store float16 as float32. E8M0's NaN reads
    as inf."""
    if fmt.dtype == "bfloat16":
        scale = float_of_bfloat16(base)
    elif fmt.dtype == "e4m3":
        scale = float_of_e4m3(base)
    elif fmt.dtype == "e8m0":
        scale = (base.cast(U32) << 23).maximum(LEAST_E8M0).bitcast(F32)
    else:
        scale = base.cast(F32)
    return scale if fmt.unit == 1.0 else scale * fmt.unit


# -- packing ---------------------------------------------------------------------------------------------------------


def pack(
    host: HostMatrix, layout: str, dtype: str | None, device: str, *, dequantize: bool = False, num_experts: int = 0
) -> Matrix:
    """Put a host matrix (N, K) on `device`. `dtype` recasts dense values (None: as stored); codes stay codes unless
    `dequantize`. With `num_experts`, the rows are those of that many matrices of the same size.

    Raises UnsupportedModelError if K is not a multiple of 32 and of the columns that a scale covers, or if an expert's
    rows are not a multiple of 32.
    """
    rows, cols = host.shape
    if isinstance(host, QuantizedMatrix) and dequantize:
        host = _dequantized(host, dtype or "float16")
    check_shape(host, num_experts)
    padded = -(-rows // PANEL) * PANEL
    fmt, planes = planes_of(host, layout, dtype, keeps_half=has_half(device), are_read=has_memory(device))
    tensors = tuple(upload(plane, device) for plane in planes)
    if fmt.grid is not None:
        tensors += (_table_on(device, fmt.grid),)
    return Matrix(fmt, padded, cols, rows, layout, tensors, num_experts=num_experts)


def planes_of(
    host: HostMatrix, layout: str, dtype: str | None = None, *, keeps_half: bool = True, are_read: bool = True
) -> tuple[Format, list[np.ndarray]]:
    """(the format, the planes) of a host matrix as `pack` puts them on a device, without a grid's table. are_read: else
    most of a quantized matrix is not packed, and its planes have any values."""
    padded = -(-host.shape[0] // PANEL) * PANEL
    if isinstance(host, QuantizedMatrix):
        fmt, planes = host.format, _quantized_planes(host, padded, layout, keeps_half, are_read)
    else:
        fmt, planes = _dense_planes(host, dtype, padded, layout)
    if layout == "row":
        planes[0] = _in_words(planes[0])
    return fmt, planes


def _dequantized(host: QuantizedMatrix, dtype: str) -> np.ndarray:
    values = np.empty(host.shape, _numpy_dtype(dtype))
    for rows in _row_slices(*host.shape):
        values[rows] = to_float32(host.rows(rows))
    return values


def _in_words(plane: np.ndarray) -> np.ndarray:
    """Codes, bfloat16 values or signs as 32-bit words; others as they are."""
    return plane.reshape(-1).view(np.uint32) if plane.dtype in (np.uint8, np.int8, np.uint16) else plane


@cache
def _table_on(device: str, grid: Grid) -> Tensor:
    """A grid's vectors in words of four bytes, on a device: one tensor for all matrices."""
    return upload(grid_table(grid.name).reshape(-1).view(np.uint32), device)


def check_shape(host: HostMatrix, num_experts: int) -> None:
    rows, cols = host.shape
    if cols % PANEL:
        raise UnsupportedModelError(f"a matrix of {rows} x {cols} has a width that is not a multiple of {PANEL}")
    if isinstance(host, QuantizedMatrix) and cols % host.format.columns:
        raise UnsupportedModelError(
            f"a matrix of {rows} x {cols} has a width that is not a multiple of {host.format.columns}, the columns "
            f"that a scale of {host.format.name} covers: unpack it with --dequantize"
        )
    if num_experts and rows % (num_experts * PANEL):
        raise UnsupportedModelError(f"{rows} rows are not {num_experts} experts' of a multiple of {PANEL} each")


def _arrange(plane: np.ndarray, padded: int, layout: str) -> np.ndarray:
    """(N, C) -> (padded/32, C, 32) for panels, (padded, C) for rows."""
    if plane.shape[0] < padded:
        plane = np.concatenate([plane, np.zeros((padded - plane.shape[0], plane.shape[1]), plane.dtype)])
    if layout == "row":
        return np.ascontiguousarray(plane)
    return np.ascontiguousarray(plane.reshape(padded // PANEL, PANEL, -1).transpose(0, 2, 1))


def _dense_planes(host: np.ndarray, dtype: str | None, padded: int, layout: str) -> tuple[Format, list[np.ndarray]]:
    dtype = dtype or str(host.dtype)
    fmt = Format(dtype, DENSE_BITS.get(dtype, 0))
    return fmt, [_arrange(_as_bits(host.astype(_numpy_dtype(dtype), copy=False)), padded, layout)]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(bfloat16 if name == "bfloat16" else name)


def _as_bits(values: np.ndarray) -> np.ndarray:
    """Numbers whose dtype tinygrad cannot upload, as unsigned integers of the same size."""
    if values.dtype.kind != "V":
        return values
    return values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint8)


def _quantized_planes(
    host: QuantizedMatrix, padded: int, layout: str, keeps_half: bool, are_read: bool
) -> list[np.ndarray]:
    """Packed some rows at a time, so that unpacked codes and copies of them take little memory, by a few threads, which
    NumPy lets run at the same time."""
    begin, *rest = _row_slices(padded, host.shape[1])
    parts = _pack_rows(host.rows(begin), begin.stop, layout, keeps_half)
    if not rest:
        return parts
    planes = [np.empty((len(part) * padded // begin.stop, *part.shape[1:]), part.dtype) for part in parts]
    if not are_read:
        return planes

    def write(rows: slice) -> None:
        parts = _pack_rows(host.rows(rows), rows.stop - rows.start, layout, keeps_half)
        for plane, part in zip(planes, parts, strict=True):
            first = rows.start * len(plane) // padded
            plane[first : first + len(part)] = part

    with ThreadPoolExecutor(min(usable_cores(), MOST_THREADS)) as pool:
        list(pool.map(write, (begin, *rest)))
    return planes


def _row_slices(num_rows: int, num_cols: int) -> Iterator[slice]:
    """Whole panels of at most about CHUNK_WEIGHTS weights, or one."""
    step = max(CHUNK_WEIGHTS // num_cols // PANEL, 1) * PANEL
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _pack_rows(host: QuantizedMatrix, padded: int, layout: str, keeps_half: bool) -> list[np.ndarray]:
    fmt = host.format
    if layout == "dot":
        codes = _as_bits(host.read_codes())
        planes = [_arrange(pack_dots(codes, low_bits(fmt)), padded, layout)]
        if high_bits(fmt):
            planes.append(_arrange(pack_dots(codes >> low_bits(fmt), high_bits(fmt)), padded, layout))
        return planes + _all_scale_planes(host, padded, layout, keeps_half)
    codes = _arrange(_as_bits(host.read_codes()), padded, layout)
    planes = [codes]
    if fmt.bits != 8 or fmt.grid is not None:
        runs = codes.reshape(-1, PANEL)  # 32 rows' codes, or columns'
        planes = [_pack_low(runs, low_bits(fmt)).astype(np.uint8, copy=False)]
        if high_bits(fmt):
            planes.append(_pack_high((runs >> low_bits(fmt)).astype(np.uint8, copy=False), high_bits(fmt)))
    if host.signs is not None:
        signs = _arrange(host.signs, padded, layout)
        planes.append(_in_words(signs) if layout == "row" else signs)
    return planes + _all_scale_planes(host, padded, layout, keeps_half)


def _all_scale_planes(host: QuantizedMatrix, padded: int, layout: str, keeps_half: bool) -> list[np.ndarray]:
    both = [scales for scales in (host.scale, host.minimum) if scales is not None]
    return [plane for scales in both for plane in _scale_planes(scales, padded, layout, keeps_half)]


def _scale_planes(scales: Scales, padded: int, layout: str, keeps_half: bool) -> list[np.ndarray]:
    base = scales.base
    if base.dtype == np.float16 and not keeps_half:
        base = base.astype(np.float32)
    planes = [_arrange(_as_bits(base), padded, layout)]
    if scales.steps is not None:
        planes.append(_arrange(scales.steps, padded, layout))
    if scales.multiplier is not None:
        planes.append(_arrange(scales.multiplier[:, None], padded, layout))
    return planes


def _pack_low(codes: np.ndarray, width: int) -> np.ndarray:
    """(runs, 32) codes -> (runs, 4 * width) bytes: byte i has the low `width` bits of codes i, i + 4 * width, ..."""
    lanes, mask = PANEL * width // 8, (1 << width) - 1
    packed = codes[:, :lanes] & mask
    for part in range(1, 8 // width):
        packed |= (codes[:, part * lanes : (part + 1) * lanes] & mask) << part * width
    return packed


def _pack_high(high: np.ndarray, width: int) -> np.ndarray:
    """(runs, 32) values of `width` bits -> (runs, width) uint32 words; lane j at bit j * width, low bits first."""
    if width == 1:
        return np.packbits(high, axis=1, bitorder="little").view("<u4")
    per_byte = 8 // width
    packed = high[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= high[:, place::per_byte] << place * width
    return packed.view("<u4")


# -- the plain reference ---------------------------------------------------------------------------------------------


def unpack(matrix: Matrix, dtype: DType = dtypes.float) -> Tensor:
    """The whole matrix as a Tensor (N, K), by plain Tensor arithmetic: the reference for the kernels' readers, and the
    form in which the general product of GPUs reads weights (the arithmetic fuses into the product's kernel)."""
    fmt, planes = matrix.format, Planes(matrix.format, matrix.planes)
    values = (
        _unpack_grid(planes, matrix) if fmt.grid is not None else _unarrange(_unpack_values(planes, matrix), matrix)
    )
    if not fmt.is_quantized:
        return values.cast(dtype)
    if fmt.offset:
        values = values - fmt.offset
    values = values.reshape(matrix.num_rows, -1, fmt.group)  # (N, K/group, group)
    out = values * _unpack_factor(planes.scale, matrix).unsqueeze(-1)
    if planes.minimum is not None:
        out = out + _unpack_factor(planes.minimum, matrix).unsqueeze(-1)
    return out.reshape(matrix.num_rows, matrix.num_cols).cast(dtype)


def _unpack_grid(planes: Planes, matrix: Matrix) -> Tensor:
    """What the codes of a grid stand for: (N, K) float32."""
    grid, stored = matrix.format.grid, planes.codes
    assert grid is not None and planes.table is not None
    stored = stored.bitcast(dtypes.uchar) if stored.dtype == dtypes.uint else stored
    codes = _unarrange(_unpack_codes(planes, stored).reshape(-1), matrix)  # (N, K/width)
    table = planes.table.bitcast(dtypes.char).reshape(-1, grid.width)
    values = table[codes.cast(dtypes.int)].cast(dtypes.float).reshape(matrix.num_rows, -1)
    if planes.signs is None:
        return values
    signs = planes.signs.bitcast(dtypes.uchar) if planes.signs.dtype == dtypes.uint else planes.signs
    bits = _unarrange(signs, matrix).unsqueeze(-1) >> Tensor.arange(SIGNS, dtype=dtypes.uchar) & 1  # (N, K/8, 8)
    return bits.reshape(matrix.num_rows, -1).ne(0).where(-values, values)


def _unpack_values(planes: Planes, matrix: Matrix) -> Tensor:
    """Dense values, or what codes stand for before the offset, as float32, still in the layout's order, flat."""
    fmt, stored = matrix.format, planes.codes
    if matrix.layout == "dot":
        return _unpack_dot_values(planes, fmt)
    if stored.dtype == dtypes.uint:  # row layout: words
        is_signed = fmt.bits == 8 and not fmt.is_float8
        stored = stored.bitcast(dtypes.ushort if fmt.name == "bfloat16" else dtypes.char if is_signed else dtypes.uchar)
    if fmt.name == "bfloat16":
        return (stored.cast(dtypes.uint) << 16).bitcast(dtypes.float)
    if fmt.is_float8:
        return float_of_e4m3(stored)
    if fmt.bits in (8, 16, 32):
        return stored.cast(dtypes.float)
    codes = _unpack_codes(planes, stored).reshape(-1)
    return codes.cast(dtypes.float) if fmt.codebook is None else look_up(codes, fmt.codebook)


def _unpack_dot_values(planes: Planes, fmt: Format) -> Tensor:
    codes = unpack_dots(planes.codes, low_bits(fmt)).reshape(-1)
    if fmt.bits == 8:
        return codes.cast(dtypes.uchar).bitcast(dtypes.char).cast(dtypes.float)
    if planes.high is not None:
        codes = codes + (unpack_dots(planes.high, high_bits(fmt)).reshape(-1) << low_bits(fmt))
    return codes.cast(dtypes.float)


def _unpack_codes(planes: Planes, stored: Tensor) -> Tensor:
    """(runs, 32) uint32 codes, of which the bytes `stored` have the low bits."""
    fmt, width = planes.fmt, low_bits(planes.fmt)
    low, mask = stored.reshape(-1, 1, code_lanes(fmt)), (1 << width) - 1
    if width == 8:
        codes = low
    else:
        parts = [low & mask, *[low >> shift & mask for shift in range(width, 8 - width, width)], low >> 8 - width]
        codes = parts[0].cat(*parts[1:], dim=1)
    codes = codes.reshape(-1, PANEL).cast(dtypes.uint)
    if planes.high is not None:
        count = high_bits(fmt)
        # computed, because a list would be copied from the host at every step
        shifts = Tensor.arange(0, WORD, count, dtype=dtypes.uint)
        high = (planes.high.reshape(-1, 1) >> shifts.reshape(1, -1)) & ((1 << count) - 1)
        codes = codes + (high.reshape(-1, PANEL) << width)
    return codes


def _unarrange(flat: Tensor, matrix: Matrix) -> Tensor:
    """The inverse of `_arrange`: (N, C)."""
    if matrix.layout == "row":
        return flat.reshape(matrix.num_rows, -1)
    panels = matrix.num_rows // PANEL
    return flat.reshape(panels, -1, PANEL).permute(0, 2, 1).reshape(matrix.num_rows, -1)


def _unpack_factor(scales: ScalePlanes | None, matrix: Matrix) -> Tensor:
    """(N, K / group) float32."""
    assert scales is not None
    factor = float_of_scale(_unarrange(scales.base, matrix), scales.format)
    if scales.multiplier is not None:
        factor = factor * scales.multiplier.reshape(-1, 1)
    per_base = scales.format.span // matrix.format.group
    if per_base > 1 or scales.steps is not None:
        factor = factor.unsqueeze(-1).expand(*factor.shape, per_base).reshape(matrix.num_rows, -1)
    return factor if scales.steps is None else factor * _unarrange(scales.steps, matrix).cast(dtypes.float)
