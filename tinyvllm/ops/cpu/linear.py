"""Matrix products on the CPU device, over packed panels (see matrix.py).

One pass over a panel multiplies up to four input rows, each with an accumulator a lane, and unpacks the weights in
registers on the way. That beats unpacking a panel to memory once for all rows: 64 rows of Q4_1 ran at 200 GFLOP/s on a
core against 110, float16 at 224 (AVX-512; with half as many registers two rows are the limit).
RMSNorm goes into the product's prologue (few rows) or into a pass of its own (many). Biases, the gate's activation and
the residual are epilogues; what else may follow a product has a pass of its own (`finish_kernel`). Sums run over k in
order, lane by lane, so a row's result depends on neither its neighbours nor the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import arithmetic, gated, tanh
from tinyvllm.ops.formats.matrix import HALF, PANEL, Planes, code_lanes
from tinyvllm.ops.kernel.body import Body, KernelFn, balanced, cached_kernel, exp2, fill, finish
from tinyvllm.ops.kernel.tuning import Tunable
from tinyvllm.ops.sampling.token_ids import token_id

ROWS_PER_PASS = (8, 4, 2, 1)
STAGED_ROWS = 16  # up to here a kernel copies (and normalises) its input rows on its stack; above, rms_norm runs before
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

    name: str  # what it does in the model: "qkv", "attn_out", ...
    format: Format
    num_tokens: int  # T
    num_rows: int  # N of the matrix
    num_cols: int  # K
    norm_eps: float | None = None  # RMSNorm the input rows first
    activation: str | None = None  # panels are of 16 gate and 16 up rows: activation(gate) * up, (T, N / 2)
    has_residual: bool = False  # + residual (T, N)
    # where the biases of this share's rows begin: of all rows, or of its gate and of its up rows; None: no biases
    bias_starts: tuple[int, ...] | None = None
    x_cols: tuple[int, ...] = ()  # columns of each part of x, side by side; (): one part of K
    tile_rows: int = 4  # input rows whose accumulators fit the vector registers: 32 lanes each

    @property
    def out_cols(self) -> int:
        return self.num_rows // 2 if self.activation is not None else self.num_rows

    @property
    def rows_per_pass(self) -> int:
        """Input rows that one pass over a panel serves: what divides T, up to `tile_rows`."""
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
class _Part:
    """Columns [start, start + width) of an input, (T, width) in a buffer of their own: each core's share of a row."""

    buffer: UOp
    start: int
    width: int

    def at(self, row: UOp, col: UOp) -> UOp:
        """Index of a column counted from `start`."""
        return row * self.width + col


def _take_parts(operands: list[UOp], x_cols: tuple[int, ...], num_cols: int) -> list[_Part]:
    """The input's parts, off the front of the operands."""
    parts, start = [], 0
    for width in x_cols or (num_cols,):
        parts.append(_Part(operands.pop(0), start, width))
        start += width
    return parts


@cached_kernel
def linear_kernel(spec: LinearSpec) -> KernelFn:
    """fn(out, *planes, *x parts[, norm_weight][, bias][, residual])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x = _take_parts(operands, spec.x_cols, spec.num_cols)
        norm_weight = operands.pop(0) if spec.norm_eps is not None else None
        bias = operands.pop(0) if spec.bias_starts is not None else None
        residual = operands.pop(0) if spec.has_residual else None
        body = Body()
        if spec.num_tokens <= STAGED_ROWS:
            x = [_stage(body, spec, x, norm_weight)]
        panel = body.loop(spec.num_rows // PANEL)
        tile = _multiply_panel(body, spec, planes, x, panel)
        stores = _epilogue(body, spec, out, bias, residual, panel, tile)
        nbytes = spec.num_rows * spec.num_cols * spec.format.bits // 8
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(stores.end(*tile.loops, panel), _name(spec), ops=ops, nbytes=nbytes)

    return kernel


def _name(spec: LinearSpec) -> str:
    return f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"


def _stage(body: Body, spec: LinearSpec, x: list[_Part], norm_weight: UOp | None) -> _Part:
    """Copy x (T, K) to the stack, RMS-normed where asked: x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019)."""
    tokens, cols = spec.num_tokens, spec.num_cols
    staged = body.registers(tokens * cols)
    copies = []
    for part in x:
        row, col = body.loop(tokens), body.loop(part.width)
        value = part.buffer[part.at(row, col)].load()
        copies.append(staged[row * cols + part.start + col].store(value).end(col, row))
    staged = staged.after(UOp.group(*copies))
    if norm_weight is None:
        return _Part(staged, 0, cols)
    token = body.loop(tokens)
    scale = _rms_scale(body, [_Part(staged, 0, cols)], token, spec.norm)
    col = body.loop(cols)
    target = staged.after(scale)
    normed = target[token * cols + col] * scale[0] * norm_weight[col]
    return _Part(staged.after(target[token * cols + col].store(normed).end(col).end(token)), 0, cols)


def _rms_scale(body: Body, x: list[_Part], token: UOp, spec: NormSpec) -> UOp:
    """A register with 1 / sqrt(mean(x[token]^2) + eps)."""
    sums = fill(body, body.registers(NORM_LANES), 0.0, token, *[part.buffer for part in x])
    for part in x:
        k = body.fold(part.width // NORM_LANES)
        inner = sums.after(k)
        values = [part.buffer[part.at(token, k * NORM_LANES + lane)].load() for lane in range(NORM_LANES)]
        sums = sums.after(UOp.group(*[inner[i].store(inner[i] + v * v) for i, v in enumerate(values)]).end(k))
    total = balanced(sums[i].load() for i in range(NORM_LANES))
    scale = body.registers(1)
    return scale.after(scale.after(token)[0].store((total * (1.0 / spec.num_cols) + spec.eps).sqrt().reciprocal()))


@cached_kernel
def rms_norm_kernel(spec: NormSpec) -> KernelFn:
    """fn(out, *x parts, weight): RMSNorm of T rows, for products of more rows than a stack should hold."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, operands = Body(), spec.num_cols, list(rest)
        x = _take_parts(operands, spec.x_cols, cols)
        weight = operands.pop(0)
        token = body.loop(spec.num_tokens)
        scale = _rms_scale(body, x, token, spec)
        stores = []
        for part in x:
            col = body.loop(part.width)
            normed = part.buffer[part.at(token, col)].load() * scale[0] * weight[part.start + col]
            stores.append(out[token * cols + part.start + col].store(normed).end(col))
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
    loops: list[UOp]  # to close when the registers have been stored


def _multiply_panel(body: Body, spec: LinearSpec, planes: Planes, x: list[_Part], panel: UOp) -> _Tile:
    """Weights are unpacked in registers and used at once: 32 accumulators, one a lane, for each row of the tile."""
    rows = spec.rows_per_pass
    tile_row = body.loop(spec.num_tokens // rows) if spec.num_tokens > rows else None
    loops = [tile_row] if tile_row is not None else []
    first = tile_row * rows if tile_row is not None else UOp.const(0)
    acc = fill(body, body.registers(rows * PANEL), 0.0, panel, *[part.buffer for part in x], *loops)
    add = _add_groups if spec.format.is_quantized else _add_columns
    for part in x:
        acc = acc.after(add(body, acc, planes, part, panel, spec, first))
    return _Tile(first, rows, acc, loops)


def _add_columns(body: Body, acc: UOp, planes: Planes, x: _Part, panel: UOp, spec: LinearSpec, first: UOp) -> UOp:
    """Add the product of one part of the input with dense weights."""
    k = body.fold(x.width)
    return _multiply(body, acc.after(k), planes, x, panel, k, spec, first).end(k)


def _add_groups(body: Body, acc: UOp, planes: Planes, x: _Part, panel: UOp, spec: LinearSpec, first: UOp) -> UOp:
    """The same with quantised weights: the codes' product by group, then scaled, so that a weight costs one
    multiply-add and its scale 1/group."""
    fmt, cols, rows = spec.format, spec.num_cols, spec.rows_per_pass
    size = math.gcd(fmt.group, x.start, x.width)  # less than a group where a core's share of x ends inside one
    step = body.fold(x.width // size)
    group = step + x.start // size if size == fmt.group else (step * size + x.start) // fmt.group
    part = fill(body, body.registers(rows * PANEL), 0.0, acc, step)
    k = body.fold(size)
    col = step * size + k
    stores = [_multiply(body, part.after(k), planes, x, panel, col, spec, first)]
    total = body.registers(rows)  # the sum of x over the group
    if fmt.needs_input_sum:
        total = fill(body, total, 0.0, acc, step)
        inner = total.after(k)
        stores += [inner[r].store(inner[r].load() + x.buffer[x.at(first + r, col)].load()) for r in range(rows)]
    done = UOp.group(*stores).end(k)
    part, total, outer = part.after(done), total.after(done), acc.after(step, done)
    lane = body.loop(PANEL)
    scale = planes.panel_factor("scale", panel, group, lane, cols)
    minimum = planes.panel_factor("minimum", panel, group, lane, cols) if planes.minimum is not None else None
    sums = []
    for r in range(rows):
        dot = part[r * PANEL + lane].load()
        if fmt.offset:
            dot = dot - total[r].load() * float(fmt.offset)
        dot = dot * scale
        if minimum is not None:
            dot = dot + total[r].load() * minimum
        sums.append(outer[r * PANEL + lane].store(outer[r * PANEL + lane].load() + dot))
    return UOp.group(*sums).end(lane, step)


def _multiply(
    body: Body, acc: UOp, planes: Planes, x: _Part, panel: UOp, col: UOp, spec: LinearSpec, first: UOp
) -> UOp:
    """acc[r][lane] += code[lane] * x[r] for one column, counted from the part's start."""
    values = [x.buffer[x.at(first + r, col)].load() for r in range(spec.rows_per_pass)]
    lanes = code_lanes(spec.format)
    lane = body.loop(lanes)
    stores = []
    for part in range(PANEL // lanes):
        code = planes.panel_code(panel, col + x.start, lane, spec.num_cols, part)
        for r, value in enumerate(values):
            at = r * PANEL + part * lanes + lane
            stores.append(acc[at].store(acc[at].load() + code * value))
    return UOp.group(*stores).end(lane)


def _epilogue(
    body: Body, spec: LinearSpec, out: UOp, bias: UOp | None, residual: UOp | None, panel: UOp, tile: _Tile
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
        stores.append(out[at].store(value if residual is None else value + residual[at].load()))
    return UOp.group(*stores).end(lane)


@dataclass(frozen=True)
class FinishSpec:
    """The rest of an epilogue, over rows y (T, N) of a product: columns [first_col, first_col + num_cols) of
    softcap(scale * norm(y) + residual)."""

    num_tokens: int  # T
    y_cols: tuple[int, ...]  # columns of each part of y
    first_col: int
    num_cols: int
    norm_eps: float | None = None
    scale: float = 1.0
    has_residual: bool = False  # (T, columns), with this share's columns alone
    softcap: float | None = None


@cached_kernel
def finish_kernel(spec: FinishSpec) -> KernelFn:
    """fn(out, *y parts[, norm weight (N,)][, residual]): see FinishSpec."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands, body, cols = list(rest), Body(), sum(spec.y_cols)
        parts = _take_parts(operands, spec.y_cols, cols)
        weight = operands.pop(0) if spec.norm_eps is not None else None
        residual = operands.pop(0) if spec.has_residual else None
        token = body.loop(spec.num_tokens)
        scale = None
        if spec.norm_eps is not None:
            scale = _rms_scale(body, parts, token, NormSpec(spec.num_tokens, cols, spec.norm_eps))
        stores = []
        for part in parts:
            first, end = max(part.start, spec.first_col), min(part.start + part.width, spec.first_col + spec.num_cols)
            if first >= end:
                continue
            i = body.loop(end - first)
            value = part.buffer[part.at(token, i + (first - part.start))].load()
            if scale is not None and weight is not None:
                value = value * scale[0] * weight[i + first].load()
            value = value if spec.scale == 1.0 else value * spec.scale
            at = token * spec.num_cols + (first - spec.first_col) + i
            value = value if residual is None else value + residual[at].load()
            if spec.softcap is not None:
                value = tanh(value * (1.0 / spec.softcap), exp2) * spec.softcap
            stores.append(out[at].store(value).end(i))
        done = (stores[0] if len(stores) == 1 else UOp.group(*stores)).end(token)
        size = spec.num_tokens * spec.num_cols
        return finish(done, f"finish_{spec.num_tokens}x{spec.num_cols}", ops=6 * size, nbytes=12 * size)

    return kernel


@dataclass(frozen=True)
class EmbedSpec:
    """Columns [first_col, first_col + num_cols) of the rows of a table that lies in parts, by rows."""

    format: Format
    num_tokens: int  # T
    part_rows: tuple[int, ...]  # rows of each part of the table; their sum is what token ids are bounded by
    table_cols: int  # K
    first_col: int
    num_cols: int
    token_offset: int  # of the token ids in the step's inputs
    is_fed: bool = False  # the output of the step before is there too, and a token id may name one of its rows
    scale: float = 1.0


@cached_kernel
def embed_kernel(spec: EmbedSpec) -> KernelFn:
    """fn(out (T, columns), inputs[, previous_output], *planes of each part). A token id beyond the table reads its last
    row."""

    def kernel(out: UOp, inputs: UOp, *rest: UOp) -> UOp:
        previous, planes = (rest[0], rest[1:]) if spec.is_fed else (None, rest)
        body, count = Body(), Planes.count(spec.format)
        token, col = body.loop(spec.num_tokens), body.loop(spec.num_cols)
        row = token_id(inputs[spec.token_offset + token].load(), previous, sum(spec.part_rows))
        value, start = None, 0
        for i, rows in enumerate(spec.part_rows):
            table = Planes(spec.format, planes[i * count : (i + 1) * count])
            inside = (row - start).maximum(0).minimum(rows - 1)
            here = table.value(inside, col + spec.first_col, spec.table_cols, "panel")
            value = here if value is None else (row < start).where(value, here)
            start += rows
        assert value is not None
        store = out[token * spec.num_cols + col].store(value if spec.scale == 1.0 else value * spec.scale)
        name = f"embed_{spec.format.name}_{spec.num_tokens}x{spec.num_cols}"
        nbytes = spec.num_tokens * spec.num_cols * (4 + spec.format.bits // 8)
        return finish(store.end(col).end(token), name, nbytes=nbytes)

    return kernel


@cached_kernel
def join_kernel(num_rows: int, part_cols: tuple[int, ...]) -> KernelFn:
    """fn(out (R, sum of columns), *parts (R, columns)): the parts side by side in one buffer."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        body, cols, stores = Body(), sum(part_cols), []
        for part in _take_parts(list(rest), part_cols, cols):
            row, col = body.loop(num_rows), body.loop(part.width)
            value = part.buffer[part.at(row, col)].load()
            stores.append(out[row * cols + part.start + col].store(value).end(col, row))
        return finish(stores, f"join_{num_rows}x{cols}", nbytes=8 * num_rows * cols)

    return kernel
