"""Matrix products on the CPU device, over packed panels (see ops/formats/matrix.py).

One pass over a panel multiplies up to four input rows, with one accumulator in each lane for each row, and unpacks the
weights in registers. That is faster than unpacking a panel to memory once for all rows: 64 rows of Q4_1 ran at 200
GFLOP/s on a core instead of 110, float16 at 224 (AVX-512; with half as many registers, two rows are the limit).

RMSNorm is part of the product for a few rows, and a separate pass for many. What follows a product is part of it too,
except a norm: that needs all cores' columns, and is a separate pass (`finish_kernel`) with what follows it. Each lane
adds up its products in the order of k, so a row's result depends on neither its neighbors nor the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import arithmetic, gated, tanh
from tinyvllm.ops.cpu.shuffle import LookedUp, look_up_run, lookup_of
from tinyvllm.ops.formats.matrix import HALF, PANEL, Planes, code_lanes, high_bits, panel_unit
from tinyvllm.ops.kernel.body import Body, KernelFn, balanced, cached_kernel, exp2, fill, finish
from tinyvllm.ops.kernel.tuning import Tunable
from tinyvllm.ops.sampling.token_ids import token_id

ROWS_PER_PASS = (8, 4, 2, 1)
STAGED_ROWS = 16  # up to this many input rows are copied to the kernel's stack and normalized there; more by rms_norm
NORM_LANES = 16
CPU_ARITHMETIC = arithmetic(exp2)


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm of T rows of K columns."""

    num_tokens: int  # T
    num_cols: int  # K
    eps: float
    x_cols: tuple[int, ...] = ()  # as in LinearSpec


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
    tile_rows: int = 4  # input rows whose accumulators fit into the vector registers: 32 lanes each

    @property
    def out_cols(self) -> int:
        return self.num_rows // 2 if self.activation is not None else self.num_rows

    @property
    def rows_per_pass(self) -> int:
        """Input rows of one pass over a panel: a divisor of T, up to `tile_rows`."""
        wanted = self.knob("rows_per_pass", self.tile_rows)
        return next(rows for rows in ROWS_PER_PASS if rows <= wanted and self.num_tokens % rows == 0)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        rows = tuple(rows for rows in ROWS_PER_PASS if rows != self.rows_per_pass and self.num_tokens % rows == 0)
        return {"rows_per_pass": rows} if self.num_tokens > 1 else {}

    @property
    def norm(self) -> NormSpec:
        assert self.norm_eps is not None
        return NormSpec(self.num_tokens, self.num_cols, self.norm_eps)


@dataclass(frozen=True)
class _Shard:
    """Columns [start, start + width) of an input, (T, width) in a buffer: those of one core."""

    buffer: UOp
    start: int
    width: int

    def at(self, row: UOp, col: UOp) -> UOp:
        """Index of a column counted from `start`."""
        return row * self.width + col


def _take_shards(operands: list[UOp], x_cols: tuple[int, ...], num_cols: int) -> list[_Shard]:
    """An input's shards, removed from the front of the operands."""
    shards, start = [], 0
    for width in x_cols or (num_cols,):
        shards.append(_Shard(operands.pop(0), start, width))
        start += width
    return shards


@cached_kernel
def linear_kernel(spec: LinearSpec) -> KernelFn:
    """fn(out, *planes, *x shards[, norm weight][, bias][, residual][, out scale])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x = _take_shards(operands, spec.x_cols, spec.num_cols)
        norm_weight = operands.pop(0) if spec.norm_eps is not None else None
        bias = operands.pop(0) if spec.bias_starts is not None else None
        ending = _Ending.take(spec, operands)
        body = Body()
        if spec.num_tokens <= STAGED_ROWS:
            x = [_stage(body, spec, x, norm_weight)]
        panel = body.loop(spec.num_rows // PANEL)
        tile = _multiply_panel(body, spec, planes, x, panel)
        stores = _epilogue(body, spec, out, bias, ending, panel, tile)
        nbytes = int(spec.num_rows * spec.num_cols * spec.format.code_bits) // 8
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(stores.end(*tile.loops, panel), _name(spec), ops=ops, nbytes=nbytes)

    return kernel


def _name(spec: LinearSpec) -> str:
    return f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"


def _stage(body: Body, spec: LinearSpec, x: list[_Shard], norm_weight: UOp | None) -> _Shard:
    """Copy x (T, K) to the stack, normed if there is a norm: x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019)."""
    tokens, cols = spec.num_tokens, spec.num_cols
    staged = body.registers(tokens * cols)
    copies = []
    for shard in x:
        row, col = body.loop(tokens), body.loop(shard.width)
        value = shard.buffer[shard.at(row, col)].load()
        copies.append(staged[row * cols + shard.start + col].store(value).end(col, row))
    staged = staged.after(UOp.group(*copies))
    if norm_weight is None:
        return _Shard(staged, 0, cols)
    token = body.loop(tokens)
    scale = _rms_scale(body, [_Shard(staged, 0, cols)], token, spec.norm)
    col = body.loop(cols)
    target = staged.after(scale)
    normed = target[token * cols + col] * scale[0] * norm_weight[col]
    return _Shard(staged.after(target[token * cols + col].store(normed).end(col).end(token)), 0, cols)


def _rms_scale(body: Body, x: list[_Shard], token: UOp, spec: NormSpec) -> UOp:
    """A register with 1 / sqrt(mean(x[token]^2) + eps)."""
    sums = fill(body, body.registers(NORM_LANES), 0.0, token, *[shard.buffer for shard in x])
    for shard in x:
        k = body.fold(shard.width // NORM_LANES)
        inner = sums.after(k)
        values = [shard.buffer[shard.at(token, k * NORM_LANES + lane)].load() for lane in range(NORM_LANES)]
        sums = sums.after(UOp.group(*[inner[i].store(inner[i] + v * v) for i, v in enumerate(values)]).end(k))
    total = balanced(sums[i].load() for i in range(NORM_LANES))
    scale = body.registers(1)
    return scale.after(scale.after(token)[0].store((total * (1.0 / spec.num_cols) + spec.eps).sqrt().reciprocal()))


@cached_kernel
def rms_norm_kernel(spec: NormSpec) -> KernelFn:
    """fn(out, *x shards, weight): RMSNorm of T rows, for products of more than STAGED_ROWS."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, operands = Body(), spec.num_cols, list(rest)
        x = _take_shards(operands, spec.x_cols, cols)
        weight = operands.pop(0)
        token = body.loop(spec.num_tokens)
        scale = _rms_scale(body, x, token, spec)
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


def _multiply_panel(body: Body, spec: LinearSpec, planes: Planes, x: list[_Shard], panel: UOp) -> _Tile:
    """The product of a tile of x's rows with a panel: 32 accumulators, one per lane, for each row."""
    rows = spec.rows_per_pass
    tile_row = body.loop(spec.num_tokens // rows) if spec.num_tokens > rows else None
    loops = [tile_row] if tile_row is not None else []
    first = tile_row * rows if tile_row is not None else UOp.const(0)
    acc = fill(body, body.registers(rows * PANEL), 0.0, panel, *[shard.buffer for shard in x], *loops)
    product = _Product(body, spec, planes, panel, first)
    for shard in x:
        acc = acc.after(product.add_groups(acc, shard) if spec.format.is_quantized else product.add(acc, shard))
    return _Tile(first, rows, acc, loops)


@dataclass(frozen=True)
class _Product:
    """Rows [first, first + rows_per_pass) of x times a panel. Weights are unpacked in registers and used at once."""

    body: Body
    spec: LinearSpec
    planes: Planes
    panel: UOp
    first: UOp

    def add(self, acc: UOp, x: _Shard) -> UOp:
        """Add the product of a shard of x with dense weights."""
        k = self.body.fold(x.width)
        return self._multiply(acc.after(k), x, k).end(k)

    def add_groups(self, acc: UOp, x: _Shard) -> UOp:
        """The same with quantized weights: first the codes' products by group, which are then scaled. So a weight costs
        one multiply-add, and its scale 1 / group."""
        body, fmt, rows, width = self.body, self.spec.format, self.spec.rows_per_pass, self.spec.format.code_cols
        size = math.gcd(fmt.group, x.start, x.width)  # less than a group if a shard of x ends inside one
        step = body.fold(x.width // size)
        group = step + x.start // size if size == fmt.group else (step * size + x.start) // fmt.group
        dots = fill(body, body.registers(rows * PANEL), 0.0, acc, step)
        k = body.fold(size // width)
        col = step * size + k * width
        multiply = self._multiply if fmt.grid is None else self._multiply_vectors
        stores = [multiply(dots.after(k), x, col)]
        total = body.registers(rows)  # the sum of x over the group
        if fmt.needs_input_sum:
            total = fill(body, total, 0.0, acc, step)
            inner = total.after(k)
            for r in range(rows):
                values = [x.buffer[x.at(self.first + r, col + i)].load() for i in range(width)]
                stores.append(inner[r].store(sum(values, inner[r].load())))
        done = UOp.group(*stores).end(k)
        return self._add_scaled(acc.after(step, done), dots.after(done), total.after(done), group, step)

    def _add_scaled(self, acc: UOp, dots: UOp, total: UOp, group: UOp, step: UOp) -> UOp:
        """acc += scale * (dots - offset * total) + minimum * total; ends the loop `step`."""
        spec, fmt = self.spec, self.spec.format
        lane = self.body.loop(PANEL)
        scale = self.planes.panel_factor("scale", self.panel, group, lane, spec.num_cols)
        lookup = lookup_of(fmt)
        unit = panel_unit(fmt) if lookup is None else lookup.unit
        scale = scale if unit == 1.0 else scale * unit
        minimum = None
        if self.planes.minimum is not None:
            minimum = self.planes.panel_factor("minimum", self.panel, group, lane, spec.num_cols)
        stores = []
        for r in range(spec.rows_per_pass):
            dot = dots[r * PANEL + lane].load()
            if fmt.offset:
                dot = dot - total[r].load() * float(fmt.offset)
            dot = dot * scale
            if minimum is not None:
                dot = dot + total[r].load() * minimum
            stores.append(acc[r * PANEL + lane].store(acc[r * PANEL + lane].load() + dot))
        return UOp.group(*stores).end(lane, step)

    def _multiply(self, acc: UOp, x: _Shard, col: UOp) -> UOp:
        """acc[r][lane] += code[lane] * x[r] for one column, counted from the shard's start."""
        values = [x.buffer[x.at(self.first + r, col)].load() for r in range(self.spec.rows_per_pass)]
        lanes = code_lanes(self.spec.format)
        looked_up = self._looked_up(acc, col + x.start)
        if looked_up is not None:
            lanes = PANEL
        lane = self.body.loop(lanes)
        stores = []
        for part in range(PANEL // lanes):
            if looked_up is None:
                code = self.planes.panel_code(self.panel, col + x.start, lane, self.spec.num_cols, part)
            else:
                code = looked_up[lane]
            for r, value in enumerate(values):
                at = r * PANEL + part * lanes + lane
                stores.append(acc[at].store(acc[at].load() + code * value))
        return UOp.group(*stores).end(lane)

    def _looked_up(self, acc: UOp, col: UOp) -> LookedUp | None:
        """What one column's codes stand for, if a shuffle can look them up."""
        lookup = lookup_of(self.spec.format)
        if lookup is None:
            return None
        run = (self.panel * self.spec.num_cols + col) * code_lanes(self.spec.format)
        return look_up_run(self.body.registers(PANEL).after(acc), lookup, self.planes.codes[run])

    def _multiply_vectors(self, acc: UOp, x: _Shard, col: UOp) -> UOp:
        """The same for the columns of one code of a grid, by parts of the lanes whose codes' high bits share a word."""
        body, spec, parts = self.body, self.spec, max(1, high_bits(self.spec.format))
        vector, width, lane = (col + x.start) // spec.format.code_cols, spec.format.code_cols, body.loop(PANEL // parts)
        stores = []
        for part in range(parts):
            place = lane + part * (PANEL // parts)
            weights = self.planes.panel_vector(self.panel, vector, place, spec.num_cols)
            for r in range(spec.rows_per_pass):
                total = acc[r * PANEL + place].load()
                for i in range(width):
                    total = total + weights[i] * x.buffer[x.at(self.first + r, col + i)].load()
                stores.append(acc[r * PANEL + place].store(total))
        return UOp.group(*stores).end(lane)


@dataclass(frozen=True)
class _Ending:
    """What an epilogue ends with, after its norm if there is one. `residual`: at the same places as the result."""

    scale: float
    residual: UOp | None
    out_scale: UOp | None
    softcap: float | None

    @classmethod
    def take(cls, spec: LinearSpec | FinishSpec, operands: list[UOp]) -> _Ending:
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
    body: Body, spec: LinearSpec, out: UOp, bias: UOp | None, ending: _Ending, panel: UOp, tile: _Tile
) -> UOp:
    """Stores of the tile's rows."""
    width = PANEL if spec.activation is None else HALF
    lane = body.loop(width)

    def with_bias(value: UOp, section: int) -> UOp:
        if bias is None or spec.bias_starts is None:
            return value
        return value + bias[panel * width + lane + spec.bias_starts[section]].load()

    stores = []
    for r in range(tile.rows):
        value = with_bias(tile.registers[r * PANEL + lane].load(), 0)
        if spec.activation is not None:
            up = with_bias(tile.registers[r * PANEL + HALF + lane].load(), 1)
            (value,) = gated(spec.activation, [value], [up], CPU_ARITHMETIC)
        at = (tile.first + r) * spec.out_cols + panel * width + lane
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
        shards = _take_shards(operands, spec.y_cols, cols)
        weight = operands.pop(0) if spec.norm_eps is not None else None
        ending = _Ending.take(spec, operands)
        token = body.loop(spec.num_tokens)
        scale = None
        if spec.norm_eps is not None:
            scale = _rms_scale(body, shards, token, NormSpec(spec.num_tokens, cols, spec.norm_eps))
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
    """Columns [first_col, first_col + num_cols) of rows of an embedding table that is sharded by rows."""

    format: Format
    num_tokens: int  # T
    shard_rows: tuple[int, ...]  # rows of each shard; token ids are clamped to their sum
    table_cols: int  # K
    first_col: int
    num_cols: int
    token_offset: int  # of the token ids in the step's inputs
    is_fed: bool = False  # the previous step's output is an operand, and a token id below 0 names one of its rows
    scale: float = 1.0


@cached_kernel
def embed_kernel(spec: EmbedSpec) -> KernelFn:
    """fn(out (T, columns), inputs[, previous_output], *planes of each shard). A token id beyond the table reads its
    last row."""

    def kernel(out: UOp, inputs: UOp, *rest: UOp) -> UOp:
        previous, planes = (rest[0], rest[1:]) if spec.is_fed else (None, rest)
        body, count = Body(), Planes.count(spec.format)
        token, col = body.loop(spec.num_tokens), body.loop(spec.num_cols)
        row = token_id(inputs[spec.token_offset + token].load(), previous, sum(spec.shard_rows))
        value, start = None, 0
        for i, rows in enumerate(spec.shard_rows):
            table = Planes(spec.format, planes[i * count : (i + 1) * count])
            inside = (row - start).maximum(0).minimum(rows - 1)
            here = table.value(inside, col + spec.first_col, spec.table_cols, "panel")
            value = here if value is None else (row < start).where(value, here)
            start += rows
        assert value is not None
        store = out[token * spec.num_cols + col].store(value if spec.scale == 1.0 else value * spec.scale)
        name = f"embed_{spec.format.name}_{spec.num_tokens}x{spec.num_cols}"
        nbytes = int(spec.num_tokens * spec.num_cols * (4 + spec.format.code_bits / 8))
        return finish(store.end(col).end(token), name, nbytes=nbytes)

    return kernel


@cached_kernel
def join_kernel(num_rows: int, shard_cols: tuple[int, ...]) -> KernelFn:
    """fn(out (R, sum of columns), *shards (R, columns)): the shards' columns in one buffer."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, stores = Body(), sum(shard_cols), []
        for shard in _take_shards(list(rest), shard_cols, cols):
            row, col = body.loop(num_rows), body.loop(shard.width)
            value = shard.buffer[shard.at(row, col)].load()
            stores.append(out[row * cols + shard.start + col].store(value).end(col, row))
        return finish(stores, f"join_{num_rows}x{cols}", nbytes=8 * num_rows * cols)

    return kernel
