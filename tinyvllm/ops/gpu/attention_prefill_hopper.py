"""Prompts' attention on Hopper: one warp fetches keys and values, groups of four warps multiply them.

The queries have been rotated and scaled by an earlier kernel (`rotate_kernel`), so that the copy engine fetches them as
it does blocks of the pool. There are as many threadgroups as multiprocessors, and each takes its turn with pieces of
work, tiles of tokens and KV heads, the longest first: while one piece ends, the next one's queries, keys and values are
on their way. The fetching warp runs ahead through two stages of keys and two of values. A group of warps has 64 rows of
the tile, whose scores and sums are in the registers of wgmma. It multiplies the next keys while it computes the weights
of the tile before (FlashAttention-3, Shah et al. 2024, sec. 3.2). Letting the groups take turns (sec. 3.1) gained
nothing, nor did computing all weights before the wait for the values' products: the other group's products fill the
matrix unit meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import ClassVar, TypeVar

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import Tables
from tinyvllm.ops.gpu.attention_prefill_inputs import ROW_BYTES, STAGES, Inputs, PrefillSpec
from tinyvllm.ops.gpu.attention_prefill_tile import AttentionTile
from tinyvllm.ops.gpu.attention_rotate import KEY_MAP, QUERY_MAP, VALUE_MAP
from tinyvllm.ops.kernel.body import F32, I32, U32, balanced, bits_of_bfloat, clamp
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    MAP_WORDS,
    WGMMA_COLS,
    WGMMA_TOKENS,
    acquire_map,
    arrive,
    await_products,
    clear_piece,
    declare,
    expect,
    fence_proxy,
    fetch,
    give_registers,
    leave_if,
    make_barriers,
    meet_threads,
    opaque,
    read_sums,
    start_scores,
    start_weighing,
    statement,
    take_registers,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, grid, zeros
from tinyvllm.ops.kernel.tiles import PIECE, PTX_NAMES, join_bits, pack_words, quick_exp2, quick_maximum, together

Number = TypeVar("Number", int, UOp)
STORE_RESULTS = "if ({5}) *((uint4*)({0})) = make_uint4({1}, {2}, {3}, {4});"
FIRST_GROUP = 1  # the named barrier of the first group's threads


class HopperTile(AttentionTile):
    """Rows of queries, keys and values are in tiles of 64 columns, 128 bytes, swizzled as wgmma expects them."""

    extra_warps: ClassVar[int] = GROUP_WARPS  # only the first of them fetches; registers belong to whole groups
    num_described: ClassVar[int] = 3  # buffers that the copy engine fetches

    # on a piece of work: its tiles of keys, those of the pieces before it, and a register that counts them
    steps: UOp
    before: UOp
    counter: UOp

    def __init__(
        self, spec: PrefillSpec, maps: UOp, tiles: UOp, order: UOp, inputs: UOp, operands: Sequence[UOp]
    ) -> None:
        """`operands`: perhaps the sinks, and then the buffers that the maps describe."""
        super().__init__(spec, None, tiles, inputs, operands)
        self.order = order
        self.maps, self.described = maps, operands[-self.num_described :]
        self.type_name = PTX_NAMES[self.mma.mma.dtype]
        self.role = uniform(self.warp)  # the warp's number, without limits that tinygrad knows
        self.group = self.thread // (GROUP_WARPS * LANES)

    def make_inputs(self, inputs: UOp, operands: Sequence[UOp]) -> Inputs:
        step = Inputs(self.spec, inputs)
        step.tables = Tables(None, None, None, operands[0] if self.spec.has_sinks else None)
        return step

    def attend_and_store(self, out: UOp) -> UOp:
        # in this order, the few registers of those that fetch need not hold what the others compute with
        return UOp(Ops.BARRIER, src=(self._fetch(self._multiply(out, self._prepare())),))

    def _prepare(self) -> UOp:
        """The UOp after which the barriers are ready."""
        at, memory = self._barriers, declare(self.spec.shared_bytes)
        made = make_barriers(at + 16, 2 * STAGES, self.fillers, self.spec.groups, memory, *self.described_places())
        return UOp(Ops.BARRIER, src=(make_barriers(at, 1, 1, self.spec.groups, made),))

    @property
    def fillers(self) -> int:
        """How many arrivals tell that a stage is full."""
        return self.spec.fetchers

    def described_places(self) -> list[UOp]:
        """What the maps describe, so that tinygrad sees that it is read."""
        return [buffer[0] for buffer in self.described]

    # -- pieces of work ------------------------------------------------------------------------------------------------

    def make_grid(self) -> tuple[UOp | int, ...]:
        self.unit = grid(self.body, self.spec.num_units)
        return (self.unit,)

    def _number(self, turn: UOp) -> UOp:
        """The threadgroup's piece of work in a turn, of those in the order of their length: every second turn in
        reverse, so that the sums of lengths are about the same."""
        units, unit = self.spec.num_units, self.unit + UOp.const(0, dtypes.weakint)
        return turn * units + (turn % 2).eq(0).where(unit, units - 1 - unit)

    def _loop_pieces(self, has_role: UOp, *after: UOp) -> tuple[UOp, UOp, HopperTile]:
        """(a loop over the threadgroup's pieces of work, the number of the iteration, this on the piece: a tile of
        tokens and a KV head, and where its keys begin among all those that the threadgroup attends to). No iterations
        for threads without the role: tinygrad has no branches."""
        spec, heads, most = self.spec, self.spec.num_kv_heads, self.spec.max_tiles
        tiles = clamp(self.tiles[spec.map_size].load(), 0, most)
        whole = tiles * heads // spec.num_units
        count = whole + (self._number(whole) < tiles * heads).cast(dtypes.weakint)
        loop = self.body.fold_while(has_role * uniform(count.cast(I32)))
        turn = clamp(loop, 0, max(2, -(-most * heads // spec.num_units)) - 1)
        number = self._number(turn)
        piece = copy(self)
        rank = clamp(number // heads, 0, most - 1)
        piece.place(clamp(self.order[rank].load(), 0, most - 1), number % heads)
        piece.steps = (piece.context + (spec.keys - 1)) // spec.keys - piece.begin  # tiles of keys
        counter = self.body.registers(1, I32)
        counter = counter.after(counter.after(*self.axes, *after)[0].store(UOp.const(0, I32)))
        piece.counter = counter.after(loop)
        piece.before = clamp(piece.counter[0].load(), 0, 1 << 24)
        return loop, turn, piece

    def _end_piece(self, *after: UOp) -> UOp:
        """The last statements of a piece."""
        return together(self.counter.after(*after)[0].store((self.before + self.steps).cast(I32)), *after)

    def _loop_tiles(self, count: UOp, *after: UOp) -> tuple[UOp, UOp]:
        """(a loop over so many tiles of keys, what its statements come after)."""
        loop = self.body.fold(1 << 16)
        return loop, leave_if(loop >= count, loop, *after)

    # -- places in threadgroup memory, in bytes ------------------------------------------------------------------------

    @property
    def _barriers(self) -> int:
        """The queries' barriers, full and empty; those of full stages of keys, of values; of empty ones."""
        return self.spec.query_bytes + 2 * STAGES * self.spec.tile_bytes

    @property
    def _queries(self) -> tuple[UOp, UOp]:
        """(full barrier, empty barrier) of the queries."""
        return UOp.const(self._barriers, I32), UOp.const(self._barriers + 8, I32)

    def _stage(self, step: UOp | int, is_value: int) -> tuple[UOp, UOp, UOp, UOp]:
        """(tile, full barrier, empty barrier, parity of the phase) of the piece's tile of keys, or of values."""
        spec, number = self.spec, self.before + step
        slot, parity = number % STAGES + is_value * STAGES, number // STAGES % 2
        full = slot * 8 + (self._barriers + 16)
        return slot * spec.tile_bytes + spec.query_bytes, full, full + 2 * STAGES * 8, parity

    # -- the warp that fetches -----------------------------------------------------------------------------------------

    def _fetch(self, ready: UOp) -> UOp:
        """The work of the group of the fetching warp."""
        once = self.body.fold_while(uniform((self.role < self.spec.num_warps).where(UOp.const(0, I32), 1)))
        given = give_registers(self.spec.fetcher_registers, once, ready)
        loop, turn, piece = self._loop_pieces(self._fetches, once)
        for index in range(self.num_described):
            given = acquire_map(self._map(index), given)
        fetched = piece._fetch_tiles(piece._fetch_queries(turn, loop, given))
        return piece._end_piece(fetched).end(loop).end(once)

    @property
    def _is_fetcher(self) -> UOp:
        """1 in the warp that fetches."""
        return uniform(self.role.eq(self.spec.num_warps).where(UOp.const(1, I32), 0))

    @property
    def _fetches(self) -> UOp:
        """1 in the lanes that fetch."""
        return (self.lane < self.spec.fetchers).where(self._is_fetcher, 0)

    def _map(self, index: int) -> UOp:
        return self.maps[index * MAP_WORDS]

    def _fetch_queries(self, turn: UOp, *after: UOp) -> UOp:
        """The first lane fetches the queries."""
        spec, (full, empty) = self.spec, self._queries
        once = self.body.fold_while((self.lane < 1).where(self._is_fetcher, 0))
        last = wait(empty, 1 - turn % 2, once, *after)
        last = expect(full, spec.tokens * spec.group * spec.head_dim * 2, last)
        for tile in range(spec.head_dim // WGMMA_COLS):
            place = UOp.const(tile * spec.rows * ROW_BYTES, I32)
            at = [UOp.const(tile * WGMMA_COLS, I32), self.kv_head * spec.group + UOp.const(0, I32), self.first]
            last = fetch(place, self._map(QUERY_MAP), full, at, last)
        return last.end(once)

    def _fetch_tiles(self, ready: UOp) -> UOp:
        """Fetch the piece's tiles of keys and values in order, each as soon as its stage is empty."""
        spec = self.spec
        loop, last = self._loop_tiles(self.steps, ready)
        rows = self._block_rows(self.begin + loop)
        for is_value, index in enumerate((KEY_MAP, VALUE_MAP)):
            place, full, empty, parity = self._stage(loop, is_value)
            last = wait(empty, 1 - parity, last, *[row for row, _, _ in rows])
            last = expect(full, spec.tile_bytes // spec.fetchers, last)
            for row, block, tile in rows:
                target = place + tile * (spec.keys * ROW_BYTES) + block * (spec.layout.block_size * ROW_BYTES)
                column = self.kv_head * spec.head_dim + tile * WGMMA_COLS
                last = fetch(target, self._map(index), full, [column + UOp.const(0, I32), row], last)
        return last.end(loop)

    def _block_rows(self, tile: UOp) -> list[tuple[UOp, UOp | int, UOp | int]]:
        """(row of the pool, block of the tile of keys, tile of columns) of each copy of the lane. A block outside of
        the context or the window is one outside of the pool, which gives zeros."""
        spec, size, layout = self.spec, self.spec.layout.block_size, self.spec.layout
        per_block, rows = spec.head_dim // WGMMA_COLS, []
        for start in range(0, spec.keys // size * per_block, spec.fetchers):
            item = start if spec.fetchers == 1 else self.lane % spec.fetchers + start
            block = item // per_block
            number = tile * (spec.keys // size) + block
            wanted = number * size < self.context
            if spec.window is not None:
                wanted = wanted & (number * size + size > spec.first_key(self.position))
            at = spec.tables_start + self.sequence * layout.max_blocks + number.minimum(layout.max_blocks - 1)
            here = clamp(self.step.inputs[at].load(), 0, spec.num_blocks - 1)
            rows.append((wanted.where(here, spec.num_blocks) * size, block, item % per_block))
        return rows

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def _multiply(self, out: UOp, ready: UOp) -> UOp:
        """The work of the groups that multiply."""
        is_here = uniform((self.role < self.spec.num_warps).where(UOp.const(1, I32), 0))
        once = self.body.fold_while(is_here)
        taken = take_registers(self.spec.registers, once, ready)
        loop, turn, piece = self._loop_pieces(is_here, once)
        return piece._end_piece(piece._attend_one(out, turn, loop, taken)).end(loop).end(once)

    def _attend_one(self, out: UOp, turn: UOp, loop: UOp, ready: UOp) -> UOp:
        """A piece's attention, and its stores."""
        spec, body, (full, empty) = self.spec, self.body, self._queries
        stats, sums = body.registers(4), body.registers(spec.head_dim // 8 * 4)  # two rows' maxima and totals
        words = body.registers(spec.keys // 4, U32)  # the weights of a tile
        begun = [stats.after(loop)[i].store(value) for i, value in enumerate(self.initial_stats())]
        begun += [sums.after(loop)[i].store(value) for i, value in enumerate(zeros(sums.max_numel()))]
        stats, sums = stats.after(UOp.group(*begun)), sums.after(UOp.group(*begun))
        here = wait(full, turn % 2, ready, stats[0], sums[0])
        stats, words = self._first_tile(stats, words, here)
        for first, count, is_whole in self._walks_after_first():
            stats, sums, words = self._walk_keys(first, count, is_whole, stats, sums, words)
        released = self._release(empty, stats[0], sums[0], words[0])
        finished = self._last_tile(words, sums, released)
        totals = [spec.lanes.sum(stats.after(finished)[2 + row].load(), spec.mma.row_masks) for row in range(2)]
        return together(*self.row_stores(out, totals, read_sums(sums, finished)))

    def _walks_after_first(self) -> list[tuple[UOp | int, UOp, bool]]:
        """(number of the first tile of keys, count, whether all tokens attend to all of their keys) of each walk after
        the first tile: as `walks`."""
        if self.spec.window is not None:
            return [(1, self.steps - 1, False)]
        whole = ((self.position + 1) // self.spec.keys).maximum(1).minimum(self.steps)
        return [(1, whole - 1, True), (whole, self.steps - whole, False)]

    def _left(self) -> UOp:
        """Where the group's queries are."""
        return self.group * (WGMMA_TOKENS * ROW_BYTES)

    def _score(self, keys: UOp, scores: UOp, *after: UOp) -> UOp:
        spec = self.spec
        strides = (spec.rows * ROW_BYTES, spec.keys * ROW_BYTES)
        return start_scores(self.type_name, self._left(), keys, scores, spec.head_dim, strides, *after)

    def _weigh_values(self, words: UOp, values: UOp, sums: UOp, *after: UOp) -> UOp:
        four = [words[i].load() for i in range(words.max_numel())]
        return start_weighing(self.type_name, four, values, sums, self.spec.keys * ROW_BYTES, *after)

    def _first_tile(self, stats: UOp, words: UOp, here: UOp) -> tuple[UOp, UOp]:
        """(stats, words of weights) after the first tile of keys."""
        spec = self.spec
        keys, full, empty, parity = self._stage(0, 0)
        scores = self.body.registers(spec.keys // 2)
        waited = wait(full, parity, here)
        scored = await_products(0, scores, self._score(keys, scores, waited))
        released = self._release(empty, scored)
        old = [stats[i].load() for i in range(4)]
        new, _, weights = self._weigh_rows(scores, self.begin * spec.keys, old, released)
        kept = UOp.group(*[stats.after(released)[i].store(value) for i, value in enumerate(new)])
        return stats.after(kept), words.after(UOp.group(*word_stores(words.after(released), weights)))

    def _walk_keys(
        self, first: UOp | int, count: UOp, is_whole: bool, stats: UOp, sums: UOp, words: UOp
    ) -> tuple[UOp, UOp, UOp]:
        """The same after `count` more tiles of keys, from number `first` on, and the sums of the values before them."""
        spec = self.spec
        loop, going = self._loop_tiles(uniform(count), stats[0], sums[0], words[0])
        number = loop + first
        keys, full, empty, parity = self._stage(number, 0)
        values, values_full, values_empty, values_parity = self._stage(number - 1, 1)
        waited = wait(values_full, values_parity, wait(full, parity, going))
        scores = self.body.registers(spec.keys // 2)
        started = self._score(keys, scores.after(loop), waited)
        started = self._weigh_values(words.after(loop), values, sums.after(loop), started)
        scored = await_products(1, scores, started)
        released = self._release(empty, scored)
        old = [stats.after(loop)[i].load() for i in range(4)]
        first_key = None if is_whole else (number + self.begin) * spec.keys
        new, decays, weights = self._weigh_rows(scores, first_key, old, released)
        flat = [*new, *decays, *[value for block in weights for value in block]]
        finished = await_products(0, sums, released, *flat)
        released = self._release(values_empty, finished)
        scaled = [
            sums.after(finished)[i].store(value * decays[i % 4 // 2])
            for i, value in enumerate(read_sums(sums, finished))
        ]
        packed = word_stores(words.after(finished), weights)
        kept = [stats.after(finished)[i].store(value) for i, value in enumerate(new)]
        done = together(UOp.group(*scaled, *packed, *kept), released).end(loop)
        return stats.after(done), sums.after(done), words.after(done)

    def _last_tile(self, words: UOp, sums: UOp, here: UOp) -> UOp:
        """The end of the last products. Values after the context are zeros first: the pool may hold anything there, and
        a weight of 0 does not erase NaN."""
        last = self.steps - 1
        values, full, empty, parity = self._stage(last, 1)
        here = self.clear_outside(values, last, wait(full, parity, here))
        return self._release(empty, await_products(0, sums, self._weigh_values(words, values, sums, here)))

    def row_stores(self, out: UOp, totals: list[UOp], sums: list[UOp]) -> list[UOp]:
        """Stores of the results: of those of 16 bits, 16 bytes of a lane at once, for which four neighboring lanes
        exchange their words of 32 columns."""
        if out.dtype == F32:
            return self.stores(out, totals, sums)
        spec, inverses = self.spec, [total.reciprocal() for total in totals]
        # one that never happens, so that tinygrad sees a write: it does not see those of our own statements
        stores = [out[self.first.valid(opaque(self.role < 0))].store(UOp.const(0.0, out.dtype))]
        for row in range(2):
            place = self.first_row + self.mma.place(self.lane, 2 * row)[0]
            token, head = place // spec.group, place % spec.group
            is_real = (token < self.count) & (place < spec.tokens * spec.group)
            at = (self.first + token) * (spec.num_heads * spec.head_dim)
            at = at + (self.kv_head * spec.group + head) * spec.head_dim + self.lane % 4 * PIECE
            words = [
                self._word([sums[block * 4 + 2 * row + e] * inverses[row] for e in range(2)])
                for block in range(spec.head_dim // 8)
            ]
            for start in range(0, len(words), 4):
                own = self._exchange(words[start : start + 4])
                stores.append(statement(STORE_RESULTS, out[at + start * 8], *own, is_real))
        return stores

    def _word(self, values: list[UOp]) -> UOp:
        """Two results as they are stored."""
        if not self.spec.has_bfloat_results:
            return pack_words(*values)
        return join_bits(*[bits_of_bfloat(value) for value in values])

    def _exchange(self, words: list[UOp]) -> list[UOp]:
        """The words that four neighboring lanes have in the place of this lane: a transposition."""
        words = [word.bitcast(F32) for word in words]
        for bit in (1, 2):
            is_upper = (self.lane & bit).ne(0)
            for i in range(4):
                if i & bit:
                    continue
                low, high = words[i], words[i | bit]
                other = self.spec.lanes.shuffle(is_upper.where(low, high), bit)
                words[i], words[i | bit] = is_upper.where(other, low), is_upper.where(high, other)
        return [word.bitcast(U32) for word in words]

    def clear_outside(self, values: UOp, last: UOp, here: UOp) -> UOp:
        """Make the values of the last tile that are outside the context zeros."""
        spec, size = self.spec, self.spec.layout.block_size
        first, per_row = self.context - (last + self.begin) * spec.keys, spec.head_dim // PIECE
        thread, threads = self.thread % (GROUP_WARPS * LANES), GROUP_WARPS * LANES
        end = (first + (size - 1)) // size * size
        for start in range(0, size * per_row, threads):
            item = start + thread
            row, piece = first + item // per_row, item % per_row
            place = values + piece // 8 * (spec.keys * ROW_BYTES) + swizzled_place(row, piece % 8)
            here = clear_piece(place, row < end, here)
        return meet_threads(self.group + FIRST_GROUP, threads, fence_proxy(here))

    def _release(self, empty: UOp, *after: UOp) -> UOp:
        """Tell the fetching warp that this group of warps has read a stage."""
        return arrive(empty, (self.thread % (GROUP_WARPS * LANES)).eq(0), *after)

    def _weigh_rows(
        self, scores: UOp, first_key: UOp | int | None, old: list[UOp], *after: UOp
    ) -> tuple[list[UOp], list[UOp], list[list[UOp]]]:
        """As `weigh_rows`. `first_key`: the tile's first key, if some tokens do not attend to all of it."""
        blocks = score_blocks(self.spec, read_sums(scores, *after))
        if first_key is not None:
            blocks = [self._masked(block, 0, first_key + i * 8) for i, block in enumerate(blocks)]
        return weigh_rows(self.spec, blocks, old)


def score_blocks(spec: PrefillSpec, products: list[UOp]) -> list[list[UOp]]:
    """The scores of a lane's products of queries and keys, by block of eight keys."""
    scores = [spec.score(product, lambda x: quick_exp2(x, spec.tiles.kind)) for product in products]
    return [scores[i : i + 4] for i in range(0, len(scores), 4)]


def weigh_rows(
    spec: PrefillSpec, blocks: list[list[UOp]], old: list[UOp]
) -> tuple[list[UOp], list[UOp], list[list[UOp]]]:
    """(a lane's two rows' new maxima and sums of weights, factors by which earlier sums decay, the scores' weights)."""
    mma, best, decays, totals = spec.tiles, [], [], []
    for row in range(2):
        own = [value for block in blocks for value in block[2 * row : 2 * row + 2]]
        top = balanced(own, lambda a, b: quick_maximum(a, b, mma.kind))
        for mask in spec.mma.row_masks:
            top = _held(top)
            top = quick_maximum(top, spec.lanes.shuffle(top, mask), mma.kind)
        best.append(_held(quick_maximum(old[row], top, mma.kind)))
        decays.append(quick_exp2(old[row] - best[row], mma.kind))
    weights = [[quick_exp2(value - best[e // 2], mma.kind) for e, value in enumerate(block)] for block in blocks]
    for row in range(2):
        added = balanced([value for block in weights for value in block[2 * row : 2 * row + 2]], _plus)
        totals.append(old[2 + row] * decays[row] + added)
    return [*best, *totals], decays, weights


def word_stores(words: UOp, weights: list[list[UOp]]) -> list[UOp]:
    """Stores of the weights of a tile as an operand of wgmma."""
    packed = [pack_words(*block[e : e + 2]) for block in weights for e in (0, 2)]
    return [words[i].store(word) for i, word in enumerate(packed)]


def _held(value: UOp) -> UOp:
    """The value in a variable."""
    return UOp(Ops.CUSTOM, F32, src=(value,), arg="{0}")


def _plus(a: UOp, b: UOp) -> UOp:
    """The sum in this order: tinygrad would write a tree of sums as a chain, each of which waits for the one before."""
    return UOp(Ops.CUSTOMI, F32, src=(a, b), arg="({0} + {1})")


def swizzled_place(row: Number, piece: Number) -> Number:
    """The byte where a piece of 16 bytes of a row lies in one of Hopper's tiles."""
    return row * ROW_BYTES + (piece ^ (row % 8)) % 8 * (PIECE * 2)  # % 8: tinygrad does not know how large an xor gets
