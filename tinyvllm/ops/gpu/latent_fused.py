"""Latent attention on devices with matrix units: all heads of a token share its latents, which are read once.

A threadgroup serves one token row, all of its heads (or up to 32), and one split of the context (Dao et al. 2023,
"Flash-Decoding"). It brings 16 or 32 latents at a time into threadgroup memory, where they are keys and then values:

- Scores: the warps divide the latents' dimensions between them, and add up their shares through threadgroup memory.
- Softmax: a thread holds the score of a head and a token or two (Milakov & Gimelshein 2018).
- Values: the warps divide the first `rank` dimensions between them, whose sums stay in registers.

Decoding and prompts take the same kernel, which reads a row's own latent from the pool like the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinyvllm.ops.coverage import in_words
from tinyvllm.ops.gpu.attention_split import NOTHING, TILE_TOKENS, SplitHeads
from tinyvllm.ops.gpu.latent_attention import LatentRow
from tinyvllm.ops.kernel.body import F16, F32, Body, KernelFn, balanced, cached_kernel, clamp, fill, finish
from tinyvllm.ops.kernel.lanes import LANES, Lanes, Mma, await_previous, axes_of, carry, grid, load_floats, warps
from tinyvllm.ops.latent_spec import LatentSpec

CHUNK_DIMS = 32  # dimensions that a warp multiplies at a time
RUN = 8  # dimensions of a value that a lane loads at once
PIECE = 8  # values that a thread brings from the pool at once
LINE = 64  # values of 16 bits that all banks hold
MOST_HEADS = 32  # that one threadgroup serves
MAX_WARPS = 8
MAX_SPLITS = 64
GROUPS_WANTED = 256  # threadgroups that fill a large GPU
SHORTEST_SPAN = 64  # the fewest tokens that are worth a threadgroup
COMBINE_WARPS, COMBINED_DIMS = 8, 128  # of a threadgroup that combines splits


@dataclass(frozen=True, kw_only=True)
class FusedLatentSpec(LatentSpec):
    """Latent attention over a float16 pool on a matrix unit."""

    lanes: Lanes
    mma: Mma

    def uncovered_shape(self) -> str:
        """Why the kernel does not cover this layer, in words; "" if it does."""
        found = {
            f"latents of {self.rank} + {self.rope_dim}": bool(self.rank % self.span or self.rope_dim % CHUNK_DIMS),
            f"{self.num_heads} heads": self.heads_together * 2 <= min(self.num_heads, MOST_HEADS),
        }
        return in_words([name for name, has in found.items() if has])

    # -- shape ---------------------------------------------------------------------------------------------------------

    @property
    def heads_together(self) -> int:
        """Heads of a threadgroup: an equal part of them if they are many."""
        return next(count for count in range(MOST_HEADS, 0, -1) if self.num_heads % count == 0)

    @property
    def head_groups(self) -> int:
        return self.num_heads // self.heads_together

    @property
    def head_tiles(self) -> int:
        """Tiles of eight heads; the last may have fewer."""
        return -(-self.heads_together // 8)

    @property
    def span(self) -> int:
        """Dimensions of values of which each lane has a run."""
        return RUN * (8 if self.mma.kind == "CUDA" else 4)

    @property
    def num_warps(self) -> int:
        count = MAX_WARPS
        while count > 1 and (self.rank % (count * self.span) or self._shared_bytes(count, 1) > self.lanes.shared_bytes):
            count //= 2
        return count

    @property
    def parts(self) -> int:
        """Parts of 16 tokens that a tile of the context has: what threadgroup memory holds. Warps divide them between
        them for the scores."""
        return 2 if self.num_warps > 1 and self._shared_bytes(self.num_warps, 2) <= self.lanes.shared_bytes else 1

    @property
    def tile_tokens(self) -> int:
        return self.parts * TILE_TOKENS

    @property
    def key_warps(self) -> int:
        """Warps that divide the dimensions of the keys of one part."""
        return self.num_warps // self.parts

    @property
    def spans(self) -> int:
        """Spans of a warp's values."""
        return self.rank // (self.num_warps * self.span)

    @property
    def row_size(self) -> int:
        """Elements from one latent to the next in threadgroup memory."""
        return -(-self.stored_dim // LINE) * LINE if self.mma.kind == "CUDA" else self.stored_dim

    def piece_at(self, token: UOp, piece: UOp) -> UOp:
        """Where a piece of a latent lies in threadgroup memory. On CUDA, eight lanes read pieces at once: four of
        two neighboring tokens, or two of four; the exclusive or puts them into different banks."""
        if self.mma.kind == "CUDA":
            piece = piece ^ (token % 2 * 4 + token // 2 % 2 * 2)
        return token * self.row_size + piece * PIECE

    @property
    def score_stride(self) -> int:
        """Scores from one head to the next in threadgroup memory. On CUDA, lanes write those of four heads at once,
        most of them to different banks."""
        return self._stride(self.parts)

    def _stride(self, parts: int) -> int:
        return parts * TILE_TOKENS + (4 if self.mma.kind == "CUDA" else 0)

    def _shared_bytes(self, num_warps: int, parts: int) -> int:
        scores = num_warps // parts * self.heads_together * self._stride(parts)
        return 2 * parts * TILE_TOKENS * self.row_size + 4 * scores + 8 * self.heads_together

    @property
    def chunks(self) -> int:
        return self.stored_dim // CHUNK_DIMS

    @property
    def rounds(self) -> int:
        """Chunks of a warp; in the last round some warps may have none."""
        return -(-self.chunks // self.key_warps)

    @property
    def key_run(self) -> int:
        """Dimensions of a lane's run in a chunk."""
        return CHUNK_DIMS // self.mma.slots

    @property
    def token_run(self) -> int:
        """Tokens of a lane's run in a part of a tile."""
        return TILE_TOKENS // self.mma.slots

    def token_at(self, slot: UOp, number: int) -> UOp:
        """The token of a part that is number `number` of a slot's run: neighbors are those of neighboring slots."""
        return slot + number * self.mma.slots

    def score_at(self, head: UOp, token: UOp) -> UOp:
        """Where the score of a token of a tile lies in threadgroup memory, so that a slot's run is contiguous."""
        slots, run, inner = self.mma.slots, self.token_run, token % TILE_TOKENS
        place = token // TILE_TOKENS * TILE_TOKENS + inner % slots * run + inner // slots
        return head * self.score_stride + place

    @property
    def split(self) -> SplitHeads:
        """How the context is split: where the rows alone would leave most of the device idle."""
        splits = MAX_SPLITS
        while splits > 1 and splits * self.layout.num_tokens * self.head_groups > GROUPS_WANTED:
            splits //= 2
        return SplitHeads(
            self.layout, self.num_heads, self.rank, splits, has_own_token=True, shortest_span=SHORTEST_SPAN
        )


@cached_kernel
def fused_latent_kernel(spec: FusedLatentSpec) -> KernelFn:
    """fn(out (T, H * rank), pool, inputs, rope, absorbed queries (T, H * rank), queries (T, H * (nope + rope))). With a
    split context, fn(split values, split sums, pool, ...): `SplitHeads` gives their shapes."""

    def kernel(*operands: UOp) -> UOp:
        is_split = spec.split.num_splits > 1
        outs, (pool, inputs, rope, absorbed, queries) = operands[: 1 + is_split], operands[1 + is_split :]
        place = _make_place(spec)
        row = LatentRow(spec, place.row, inputs)
        pool, absorbed, queries = await_previous(spec.lanes, pool, absorbed, queries)
        query = _Query(place, row, rope, absorbed, queries)
        context = _Context(place, row, pool)
        acc, best, total = _attend(place, context, query.load())
        stores = _finish(place, context, outs, acc, best, total)
        length = spec.layout.max_blocks * spec.layout.block_size
        tokens = spec.layout.num_tokens
        return finish(
            UOp.group(*stores).end(*reversed(place.axes)),
            f"latent_attention_{tokens}x{spec.num_heads}x{spec.rank}",
            ops=2 * tokens * spec.num_heads * (spec.stored_dim + spec.rank) * length,
            nbytes=2 * tokens * spec.stored_dim * length,
        )

    return kernel


@dataclass(frozen=True)
class _Place:
    """A thread's place: token row, group of heads and split of the context; lane and warp. An axis of length 1 is the
    constant 0."""

    spec: FusedLatentSpec
    body: Body
    row: UOp | int
    heads: UOp | int
    split: UOp | int
    lane: UOp
    warp: UOp
    axes: tuple[UOp, ...]

    @property
    def thread(self) -> UOp:
        return self.warp * LANES + self.lane

    @property
    def part(self) -> UOp:
        """The part of a tile whose keys the warp multiplies."""
        return self.warp % self.spec.parts

    @property
    def key_warp(self) -> UOp:
        """The warp's number among those of its part."""
        return self.warp // self.spec.parts

    @property
    def num_threads(self) -> int:
        return self.spec.num_warps * LANES

    @property
    def first_head(self) -> UOp | int:
        return self.heads * self.spec.heads_together

    def shares(self, count: int) -> list[tuple[UOp, UOp | None]]:
        """(item, whether it exists; None: always) of `count` for each that the thread has."""
        found: list[tuple[UOp, UOp | None]] = []
        for start in range(0, count, self.num_threads):
            index, is_inside = start + self.thread, start + self.thread < count
            is_whole = start + self.num_threads <= count
            found.append((index, None) if is_whole else (is_inside.where(index, 0), is_inside))
        return found


def _make_place(spec: FusedLatentSpec) -> _Place:
    body = Body()
    row, heads = grid(body, spec.layout.num_tokens), grid(body, spec.head_groups)
    split, lane, warp = grid(body, spec.split.num_splits), body.threads(LANES), warps(body, spec.num_warps)
    axes = axes_of(row, heads, split, lane, warp)
    whole = warp if isinstance(warp, UOp) else UOp.const(warp, dtypes.weakint)
    return _Place(spec, body, row, heads, split, lane, whole, axes)


def _value_dim(place: _Place, span: int, pair: int, row: UOp) -> UOp:
    """The dimension that a row of the matrix unit's tile stands for: each lane has a run of them."""
    spec = place.spec
    base = (place.warp * spec.spans + span) * spec.span + 2 * pair
    return base + (row % 8 * RUN + row // 8 if spec.mma.kind == "CUDA" else row // 2 * RUN + row % 2)


def _gate(at: UOp, *conditions: UOp | None) -> UOp:
    """The index, valid only if all the conditions hold."""
    for condition in conditions:
        at = at if condition is None else at.valid(condition)
    return at


# -- queries -----------------------------------------------------------------------------------------------------------

Runs = list[list[UOp]]  # what a lane feeds to the matrix unit


@dataclass(frozen=True)
class _Query:
    """The row's queries in the latents' space, scaled: the lane's share as operands of the matrix unit."""

    place: _Place
    row: LatentRow
    rope: UOp
    absorbed: UOp
    queries: UOp

    def load(self) -> list[list[Runs]]:
        """By round and tile of heads; zeros where there is no head or no chunk. In registers, because the compiler
        would otherwise scale and round them again for each tile of the context."""
        spec, place = self.place.spec, self.place
        runs = [[self._runs(number, tile) for tile in range(spec.head_tiles)] for number in range(spec.rounds)]
        values = [value for tiles in runs for tile in tiles for run in tile for value in run]
        held = place.body.registers(len(values), F16)
        target = held.after(*place.axes)
        held = held.after(UOp.group(*[target[i].store(value) for i, value in enumerate(values)]))
        numbers = iter(range(len(values)))
        return [[[[held[next(numbers)].load() for _ in run] for run in tile] for tile in tiles] for tiles in runs]

    def _runs(self, number: int, tile: int) -> Runs:
        spec, place = self.place.spec, self.place
        chunk = number * spec.key_warps + place.key_warp
        in_latent = spec.rank // CHUNK_DIMS  # chunks before those that rotate
        is_mixed = number * spec.key_warps < in_latent < (number + 1) * spec.key_warps
        runs = []
        for head, slot in spec.mma.token_runs(place.lane):
            wanted = tile * 8 + head
            exists = (wanted < spec.heads_together) & (chunk < spec.chunks)
            number_of = place.row * spec.num_heads + place.first_head + exists.where(wanted, 0)
            dim = slot * spec.key_run
            latent, rotated = None, None
            if number * spec.key_warps < in_latent:
                at = (chunk < in_latent).where(chunk, 0) if is_mixed else chunk
                latent = load_floats(self.absorbed, number_of * spec.rank + at * CHUNK_DIMS + dim, spec.key_run)
            if (number + 1) * spec.key_warps > in_latent:
                after = chunk - in_latent
                at = ((after >= 0) & (chunk < spec.chunks)).where(after, 0)
                rotated = self._rotated(number_of, at * CHUNK_DIMS + dim)
            values = latent if rotated is None else rotated if latent is None else None
            if values is None:
                assert latent is not None and rotated is not None
                values = [(chunk < in_latent).where(a, b) for a, b in zip(latent, rotated, strict=True)]
            zero = UOp.const(0.0, F32)
            runs.append([exists.where(v * spec.query_scale, zero).cast(spec.mma.dtype) for v in values])
        return runs

    def _rotated(self, number: UOp, first: UOp) -> list[UOp]:
        """A run of a head's rotated dimensions."""
        start = number * self.place.spec.query_dim + self.place.spec.nope_dim
        return [
            self.row.rotated(self.rope, first + i, lambda d: self.queries[start + d].load().cast(F32))
            for i in range(self.place.spec.key_run)
        ]


# -- the context -------------------------------------------------------------------------------------------------------


class _Context:
    """The threadgroup's split of the row's context, tokens [low, high), in tiles."""

    def __init__(self, place: _Place, row: LatentRow, pool: UOp) -> None:
        spec, split = place.spec, place.spec.split
        self.place, self.row, self.pool = place, row, pool
        self.count = row.position + 1
        span = split.span(self.count)
        self.low = place.split * span
        self.high = (self.low + span).minimum(self.count) if split.num_splits > 1 else self.count
        self.used = split.used(self.count)
        self.tiles = ((self.high - self.low).maximum(0) + (spec.tile_tokens - 1)) // spec.tile_tokens
        self.pieces = place.shares(spec.tile_tokens * spec.stored_dim // PIECE)

    def first(self, number: UOp | int) -> UOp:
        """The first token of a tile, or of another of the row's tiles if it has fewer."""
        wanted = self.low + number * self.place.spec.tile_tokens
        last = (self.high - 1).maximum(0) // TILE_TOKENS * TILE_TOKENS
        return wanted.minimum(last) if isinstance(wanted, UOp) else last.minimum(wanted)

    def load(self, number: UOp | int) -> list[UOp]:
        """The thread's pieces of a tile. In place of tokens after the last, whose slots may hold another sequence's
        NaN, the last."""
        spec, first = self.place.spec, self.first(number)
        size, last = spec.layout.block_size, (self.high - 1 - first).maximum(0)
        count = -(-spec.tile_tokens // size) + (spec.tile_tokens > TILE_TOKENS and size > TILE_TOKENS)
        starts = [self._block_start(first // size + i) for i in range(count)]
        per_row, values = spec.stored_dim // PIECE, []
        for piece, _ in self.pieces:
            token = first % size + (piece // per_row).minimum(last)  # counted from the first block's first
            start = starts[0]
            for i in range(1, count):
                start = (token < i * size).where(start, starts[i])
            at = (start + token % size) * spec.stored_dim + piece % per_row * PIECE
            values += [self.pool[at + i].load() for i in range(PIECE)]
        return values

    def _block_start(self, number: UOp) -> UOp:
        """The first slot of the row's block of this number, or of the last block that is read if there are fewer."""
        size, spec = self.place.spec.layout.block_size, self.place.spec
        existing = number.minimum((self.high - 1).maximum(0) // size)
        return clamp(self.row.inputs[self.row.table + existing].load(), 0, spec.num_blocks - 1) * size

    def store(self, tile: UOp, values: Sequence[UOp]) -> UOp:
        """Stores of the thread's pieces in threadgroup memory."""
        spec = self.place.spec
        per_row, stores = spec.stored_dim // PIECE, []
        for number, (piece, is_inside) in enumerate(self.pieces):
            at = spec.piece_at(piece // per_row, piece % per_row)
            own = values[number * PIECE : (number + 1) * PIECE]
            stores += [tile[_gate(at + i, is_inside)].store(value) for i, value in enumerate(own)]
        return UOp.group(*stores)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attend(place: _Place, context: _Context, query: list[list[Runs]]) -> tuple[UOp, list[UOp], list[UOp]]:
    """(the lane's sums of weighted values, in registers; by item of `_Softmax`: maximum score, sum of weights)."""
    spec, body = place.spec, place.body
    tile = body.shared(spec.tile_tokens * spec.row_size, F16)
    held = body.registers(len(context.pieces) * PIECE, F16)
    first = UOp.group(*[held.after(*place.axes)[i].store(value) for i, value in enumerate(context.load(0))])
    held = held.after(first)
    softmax = _Softmax(place, context)
    values = _Values(place)
    loop = body.fold_while(context.tiles)
    number = loop.cast(dtypes.weakint)
    count = len(context.pieces) * PIECE
    filled = context.store(tile.after(loop), [held.after(loop)[i].load() for i in range(count)])
    # the next tile is on its way while this one is used
    ahead = [held.after(filled)[i].store(value) for i, value in enumerate(context.load(number + 1))]
    tile = tile.after(filled)
    weights, factors, updated = softmax.step(loop, number, _store_scores(place, loop, tile, query))
    added = values.add(loop, tile, weights, factors)
    done = UOp.group(*ahead, *updated, *added).end(loop)
    best, total = softmax.after(done)
    return values.sums.after(done), best, total


def _store_scores(place: _Place, loop: UOp, tile: UOp, query: list[list[Runs]]) -> UOp:
    """Every warp's share of the scores of its part of a tile, (key warps, heads, tokens), in threadgroup memory."""
    spec, mma = place.spec, place.spec.mma
    heads, stores = spec.heads_together, []
    shares = place.body.shared(spec.key_warps * heads * spec.score_stride)
    target = shares.after(loop)
    for start in range(0, TILE_TOKENS, mma.rows):
        first_token = place.part * TILE_TOKENS + start
        sums = [UOp.stack(*[UOp.const(0.0, F32)] * mma.elements) for _ in range(spec.head_tiles)]
        for number in range(spec.rounds):
            keys = _load_keys(place, tile, number, first_token)
            sums = [mma.multiply(keys, query[number][t], one) for t, one in enumerate(sums)]
        for t, one in enumerate(sums):
            for e in range(mma.elements):
                inner, token = mma.place(place.lane, e)
                head = t * 8 + inner
                at = place.key_warp * (heads * spec.score_stride) + spec.score_at(head, first_token + token)
                exists = None if (t + 1) * 8 <= heads else head < heads
                stores.append(target[_gate(at, exists)].store(one.index(e)))
    return shares.after(UOp.group(*stores))


def _load_keys(place: _Place, tile: UOp, number: int, first_token: UOp) -> Runs:
    """The lane's share of a chunk of keys. Where there is no chunk, any other: the query is zero there."""
    spec = place.spec
    wanted = number * spec.key_warps + place.key_warp
    chunk = wanted if (number + 1) * spec.key_warps <= spec.chunks else (wanted < spec.chunks).where(wanted, 0)
    runs = []
    for token, slot in spec.mma.row_runs(place.lane):
        dim = chunk * CHUNK_DIMS + slot * spec.key_run
        at = spec.piece_at(first_token + token, dim // PIECE) + dim % PIECE
        runs.append([tile[at + i].load() for i in range(spec.key_run)])
    return runs


class _Softmax:
    """The threadgroup's online softmax. An item of a thread is a head and one token of a tile; 16 or 32 neighboring
    lanes have the same head."""

    def __init__(self, place: _Place, context: _Context) -> None:
        body, spec = place.body, place.spec
        self.place, self.context = place, context
        self.items = place.shares(spec.heads_together * spec.tile_tokens)
        self.masks = (16, 8, 4, 2, 1)[2 - spec.parts :]
        self.best = fill(body, body.registers(len(self.items)), NOTHING, *place.axes)
        self.total = fill(body, body.registers(len(self.items)), 0.0, *place.axes)

    def step(self, loop: UOp, number: UOp, shares: UOp) -> tuple[UOp, UOp, list[UOp]]:
        """(a tile's weights (heads, tokens), in place of the first warp's scores, and the heads' factors by which
        earlier sums decay, in threadgroup memory; the stores that update the state)."""
        spec, lanes = self.place.spec, self.place.spec.lanes
        size, tile_tokens = spec.heads_together * spec.score_stride, spec.tile_tokens
        factors = self.place.body.shared(spec.heads_together)
        shared, updates = [], []
        for i, (item, is_inside) in enumerate(self.items):
            head, inner = item // tile_tokens, item % tile_tokens
            at = spec.score_at(head, inner)
            # not of another item where there is none: its own thread replaces the score by a weight
            score = balanced(shares[_gate(w * size + at, is_inside)].load() for w in range(spec.key_warps))
            token = self.context.low + number * tile_tokens + inner
            score = (token < self.context.high).where(score, UOp.const(NOTHING, F32))
            old = self.best.after(loop)[i].load()
            top = old.maximum(lanes.maximum(score, self.masks))
            weight = (score > NOTHING / 10).where((score - top).exp2(), UOp.const(0.0, F32))
            decay = (old - top).exp2()
            shared.append(shares[_gate(at, is_inside)].store(weight))
            shared.append(factors.after(loop)[_gate(head, is_inside, inner.eq(0))].store(decay))
            total = self.total.after(loop)[i]
            updates += [(total, total.load() * decay + weight), (self.best.after(loop)[i], top)]
        done = UOp.group(*shared)
        stores = [place.after(done).store(value) for place, value in updates]
        return shares.after(done), factors.after(done), stores

    def after(self, done: UOp) -> tuple[list[UOp], list[UOp]]:
        count = len(self.items)
        return [self.best.after(done)[i].load() for i in range(count)], [
            self.total.after(done)[i].load() for i in range(count)
        ]


class _Values:
    """The lane's sums of weighted values: by span, pair of dimensions of its run, tile of heads, and element."""

    def __init__(self, place: _Place) -> None:
        spec = place.spec
        self.place = place
        self.count = spec.spans * (RUN // 2) * spec.head_tiles * spec.mma.elements
        self.sums = fill(place.body, place.body.registers(self.count), 0.0, *place.axes)

    def add(self, loop: UOp, tile: UOp, weights: UOp, factors: UOp) -> list[UOp]:
        """The stores that add a tile's values."""
        spec, mma, lane = self.place.spec, self.place.spec.mma, self.place.lane
        tiles, parts = range(spec.head_tiles), range(spec.parts)
        heads = [[self._existing(mma.place(lane, e)[0], t) for e in range(mma.elements)] for t in tiles]
        decay = [[factors[head].load() for head in tile_heads] for tile_heads in heads]
        operands = [[self._load_weights(weights, t, part) for t in tiles] for part in parts]
        old, stores, at = self.sums.after(loop, weights), [], 0
        for span in range(spec.spans):
            runs = [self._load_runs(tile, span, part) for part in parts]
            for pair in range(RUN // 2):
                for t in tiles:
                    new = UOp.stack(*[old[at + e].load() * decay[t][e] for e in range(mma.elements)])
                    for part in parts:
                        values = [[run[2 * pair + side] for run in runs[part]] for side in range(2)]
                        new = mma.multiply(values, operands[part][t], new)
                    stores += [old[at + e].store(new.index(e)) for e in range(mma.elements)]
                    at += mma.elements
        return stores

    def _existing(self, head: UOp, tile: int) -> UOp:
        """A head of a tile; the last one in place of a head that does not exist, whose sums nobody reads."""
        count = self.place.spec.heads_together
        return head + tile * 8 if (tile + 1) * 8 <= count else (head + tile * 8).minimum(count - 1)

    def _load_weights(self, weights: UOp, tile: int, part: int) -> Runs:
        spec = self.place.spec
        starts = [
            self._existing(head, tile) * spec.score_stride + part * TILE_TOKENS + slot * spec.token_run
            for head, slot in spec.mma.token_runs(self.place.lane)
        ]
        return [[weights[start + i].load().cast(spec.mma.dtype) for i in range(spec.token_run)] for start in starts]

    def _load_runs(self, tile: UOp, span: int, part: int) -> Runs:
        """The lane's run of dimensions of each of its tokens in a part of the tile."""
        spec, lane = self.place.spec, self.place.lane
        row, slot = spec.mma.row_runs(lane)[0]
        group = row if spec.mma.kind == "CUDA" else row // 2
        dim = (self.place.warp * spec.spans + span) * spec.span + group * RUN
        tokens = [part * TILE_TOKENS + spec.token_at(slot, i) for i in range(spec.token_run)]
        starts = [spec.piece_at(token, dim // PIECE) for token in tokens]
        return [[tile[start + d].load() for d in range(RUN)] for start in starts]


# -- results -----------------------------------------------------------------------------------------------------------


def _finish(
    place: _Place, context: _Context, outs: Sequence[UOp], acc: UOp, best: list[UOp], total: list[UOp]
) -> list[UOp]:
    """Stores of the result: the row's attention, or that over its split of the context, normalized by itself, and the
    split's log-sum-exp."""
    spec, mma, is_split = place.spec, place.spec.mma, len(outs) > 1
    tile_tokens, masks = spec.tile_tokens, (16, 8, 4, 2, 1)[2 - spec.parts :]
    softmax_items = place.shares(spec.heads_together * tile_tokens)
    sums = place.body.shared(spec.heads_together)
    is_used = place.split < context.used if isinstance(place.split, UOp) else None
    number = place.split * spec.layout.num_tokens + place.row
    stores, log_sums = [], []
    for (item, is_inside), top, own in zip(softmax_items, best, total, strict=True):
        whole = spec.lanes.sum(own, masks)
        head, leads = item // tile_tokens, (item % tile_tokens).eq(0)
        safe = (whole > 0.0).where(whole, UOp.const(1.0, F32))
        stores.append(sums[_gate(head, is_inside, leads)].store(safe))
        if is_split:
            lse = (whole > 0.0).where(top + safe.log2(), UOp.const(NOTHING, F32))
            at = number * spec.num_heads + place.first_head + head
            log_sums.append(outs[1][_gate(at, is_inside, leads, is_used)].store(lse))
    shared, at, results = sums.after(UOp.group(*stores)), 0, list(log_sums)
    for span in range(spec.spans):
        for pair in range(RUN // 2):
            for t in range(spec.head_tiles):
                for e in range(mma.elements):
                    token, unit_row = mma.place(place.lane, e)
                    head, dim = t * 8 + token, _value_dim(place, span, pair, unit_row)
                    exists = None if (t + 1) * 8 <= spec.heads_together else head < spec.heads_together
                    value = acc[at + e].load() / shared[head.minimum(spec.heads_together - 1)].load()
                    target = (number * spec.num_heads + place.first_head + head) * spec.rank + dim
                    results.append(outs[0][_gate(target, exists, is_used)].store(value.cast(outs[0].dtype)))
                at += mma.elements
    return results


@cached_kernel
def combine_latents_kernel(spec: FusedLatentSpec) -> KernelFn:
    """fn(out (T, H * rank), split values, split sums, inputs): combines the splits of every row. The warps of a
    threadgroup divide them between them."""

    def kernel(out: UOp, values: UOp, sums: UOp, inputs: UOp) -> UOp:
        body, tokens, heads = Body(), spec.layout.num_tokens, spec.num_heads
        width = math.gcd(spec.rank, COMBINED_DIMS)  # of a threadgroup
        row, head, part = body.grid(tokens), body.grid(heads), body.grid(spec.rank // width)
        lane, warp = body.threads(LANES), body.threads(COMBINE_WARPS)
        axes = (row, head, part, lane, warp)
        values, sums = await_previous(spec.lanes, values, sums)
        used = spec.split.used(LatentRow(spec, row, inputs).position + 1)
        own = width // LANES

        def step(number: UOp | int, old: list[UOp]) -> list[UOp]:
            wanted = number * COMBINE_WARPS + warp
            exists = wanted < used
            at = (exists.where(wanted, 0) * tokens + row) * heads + head
            here = exists.where(sums[at].load(), UOp.const(NOTHING, F32))
            top = old[0].maximum(here)
            before, now = (old[0] - top).exp2(), exists.where((here - top).exp2(), UOp.const(0.0, F32))
            new = load_floats(values, at * spec.rank + part * width + lane * own, own)
            return [top, old[1] * before + now, *[a * before + b * now for a, b in zip(old[2:], new, strict=True)]]

        passes = (used + (COMBINE_WARPS - 1)) // COMBINE_WARPS
        init = [UOp.const(NOTHING, F32), *[UOp.const(0.0, F32)] * (own + 1)]
        best, total, *acc = carry(body, init, passes if passes.vmax > 1 else 1, axes, step)
        shared, stats = body.shared(COMBINE_WARPS * width), body.shared(COMBINE_WARPS * 2)
        stores = [shared[warp * width + lane * own + i].store(value) for i, value in enumerate(acc)]
        stores += [stats[(warp * 2 + i).valid(lane.eq(0))].store(value) for i, value in enumerate((best, total))]
        done = UOp.group(*stores)
        thread = warp * LANES + lane
        exists = thread < width
        result = _combine_warps(shared.after(done), stats.after(done), exists.where(thread, 0), width)
        target = (row * heads + head) * spec.rank + part * width + thread
        store = out[target.valid(exists)].store(result.cast(out.dtype))
        name = f"combine_latents_{tokens}x{heads}x{spec.rank}"
        return finish(store.end(*reversed(axes)), name, nbytes=8 * tokens * heads * spec.rank)

    return kernel


def _combine_warps(values: UOp, stats: UOp, col: UOp, width: int) -> UOp:
    """A column of the combined attention. values (warps, width); stats (warps, 2): maxima and sums of weights."""
    warp_range = range(COMBINE_WARPS)
    bests = [stats[2 * w].load() for w in warp_range]
    top = balanced(bests, lambda a, b: a.maximum(b))
    factors = [(best - top).exp2() for best in bests]
    total = balanced(f * stats[2 * w + 1].load() for w, f in enumerate(factors))
    return balanced(f * values[w * width + col].load() for w, f in enumerate(factors)) / total
