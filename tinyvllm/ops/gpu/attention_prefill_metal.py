"""One threadgroup's attention on METAL: simdgroup matrices in variables, and operands as a lane reads them.

Queries are in registers from the start, if they fit. Keys and values lie in threadgroup memory so that a lane loads its
part of several operands at once, as in gemm_metal.py: keys as x there, and values as (block of 8 dimensions, key of a
block, pair of dimensions, block of 8 keys, dimension of the pair). Scores become weights in the registers that they are
in: the sums of a product are the left operand of the next one.
"""

from __future__ import annotations

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu.attention_prefill_tile import AttentionTile, Walk
from tinyvllm.ops.gpu.kv_codes import StoredHeads
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


class MetalTile(AttentionTile):
    """The same as statements. Of heads of 256, queries stay in threadgroup memory, and a tile's values overwrite its
    keys."""

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        spec, body, rows = self.spec, self.body, self.lane_rows
        self.dim_blocks, self.key_blocks = spec.head_dim // BLOCK, spec.keys // BLOCK
        names = [f"sum{i}" for i in range(spec.row_blocks * self.dim_blocks)]
        queries, keys = (spec.chunks * padded(count * TILE_COLS) for count in (spec.rows, spec.keys))
        values = self.dim_blocks * (BLOCK * spec.keys + PAD)
        self.values_at = 0 if spec.takes_turns else keys
        memory = body.shared(max(keys, values) if spec.takes_turns else max(queries, keys + values), F16)
        init = self.initial_stats()
        stats = body.registers(len(init))
        stats = stats.after(UOp.group(*[stats.after(*self.axes)[i].store(value) for i, value in enumerate(init)]))
        staged = self._stage_queries(body.shared(queries, F16) if spec.takes_turns else memory)
        # declared late: the rotation of queries needs registers, too
        before = [statement([declared(names)], staged.src[1], has_scope=False)]
        if spec.takes_turns:
            self.queries = staged
        else:
            before.append(self._keep_queries(staged))
        memory = memory.after(UOp(Ops.BARRIER, src=tuple(before)))
        for walk in self.walks():
            memory, stats = self._walk_metal(walk, memory, stats)
        totals = [spec.lanes.sum(stats[rows + i].load(), spec.mma.row_masks) for i in range(rows)]
        return totals, elements(names, stats.src[1])

    # -- queries -------------------------------------------------------------------------------------------------------

    def _stage_queries(self, memory: UOp) -> UOp:
        """The tile's queries, rotated and scaled, in threadgroup memory."""
        spec, half = self.spec, self.spec.head_dim // 2
        per_row = half // PIECE
        # a loop, so that only one unit's loads take registers
        turns = -(-spec.rows * per_row // self.threads)
        loop = self.body.loop(turns)
        unit = loop * self.threads + self.thread
        wanted = None if spec.rows * per_row % self.threads == 0 else unit < spec.rows * per_row
        row, dim, stores = unit // per_row % spec.rows, unit % per_row * PIECE, []
        for run, at in zip(self.scaled_queries(row, dim), (dim, dim + half), strict=True):
            place = self._query_place(row, at // TILE_COLS, at % TILE_COLS // PIECE)
            stores += _stored(memory, place, [value.cast(F16) for value in run], wanted)
        return memory.after(UOp(Ops.BARRIER, src=(UOp.group(*stores).end(loop),)))

    def _keep_queries(self, staged: UOp) -> UOp:
        """The statement that has loaded the simdgroup's queries into operands of its own."""
        lines: list[str] = []
        places: list[UOp] = []
        for chunk in range(self.spec.chunks):
            self._load_queries(staged, chunk, lines, places)
        return statement(lines, *places, has_scope=False)

    def _load_queries(self, staged: UOp, chunk: int, lines: list[str], places: list[UOp]) -> None:
        """Add lines that load the operands of 32 dimensions."""
        row, pair = self.spec.mma.head(self.lane), self.spec.mma.column(self.lane) // 2
        for block in range(self.spec.row_blocks):
            lines += [loaded(f"q{block}_{chunk}", len(places))]
            places.append(staged[self._query_place(self.first_row + block * BLOCK + row, chunk, pair)])
            lines += operands(F16, [f"q{block}_{chunk}"])

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
        base = chunk * padded(self.spec.keys * TILE_COLS)
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
                at = self._value_place(piece, key, dim // 2) + half * (2 * ELEMENTS)
                stores += _stored(memory, at, [value for run in runs for value in run[dim : dim + 2]], wanted)
        return stores

    def _value_place(self, block: UOp | int, key: UOp, pair: UOp | int) -> UOp:
        run = self.key_blocks * ELEMENTS
        return self.values_at + block * (BLOCK * self.spec.keys + PAD) + key * (BLOCK // 2 * run) + pair * run

    def _runs(
        self, heads: StoredHeads, first: UOp, distance: int, piece: UOp, *, is_whole: bool
    ) -> list[tuple[list[UOp], UOp]]:
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
            run = heads.halves(slot, self.kv_head, piece * PIECE, self.spec.lanes, self.spec.mma)
            found.append((run, exists))
        return found

    # -- the walk along the context ------------------------------------------------------------------------------------

    def _walk_metal(self, walk: Walk, memory: UOp, stats: UOp) -> tuple[UOp, UOp]:
        """(memory, maxima and sums of weights) after a walk."""
        spec, is_whole = self.spec, walk.is_whole
        loop = self.body.fold_while(walk.count)
        first_key = (loop.cast(dtypes.weakint) + walk.first) * spec.keys
        inside = memory.after(loop)
        stores = self._store_keys(inside, first_key, is_whole=is_whole)
        if not spec.takes_turns:
            stores += self._store_values(inside, first_key, is_whole=is_whole)
        filled = memory.after(UOp(Ops.BARRIER, src=tuple(stores)))
        old = [stats.after(loop)[i].load() for i in range(2 * self.lane_rows)]
        scored, scores = self._score_blocks(filled, None if is_whole else first_key)
        best, total, weights, decays = self._weigh(scores, old)
        if spec.takes_turns:
            read = memory.after(UOp(Ops.BARRIER, src=(scored,)))
            filled = memory.after(UOp(Ops.BARRIER, src=tuple(self._store_values(read, first_key, is_whole=is_whole))))
        weighed = self._add_weighed(filled, weights, decays)
        kept = UOp.group(*[stats.after(loop)[i].store(value) for i, value in enumerate([*best, *total])])
        done = UOp(Ops.BARRIER, src=(weighed, kept)).end(loop)
        return memory.after(done), stats.after(done)

    def _score_blocks(self, memory: UOp, first_key: UOp | None) -> tuple[UOp, list[list[list[UOp]]]]:
        """(the statement, the lane's scores of a tile of keys by block of rows and block of keys)."""
        spec, key_blocks = self.spec, self.key_blocks
        row, column = spec.mma.head(self.lane), spec.mma.column(self.lane)
        names = [[f"s{i}_{j}" for j in range(key_blocks)] for i in range(spec.row_blocks)]
        lines = [declared(name for some in names for name in some), "{{"]
        places: list[UOp] = []
        for chunk in range(spec.chunks):
            blocks = [f"k{chunk}_{j}" for j in range(key_blocks)]
            if spec.takes_turns:
                self._load_queries(self.queries, chunk, lines, places)
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
        return scored, [
            [self._scored([next(values) for _ in range(ELEMENTS)], i, j * BLOCK, first_key) for j in range(key_blocks)]
            for i in range(spec.row_blocks)
        ]

    def _add_weighed(self, memory: UOp, weights: list[list[list[UOp]]], decays: list[UOp]) -> UOp:
        """The statement that decays the sums of values and adds weights @ values."""
        spec, key_blocks, dims = self.spec, self.key_blocks, self.dim_blocks
        parts = PARTS[:key_blocks]
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
                lines.append(loaded(f"v{d}", len(sources), key_blocks))
                sources.append(memory[self._value_place(d, key, pair)])
            lines += operands(F16, [f"v{d}" for d in blocks], parts)
            lines += [
                product(f"sum{i * dims + d}", f"p{i}_{j}", f"v{d}{part}")
                for j, part in enumerate(parts)
                for d in blocks
                for i in range(spec.row_blocks)
            ]
        return statement(lines, *sources)


PARTS_OF_CHUNK = TILE_COLS // PIECE  # pieces of 8 dimensions in a chunk of 32


def _stored(memory: UOp, place: UOp, values: list[UOp], wanted: UOp | None) -> list[UOp]:
    """Stores of neighboring values."""
    places = [place + i if wanted is None else (place + i).valid(wanted) for i in range(len(values))]
    return [memory[at].store(value) for at, value in zip(places, values, strict=True)]
