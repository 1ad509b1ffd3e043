"""Matrix products on the CPU device, over packed panels (see matrix.py).

One pass over a panel multiplies up to four input rows, each with an accumulator a lane, and unpacks the weights in
registers on the way. That beats unpacking a panel to memory once for all rows: 64 rows of Q4_1 ran at 200 GFLOP/s on a
core against 110, float16 at 224 (AVX-512; with half as many registers two rows are the limit).
RMSNorm goes into the product's prologue (few rows) or into a pass of its own (many); SiLU x up and the residual are
epilogues. Sums run over k in order, lane by lane, so a row's result depends on neither its neighbours nor the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel import F32, Body, KernelFn, balanced, cached_kernel, fill, finish, silu
from tinyvllm.ops.matrix import HALF, PANEL, Format, Planes

STAGED_ROWS = 16  # up to here a kernel copies (and normalises) its input rows on its stack; above, rms_norm runs before
NORM_LANES = 16


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm of T rows of K columns."""

    num_tokens: int  # T
    num_cols: int  # K
    eps: float


@dataclass(frozen=True)
class LinearSpec:
    """One product: out (T, N) = epilogue(x (T, K) @ w.T). Hashable: the key of its kernel."""

    name: str  # what it does in the model: "qkv", "attn_out", ...
    format: Format
    num_tokens: int  # T
    num_rows: int  # N of the matrix
    num_cols: int  # K
    norm_eps: float | None = None  # RMSNorm the input rows first
    epilogue: str = "none"  # "none", "residual" (+ residual (T, N)), "silu" (panels of 16 gate and 16 up rows; N/2 out)
    tile_rows: int = 4  # input rows whose accumulators fit the vector registers: 32 lanes each

    @property
    def out_cols(self) -> int:
        return self.num_rows // 2 if self.epilogue == "silu" else self.num_rows

    @property
    def rows_per_pass(self) -> int:
        """Input rows that one pass over a panel serves: what divides T, up to `tile_rows`."""
        return next(rows for rows in (4, 2, 1) if rows <= self.tile_rows and self.num_tokens % rows == 0)

    @property
    def norm(self) -> NormSpec:
        assert self.norm_eps is not None
        return NormSpec(self.num_tokens, self.num_cols, self.norm_eps)


@cached_kernel
def linear_kernel(spec: LinearSpec) -> KernelFn:
    """fn(out, *planes, x[, norm_weight][, residual])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x = operands.pop(0)
        norm_weight = operands.pop(0) if spec.norm_eps is not None else None
        residual = operands.pop(0) if spec.epilogue == "residual" else None
        body = Body()
        if spec.num_tokens <= STAGED_ROWS:
            x = _stage(body, spec, x, norm_weight)
        panel = body.loop(spec.num_rows // PANEL)
        tile = _multiply_panel(body, spec, planes, x, panel)
        stores = _epilogue(body, spec, out, residual, panel, tile)
        nbytes = spec.num_rows * spec.num_cols * spec.format.bits // 8
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(stores.end(*tile.loops, panel), _name(spec), ops=ops, nbytes=nbytes)

    return kernel


def _name(spec: LinearSpec) -> str:
    return f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"


def _stage(body: Body, spec: LinearSpec, x: UOp, norm_weight: UOp | None) -> UOp:
    """Copy x (T, K) to the stack, RMS-normed where asked: x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019)."""
    tokens, cols = spec.num_tokens, spec.num_cols
    staged = body.registers(tokens * cols)
    i = body.loop(tokens * cols)
    staged = staged.after(staged[i].store(x[i].load().cast(F32)).end(i))
    if norm_weight is None:
        return staged
    token = body.loop(tokens)
    scale = _rms_scale(body, staged, token, spec.norm)
    col = body.loop(cols)
    target = staged.after(scale)
    normed = target[token * cols + col] * scale[0] * norm_weight[col]
    return staged.after(target[token * cols + col].store(normed).end(col).end(token))


def _rms_scale(body: Body, x: UOp, token: UOp, spec: NormSpec) -> UOp:
    """A register with 1 / sqrt(mean(x[token]^2) + eps)."""
    cols = spec.num_cols
    sums = body.registers(NORM_LANES)
    sums = fill(body, sums, 0.0, token, x)
    k = body.fold(cols // NORM_LANES)
    inner = sums.after(k)
    values = [x[token * cols + k * NORM_LANES + lane].load().cast(F32) for lane in range(NORM_LANES)]
    added = UOp.group(*[inner[i].store(inner[i] + v * v) for i, v in enumerate(values)]).end(k)
    total = balanced(sums.after(added)[i].load() for i in range(NORM_LANES))
    scale = body.registers(1)
    return scale.after(scale.after(token)[0].store((total * (1.0 / cols) + spec.eps).sqrt().reciprocal()))


@cached_kernel
def rms_norm_kernel(spec: NormSpec) -> KernelFn:
    """fn(out, x, weight): RMSNorm of T rows, for products of more rows than a stack should hold."""

    def kernel(out: UOp, x: UOp, weight: UOp) -> UOp:
        body, cols = Body(), spec.num_cols
        token = body.loop(spec.num_tokens)
        scale = _rms_scale(body, x, token, spec)
        col = body.loop(cols)
        normed = x[token * cols + col].load() * scale[0] * weight[col]
        store = out[token * cols + col].store(normed).end(col).end(token)
        return finish(
            store,
            f"rms_norm_{spec.num_tokens}x{cols}",
            ops=4 * spec.num_tokens * cols,
            nbytes=8 * spec.num_tokens * cols,
        )

    return kernel


@dataclass(frozen=True)
class _Tile:
    """A product's result: rows [first, first + rows) of x against a panel, in registers [rows][32]."""

    first: UOp
    rows: int
    registers: UOp
    loops: list[UOp]  # to close when the registers have been stored


def _multiply_panel(body: Body, spec: LinearSpec, planes: Planes, x: UOp, panel: UOp) -> _Tile:
    """Weights are unpacked in registers and used at once: 32 accumulators, one a lane, for each row of the tile.

    Quantised: the codes' product by group, then scaled: a weight costs one multiply-add, and its scale 1/group."""
    cols, fmt, rows = spec.num_cols, spec.format, spec.rows_per_pass
    tile_row = body.loop(spec.num_tokens // rows) if spec.num_tokens > rows else None
    loops = [tile_row] if tile_row is not None else []
    first = tile_row * rows if tile_row is not None else UOp.const(0)
    count = rows * PANEL
    acc = fill(body, body.registers(count), 0.0, panel, x, *loops)
    if not fmt.is_quantized:
        k = body.fold(cols)
        acc = acc.after(_multiply(body, acc.after(k), planes, x, panel, k, spec, first).end(k))
        return _Tile(first, rows, acc, loops)

    group = body.fold(cols // fmt.group)
    part = fill(body, body.registers(count), 0.0, acc, group)
    k = body.fold(fmt.group)
    col = group * fmt.group + k
    stores = [_multiply(body, part.after(k), planes, x, panel, col, spec, first)]
    total = body.registers(rows)  # the sum of x over the group
    if fmt.needs_input_sum:
        total = fill(body, total, 0.0, acc, group)
        inner = total.after(k)
        stores += [inner[r].store(inner[r].load() + x[(first + r) * cols + col].load()) for r in range(rows)]
    done = UOp.group(*stores).end(k)
    part, total, outer = part.after(done), total.after(done), acc.after(group, done)
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
    acc = acc.after(UOp.group(*sums).end(lane, group))
    return _Tile(first, rows, acc, loops)


def _multiply(body: Body, acc: UOp, planes: Planes, x: UOp, panel: UOp, col: UOp, spec: LinearSpec, first: UOp) -> UOp:
    """acc[r][lane] += code[lane] * x[r] for one column."""
    values = [x[(first + r) * spec.num_cols + col].load() for r in range(spec.rows_per_pass)]
    lane = body.loop(spec.format.code_lanes)
    stores = []
    for half in range(PANEL // spec.format.code_lanes):
        code = planes.panel_code(panel, col, lane, spec.num_cols, half)
        for r, value in enumerate(values):
            at = r * PANEL + half * HALF + lane
            stores.append(acc[at].store(acc[at].load() + code * value))
    return UOp.group(*stores).end(lane)


def _epilogue(body: Body, spec: LinearSpec, out: UOp, residual: UOp | None, panel: UOp, tile: _Tile) -> UOp:
    """Stores of the tile's rows."""
    width = HALF if spec.epilogue == "silu" else PANEL
    lane = body.loop(width)
    stores = []
    for r in range(tile.rows):
        value = tile.registers[r * PANEL + lane].load()
        if spec.epilogue == "silu":
            value = silu(value) * tile.registers[r * PANEL + HALF + lane].load()
        at = (tile.first + r) * spec.out_cols + panel * width + lane
        stores.append(out[at].store(value if residual is None else value + residual[at].load()))
    return UOp.group(*stores).end(lane)


@cached_kernel
def embed_kernel(fmt: Format, num_tokens: int, num_rows: int, num_cols: int, token_offset: int) -> KernelFn:
    """fn(out (T, K), inputs, *planes): rows of a panel-packed table. A token id beyond it reads the last row."""

    def kernel(out: UOp, inputs: UOp, *planes: UOp) -> UOp:
        body, table = Body(), Planes(fmt, planes)
        token, col = body.loop(num_tokens), body.loop(num_cols)
        row = inputs[token_offset + token].load().maximum(0).minimum(num_rows - 1)
        store = out[token * num_cols + col].store(table.value(row, col, num_cols, "panel"))
        name = f"embed_{fmt.name}_{num_tokens}x{num_cols}"
        return finish(store.end(col).end(token), name, nbytes=num_tokens * num_cols * (4 + fmt.bits // 8))

    return kernel
