"""Routing on the CPU device: which experts each row passes through, and in which order their products take the rows.

One core does it, from the router's products. A product of several rows reads each chosen expert once: rows are sorted
by expert, and cut into tiles of neighbors that share one (`Plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.config import ExpertsKind
from tinyvllm.ops.cpu.product import NormSpec, Shard, rms_scale, take_shards
from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    LOG2E,
    NEG_INF,
    Body,
    KernelFn,
    cached_kernel,
    clamp,
    exp2,
    fill,
    finish,
)
from tinyvllm.ops.plain import LEAST_SUM


@dataclass(frozen=True)
class Plan:
    """Where the parts of a plan lie in its buffer (int32). A pair is one expert of one token: number t * k + i.

    `order` (P): the pairs, sorted by expert; `places` (P): where each pair is in that order. Then for each tile, of
    which there are at most P: where its rows begin in the order, and its expert. Last the number of tiles.

    A tile that its expert does not fill goes on with rows of the next expert, whose own tile comes later and overwrites
    what it wrote; buffers of sorted rows have room for the rows of a whole tile at the end.
    """

    num_pairs: int  # P
    tile_rows: int

    @property
    def num_rows(self) -> int:
        """Rows of a buffer in the order of the experts."""
        return self.num_pairs + self.tile_rows - 1

    @property
    def places(self) -> int:
        return self.num_pairs

    @property
    def firsts(self) -> int:
        return 2 * self.num_pairs

    @property
    def experts(self) -> int:
        return self.firsts + self.num_pairs + 1  # one more, which writing them may touch

    @property
    def count(self) -> int:
        return self.experts + self.num_pairs + 1

    @property
    def size(self) -> int:
        return self.count + 1


@dataclass(frozen=True)
class RouteSpec:
    """The routing of T rows from the router's products (T, rows)."""

    kind: ExpertsKind
    num_tokens: int  # T
    logit_cols: tuple[int, ...]  # columns of each shard of the products
    stacks_shared: bool = False  # as in ExpertLayer
    plan: Plan | None = None  # the order to write; None: rows are taken as they come

    @property
    def num_chosen(self) -> int:
        return self.kind.top_k + self.stacks_shared

    @property
    def has_shared(self) -> bool:
        """Whether the weight of a shared expert is a result of its own."""
        return self.kind.has_shared_gate and not self.stacks_shared


@cached_kernel
def route_kernel(spec: RouteSpec) -> KernelFn:
    """fn(ids (T * k,) int32, weights (T * k,)[, shared (T,)][, plan], *shards of logits[, router bias][, choice bias]
    [, expert scale])."""

    def kernel(ids: UOp, weights: UOp, *rest: UOp) -> UOp:
        operands, kind = list(rest), spec.kind
        shared = operands.pop(0) if spec.has_shared else None
        plan = operands.pop(0) if spec.plan is not None else None
        logits = take_shards(operands, spec.logit_cols, sum(spec.logit_cols))
        router_bias = operands.pop(0) if kind.has_router_bias else None
        choice_bias = operands.pop(0) if kind.has_choice_bias else None
        expert_scale = operands.pop(0) if kind.has_expert_scale else None
        body = Body()
        row = _Row(body, spec, body.loop(spec.num_tokens), logits)
        scores = row.scores(router_bias)
        stores = row.choose(scores, row.choice(scores, choice_bias), expert_scale, ids, weights)
        if shared is not None:
            stores.append(shared[row.token].store(row.shared_weight()))
        done = UOp.group(*stores).end(row.token)
        if plan is not None and spec.plan is not None:
            done = _write_plan(body, spec.plan, kind.num_experts + spec.stacks_shared, plan, ids.after(done))
        name = f"route_{spec.num_tokens}x{kind.num_experts}x{kind.top_k}"
        ops = spec.num_tokens * kind.num_experts * (8 + 4 * kind.num_experts)
        return finish(done, name, ops=ops, nbytes=4 * spec.num_tokens * (sum(spec.logit_cols) + 2 * kind.top_k))

    return kernel


@dataclass(frozen=True)
class _Row:
    """One token's choice. Values of experts are in registers, (E,)."""

    body: Body
    spec: RouteSpec
    token: UOp
    logits: list[Shard]

    def logit(self, row: UOp) -> UOp:
        """The product of one of the router's rows."""
        value: UOp | None = None
        for shard in self.logits:
            inside = row if len(self.logits) == 1 else (row - shard.start).maximum(0).minimum(shard.width - 1)
            here = shard.buffer[shard.at(self.token, inside)].load()
            value = here if value is None else (row < shard.start).where(value, here)
        assert value is not None
        return value

    def shared_weight(self) -> UOp:
        """The sigmoid of the gate of a shared expert."""
        return _sigmoid(self.logit(UOp.const(self.spec.kind.num_experts)))

    def scores(self, bias: UOp | None) -> UOp:
        count, body = self.spec.kind.num_experts, self.body
        e = body.loop(count)
        value = self.logit(e) if bias is None else self.logit(e) + bias[e].load()
        if self.spec.kind.score == "sigmoid":
            return _set(body.registers(count), e, _sigmoid(value), self.token)
        values = _set(body.registers(count), e, value, self.token)
        best = _folded(body, count, NEG_INF, lambda i, old: old.maximum(values[i].load()), values)
        e = body.loop(count)
        powers = _set(body.registers(count), e, exp2((values[e].load() - best[0].load()) * LOG2E), best)
        total = _folded(body, count, 0.0, lambda i, old: old + powers[i].load(), powers)
        e = body.loop(count)
        return _set(body.registers(count), e, powers[e].load() / total[0].load(), total)

    def choice(self, scores: UOp, bias: UOp | None) -> UOp:
        """What experts are chosen by: -inf outside of the best groups."""
        kind, body = self.spec.kind, self.body
        if bias is not None:
            e = body.loop(kind.num_experts)
            scores = _set(body.registers(kind.num_experts), e, scores[e].load() + bias[e].load(), scores)
        if kind.num_groups == 1:
            return scores
        size = kind.num_experts // kind.num_groups
        group = body.loop(kind.num_groups)
        top = fill(body, body.registers(2), NEG_INF, scores, group)  # the two highest of the group
        i = body.fold(size)
        value, first, second = scores[group * size + i].load(), top.after(i)[0].load(), top.after(i)[1].load()
        stores = [
            top.after(i)[0].store(first.maximum(value)),
            top.after(i)[1].store(second.maximum(first.minimum(value))),
        ]
        top = top.after(UOp.group(*stores).end(i))
        sums = _set(body.registers(kind.num_groups), group, top[0].load() + top[1].load(), top)
        ranks = _ranks(body, sums, kind.num_groups)
        e = body.loop(kind.num_experts)
        is_top = ranks[e // size].load() < kind.top_groups
        return _set(body.registers(kind.num_experts), e, is_top.where(scores[e].load(), NEG_INF), ranks)

    def choose(self, scores: UOp, choice: UOp, expert_scale: UOp | None, ids: UOp, weights: UOp) -> list[UOp]:
        """Stores of the experts of the best choice and of their weights."""
        kind, body, k = self.spec.kind, self.body, self.spec.num_chosen
        ranks = _ranks(body, choice, kind.num_experts)
        # experts by rank: the ranks of numbers are a permutation; those of NaN leave places empty
        ranked = fill(body, body.registers(kind.num_experts, I32), 0, ranks)
        e = body.fold(kind.num_experts)
        place = clamp(ranks[e].load(), 0, kind.num_experts - 1)
        ranked = ranked.after(ranked.after(e)[place].store(e.cast(I32)).end(e))

        def expert(rank: UOp) -> UOp:
            return clamp(ranked[rank].load(), 0, kind.num_experts - 1)

        factor = UOp.const(kind.scale, F32)
        if kind.renormalizes:
            total = _folded(body, kind.top_k, 0.0, lambda i, old: old + scores[expert(i)].load(), ranked)
            factor = factor / (total[0].load() + LEAST_SUM)
        i = body.loop(kind.top_k)
        weight = scores[expert(i)].load() * factor
        if expert_scale is not None:
            weight = weight * expert_scale[expert(i)].load()
        at = self.token * k + i
        stores = [UOp.group(ids[at].store(expert(i).cast(I32)), weights[at].store(weight)).end(i)]
        if self.spec.stacks_shared:
            last = self.token * k + kind.top_k
            value = self.shared_weight() if kind.has_shared_gate else UOp.const(1.0, F32)
            stores += [ids[last].store(UOp.const(kind.num_experts, I32)), weights[last].store(value)]
        return stores


def _sigmoid(x: UOp) -> UOp:
    return (exp2(x * -LOG2E) + 1.0).reciprocal()


def _set(registers: UOp, index: UOp, value: UOp, *after: UOp) -> UOp:
    """The registers, each set to `value` by the loop over `index`, after `after`."""
    return registers.after(registers.after(*after)[index].store(value).end(index))


def _folded(body: Body, count: int, start: float, step: Callable[[UOp, UOp], UOp], *after: UOp) -> UOp:
    """A register with step(i, old) of every i, from `start`."""
    register = fill(body, body.registers(1), start, *after)
    i = body.fold(count)
    inner = register.after(i)
    return register.after(inner[0].store(step(i, inner[0].load())).end(i))


def _ranks(body: Body, values: UOp, count: int) -> UOp:
    """Registers with how many of `values` are higher than each, or equal and before it."""
    ranks = fill(body, body.registers(count, I32), 0, values)
    other = body.fold(count)
    inner, theirs, e = ranks.after(other), values[other].load(), body.loop(count)
    mine = values[e].load()
    is_ahead = (mine < theirs) | (mine.eq(theirs) & (other < e))
    return ranks.after(inner[e].store(inner[e].load() + is_ahead.cast(I32)).end(e, other))


def _write_plan(body: Body, plan: Plan, num_experts: int, out: UOp, ids: UOp) -> UOp:
    """Stores of a plan: the pairs sorted by expert, by counting, and the tiles that they are cut into."""
    pairs = plan.num_pairs

    def expert(pair: UOp) -> UOp:
        return clamp(ids[pair].load(), 0, num_experts - 1)

    # ends[e]: at first pairs of expert e, then where its pairs begin, then where the next one goes; in the end, its end
    ends = fill(body, body.registers(num_experts, I32), 0, ids)
    pair = body.fold(pairs)
    inner = ends.after(pair)
    ends = ends.after(inner[expert(pair)].store(inner[expert(pair)].load() + 1).end(pair))
    total = fill(body, body.registers(1, I32), 0, ends)
    e = body.fold(num_experts)
    before, own = total.after(e)[0].load(), ends.after(total, e)[e].load()
    ends_set = UOp.group(ends.after(total, e)[e].store(before), total.after(e)[0].store(before + own)).end(e)
    ends = ends.after(ends_set)
    pair = body.fold(pairs)
    inner = ends.after(pair)
    place = clamp(inner[expert(pair)].load(), 0, pairs - 1)
    moved = UOp.group(
        out[place].store(pair.cast(I32)),
        out[plan.places + pair].store(place.cast(I32)),
        inner[expert(pair)].store(place.cast(I32) + 1),
    ).end(pair)
    return _write_tiles(body, plan, out.after(moved), ends.after(moved), expert)


def _write_tiles(body: Body, plan: Plan, out: UOp, ends: UOp, expert: Callable[[UOp], UOp]) -> UOp:
    """Stores of the tiles. A pair begins one if the tiles of its expert so far end before it."""
    pairs = plan.num_pairs
    state = fill(body, body.registers(2, I32), 0, ends, out)  # tiles so far; where the last one ends
    place = body.fold(pairs)
    inner = state.after(place)
    count, covered = inner[0].load(), inner[1].load()
    own = expert(clamp(out[place].load(), 0, pairs - 1))
    is_first = covered <= place.cast(I32)
    # what is no tile is written too, where the next one overwrites it
    at, until = clamp(count, 0, pairs), (place.cast(I32) + plan.tile_rows).minimum(ends[own].load())
    stores = [
        out[plan.firsts + at].store(place.cast(I32)),
        out[plan.experts + at].store(own.cast(I32)),
        inner[0].store(count + is_first.cast(I32)),
        inner[1].store(is_first.where(until, covered)),
    ]
    done = UOp.group(*stores).end(place)
    return out[plan.count].store(state.after(done)[0].load())


@dataclass(frozen=True)
class GatherSpec:
    """Rows of x (T, K) in the order of a plan, perhaps normed: the columns of one of x's shards."""

    plan: Plan
    num_chosen: int  # k
    x_cols: tuple[int, ...]  # columns of each shard of x
    shard: int
    norm_eps: float | None = None

    @property
    def num_cols(self) -> int:
        """Columns that are written."""
        return self.x_cols[self.shard]


@cached_kernel
def gather_kernel(spec: GatherSpec) -> KernelFn:
    """fn(out (rows of the plan, columns), plan, *x shards[, norm weight (K,)]). The rows after the last pair are not
    written."""

    def kernel(out: UOp, plan: UOp, *rest: UOp) -> UOp:
        operands, body, pairs = list(rest), Body(), spec.plan.num_pairs
        shards = take_shards(operands, spec.x_cols, sum(spec.x_cols))
        place, own = body.loop(pairs), shards[spec.shard]
        token = clamp(plan[place].load(), 0, pairs - 1) // spec.num_chosen
        scale = None
        if spec.norm_eps is not None:
            norm = NormSpec(pairs // spec.num_chosen, sum(spec.x_cols), spec.norm_eps)
            scale = rms_scale(body, shards, token, norm, place)
        col = body.loop(own.width)
        value = own.buffer[own.at(token, col)].load()
        if scale is not None:
            value = value * scale[0] * operands[0][own.start + col].load()
        store, size = out[place * own.width + col].store(value).end(col, place), pairs * own.width
        return finish(store, f"gather_{pairs}x{own.width}", ops=4 * size, nbytes=8 * size)

    return kernel
