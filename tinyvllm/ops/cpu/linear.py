"""Matrix products on the CPU device, over packed panels (see ops/formats/matrix.py).

One pass over a panel multiplies up to four input rows, with one accumulator in each lane for each row, and unpacks the
weights in registers. That is faster than unpacking a panel to memory once for all rows: 64 rows of Q4_1 ran at 200
GFLOP/s on a core instead of 110, float16 at 224 (AVX-512; with half as many registers, two rows are the limit).
Quantized matrices on x86 multiply integers instead (dots.py).

RMSNorm is part of the product for a few rows, and a separate pass for many. What follows a product is part of it too,
except a norm: that needs all cores' columns, and is a separate pass (`finish_kernel`) with what follows it. The inner
loops are in product.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated, tanh
from tinyvllm.ops.cpu.dots import DotProduct
from tinyvllm.ops.cpu.fixed_rows import FixedRows, RowForm, fix_rows, rows_of_block
from tinyvllm.ops.cpu.product import (
    CPU_ARITHMETIC,
    STAGED_ROWS,
    NormSpec,
    Product,
    Shard,
    rms_scale,
    stage_rows,
    take_shards,
)
from tinyvllm.ops.cpu.unpacked_dots import UnpackedProduct
from tinyvllm.ops.formats.matrix import HALF, PANEL, Planes
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, clamp, exp2, fill, finish
from tinyvllm.ops.kernel.tuning import Tunable
from tinyvllm.ops.sampling.token_ids import token_id

ROWS_PER_PASS = (8, 4, 2, 1)  # to be searched


@dataclass(frozen=True)
class LinearSpec(Tunable):
    """One product: out (T, N) = epilogue(x (T, K) @ w.T). Hashable: the key of its kernel."""

    name: str  # what it does in the model: "qkv", "attention_out", ...
    format: Format
    num_tokens: int  # T
    num_rows: int  # N of the matrix
    num_cols: int  # K
    norm_eps: float | None = None  # of an RMSNorm of x, inside the kernel
    activation: str | None = None  # panels have 16 gate and 16 up rows: activation(gate) * up, (T, N / 2)
    scale: float = 1.0  # * scale
    has_residual: bool = False  # + residual (T, N)
    has_out_scale: bool = False  # * a (1,) operand
    softcap: float | None = None  # softcap * tanh(y / softcap)
    # where the biases of this shard's rows begin: of all rows, or of its gate and of its up rows; None: no biases
    bias_starts: tuple[int, ...] | None = None
    x_cols: tuple[int, ...] = ()  # columns of each shard of x; (): one buffer of K
    # Of a block-diagonal matrix: the rows of a block, which multiply columns of their own of x, and the columns of x
    # from one block's first to the next one's. num_cols is a block's K. No norm; x is one buffer. 0: it is not one
    block_rows: int = 0
    block_stride: int = 0
    # num_rows is the most of any core, and how many panels this one has is an operand: cores with shares of different
    # sizes have one program, which takes a cold start 0.2 s less for each
    any_panels: bool = False
    tile_rows: int = 4  # input rows whose accumulators fit into the vector registers: 32 lanes each
    layout: str = "panel"  # of the matrix; "dot": x is rounded to integers (dots.py), which many rows are beforehand
    x_bits: int = 16  # of these integers, as far as the format allows it (RowForm)

    @property
    def rows_per_pass(self) -> int:
        """Input rows of one pass over a panel: a divisor of T, up to `tile_rows`; or one row more if these are all."""
        most = self.tile_rows + (self.num_tokens == self.tile_rows + 1)  # to unpack a panel again would cost more
        return self.knob("rows_per_pass", next(n for n in range(most, 0, -1) if self._fits(n)))

    @property
    def has_fixed_rows(self) -> bool:
        """Whether x was rounded beforehand."""
        return self.layout == "dot" and self.num_tokens > STAGED_ROWS

    @property
    def num_blocks(self) -> int:
        """Blocks of rounded rows, with each of which all panels are multiplied while it is in the cache. Reading the
        matrix again takes less than a block that has left the cache: 16 panels of 4-bit codes are as large as 64 rows
        of x in their columns."""
        return self.num_tokens // rows_of_block(self.num_tokens) if self.has_fixed_rows else 1

    def _fits(self, rows: int) -> bool:
        """Whether all passes can have this many rows."""
        return (rows_of_block(self.num_tokens) if self.has_fixed_rows else self.num_tokens) % rows == 0

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        rows = tuple(rows for rows in ROWS_PER_PASS if rows != self.rows_per_pass and self._fits(rows))
        return {"rows_per_pass": rows} if self.num_tokens > 1 else {}

    @property
    def x_form(self) -> RowForm:
        return RowForm.of(self.format, self.x_bits)

    @property
    def norm(self) -> NormSpec | None:
        return None if self.norm_eps is None else NormSpec(self.num_tokens, self.num_cols, self.norm_eps)


@cached_kernel
def linear_kernel(spec: LinearSpec) -> KernelFn:
    """fn(out, *planes, *x shards[, norm weight][, bias][, residual][, out scale][, panels]). With the `dot` layout and
    more than STAGED_ROWS, x is its integers and their factors (dots.py)."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        body = Body()
        x = _take_input(body, spec, operands)
        bias = operands.pop(0) if spec.bias_starts is not None else None
        ending = Ending.take(spec, operands)
        blocks = _loop_over_blocks(body, spec, x)
        num_panels: UOp | int = spec.num_rows // PANEL
        if spec.any_panels:
            num_panels = clamp(operands.pop(0)[0].load(), 1, spec.num_rows // PANEL)
        panel = body.loop_up_to(num_panels)
        if spec.block_rows and not isinstance(x, FixedRows):
            stride, block = spec.num_rows // spec.block_rows * spec.block_stride, panel // (spec.block_rows // PANEL)
            x = [Shard(x[0].buffer, 0, spec.num_cols, stride, block * spec.block_stride)]
        tile = _multiply_panel(body, spec, planes, x, panel, blocks)
        stores = _epilogue(body, spec, out, bias, ending, (panel, num_panels), tile)
        # each block of rows reads the matrix again
        nbytes = int(spec.num_rows * spec.num_cols * spec.format.code_bits) // 8 * spec.num_blocks
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(stores.end(*tile.loops, panel, *blocks), _name(spec), ops=ops, nbytes=nbytes)

    return kernel


def _take_input(body: Body, spec: LinearSpec, operands: list[UOp]) -> list[Shard] | FixedRows:
    """x as the product reads it, removed from the front of the operands with the norm's weight."""
    tokens, has_dots = spec.num_tokens, spec.layout == "dot"
    if spec.has_fixed_rows:
        return FixedRows(operands.pop(0), operands.pop(0), tokens, spec.num_cols, spec.x_form)
    x = take_shards(operands, () if spec.block_rows else spec.x_cols, spec.num_cols)
    norm_weight = operands.pop(0) if spec.norm_eps is not None else None
    if tokens <= STAGED_ROWS and not spec.block_rows and (not has_dots or spec.norm is not None or len(x) > 1):
        x = [stage_rows(body, x, tokens, spec.norm, norm_weight)]
    return fix_rows(body, x[0], tokens, spec.x_form) if has_dots else x


def _name(spec: LinearSpec) -> str:
    return f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"


@cached_kernel
def rms_norm_kernel(spec: NormSpec) -> KernelFn:
    """fn(out, *x shards, weight): RMSNorm of T rows, for products of more than STAGED_ROWS."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, operands = Body(), spec.num_cols, list(rest)
        x = take_shards(operands, spec.x_cols, cols)
        weight = operands.pop(0)
        token = body.grid(spec.num_tokens)
        scale = rms_scale(body, x, token, spec)
        stores = []
        for shard in x:
            col = body.loop(shard.width)
            normed = shard.buffer[shard.at(token, col)].load() * scale[0] * weight[shard.start + col]
            stores.append(out[token * cols + shard.start + col].store(normed).end(col))
        tokens = spec.num_tokens
        name = f"rms_norm_{tokens}x{cols}"
        return finish(UOp.group(*stores).end(token), name, ops=4 * tokens * cols, nbytes=8 * tokens * cols)

    return kernel


@dataclass(frozen=True)
class _Tile:
    """A product's result: rows [first, first + rows) of x against a panel, in registers [rows][32]."""

    first: UOp
    rows: int
    registers: UOp
    loops: list[UOp]  # to end after the stores of the registers
    start: UOp | int = 0  # of the rows among the registers


def _loop_over_blocks(body: Body, spec: LinearSpec, x: list[Shard] | FixedRows) -> list[UOp]:
    """The blocks of rounded rows, if they are more than a pass has: work items, so that a program serves any number."""
    if not isinstance(x, FixedRows) or spec.num_tokens <= spec.rows_per_pass:
        return []
    return [body.grid(spec.num_blocks)]


def _multiply_panel(
    body: Body, spec: LinearSpec, planes: Planes, x: list[Shard] | FixedRows, panel: UOp, blocks: list[UOp]
) -> _Tile:
    """The product of a tile of x's rows with a panel: 32 accumulators, one per lane, for each row."""
    if isinstance(x, FixedRows) and blocks:
        return _multiply_unpacked(body, spec, planes, x, panel, *blocks)
    rows = spec.rows_per_pass
    tile_row = body.loop(spec.num_tokens // rows) if spec.num_tokens > rows else None
    loops = [tile_row] if tile_row is not None else []
    first = tile_row * rows if tile_row is not None else UOp.const(0)
    read = [x.integers, x.factors] if isinstance(x, FixedRows) else [shard.buffer for shard in x]
    acc = fill(body, body.registers(rows * PANEL), 0.0, panel, *read, *loops)
    of_rows = (body, spec.format, spec.num_cols, planes, panel, [first + r for r in range(rows)])
    if isinstance(x, FixedRows):
        return _Tile(first, rows, DotProduct(*of_rows).add(acc, x), loops)
    return _Tile(first, rows, Product(*of_rows).add_shards(acc, x), loops)


def _multiply_unpacked(body: Body, spec: LinearSpec, planes: Planes, x: FixedRows, panel: UOp, block: UOp) -> _Tile:
    """The product of a block of rows with a panel."""
    rows = x.block_rows
    acc = fill(body, body.registers(rows * PANEL), 0.0, panel, x.integers, x.factors, block)
    product = UnpackedProduct(body, spec.format, spec.num_cols, planes, panel, block, spec.rows_per_pass)
    row = body.loop(rows)
    return _Tile(block * rows + row, 1, product.add(acc, x), [row], row * PANEL)


class HasEnding(Protocol):
    """A spec whose kernel computes an `Ending`."""

    @property
    def scale(self) -> float: ...
    @property
    def has_residual(self) -> bool: ...
    @property
    def has_out_scale(self) -> bool: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True)
class Ending:
    """What an epilogue ends with, after its norm if there is one. `residual`: at the same places as the result."""

    scale: float
    residual: UOp | None
    out_scale: UOp | None
    softcap: float | None

    @classmethod
    def take(cls, spec: HasEnding, operands: list[UOp]) -> Ending:
        """With the operands at the front of `operands`, which are removed."""
        residual = operands.pop(0) if spec.has_residual else None
        return cls(spec.scale, residual, operands.pop(0) if spec.has_out_scale else None, spec.softcap)

    def finish(self, value: UOp, at: UOp) -> UOp:
        """softcap(out_scale * (scale * value + residual[at]))."""
        value = value if self.scale == 1.0 else value * self.scale
        value = value if self.residual is None else value + self.residual[at].load()
        value = value if self.out_scale is None else value * self.out_scale[0].load()
        if self.softcap is None:
            return value
        return tanh(value * (1.0 / self.softcap), exp2) * self.softcap


def _epilogue(
    body: Body,
    spec: LinearSpec,
    out: UOp,
    bias: UOp | None,
    ending: Ending,
    place: tuple[UOp, UOp | int],
    tile: _Tile,
) -> UOp:
    """Stores of the tile's rows. place: the panel, and how many there are."""
    width = PANEL if spec.activation is None else HALF
    panel, num_panels = place
    lane = body.loop(width)

    def with_bias(value: UOp, section: int) -> UOp:
        if bias is None or spec.bias_starts is None:
            return value
        return value + bias[panel * width + lane + spec.bias_starts[section]].load()

    stores = []
    for r in range(tile.rows):
        value = with_bias(tile.registers[tile.start + r * PANEL + lane].load(), 0)
        if spec.activation is not None:
            up = with_bias(tile.registers[tile.start + r * PANEL + HALF + lane].load(), 1)
            (value,) = gated(spec.activation, [value], [up], CPU_ARITHMETIC)
        at = (tile.first + r) * (num_panels * width) + panel * width + lane
        stores.append(out[at].store(ending.finish(value, at)))
    return UOp.group(*stores).end(lane)


@dataclass(frozen=True)
class FinishSpec:
    """The rest of an epilogue, over rows y (T, N) of a product: columns [first_col, first_col + num_cols) of
    softcap(out_scale * (scale * norm(y) + residual))."""

    num_tokens: int  # T
    y_cols: tuple[int, ...]  # columns of each shard of y
    first_col: int
    num_cols: int
    norm_eps: float | None = None
    scale: float = 1.0
    has_residual: bool = False  # (T, columns), with this core's columns only
    has_out_scale: bool = False  # a (1,) operand
    softcap: float | None = None


@cached_kernel
def finish_kernel(spec: FinishSpec) -> KernelFn:
    """fn(out, *y shards[, norm weight (N,)][, residual][, out scale]): see FinishSpec."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands, body, cols = list(rest), Body(), sum(spec.y_cols)
        shards = take_shards(operands, spec.y_cols, cols)
        weight = operands.pop(0) if spec.norm_eps is not None else None
        ending = Ending.take(spec, operands)
        token = body.loop(spec.num_tokens)
        scale = None
        if spec.norm_eps is not None:
            scale = rms_scale(body, shards, token, NormSpec(spec.num_tokens, cols, spec.norm_eps))
        stores = []
        for shard in shards:
            first, end = (
                max(shard.start, spec.first_col),
                min(shard.start + shard.width, spec.first_col + spec.num_cols),
            )
            if first >= end:
                continue
            i = body.loop(end - first)
            value = shard.buffer[shard.at(token, i + (first - shard.start))].load()
            if scale is not None and weight is not None:
                value = value * scale[0] * weight[i + first].load()
            at = token * spec.num_cols + (first - spec.first_col) + i
            stores.append(out[at].store(ending.finish(value, at)).end(i))
        done = (stores[0] if len(stores) == 1 else UOp.group(*stores)).end(token)
        size = spec.num_tokens * spec.num_cols
        return finish(done, f"finish_{spec.num_tokens}x{spec.num_cols}", ops=6 * size, nbytes=12 * size)

    return kernel


@dataclass(frozen=True)
class EmbedSpec:
    """`num_cols` columns of rows of an embedding table that is sharded by rows. Where they begin is data, so that all
    cores share a kernel."""

    format: Format
    num_tokens: int  # T
    shard_rows: tuple[int, ...]  # rows of each shard; token ids are clamped to their sum
    shards: tuple[int, int]  # those that the kernel reads: [first, end)
    table_cols: int  # K
    num_cols: int
    token_offset: int  # of the token ids in the step's inputs
    is_fed: bool = False  # the previous step's output is an operand, and a token id below 0 names one of its rows
    scale: float = 1.0
    layout: str = "panel"  # of the table

    @property
    def has_part(self) -> bool:
        return self.num_cols < self.table_cols


@cached_kernel
def embed_kernel(spec: EmbedSpec) -> KernelFn:
    """fn(out (T, columns)[, first column (1,) int32, of a part], inputs[, previous_output][, out of the shards before],
    *planes of each shard). A token id beyond the table reads its last row."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        begins, (inputs, *rest) = (operands[0], operands[1:]) if spec.has_part else (None, operands)
        previous, planes = (rest[0], rest[1:]) if spec.is_fed else (None, rest)
        body, count = Body(), Planes.count(spec.format)
        token, col = body.grid(spec.num_tokens), body.loop(spec.num_cols)
        row = token_id(inputs[spec.token_offset + token].load(), previous, sum(spec.shard_rows))
        first_col = 0 if begins is None else clamp(begins[0].load(), 0, spec.table_cols - spec.num_cols)
        first, end = spec.shards
        value, start = None, sum(spec.shard_rows[:first])
        if first:
            value, planes = planes[0][token * spec.num_cols + col].load(), planes[1:]
        for i, rows in enumerate(spec.shard_rows[first:end]):
            table = Planes(spec.format, planes[i * count : (i + 1) * count])
            inside = (row - start).maximum(0).minimum(rows - 1)
            here = table.value(inside, col + first_col, spec.table_cols, spec.layout)
            here = here if spec.scale == 1.0 else here * spec.scale
            value = here if value is None else (row < start).where(value, here)
            start += rows
        assert value is not None
        store = out[token * spec.num_cols + col].store(value)
        name = f"embed_{spec.format.name}_{spec.num_tokens}x{spec.num_cols}"
        nbytes = int(spec.num_tokens * spec.num_cols * (4 + spec.format.code_bits / 8))
        return finish(store.end(col).end(token), name, nbytes=nbytes)

    return kernel


@cached_kernel
def join_kernel(num_rows: int, shard_cols: tuple[int, ...]) -> KernelFn:
    """fn(out (R, sum of columns), *shards (R, columns)): the shards' columns in one buffer."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, stores = Body(), sum(shard_cols), []
        row = body.grid(num_rows)
        for shard in take_shards(list(rest), shard_cols, cols):
            col = body.loop(shard.width)
            value = shard.buffer[shard.at(row, col)].load()
            stores.append(out[row * cols + shard.start + col].store(value).end(col))
        return finish(UOp.group(*stores).end(row), f"join_{num_rows}x{cols}", nbytes=8 * num_rows * cols)

    return kernel
