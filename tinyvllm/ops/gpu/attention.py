"""RoPE, KV write and paged attention for devices with threadgroups: METAL, CUDA, OpenCL.

Keys and values are stored token by token, `[slot][kv head][D]`: a threadgroup's threads read one head of consecutive
tokens. Threads meet through threadgroup memory alone, so one source renders for every such device.
"""

from __future__ import annotations

from tinygrad import UOp, dtypes

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionSpec
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


class _Row:
    """One token row's inputs inside a kernel."""

    def __init__(
        self, spec: AttentionSpec, row: UOp, inputs: UOp, operands: tuple[UOp, ...], held: slice, *, with_sinks: bool
    ) -> None:
        """`operands`: the layer's tables, and the parts of qkv that are `held`."""
        layout, rest = spec.layout, list(operands)
        self.spec, self.row, self.inputs = spec, row, inputs
        self.tables = spec.take_tables(rest, with_sinks=with_sinks)
        self.parts = rest
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

    def qkv(self, section: int, head: UOp, offset: UOp) -> UOp:
        """Value `offset` of a head of queries, keys or values, with its bias."""
        spec = self.spec
        value = self._stored(head + spec.section_start(section) // spec.head_dim if section else head, offset)
        if self.tables.bias is None:
            return value
        return value + self.tables.bias[spec.bias_start(section) + head * spec.head_dim + offset].load()

    def _stored(self, head: UOp, offset: UOp) -> UOp:
        """qkv[row, head * D + offset]; `head` counts q heads, then k, then v."""
        col, start, value = head * self.spec.head_dim + offset - self.first_col, 0, None
        for part, cols in zip(self.parts, self.part_cols, strict=True):
            inside = (col - start).maximum(0).minimum(cols - 1) if len(self.parts) > 1 else col
            here = part[self.row * cols + inside].load().cast(F32)
            value = here if value is None else (col < start).where(value, here)
            start += cols
        assert value is not None
        return value

    def turned(self, body: Body, section: int, head: UOp, d: UOp, *outer: UOp) -> UOp:
        """Element d, the thread's own, of a head of queries or keys, normed where they are, and rotated by the row's
        position (Su et al. 2021). `outer`: the kernel's axes."""
        spec, rope = self.spec, self.tables.rope
        rotary, half = spec.rotary, spec.rotary // 2
        if rope is None:
            return self._normed(body, section, head, (d,), *outer)[0]
        inside = d if rotary == spec.head_dim else (d < rotary).where(d, 0)
        if spec.is_interleaved:
            i, other, is_low = inside // 2, inside + 1 - inside % 2 * 2, (inside % 2).eq(0)
        else:
            i, other, is_low = inside % half, (inside + half) % rotary, inside < half
        cos = rope[self.position * rotary + i].load()
        sin = rope[self.position * rotary + half + i].load()
        own, partner = self._normed(body, section, head, (d, other), *outer)
        turned = own * cos + partner * is_low.where(sin * -1.0, sin)
        return turned if rotary == spec.head_dim else (d < rotary).where(turned, own)

    def value(self, body: Body, head: UOp, d: UOp, *outer: UOp) -> UOp:
        """Element d of a head of values, normed where they are."""
        own = self.qkv(VALUES, head, d)
        if self.spec.value_eps is None:
            return own
        return own * self._head_scale(body, own, d, self.spec.value_eps, *outer)

    def _normed(self, body: Body, section: int, head: UOp, dims: tuple[UOp, ...], *outer: UOp) -> list[UOp]:
        """Elements of a head, the thread's own first."""
        values = [self.qkv(section, head, d) for d in dims]
        weight = self.tables.head_norm
        if weight is None or self.spec.head_eps is None:
            return values
        scale = self._head_scale(body, values[0], dims[0], self.spec.head_eps, *outer)
        start = section * self.spec.head_dim
        return [v * scale * weight[start + d].load() for v, d in zip(values, dims, strict=True)]

    def _head_scale(self, body: Body, own: UOp, d: UOp, eps: float, *outer: UOp) -> UOp:
        """1 / sqrt(mean square + eps) of the head whose element d is `own`, the same in every thread."""
        dim = self.spec.head_dim
        squares = body.shared(dim)
        squares = squares.after(squares.after(*outer)[d].store(own * own))
        total = fill(body, body.registers(1), 0.0, squares)
        i = body.fold(dim)
        inner = total.after(i)
        total = total.after(inner[0].store(inner[0].load() + squares[i].load()).end(i))
        return (total[0].load() * (1.0 / dim) + eps).sqrt().reciprocal()


@cached_kernel
def write_kv_kernel(spec: AttentionSpec) -> KernelFn:
    """fn(keys, values, inputs, *tables but sinks, *qkv[kv_parts]): every row's rotated key and its value go to its
    slot."""

    def kernel(keys: UOp, values: UOp, inputs: UOp, *operands: UOp) -> UOp:
        body = Body()
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_kv_heads)
        d = body.threads(spec.head_dim)
        row = _Row(spec, axis, inputs, operands, spec.kv_parts, with_sinks=False)
        at = row.slot() * spec.slot_elements + head * spec.head_dim + d
        key = row.turned(body, KEYS, head, d, axis, head, d)
        value = row.value(body, head, d, axis, head, d)
        stores = UOp.group(keys[at].store(key.cast(keys.dtype)), values[at].store(value.cast(values.dtype)))
        tokens, width = spec.layout.num_tokens, spec.slot_elements
        return finish(
            stores.end(d, head, axis), f"write_kv_{tokens}x{width}", ops=6 * tokens * width, nbytes=8 * tokens * width
        )

    return kernel


@cached_kernel
def attention_kernel(spec: AttentionSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, inputs, *tables, *qkv[query_parts]): a threadgroup a row and head.

    Passes of D tokens: thread t scores token t of the pass, then thread d adds up element d of the values (online
    softmax, Milakov & Gimelshein 2018). A row's cost follows its own context, or its window.
    """

    def kernel(out: UOp, keys: UOp, values: UOp, inputs: UOp, *operands: UOp) -> UOp:
        body, dim = Body(), spec.head_dim
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_heads)
        thread = body.threads(dim)
        axes = (axis, head, thread)
        row = _Row(spec, axis, inputs, operands, spec.query_parts, with_sinks=True)
        kv_head = head // spec.group
        query = body.shared(dim)
        own = row.turned(body, QUERIES, head, thread, *axes) * spec.query_scale
        query = query.after(query.after(*axes)[thread].store(own))
        best, total, acc = (fill(body, body.registers(1), v, *axes) for v in (LOWEST, 0.0, 0.0))
        if row.tables.sinks is not None:
            best = best.after(best[0].store(row.tables.sinks[head].load() * LOG2E))
            total = total.after(total[0].store(UOp.const(1.0, F32)))

        count, first = row.position + 1, spec.first_key(row.position)
        step = body.fold_while(
            (count - first + dim - 1) // dim if spec.window is not None else (count + dim - 1) // dim
        )
        token = step.cast(dtypes.weakint) * dim + thread
        token = token if spec.window is None else token + first
        is_inside = token < count
        slot = row.slot_of(is_inside.where(token, 0))
        score = _score(body, spec, query, keys, slot, kv_head, step)
        scores, slots = body.shared(dim), body.shared(dim, I32)
        shared = UOp.group(
            scores.after(step)[thread].store(is_inside.where(spec.score(score, lambda x: x.exp2()), LOWEST)),
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


def _score(body: Body, spec: AttentionSpec, query: UOp, keys: UOp, slot: UOp, kv_head: UOp, step: UOp) -> UOp:
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
