"""Decoding attention on devices with matrix units: RoPE, the KV write and flash-decoding in one kernel.

A threadgroup serves one token row, one KV head and one split of the context (Dao et al. 2023, "Flash-Decoding"). The
query heads that share the KV head, up to eight, are the rows of a matrix tile, so keys and values are loaded once for
all of them, straight into the fragments of the matrix unit. The row's own key and value are never read back: they are
the initial state of the online softmax (Milakov & Gimelshein 2018), unless another layer wrote them. So rows must each
be the last token of their sequence. Rows that verify drafts attend to each other: their keys and values are written by
another kernel first (`DecodeSpec.reads_own`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygrad import UOp
from tinygrad.dtype import DType

from tinyvllm.ops.attention_spec import KEYS, QUERIES
from tinyvllm.ops.gpu.attention_decode_combine import combine_warps
from tinyvllm.ops.gpu.attention_decode_row import Buffers, DecodeSpec, Row, Runs, make_threadgroup, take_buffers
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.gpu.attention_split import NOTHING, TILE_TOKENS
from tinyvllm.ops.kernel.body import F32, LOG2E, KernelFn, balanced, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import carry, dot

HALF_TILE = TILE_TOKENS // 2  # tokens that one instruction of the matrix unit scores


@cached_kernel
def decode_kernel(spec: DecodeSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, inputs, *tables, *qkv). With a split context, fn(split values, split sums, keys,
    ...) leaves the splits to the next operation (`SplitHeads` gives their shapes). Where the kernel combines them
    itself, fn(out, split values, split sums, arrivals, keys, ...): `arrivals` is T * K counters, 0 before and after."""

    def kernel(*operands: UOp) -> UOp:
        rest = list(operands)
        buffers = take_buffers(spec, rest)
        group = make_threadgroup(spec)
        row = Row(group, rest)
        context = _Context(row, buffers)
        # the tokens before this step's were written by earlier steps: their loads need not wait for its kernels
        early = context.load(0) if spec.loads_early else []
        written = () if spec.adds_own else (buffers.keys, buffers.values)  # perhaps by the previous kernel
        written = row.wait([value for tile in early for value in tile.loaded], written)
        if written:
            buffers = context.buffers = replace(buffers, keys=written[0], values=written[1])
        early = [tile.or_zeros(context.low < context.high) for tile in early]

        query = _load_query(row)
        own = _OwnToken(row, buffers, query) if spec.adds_own else None
        softmax = _Softmax(row, context, query, own)
        state, passes = softmax.start(), context.passes
        if early:
            state, passes = softmax.add(early, state), (passes - 1).maximum(0)
        skipped = int(bool(early))
        writes = [] if own is None else own.writes()
        outer = (*group.axes, *writes) if spec.is_wide else group.axes  # written first, which frees their registers
        state = carry(group.body, state, passes, outer, lambda i, old: softmax.add(context.load(i + skipped), old))
        stores = combine_warps(row, buffers, state)
        tokens, length = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        return finish(
            UOp.group(*writes, *stores).end(*reversed(group.axes)),
            f"decode_attention_{tokens}x{spec.num_heads}x{spec.head_dim}",
            ops=4 * tokens * spec.num_heads * spec.head_dim * length,
            nbytes=4 * tokens * spec.slot_elements * length,
        )

    return kernel


def _load_query(row: Row) -> Runs:
    """The lane's share of the row's query, rounded as an operand of the matrix unit."""
    spec = row.spec
    query_head = row.group.heads * spec.tile_heads + row.head % spec.tile_heads
    return _cast(row.rotated(QUERIES, query_head), spec.mma.dtype)


class _OwnToken:
    """The lane's share of the row's own key and value, rounded as they are stored."""

    def __init__(self, row: Row, buffers: Buffers, query: Runs) -> None:
        stored = buffers.keys.dtype
        self.row, self.buffers, self.query = row, buffers, query
        self.key = _cast(row.rotated(KEYS, row.group.kv_head), stored)
        self.value = [[v.cast(stored) for v in span] for span in row.value()]

    def writes(self) -> list[UOp]:
        """Stores of the key and the value at the row's slot."""
        row, group = self.row, self.row.group
        is_writer = group.has_own_token & row.head.eq(0)
        if row.spec.tile_heads < row.spec.group:
            is_writer = is_writer & group.is_first_of_kv_head
        key_runs = [
            (d, is_writer if ok is None else is_writer & ok, run)
            for dims, runs in zip(row.query_dims, self.key, strict=True)
            for (d, ok), run in zip(dims, runs, strict=True)
        ]
        value_runs = [(d, is_writer, span) for d, span in zip(row.value_dims, self.value, strict=True)]
        return [
            pool[(row.own_start + d + i).valid(is_wanted)].store(v)
            for pool, runs in ((self.buffers.keys, key_runs), (self.buffers.values, value_runs))
            for d, is_wanted, run in runs
            for i, v in enumerate(run)
        ]

    def score(self) -> UOp:
        """The own token's score for the lane's head."""
        spec = self.row.spec
        product = spec.lanes.sum(dot(_flat(self.query), _flat(self.key)), spec.mma.row_masks)
        return spec.score(product * self.row.query_scale, lambda x: x.exp2())


def _cast(runs: Runs, dtype: DType) -> Runs:
    return [[[v.cast(dtype) for v in run] for run in chunk] for chunk in runs]


def _flat(runs: Runs) -> list[UOp]:
    return [v.cast(F32) for chunk in runs for run in chunk for v in run]


# -- the context -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """The lane's fragments of the 16 tokens from `first` on."""

    first: UOp
    is_used: UOp  # whether the tile begins before the split's end; if not, it holds other tokens of the context
    keys: list[Runs]  # by half tile; a head's runs as an operand of the matrix unit
    values: list[list[UOp]]  # by token; [] if they are loaded after the keys have been used
    base: UOp  # where the first token's keys and values begin

    @property
    def loaded(self) -> list[UOp]:
        keys = [value for half in self.keys for chunk in half for run in chunk for value in run]
        return keys + [value for run in self.values for value in run]

    def or_zeros(self, has_tokens: UOp) -> _Tile:
        """The tile, with zeros for values if its split has no tokens: what was loaded may be NaN then."""
        return replace(self, values=[[has_tokens.where(v, v.const_like(0.0)) for v in run] for run in self.values])


def existing_tile(low: UOp | int, high: UOp) -> UOp | int:
    """Where a tile of the context begins that a split [low, high) may read in place of its own: its first, or if it has
    no tokens the context's last. A whole tile, since the keys of all its tokens are loaded, which must lie in one
    block."""
    return low if isinstance(low, int) else low.minimum((high - 1).maximum(0)) // TILE_TOKENS * TILE_TOKENS


class _Context:
    """The threadgroup's split of the row's context, tokens [low, high), which its warps read in passes of a few tiles
    each."""

    def __init__(self, row: Row, buffers: Buffers) -> None:
        spec, split, index = row.spec, row.spec.split, row.group.split
        self.row, self.buffers = row, buffers
        span = split.span(split.shared(row.past))
        self.low = index * span if spec.window is None else index * span + split.start(row.past)
        self.high = (self.low + span).minimum(row.end) if spec.is_split else row.end
        per_pass = spec.num_warps * spec.tiles_ahead
        tiles = ((self.high - self.low).maximum(0) + (TILE_TOKENS - 1)) // TILE_TOKENS
        self.passes = (tiles + (per_pass - 1)) // per_pass

    def load(self, iteration: UOp | int) -> list[_Tile]:
        """The warp's tiles of a pass."""
        spec, warp = self.row.spec, self.row.group.warp
        numbers = [(iteration * spec.tiles_ahead + i) * spec.num_warps + warp for i in range(spec.tiles_ahead)]
        return [self._load_tile(self.low + number * TILE_TOKENS) for number in numbers]

    def _load_tile(self, wanted: UOp) -> _Tile:
        """The tile that begins at token `wanted`, or any of the context's if the split ends before."""
        row, spec = self.row, self.row.spec
        is_used = wanted < self.high
        first = is_used.where(wanted, existing_tile(self.low, self.high))
        size = spec.layout.block_size
        block = clamp(row.inputs[row.table + first // size].load(), 0, spec.num_blocks - 1)
        base = (block * size + first % size) * spec.slot_elements + row.group.kv_head * spec.head_dim
        tile = _Tile(first, is_used, self._load_keys(base), [], base)
        return tile if spec.is_wide else replace(tile, values=self.load_values(tile))

    def _load_keys(self, base: UOp) -> list[Runs]:
        """The lane's keys of a tile whose first key is at `base`."""
        spec, mma, lane = self.row.spec, self.row.spec.mma, self.row.group.lane
        places = [(lane // 4, lane % 4)] if mma.kind == "CUDA" else mma.row_runs(lane)

        def chunk(n: int, c: int) -> list[list[UOp]]:
            # of a dimension that does not exist any other's: the query has a zero there
            starts = [
                base
                + (n * HALF_TILE + token) * spec.slot_elements
                + spec.bounded(slot * RUN + c * spec.chunk_dims, c)[0]
                for token, slot in places
            ]
            return [self._load(self.buffers.keys, start, RUN) for start in starts]

        return [[chunk(n, c) for c in range(spec.chunks)] for n in range(2)]

    def load_values(self, tile: _Tile, *after: UOp) -> list[list[UOp]]:
        """The lane's values of a tile."""
        row, spec, lane = self.row, self.row.spec, self.row.group.lane
        if spec.mma.kind == "CUDA":
            tokens = [lane % 4 * 2 + a + HALF_TILE * h for h in range(2) for a in range(2)]
            dims = [lane // 4 * (spec.head_dim // RUN)] * 4
        else:
            tokens = [row.head, row.head, row.head + HALF_TILE, row.head + HALF_TILE]
            dims = [*row.value_dims, *row.value_dims]
        # slots after the split's last token may hold another sequence's NaN, and a weight of 0 would not erase it
        last = (self.high - 1 - tile.first).maximum(0)
        pool = self.buffers.values.after(*after) if after else self.buffers.values
        return [
            self._load(pool, tile.base + token.minimum(last) * spec.slot_elements + dim, spec.head_dim // RUN)
            for token, dim in zip(tokens, dims, strict=True)
        ]

    def _load(self, pool: UOp, at: UOp, count: int) -> list[UOp]:
        return [pool[at + i].load().cast(self.row.spec.mma.dtype) for i in range(count)]


class _Softmax:
    """A warp's online softmax. Its state, for the lane's head: the maximum score, the lane's share of the sum of
    weights, and the lane's sums of weighted values (`Row.value_dims`)."""

    def __init__(self, row: Row, context: _Context, query: Runs, own: _OwnToken | None) -> None:
        self.row, self.context, self.query, self.own = row, context, query, own

    def start(self) -> list[UOp]:
        """The state before the context: the row's own token and the head's sink in one warp, nothing in the others."""
        row, own, is_first = self.row, self.own, self.row.group.has_own_token
        size = row.spec.head_dim // RUN
        zero, one, nothing = (UOp.const(v, F32) for v in (0.0, 1.0, NOTHING))
        best, total, values = nothing, zero, [zero] * (2 * size)
        if own is not None:
            best, total, values = own.score(), one, [span[i].cast(F32) for i in range(size) for span in own.value]
        if row.tables.sinks is not None:
            head = row.group.heads * row.spec.tile_heads + row.head % row.spec.tile_heads
            sink = row.tables.sinks[head].load() * LOG2E
            top = best.maximum(sink)
            decay = (best - top).exp2()
            best, total = top, total * decay + (sink - top).exp2()
            values = [value * decay for value in values]
        leads = row.column.eq(0)  # only one lane of each head counts them
        return [
            is_first.where(best, nothing),
            (is_first & leads).where(total, zero),
            *[is_first.where(value, zero) for value in values],
        ]

    def add(self, tiles: list[_Tile], old: list[UOp]) -> list[UOp]:
        """The state after a pass."""
        spec, (best, total, *acc) = self.row.spec, old
        scores = [self._scores(tile, half) for tile in tiles for half in range(2)]
        top = balanced([v for pair in scores for v in pair], lambda a, b: a.maximum(b))
        new_best = best.maximum(spec.lanes.maximum(top, spec.mma.row_masks))
        decay = (best - new_best).exp2()
        zero = UOp.const(0.0, F32)
        weights = [[(v > NOTHING / 10).where((v - new_best).exp2(), zero) for v in pair] for pair in scores]
        new_total = total * decay + balanced([w for pair in weights for w in pair])
        rounded = [[w.cast(spec.mma.dtype) for w in pair] for pair in weights]
        if spec.is_wide:
            tiles, rounded = self._load_values(tiles, rounded)
        new = []
        for j in range(spec.head_dim // RUN):
            sums = [acc[j * 2] * decay, acc[j * 2 + 1] * decay]
            for i, tile in enumerate(tiles):
                sums = _add_values(spec, rounded[2 * i : 2 * i + 2], [run[j] for run in tile.values], sums)
            new += sums
        return [new_best, new_total, *new]

    def _load_values(self, tiles: list[_Tile], weights: list[list[UOp]]) -> tuple[list[_Tile], list[list[UOp]]]:
        """(tiles with their values, which are loaded after their weights are known, the weights)."""
        flat = [w for pair in weights for w in pair]
        held = self.row.group.body.registers(len(flat), self.row.spec.mma.dtype)
        held = held.after(UOp.group(*[held[i].store(w) for i, w in enumerate(flat)]))
        loaded = [replace(tile, values=self.context.load_values(tile, held)) for tile in tiles]
        return loaded, [[held[i].load(), held[i + 1].load()] for i in range(0, len(flat), 2)]

    def _scores(self, tile: _Tile, half: int) -> list[UOp]:
        """The scores of the lane's two tokens of half a tile."""
        products = _multiply_keys(self.row.spec, self.query, tile.keys[half])
        tokens = [tile.first + half * HALF_TILE + self.row.column + e for e in range(2)]
        return [self._score(tile, token, product) for token, product in zip(tokens, products, strict=True)]

    def _score(self, tile: _Tile, token: UOp, product: UOp) -> UOp:
        """A token's score; NOTHING if the row does not attend to it here."""
        spec = self.row.spec
        is_seen = tile.is_used & (token < self.context.high)
        if spec.window is not None:
            is_seen = is_seen & (token >= spec.first_key(self.row.past))
        score = spec.score(product * self.row.query_scale, lambda x: x.exp2())
        return is_seen.where(score, UOp.const(NOTHING, F32))


def _multiply_keys(spec: DecodeSpec, query: Runs, keys: Runs) -> list[UOp]:
    """q . k of the lane's head and two tokens of the eight."""
    mma = spec.mma
    sums = UOp.stack(*[UOp.const(0.0, F32)] * mma.elements)
    zero = UOp.const(0.0, mma.dtype)
    for q, k in zip(query, keys, strict=True):
        if mma.kind == "METAL":
            for i in range(RUN):
                sums = mma.tile((q[0][i], q[1][i]), (k[0][i], k[1][i]), sums)
        else:  # heads fill half of a tile's 16 rows
            for i in range(0, RUN, 4):
                left = (*q[0][i : i + 2], zero, zero, *q[0][i + 2 : i + 4], zero, zero)
                sums = mma.tile(left, k[0][i : i + 4], sums)
    return [sums.index(e) for e in range(2)]


def _add_values(spec: DecodeSpec, weights: list[list[UOp]], values: list[UOp], sums: list[UOp]) -> list[UOp]:
    """sums + weights (8 heads x 16 tokens) @ values. A lane's scores are placed as the operand needs its weights."""
    mma = spec.mma
    zero = UOp.const(0.0, mma.dtype)
    if mma.kind == "METAL":
        acc = UOp.stack(*sums)
        for n in range(2):
            acc = mma.tile(weights[n], values[2 * n : 2 * n + 2], acc)
    else:
        left = (*weights[0], zero, zero, *weights[1], zero, zero)
        acc = mma.tile(left, values, UOp.stack(*sums, *[UOp.const(0.0, F32)] * 2))
    return [acc.index(e) for e in range(2)]
