"""Which experts a token passes through, and by which weights: from the router's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.config import ExpertsKind
from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    LOG2E,
    LOWEST,
    NEG_INF,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    finish,
)
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous, axes_of, carry, warps

MAX_EXPERTS = 1024  # a thread for each


@dataclass(frozen=True)
class RouteSpec:
    """ids (T, k), weights (T, k)[, weights of the shared expert (T,)] = top-k of scores of S partial sums of logits
    (S, T, N). Ties: the lower id. A NaN is chosen last."""

    lanes: Lanes
    kind: ExpertsKind
    num_tokens: int  # T
    num_rows: int  # N of the router, at least the number of experts
    num_partials: int  # S
    stacks_shared: bool  # the shared expert is one more of each token's

    @property
    def num_chosen(self) -> int:
        """k"""
        return self.kind.top_k + self.stacks_shared

    @property
    def num_warps(self) -> int:
        return -(-self.kind.num_experts // LANES)

    @property
    def has_shared_weight(self) -> bool:
        """Whether the weight of the shared expert is an output of its own."""
        return self.kind.has_shared_gate and not self.stacks_shared


def uncovered_kind(kind: ExpertsKind) -> str:
    """Why the kernel does not cover a router, in words; "" if it does."""
    if kind.num_groups > 1:
        return f"{kind.num_groups} groups of experts"
    return f"{kind.num_experts} experts" if kind.num_experts > MAX_EXPERTS else ""


@cached_kernel
def route_kernel(spec: RouteSpec) -> KernelFn:
    """fn(ids, weights[, shared weights], logits[, router bias][, choice bias][, factors of experts]): see RouteSpec. A
    threadgroup for each token, a thread for each expert: its rank is the number of experts that are better."""

    def kernel(ids: UOp, weights: UOp, *rest: UOp) -> UOp:
        buffers, kind = list(rest), spec.kind
        shared = buffers.pop(0) if spec.has_shared_weight else None
        (logits,) = await_previous(spec.lanes, buffers.pop(0))
        biases = buffers.pop(0) if kind.has_router_bias else None
        choice = buffers.pop(0) if kind.has_choice_bias else None
        factors = buffers.pop(0) if kind.has_expert_scale else None
        row = _Row(spec, logits, biases)
        scores = row.scores()
        rank = row.rank(scores if choice is not None else row.logit, choice)
        is_chosen = row.is_real & (rank < kind.top_k)
        weight = scores
        if kind.renormalizes:
            weight = scores / row.total(is_chosen.where(scores, 0.0)).maximum(1e-20)
        weight = weight * kind.scale
        if factors is not None:
            weight = weight * factors[row.expert].load()
        at = row.token * spec.num_chosen + clamp(rank, 0, kind.top_k - 1)
        at = at.valid(row.condition(is_chosen))
        stores = [ids[at].store(row.thread.cast(I32)), weights[at].store(weight)]
        stores += row.shared_stores(ids, weights, shared)
        name = f"route_{spec.num_tokens}x{kind.num_experts}"
        nbytes = 4 * spec.num_tokens * (spec.num_rows * spec.num_partials + 2 * spec.num_chosen)
        return finish(UOp.group(*stores).end(*reversed(row.axes)), name, nbytes=nbytes)

    return kernel


class _Row:
    """A token's threadgroup. `expert`: the thread's, or the last one for threads beyond them (`is_real`)."""

    def __init__(self, spec: RouteSpec, logits: UOp, biases: UOp | None) -> None:
        self.spec, self.body, self.logits, self.biases = spec, Body(), logits, biases
        self.token, self.lane = self.body.grid(spec.num_tokens), self.body.threads(LANES)
        self.warp = warps(self.body, spec.num_warps)
        self.axes = axes_of(self.token, self.lane, self.warp)
        self.thread = self.warp * LANES + self.lane
        count = spec.kind.num_experts
        self.expert = self.thread.minimum(count - 1)
        self.is_real = self.thread < count
        self.logit = self._hold(self._read(self.expert, biases))

    def _read(self, row: UOp | int, biases: UOp | None) -> UOp:
        spec = self.spec
        at = self.token * spec.num_rows + row
        total = balanced(
            self.logits[at + s * spec.num_tokens * spec.num_rows].load().cast(F32) for s in range(spec.num_partials)
        )
        return total if biases is None else total + biases[row].load()

    def _hold(self, value: UOp) -> UOp:
        """The value by way of a register, computed once."""
        register = self.body.registers(1)
        return register.after(register.after(*self.axes)[0].store(value))[0].load()

    def condition(self, flag: UOp) -> UOp:
        """A store's condition, by way of a register: tinygrad would otherwise apply it to all that the value depends
        on."""
        return self._hold(flag.where(UOp.const(1.0, F32), 0.0)) > 0.5

    def scores(self) -> UOp:
        """The thread's score."""
        if self.spec.kind.score == "sigmoid":
            return _sigmoid(self.logit)
        logit = self.is_real.where(self.logit, NEG_INF)
        top = self._reduce(self.spec.lanes.maximum(logit), lambda a, b: a.maximum(b))
        power = self._hold(((logit - top) * LOG2E).exp2())
        if self.spec.kind.renormalizes and not self.spec.kind.has_choice_bias:
            return power  # the sum of the chosen ones is what they are divided by
        return self._hold(power / self.total(power))

    def total(self, value: UOp) -> UOp:
        """The sum over all threads."""
        return self._reduce(self.spec.lanes.sum(value), lambda a, b: a + b)

    def _reduce(self, value: UOp, combine: Callable[[UOp, UOp], UOp]) -> UOp:
        """A value that is the same in a warp's lanes, combined over the warps."""
        if not isinstance(self.warp, UOp):  # the only one
            return value
        shared = self.body.shared(self.spec.num_warps)
        stored = shared[self.warp.valid(self.lane.eq(0))].store(value)
        return self._hold(balanced((shared.after(stored)[w].load() for w in range(self.spec.num_warps)), combine))

    def rank(self, value: UOp, choice: UOp | None) -> UOp:
        """How many experts come before the thread's, by value plus choice bias."""
        key = value if choice is None else value + choice[self.expert].load()
        key = self._hold((self.is_real & (key > LOWEST)).where(key, LOWEST))
        shared = self.body.shared(self.spec.num_warps * LANES)
        shared = shared.after(shared[self.thread].store(key))

        def count(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            first = iteration * LANES
            others = [(first + i, shared[first + i].load()) for i in range(LANES)]
            before = [(other > key) | (other.eq(key) & (at < self.thread)) for at, other in others]
            return [old[0] + balanced(flag.where(UOp.const(1.0, F32), 0.0) for flag in before)]

        (rank,) = carry(self.body, [UOp.const(0.0, F32)], self.spec.num_warps, self.axes, count)
        return self._hold(rank).cast(I32)

    def shared_stores(self, ids: UOp, weights: UOp, shared: UOp | None) -> list[UOp]:
        """Stores of the shared expert's number and weight."""
        spec, stores, is_one = self.spec, [], self.condition(self.thread.eq(0))
        weight = UOp.const(1.0, F32)
        if spec.kind.has_shared_gate:
            weight = _sigmoid(self._hold(self._read(spec.kind.num_experts, None)))
        if spec.stacks_shared:
            at = (self.token * spec.num_chosen + spec.kind.top_k).valid(is_one)
            stores = [ids[at].store(UOp.const(spec.kind.num_experts, I32)), weights[at].store(weight)]
        return stores if shared is None else [shared[self.token.valid(is_one)].store(weight)]


def _sigmoid(x: UOp) -> UOp:
    return ((x * -LOG2E).exp2() + 1.0).reciprocal()
