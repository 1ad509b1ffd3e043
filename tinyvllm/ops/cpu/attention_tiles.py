"""Paged attention on the CPU device: a tile of rows of one sequence against its blocks.

A few blocks' keys and values become float32 on the stack at a time, and all queries of a tile read them there: the
query heads that share the KV head, of up to MOST_ROWS neighboring rows of a sequence. Both products handle so many
queries at once that their sums fill the vector registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import QUERIES, PoolPlanes
from tinyvllm.ops.cpu.attention import CpuAttentionSpec, Row, finish_attention
from tinyvllm.ops.cpu.attention_quantized import QuantizedBlock, stage_keys, stage_values
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
)

MOST_ROWS, MOST_QUERIES = 16, 48  # of a tile, which stays in the first-level cache with its blocks
STAGED_TOKENS = 32  # whose keys and values are on the stack at once, unless a block has more
LANES = 16
MOST_AT_ONCE = 7  # queries of a pass: with 16 lanes each, 14 of AVX2's 16 registers
LEAST_AT_ONCE = 4  # vectors of sums, so that additions need not wait for one another


def tile_rows(spec: CpuAttentionSpec) -> int:
    """The rows of a tile, at most."""
    return max(1, min(spec.layout.num_tokens, MOST_ROWS, MOST_QUERIES // spec.group))


def queries_at_once(group: int) -> int:
    """How many queries a pass over staged keys (or values) multiplies: a divisor of the G of a row, so that none is
    there for nothing."""
    return next(n for n in range(MOST_AT_ONCE, 0, -1) if group % n == 0)


@cached_kernel
def tile_attention_kernel(spec: CpuAttentionSpec, tokens: int) -> KernelFn:
    """fn(out (T, H * D), *planes of the pool, inputs, *tables, *qkv[read_parts]): causal attention of each row over its
    own blocks, to which `write_kv_kernel` has written. Neighboring rows of a sequence share them. `tokens`: T; the rows
    after the step's own, up to the layout's, have another sequence (`InputPacker.clear`).

    Online softmax by some blocks at a time (Milakov & Gimelshein 2018). A tile's cost depends on its own context, or on
    its window."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        body, rest = Body(), list(operands)
        planes, inputs = spec.take_planes(rest), rest.pop(0)
        # the rows are the only GLOBAL axis (each is one command of a worker): codegen cannot put a loop whose length is
        # data into a LOOP axis that the length depends on
        axis = body.grid(tokens)

        def row(index: UOp) -> Row:
            return Row(spec, index, inputs, rest, spec.read_parts, with_sinks=True)

        head = body.loop_up_to(row(axis).num_kv_heads)
        tile = _Tile.starting_at(spec, axis, inputs)
        stores = _Attention(body, tile, row, head, planes).store(out)
        return finish_attention(spec, tokens, stores.end(head, axis))

    return kernel


@dataclass(frozen=True)
class _Tile:
    """Rows [first, first + count) of one sequence. `count` is 0 if another tile has the row `first`."""

    first: UOp
    count: UOp

    @classmethod
    def starting_at(cls, spec: CpuAttentionSpec, row: UOp, inputs: UOp) -> _Tile:
        """A tile begins at each sequence's first row, and at multiples of `tile_rows`."""
        most, tokens, seqs = tile_rows(spec), spec.layout.num_tokens, spec.layout.offset("seq_rows")
        own = inputs[seqs + row].load()
        count: UOp = UOp.const(1, I32)
        follows: UOp = UOp.const(1, I32)
        for i in range(1, most):
            other = inputs[seqs + (row + i).minimum(tokens - 1)].load()
            is_next = (own.eq(other)) & (row % most + i < most) & (row + i < tokens)
            follows = is_next.where(follows, 0)
            count = count + follows
        before = inputs[seqs + (row - 1).maximum(0)].load()
        begins = (row % most).eq(0) | own.ne(before)
        return cls(row, begins.where(count, 0))

    @property
    def last(self) -> UOp:
        """The last row."""
        return self.first + (self.count - 1).maximum(0)

    def row(self, index: UOp) -> UOp:
        """The index-th row, at most the last one."""
        return (self.first + index).minimum(self.last)


@dataclass(frozen=True)
class _Staged:
    """Some blocks of the tile's context as float32 on the stack: keys [blocks][D][block_size], values [tokens][D]."""

    loop: UOp  # over as many blocks at a time
    first: UOp  # the number in the sequence of the first block
    keys: UOp
    values: UOp


@dataclass(frozen=True)
class _Sums:
    """What a tile's queries carry from blocks to blocks: the maxima, the sums of weights [lanes], and of weighted
    values [D]."""

    best: UOp
    total: UOp
    acc: UOp

    def after(self, *stores: UOp) -> _Sums:
        return _Sums(self.best.after(*stores), self.total.after(*stores), self.acc.after(*stores))


class _Attention:
    """A tile's attention to one KV head. Query i is query head i % G of the tile's row i // G."""

    def __init__(self, body: Body, tile: _Tile, row: Callable[[UOp], Row], head: UOp, planes: PoolPlanes) -> None:
        self.body, self.tile, self.row, self.head, self.planes = body, tile, row, head, planes
        self.spec = spec = row(tile.first).spec
        self.size, self.dim, self.group = spec.layout.block_size, spec.head_dim, spec.group
        most = tile_rows(spec) * spec.group
        self.at_once = queries_at_once(self.group)
        self.most_queries = most
        self.passes = tile.count * (self.group // self.at_once)
        self.most_blocks = max(1, STAGED_TOKENS // self.size)
        self.stride = self.most_blocks * self.size  # of a query's scores
        self.lanes = gcd(self.size, LANES)

    def store(self, out: UOp) -> UOp:
        """The stores of the tile's rows."""
        query, sums = self._start()
        staged = self._stage(query, sums)
        scores = self._scores(query, staged, sums)
        weights, weighed = self._weigh(scores, staged, sums)
        end = self._add_values(weights, staged, sums.acc.after(weighed)).end(staged.loop)
        sums = sums.after(end)
        q, d = self.body.fold_while(self.tile.count * self.group), self.body.loop(self.dim)
        total = balanced(sums.total[q * self.lanes + lane].load() for lane in range(self.lanes))
        head = self.head * self.group + q % self.group
        num_heads = self.row(self.tile.first).num_kv_heads * self.group
        at = ((self.tile.first + q // self.group) * num_heads + head) * self.dim + d
        result, unit = sums.acc[q * self.dim + d].load() / total, self.spec.value_unit
        return out[at].store(result if unit == 1.0 else result * unit).end(d, q)

    def _row_of(self, query: UOp) -> UOp:
        return self.tile.row(query // self.group)

    def _position(self, query: UOp) -> UOp:
        return self.row(self._row_of(query)).position

    def _start(self) -> tuple[UOp, _Sums]:
        """The rotated queries, times `Row.query_scale`, and the sums before the first block: nothing, or the sinks."""
        body, spec, dim, most = self.body, self.spec, self.dim, self.most_queries
        q = self.body.fold_while(self.passes * self.at_once)
        own, head = self.row(self._row_of(q)), self.head * self.group + q % self.group
        scale = own.query_scale()
        scale = scale if spec.key_unit == 1.0 else scale * spec.key_unit
        query, best, total = body.registers(most * dim), body.registers(most), body.registers(most * self.lanes)
        target, groups = query.after(self.tile.first, self.head, q, *self.planes.all), []
        for pair in own.pairs(body):
            low, high = own.rotated(QUERIES, head, pair, own.head_scale(body, QUERIES, head, self.head, q))
            stores = [target[q * dim + pair.low].store(low * scale), target[q * dim + pair.high].store(high * scale)]
            groups.append(UOp.group(*stores).end(pair.i))
        sinks = own.tables.sinks
        sink = LOWEST if sinks is None else sinks[head + spec.first_head].load() * LOG2E
        groups.append(best.after(self.head, q)[q].store(sink))
        lane = body.loop(self.lanes)
        weight = 0.0 if sinks is None else 1.0 / self.lanes
        groups.append(total.after(self.head, q)[q * self.lanes + lane].store(weight).end(lane))
        acc, d = body.registers(most * dim), body.loop(dim)
        groups.append(acc.after(self.head, q)[q * dim + d].store(0.0).end(d))
        done = UOp.group(*groups).end(q)
        return query.after(done), _Sums(best, total, acc).after(done)

    def _stage(self, query: UOp, sums: _Sums) -> _Staged:
        """The loop over the blocks that the tile attends to, some at a time, and their keys and values."""
        body, spec, size, dim, most = self.body, self.spec, self.size, self.dim, self.most_blocks
        first_row = self.row(self.tile.first)
        last = self.row(self.tile.last).position
        first = spec.first_key(first_row.position) // size
        num_blocks = last // size - first + 1
        num_blocks = (self.tile.count > 0).where(num_blocks, 0)
        loop = body.fold_while((num_blocks + (most - 1)) // most)
        start = loop * most + (first.cast(I32) if isinstance(first, UOp) else first)
        block = body.fold(most)
        number = (start + block).minimum(last // size)  # what is after the last block is masked
        place = first_row.head_place(first_row.block(number), self.head)
        keys, values = body.registers(most * dim * size), body.registers(most * size * dim)
        at, order = block * (dim * size), (loop, block, query, sums.best, sums.total, sums.acc)
        own = last.cast(I32) - number * size
        stores = [
            self._stage_keys(place, keys.after(*order), at),
            self._stage_values(place, values.after(*order), at, own),
        ]
        done = UOp.group(*stores).end(block)
        return _Staged(loop, start, keys.after(done), values.after(done))

    def _stage_keys(self, place: UOp, staged: UOp, start: UOp) -> UOp:
        planes, form, count = self.planes, self.spec.kv.keys, self.dim * self.size
        if form.is_quantized:
            own = QuantizedBlock(form, planes.keys, planes.key_scales, place, self.dim, self.size)
            return stage_keys(self.body, own, staged, start)
        i = self.body.loop(count)
        return staged[start + i].store(planes.keys[place * count + i].load().cast(F32)).end(i)

    def _stage_values(self, place: UOp, staged: UOp, start: UOp, last: UOp) -> UOp:
        """Tokens after `last` take its value: their slots may hold another sequence's NaN."""
        planes, form, dim = self.planes, self.spec.kv.values, self.dim
        if form.is_quantized:
            own = QuantizedBlock(form, planes.values, planes.value_scales, place, dim, self.size)
            return stage_values(self.body, own, staged, start, last)
        token, d = self.body.loop(self.size), self.body.loop(dim)
        at = place * (dim * self.size) + token.cast(I32).minimum(last) * dim + d
        return staged[start + token * dim + d].store(planes.values[at].load().cast(F32)).end(d, token)

    def _scores(self, query: UOp, staged: _Staged, sums: _Sums) -> UOp:
        """Each query's scores [stride] of the staged keys."""
        dim, size, at_once, stride, lanes = self.dim, self.size, self.at_once, self.stride, self.lanes
        each, part = self.body.fold_while(self.passes), self.body.fold(stride // lanes)
        token = part * lanes
        scores = self.body.registers(self.most_queries * stride)
        target = scores.after(staged.loop, sums.best)[each * (at_once * stride) + token]
        keys = staged.keys[token // size * (dim * size) + token % size]
        product = _Product(at_once, lanes, dim, (stride, dim, size), adds=False)
        return scores.after(product.statement(target, query[each * (at_once * dim)], keys).end(part, each))

    def _weigh(self, scores: UOp, staged: _Staged, sums: _Sums) -> tuple[UOp, UOp]:
        """The scores become weights: (weights, the stores that brought the sums up to date).

        A loop over the queries for each step, since within a query each waits for the one before."""
        body, lanes, stride, most = self.body, self.lanes, self.stride, self.most_queries
        scores, peaks = self._peaks(scores, staged)
        new, decay = body.registers(most), body.registers(most)
        q = self.body.fold_while(self.passes * self.at_once)
        peak = balanced([peaks[q * lanes + lane].load() for lane in range(lanes)], lambda a, b: a.maximum(b))
        best = sums.best.after(staged.loop)
        new = new.after(new.after(staged.loop)[q].store(best[q].load().maximum(peak)).end(q))
        q = self.body.fold_while(self.passes * self.at_once)
        stores = [
            decay.after(staged.loop)[q].store(exp2(best[q].load() - new[q].load())),
            best.after(new)[q].store(new[q].load()),
        ]
        decay = decay.after(UOp.group(*stores).end(q))
        q, x = self.body.fold_while(self.passes * self.at_once), body.loop(stride)
        at = q * stride + x
        weights = scores.after(scores.after(decay)[at].store(exp2(scores[at].load() - new[q].load())).end(x, q))
        return weights, self._decay(weights, decay, staged, sums)

    def _peaks(self, scores: UOp, staged: _Staged) -> tuple[UOp, UOp]:
        """The scores, LOWEST where a query's row does not attend, and each query's largest ones [lanes]."""
        body, spec, lanes = self.body, self.spec, self.lanes
        peaks = body.registers(self.most_queries * lanes)
        q, lane = body.fold_while(self.passes * self.at_once), body.loop(lanes)
        position, values, stores = self._position(q), [], []
        for start in range(0, self.stride, lanes):
            place = scores[q * self.stride + start + lane]
            is_seen = spec.is_seen(staged.first * self.size + start + lane, position)
            values.append(is_seen.where(spec.score(place.load(), exp2), LOWEST))
            stores.append(place.store(values[-1]))
        peak = balanced(values, lambda a, b: a.maximum(b))
        done = UOp.group(*stores, peaks.after(staged.loop)[q * lanes + lane].store(peak)).end(lane, q)
        return scores.after(done), peaks.after(done)

    def _decay(self, weights: UOp, decay: UOp, staged: _Staged, sums: _Sums) -> UOp:
        """The stores by which earlier sums decay, and the weights are added to theirs."""
        body, lanes, dim = self.body, self.lanes, self.dim
        q, lane, d = self.body.fold_while(self.passes * self.at_once), body.loop(lanes), body.loop(dim)
        acc, total = sums.acc.after(staged.loop, weights), sums.total.after(staged.loop, weights)
        own = [weights[q * self.stride + start + lane].load() for start in range(0, self.stride, lanes)]
        added = total[q * lanes + lane].load() * decay[q].load() + balanced(own)
        return UOp.group(
            total[q * lanes + lane].store(added).end(lane),
            acc[q * dim + d].store(acc[q * dim + d].load() * decay[q].load()).end(d),
        ).end(q)

    def _add_values(self, weights: UOp, staged: _Staged, acc: UOp) -> UOp:
        """The stores that add the staged values to the sums, by the queries' weights."""
        dim, at_once, lanes = self.dim, self.at_once, gcd(self.dim, LANES)
        each, column = self.body.fold_while(self.passes), self.body.fold(dim // lanes)
        product = _Product(at_once, lanes, self.stride, (dim, self.stride, dim), adds=True)
        target = acc.after(staged.loop)[each * (at_once * dim) + column * lanes]
        factors = weights[each * (at_once * self.stride)]
        return product.statement(target, factors, staged.values[column * lanes]).end(column, each)


@dataclass(frozen=True)
class _Product:
    """out[i][lane] (+)= sum over k of a[i][k] * b[k][lane] in C, whose sums stay in vector registers. `strides`: of a
    row of out, of a and of b."""

    rows: int
    lanes: int
    count: int
    strides: tuple[int, int, int]
    adds: bool

    def statement(self, out: UOp, a: UOp, b: UOp) -> UOp:
        of_out, of_a, of_b = self.strides
        rows, steps = range(self.rows), range(gcd(self.count, -(-LEAST_AT_ONCE // self.rows)))
        sums = [f"s{i}_{step}" for i in rows for step in steps]
        lines = [
            "{{",
            f"typedef float lanes __attribute__((vector_size({4 * self.lanes})));",
            "typedef lanes lanes_at __attribute__((aligned(4), may_alias));",
            f"lanes {', '.join(f'{name} = {{{{}}}}' for name in sums)};",
            f"for (int k = 0; k < {self.count}; k += {len(steps)}) {{{{",
        ]
        for step in steps:
            lines.append(f"  const lanes b{step} = *(const lanes_at*)({{2}} + (k + {step}) * {of_b});")
            lines += [f"  s{i}_{step} += b{step} * {{1}}[k + {i * of_a + step}];" for i in rows]
        lines.append("}}")
        for i in rows:
            before = f"*(lanes_at*)({{0}} + {i * of_out}) + " if self.adds else ""
            total = " + ".join(f"s{i}_{step}" for step in steps)
            lines.append(f"*(lanes_at*)({{0}} + {i * of_out}) = {before}({total});")
        return UOp(Ops.CUSTOM, dtypes.void, src=(out, a, b), arg="\n".join([*lines, "}}"]))
