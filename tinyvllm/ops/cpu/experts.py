"""Products of the experts' matrices on the CPU device, over packed panels: each core holds some rows of every expert.

One token passes through its k experts, whose panels are read one after another; the down product adds up what they
return by weight. Rows of several tokens are sorted by expert, and multiplied in tiles (routing.py): a panel is read
from memory once for all tiles of its expert, because they follow each other. An expert that no token chose is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.cpu.linear import Ending
from tinyvllm.ops.cpu.product import (
    CPU_ARITHMETIC,
    NormSpec,
    Product,
    Shard,
    stage_rows,
    take_shards,
)
from tinyvllm.ops.cpu.routing import Plan
from tinyvllm.ops.formats.matrix import HALF, PANEL, Planes
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, clamp, fill, finish


@dataclass(frozen=True)
class ExpertSpec:
    """out (P, N) = x @ w[expert].T + bias[expert] for each pair of a token and one of its k experts, P = T * k; with an
    activation, (P, N / 2) = activation(gate) * up."""

    name: str
    format: Format
    num_tokens: int  # T
    num_chosen: int  # k
    num_experts: int  # E
    num_rows: int  # N of one expert, on this core
    num_cols: int  # K
    x_cols: tuple[int, ...]  # columns of each shard of x
    norm_eps: float | None = None  # of an RMSNorm of one token, inside the kernel
    activation: str | None = None  # panels have 16 gate and 16 up rows
    # where the biases of this core's rows begin in those of an expert: of all rows, or of its gate and of its up rows
    bias_starts: tuple[int, ...] | None = None
    bias_cols: int = 0  # biases of an expert on all cores
    plan: Plan | None = None  # x and out are in its order; None: one token, and x is the row of all its pairs

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.num_chosen

    @property
    def out_rows(self) -> int:
        return self.num_pairs if self.plan is None else self.plan.num_rows

    @property
    def out_cols(self) -> int:
        return self.num_rows // 2 if self.activation is not None else self.num_rows

    @property
    def most_read(self) -> int:
        """The most experts that are read."""
        return min(self.num_pairs, self.num_experts)

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are read at most."""
        return int(self.most_read * self.num_rows * self.num_cols * self.format.code_bits) // 8

    @property
    def num_ops(self) -> int:
        return 2 * self.num_pairs * self.num_rows * self.num_cols

    @property
    def kernel_name(self) -> str:
        return f"{self.name}_{self.format.name}_{self.num_pairs}x{self.num_rows}x{self.num_cols}"


@dataclass(frozen=True)
class _Tile:
    """Rows that share an expert, and the loop over the tiles."""

    loop: UOp
    expert: UOp
    rows: list[UOp]


def _next_tile(body: Body, spec: ExpertSpec, ids: UOp) -> _Tile:
    """`ids`: the experts of one token, or a plan."""
    if spec.plan is None:
        pair = body.loop(spec.num_pairs)
        return _Tile(pair, _expert(spec, ids[pair]), [pair])
    plan, pairs = spec.plan, spec.num_pairs
    # any number of tiles, for tinygrad: Body.fold_while
    tile = body.fold_while(clamp(ids[plan.count].load(), 0, max(pairs, 2)))
    at = tile.minimum(pairs - 1)
    first = clamp(ids[plan.firsts + at].load(), 0, pairs - 1)
    return _Tile(tile, _expert(spec, ids[plan.experts + at]), [first + r for r in range(plan.tile_rows)])


def _expert(spec: ExpertSpec, place: UOp) -> UOp:
    return clamp(place.load(), 0, spec.num_experts - 1)


@cached_kernel
def experts_kernel(spec: ExpertSpec) -> KernelFn:
    """fn(out (rows, columns), ids (k,) or plan, *planes, *x shards[, norm weight][, bias (E, bias columns)])."""

    def kernel(out: UOp, ids: UOp, *rest: UOp) -> UOp:
        operands, body = list(rest), Body()
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x = take_shards(operands, spec.x_cols, spec.num_cols)
        if spec.plan is None:
            norm = None if spec.norm_eps is None else NormSpec(1, spec.num_cols, spec.norm_eps)
            x = [stage_rows(body, x, 1, norm, operands.pop(0) if norm is not None else None)]
        bias = operands.pop(0) if spec.bias_starts is not None else None
        panel = body.loop(spec.num_rows // PANEL)
        tile = _next_tile(body, spec, ids)
        rows = tile.rows if spec.plan is not None else [UOp.const(0)]
        acc = body.registers(len(rows) * PANEL)
        acc = fill(body, acc, 0.0, panel, tile.loop, *[shard.buffer for shard in x])
        own_panel = tile.expert * (spec.num_rows // PANEL) + panel
        acc = Product(body, spec.format, spec.num_cols, planes, own_panel, rows).add_shards(acc, x)
        stores = _store_rows(body, spec, out, bias, panel, tile, acc)
        # one token's experts one after another; those of several by panels, so that tiles of an expert share them
        loops = (panel, tile.loop) if spec.plan is None else (tile.loop, panel)
        return finish(stores.end(*loops), spec.kernel_name, ops=spec.num_ops, nbytes=spec.nbytes)

    return kernel


def _store_rows(body: Body, spec: ExpertSpec, out: UOp, bias: UOp | None, panel: UOp, tile: _Tile, acc: UOp) -> UOp:
    """Stores of a tile's results in one panel."""
    width = PANEL if spec.activation is None else HALF
    lane = body.loop(width)

    def with_bias(value: UOp, section: int) -> UOp:
        if bias is None or spec.bias_starts is None:
            return value
        return value + bias[tile.expert * spec.bias_cols + spec.bias_starts[section] + panel * width + lane].load()

    stores = []
    for r, row in enumerate(tile.rows):
        value = with_bias(acc[r * PANEL + lane].load(), 0)
        if spec.activation is not None:
            up = with_bias(acc[r * PANEL + HALF + lane].load(), 1)
            (value,) = gated(spec.activation, [value], [up], CPU_ARITHMETIC)
        stores.append(out[row * spec.out_cols + panel * width + lane].store(value))
    return UOp.group(*stores).end(lane)


@dataclass(frozen=True)
class SumSpec:
    """What follows the sum of a token's experts: scale, residual and the rest of an epilogue without a norm."""

    num_tokens: int  # T
    num_chosen: int  # k
    num_cols: int  # N, on this core
    plan: Plan | None = None  # the order of the experts' rows; None: one token's are not stored
    scale: float = 1.0
    has_residual: bool = False
    has_out_scale: bool = False
    softcap: float | None = None


@cached_kernel
def one_row_kernel(spec: ExpertSpec, end: SumSpec) -> KernelFn:
    """fn(out (N,), ids (k,), weights (k,), *planes, *x shards (k, K)[, bias][, residual][, out scale]): the sum of one
    token's k products by weight, and what follows it."""

    def kernel(out: UOp, ids: UOp, weights: UOp, *rest: UOp) -> UOp:
        operands, body = list(rest), Body()
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x = _stage_weighted(body, spec, take_shards(operands, spec.x_cols, spec.num_cols), weights)
        bias = operands.pop(0) if spec.bias_starts is not None else None
        ending = Ending.take(end, operands)
        panel, pair = body.loop(spec.num_rows // PANEL), body.fold(spec.num_chosen)
        acc = fill(body, body.registers(PANEL), 0.0, panel, x.buffer)
        own_panel = _expert(spec, ids[pair]) * (spec.num_rows // PANEL) + panel
        product = Product(body, spec.format, spec.num_cols, planes, own_panel, [pair])
        acc = acc.after(product.add_shard(acc.after(pair), x).end(pair))
        lane = body.loop(PANEL)
        value, at = acc[lane].load(), panel * PANEL + lane
        if bias is not None and spec.bias_starts is not None:
            for i in range(spec.num_chosen):
                row = _expert(spec, ids[i]) * spec.bias_cols + spec.bias_starts[0]
                value = value + weights[i].load() * bias[row + at].load()
        store = out[at].store(ending.finish(value, at)).end(lane, panel)
        return finish(store, spec.kernel_name, ops=spec.num_ops, nbytes=spec.nbytes)

    return kernel


def _stage_weighted(body: Body, spec: ExpertSpec, x: list[Shard], weights: UOp) -> Shard:
    """Copy x (k, K) to the stack, each row times its weight: the sum of the products is then one product."""
    staged = body.registers(spec.num_pairs * spec.num_cols)
    copies = []
    for shard in x:
        pair, col = body.loop(spec.num_pairs), body.loop(shard.width)
        value = shard.buffer[shard.at(pair, col)].load() * weights[pair].load()
        copies.append(staged[pair * spec.num_cols + shard.start + col].store(value).end(col, pair))
    return Shard(staged.after(UOp.group(*copies)), 0, spec.num_cols)


@cached_kernel
def sum_kernel(spec: SumSpec) -> KernelFn:
    """fn(out (T, N), weights (T * k,), plan, y (rows of the plan, N)[, residual][, out scale]): the sum of each token's
    rows of y by weight, and what follows it."""

    def kernel(out: UOp, weights: UOp, order: UOp, y: UOp, *rest: UOp) -> UOp:
        operands, body, k, plan = list(rest), Body(), spec.num_chosen, spec.plan
        assert plan is not None
        ending = Ending.take(spec, operands)
        token = body.loop(spec.num_tokens)
        pairs = [token * k + i for i in range(k)]
        rows = [clamp(order[plan.places + pair].load(), 0, plan.num_pairs - 1) for pair in pairs]
        col = body.loop(spec.num_cols)
        values = [weights[p].load() * y[row * spec.num_cols + col].load() for p, row in zip(pairs, rows, strict=True)]
        at, size = token * spec.num_cols + col, spec.num_tokens * spec.num_cols
        store = out[at].store(ending.finish(sum(values[1:], values[0]), at)).end(col, token)
        return finish(
            store, f"sum_experts_{spec.num_tokens}x{k}x{spec.num_cols}", ops=2 * k * size, nbytes=4 * k * size
        )

    return kernel


@cached_kernel
def scale_rows_kernel(num_tokens: int, num_cols: int) -> KernelFn:
    """fn(out (T, N), x (T, N), factors (T,))."""

    def kernel(out: UOp, x: UOp, factors: UOp) -> UOp:
        body = Body()
        token, col = body.loop(num_tokens), body.loop(num_cols)
        at, size = token * num_cols + col, num_tokens * num_cols
        store = out[at].store(x[at].load() * factors[token].load()).end(col, token)
        return finish(store, f"scale_rows_{num_tokens}x{num_cols}", ops=size, nbytes=8 * size)

    return kernel
