"""Decoding attention on Hopper: the copy engine streams keys and values, a group of four warps attends to them.

A first kernel rotates the rows' queries and keys, and writes keys and values to the pool (attention_rotate.py). The
second one reads whole tiles of the pool. Its threadgroups are as many as the device holds at once, and each walks along
a list of pieces of work: a row, a KV head, and a split of the context. One warp fetches, for a piece and those after
it, as far ahead as there are stages, so that memory is never idle while a piece begins or ends. The query heads that
share the KV head are the first rows of a wgmma; its other rows cost nothing that is scarce here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tinygrad import Tensor, UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.attention_decode_row import GROUPS_AHEAD, LONG_CONTEXT, WIDE_HEAD
from tinyvllm.ops.gpu.attention_prefill_hopper import (
    score_blocks,
    swizzled_place,
    weigh_rows,
    word_stores,
)
from tinyvllm.ops.gpu.attention_prefill_inputs import BARRIER_BYTES, ROW_BYTES, Inputs, PrefillSpec
from tinyvllm.ops.gpu.attention_rotate import KEY_MAP, QUERY_MAP, VALUE_MAP, rotate
from tinyvllm.ops.gpu.attention_split import NOTHING, SplitHeads, combine_kernel
from tinyvllm.ops.gpu.tile_map import tile_map
from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    LOG2E,
    LOWEST,
    U32,
    Body,
    KernelFn,
    cached_kernel,
    clamp,
    empty,
    finish,
    run_kernel,
)
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    HOPPER_SHARED_BYTES,
    MAP_WORDS,
    MULTIPROCESSORS,
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
    hidden,
    leave_if,
    make_barriers,
    meet_threads,
    opaque,
    read_sums,
    share_multiprocessor,
    start_scores,
    start_weighing,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, await_previous, axes_of, grid, zeros
from tinyvllm.ops.kernel.tiles import PIECE, PTX_NAMES, together

MAX_SPLITS = 64
MAX_STAGES = 6
FULL_WAVES = 0.9  # the share of threadgroups that must have work at any time, if splits can achieve it
WORTHWHILE_BYTES = 250 << 20
# where rows share keys: on an H200, 5 rows at 300 tokens take 11.1 us and not 8.1, 8 at 2,000 14.8 and not 15.4, and
# 5 at 8,192 20.5 and not 50.1
LONG_SHARED = 4096
# one row, if contexts may have so many tokens: on an H200, steps of 3 layers at 8,000, 16,000 and 32,600 tokens take
# 237.5, 257.5 and 299.7 us and not 236.6, 261.1 and 314.3 (8B); 300.7, 309.7 and not 310.9, 326.2 (qwen2.5-7b)
STREAMED_CONTEXT = 16384
SHORTEST_SPLIT = 512  # tokens that are worth a piece of work of its own


def streams_one_row(head_dim: int) -> bool:
    """Whether one row of a long context is streamed. With heads of 64 that takes 9 to 20 % longer; others are not
    measured."""
    return head_dim == 128


@dataclass(frozen=True, kw_only=True)
class StreamedAttentionSpec(PrefillSpec):
    """Attention of a few rows on Hopper, each the last token of a sequence of its own, or several of a sequence."""

    shares_keys: bool = False  # rows of the same sequence are attended to together

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"keys": (64, 128), "units": (1, 2), "num_splits": (1, 2, 4, 8, 16, 33, 64), "fetchers": (1, 4)}

    def is_possible(self) -> bool:
        size = self.layout.block_size
        return self.keys % size == 0 and self.copies % self.fetchers == 0 and self.stages >= 2

    def uncovered_shape(self) -> str:
        if rest := super().uncovered_shape():
            return rest
        if self.kv.is_quantized:
            return f"keys and values in {self.kv.name}"
        return "" if self.uses_wgmma else "no wgmma"

    @property
    def is_worthwhile(self) -> bool:
        """Whether contexts may be long, and if rows do not share keys, whether there is much to read that
        `decode_kernel` reads more slowly: heads that are too wide for a lane's registers, or as many threadgroups as
        fetch ahead. (512 of them are 2 to 6 us faster alone, but whole steps of 64 rows of 8B's shape were slower.)
        With heads of 64 it is faster with any number (H200, 256 rows of 2,000 tokens: 250 us, not 278)."""
        longest = self.layout.max_blocks * self.layout.block_size
        longest = min(longest, self.window or longest)
        if self.shares_keys:
            return self.layout.num_tokens > 1 and longest >= LONG_SHARED
        if self.layout.num_tokens == 1:
            return longest >= STREAMED_CONTEXT and streams_one_row(self.head_dim)
        has_many = self.layout.num_tokens * self.num_kv_heads >= GROUPS_AHEAD
        suits = self.head_dim >= WIDE_HEAD or (self.head_dim > 64 and has_many)
        nbytes = self.layout.num_tokens * longest * self.slot_elements * 4
        return suits and longest >= LONG_CONTEXT and nbytes >= WORTHWHILE_BYTES

    @property
    def groups(self) -> int:
        return 1

    @property
    def tokens(self) -> int:
        """Rows of a piece of work: as many as there are rows of wgmma for."""
        return min(WGMMA_TOKENS // self.group, self.layout.num_tokens) if self.shares_keys else 1

    @property
    def keys(self) -> int:
        return self.knob("keys", 64)

    @property
    def units(self) -> int:
        """Threadgroups of a multiprocessor at a time."""
        return self.knob("units", 2 if self.head_dim <= 128 else 1)

    @property
    def query_tile_bytes(self) -> int:
        """Of 64 columns of a piece's queries. wgmma reads more rows, which are of something else: their results are not
        used."""
        return -(-self.tokens * self.group // 8) * 8 * ROW_BYTES

    @property
    def query_bytes(self) -> int:
        return self.head_dim // WGMMA_COLS * self.query_tile_bytes

    @property
    def stage_bytes(self) -> int:
        """Of a tile of keys and one of values."""
        return 2 * self.tile_bytes

    @property
    def stages(self) -> int:
        room = HOPPER_SHARED_BYTES // self.units - 1024 - 2 * self.query_bytes - BARRIER_BYTES
        return min(MAX_STAGES, room // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return 2 * self.query_bytes + self.stages * self.stage_bytes + BARRIER_BYTES

    @property
    def num_splits(self) -> int:
        """Parts of a context: so many that the pieces of work fill the threadgroups, if contexts may be long. Where
        rows share keys, even if all rows are of as few sequences as they can be. One row's take one turn."""
        longest = self.layout.max_blocks * self.layout.block_size
        longest = min(longest, self.window or longest)
        pairs, places = -(-self.layout.num_tokens // self.tokens) * self.num_kv_heads, MULTIPROCESSORS * self.units
        most = max(1, min(MAX_SPLITS, longest // SHORTEST_SPLIT))

        def share(splits: int) -> float:
            return pairs * splits / (-(-pairs * splits // places) * places)

        if self.layout.num_tokens == 1:
            return self.knob("num_splits", max(1, min(most, places // pairs)))
        splits = next((s for s in range(1, most + 1) if share(s) >= FULL_WAVES), max(range(1, most + 1), key=share))
        return self.knob("num_splits", splits)

    @property
    def split(self) -> SplitHeads:
        return SplitHeads(
            self.layout,
            self.num_heads,
            self.head_dim,
            self.num_splits,
            self.window,
            has_own_token=True,
            shortest_span=SHORTEST_SPLIT,
            unit=self.keys,
            is_sparse=self.shares_keys,
        )

    @property
    def num_pieces(self) -> int:
        """Pieces of work, at most."""
        return self.num_splits * self.layout.num_tokens * self.num_kv_heads

    @property
    def num_units(self) -> int:
        return min(self.num_pieces, MULTIPROCESSORS * self.units)


def attend_streamed(
    spec: StreamedAttentionSpec,
    out: Tensor,
    pool: Sequence[Tensor],
    layer: AttentionLayer,
    step: Step,
    qkv: Sequence[Tensor],
) -> Tensor:
    """Write the rotated keys and the values to the pool, unless an earlier layer has, and attend. Writes and returns
    `out` (T, H * D)."""
    split, device = spec.split, str(out.device)
    queries, maps, pool = rotate(spec, pool, layer, step, qkv)
    sinks = [] if layer.sinks is None else [layer.sinks]
    tiles = [tile_map(spec, step)] if spec.shares_keys else []
    operands = [maps, *tiles, step.inputs, *sinks, queries, *pool]
    if split.num_splits == 1:
        return run_kernel(stream_kernel(spec), [out], operands)[0]
    rows = split.num_splits * step.num_tokens
    parts = [empty(rows * split.num_cols, F32, device), empty(rows * split.num_heads, F32, device)]
    values, sums = run_kernel(stream_kernel(spec), parts, operands)
    combine = combine_kernel(split, spec.lanes, spec.has_bfloat_results)
    return run_kernel(combine, [out], [values, sums, step.inputs])[0]


@cached_kernel
def stream_kernel(spec: StreamedAttentionSpec) -> KernelFn:
    """fn(out (T, H * D), maps[, tiles], inputs, *sinks, queries, keys, values), the last three as `maps` describe them;
    with splits, fn(values, sums, maps, ...), which `combine_kernel` combines. tiles: which rows share keys, if any
    do."""

    def kernel(*operands: UOp) -> UOp:
        count = 1 if spec.num_splits == 1 else 2
        stream = _Stream(spec, operands[:count], operands[count:])
        tokens, length = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        return finish(
            stream.done().end(*reversed(stream.axes)),
            f"stream_attention_{tokens}x{spec.num_heads}x{spec.head_dim}",
            ops=4 * tokens * spec.num_heads * spec.head_dim * length,
            nbytes=4 * tokens * spec.slot_elements * length,
        )

    return kernel


Number = TypeVar("Number", int, UOp)


def piece_of(spec: StreamedAttentionSpec, number: Number, count: Number | int) -> tuple[Number, Number, Number]:
    """(split, row or group of rows, KV head) of a piece of work, if there are so many rows or groups. Splits that short
    contexts do not use come last."""
    kv_head, rest = number % spec.num_kv_heads, number // spec.num_kv_heads
    return rest // count, rest % count, kv_head


@dataclass(frozen=True)
class _Piece:
    """A piece of work: tokens [low, high) of the context of `count` rows from `row` on, consecutive tokens of a
    sequence, and a KV head. `past`: tokens before the first row. `tiles`: of keys, from `low` on."""

    row: UOp
    count: UOp | int
    kv_head: UOp
    split: UOp
    past: UOp
    low: UOp
    high: UOp
    tiles: UOp


class _Stream:
    """One threadgroup's work."""

    def __init__(self, spec: StreamedAttentionSpec, outs: Sequence[UOp], operands: Sequence[UOp]) -> None:
        """`operands`: as of `stream_kernel`, from `maps` on."""
        self.spec, self.outs, self.described = spec, outs, operands[-3:]
        count = 2 if spec.shares_keys else 1  # of buffers that the step's kernels wrote
        inputs, *rest = operands[count:]
        self.sinks = rest[0] if spec.has_sinks else None
        self.step, body = Inputs(spec, inputs), Body()
        self.body = body
        self.unit = grid(body, spec.num_units)
        self.lane, self.warp = body.threads(LANES), body.threads(GROUP_WARPS + 1)
        self.axes = axes_of(self.unit, self.lane, self.warp)
        self.role = uniform(self.warp)
        self.type_name = PTX_NAMES[spec.mma.dtype]
        self.maps, *self.row_tiles = await_previous(spec.lanes, *operands[:count])

    def done(self) -> UOp:
        ready = self._prepare()
        return UOp(Ops.BARRIER, src=(self._fetch_pieces(ready), self._attend_pieces(ready)))

    def _prepare(self) -> UOp:
        """The UOp after which the barriers are ready."""
        spec, at = self.spec, self._barriers
        memory, shares = declare(spec.shared_bytes), share_multiprocessor(spec.units)
        seen = [buffer[0] for buffer in self.described]  # what the maps describe is read, as tinygrad must know
        made = make_barriers(at, 2, 1, 1, memory, shares, self.maps[0], *seen)
        return UOp(Ops.BARRIER, src=(make_barriers(at + 32, spec.stages, spec.fetchers, 1, made),))

    # -- pieces of work ------------------------------------------------------------------------------------------------

    def _loop_pieces(self, has_role: UOp) -> tuple[UOp, UOp, _Piece]:
        """(a loop over the threadgroup's pieces, the number of the iteration, the piece). No iterations for threads
        without the role: tinygrad has no branches."""
        spec, groups = self.spec, self._num_groups
        pieces = groups * (spec.num_splits * spec.num_kv_heads)
        count = (pieces - 1 - self.unit + spec.num_units) // spec.num_units
        loop = self.body.fold_while(hidden(has_role.ne(0).where(count, 0).cast(I32)))
        turn = clamp(loop, 0, max(2, -(-spec.num_pieces // spec.num_units)) - 1)
        number = (turn * spec.num_units + self.unit).minimum(spec.num_pieces - 1)
        split, group, kv_head = piece_of(spec, number, groups)
        row, rows = self._rows_of(group)
        past = self.step.position(row)
        low, high = self._bounds(past, rows, split)
        tiles = ((high - low).maximum(0) + (spec.keys - 1)) // spec.keys
        return loop, turn, _Piece(row, rows, kv_head, split, past, low, high, tiles)

    @property
    def _num_groups(self) -> UOp | int:
        """How many rows, or groups of rows that share keys, there are."""
        if not self.row_tiles:
            return self.spec.layout.num_tokens
        return clamp(self.row_tiles[0][self.spec.map_size].load(), 1, self.spec.max_tiles)

    def _rows_of(self, group: UOp) -> tuple[UOp, UOp | int]:
        """(the first row of a group, how many it has)."""
        if not self.row_tiles:
            return group, 1
        tokens, (tiles,) = self.spec.layout.num_tokens, self.row_tiles
        group = group.minimum(self.spec.max_tiles - 1)
        row, end = (clamp(tiles[at].load(), 0, tokens) for at in (group, group + 1))
        return row.minimum(tokens - 1), (end - row).maximum(1).minimum(self.spec.tokens)

    @property
    def _most_tiles(self) -> int:
        """Tiles of the longest piece, at least two, so that there is a loop."""
        return max(2, -(-self.step.positions // self.spec.keys))

    def _loop_tiles(self, count: UOp, *after: UOp) -> tuple[UOp, UOp]:
        """(a loop over a piece's tiles, what its statements come after)."""
        loop = self.body.fold(self._most_tiles)
        return loop, leave_if(loop >= count, loop, *after)

    def _bounds(self, past: UOp, count: UOp | int, number: UOp) -> tuple[UOp, UOp]:
        """The tokens [low, high) of a split of the context of `count` rows with `past` tokens before them."""
        split, end = self.spec.split, past + count
        start = split.start(past) + 0 * past
        if split.num_splits == 1:
            return start, end
        span = split.span(end - start)
        low = start + number * span
        return low, (low + span).minimum(end)

    # -- places in threadgroup memory, in bytes ------------------------------------------------------------------------

    @property
    def _barriers(self) -> int:
        """Of queries: two full ones, two empty ones. Of stages: full ones, empty ones."""
        return 2 * self.spec.query_bytes + self.spec.stages * self.spec.stage_bytes

    def _query_slot(self, turn: UOp) -> tuple[UOp, UOp, UOp, UOp]:
        """(queries, full barrier, empty barrier, parity) of the turn-th piece."""
        full = turn % 2 * 8 + self._barriers
        return turn % 2 * self.spec.query_bytes, full, full + 16, turn // 2 % 2

    def _stage(self, number: UOp) -> tuple[UOp, UOp, UOp, UOp]:
        """(keys, full barrier, empty barrier, parity) of the number-th tile since the beginning."""
        spec = self.spec
        slot, full = number % spec.stages, number % spec.stages * 8 + (self._barriers + 32)
        place = slot * spec.stage_bytes + 2 * spec.query_bytes
        return place, full, full + spec.stages * 8, number // spec.stages % 2

    def _counter(self, *after: UOp) -> UOp:
        """A register that counts tiles."""
        counter = self.body.registers(1, I32)
        return counter.after(counter.after(*self.axes, *after)[0].store(UOp.const(0, I32)))

    # -- the warp that fetches -----------------------------------------------------------------------------------------

    def _fetch_pieces(self, ready: UOp) -> UOp:
        spec = self.spec
        is_fetcher = uniform(self.role.eq(GROUP_WARPS).where(UOp.const(1, I32), 0))
        loop, turn, piece = self._loop_pieces((self.lane < spec.fetchers).where(is_fetcher, 0))
        counter = self._counter(ready)
        before = clamp(counter.after(loop)[0].load(), 0, 1 << 24)
        acquired = loop
        for index in range(3):
            acquired = acquire_map(self.maps[index * MAP_WORDS], acquired, ready)
        queries = self._fetch_queries(turn, piece, acquired)
        step, going = self._loop_tiles(piece.tiles, queries)
        tile = clamp(step, 0, self._most_tiles - 1)
        place, full, empty_barrier, parity = self._stage(before + tile)
        rows = self._block_rows(piece, tile)
        last = wait(empty_barrier, 1 - parity, going, *[row for row, _, _ in rows])
        last = expect(full, spec.stage_bytes // spec.fetchers, last)
        for is_value, index in enumerate((KEY_MAP, VALUE_MAP)):
            for row, block, cols in rows:
                target = place + is_value * spec.tile_bytes + cols * (spec.keys * ROW_BYTES)
                target = target + block * (spec.layout.block_size * ROW_BYTES)
                column = piece.kv_head * spec.head_dim + cols * WGMMA_COLS
                last = fetch(target, self.maps[index * MAP_WORDS], full, [column + UOp.const(0, I32), row], last)
        fetched = last.end(step)
        kept = counter.after(fetched)[0].store((before + piece.tiles).cast(I32))
        return kept.end(loop)

    def _fetch_queries(self, turn: UOp, piece: _Piece, *after: UOp) -> UOp:
        """The first lane fetches the queries of a piece."""
        spec = self.spec
        place, full, empty_barrier, parity = self._query_slot(turn)
        once = self.body.fold_while(uniform(self.lane.eq(0).where(UOp.const(1, I32), 0)) * self.lane.eq(0).cast(I32))
        last = wait(empty_barrier, 1 - parity, once, *after)
        last = expect(full, spec.tokens * spec.group * spec.head_dim * 2, last)
        for tile in range(spec.head_dim // WGMMA_COLS):
            at = [UOp.const(tile * WGMMA_COLS, I32), piece.kv_head * spec.group + UOp.const(0, I32), piece.row]
            target = place + tile * spec.query_tile_bytes
            last = fetch(target, self.maps[QUERY_MAP * MAP_WORDS], full, at, last)
        return last.end(once)

    def _block_rows(self, piece: _Piece, tile: UOp) -> list[tuple[UOp, UOp | int, UOp | int]]:
        """(row of the pool, block of the tile of keys, tile of columns) of each copy of the lane. A block outside of
        the piece or the window is one outside of the pool, which gives zeros."""
        spec, size, layout = self.spec, self.spec.layout.block_size, self.spec.layout
        sequence = self.step.sequence(piece.row)
        per_block, rows = spec.head_dim // WGMMA_COLS, []
        for start in range(0, spec.keys // size * per_block, spec.fetchers):
            item = start if spec.fetchers == 1 else self.lane % spec.fetchers + start
            block = item // per_block
            token = piece.low + tile * spec.keys + block * size
            wanted = token < piece.high
            if spec.window is not None:
                wanted = wanted & (token + size > spec.first_key(piece.past))
            at = spec.tables_start + sequence * layout.max_blocks + (token // size).minimum(layout.max_blocks - 1)
            here = clamp(self.step.inputs[at].load(), 0, spec.num_blocks - 1)
            rows.append((wanted.where(here, spec.num_blocks) * size, block, item % per_block))
        return rows

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def _attend_pieces(self, ready: UOp) -> UOp:
        spec, body = self.spec, self.body
        loop, turn, piece = self._loop_pieces(uniform((self.role < GROUP_WARPS).where(UOp.const(1, I32), 0)))
        counter = self._counter(ready)
        before = clamp(counter.after(loop)[0].load(), 0, 1 << 24)
        queries, full, empty_barrier, parity = self._query_slot(turn)
        stats, sums = body.registers(4), body.registers(spec.head_dim // 8 * 4)
        begun = [stats.after(loop, ready)[i].store(value) for i, value in enumerate(self._initial_stats(piece))]
        begun += [sums.after(loop, ready)[i].store(value) for i, value in enumerate(zeros(sums.max_numel()))]
        stats, sums = stats.after(UOp.group(*begun)), sums.after(UOp.group(*begun))
        here = wait(full, parity, stats[0], sums[0])
        walked = self._walk(piece, before, queries, stats, sums, here)
        stats, sums = stats.after(walked), sums.after(walked)
        released = self._release(empty_barrier, stats[0])
        totals = [spec.lanes.sum(stats[2 + row].load(), spec.mma.row_masks) for row in range(2)]
        bests = [stats[row].load() for row in range(2)]
        stores = self._stores(piece, bests, totals, [sums[i].load() for i in range(sums.max_numel())])
        kept = counter.after(walked)[0].store((before + piece.tiles).cast(I32))
        return together(UOp.group(*stores, kept), released).end(loop)

    def _walk(self, piece: _Piece, before: UOp, queries: UOp, stats: UOp, sums: UOp, here: UOp) -> UOp:
        """The end of the walk along a piece's tiles."""
        spec = self.spec
        loop, going = self._loop_tiles(uniform(piece.tiles), here)
        tile = clamp(loop, 0, self._most_tiles - 1)
        keys, full, empty_barrier, parity = self._stage(before + tile)
        values, first = keys + spec.tile_bytes, piece.low + tile * spec.keys
        waited = self._clear_values(values, piece.high - first, wait(full, parity, going))
        scores = self.body.registers(spec.keys // 2)
        strides = (spec.query_tile_bytes, spec.keys * ROW_BYTES)
        started = start_scores(self.type_name, queries, keys, scores.after(loop), spec.head_dim, strides, waited)
        scored = await_products(0, scores, started)
        blocks = score_blocks(spec, read_sums(scores, scored))
        blocks = [self._masked(block, piece, first + i * 8) for i, block in enumerate(blocks)]
        new, decays, weights = weigh_rows(spec, blocks, [stats.after(loop)[i].load() for i in range(4)])
        old = sums.after(loop)
        scaled = [old[i].store(old[i].load() * decays[i % 4 // 2]) for i in range(sums.max_numel())]
        words = self.body.registers(spec.keys // 4, U32)
        words = words.after(UOp.group(*word_stores(words.after(loop), weights)))
        four = [words[i].load() for i in range(words.max_numel())]
        begun = sums.after(UOp.group(*scaled))
        weighed = start_weighing(self.type_name, four, values, begun, spec.keys * ROW_BYTES, scored)
        finished = await_products(0, begun, weighed)
        released = self._release(empty_barrier, finished)
        kept = UOp.group(*[stats.after(loop)[i].store(value) for i, value in enumerate(new)])
        return together(kept, released).end(loop)

    def _initial_stats(self, piece: _Piece) -> list[UOp]:
        """The maxima by row, and then the lane's sums of weights, before the first tile: nothing, or in the first split
        the heads' sinks."""
        spec = self.spec
        if self.sinks is None:
            return [UOp.const(LOWEST, F32)] * 2 + zeros(2)
        bests, totals, is_first = [], [], piece.split.eq(0)
        for i in range(2):
            row, column = self._place(2 * i)
            sink = self.sinks[piece.kv_head * spec.group + row % spec.group].load() * LOG2E
            bests.append(is_first.where(sink, LOWEST))
            totals.append((is_first & column.eq(0)).where(UOp.const(1.0, F32), UOp.const(0.0, F32)))
        return bests + totals

    def _place(self, element: int) -> tuple[UOp, UOp]:
        """(row, column in the block) of a lane's element of a block."""
        row, column = self.spec.tiles.place(self.lane, element)
        return self.warp % GROUP_WARPS * self.spec.tiles.left_rows + row, column

    def _masked(self, scores: list[UOp], piece: _Piece, first: UOp) -> list[UOp]:
        """The scores of a block of eight keys, LOWEST where the row does not attend to the key."""
        masked = []
        for e, score in enumerate(scores):
            row, column = self._place(e)
            key, position = first + column, piece.past + row // self.spec.group
            is_seen = key < piece.high
            if self.spec.shares_keys:
                is_seen = is_seen & (key <= position)
            if self.spec.window is not None:
                is_seen = is_seen & (key >= self.spec.first_key(position if self.spec.shares_keys else piece.past))
            masked.append(is_seen.where(score, LOWEST))
        return masked

    def _clear_values(self, values: UOp, count: UOp, here: UOp) -> UOp:
        """Make those after the first `count` values of a tile zeros, as far as their block goes: the pool may hold
        anything there, and a weight of 0 does not erase NaN."""
        spec, size = self.spec, self.spec.layout.block_size
        per_row, threads = spec.head_dim // PIECE, GROUP_WARPS * LANES
        first = count.minimum(spec.keys)
        end = (first + (size - 1)) // size * size
        for start in range(0, size * per_row, threads):
            item = self.warp % GROUP_WARPS * LANES + self.lane + start
            row, piece = first + item // per_row, item % per_row
            place = values + piece // 8 * (spec.keys * ROW_BYTES) + swizzled_place(row, piece % 8)
            here = clear_piece(place, row < end, here)
        return meet_threads(UOp.const(1, I32), threads, fence_proxy(here))

    def _stores(self, piece: _Piece, bests: list[UOp], totals: list[UOp], sums: list[UOp]) -> list[UOp]:
        spec, tokens, stores = self.spec, self.spec.layout.num_tokens, []
        is_whole = spec.num_splits == 1
        first = piece.row if is_whole else piece.split * tokens + piece.row
        for e in range(4):
            if e // 2 * 8 >= spec.tokens * spec.group:
                continue  # rows of no head
            row, column = self._place(e)
            token = row // spec.group if spec.shares_keys else 0
            head = (first + token) * spec.num_heads + piece.kv_head * spec.group + row % spec.group
            exists = row < piece.count * spec.group
            is_real = opaque(exists & (piece.tiles > 0))
            total = totals[e // 2]
            safe = total if is_whole else (total > 0.0).where(total, 1.0)
            inverse, start = safe.reciprocal(), head * spec.head_dim + column
            for block in range(spec.head_dim // 8):
                value = sums[block * 4 + e] * inverse
                value = spec.result(value, self.outs[0]) if is_whole else value.cast(self.outs[0].dtype)
                stores.append(self.outs[0][(start + block * 8).valid(is_real)].store(value))
            if not is_whole and e % 2 == 0:
                sees = total > 0.0
                if spec.shares_keys:
                    sees = sees & self._sees(piece, piece.past + token)
                lse = sees.where(bests[e // 2] + safe.log2(), NOTHING)
                is_real = opaque((exists if spec.shares_keys else is_real) & column.eq(0))
                stores.append(self.outs[1][head.valid(is_real)].store(lse))
        return stores

    def _sees(self, piece: _Piece, position: UOp) -> UOp:
        """Whether a row attends to anything in the piece: what it has of other keys is nothing, but not zero."""
        sees = position >= piece.low
        if self.spec.window is not None:
            sees = sees & (self.spec.first_key(position) < piece.high)
        return sees if self.sinks is None else sees | piece.split.eq(0)

    def _release(self, barrier: UOp, *after: UOp) -> UOp:
        """Tell the fetching warp that its buffer has been read."""
        return arrive(barrier, self.warp.eq(0) & self.lane.eq(0), *after)


assert WGMMA_TOKENS == GROUP_WARPS * 16
