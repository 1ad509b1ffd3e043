"""Latent attention on the CPU device: the write of latents, and paged attention in their space.

Latents are stored token by token, `[slot][rank + rope]`, once for all cores and heads: the first core writes them. A
block is converted to float32 on the stack once, and serves all of a core's heads, each as keys and as values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel.body import (
    F32,
    LOWEST,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    exp2,
    fill,
    finish,
)
from tinyvllm.ops.latent_spec import LatentSpec

LANES = 16  # sums of a key's product that are added up at its end
KEYS_TOGETHER = 4  # keys that share the loads of a query, and whose sums fit into the vector registers
VALUE_CHUNK = 64  # elements of a value whose sums stay in vector registers


@cached_kernel
def write_latents_kernel(spec: LatentSpec, x_cols: tuple[int, ...]) -> KernelFn:
    """fn(pool, inputs, norm weight, rope, *latents): norms and rotates every row's latent, and writes it to the row's
    slot. `x_cols`: columns of each core's part of the latents."""

    def kernel(pool: UOp, inputs: UOp, weight: UOp, rope: UOp, *parts: UOp) -> UOp:
        body, tokens, rank = Body(), spec.layout.num_tokens, spec.rank
        axis = body.grid(tokens) if tokens > 1 else body.loop(1)
        row = _staged_row(body, spec, axis, parts, x_cols)
        sums = fill(body, body.registers(1), 0.0, axis, row)
        d = body.fold(rank)
        inner = sums.after(d)
        sums = sums.after(inner[0].store(inner[0].load() + row[d].load() * row[d].load()).end(d))
        scale = (sums[0].load() * (1.0 / rank) + spec.norm_eps).sqrt().reciprocal()
        slot = clamp(inputs[spec.slots_start + axis].load(), 0, spec.num_slots - 1) * spec.stored_dim
        d = body.loop(rank)
        normed = pool[slot + d].store((row[d].load() * scale * weight[d].load()).cast(pool.dtype)).end(d)
        d = body.loop(spec.rope_dim)
        turned = _rotated(spec, rope, _position(spec, inputs, axis), d, lambda i: row[rank + i].load())
        stores = UOp.group(normed, pool[slot + rank + d].store(turned.cast(pool.dtype)).end(d))
        name = f"write_latents_{tokens}x{spec.stored_dim}"
        return finish(stores.end(axis), name, ops=6 * tokens * rank, nbytes=6 * tokens * spec.stored_dim)

    return kernel


def _staged_row(body: Body, spec: LatentSpec, axis: UOp, parts: tuple[UOp, ...], x_cols: tuple[int, ...]) -> UOp:
    """The row's latent on the stack, joined from all cores' parts, without the columns that pad it."""
    row, copies, start = body.registers(spec.stored_dim), [], 0
    for part, cols in zip(parts, x_cols, strict=True):
        count = min(cols, spec.stored_dim - start)
        if count > 0:
            d = body.loop(count)
            copies.append(row.after(axis)[start + d].store(part[axis * cols + d].load()).end(d))
        start += cols
    return row.after(UOp.group(*copies))


def _position(spec: LatentSpec, inputs: UOp, axis: UOp) -> UOp:
    positions = spec.layout.max_blocks * spec.layout.block_size
    return clamp(inputs[spec.layout.offset("positions") + axis].load(), 0, positions - 1)


def _rotated(spec: LatentSpec, rope: UOp, position: UOp, d: UOp, load: Callable[[UOp], UOp]) -> UOp:
    """Rotated dimension d. `load`: one of the dimensions to be rotated."""
    other, pair, is_first = spec.partner(d)
    cos = rope[position * spec.rope_dim + pair].load()
    sin = rope[position * spec.rope_dim + spec.rope_dim // 2 + pair].load()
    return load(d) * cos + load(other) * is_first.where(sin * -1.0, sin)


@cached_kernel
def latent_attention_kernel(spec: LatentSpec) -> KernelFn:
    """fn(out (T, H * rank), pool, inputs, rope, absorbed queries (T, H * rank), queries (T, H * (nope + rope))): causal
    attention of each row over its own blocks.

    Online softmax by block (Milakov & Gimelshein 2018). A row's cost depends on its own context.
    """

    def kernel(out: UOp, pool: UOp, inputs: UOp, rope: UOp, absorbed: UOp, queries: UOp) -> UOp:
        body, tokens, rank = Body(), spec.layout.num_tokens, spec.rank
        axis = body.grid(tokens) if tokens > 1 else body.loop(1)
        position = _position(spec, inputs, axis)
        query = _load_queries(body, spec, axis, position, (rope, absorbed, queries))
        block = body.fold_while(position // spec.layout.block_size + 1)
        number = clamp(block, 0, spec.layout.max_blocks - 1)
        near = _load_block(body, spec, (axis, position), (block, number), (pool, inputs))
        best, total = (fill(body, body.registers(spec.num_heads), v, axis) for v in (LOWEST, 0.0))
        acc = fill(body, body.registers(spec.num_heads * rank), 0.0, axis)
        state = _State(best, total, acc)
        head = body.loop(spec.num_heads)
        scores = _scores(body, spec, (block, number, head), position, query, near)
        end = _add_values(body, spec, (block, head), scores, near, state).end(head).end(block)
        acc, total = acc.after(end), total.after(end)
        h, d = body.loop(spec.num_heads), body.loop(rank)
        store = out[(axis * spec.num_heads + h) * rank + d].store(acc[h * rank + d].load() / total[h].load())
        context = spec.layout.max_blocks * spec.layout.block_size  # the longest; the true one is data
        return finish(
            store.end(d, h, axis),
            f"latent_attention_{tokens}x{spec.num_heads}x{rank}",
            ops=2 * tokens * spec.num_heads * (spec.stored_dim + rank) * context,
            nbytes=2 * tokens * spec.stored_dim * context,
        )

    return kernel


@dataclass(frozen=True)
class _State:
    """The heads' online softmax: maxima [H], sums of weights [H], sums of weighted latents [H][rank]."""

    best: UOp
    total: UOp
    acc: UOp


def _load_queries(body: Body, spec: LatentSpec, axis: UOp, position: UOp, operands: tuple[UOp, UOp, UOp]) -> UOp:
    """The row's queries in the latents' space, [H][rank + rope], scaled, on the stack."""
    rope, absorbed, queries = operands
    rank, dim, heads = spec.rank, spec.stored_dim, spec.num_heads
    query = body.registers(heads * dim)
    target = query.after(axis)
    h, d = body.loop(heads), body.loop(rank)
    value = absorbed[(axis * heads + h) * rank + d].load() * spec.query_scale
    copied = target[h * dim + d].store(value).end(d, h)
    h, d = body.loop(heads), body.loop(spec.rope_dim)
    start = (axis * heads + h) * spec.query_dim + spec.nope_dim
    turned = _rotated(spec, rope, position, d, lambda i: queries[start + i].load()) * spec.query_scale
    return query.after(UOp.group(copied, target[h * dim + rank + d].store(turned).end(d, h)))


def _load_block(
    body: Body, spec: LatentSpec, row: tuple[UOp, UOp], loop: tuple[UOp, UOp], operands: tuple[UOp, UOp]
) -> UOp:
    """A block's latents in float32, [block_size][rank + rope], on the stack. Slots after the row's own token may hold
    another sequence's NaN: its own latent stands in their place, with a weight of 0."""
    (axis, position), (block, number), (pool, inputs) = row, loop, operands
    size, dim, layout = spec.layout.block_size, spec.stored_dim, spec.layout
    seq = clamp(inputs[layout.offset("seq_rows") + axis].load(), 0, layout.num_seqs)
    at = clamp(inputs[spec.tables_start + seq * layout.max_blocks + number].load(), 0, spec.num_blocks - 1)
    near = body.registers(size * dim)
    token, d = body.loop(size), body.loop(dim)
    existing = token.minimum((position - number * size).maximum(0))
    value = pool[(at * size + existing) * dim + d].load().cast(F32)
    return near.after(near.after(block)[token * dim + d].store(value).end(d, token))


def _scores(body: Body, spec: LatentSpec, loops: tuple[UOp, UOp, UOp], position: UOp, query: UOp, near: UOp) -> UOp:
    """A head's scores of a block, [block_size]; LOWEST where the row does not attend."""
    block, number, head = loops
    dim, size = spec.stored_dim, spec.layout.block_size
    lanes = math.gcd(LANES, dim)
    tokens = body.loop(size // KEYS_TOGETHER)
    first = tokens * KEYS_TOGETHER
    sums = fill(body, body.registers(KEYS_TOGETHER * lanes), 0.0, block, head, tokens, near, query)
    chunk = body.fold(dim // lanes)
    lane = body.loop(lanes)
    inner, at = sums.after(chunk), chunk * lanes + lane
    own, stores = query[head * dim + at].load(), []
    for i in range(KEYS_TOGETHER):
        total = inner[i * lanes + lane]
        stores.append(total.store(total.load() + near[(first + i) * dim + at].load() * own))
    sums = sums.after(UOp.group(*stores).end(lane, chunk))
    scores, stores = body.registers(size), []
    for i in range(KEYS_TOGETHER):
        score = balanced(sums[i * lanes + j].load() for j in range(lanes))
        is_seen = number * size + first + i <= position
        stores.append(scores.after(block, head)[first + i].store(is_seen.where(score, LOWEST)))
    return scores.after(UOp.group(*stores).end(tokens))


def _add_values(body: Body, spec: LatentSpec, loops: tuple[UOp, UOp], scores: UOp, near: UOp, state: _State) -> UOp:
    """The stores that bring a head's state up to date with a block."""
    block, head = loops
    size, dim, rank = spec.layout.block_size, spec.stored_dim, spec.rank
    old = state.best.after(block)[head].load()
    top = old.maximum(balanced([scores[i].load() for i in range(size)], lambda a, b: a.maximum(b)))
    held = body.registers(2)  # the new maximum, and the factor by which earlier sums decay
    target = held.after(block, head, scores)
    held = held.after(UOp.group(target[0].store(top), target[1].store(exp2(old - top))))
    weights, token = body.registers(size), body.loop(size)
    weight = exp2(scores[token].load() - held[0].load())
    weights = weights.after(weights.after(block, head, held)[token].store(weight).end(token))

    width = math.gcd(VALUE_CHUNK, rank)
    chunk = body.loop(rank // width)
    sums = fill(body, body.registers(width), 0.0, block, head, weights, chunk)
    token, lane = body.fold(size), body.loop(width)
    inner = sums.after(token)
    product = weights[token].load() * near[token * dim + chunk * width + lane].load()
    sums = sums.after(inner[lane].store(inner[lane].load() + product).end(lane, token))
    lane = body.loop(width)
    acc, at = state.acc.after(block, sums), head * rank + chunk * width + lane
    added = acc[at].store(acc[at].load() * held[1].load() + sums[lane].load()).end(lane, chunk)
    total = state.total.after(block, weights)[head]
    summed = total.store(total.load() * held[1].load() + balanced(weights[i].load() for i in range(size)))
    return UOp.group(added, summed, state.best.after(block, weights)[head].store(held[0].load()))
