"""RoPE, KV write and paged attention on the CPU device.

A key block is stored `[kv head][D][block_size]`, so that a dot product over D runs with the block's tokens as vector
lanes; a value block `[kv head][block_size][D]`, so that the weighted sum runs with D as lanes. Both inner loops read
consecutive memory and neither needs a horizontal sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from tinygrad import UOp

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionSpec, PoolPlanes
from tinyvllm.ops.cpu.attention_quantized import (
    HeadPlace,
    QuantizedBlock,
    add_values,
    multiply_keys,
    scale_weights,
    store_head,
    unit_of,
)
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
    exp2,
    fill,
    finish,
)

VALUE_CHUNK = 64  # values of one head accumulated at once: 8 AVX2 registers
NORM_LANES = 16  # sums of squares that run side by side


@dataclass(frozen=True)
class CpuAttentionSpec(AttentionSpec):
    """`fused_write`: every row is the last token of a sequence of its own, so that it can write its key and value
    itself; otherwise `write_kv_kernel` runs before."""

    fused_write: bool = False
    # if cores share a KV head: this one's first query head, and the query heads of all of them
    first_query: int = 0
    all_queries: int = 0
    # the heads are the most of any core, and how many KV heads this one has is an operand: cores with shares of
    # different sizes have one program. There are no biases and no sinks, and qkv has one part.
    any_kv_heads: bool = False

    def with_queries(self, first: int, end: int) -> CpuAttentionSpec:
        """Of query heads [first, end) of one KV head. Keys and values were written before."""
        return replace(self, first_query=first, all_queries=self.num_heads, num_heads=end - first)

    @property
    def first_head(self) -> int:
        return super().first_head + self.first_query

    @property
    def query_parts(self) -> slice:
        start = self.first_query * self.head_dim
        return self.parts_between(start, start + self.num_heads * self.head_dim)

    @property
    def read_parts(self) -> slice:
        """The parts of qkv that `attention_kernel` reads, and is given."""
        return slice(0, len(self.qkv_cols)) if self.fused_write else self.query_parts

    def section_start(self, section: int) -> int:
        heads = self.all_queries or self.num_heads
        return (0, heads, heads + self.num_kv_heads)[section] * self.head_dim

    @property
    def key_unit(self) -> float:
        """What products with keys are multiplied by."""
        return unit_of(self.kv.keys) if self.kv.keys.is_quantized else 1.0

    @property
    def value_unit(self) -> float:
        """What sums of values are multiplied by."""
        return unit_of(self.kv.values) if self.kv.values.is_quantized else 1.0

    def take_kv_heads(self, operands: list[UOp]) -> UOp | int:
        """How many KV heads this core has, removed from the front of a kernel's operands if it is one of them."""
        return clamp(operands.pop(0)[0].load(), 1, self.num_kv_heads) if self.any_kv_heads else self.num_kv_heads


@dataclass(frozen=True)
class _Pair:
    """Two dimensions of a head that are handled together, by the iteration `i` of a loop."""

    i: UOp
    low: UOp
    high: UOp
    is_rotated: bool


class Row:
    """One token row inside a kernel: its inputs, and its q, k, v before they are normed and rotated."""

    def __init__(
        self, spec: CpuAttentionSpec, row: UOp, inputs: UOp, operands: Sequence[UOp], held: slice, *, with_sinks: bool
    ) -> None:
        """`operands`: the number of KV heads if it is one, the layer's tables, and the parts of qkv in `held`."""
        layout, rest = spec.layout, list(operands)
        self.spec, self.row, self.inputs = spec, row, inputs
        self.num_kv_heads = spec.take_kv_heads(rest)
        self.tables = spec.take_tables(rest, with_sinks=with_sinks)
        self.qkv_parts = rest
        self.part_cols, self.first_col = spec.qkv_cols[held], sum(spec.qkv_cols[: held.start])
        self.position = inputs[layout.offset("positions") + row].load().maximum(0)
        self.slot = inputs[spec.slots_start + row].load().maximum(0)
        seq = inputs[layout.offset("seq_rows") + row].load()
        self.table = seq * layout.max_blocks + spec.tables_start

    def block(self, index: UOp) -> UOp:
        """The id of the sequence's index-th block."""
        return self.inputs[self.table + index].load()

    def qkv(self, section: int, head: UOp, offset: UOp) -> UOp:
        """Value `offset` of a head of queries, keys or values, with its bias."""
        spec = self.spec
        first = self._first_head(section)
        head = head + spec.first_query if section == QUERIES and spec.first_query else head
        value = self._stored(head if isinstance(first, int) and first == 0 else head + first, offset)
        if self.tables.bias is None:
            return value
        return value + self.tables.bias[spec.bias_start(section) + head * spec.head_dim + offset].load()

    def _first_head(self, section: int) -> UOp | int:
        """The first head of a section among the heads of qkv."""
        if not self.spec.any_kv_heads:
            return self.spec.section_start(section) // self.spec.head_dim
        return (0, self.num_kv_heads * self.spec.group, self.num_kv_heads * (self.spec.group + 1))[section]

    def head_place(self, block: UOp, head: UOp) -> UOp:
        """The number of a KV head in a block of the pool, among those of all blocks."""
        return block * self.num_kv_heads + head

    def head_start(self, block: UOp, head: UOp) -> UOp:
        """Where its keys (or values) begin."""
        elements = self.spec.head_dim * self.spec.layout.block_size
        return block * (self.num_kv_heads * elements) + head * elements

    def _stored(self, head: UOp, offset: UOp) -> UOp:
        """qkv[row, head * D + offset], from the part that holds it. `head` counts q heads, then k, then v."""
        start, value, first = 0, None, self.first_col
        col = head * self.spec.head_dim + offset - first if first else head * self.spec.head_dim + offset
        if len(self.qkv_parts) == 1:
            most = self.spec.num_kv_heads
            stride = self.part_cols[0] // most * self.num_kv_heads if self.spec.any_kv_heads else self.part_cols[0]
            return self.qkv_parts[0][self.row * stride + col].load()
        for part, cols in zip(self.qkv_parts, self.part_cols, strict=True):
            here = part[self.row * cols + (col - start).maximum(0).minimum(cols - 1)].load()
            value = here if value is None else (col < start).where(value, here)
            start += cols
        assert value is not None
        return value

    def head_scale(self, body: Body, section: int, head: UOp, *after: UOp) -> UOp | None:
        """A register with 1 / sqrt(mean square + eps) of a head, inside the loops in `after`; None if heads of this
        section have no norm."""
        eps = self.spec.value_eps if section == VALUES else self.spec.head_eps
        if eps is None:
            return None
        dim = self.spec.head_dim
        lanes = gcd(dim, NORM_LANES)
        sums = fill(body, body.registers(lanes), 0.0, *after)
        chunk = body.fold(dim // lanes)
        inner = sums.after(chunk)
        values = [self.qkv(section, head, chunk * lanes + lane) for lane in range(lanes)]
        done = UOp.group(*[inner[i].store(inner[i].load() + v * v) for i, v in enumerate(values)]).end(chunk)
        sums = sums.after(done)
        mean = balanced(sums[i].load() for i in range(lanes)) * (1.0 / dim)
        scale = body.registers(1)
        return scale.after(scale.after(*after)[0].store((mean + eps).sqrt().reciprocal()))

    def pairs(self, body: Body) -> list[_Pair]:
        """A head's dimensions in pairs: a loop over the pairs that rotate together, and one over the others."""
        dim, rotary, pairs = self.spec.head_dim, self.spec.rotary, []
        if rotary:
            i = body.loop(rotary // 2)
            low, high = (i * 2, i * 2 + 1) if self.spec.is_interleaved else (i, i + rotary // 2)
            pairs.append(_Pair(i, low, high, True))
        if rotary < dim:
            i = body.loop((dim - rotary) // 2)
            pairs.append(_Pair(i, i + rotary, i + (rotary + (dim - rotary) // 2), False))
        return pairs

    def rotated(self, section: int, head: UOp, pair: _Pair, scale: UOp | None) -> tuple[UOp, UOp]:
        """A pair of a head of queries or keys, normed if the model norms heads (`scale`: from `head_scale`), and
        rotated by the row's position (Su et al. 2021)."""
        dim, rotary, tables = self.spec.head_dim, self.spec.rotary, self.tables
        cos = sin = None
        if pair.is_rotated:
            assert tables.rope is not None
            at = self.position * self.spec.rope_cols + pair.i
            cos, sin = tables.rope[at].load(), tables.rope[at + rotary // 2].load()
        a, b = self.qkv(section, head, pair.low), self.qkv(section, head, pair.high)
        if tables.head_norm is not None and scale is not None:
            values = ((a, pair.low), (b, pair.high))
            a, b = (v * scale[0].load() * tables.head_norm[section * dim + at].load() for v, at in values)
        return (a, b) if cos is None or sin is None else (a * cos - b * sin, b * cos + a * sin)

    def query_scale(self) -> UOp | float:
        """What rotated queries are multiplied by."""
        spec = self.spec
        if not spec.scales_queries:
            return spec.query_scale
        assert self.tables.rope is not None
        return self.tables.rope[self.position * spec.rope_cols + spec.rotary].load() * spec.query_scale

    def write(self, body: Body, planes: PoolPlanes) -> UOp:
        """Stores of the row's rotated keys and its values at its slot."""
        spec, block_size = self.spec, self.spec.layout.block_size
        head = body.loop_up_to(self.num_kv_heads)
        if spec.kv.is_quantized:
            return self._write_quantized(body, planes, head)
        keys, values, groups = planes.keys, planes.values, []
        for pair in self.pairs(body):
            block, offset = self.slot // block_size, self.slot % block_size
            base = self.head_start(block, head)
            low, high = self.rotated(KEYS, head, pair, self.head_scale(body, KEYS, head, self.row, head))
            scale = self.head_scale(body, VALUES, head, self.row, head)
            v_low, v_high = (self.qkv(VALUES, head, at) for at in (pair.low, pair.high))
            if scale is not None:
                v_low, v_high = v_low * scale[0].load(), v_high * scale[0].load()
            stores = [
                keys[base + pair.low * block_size + offset].store(low.cast(keys.dtype)),
                keys[base + pair.high * block_size + offset].store(high.cast(keys.dtype)),
                values[base + offset * spec.head_dim + pair.low].store(v_low.cast(values.dtype)),
                values[base + offset * spec.head_dim + pair.high].store(v_high.cast(values.dtype)),
            ]
            groups.append((UOp.group(*stores), pair.i))
        return _end_pairs(groups, head)

    def _write_quantized(self, body: Body, planes: PoolPlanes, head: UOp) -> UOp:
        """`write` of keys or values that are quantized, or both: a group's scale depends on all of its elements, so a
        head is computed in registers first."""
        spec, size, kv = self.spec, self.spec.layout.block_size, self.spec.kv
        dim, stores = spec.head_dim, []
        block, offset = self.slot // size, self.slot % size
        place = self.head_place(block, head)
        halves = (
            (KEYS, kv.keys, planes.keys, planes.key_scales),
            (VALUES, kv.values, planes.values, planes.value_scales),
        )
        for section, form, codes, scales in halves:
            own, is_key = self._head(body, section, head), section == KEYS
            start, stride = (offset, size) if is_key else (offset * form.code_bytes(dim), 1)
            if form.is_quantized:
                start = place * (form.code_bytes(dim) * size) + start
                at = HeadPlace(start, stride, place * (form.num_scales(dim) * size) + offset, size)
                stores.append(store_head(body, form, own, dim, (codes, scales), at))
                continue
            start = place * (dim * size) + (offset if is_key else offset * dim)
            d = body.loop(dim)
            stores.append(codes[start + d * stride].store(own[d].load().cast(codes.dtype)).end(d))
        return UOp.group(*stores).end(head)

    def _head(self, body: Body, section: int, head: UOp) -> UOp:
        """The row's rotated key, or its value, of one head in registers."""
        own, groups = body.registers(self.spec.head_dim), []
        target = own.after(self.row, head)
        for pair in self.pairs(body):
            scale = self.head_scale(body, section, head, self.row, head)
            if section == KEYS:
                low, high = self.rotated(KEYS, head, pair, scale)
            else:
                low, high = (self.qkv(VALUES, head, at) for at in (pair.low, pair.high))
                if scale is not None:
                    low, high = low * scale[0].load(), high * scale[0].load()
            groups.append(UOp.group(target[pair.low].store(low), target[pair.high].store(high)).end(pair.i))
        return own.after(*groups)


def _end_pairs(groups: list[tuple[UOp, UOp]], outer: UOp) -> UOp:
    """The stores of each loop over pairs, and the loop around them, ended."""
    if len(groups) == 1:
        stores, i = groups[0]
        return stores.end(i, outer)
    return UOp.group(*[stores.end(i) for stores, i in groups]).end(outer)


@cached_kernel
def write_kv_kernel(spec: CpuAttentionSpec, tokens: int) -> KernelFn:
    """fn(*planes of the pool, inputs, *tables without sinks, *qkv[kv_parts]): writes every row's rotated key and its
    value to the row's slot. `tokens`: T."""

    def kernel(*operands: UOp) -> UOp:
        body, rest = Body(), list(operands)
        planes, inputs = spec.take_planes(rest), rest.pop(0)
        row, width = body.grid(tokens), spec.num_kv_heads * spec.head_dim
        stores = Row(spec, row, inputs, rest, spec.kv_parts, with_sinks=False).write(body, planes).end(row)
        nbytes = tokens * (8 * width + spec.kv.num_bytes(width))
        return finish(stores, f"write_kv_{tokens}x{width}", ops=6 * tokens * width, nbytes=nbytes)

    return kernel


@cached_kernel
def attention_kernel(spec: CpuAttentionSpec, tokens: int) -> KernelFn:
    """fn(out (T, H * D), *planes of the pool, inputs, *tables, *qkv[read_parts]): causal attention of each row over its
    own blocks, for steps of rows that share none (else attention_tiles.py). `tokens`: T.

    Online softmax by block (Milakov & Gimelshein 2018). A row's cost depends on its own context, or on its window. With
    `fused_write`, keys and values are written too (they are outputs of the kernel then).
    """

    def kernel(out: UOp, *operands: UOp) -> UOp:
        body, rest = Body(), list(operands)
        planes, inputs = spec.take_planes(rest), rest.pop(0)
        # the rows are the only GLOBAL axis (each is one command of a worker): codegen cannot put a loop whose length is
        # data into a LOOP axis that the length depends on
        axis = body.grid(tokens)
        row = Row(spec, axis, inputs, rest, spec.read_parts, with_sinks=True)
        if spec.fused_write:
            planes = planes.after(row.write(body, planes))
        head = body.loop_up_to(row.num_kv_heads)
        stores = _attend(body, row, head, out, planes)
        return finish_attention(spec, tokens, stores.end(head, axis))

    return kernel


def finish_attention(spec: CpuAttentionSpec, tokens: int, stores: UOp) -> UOp:
    """The kernel of attention that ends with these stores."""
    width = spec.num_kv_heads * spec.head_dim
    context = spec.layout.max_blocks * spec.layout.block_size  # the longest; the true one is data
    name = f"attention_{tokens}x{spec.num_heads}x{spec.head_dim}"
    ops = 4 * tokens * spec.num_heads * spec.head_dim * context
    return finish(stores, name, ops=ops, nbytes=tokens * spec.kv.num_bytes(width) * context)


@dataclass(frozen=True)
class _Block:
    """One block of a row's context, and the loop over the blocks."""

    loop: UOp
    number: UOp  # in the sequence
    place: UOp  # the block's number in the pool times the KV heads, plus the KV head
    base: UOp  # where the KV head's keys (or values) of the block begin in the pool, if they are not quantized


def _attend(body: Body, row: Row, head: UOp, out: UOp, planes: PoolPlanes) -> UOp:
    """Stores of the G query heads that share KV head `head`."""
    spec, axis = row.spec, row.row
    dim, group = spec.head_dim, spec.group
    query = _load_queries(body, row, head, planes.keys)
    best, total = _start(body, row, head)
    acc = fill(body, body.registers(group * dim), 0.0, axis, head)
    block = _next_block(body, row, head)
    scores = _scores(body, row, query, planes, block, [best, total, acc])
    weights, decay, done = _weigh(body, row, scores, block, best, total)
    d = body.loop(group * dim)
    target = acc.after(block.loop, done)
    acc_done = target[d].store(target[d].load() * decay[d // dim].load()).end(d)
    if spec.kv.values.is_quantized:
        acc_done = _add_quantized(body, row, block, acc, weights, planes, acc_done)
    else:
        weighted = _WeightedValues(acc, weights, planes.values)
        for g in range(group):
            for start in range(0, dim, VALUE_CHUNK):
                acc_done = weighted.add(body, row, block, (g, start), acc_done)
    end = acc_done.end(block.loop)
    acc, total = acc.after(end), total.after(end)
    g, d = body.loop(group), body.loop(dim)
    index = axis * (row.num_kv_heads * (group * dim)) + (head * group + g) * dim + d
    result = acc[g * dim + d].load() / total[g].load()
    return out[index].store(result if spec.value_unit == 1.0 else result * spec.value_unit).end(d, g)


def _start(body: Body, row: Row, head: UOp) -> tuple[UOp, UOp]:
    """The maxima and sums of weights [G] before the first block: nothing, or the heads' sinks."""
    spec, group = row.spec, row.spec.group
    best = body.registers(group)
    if row.tables.sinks is None:
        best = fill(body, best, LOWEST, row.row, head)
        return best, fill(body, body.registers(group), 0.0, row.row, head)
    g = body.loop(group)
    sink = row.tables.sinks[head * group + spec.first_head + g].load() * LOG2E
    best = best.after(best.after(row.row, head)[g].store(sink).end(g))
    return best, fill(body, body.registers(group), 1.0, row.row, head)


def _next_block(body: Body, row: Row, head: UOp) -> _Block:
    """A loop over the blocks that the row attends to."""
    spec, size = row.spec, row.spec.layout.block_size
    last, first = row.position // size, spec.first_key(row.position)
    if isinstance(first, UOp):
        loop = body.fold_while(last - first // size + 1)
        number = loop + (first // size).cast(loop.dtype)
    else:
        loop = number = body.fold_while(last + 1)
    block = row.block(number)
    return _Block(loop, number, row.head_place(block, head), row.head_start(block, head))


def _load_queries(body: Body, row: Row, head: UOp, keys: UOp) -> UOp:
    """G rotated queries in registers, times `Row.query_scale`."""
    spec = row.spec
    dim, scale = spec.head_dim, row.query_scale()
    scale = scale if spec.key_unit == 1.0 else scale * spec.key_unit
    query = body.registers(spec.group * dim)
    g = body.loop(spec.group)
    query_head = head * spec.group + g
    groups = []
    for pair in row.pairs(body):
        low, high = row.rotated(QUERIES, query_head, pair, row.head_scale(body, QUERIES, query_head, row.row, head, g))
        target = query.after(row.row, head, keys)
        stores = [target[g * dim + pair.low].store(low * scale), target[g * dim + pair.high].store(high * scale)]
        groups.append((UOp.group(*stores), pair.i))
    return query.after(_end_pairs(groups, g))


def _weigh(body: Body, row: Row, scores: UOp, block: _Block, best: UOp, total: UOp) -> tuple[UOp, UOp, UOp]:
    """One block's step of the online softmax: (weights [G][block_size], factors [G] by which earlier sums decay, the
    stores that updated `best` and `total`)."""
    spec = row.spec
    size, group = spec.layout.block_size, spec.group
    new_best, decay = body.registers(group), body.registers(group)
    stores = []
    for g in range(group):
        old = best.after(block.loop)[g].load()
        new = old.maximum(balanced([scores[g * size + x].load() for x in range(size)], lambda a, b: a.maximum(b)))
        stores += [new_best.after(block.loop)[g].store(new), decay.after(block.loop)[g].store(exp2(old - new))]
    found = UOp.group(*stores)
    new_best, decay = new_best.after(found), decay.after(found)
    weights = body.registers(group * size)
    g, x = body.loop(group), body.loop(size)
    weight = exp2(scores[g * size + x].load() - new_best[g].load())
    weights = weights.after(weights.after(block.loop)[g * size + x].store(weight).end(x, g))
    stores = []
    for g in range(group):
        added = balanced(weights[g * size + x].load() for x in range(size))
        stores.append(total.after(block.loop)[g].store(total.after(block.loop)[g].load() * decay[g].load() + added))
        stores.append(best.after(block.loop, weights)[g].store(new_best[g].load()))
    return weights, decay, UOp.group(*stores)


def _multiply_keys(body: Body, row: Row, query: UOp, keys: UOp, block: _Block, sums: UOp) -> UOp:
    """`sums` [G][block_size] plus the products of the queries with a block's keys."""
    spec = row.spec
    size, group = spec.layout.block_size, spec.group
    d = body.fold(spec.head_dim)
    inner = sums.after(d)
    queries = [query[g * spec.head_dim + d].load() for g in range(group)]
    x = body.loop(size)
    key = keys[block.base + d * size + x].load().cast(F32)
    stores = [inner[g * size + x].store(inner[g * size + x].load() + key * q) for g, q in enumerate(queries)]
    return sums.after(UOp.group(*stores).end(x, d))


def _scores(body: Body, row: Row, query: UOp, planes: PoolPlanes, block: _Block, ready: list[UOp]) -> UOp:
    """[G][block_size] scores of one block, LOWEST where the row does not attend. A key is loaded once for all G."""
    spec = row.spec
    size, group, form = spec.layout.block_size, spec.group, spec.kv.keys
    sums = fill(body, body.registers(group * size), 0.0, block.loop, query, *ready)
    if form.is_quantized:
        own = QuantizedBlock(form, planes.keys, planes.key_scales, block.place, spec.head_dim, size)
        sums = multiply_keys(body, own, query, sums, group)
    else:
        sums = _multiply_keys(body, row, query, planes.keys, block, sums)
    g, x = body.loop(group), body.loop(size)
    is_seen = spec.is_seen(block.number.cast(I32) * size + x, row.position)
    at = g * size + x
    return sums.after(sums[at].store(is_seen.where(spec.score(sums[at].load(), exp2), LOWEST)).end(x, g))


def _add_quantized(body: Body, row: Row, block: _Block, acc: UOp, weights: UOp, planes: PoolPlanes, done: UOp) -> UOp:
    """The stores that add a block's quantized values to the sums, after `done`."""
    spec, size = row.spec, row.spec.layout.block_size
    own = QuantizedBlock(spec.kv.values, planes.values, planes.value_scales, block.place, spec.head_dim, size)
    if own.scales is not None:
        last = row.position - block.number.cast(I32) * size
        weights = scale_weights(body, own, weights, last, spec.group, block.loop)
    return add_values(body, own, acc, weights, spec.group, done)


@dataclass(frozen=True)
class _WeightedValues:
    """The sums [G][D] that a block's values are added to by weights [G][block_size]."""

    acc: UOp
    weights: UOp
    values: UOp

    def add(self, body: Body, row: Row, block: _Block, place: tuple[int, int], done: UOp) -> UOp:
        """acc[g, start : start + VALUE_CHUNK] += sum over the block's tokens of weight * value, after `done`. `place`:
        (g, start)."""
        size, dim, (g, start) = row.spec.layout.block_size, row.spec.head_dim, place
        token = body.fold(size)
        inner = self.acc.after(done, token)
        weight = self.weights.after(done)[g * size + token].load()
        lane = body.loop(min(VALUE_CHUNK, dim - start))
        d = lane + start
        # slots after the row's own token may hold another sequence's NaN: their weights of almost 0 take its own value
        own = token.cast(I32).minimum(row.position - block.number.cast(I32) * size)
        value = self.values[block.base + own * dim + d].load().cast(F32)
        store = inner[g * dim + d].store(inner[g * dim + d].load() + value * weight)
        return store.end(lane, token)
