"""RoPE, KV write and paged attention for devices with threadgroups: METAL, CUDA, OpenCL.

Keys and values, or their codes (kv_codes.py), are stored token by token, `[slot][kv head][D]`: a threadgroup's threads
read one head of consecutive tokens. Threads exchange values through threadgroup memory only, so one source renders for
every such device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionSpec
from tinyvllm.ops.gpu.kv_codes import Q4_HALF, QUAD, StoredHeads, quantized
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
        """`operands`: the layer's tables, and the parts of qkv in `held`."""
        layout, rest = spec.layout, list(operands)
        self.spec, self.row, self.inputs = spec, row, inputs
        self.tables = spec.take_tables(rest, with_sinks=with_sinks)
        self.qkv_parts = rest
        self.part_cols, self.first_col = spec.qkv_cols[held], sum(spec.qkv_cols[: held.start])
        # Body.fold_while: at least two passes must be possible
        positions = max(layout.max_blocks * layout.block_size, 2 * spec.head_dim)
        self.position = clamp(inputs[layout.offset("positions") + row].load(), 0, positions - 1)
        seq = clamp(inputs[layout.offset("seq_rows") + row].load(), 0, layout.num_seqs)
        self.table = seq * layout.max_blocks + spec.tables_start

    def slot(self) -> UOp:
        """Where this row's key and value go."""
        return clamp(self.inputs[self.spec.slots_start + self.row].load(), 0, self.spec.num_slots - 1)

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
        for part, cols in zip(self.qkv_parts, self.part_cols, strict=True):
            inside = (col - start).maximum(0).minimum(cols - 1) if len(self.qkv_parts) > 1 else col
            here = part[self.row * cols + inside].load().cast(F32)
            value = here if value is None else (col < start).where(value, here)
            start += cols
        assert value is not None
        return value

    def rotated(self, body: Body, section: int, head: UOp, d: UOp, *outer: UOp) -> UOp:
        """Element d, the thread's own, of a head of queries or keys, normed if the model norms heads, and rotated by
        the row's position (Su et al. 2021). `outer`: the kernel's axes."""
        spec, rope = self.spec, self.tables.rope
        rotary, half = spec.rotary, spec.rotary // 2
        if rope is None:
            return self._normed(body, section, head, (d,), *outer)[0]
        inside = d if rotary == spec.head_dim else (d < rotary).where(d, 0)
        if spec.is_interleaved:
            i, other, is_low = inside // 2, inside + 1 - inside % 2 * 2, (inside % 2).eq(0)
        else:
            i, other, is_low = inside % half, (inside + half) % rotary, inside < half
        at = self.position * spec.rope_cols + i
        cos, sin = rope[at].load(), rope[at + half].load()
        own, partner = self._normed(body, section, head, (d, other), *outer)
        rotated = own * cos + partner * is_low.where(sin * -1.0, sin)
        return rotated if rotary == spec.head_dim else (d < rotary).where(rotated, own)

    def query_scale(self) -> UOp | float:
        """What rotated queries are multiplied by."""
        spec = self.spec
        if not spec.scales_queries:
            return spec.query_scale
        assert self.tables.rope is not None
        return self.tables.rope[self.position * spec.rope_cols + spec.rotary].load() * spec.query_scale

    def value(self, body: Body, head: UOp, d: UOp, *outer: UOp) -> UOp:
        """Element d of a head of values, normed if the model norms them."""
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
    """fn(*planes of the pool, inputs, *tables without sinks, *qkv[kv_parts]): writes every row's rotated key and its
    value to the row's slot."""

    def kernel(*operands: UOp) -> UOp:
        body, rest = Body(), list(operands)
        keys, values = StoredHeads.of(spec, spec.take_planes(rest))
        inputs = rest.pop(0)
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_kv_heads)
        d = body.threads(spec.head_dim)
        row = _Row(spec, axis, inputs, tuple(rest), spec.kv_parts, with_sinks=False)
        key = row.rotated(body, KEYS, head, d, axis, head, d)
        value = row.value(body, head, d, axis, head, d)
        stores = _head_stores(body, keys, row.slot(), head, d, key, axis, head, d)
        stores += _head_stores(body, values, row.slot(), head, d, value, axis, head, d)
        tokens, width = spec.layout.num_tokens, spec.slot_elements
        return finish(
            UOp.group(*stores).end(d, head, axis),
            f"write_kv_{tokens}x{width}",
            ops=6 * tokens * width,
            nbytes=8 * tokens * width,
        )

    return kernel


def _head_stores(body: Body, heads: StoredHeads, slot: UOp, head: UOp, d: UOp, own: UOp, *outer: UOp) -> list[UOp]:
    """Stores of a head, of which the thread has element d. Quantized heads go through threadgroup memory: a thread
    stores a word."""
    form, dim = heads.form, heads.head_dim
    if not form.is_quantized:
        return [heads.codes[heads.element(slot, head, d)].store(own.cast(heads.codes.dtype))]
    whole = body.shared(dim)
    whole = whole.after(whole.after(*outer)[d].store(own))
    words, place = dim * form.bits // 32, heads.head(slot, head)
    word = d.minimum(words - 1)
    per_group = form.group * form.bits // 32
    first = word * QUAD if form.bits == 8 else word // per_group * form.group + word % per_group * QUAD

    def largest_of(fn: Callable[[UOp], UOp]) -> UOp:
        i, best = body.fold(form.group), fill(body, body.registers(1), LOWEST, whole)
        inner = best.after(i)
        value = fn(whole[first // form.group * form.group + i].load())
        return best.after(inner[0].store(inner[0].load().maximum(value)).end(i))[0].load()

    starts = [first] if form.bits == 8 else [first, first + Q4_HALF]
    codes = quantized(form, [whole[start + i].load() for start in starts for i in range(QUAD)], largest_of)
    quads = codes.quads()
    packed = quads[0] if form.bits == 8 else quads[0] | quads[1] << 4
    stores = [heads.codes[(place * words + word).valid(d < words)].store(packed)]
    if codes.scale is not None and heads.scales is not None:
        leads = (d < words) & (word % per_group).eq(0)
        stores.append(heads.scales[heads.scale_at(place, first).valid(leads)].store(codes.scale))
    return stores


@cached_kernel
def attention_kernel(spec: AttentionSpec) -> KernelFn:
    """fn(out (T, H * D), *planes of the pool, inputs, *tables, *qkv[query_parts]): one threadgroup for each row and
    head.

    The context is read in passes of D tokens, with an online softmax (Milakov & Gimelshein 2018). In a pass, thread t
    scores token t, and then thread d adds up element d of the values. A row's cost depends on its own context, or on
    its window.
    """

    def kernel(out: UOp, *operands: UOp) -> UOp:
        body, dim, rest = Body(), spec.head_dim, list(operands)
        keys, values = StoredHeads.of(spec, spec.take_planes(rest))
        inputs = rest.pop(0)
        axis, head = body.grid(spec.layout.num_tokens), body.grid(spec.num_heads)
        thread = body.threads(dim)
        row = _Row(spec, axis, inputs, tuple(rest), spec.query_parts, with_sinks=True)
        attention = _HeadAttention(body, row, head, thread, keys, values)
        query, state = attention.load_query(), attention.start()
        tokens = attention.next_tokens()
        scores, slots = attention.score(query, tokens)
        state = attention.add_values(scores, slots, state, tokens.step)
        at = axis * (spec.num_heads * dim) + head * dim + thread
        result = state.acc[0].load() / state.total[0].load()
        store = out[at].store(result.cast(out.dtype)).end(thread, head, axis)
        num_tokens, context = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        return finish(
            store,
            f"attention_{num_tokens}x{spec.num_heads}x{dim}",
            ops=4 * num_tokens * spec.num_heads * dim * context,
            nbytes=num_tokens * spec.kv.num_bytes(spec.slot_elements) * context,
        )

    return kernel


@dataclass(frozen=True)
class _Tokens:
    """A pass: `step` is its loop, `token` the thread's own token, which exists only if `is_inside`."""

    step: UOp
    token: UOp
    is_inside: UOp


@dataclass(frozen=True)
class _Softmax:
    """The state of the online softmax, in registers: the maximum score, the sum of weights, and the weighted sum of the
    thread's own element of the values."""

    best: UOp
    total: UOp
    acc: UOp


class _HeadAttention:
    """The attention of one row and query head by a threadgroup of D threads."""

    def __init__(self, body: Body, row: _Row, head: UOp, thread: UOp, keys: StoredHeads, values: StoredHeads) -> None:
        self.body, self.spec, self.row = body, row.spec, row
        self.head, self.thread, self.kv_head = head, thread, head // row.spec.group
        self.axes = (row.row, head, thread)
        self.keys, self.values = keys, values

    def load_query(self) -> UOp:
        """The scaled and rotated query in threadgroup memory."""
        query = self.body.shared(self.spec.head_dim)
        own = self.row.rotated(self.body, QUERIES, self.head, self.thread, *self.axes) * self.row.query_scale()
        return query.after(query.after(*self.axes)[self.thread].store(own))

    def start(self) -> _Softmax:
        """The state before the first pass: nothing, or the head's sink."""
        best, total, acc = (fill(self.body, self.body.registers(1), v, *self.axes) for v in (LOWEST, 0.0, 0.0))
        sinks = self.row.tables.sinks
        if sinks is not None:
            best = best.after(best[0].store(sinks[self.head].load() * LOG2E))
            total = total.after(total[0].store(UOp.const(1.0, F32)))
        return _Softmax(best, total, acc)

    def next_tokens(self) -> _Tokens:
        """The loop over the passes."""
        dim, window = self.spec.head_dim, self.spec.window
        count, first = self.row.position + 1, self.spec.first_key(self.row.position)
        step = self.body.fold_while((count + dim - 1) // dim if window is None else (count - first + dim - 1) // dim)
        token = step.cast(dtypes.weakint) * dim + self.thread
        token = token if window is None else token + first
        return _Tokens(step, token, token < count)

    def score(self, query: UOp, tokens: _Tokens) -> tuple[UOp, UOp]:
        """The scores of a pass's D tokens and their slots, in threadgroup memory."""
        spec, body, step, is_inside = self.spec, self.body, tokens.step, tokens.is_inside
        # where there is no token, the first that is attended to: its value is multiplied by 0, so it must not be NaN
        slot = self.row.slot_of(is_inside.where(tokens.token, spec.first_key(self.row.position)))
        score = spec.score(self._multiply_key(query, slot, step), lambda x: x.exp2())
        scores, slots = body.shared(spec.head_dim), body.shared(spec.head_dim, I32)
        shared = UOp.group(
            scores.after(step)[self.thread].store(is_inside.where(score, LOWEST)),
            slots.after(step)[self.thread].store(slot.cast(I32)),
        )
        return scores.after(shared), slots.after(shared)

    def _multiply_key(self, query: UOp, slot: UOp, step: UOp) -> UOp:
        """query . key of the thread's own token."""
        dim, body = self.spec.head_dim, self.body
        acc = fill(body, body.registers(1), 0.0, step)
        chunk = body.fold(dim // VECTOR)
        key = self.keys.floats(slot, self.kv_head, chunk * VECTOR, VECTOR)
        products = [query[chunk * VECTOR + i].load() * value for i, value in enumerate(key)]
        inner = acc.after(chunk)
        return acc.after(inner[0].store(inner[0].load() + balanced(products)).end(chunk))[0].load()

    def add_values(self, scores: UOp, slots: UOp, state: _Softmax, step: UOp) -> _Softmax:
        """The state after a pass, and after the loop over the passes, which ends here."""
        spec, body, thread, dim = self.spec, self.body, self.thread, self.spec.head_dim
        best, total, acc = state.best, state.total, state.acc
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
        slot = clamp(slots[other].load(), 0, spec.num_slots - 1)
        (value,) = self.values.floats(slot, self.kv_head, thread, 1)
        inner, sums = acc.after(scaled, other), total.after(scaled, other)
        added = UOp.group(
            inner[0].store(inner[0].load() + weight * value),
            sums[0].store(sums[0].load() + weight),
        ).end(other)
        done = UOp.group(added, best.after(added)[0].store(new)).end(step)
        return _Softmax(best.after(done), total.after(done), acc.after(done))


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
def take_rows_kernel(layout: StepLayout, num_cols: int, num_rows: int | None = None) -> KernelFn:
    """fn(out (R, columns), x (T or num_rows, columns), inputs): rows logit_rows of x."""
    last = (layout.num_tokens if num_rows is None else num_rows) - 1

    def kernel(out: UOp, x: UOp, inputs: UOp) -> UOp:
        body = Body()
        seq, chunk, thread = body.grid(layout.num_seqs), body.grid(num_cols // THREADS), body.threads(THREADS)
        col = chunk * THREADS + thread
        row = clamp(inputs[layout.offset("logit_rows") + seq].load(), 0, last)
        store = out[seq * num_cols + col].store(x[row * num_cols + col].load()).end(thread, chunk, seq)
        return finish(store, f"take_rows_{layout.num_seqs}x{num_cols}", nbytes=4 * layout.num_seqs * num_cols)

    return kernel


@cached_kernel
def store_rows_kernel(num_rows: int, num_cols: int, start: int, stride: int) -> KernelFn:
    """fn(out, x (rows, columns)): row r of x begins at element start + r * stride of out."""

    def kernel(out: UOp, x: UOp) -> UOp:
        body = Body()
        row, chunk, thread = body.grid(num_rows), body.grid(num_cols // THREADS), body.threads(THREADS)
        col = chunk * THREADS + thread
        value = x[row * num_cols + col].load().cast(out.dtype)
        store = out[start + row * stride + col].store(value).end(thread, chunk, row)
        return finish(store, f"store_rows_{num_rows}x{num_cols}", nbytes=4 * num_rows * num_cols)

    return kernel
