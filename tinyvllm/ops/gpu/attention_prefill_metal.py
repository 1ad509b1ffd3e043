"""One threadgroup's attention on METAL: simdgroup matrices in variables, and operands as a lane reads them.

Queries are in registers from the start. Keys and values lie in threadgroup memory so that a lane loads its part of four
operands at once, as in gemm_metal.py: keys as x there, and values as (block of 8 dimensions, key of a block, pair of
dimensions, block of 8 keys, dimension of the pair). Scores become weights in the registers that they are in: the sums
of a product are the left operand of the next one.
"""

from __future__ import annotations

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu.attention_prefill_tile import AttentionTile, Walk
from tinyvllm.ops.kernel.body import F16
from tinyvllm.ops.kernel.simdgroups import (
    ELEMENTS,
    PAD,
    PARTS,
    declared,
    elements,
    loaded,
    operands,
    padded,
    product,
    statement,
)
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS

BLOCK = 8  # rows, columns and terms of a product
MOST_VALUES = 4  # blocks of values whose operands are in registers at a time
VALUE_BLOCK = BLOCK * TILE_COLS + PAD  # values of 8 dimensions and 32 keys, padded


class MetalTile(AttentionTile):
    """The same as statements. Tiles have 32 keys."""

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        spec, body, rows = self.spec, self.body, self.lane_rows
        self.dim_blocks = spec.head_dim // BLOCK
        names = [f"sum{i}" for i in range(spec.row_blocks * self.dim_blocks)]
        self.values_at = spec.chunks * padded(TILE_COLS * TILE_COLS)  # behind the keys
        queries = spec.chunks * padded(spec.rows * TILE_COLS)
        memory = body.shared(max(queries, self.values_at + self.dim_blocks * VALUE_BLOCK), F16)
        init = self.initial_stats()
        stats = body.registers(len(init))
        stats = stats.after(UOp.group(*[stats.after(*self.axes)[i].store(value) for i, value in enumerate(init)]))
        zeroed = statement([declared(names)], *self.axes, has_scope=False)
        memory = memory.after(UOp(Ops.BARRIER, src=(self._load_queries(memory), zeroed)))
        for walk in self.walks():
            memory, stats = self._walk_metal(walk, memory, stats)
        totals = [spec.lanes.sum(stats[rows + i].load(), spec.mma.row_masks) for i in range(rows)]
        return totals, elements(names, stats.src[1])

    # -- queries -------------------------------------------------------------------------------------------------------

    def _load_queries(self, memory: UOp) -> UOp:
        """The statement that has loaded the simdgroup's queries, rotated and scaled, into operands of its own."""
        spec, stores, half = self.spec, [], self.spec.head_dim // 2
        per_row = half // PIECE
        for unit, wanted in self._units(spec.rows * per_row):
            row, dim = unit // per_row, unit % per_row * PIECE
            for run, at in zip(self.scaled_queries(row, dim), (dim, dim + half), strict=True):
                place = self._query_place(row, at // TILE_COLS, at % TILE_COLS // PIECE)
                stores += _stored(memory, place, [value.cast(F16) for value in run], wanted)
        staged = memory.after(UOp(Ops.BARRIER, src=tuple(stores)))
        row, pair = spec.mma.head(self.lane), spec.mma.column(self.lane) // 2
        lines: list[str] = []
        places: list[UOp] = []
        for block in range(spec.row_blocks):
            for chunk in range(spec.chunks):
                lines.append(loaded(f"q{block}_{chunk}", len(places)))
                places.append(staged[self._query_place(self.first_row + block * BLOCK + row, chunk, pair)])
                lines += operands(F16, [f"q{block}_{chunk}"])
        return statement(lines, *places, has_scope=False)

    def _query_place(self, row: UOp, chunk: UOp | int, pair: UOp) -> UOp:
        return chunk * padded(self.spec.rows * TILE_COLS) + row * TILE_COLS + row // 2 * PAD + pair * PIECE

    def _units(self, count: int) -> list[tuple[UOp, UOp | None]]:
        """(number, whether it exists; None: always) of each of `count` units of work that the thread does."""
        units = []
        for start in range(0, count, self.threads):
            unit = start + self.thread
            units.append((unit, None) if start + self.threads <= count else (unit % count, unit < count))
        return units

    # -- keys and values -----------------------------------------------------------------------------------------------

    def _store_keys(self, memory: UOp, first_key: UOp, *, is_whole: bool) -> list[UOp]:
        """Stores of a tile of keys. What lies outside the context is masked later, whatever it is."""
        stores, per_key = [], self.spec.head_dim // PIECE
        for unit, wanted in self._units(self.spec.keys // 2 * per_key):
            pair, piece = unit // per_key, unit % per_key
            runs = [run for run, _ in self._runs(self.keys, first_key + pair * 2, 1, piece, is_whole=is_whole)]
            for dim in range(PIECE):
                at = self._key_place(piece // PARTS_OF_CHUNK, pair, piece % PARTS_OF_CHUNK * 2 + dim % 2)
                stores += _stored(memory, at + dim // 2 * 2, [run[dim] for run in runs], wanted)
        return stores

    def _key_place(self, chunk: UOp | int, pair: UOp | int, column: UOp | int) -> UOp:
        base = chunk * padded(TILE_COLS * TILE_COLS)
        return base + pair * (2 * TILE_COLS + PAD) + column * PIECE

    def _store_values(self, memory: UOp, first_key: UOp, *, is_whole: bool) -> list[UOp]:
        """Stores of a tile of values: zeros outside the context, because no weight makes up for what may be there."""
        stores, per_key = [], self.spec.head_dim // PIECE
        for unit, wanted in self._units(self.spec.keys // 2 * per_key):
            key, piece = unit // per_key, unit % per_key
            half, key = key // BLOCK, key % BLOCK  # keys 8 apart are neighbors for a lane
            first = first_key + half * (2 * BLOCK) + key
            runs = []
            for run, exists in self._runs(self.values, first, BLOCK, piece, is_whole=is_whole):
                runs.append(run if is_whole else [exists.where(value, UOp.const(0.0, F16)) for value in run])
            for dim in range(0, PIECE, 2):
                at = self._value_place(piece, key, dim // 2) + half * 4
                stores += _stored(memory, at, [value for run in runs for value in run[dim : dim + 2]], wanted)
        return stores

    def _value_place(self, block: UOp | int, key: UOp, pair: UOp | int) -> UOp:
        return self.values_at + block * VALUE_BLOCK + key * TILE_COLS + pair * PIECE

    def _runs(self, pool: UOp, first: UOp, distance: int, piece: UOp, *, is_whole: bool) -> list[tuple[list[UOp], UOp]]:
        """(8 dimensions of a key or a value, whether a token of the tile may attend to it) of two, `distance` apart. Of
        a whole tile, to all of which all tokens do, nothing is asked."""
        found: list[tuple[list[UOp], UOp]] = []
        shares_block = self.spec.window is None and self.spec.layout.block_size % (2 * distance) == 0
        slot = first
        for i in (0, 1):
            key = first + i * distance
            exists = key < self.context
            if self.spec.window is not None:  # blocks before the window may have been given back
                exists = exists & (key >= self.spec.first_key(self.position))
            if i and shares_block:
                slot = slot + distance
            else:
                slot = self.step.slot_of(self.sequence, key if is_whole else exists.where(key, 0))
            at = self.source(slot, piece * PIECE)
            found.append(([pool[at + d].load() for d in range(PIECE)], exists))
        return found

    # -- the walk along the context ------------------------------------------------------------------------------------

    def _walk_metal(self, walk: Walk, memory: UOp, stats: UOp) -> tuple[UOp, UOp]:
        """(memory, maxima and sums of weights) after a walk."""
        spec = self.spec
        loop = self.body.fold_while(walk.count)
        first_key = (loop.cast(dtypes.weakint) + walk.first) * spec.keys
        inside = memory.after(loop)
        stores = self._store_keys(inside, first_key, is_whole=walk.is_whole)
        stores += self._store_values(inside, first_key, is_whole=walk.is_whole)
        filled = memory.after(UOp(Ops.BARRIER, src=tuple(stores)))
        old = [stats.after(loop)[i].load() for i in range(2 * self.lane_rows)]
        scores = self._score_blocks(filled, None if walk.is_whole else first_key)
        best, total, weights, decays = self._weigh(scores, old)
        weighed = self._add_weighed(filled, weights, decays)
        kept = UOp.group(*[stats.after(loop)[i].store(value) for i, value in enumerate([*best, *total])])
        done = UOp(Ops.BARRIER, src=(weighed, kept)).end(loop)
        return memory.after(done), stats.after(done)

    def _score_blocks(self, memory: UOp, first_key: UOp | None) -> list[list[list[UOp]]]:
        """The lane's scores of a tile of keys, by block of rows and block of keys."""
        spec, key_blocks = self.spec, self.spec.keys // BLOCK
        row, column = spec.mma.head(self.lane), spec.mma.column(self.lane)
        names = [[f"s{i}_{j}" for j in range(key_blocks)] for i in range(spec.row_blocks)]
        lines = [declared(name for some in names for name in some), "{{"]
        places: list[UOp] = []
        for chunk in range(spec.chunks):
            blocks = [f"k{chunk}_{j}" for j in range(key_blocks)]
            for j, block in enumerate(blocks):
                lines.append(loaded(block, len(places)))
                places.append(memory[self._key_place(chunk, column // 2 + j * (BLOCK // 2), row)])
            lines += operands(F16, blocks)
            lines += [
                product(names[i][j], f"q{i}_{chunk}{part}", block + part)
                for part in PARTS
                for j, block in enumerate(blocks)
                for i in range(spec.row_blocks)
            ]
        scored = statement([*lines, "}}"], *places, has_scope=False)
        values = iter(elements((name for some in names for name in some), scored))
        return [
            [self._scored([next(values) for _ in range(ELEMENTS)], i, j * BLOCK, first_key) for j in range(key_blocks)]
            for i in range(spec.row_blocks)
        ]

    def _add_weighed(self, memory: UOp, weights: list[list[list[UOp]]], decays: list[UOp]) -> UOp:
        """The statement that decays the sums of values and adds weights @ values."""
        spec, key_blocks, dims = self.spec, self.spec.keys // BLOCK, self.dim_blocks
        halves = [value.cast(F16) for blocks in weights for block in blocks for value in block]
        sources, lines = [*decays, *halves], []
        for i in range(spec.row_blocks):
            sums = [f"sum{i * dims + d}.thread_elements()[{e}]" for d in range(dims) for e in range(ELEMENTS)]
            lines += [f"{total} *= {{{i}}};" for total in sums]
            lines.append(f"simdgroup_half8x8 {', '.join(f'p{i}_{j}' for j in range(key_blocks))};")
            for j in range(key_blocks):
                first = len(decays) + (i * key_blocks + j) * ELEMENTS
                lines += [f"p{i}_{j}.thread_elements()[{e}] = {{{first + e}}};" for e in range(ELEMENTS)]
        key, pair = spec.mma.head(self.lane), spec.mma.column(self.lane) // 2
        together = MOST_VALUES // spec.row_blocks
        for begin in range(0, dims, together):
            blocks = range(begin, min(begin + together, dims))
            for d in blocks:
                lines.append(loaded(f"v{d}", len(sources)))
                sources.append(memory[self._value_place(d, key, pair)])
            lines += operands(F16, [f"v{d}" for d in blocks])
            lines += [
                product(f"sum{i * dims + d}", f"p{i}_{j}", f"v{d}{part}")
                for j, part in enumerate(PARTS)
                for d in blocks
                for i in range(spec.row_blocks)
            ]
        return statement(lines, *sources)


PARTS_OF_CHUNK = TILE_COLS // PIECE  # pieces of 8 dimensions in a chunk of 32


def _stored(memory: UOp, place: UOp, values: list[UOp], wanted: UOp | None) -> list[UOp]:
    """Stores of neighboring values."""
    places = [place + i if wanted is None else (place + i).valid(wanted) for i in range(len(values))]
    return [memory[at].store(value) for at, value in zip(places, values, strict=True)]
