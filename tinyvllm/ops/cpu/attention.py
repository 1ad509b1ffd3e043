"""RoPE, KV write and paged attention on the CPU device.

A key block is stored `[kv head][D][block_size]`, so that a dot product over D runs with the block's tokens as vector
lanes; a value block `[kv head][block_size][D]`, so that the weighted sum runs with D as lanes. Both inner loops read
consecutive memory and neither needs a horizontal sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from tinygrad import UOp

from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    LOG2E,
    LOWEST,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    exp2,
    fill,
    finish,
)
from tinyvllm.ops.step_inputs import StepLayout

VALUE_CHUNK = 64  # values of one head accumulated at once: 8 AVX2 registers
NORM_LANES = 16  # sums of squares that run side by side


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention over paged KV. `fused_write`: every row is the last token of a sequence of its own, so that
    it can write its key and value itself; otherwise `write_kv_kernel` runs before."""

    layout: StepLayout
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    num_blocks: int
    fused_write: bool
    qkv_cols: tuple[int, ...]  # columns of each part of qkv; parts side by side make (H + 2K) * D
    kv_dtype: str
    head_eps: float | None = None  # of an RMSNorm of every head of queries and keys; None: they have none

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_elements(self) -> int:
        """Elements of one key (or value) block."""
        return self.num_kv_heads * self.head_dim * self.layout.block_size


class _Row:
    """One token row inside a kernel: its inputs, and its q, k, v before they are normed and rotated."""

    def __init__(self, spec: AttentionSpec, row: UOp, inputs: UOp, rope: UOp, operands: tuple[UOp, ...]) -> None:
        """`operands`: the heads' norm where there is one, and the parts of qkv."""
        layout = spec.layout
        self.spec, self.row, self.rope = spec, row, rope
        parts = list(operands)
        self.head_norm = None if spec.head_eps is None else parts.pop(0)
        self.parts = parts
        self.position = inputs[layout.offset("positions") + row].load().maximum(0)
        self.slot = inputs[layout.offset("slots") + row].load().maximum(0)
        seq = inputs[layout.offset("seq_rows") + row].load()
        self.table = seq * layout.max_blocks + layout.offset("block_tables")
        self.inputs = inputs

    def block(self, index: UOp) -> UOp:
        """The id of the sequence's index-th block."""
        return self.inputs[self.table + index].load()

    def qkv(self, head: UOp | int, offset: UOp) -> UOp:
        """qkv[row, head * D + offset], from the part that holds it. `head` counts q heads, then k, then v."""
        spec = self.spec
        if len(self.parts) == 1:
            return self.parts[0][self.row * spec.qkv_cols[0] + head * spec.head_dim + offset].load()
        start, value = 0, None
        col = head * spec.head_dim + offset
        for part, cols in zip(self.parts, spec.qkv_cols, strict=True):
            here = part[self.row * cols + (col - start).maximum(0).minimum(cols - 1)].load()
            value = here if value is None else (col < start).where(value, here)
            start += cols
        assert value is not None
        return value

    def head_scale(self, body: Body, head: UOp, *after: UOp) -> UOp | None:
        """A register with 1 / sqrt(mean square + eps) of a head, inside the loops named by `after`; None without a
        norm."""
        if self.head_norm is None:
            return None
        dim = self.spec.head_dim
        lanes = gcd(dim, NORM_LANES)
        sums = fill(body, body.registers(lanes), 0.0, *after)
        chunk = body.fold(dim // lanes)
        inner = sums.after(chunk)
        values = [self.qkv(head, chunk * lanes + lane) for lane in range(lanes)]
        done = UOp.group(*[inner[i].store(inner[i].load() + v * v) for i, v in enumerate(values)]).end(chunk)
        sums = sums.after(done)
        mean = balanced(sums[i].load() for i in range(lanes)) * (1.0 / dim)
        scale = body.registers(1)
        return scale.after(scale.after(*after)[0].store((mean + self.spec.head_eps).sqrt().reciprocal()))

    def roped(self, section: int, head: UOp, i: UOp, scale: UOp | None) -> tuple[UOp, UOp]:
        """Values i and i + D/2 of a head of queries (section 0) or keys (1), normed where they are (`scale`:
        head_scale's), and rotated by the row's position (Su et al. 2021, half-split pairs)."""
        dim, half = self.spec.head_dim, self.spec.head_dim // 2
        cos = self.rope[self.position * dim + i].load()
        sin = self.rope[self.position * dim + half + i].load()
        a, b = self.qkv(head, i), self.qkv(head, i + half)
        if self.head_norm is not None and scale is not None:
            pairs = ((a, i), (b, i + half))
            a, b = (v * scale[0].load() * self.head_norm[section * dim + at].load() for v, at in pairs)
        return a * cos - b * sin, b * cos + a * sin

    def write(self, body: Body, keys: UOp, values: UOp) -> UOp:
        """Stores of the row's roped keys and its values at its slot."""
        spec, block_size = self.spec, self.spec.layout.block_size
        half = spec.head_dim // 2
        head, i = body.loop(spec.num_kv_heads), body.loop(half)
        block, offset = self.slot // block_size, self.slot % block_size
        base = block * spec.block_elements + head * (spec.head_dim * block_size)
        k_head = head + spec.num_heads
        low, high = self.roped(1, k_head, i, self.head_scale(body, k_head, self.row, head))
        v_head = head + (spec.num_heads + spec.num_kv_heads)
        stores = [
            keys[base + i * block_size + offset].store(low.cast(keys.dtype)),
            keys[base + (i + half) * block_size + offset].store(high.cast(keys.dtype)),
            values[base + offset * spec.head_dim + i].store(self.qkv(v_head, i).cast(values.dtype)),
            values[base + offset * spec.head_dim + i + half].store(self.qkv(v_head, i + half).cast(values.dtype)),
        ]
        return UOp.group(*stores).end(i, head)


@cached_kernel
def write_kv_kernel(spec: AttentionSpec) -> KernelFn:
    """fn(keys, values, inputs, rope[, head_norm], *qkv parts): every row's roped key and its value go to its slot."""

    def kernel(keys: UOp, values: UOp, inputs: UOp, rope: UOp, *operands: UOp) -> UOp:
        body = Body()
        row = body.loop(spec.layout.num_tokens)
        stores = _Row(spec, row, inputs, rope, operands).write(body, keys, values).end(row)
        tokens, width = spec.layout.num_tokens, spec.num_kv_heads * spec.head_dim
        return finish(stores, f"write_kv_{tokens}x{width}", ops=6 * tokens * width, nbytes=12 * tokens * width)

    return kernel


@cached_kernel
def attention_kernel(spec: AttentionSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, inputs, rope[, head_norm], *qkv parts): causal attention of each row over its
    own blocks.

    Online softmax by block (Milakov & Gimelshein 2018). A row's cost follows its own context. With `fused_write`, keys
    and values are written too (they are outputs of the kernel then).
    """

    def kernel(out: UOp, keys: UOp, values: UOp, inputs: UOp, rope: UOp, *operands: UOp) -> UOp:
        body, tokens = Body(), spec.layout.num_tokens
        # the rows are the one GLOBAL axis (a worker command each): codegen cannot nest a loop whose length is data
        # in a LOOP axis that the length depends on
        axis = body.grid(tokens) if tokens > 1 else body.loop(1)
        row = _Row(spec, axis, inputs, rope, operands)
        if spec.fused_write:
            written = row.write(body, keys, values)
            keys, values = keys.after(written), values.after(written)
        head = body.loop(spec.num_kv_heads)
        stores = _attend(body, row, head, out, keys, values)
        width = spec.num_kv_heads * spec.head_dim
        context = spec.layout.max_blocks * spec.layout.block_size  # the longest; the true one is data
        name = f"attention_{tokens}x{spec.num_heads}x{spec.head_dim}"
        ops = 4 * tokens * spec.num_heads * spec.head_dim * context
        return finish(stores.end(head, axis), name, ops=ops, nbytes=2 * tokens * width * context * 2)

    return kernel


def _attend(body: Body, row: _Row, head: UOp, out: UOp, keys: UOp, values: UOp) -> UOp:
    """Stores of the G query heads that share KV head `head`."""
    spec, axis = row.spec, row.row
    size, dim, group = spec.layout.block_size, spec.head_dim, spec.group
    query = _load_queries(body, row, head, keys)
    best = fill(body, body.registers(group), LOWEST, axis, head)
    total = fill(body, body.registers(group), 0.0, axis, head)
    acc = fill(body, body.registers(group * dim), 0.0, axis, head)
    block = body.fold_while(row.position // size + 1)
    base = row.block(block) * spec.block_elements + head * (dim * size)
    weights, decay, done = _weigh(body, row, query, keys, base, block, best, total, acc)
    d = body.loop(group * dim)
    target = acc.after(block, done)
    acc_done = target[d].store(target[d].load() * decay[d // dim].load()).end(d)
    for g in range(group):
        for start in range(0, dim, VALUE_CHUNK):
            acc_done = _add_values(body, row, acc, weights, values, base, block, g, start, acc_done)
    end = acc_done.end(block)
    acc, total = acc.after(end), total.after(end)
    g, d = body.loop(group), body.loop(dim)
    index = axis * (spec.num_heads * dim) + (head * group + g) * dim + d
    return out[index].store(acc[g * dim + d].load() / total[g].load()).end(d, g)


def _load_queries(body: Body, row: _Row, head: UOp, keys: UOp) -> UOp:
    """G roped queries in registers, scaled by log2(e) / sqrt(D) so that scores are exponents of 2."""
    spec = row.spec
    dim, half, scale = spec.head_dim, spec.head_dim // 2, LOG2E / spec.head_dim**0.5
    query = body.registers(spec.group * dim)
    g, i = body.loop(spec.group), body.loop(half)
    query_head = head * spec.group + g
    low, high = row.roped(0, query_head, i, row.head_scale(body, query_head, row.row, head, g))
    target = query.after(row.row, head, keys)
    stores = UOp.group(target[g * dim + i].store(low * scale), target[g * dim + i + half].store(high * scale))
    return query.after(stores.end(i, g))


def _weigh(
    body: Body, row: _Row, query: UOp, keys: UOp, base: UOp, block: UOp, best: UOp, total: UOp, acc: UOp
) -> tuple[UOp, UOp, UOp]:
    """One block's part of the online softmax: (weights [G][block_size], decay [G] of what was summed before, the stores
    that moved `best` and `total` on)."""
    spec = row.spec
    size, group = spec.layout.block_size, spec.group
    scores = _scores(body, row, query, keys, base, block, [best, total, acc])
    newest, decay = body.registers(group), body.registers(group)
    stores = []
    for g in range(group):
        old = best.after(block)[g].load()
        new = old.maximum(balanced([scores[g * size + x].load() for x in range(size)], lambda a, b: a.maximum(b)))
        stores += [newest.after(block)[g].store(new), decay.after(block)[g].store(exp2(old - new))]
    found = UOp.group(*stores)
    newest, decay = newest.after(found), decay.after(found)
    weights = body.registers(group * size)
    g, x = body.loop(group), body.loop(size)
    share = exp2(scores[g * size + x].load() - newest[g].load())
    weights = weights.after(weights.after(block)[g * size + x].store(share).end(x, g))
    stores = []
    for g in range(group):
        added = balanced(weights[g * size + x].load() for x in range(size))
        stores.append(total.after(block)[g].store(total.after(block)[g].load() * decay[g].load() + added))
        stores.append(best.after(block, weights)[g].store(newest[g].load()))
    return weights, decay, UOp.group(*stores)


def _scores(body: Body, row: _Row, query: UOp, keys: UOp, base: UOp, block: UOp, ready: list[UOp]) -> UOp:
    """[G][block_size] scores of one block, LOWEST behind the row's own position. A key is loaded once for all G."""
    spec = row.spec
    size, group = spec.layout.block_size, spec.group
    sums = fill(body, body.registers(group * size), 0.0, block, query, *ready)
    d = body.fold(spec.head_dim)
    inner = sums.after(d)
    queries = [query[g * spec.head_dim + d].load() for g in range(group)]
    x = body.loop(size)
    key = keys[base + d * size + x].load().cast(F32)
    stores = [inner[g * size + x].store(inner[g * size + x].load() + key * q) for g, q in enumerate(queries)]
    sums = sums.after(UOp.group(*stores).end(x, d))
    g, x = body.loop(group), body.loop(size)
    is_seen = block.cast(I32) * size + x <= row.position
    at = g * size + x
    return sums.after(sums[at].store(is_seen.where(sums[at].load(), LOWEST)).end(x, g))


def _add_values(
    body: Body, row: _Row, acc: UOp, weights: UOp, values: UOp, base: UOp, block: UOp, g: int, start: int, done: UOp
) -> UOp:
    """acc[g, start : start + VALUE_CHUNK] += sum over the block's tokens of weight * value."""
    size, dim = row.spec.layout.block_size, row.spec.head_dim
    token = body.fold(size)
    inner = acc.after(done, token)
    weight = weights.after(done)[g * size + token].load()
    lane = body.loop(min(VALUE_CHUNK, dim - start))
    d = lane + start
    # behind the row's own token lies what another sequence left, be it NaN: its weight of almost 0 meets the own value
    own = token.cast(I32).minimum(row.position - block.cast(I32) * size)
    value = values[base + own * dim + d].load().cast(F32)
    store = inner[g * dim + d].store(inner[g * dim + d].load() + value * weight)
    return store.end(lane, token)
