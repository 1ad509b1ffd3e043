"""Token rows sorted by expert, on the device, and the map of the tiles that products of several rows work on.

A counting sort that is the same every time: each threadgroup has a part of the pairs of tokens and experts, and each of
its threads one expert's pairs in a piece of that part, which it counts and then places. One part takes one kernel; if
there are more, `count_kernel` counts before.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.ops.gpu.token_tiles import TILE_WORDS, ExpertTiles
from tinyvllm.ops.kernel.body import F16, I32, Body, KernelFn, balanced, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous, axes_of, load_floats

PART = 1024  # pairs of a threadgroup
THREADS = 512
UNROLLED = 4
SECTIONS = 16  # experts that are looked at together
GATHER_THREADS = 256
RUN_COLS = 8  # columns that a thread copies
NO_EXPERT = -1


@dataclass(frozen=True)
class OrderSpec:
    """pairs (P,), tile map (tiles, 4) and the number of used tiles = the order of ids (P,)."""

    lanes: Lanes
    num_experts: int
    num_pairs: int  # P
    num_tiles: int
    tile_rows: int

    @classmethod
    def of(cls, lanes: Lanes, tiles: ExpertTiles) -> OrderSpec:
        """The order that a product's tiles have."""
        return cls(lanes, tiles.num_experts, tiles.num_pairs, tiles.num_tiles, tiles.tile_rows)

    @property
    def padded(self) -> int:
        """Threads that have an expert each."""
        return -(-self.num_experts // LANES) * LANES

    @property
    def pieces(self) -> int:
        """Pieces of a part, for which a threadgroup has threads."""
        return max(1, THREADS // self.padded)

    @property
    def parts(self) -> int:
        return -(-self.num_pairs // PART)

    @property
    def piece_pairs(self) -> int:
        """Pairs of a piece: a multiple of those that are looked at together, and not so few that a loop is none."""
        pairs = min(self.num_pairs, PART)
        return max(2, -(-pairs // (self.pieces * UNROLLED))) * UNROLLED

    @property
    def map_size(self) -> int:
        return self.num_tiles * TILE_WORDS + 1

    @property
    def counts_size(self) -> int:
        return self.parts * self.padded


def most_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that pairs of any experts fill: each expert's last one may be short."""
    touched = min(num_pairs, num_experts)
    return (num_pairs + touched * (tile_rows - 1)) // tile_rows


@cached_kernel
def count_kernel(spec: OrderSpec) -> KernelFn:
    """fn(counts (parts, experts), ids): pairs of each expert in each part."""

    def kernel(counts: UOp, ids: UOp) -> UOp:
        (ids,) = await_previous(spec.lanes, ids)
        part = _Part(spec, ids)
        total = part.sum_of(part.counted(), spec.pieces, 0, spec.padded, part.expert)
        at = (part.number * spec.padded + part.expert).valid(part.condition(part.piece.eq(0)))
        return finish(counts[at].store(total).end(*reversed(part.axes)), f"count_experts_{spec.num_pairs}")

    return kernel


@cached_kernel
def order_kernel(spec: OrderSpec) -> KernelFn:
    """fn(pairs, tile map, ids[, counts of several parts]): see OrderSpec."""

    def kernel(pairs: UOp, tiles: UOp, ids: UOp, *counts: UOp) -> UOp:
        awaited, *totals = await_previous(spec.lanes, ids, *counts)
        part = _Part(spec, awaited)
        counted = part.counted()
        before = part.sum_of(counted, spec.pieces, 0, spec.padded, part.expert, below=part.piece)
        if totals:
            total = part.sum_of(totals[0], spec.parts, 0, spec.padded, part.expert)
            before = before + part.sum_of(totals[0], spec.parts, 0, spec.padded, part.expert, below=part.number)
        else:
            total = part.sum_of(counted, spec.pieces, 0, spec.padded, part.expert)
        sections = _Sections(part, total)
        stores = [part.place(pairs, sections.start(part.expert) + before)]
        stores += sections.write_map(tiles)
        name = f"order_experts_{spec.num_pairs}x{spec.num_experts}"
        return finish(UOp.group(*stores).end(*reversed(part.axes)), name, nbytes=8 * spec.num_pairs)

    return kernel


@dataclass(frozen=True)
class GatherSpec:
    """sorted rows (P, K) of x (T, K), in the matrix unit's dtype."""

    num_pairs: int  # P
    num_chosen: int  # k
    num_cols: int  # K
    dtype: DType


@cached_kernel
def gather_kernel(spec: GatherSpec) -> KernelFn:
    """fn(out (P, K) float16, x, pairs): the rows of x sorted by expert; bfloat16 as its bits."""

    def kernel(out: UOp, x: UOp, pairs: UOp) -> UOp:
        body, per_row = Body(), spec.num_cols // RUN_COLS
        total = spec.num_pairs * per_row
        group, thread = body.grid(-(-total // GATHER_THREADS)), body.threads(GATHER_THREADS)
        piece = (group * GATHER_THREADS + thread).minimum(total - 1)  # the last one again: no condition
        row, start = piece // per_row, piece % per_row * RUN_COLS
        token = clamp(pairs[row].load(), 0, spec.num_pairs - 1) // spec.num_chosen
        values = load_floats(x, token * spec.num_cols + start, RUN_COLS)
        halves = [value.cast(spec.dtype) for value in values]
        if spec.dtype != F16:
            halves = [value.bitcast(F16) for value in halves]
        stores = [out[row * spec.num_cols + start + i].store(value) for i, value in enumerate(halves)]
        ended = UOp.group(*stores).end(thread, group)
        return finish(ended, f"sort_rows_{spec.num_pairs}x{spec.num_cols}", nbytes=4 * spec.num_pairs * spec.num_cols)

    return kernel


class _Part:
    """A threadgroup's part of the pairs. The part's ids are in threadgroup memory."""

    def __init__(self, spec: OrderSpec, ids: UOp) -> None:
        self.spec, self.body = spec, Body()
        self.number = self.body.grid(spec.parts)
        self.expert = self.body.threads(spec.padded)
        self.piece = self.body.threads(spec.pieces)
        self.axes = axes_of(self.number, self.expert, self.piece)
        self.thread = self.piece * spec.padded + self.expert
        self.threads = spec.padded * spec.pieces
        self.ids = self._load(ids)

    def _load(self, ids: UOp) -> UOp:
        spec, stores = self.spec, []
        size = spec.pieces * spec.piece_pairs
        shared = self.body.shared(size, I32)
        for start in range(0, size, self.threads):
            index = start + self.thread
            pair = self.number * PART + index
            is_real = (pair < spec.num_pairs) & (index < PART)
            value = is_real.where(ids[is_real.where(pair, 0)].load(), NO_EXPERT)
            at = index if start + self.threads <= size else index.valid(index < size)
            stores.append(shared[at].store(value))
        return shared.after(UOp.group(*stores))

    def register(self, value: UOp | int, *after: UOp) -> UOp:
        register = self.body.registers(1, I32)
        return register.after(register.after(*self.axes, *after)[0].store(UOp.const(0, I32) + value))

    def condition(self, flag: UOp) -> UOp:
        """A store's condition, by way of a register: tinygrad would otherwise apply it to all that the value depends
        on."""
        return self.register(flag.cast(I32))[0].load().ne(0)

    def counted(self) -> UOp:
        """Each thread's pairs, (pieces, experts) in threadgroup memory."""
        spec, count = self.spec, self.register(0)
        loop = self.body.fold(spec.piece_pairs // UNROLLED)
        inner, first = count.after(loop), self.piece * spec.piece_pairs + loop * UNROLLED
        own = [self.ids[first + i].load().eq(self.expert.cast(I32)).cast(I32) for i in range(UNROLLED)]
        done = inner[0].store(inner[0].load() + sum(own[1:], own[0])).end(loop)
        shared = self.body.shared(self.threads, I32)
        return shared.after(shared[self.thread].store(count.after(done)[0].load()))

    def sum_of(
        self, values: UOp, count: int, start: UOp | int, stride: int, column: UOp, below: UOp | None = None
    ) -> UOp:
        """The sum of a column of `values`, or of its entries before number `below`."""
        total = self.register(0, values)
        if count == 1:
            here = values[start + column].load()
            return here if below is None else UOp.const(0, I32)
        loop = self.body.fold(count)
        inner, here = total.after(loop), values[start + loop * stride + column].load()
        if below is not None:
            here = (loop < below).where(here, 0)
        done = inner[0].store(inner[0].load() + here).end(loop)
        return total.after(done)[0].load()

    def place(self, pairs: UOp, first: UOp) -> UOp:
        """Store the thread's pairs, from place `first` on."""
        spec = self.spec
        index, flag = self.register(first), self.body.registers(1, I32)
        loop = self.body.fold(spec.piece_pairs)
        inner, local = index.after(loop), self.piece * spec.piece_pairs + loop
        is_own = self.ids[local].load().eq(self.expert.cast(I32)).cast(I32)
        # by way of a register, as in `condition`
        held = flag.after(flag.after(inner)[0].store(is_own))[0].load()
        at = clamp(inner[0].load(), 0, spec.num_pairs - 1).valid(held.ne(0))
        written = pairs[at].store((self.number * PART + local).cast(I32))
        moved = inner.after(written)[0].store(inner[0].load() + held)
        return UOp.group(written, moved).end(loop)


class _Sections:
    """The experts' sections of the sorted rows: where each begins, in rows and in tiles."""

    def __init__(self, part: _Part, total: UOp) -> None:
        self.part, spec, body = part, part.spec, part.body
        is_first = part.condition(part.piece.eq(0))
        totals, self.starts, self.firsts = (body.shared(spec.padded + 1, I32) for _ in range(3))
        held = part.register(total)[0].load()
        totals = totals.after(totals[part.expert.valid(is_first)].store(held))
        sums = [part.register(0, totals), part.register(0, totals)]
        loop = body.fold(spec.padded // SECTIONS)
        experts = [loop * SECTIONS + i for i in range(SECTIONS)]
        before = [(expert < part.expert).where(totals[expert].load(), 0) for expert in experts]
        new = [balanced(before), balanced((here + (spec.tile_rows - 1)) // spec.tile_rows for here in before)]
        inner = [each.after(loop)[0] for each in sums]
        done = UOp.group(*[at.store(at.load() + value) for at, value in zip(inner, new, strict=True)]).end(loop)
        start, tile = (each.after(done)[0].load() for each in sums)
        ends = [start + held, tile + (held + (spec.tile_rows - 1)) // spec.tile_rows]
        is_last = part.condition(part.piece.eq(0) & part.expert.eq(spec.padded - 1))
        last = part.expert + 1
        stores = []
        for shared, value, end in zip((self.starts, self.firsts), (start, tile), ends, strict=True):
            stores += [shared[part.expert.valid(is_first)].store(value), shared[last.valid(is_last)].store(end)]
        stored = UOp.group(*stores)
        self.starts, self.firsts = self.starts.after(stored), self.firsts.after(stored)

    def start(self, expert: UOp) -> UOp:
        return self.starts[expert].load()

    def write_map(self, tiles: UOp) -> list[UOp]:
        """Stores of the threadgroup's share of the map."""
        part, spec = self.part, self.part.spec
        stores, together = [], part.threads * spec.parts
        for first in range(0, spec.num_tiles, together):
            tile = part.number * part.threads + part.thread + first
            expert = self._expert_of(tile.cast(I32))
            is_used = expert < spec.num_experts
            bounded = expert.minimum(spec.padded - 1)
            row = self.starts[bounded].load() + (tile.cast(I32) - self.firsts[bounded].load()) * spec.tile_rows
            end = (row + spec.tile_rows).minimum(self.starts[bounded + 1].load())
            words = [expert.cast(I32), row, end, UOp.const(1, I32)]
            held = [part.register(is_used.where(word, 0))[0].load() for word in words]
            is_inside = part.condition(tile < spec.num_tiles)
            stores += [tiles[(tile * TILE_WORDS + i).valid(is_inside)].store(word) for i, word in enumerate(held)]
        used = part.register(self.firsts[spec.padded].load())[0].load()
        is_one = part.condition(part.number.eq(0) & part.thread.eq(0))
        return [*stores, tiles[UOp.const(spec.num_tiles * TILE_WORDS, dtypes.weakint).valid(is_one)].store(used)]

    def _expert_of(self, tile: UOp) -> UOp:
        """The last expert whose tiles begin at `tile` or before; the number of experts for a tile that is not used."""
        found, size = UOp.const(0, dtypes.weakint), self.part.spec.padded
        step = 1 << (size.bit_length() - 1)
        while step:
            wanted = (found + step).minimum(size)
            is_past = self.firsts[wanted].load() <= tile
            found = clamp(self.part.register(is_past.where(wanted.cast(I32), found.cast(I32)))[0].load(), 0, size)
            step //= 2
        return found
