"""Weight matrices in memory: which planes a format has, how each device lays them out, how a value is read back.

Two layouts with the same planes:

- `panel` (CPU): panels of 32 output rows, `[N/32][K][32]`. A vector lane is an output row, so that a product needs no
  horizontal sum, and the 32 weights of one column lie side by side.
- `row` (GPU): `[N][K]`, as checkpoints have it. Codes and bfloat16 values lie in 32-bit words, low bits first: tinygrad
  reads four words at once, and bytes one by one.

Quantised matrices keep their bits: 4-bit codes two to a byte, the 5th (and 6th) bits in a plane of their own, and the
scales as ggml stores them (a float16 a block; for K quants the small integer steps beside it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import BFloat16Array, HostMatrix, QuantizedMatrix, Scales, to_float32
from tinyvllm.device.handle import has_half, upload
from tinyvllm.errors import InvariantError, UnsupportedModelError
from tinyvllm.ops.kernel.body import F32, I32, U32

PANEL = 32  # output rows of a panel, and codes of one packed run
HALF = PANEL // 2
WORD = 32  # bits of a word of the high plane: the bits of a run of 32 codes fill one word, or two


@dataclass(frozen=True)
class ScaleFormat:
    """Columns a base covers, and whether integer steps multiply it."""

    span: int
    has_steps: bool


@dataclass(frozen=True)
class Format:
    """How values are stored. Hashable: kernels are cached by it. `bits` 32: float32; 16: float16 or bfloat16."""

    name: str
    bits: int
    group: int = 0  # columns that share a scale; 0: not quantised
    offset: int = 0
    scale: ScaleFormat | None = None
    minimum: ScaleFormat | None = None

    @property
    def is_quantized(self) -> bool:
        return self.group > 0

    @property
    def high_bits(self) -> int:
        return self.bits - 4 if self.bits in (5, 6) else 0

    @property
    def code_lanes(self) -> int:
        """Lanes whose codes are read by one expression: the halves of a run share bytes where codes are packed."""
        return HALF if self.bits < 8 else PANEL

    @property
    def needs_input_sum(self) -> bool:
        """The product needs sum(x) over each group, for the offset or the minimum."""
        return self.offset != 0 or self.minimum is not None


@dataclass(frozen=True)
class Matrix:
    """A weight matrix on a device, (N, K). `planes` are flat tensors in `Planes`' order."""

    format: Format
    num_rows: int  # N, a multiple of 32 (zero rows behind `used_rows`)
    num_cols: int  # K
    used_rows: int
    layout: str  # "panel" or "row"
    planes: tuple[Tensor, ...]
    shares: tuple[Matrix, ...] = ()  # by rows, where several cores hold them; `planes` is empty then

    @property
    def parts(self) -> tuple[Matrix, ...]:
        """The shares, or the whole as the one part."""
        return self.shares or (self,)

    @property
    def nbytes(self) -> int:
        if self.shares:
            return sum(share.nbytes for share in self.shares)
        return sum(plane.nbytes() for plane in self.planes)


def share_rows(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of the same format and width, each on its core, as one matrix of all their rows."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    num_rows, used_rows = sum(part.num_rows for part in parts), sum(part.used_rows for part in parts)
    return Matrix(first.format, num_rows, first.num_cols, used_rows, first.layout, (), tuple(parts))


class Planes:
    """Names for a matrix's planes, be they Tensors or the UOps that stand for them in a kernel."""

    def __init__(self, fmt: Format, planes: Sequence[UOp]) -> None:
        rest = list(planes)
        self.fmt = fmt
        self.codes = rest.pop(0)  # or the values, when not quantised
        self.high = rest.pop(0) if fmt.high_bits else None
        self.scale = self._scales(fmt.scale, rest)
        self.minimum = self._scales(fmt.minimum, rest)
        if rest:
            raise InvariantError(f"format {fmt.name} left {len(rest)} planes over")

    @staticmethod
    def _scales(fmt: ScaleFormat | None, rest: list[UOp]) -> tuple[ScaleFormat, UOp, UOp | None] | None:
        if fmt is None:
            return None
        return fmt, rest.pop(0), rest.pop(0) if fmt.has_steps else None

    @staticmethod
    def count(fmt: Format) -> int:
        """How many planes a matrix of this format has."""
        scales = [s for s in (fmt.scale, fmt.minimum) if s is not None]
        return 1 + (1 if fmt.high_bits else 0) + sum(2 if s.has_steps else 1 for s in scales)

    # -- reading, in the panel layout --------------------------------------------------------------------------------

    def panel_code(self, panel: UOp, col: UOp, lane: UOp | int, num_cols: int, half: int = 0) -> UOp:
        """The unscaled value of one weight as float32. `lane` is the row inside the panel; for packed codes (4 to 6
        bits) inside its half, since the two halves share bytes."""
        run = panel * num_cols + col
        if self.fmt.bits < 8:
            byte = self.codes[run * HALF + lane].load()
            code = ((byte >> 4) if half else (byte & 15)).cast(I32)
            return (code if self.high is None else code + self._high_bits(run, lane + half * HALF)).cast(F32)
        value = self.codes[run * PANEL + lane].load()
        # a bfloat16 is the upper half of a float32
        return (value.cast(U32) << 16).bitcast(F32) if self.fmt.name == "bfloat16" else value.cast(F32)

    def _high_bits(self, run: UOp, lane: UOp | int) -> UOp:
        """The bits above the fourth of code `lane` of a run, in their place."""
        assert self.high is not None
        width = self.fmt.high_bits
        bit = lane * width
        word = self.high[run * width + bit // WORD].load()
        shift = bit % WORD if isinstance(bit, int) else (bit % WORD).cast(U32)
        return ((word >> shift) & ((1 << width) - 1)).cast(I32) << 4

    def panel_factor(self, which: str, panel: UOp, group: UOp, lane: int | UOp, num_cols: int) -> UOp:
        """The scale (or minimum) of one row's group of columns, as float32."""
        scales = self.scale if which == "scale" else self.minimum
        assert scales is not None
        fmt, base, steps = scales
        per_base = fmt.span // self.fmt.group
        factor = base[(panel * (num_cols // fmt.span) + group // per_base) * PANEL + lane].load().cast(F32)
        if steps is not None:
            groups = num_cols // self.fmt.group
            factor = factor * steps[(panel * groups + group) * PANEL + lane].load().cast(I32).cast(F32)
        return factor

    def value(self, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """One whole value at a row that is data (an embedding row), as float32, in either layout."""
        if layout == "row":
            return self._row_value(row, col, num_cols)
        run, lane = row // PANEL * num_cols + col, row % PANEL
        if not self.fmt.is_quantized:
            value = self.codes[run * PANEL + lane].load()
            return (value.cast(U32) << 16).bitcast(F32) if self.fmt.name == "bfloat16" else value.cast(F32)
        if self.fmt.bits == 8:
            code = self.codes[run * PANEL + lane].load().cast(I32)
        else:
            code = (self.codes[run * HALF + lane % HALF].load().cast(I32) >> (lane // HALF * 4).cast(I32)) & 15
        return self._scaled(code, run, lane, row, col, num_cols, layout)

    def _row_value(self, row: UOp, col: UOp, num_cols: int) -> UOp:
        """`value` in row layout, whose codes are words."""
        index = row * num_cols + col
        if self.fmt.name == "bfloat16":
            word = self.codes[index // 2].load()
            return ((word >> (index % 2 * 16).cast(U32)) << 16).bitcast(F32)
        if not self.fmt.is_quantized:
            return self.codes[index].load().cast(F32)
        run, lane = index // PANEL, index % PANEL
        if self.fmt.bits == 8:
            byte = (self.codes[index // 4].load() >> (lane % 4 * 8).cast(U32)) & 0xFF
            code = (byte ^ 0x80).cast(I32) - 0x80
        else:
            word = self.codes[run * (HALF // 4) + lane % HALF // 4].load()
            code = ((word >> (lane % 4 * 8 + lane // HALF * 4).cast(U32)) & 15).cast(I32)
        return self._scaled(code, run, lane, row, col, num_cols, "row")

    def _scaled(self, code: UOp, run: UOp, lane: UOp, row: UOp, col: UOp, num_cols: int, layout: str) -> UOp:
        """The value of a code's low bits."""
        if self.high is not None:
            code = code + self._high_bits(run, lane)
        value = (code - self.fmt.offset).cast(F32) * self._factor(self.scale, row, col, num_cols, layout)
        if self.minimum is not None:
            value = value + self._factor(self.minimum, row, col, num_cols, layout)
        return value

    def _factor(
        self, scales: tuple[ScaleFormat, UOp, UOp | None] | None, row: UOp, col: UOp, num_cols: int, layout: str
    ) -> UOp:
        """The scale or minimum that covers one value."""
        assert scales is not None
        fmt, base, steps = scales

        def at(span: int) -> UOp:
            per_row = num_cols // span
            if layout == "panel":
                return (row // PANEL * per_row + col // span) * PANEL + row % PANEL
            return row * per_row + col // span

        factor = base[at(fmt.span)].load().cast(F32)
        return factor if steps is None else factor * steps[at(self.fmt.group)].load().cast(I32).cast(F32)


# -- packing ---------------------------------------------------------------------------------------------------------


def pack(host: HostMatrix, layout: str, dtype: str | None, device: str, *, dequantize: bool = False) -> Matrix:
    """Put a host matrix (N, K) on `device`. `dtype` recasts dense values (None: as stored); codes stay codes unless
    `dequantize`. Raises UnsupportedModelError where K is not a multiple of 32."""
    rows, cols = host.shape
    if cols % PANEL:
        raise UnsupportedModelError(f"a matrix of {rows} x {cols} has a width that is no multiple of {PANEL}")
    if isinstance(host, QuantizedMatrix) and dequantize:
        host, dtype = to_float32(host), dtype or "float16"
    padded = -(-rows // PANEL) * PANEL
    if isinstance(host, QuantizedMatrix):
        fmt, planes = _quantized_planes(host, padded, layout, np.float16 if has_half(device) else np.float32)
    else:
        fmt, planes = _dense_planes(host, dtype, padded, layout)
    if layout == "row" and planes[0].dtype in (np.uint8, np.int8, np.uint16):
        planes[0] = planes[0].reshape(-1).view(np.uint32)
    tensors = tuple(upload(plane, device) for plane in planes)
    return Matrix(fmt, padded, cols, rows, layout, tensors)


def _arrange(plane: np.ndarray, padded: int, layout: str) -> np.ndarray:
    """(N, C) -> (padded/32, C, 32) for panels, (padded, C) for rows."""
    if plane.shape[0] < padded:
        plane = np.concatenate([plane, np.zeros((padded - plane.shape[0], plane.shape[1]), plane.dtype)])
    if layout == "row":
        return np.ascontiguousarray(plane)
    return np.ascontiguousarray(plane.reshape(padded // PANEL, PANEL, -1).transpose(0, 2, 1))


def _dense_planes(
    host: np.ndarray | BFloat16Array, dtype: str | None, padded: int, layout: str
) -> tuple[Format, list[np.ndarray]]:
    stored = "bfloat16" if isinstance(host, BFloat16Array) else str(host.dtype)
    dtype = dtype or stored
    if dtype == "bfloat16":
        bits = host.bits if isinstance(host, BFloat16Array) else round_to_bfloat16(host.astype(np.float32))
        return Format("bfloat16", 16), [_arrange(bits, padded, layout)]
    values = host.to_float32() if isinstance(host, BFloat16Array) else host
    return Format(dtype, 32 if dtype == "float32" else 16), [_arrange(values.astype(dtype), padded, layout)]


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (ties to even), uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _quantized_planes(
    host: QuantizedMatrix, padded: int, layout: str, base_dtype: type[np.floating]
) -> tuple[Format, list[np.ndarray]]:
    scale, minimum = host.scale, host.minimum
    fmt = Format(
        host.kind, host.bits, host.group, host.offset, _scale_format(scale), _scale_format(minimum) if minimum else None
    )
    codes = _arrange(host.codes, padded, layout)
    planes = [codes]
    if host.bits != 8:
        runs = codes.reshape(-1, PANEL)  # 32 lanes of one column, or 32 columns of one row
        planes = [runs[:, :HALF] & 15 | (runs[:, HALF:] & 15) << 4]
        if fmt.high_bits:
            planes.append(_pack_high(runs >> 4, fmt.high_bits))
    for scales in (scale, minimum):
        if scales is not None:
            planes.append(_arrange(scales.base.astype(base_dtype), padded, layout))
            if scales.steps is not None:
                planes.append(_arrange(scales.steps, padded, layout))
    return fmt, planes


def _scale_format(scales: Scales) -> ScaleFormat:
    return ScaleFormat(scales.span, scales.steps is not None)


def _pack_high(high: np.ndarray, width: int) -> np.ndarray:
    """(runs, 32) values of `width` bits -> (runs, width) uint32 words; lane j at bit j * width, low bits first."""
    bits = np.unpackbits(high[:, :, None], axis=2, count=width, bitorder="little")  # (runs, 32, width)
    return np.packbits(bits.reshape(len(high), -1), axis=1, bitorder="little").view("<u4")


# -- the plain reference ---------------------------------------------------------------------------------------------


def unpack(matrix: Matrix, dtype: DType = dtypes.float) -> Tensor:
    """The whole matrix as a Tensor (N, K), by plain Tensor arithmetic: the reference of the kernels' readers, and the
    form in which GPUs' generic products read weights (the arithmetic fuses into the product's kernel)."""
    planes = Planes(matrix.format, matrix.planes)
    values = _unpack_values(planes, matrix)
    if not matrix.format.is_quantized:
        return _unarrange(values, matrix).cast(dtype)
    group = matrix.format.group
    codes = (_unarrange(values, matrix) - matrix.format.offset).reshape(
        matrix.num_rows, -1, group
    )  # (N, K/group, group)
    out = codes * _unpack_factor(planes, "scale", matrix).unsqueeze(-1)
    if planes.minimum is not None:
        out = out + _unpack_factor(planes, "minimum", matrix).unsqueeze(-1)
    return out.reshape(matrix.num_rows, matrix.num_cols).cast(dtype)


def _unpack_values(planes: Planes, matrix: Matrix) -> Tensor:
    """Dense values or codes as float32, still in the layout's order, flat."""
    fmt, stored = matrix.format, planes.codes
    if stored.dtype == dtypes.uint:  # row layout: words
        inside = dtypes.ushort if fmt.name == "bfloat16" else dtypes.char if fmt.bits == 8 else dtypes.uchar
        stored = stored.bitcast(inside)
    if fmt.name == "bfloat16":
        return (stored.cast(dtypes.uint) << 16).bitcast(dtypes.float)
    if fmt.bits in (8, 16, 32):
        return stored.cast(dtypes.float)
    low = stored.reshape(-1, 1, HALF)
    codes = (low & 15).cat(low >> 4, dim=1).reshape(-1, PANEL).cast(dtypes.uint)
    if planes.high is not None:
        width = fmt.high_bits
        # calculated, and not from a list, which every step would copy from the host anew
        shifts = Tensor.arange(0, WORD, width, dtype=dtypes.uint)
        high = (planes.high.reshape(-1, 1) >> shifts.reshape(1, -1)) & ((1 << width) - 1)
        codes = codes + (high.reshape(-1, PANEL) << 4)
    return codes.reshape(-1).cast(dtypes.float)


def _unarrange(flat: Tensor, matrix: Matrix) -> Tensor:
    """The inverse of `_arrange`: (N, C)."""
    if matrix.layout == "row":
        return flat.reshape(matrix.num_rows, -1)
    panels = matrix.num_rows // PANEL
    return flat.reshape(panels, -1, PANEL).permute(0, 2, 1).reshape(matrix.num_rows, -1)


def _unpack_factor(planes: Planes, which: str, matrix: Matrix) -> Tensor:
    """(N, K / group) float32."""
    fmt, base, steps = getattr(planes, which)
    factor = _unarrange(base, matrix).cast(dtypes.float)
    if steps is None:
        return factor
    per_base = fmt.span // matrix.format.group
    factor = factor.unsqueeze(-1).expand(*factor.shape, per_base).reshape(matrix.num_rows, -1)
    return factor * _unarrange(steps, matrix).cast(dtypes.float)
