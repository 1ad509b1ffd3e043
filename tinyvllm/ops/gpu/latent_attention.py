"""Latent attention for devices with threadgroups: the write of latents, and the general form of attention.

Latents are stored token by token, `[slot][rank + rope]`. Threads exchange values through threadgroup memory only, so
one source renders for METAL, CUDA and OpenCL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinyvllm.ops.kernel.body import F32, I32, LOWEST, Body, KernelFn, balanced, cached_kernel, clamp, fill, finish
from tinyvllm.ops.kernel.lanes import Lanes, await_previous
from tinyvllm.ops.latent_spec import LatentSpec

THREADS = 128
VECTOR = 4  # values of a load: METAL's widest vector


@dataclass(frozen=True)
class LatentRow:
    """One token row's inputs inside a kernel."""

    spec: LatentSpec
    row: UOp | int
    inputs: UOp

    @property
    def position(self) -> UOp:
        # Body.fold_while: at least two passes must be possible
        limit = max(self.spec.layout.max_blocks * self.spec.layout.block_size, 4 * THREADS)
        return clamp(self.inputs[self.spec.layout.offset("positions") + self.row].load(), 0, limit - 1)

    @property
    def slot(self) -> UOp:
        """Where this row's latent goes."""
        return clamp(self.inputs[self.spec.slots_start + self.row].load(), 0, self.spec.num_slots - 1)

    @property
    def table(self) -> UOp:
        """Where the row's block table begins in the inputs."""
        layout = self.spec.layout
        seq = clamp(self.inputs[layout.offset("seq_rows") + self.row].load(), 0, layout.num_seqs)
        return seq * layout.max_blocks + self.spec.tables_start

    def slot_of(self, token: UOp) -> UOp:
        """Where the sequence's token lies in the pool."""
        size = self.spec.layout.block_size
        block = clamp(self.inputs[self.table + token // size].load(), 0, self.spec.num_blocks - 1)
        return block * size + token % size

    def rotated(self, rope: UOp, dim: UOp, load: Callable[[UOp], UOp]) -> UOp:
        """A rotated dimension. `load`: one of the dimensions to be rotated."""
        spec = self.spec
        other, pair, is_first = spec.partner(dim)
        at = self.position.minimum(spec.layout.max_blocks * spec.layout.block_size - 1) * spec.rope_dim + pair
        cos, sin = rope[at].load(), rope[at + spec.rope_dim // 2].load()
        return load(dim) * cos + load(other) * is_first.where(sin * -1.0, sin)


def _shares(count: int, thread: UOp, threads: int) -> list[tuple[UOp, UOp | None]]:
    """(element, whether it exists; None: always) of the `count` that a thread takes."""
    found: list[tuple[UOp, UOp | None]] = []
    for start in range(0, count, threads):
        index, is_inside = thread + start, thread + start < count
        found.append((index, None) if start + threads <= count else (is_inside.where(index, 0), is_inside))
    return found


def _gate(at: UOp, is_inside: UOp | None) -> UOp:
    return at if is_inside is None else at.valid(is_inside)


@cached_kernel
def store_latents_kernel(spec: LatentSpec, num_cols: int, lanes: Lanes | None = None) -> KernelFn:
    """fn(pool, inputs, norm weight, rope, latents (T, num_cols)): norms and rotates every row's latent, and writes it
    to the row's slot."""

    def kernel(pool: UOp, inputs: UOp, weight: UOp, rope: UOp, latents: UOp) -> UOp:
        body, tokens, rank = Body(), spec.layout.num_tokens, spec.rank
        row, thread = body.grid(tokens), body.threads(THREADS)
        here = LatentRow(spec, row, inputs)
        if lanes is not None:
            pool, latents = await_previous(lanes, pool, latents)
        start, target = row * num_cols, here.slot * spec.stored_dim
        own = [(d, ok, latents[start + d].load().cast(F32)) for d, ok in _shares(rank, thread, THREADS)]
        squares = [v * v if ok is None else ok.where(v * v, 0.0) for _, ok, v in own]
        shared = body.shared(THREADS)
        shared = shared.after(shared[thread].store(balanced(squares)))
        total = fill(body, body.registers(1), 0.0, shared)
        i = body.fold(THREADS)
        inner = total.after(i)
        total = total.after(inner[0].store(inner[0].load() + shared[i].load()).end(i))
        scale = (total[0].load() * (1.0 / rank) + spec.norm_eps).sqrt().reciprocal()
        stores = [
            pool[_gate(target + d, ok)].store((v * scale * weight[d].load()).cast(pool.dtype)) for d, ok, v in own
        ]
        for d, ok in _shares(spec.rope_dim, thread, THREADS):
            value = here.rotated(rope, d, lambda i: latents[start + rank + i].load().cast(F32))
            stores.append(pool[_gate(target + rank + d, ok)].store(value.cast(pool.dtype)))
        name = f"store_latents_{tokens}x{spec.stored_dim}"
        nbytes = 6 * tokens * spec.stored_dim
        return finish(UOp.group(*stores).end(thread, row), name, ops=6 * tokens * rank, nbytes=nbytes)

    return kernel


@cached_kernel
def latent_attention_kernel(spec: LatentSpec) -> KernelFn:
    """fn(out (T, H * rank), pool, inputs, rope, absorbed queries (T, H * rank), queries (T, H * (nope + rope))): one
    threadgroup for each row and head.

    The context is read in passes of as many tokens as there are threads, with an online softmax (Milakov & Gimelshein
    2018). In a pass, a thread scores one token, and then adds up some elements of all. A row's cost depends on its own
    context.
    """

    def kernel(out: UOp, pool: UOp, inputs: UOp, rope: UOp, absorbed: UOp, queries: UOp) -> UOp:
        tokens, threads = spec.layout.num_tokens, math.gcd(THREADS, spec.rank)
        body = Body()
        row, head, thread = body.grid(tokens), body.grid(spec.num_heads), body.threads(threads)
        attention = _HeadAttention(body, LatentRow(spec, row, inputs), (row, head, thread), threads, pool)
        query = attention.load_query(rope, absorbed, queries)
        total, acc = attention.run(query)
        at = (row * spec.num_heads + head) * spec.rank + thread
        stores = [out[at + i * threads].store((acc[i].load() / total).cast(out.dtype)) for i in range(attention.share)]
        context = spec.layout.max_blocks * spec.layout.block_size
        return finish(
            UOp.group(*stores).end(thread, head, row),
            f"latent_attention_{tokens}x{spec.num_heads}x{spec.rank}",
            ops=2 * tokens * spec.num_heads * (spec.stored_dim + spec.rank) * context,
            nbytes=2 * tokens * spec.stored_dim * context,
        )

    return kernel


class _HeadAttention:
    """The attention of one row and head by a threadgroup."""

    def __init__(self, body: Body, row: LatentRow, axes: tuple[UOp, UOp, UOp], threads: int, pool: UOp) -> None:
        self.body, self.spec, self.row, self.pool = body, row.spec, row, pool
        self.axes, self.head, self.thread, self.threads = axes, axes[1], axes[2], threads
        self.share = self.spec.rank // threads  # elements of a value that a thread adds up

    def load_query(self, rope: UOp, absorbed: UOp, queries: UOp) -> UOp:
        """The head's scaled query in the latents' space, in threadgroup memory."""
        spec, scale = self.spec, self.spec.query_scale
        query = self.body.shared(spec.stored_dim)
        number = self.axes[0] * spec.num_heads + self.head
        target, stores = query.after(*self.axes), []
        for d, ok in _shares(spec.rank, self.thread, self.threads):
            value = absorbed[number * spec.rank + d].load().cast(F32) * scale
            stores.append(target[_gate(d, ok)].store(value))
        start = number * spec.query_dim + spec.nope_dim
        for d, ok in _shares(spec.rope_dim, self.thread, self.threads):
            value = self.row.rotated(rope, d, lambda i: queries[start + i].load().cast(F32)) * scale
            stores.append(target[_gate(spec.rank + d, ok)].store(value))
        return query.after(UOp.group(*stores))

    def run(self, query: UOp) -> tuple[UOp, UOp]:
        """(the sum of weights, the thread's sums of weighted elements)."""
        body, threads = self.body, self.threads
        best, total = (fill(body, body.registers(1), v, *self.axes) for v in (LOWEST, 0.0))
        acc = fill(body, body.registers(self.share), 0.0, *self.axes)
        count = self.row.position + 1
        step = body.fold_while((count + threads - 1) // threads)
        token = step.cast(dtypes.weakint) * threads + self.thread
        scores, slots = self._score(query, token, token < count, step)
        old = best.after(step)[0].load()
        new = self._maximum(scores, old, step)
        weights = body.shared(threads)
        weight = (scores[self.thread].load() - new).exp2()
        weights = weights.after(weights.after(step)[self.thread].store(weight))
        decay = (old - new).exp2()
        sums, all_weights = acc.after(step), total.after(step)
        scaled = [sums[i].store(sums[i].load() * decay) for i in range(self.share)]
        scaled.append(all_weights[0].store(all_weights[0].load() * decay))
        end = self._add_values(acc, total, weights, slots, UOp.group(*scaled))
        done = UOp.group(end, best.after(end)[0].store(new)).end(step)
        return total.after(done)[0].load(), acc.after(done)

    def _score(self, query: UOp, token: UOp, is_inside: UOp, step: UOp) -> tuple[UOp, UOp]:
        """The scores of a pass's tokens and their slots, in threadgroup memory. Where there is no token, the first: its
        value is multiplied by 0, so it must not be NaN."""
        body, spec = self.body, self.spec
        slot = self.row.slot_of(is_inside.where(token, 0))
        sums = fill(body, body.registers(1), 0.0, step)
        chunk = body.fold(spec.stored_dim // VECTOR)
        base, at = slot * spec.stored_dim + chunk * VECTOR, chunk * VECTOR
        products = [query[at + i].load() * self.pool[base + i].load().cast(F32) for i in range(VECTOR)]
        inner = sums.after(chunk)
        score = sums.after(inner[0].store(inner[0].load() + balanced(products)).end(chunk))[0].load()
        scores, slots = body.shared(self.threads), body.shared(self.threads, I32)
        shared = UOp.group(
            scores.after(step)[self.thread].store(is_inside.where(score, LOWEST)),
            slots.after(step)[self.thread].store(slot.cast(I32)),
        )
        return scores.after(shared), slots.after(shared)

    def _maximum(self, scores: UOp, start: UOp, step: UOp) -> UOp:
        """max(start, scores...), the same in every thread."""
        best = self.body.registers(1)
        best = best.after(best.after(step)[0].store(start))
        i = self.body.fold(self.threads)
        inner = best.after(i)
        return best.after(inner[0].store(inner[0].load().maximum(scores[i].load())).end(i))[0].load()

    def _add_values(self, acc: UOp, total: UOp, weights: UOp, slots: UOp, scaled: UOp) -> UOp:
        """The stores that add a pass's weighted latents, and their weights."""
        other = self.body.fold(self.threads)
        weight = weights[other].load()
        at = clamp(slots[other].load(), 0, self.spec.num_slots - 1) * self.spec.stored_dim + self.thread
        inner, sums = acc.after(scaled, other), total.after(scaled, other)
        stores = [
            inner[i].store(inner[i].load() + weight * self.pool[at + i * self.threads].load().cast(F32))
            for i in range(self.share)
        ]
        return UOp.group(*stores, sums[0].store(sums[0].load() + weight)).end(other)
