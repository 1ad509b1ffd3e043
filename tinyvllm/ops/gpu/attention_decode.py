"""Decoding attention on devices with matrix units: RoPE, the KV write and flash-decoding in one kernel.

A threadgroup serves one token row, one KV head and one split of the context (Dao et al. 2023, "Flash-Decoding"). The
query heads that share the KV head, up to eight, are the rows of a matrix tile, so keys and values are loaded once for
all of them, straight into the fragments of the matrix unit. The row's own key and value are never read back: they are
the initial state of the online softmax (Milakov & Gimelshein 2018), unless another layer wrote them. So rows must each
be the last token of their sequence. Rows that verify drafts attend to each other: their keys and values are written by
another kernel first (`DecodeSpec.reads_own`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import KEYS, QUERIES
from tinyvllm.ops.gpu.attention_decode_codes import (
    HALF_TILE,
    key_words,
    load_keys,
    load_values,
    multiply_heads,
    own_key,
    own_value,
    query_words,
    value_words,
)
from tinyvllm.ops.gpu.attention_decode_combine import StagedOwn, combine_warps
from tinyvllm.ops.gpu.attention_decode_row import Buffers, DecodeSpec, Row, Runs, make_threadgroup, take_buffers
from tinyvllm.ops.gpu.attention_decode_stage import HeadStage, StagedHeads
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.gpu.attention_split import NOTHING, TILE_TOKENS
from tinyvllm.ops.gpu.kv_codes import StoredHeads
from tinyvllm.ops.kernel.body import F32, LOG2E, U16, U32, KernelFn, balanced, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.hopper import share_multiprocessor
from tinyvllm.ops.kernel.lanes import LANES, carry, dot, hold, zeros
from tinyvllm.ops.kernel.tiles import pack_words, together

FENCE = 'asm volatile("" ::: "memory");'  # the compiler moves no load from after it to before, nor back


@cached_kernel
def decode_kernel(spec: DecodeSpec) -> KernelFn:
    """fn(out (T, H * D), *planes of the pool, inputs, *tables, *qkv). With a split context, fn(split values, split
    sums, *planes, ...) leaves the splits to the next operation (`SplitHeads` gives their shapes). Where the kernel
    combines them itself, fn(out, split values, split sums, arrivals, *planes, ...): `arrivals` is T * K counters, 0
    before and after."""

    def kernel(*operands: UOp) -> UOp:
        rest = list(operands)
        buffers = take_buffers(spec, rest)
        group = make_threadgroup(spec)
        row = Row(group, rest)
        context = _Context(row, buffers)
        # the tokens before this step's were written by earlier steps: their loads need not wait for its kernels
        early = context.load(0) if spec.loads_early else []
        stage = HeadStage(row) if spec.stages_heads else None
        loaded = [*(stage.ahead if stage else []), *[value for tile in early for value in tile.loaded]]
        if spec.adds_own:
            row.wait(loaded)
        else:  # the previous kernel may have written them
            keys, values = buffers.keys, buffers.values
            planes = row.wait(loaded, [*keys.planes, *values.planes])
            count = len(keys.planes)
            keys, values = keys.with_planes(planes[:count]), values.with_planes(planes[count:])
            buffers = context.buffers = replace(buffers, keys=keys, values=values)
        if not spec.in_words(spec.kv.values):  # words are zeros if the tile is not used
            early = [tile.or_zeros(context.low < context.high) for tile in early]

        softmax, own, writes = _begin(row, buffers, context, stage)
        state, passes = softmax.start(), context.passes
        if early:
            state, passes = softmax.add(early, state), (passes - 1).maximum(0)
        skipped = int(bool(early))
        has_words = spec.in_words(spec.kv.keys) or spec.in_words(spec.kv.values)
        writes_first = spec.loads_values_late or has_words  # frees their registers
        outer = (*group.axes, *writes) if writes_first else group.axes
        if spec.fetches_ahead:
            state = _walk_ahead(softmax, context, state, passes, skipped, outer)
        else:
            state = carry(group.body, state, passes, outer, lambda i, old: softmax.add(context.load(i + skipped), old))
        stores = combine_warps(row, buffers, state, own)
        tokens, length = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        done = UOp.group(*writes, *stores)
        if spec.resident:
            done = together(done, share_multiprocessor(spec.resident))
        return finish(
            done.end(*reversed(group.axes)),
            f"decode_attention_{tokens}x{spec.num_heads}x{spec.head_dim}",
            ops=4 * tokens * spec.num_heads * spec.head_dim * length,
            nbytes=tokens * spec.kv.num_bytes(spec.slot_elements) * length,
        )

    return kernel


def _begin(
    row: Row, buffers: Buffers, context: _Context, stage: HeadStage | None
) -> tuple[_Softmax, StagedOwn | None, list[UOp]]:
    """(the softmax; the row's own token, unless it is in the softmax's first state; stores of it)."""
    if stage is None:
        query = _Query.of(row)
        own = _OwnToken(row, buffers, query) if row.spec.adds_own else None
        return _Softmax(row, context, query, own), None, [] if own is None else own.writes
    softmax = _Softmax(row, context, stage.store(buffers))
    if not row.spec.adds_own:
        return softmax, None, []
    staged = softmax.staged_own()
    return softmax, staged, [staged.store]


def _walk_ahead(
    softmax: _Softmax, context: _Context, state: list[UOp], passes: UOp, skipped: int, outer: Sequence[UOp]
) -> list[UOp]:
    """The state after `passes` passes from number `skipped` on. The codes of the next pass, as floats of the same bits,
    are carried along with the state."""
    first = context.load(skipped)
    begun = [as_float(value) for tile in first for value in tile.leaves]

    def step(i: UOp | int, old: list[UOp]) -> list[UOp]:
        ahead = context.load(i + (skipped + 1))
        # they are on their way before the first use of those that are here
        started = UOp(Ops.CUSTOM, dtypes.void, src=tuple(v for tile in ahead for v in tile.loaded), arg=FENCE)
        held = iter([UOp(Ops.CUSTOMI, F32, src=(value, started), arg="{0}") for value in old[len(state) :]])
        places = [context.place(number) for number in context.numbers(i + skipped)]
        tiles = [tile.at(*place, held) for tile, place in zip(ahead, places, strict=True)]
        new = softmax.add(tiles, old[: len(state)])
        return [*new, *[as_float(value) for tile in ahead for value in tile.leaves]]

    return carry(softmax.row.group.body, [*state, *begun], passes, outer, step)[: len(state)]


@dataclass(frozen=True)
class _Query:
    """The lane's share of the row's query, rounded as an operand of the matrix unit."""

    row: Row
    runs: Runs
    staged: UOp | None  # the same in threadgroup memory, where registers do not hold it

    @classmethod
    def of(cls, row: Row) -> _Query:
        spec = row.spec
        query_head = row.group.heads * spec.tile_heads + row.head % spec.tile_heads
        runs = row.rounded(QUERIES, query_head, spec.mma.dtype)
        if not spec.takes_parts:
            return cls(row, runs, None)
        memory, warp, stores = row.group.body.shared(spec.query_size, spec.mma.dtype), row.group.warp, []
        for c, chunk in enumerate(runs):
            places = [_staged_place(row, c) + i for i in range(2 * RUN)]
            wanted = [place.valid(warp.eq(0)) if isinstance(warp, UOp) else place for place in places]
            values = [value for pair in zip(*chunk, strict=True) for value in pair]  # neighbors are an operand
            stores += [memory[place].store(value) for place, value in zip(wanted, values, strict=True)]
        staged = memory.after(UOp(Ops.BARRIER, src=(UOp.group(*stores),)))
        row.load_after(staged)
        query = cls(row, [], staged)
        return replace(query, runs=[query.chunk(c) for c in range(spec.chunks)])

    def chunk(self, c: int, *after: UOp) -> list[list[UOp]]:
        """The runs of a chunk; if they are in threadgroup memory, loaded after `after`."""
        if self.staged is None:
            return self.runs[c]
        staged = self.staged.after(*after) if after else self.staged
        values = [staged[_staged_place(self.row, c) + i].load() for i in range(2 * RUN)]
        return [values[0::2], values[1::2]]


def _staged_place(row: Row, c: int) -> UOp:
    """Where the lane's two runs of a chunk begin in threadgroup memory."""
    return (row.group.lane + c * LANES) * (2 * RUN)


class _OwnToken:
    """The lane's share of the row's own key and value, rounded as they are stored, and their stores."""

    def __init__(self, row: Row, buffers: Buffers, query: _Query) -> None:
        self.row, self.buffers, self.query = row, buffers, query
        self.key, key_stores = self._kept_key()
        self.value, value_stores = self._kept_value()
        self.writes = [*key_stores, *value_stores]

    @property
    def _is_writer(self) -> UOp:
        row, group = self.row, self.row.group
        is_writer = group.has_own_token & row.head.eq(0)
        return is_writer & group.is_first_of_kv_head if row.spec.tile_heads < row.spec.group else is_writer

    def _kept_key(self) -> tuple[Runs, list[UOp]]:
        row, keys, is_writer = self.row, self.buffers.keys, self._is_writer
        if keys.form.is_quantized:
            numbers, stores = own_key(row, keys, row.rotated(KEYS, row.group.kv_head), is_writer)
            return [row.held(chunk) for chunk in numbers], stores
        rounded = row.rounded(KEYS, row.group.kv_head, keys.codes.dtype)
        runs = [
            (d, is_writer if ok is None else is_writer & ok, run)
            for dims, runs in zip(row.query_dims, rounded, strict=True)
            for (d, ok), run in zip(dims, runs, strict=True)
        ]
        return rounded, self._stores(keys.codes, runs)

    def _kept_value(self) -> tuple[list[list[UOp]], list[UOp]]:
        row, values, is_writer = self.row, self.buffers.values, self._is_writer
        if values.form.is_quantized:
            return own_value(row, values, row.value(), is_writer)
        rounded = row.rounded_value(values.codes.dtype)
        runs = [(row.spec.value_dim(row.column + e, 0), is_writer, span) for e, span in enumerate(rounded)]
        return rounded, self._stores(values.codes, runs)

    def _stores(self, pool: UOp, runs: list[tuple[UOp, UOp, list[UOp]]]) -> list[UOp]:
        """Stores of runs, given as (first dimension, whether to store it, numbers), at the row's slot."""
        return [
            pool[(self.row.own_start + d + i).valid(is_wanted)].store(v)
            for d, is_wanted, run in runs
            for i, v in enumerate(run)
        ]

    def score(self) -> UOp:
        """The own token's score for the lane's head."""
        spec = self.row.spec
        product = spec.lanes.sum(dot(_flat(self.query.runs), _flat(self.key)), spec.mma.row_masks)
        return spec.score(product * self.row.query_scale, spec.exp2)


def _flat(runs: Runs) -> list[UOp]:
    return [v.cast(F32) for chunk in runs for run in chunk for v in run]


# -- the context -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """The lane's fragments of the 16 tokens from `first` on."""

    first: UOp
    is_used: UOp  # whether the tile begins before the split's end; if not, it holds other tokens of the context
    # by half tile: a head's runs as an operand of the matrix unit; on CUDA, if they are quantized, codes and scales
    keys: list[Runs] | list[list[UOp]]
    # by token, perhaps as codes and then a scale; [] if they are loaded after the keys have been used
    values: list[list[UOp]]
    slot: UOp  # of the first token

    @property
    def leaves(self) -> list[UOp]:
        return [*_leaves(self.keys), *_leaves(self.values)]

    @property
    def loaded(self) -> list[UOp]:
        # of words, their load
        return list(dict.fromkeys(leaf.src[0] if leaf.op is Ops.CUSTOMI else leaf for leaf in self.leaves))

    def at(self, first: UOp, is_used: UOp, held: Iterator[UOp]) -> _Tile:
        """A tile of codes at another place, whose leaves are those in `held`, as floats of the same bits."""

        def taken(like: Sequence[Any]) -> list[Any]:
            return [from_float(next(held), one.dtype) if isinstance(one, UOp) else taken(one) for one in like]

        return replace(self, first=first, is_used=is_used, keys=taken(self.keys), values=taken(self.values))

    def or_zeros(self, has_tokens: UOp) -> _Tile:
        """The tile, with zeros for values if its split has no tokens: what was loaded may be NaN then."""
        return replace(self, values=[[has_tokens.where(v, v.const_like(0)) for v in run] for run in self.values])


def as_float(value: UOp) -> UOp:
    """A word or a float16 as a float32 register holds it."""
    return (value if value.dtype == U32 else value.bitcast(U16).cast(U32)).bitcast(F32)


def from_float(value: UOp, dtype: DType) -> UOp:
    """The inverse of `as_float`."""
    word = value.bitcast(U32)
    return word if dtype == U32 else word.cast(U16).bitcast(dtype)


def _leaves(loaded: Sequence[Any]) -> list[UOp]:
    return [value for part in loaded for value in ([part] if isinstance(part, UOp) else _leaves(part))]


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
        return [self._load_tile(*self.place(number)) for number in self.numbers(iteration)]

    def numbers(self, iteration: UOp | int) -> list[UOp | int]:
        """Those of the warp's tiles in a pass."""
        spec, warp = self.row.spec, self.row.group.warp
        return [(iteration * spec.tiles_ahead + i) * spec.num_warps + warp for i in range(spec.tiles_ahead)]

    def place(self, number: UOp | int) -> tuple[UOp, UOp]:
        """(the first token of a tile, whether it is used). If the split ends before, the token is that of any of the
        context's tiles."""
        wanted = self.low + number * TILE_TOKENS
        is_used = wanted < self.high
        return is_used.where(wanted, existing_tile(self.low, self.high)), is_used

    def _load_tile(self, first: UOp, is_used: UOp) -> _Tile:
        row, spec = self.row, self.row.spec
        size = spec.layout.block_size
        block = clamp(row.inputs[row.table + first // size].load(), 0, spec.num_blocks - 1)
        slot = block * size + first % size
        tile = _Tile(first, is_used, self._load_keys(slot, first, is_used), [], slot)
        return tile if spec.loads_values_late else replace(tile, values=self.load_values(tile, range(spec.value_size)))

    def _load_keys(self, slot: UOp, first: UOp, is_used: UOp) -> list[Runs] | list[list[UOp]]:
        """The lane's keys of a tile whose first token is number `first`, in `slot`."""
        spec, keys = self.row.spec, self.buffers.keys
        if spec.in_words(keys.form):
            return [load_keys(self.row, keys, slot, half, is_used) for half in range(2)]
        if spec.takes_parts:
            return []
        return [[self.load_chunk(slot, first, n, c) for c in range(spec.chunks)] for n in range(2)]

    def load_chunk(self, slot: UOp, first: UOp, n: int, c: int, *after: UOp) -> list[list[UOp]]:
        """The lane's runs of a chunk of keys: of half a tile whose first token is number `first`, in `slot`."""
        spec, mma, lane = self.row.spec, self.row.spec.mma, self.row.group.lane
        keys = self.buffers.keys.after(*after) if after else self.buffers.keys
        places = [(lane // 4, lane % 4)] if mma.kind == "CUDA" else mma.row_runs(lane)
        # of a dimension that does not exist any other's: the query has a zero there
        runs = [(n * HALF_TILE + token, spec.bounded(spec.run_dim(at, c), c)[0]) for token, at in places]
        if spec.saves_registers:  # the row's own key may be on its way to the pool
            runs = [(self._clamped(token, first), dim) for token, dim in runs]
        return [self._load(keys, slot, token, dim, RUN) for token, dim in runs]

    def load_values(self, tile: _Tile, part: range, *after: UOp) -> list[list[UOp]]:
        """The lane's values of a tile, of part of its dimensions."""
        row, spec, lane = self.row, self.row.spec, self.row.group.lane
        # slots after the split's last token may hold another sequence's NaN, and a weight of 0 would not erase it
        values = self.buffers.values.after(*after) if after else self.buffers.values
        if spec.mma.kind == "CUDA":
            tokens = [lane % 4 * 2 + a + HALF_TILE * h for h in range(2) for a in range(2)]
            columns = [lane // 4] * 4
        else:
            tokens = [row.head, row.head, row.head + HALF_TILE, row.head + HALF_TILE]
            columns = [row.column + e for _ in range(2) for e in range(2)]
        tokens = [self._clamped(token, tile.first) for token in tokens]
        if spec.in_words(values.form):
            return load_values(row, values, tile.slot, tokens, tile.is_used)
        most = spec.value_size // 2 if values.form.bits == 4 else spec.value_size  # neighbors
        most = min(most, len(part))
        return [
            [
                v
                for start in part[::most]
                for v in self._load(values, tile.slot, token, spec.value_dim(column, start), most)
            ]
            for token, column in zip(tokens, columns, strict=True)
        ]

    def _clamped(self, token: UOp, first: UOp) -> UOp:
        """A token of a tile that begins at `first`, or the split's last."""
        last = (self.high - 1 - first).maximum(0)
        if self.row.spec.saves_registers:  # tinygrad's minimum takes three more instructions
            return (token < last).where(token, last)
        return token.minimum(last)

    def _load(self, heads: StoredHeads, slot: UOp, token: UOp, dim: UOp, count: int) -> list[UOp]:
        """Neighbors of the key or the value of a tile's token."""
        spec, head = self.row.spec, self.row.group.kv_head
        if heads.form.is_quantized:
            return heads.halves(slot + token, head, dim, spec.lanes, spec.mma, count)
        base = slot * spec.slot_elements + head * spec.head_dim
        at = base + token * spec.slot_elements + dim
        return [heads.codes[at + i].load().cast(spec.mma.dtype) for i in range(count)]

    def value_operands(self, tile: _Tile) -> list[list[UOp]]:
        """By the lane's dimensions, the tile's values of its tokens, or words of those of two tokens."""
        if self.row.spec.in_words(self.buffers.values.form):
            return value_words(self.row, self.buffers.values, tile.values)
        return [list(values) for values in zip(*tile.values, strict=True)]


class _Softmax:
    """A warp's online softmax. Its state, for the lane's head: the maximum score, the lane's share of the sum of
    weights, and the lane's sums of weighted values (`DecodeSpec.value_dim`)."""

    def __init__(self, row: Row, context: _Context, query: _Query | StagedHeads, own: _OwnToken | None = None) -> None:
        self.row, self.context, self.query, self.own = row, context, query, own
        self.packed_query: list[list[UOp]] = []
        if isinstance(query, StagedHeads):
            self.packed_query = self._staged_words(query, row.head % row.spec.tile_heads)
        elif row.spec.in_words(row.spec.kv.keys):
            self.packed_query = query_words(row, query.runs)

    def _staged_words(self, heads: StagedHeads, head: UOp | int) -> list[list[UOp]]:
        """By chunk, the lane's words of one of the row's own heads."""
        spec, slot = self.row.spec, self.row.group.lane % 4
        return [heads.words(head, spec.run_dim(slot, c)) for c in range(spec.chunks)]

    def staged_own(self) -> StagedOwn:
        """The row's own token, if its heads are staged: in place of each token of half a tile."""
        spec, heads = self.row.spec, self.query
        assert isinstance(heads, StagedHeads)
        query, key = (
            [word for chunk in chunks for word in chunk]
            for chunks in (self.packed_query, self._staged_words(heads, spec.tile_heads))
        )
        product, _ = multiply_heads(query, key, zeros(2))
        return StagedOwn.of(self.row, heads, spec.score(product * self.row.query_scale, spec.exp2))

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
        scores = [pair for tile in tiles for pair in self._scores(tile)]
        top = balanced([v for pair in scores for v in pair], spec.maximum)
        new_best = spec.maximum(best, spec.lanes.maximum(top, spec.mma.row_masks))
        decay = spec.exp2(best - new_best)
        zero = UOp.const(0.0, F32)
        weights = [[(v > NOTHING / 10).where(spec.exp2(v - new_best), zero) for v in pair] for pair in scores]
        new_total = total * decay + balanced([w for pair in weights for w in pair])
        if spec.in_words(spec.kv.values):
            rounded = [[pack_words(*pair)] for pair in weights]
        else:
            rounded = [[w.cast(spec.mma.dtype) for w in pair] for pair in weights]
        done: list[UOp] = []
        if spec.loads_values_late:
            rounded, done = self._held(rounded)
        new = []
        for part in spec.value_parts:
            if spec.loads_values_late:
                tiles = [replace(tile, values=self.context.load_values(tile, part, *done)) for tile in tiles]
            operands = [self.context.value_operands(tile) for tile in tiles]
            sums = []
            for k, j in enumerate(part):
                one = [acc[j * 2] * decay, acc[j * 2 + 1] * decay]
                for i, values in enumerate(operands):
                    one = _add_values(spec, rounded[2 * i : 2 * i + 2], values[k], one)
                sums.append(one)
            if spec.takes_parts:
                sums, done = self._held(sums)
            new += [value for one in sums for value in one]
        return [new_best, new_total, *new]

    def _held(self, values: list[list[UOp]]) -> tuple[list[list[UOp]], list[UOp]]:
        """(the same values, what is to be waited for before anything else is loaded)."""
        flat, size = [v for some in values for v in some], len(values[0])
        held, done = hold(self.row.group.body, flat)
        return [held[i : i + size] for i in range(0, len(flat), size)], [done]

    def _scores(self, tile: _Tile) -> list[list[UOp]]:
        """The scores of the lane's two tokens of each half of a tile."""
        products = self._products_in_parts(tile) if self.row.spec.takes_parts else self._products(tile)
        tokens = [[tile.first + half * HALF_TILE + self.row.column + e for e in range(2)] for half in range(2)]
        return [
            [self._score(tile, *pair) for pair in zip(*pairs, strict=True)]
            for pairs in zip(tokens, products, strict=True)
        ]

    def _products(self, tile: _Tile) -> list[list[UOp]]:
        """q . k of the lane's head and two tokens of each half of a tile."""
        row, keys, products = self.row, self.context.buffers.keys, []
        for half in tile.keys:
            if row.spec.in_words(keys.form):
                words = key_words(row, keys, half)
                left, right = ([word for chunk in chunks for word in chunk] for chunks in (self.packed_query, words))
                products.append(multiply_heads(left, right, zeros(2)))
                continue
            assert isinstance(self.query, _Query)
            sums = UOp.stack(*zeros(row.spec.mma.elements))
            for q, k in zip(self.query.runs, half, strict=True):
                sums = _multiply_chunk(row.spec, q, k, sums)
            products.append([sums.index(e) for e in range(2)])
        return products

    def _products_in_parts(self, tile: _Tile) -> list[list[UOp]]:
        """The same by chunks, each loaded when the one before has been used."""
        spec, products = self.row.spec, [zeros(2), zeros(2)]
        assert isinstance(self.query, _Query)
        done = [tile.slot]  # otherwise the first chunk of the query would be loaded before the loop
        for c in range(spec.chunks):
            query, sums = self.query.chunk(c, *done), []
            for half, old in enumerate(products):
                keys = self.context.load_chunk(tile.slot, tile.first, half, c, *done)
                sums.append(_multiply_chunk(spec, query, keys, UOp.stack(*old)))
            products, done = self._held([[pair.index(e) for e in range(2)] for pair in sums])
        return products

    def _score(self, tile: _Tile, token: UOp, product: UOp) -> UOp:
        """A token's score; NOTHING if the row does not attend to it here."""
        spec = self.row.spec
        is_seen = tile.is_used & (token < self.context.high)
        if spec.window is not None:
            is_seen = is_seen & (token >= spec.first_key(self.row.past))
        score = spec.score(product * self.row.query_scale, spec.exp2)
        return is_seen.where(score, UOp.const(NOTHING, F32))


def _multiply_chunk(spec: DecodeSpec, q: list[list[UOp]], k: list[list[UOp]], sums: UOp) -> UOp:
    """sums + q . k of a chunk: of the lane's head and two tokens of eight."""
    mma, zero = spec.mma, UOp.const(0.0, spec.mma.dtype)
    if mma.kind == "METAL":
        for i in range(RUN):
            sums = mma.tile((q[0][i], q[1][i]), (k[0][i], k[1][i]), sums)
        return sums
    for i in range(0, RUN, 4):  # heads fill half of a tile's 16 rows
        left = (*q[0][i : i + 2], zero, zero, *q[0][i + 2 : i + 4], zero, zero)
        sums = mma.tile(left, k[0][i : i + 4], sums)
    return sums


def _add_values(spec: DecodeSpec, weights: list[list[UOp]], values: list[UOp], sums: list[UOp]) -> list[UOp]:
    """sums + weights (8 heads x 16 tokens) @ values. A lane's scores are placed as the operand needs its weights."""
    mma = spec.mma
    if spec.in_words(spec.kv.values):
        return multiply_heads([word for (word,) in weights], values, sums)
    zero = UOp.const(0.0, mma.dtype)
    if mma.kind == "METAL":
        acc = UOp.stack(*sums)
        for n in range(2):
            acc = mma.tile(weights[n], values[2 * n : 2 * n + 2], acc)
    else:
        left = (*weights[0], zero, zero, *weights[1], zero, zero)
        acc = mma.tile(left, values, UOp.stack(*sums, *[UOp.const(0.0, F32)] * 2))
    return [acc.index(e) for e in range(2)]
