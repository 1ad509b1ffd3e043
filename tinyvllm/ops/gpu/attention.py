"""RoPE, KV write and paged attention for devices with threadgroups: METAL, CUDA, OpenCL.

Keys and values are stored token by token, `[slot][kv head][D]`: a threadgroup's threads read one head of consecutive
tokens. Threads meet through threadgroup memory alone, so one source renders for every such device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from tinygrad import UOp, dtypes

from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    LOG2E,
    LOWEST,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    fill,
    finish,
)
from tinyvllm.ops.step_inputs import StepLayout

VECTOR = 4  # values of a load: METAL's widest vector


@dataclass(frozen=True)
class GpuAttentionSpec:
    """One layer's attention over paged KV. Every context token t <= position of a row is attended (causal)."""

    layout: StepLayout
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D; also the threads of a threadgroup and the tokens of one pass
    num_blocks: int
    qkv_cols: tuple[int, ...]
    head_eps: float | None = None  # of an RMSNorm of every head of queries and keys; None: they have none

    @property
    def slot_elements(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.layout.block_size

    @property
    def query_parts(self) -> slice:
        """The parts of qkv that hold queries: what attention_kernel takes. A kernel must read every buffer that it is
        given, else the arguments of its calls on CUDA and OpenCL do not match."""
        return self._parts(0, self.num_heads)

    @property
    def kv_parts(self) -> slice:
        """The parts of qkv that hold keys and values: what write_kv_kernel takes."""
        return self._parts(self.num_heads, self.num_heads + 2 * self.num_kv_heads)

    def _parts(self, first_head: int, end_head: int) -> slice:
        ends = list(accumulate(self.qkv_cols))
        starts = [0, *ends[:-1]]
        first = next(i for i, end in enumerate(ends) if end > first_head * self.head_dim)
        last = next(i for i in reversed(range(len(ends))) if starts[i] < end_head * self.head_dim)
        return slice(first, last + 1)


class _Row:
    """One token row's inputs inside a kernel."""

    def __init__(
        self, spec: GpuAttentionSpec, row: UOp, inputs: UOp, rope: UOp, operands: tuple[UOp, ...], held: slice
    ) -> None:
        """`operands`: the heads' norm where there is one, and the parts of qkv that are `held`."""
        layout = spec.layout
        self.spec, self.row, self.inputs, self.rope = spec, row, inputs, rope
        parts = list(operands)
        self.head_norm = None if spec.head_eps is None else parts.pop(0)
        self.parts = parts
        self.part_cols, self.first_col = spec.qkv_cols[held], sum(spec.qkv_cols[: held.start])
        positions = max(
            layout.max_blocks * layout.block_size, 2 * spec.head_dim
        )  # at least two passes: Body.fold_while
        self.position = clamp(inputs[layout.offset("positions") + row].load(), 0, positions - 1)
        seq = clamp(inputs[layout.offset("seq_rows") + row].load(), 0, layout.num_seqs)
        self.table = seq * layout.max_blocks + layout.offset("block_tables")

    def slot(self) -> UOp:
        """Where this row's key and value go."""
        return clamp(self.inputs[self.spec.layout.offset("slots") + self.row].load(), 0, self.spec.num_slots - 1)

    def slot_of(self, token: UOp) -> UOp:
        """Where the sequence's token lies in the pool."""
        size = self.spec.layout.block_size
        block = clamp(self.inputs[self.table + token // size].load(), 0, self.spec.num_blocks - 1)
        return block * size + token % size

    def qkv(self, head: UOp, offset: UOp) -> UOp:
        """qkv[row, head * D + offset]; `head` counts q heads, then k, then v."""
        col, start, value = head * self.spec.head_dim + offset - self.first_col, 0, None
        for part, cols in zip(self.parts, self.part_cols, strict=True):
            inside = (col - start).maximum(0).minimum(cols - 1) if len(self.parts) > 1 else col
            here = part[self.row * cols + inside].load().cast(F32)
            value = here if value is None else (col < start).where(value, here)
            start += cols
        assert value is not None
        return value

    def rotated(self, body: Body, section: int, head: UOp, d: UOp, *outer: UOp) -> UOp:
        """Element d, the thread's own, of a head of queries (section 0) or keys (1), normed where they are, and rotated
        by the row's position (half-split pairs, Su et al. 2021). `outer`: the kernel's axes."""
        dim, half = self.spec.head_dim, self.spec.head_dim // 2
        i, other = d % half, (d + half) % dim
        cos = self.rope[self.position * dim + i].load()
        sin = self.rope[self.position * dim + half + i].load()
        own, partner = self.qkv(head, d), self.qkv(head, other)
        if self.head_norm is not None:
            scale = self._head_scale(body, own, d, *outer)
            own, partner = (
                v * scale * self.head_norm[section * dim + at].load() for v, at in ((own, d), (partner, other))
            )
        return own * cos + partner * (d < half).where(sin * -1.0, sin)

    def _head_scale(self, body: Body, own: UOp, d: UOp, *outer: UOp) -> UOp:
        """1 / sqrt(mean square + eps) of the head whose element d is `own`, the same in every thread."""
        dim = self.spec.head_dim
        squares = body.shared(dim)
        squares = squares.after(squares.after(*outer)[d].store(own * own))
        total = fill(body, body.registers(1), 0.0, squares)
        i = body.fold(dim)
        inner = total.after(i)
        total = total.after(inner[0].store(inner[0].load() + squares[i].load()).end(i))
        return (total[0].load() * (1.0 / dim) + self.spec.head_eps).sqrt().reciprocal()


@cached_kernel
def write_kv_kernel(spec: GpuAttentionSpec) -> KernelFn:
    """fn(keys, values, inputs, rope[, head_norm], *qkv[kv_parts]): every row's rotated key and its value go to its
    slot."""

    def kernel(keys: UOp, values: UOp, inputs: UOp, rope: UOp, *operands: UOp) -> UOp:
        body = Body()
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_kv_heads)
        d = body.threads(spec.head_dim)
        row = _Row(spec, axis, inputs, rope, operands, spec.kv_parts)
        at = row.slot() * spec.slot_elements + head * spec.head_dim + d
        key = row.rotated(body, 1, head + spec.num_heads, d, axis, head, d)
        value = row.qkv(head + (spec.num_heads + spec.num_kv_heads), d)
        stores = UOp.group(keys[at].store(key.cast(keys.dtype)), values[at].store(value.cast(values.dtype)))
        tokens, width = spec.layout.num_tokens, spec.slot_elements
        return finish(
            stores.end(d, head, axis), f"write_kv_{tokens}x{width}", ops=6 * tokens * width, nbytes=8 * tokens * width
        )

    return kernel


@cached_kernel
def attention_kernel(spec: GpuAttentionSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, inputs, rope[, head_norm], *qkv[query_parts]): a threadgroup a row and head.

    Passes of D tokens: thread t scores token t of the pass, then thread d adds up element d of the values (online
    softmax, Milakov & Gimelshein 2018). A row's cost follows its own context.
    """

    def kernel(out: UOp, keys: UOp, values: UOp, inputs: UOp, rope: UOp, *operands: UOp) -> UOp:
        body, dim = Body(), spec.head_dim
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_heads)
        thread = body.threads(dim)
        axes = (axis, head, thread)
        row = _Row(spec, axis, inputs, rope, operands, spec.query_parts)
        kv_head = head // (spec.num_heads // spec.num_kv_heads)
        query = body.shared(dim)
        own = row.rotated(body, 0, head, thread, *axes) * (LOG2E / dim**0.5)
        query = query.after(query.after(*axes)[thread].store(own))
        best, total, acc = (fill(body, body.registers(1), v, *axes) for v in (LOWEST, 0.0, 0.0))

        count = row.position + 1
        step = body.fold_while((count + dim - 1) // dim)
        token = step.cast(dtypes.weakint) * dim + thread
        is_inside = token < count
        slot = row.slot_of(is_inside.where(token, 0))
        score = _score(body, spec, query, keys, slot, kv_head, step)
        scores, slots = body.shared(dim), body.shared(dim, I32)
        shared = UOp.group(
            scores.after(step)[thread].store(is_inside.where(score, LOWEST)),
            slots.after(step)[thread].store(slot.cast(I32)),
        )
        scores, slots = scores.after(shared), slots.after(shared)
        old = best.after(step)[0].load()
        new = _maximum(body, scores, dim, old, step)
        weights = body.shared(dim)
        weights = weights.after(weights.after(step)[thread].store((scores[thread].load() - new).exp2()))

        decay = (old - new).exp2()
        scaled = UOp.group(
            acc.after(step)[0].store(acc.after(step)[0].load() * decay),
            total.after(step)[0].store(total.after(step)[0].load() * decay),
        )
        other = body.fold(dim)
        weight = weights[other].load()
        at = clamp(slots[other].load(), 0, spec.num_slots - 1) * spec.slot_elements + kv_head * dim + thread
        inner = acc.after(scaled, other)
        sums = total.after(scaled, other)
        added = UOp.group(
            inner[0].store(inner[0].load() + weight * values[at].load().cast(F32)),
            sums[0].store(sums[0].load() + weight),
        ).end(other)
        done = UOp.group(added, best.after(added)[0].store(new)).end(step)
        result = acc.after(done)[0].load() / total.after(done)[0].load()
        at = axis * (spec.num_heads * dim) + head * dim + thread
        store = out[at].store(result.cast(out.dtype)).end(thread, head, axis)
        tokens, context = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        name = f"attention_{tokens}x{spec.num_heads}x{dim}"
        return finish(
            store,
            name,
            ops=4 * tokens * spec.num_heads * dim * context,
            nbytes=4 * tokens * spec.slot_elements * context,
        )

    return kernel


def _score(body: Body, spec: GpuAttentionSpec, query: UOp, keys: UOp, slot: UOp, kv_head: UOp, step: UOp) -> UOp:
    """query . key of the thread's own token."""
    dim = spec.head_dim
    acc = fill(body, body.registers(1), 0.0, step)
    chunk = body.fold(dim // VECTOR)
    base = slot * spec.slot_elements + kv_head * dim + chunk * VECTOR
    products = [query[chunk * VECTOR + i].load() * keys[base + i].load().cast(F32) for i in range(VECTOR)]
    inner = acc.after(chunk)
    return acc.after(inner[0].store(inner[0].load() + balanced(products)).end(chunk))[0].load()


def _maximum(body: Body, scores: UOp, count: int, start: UOp, step: UOp) -> UOp:
    """max(start, scores...), the same in every thread."""
    best = body.registers(1)
    best = best.after(best.after(step)[0].store(start))
    i = body.fold(count)
    inner = best.after(i)
    return best.after(inner[0].store(inner[0].load().maximum(scores[i].load())).end(i))[0].load()


# -- rows by index ----------------------------------------------------------------------------------------------------

THREADS = 32


@cached_kernel
def take_rows_kernel(layout: StepLayout, num_cols: int) -> KernelFn:
    """fn(out (R, columns), x (T, columns), inputs): rows logit_rows of x."""

    def kernel(out: UOp, x: UOp, inputs: UOp) -> UOp:
        body = Body()
        seq, chunk, thread = body.grid(layout.num_seqs), body.grid(num_cols // THREADS), body.threads(THREADS)
        col = chunk * THREADS + thread
        row = clamp(inputs[layout.offset("logit_rows") + seq].load(), 0, layout.num_tokens - 1)
        store = out[seq * num_cols + col].store(x[row * num_cols + col].load()).end(thread, chunk, seq)
        return finish(store, f"take_rows_{layout.num_seqs}x{num_cols}", nbytes=4 * layout.num_seqs * num_cols)

    return kernel
