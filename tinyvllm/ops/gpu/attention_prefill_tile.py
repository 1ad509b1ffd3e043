"""One threadgroup's attention in the prefill kernel: a tile of tokens against the context, in tiles of keys. On CUDA;
METAL has the same in other forms (attention_prefill_metal.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import QUERIES
from tinyvllm.ops.gpu.attention_prefill_codes import Unit, hold, load_unit, unit_dims, unit_pieces
from tinyvllm.ops.gpu.attention_prefill_inputs import Halves, Inputs, PrefillSpec
from tinyvllm.ops.gpu.kv_codes import StoredHeads
from tinyvllm.ops.kernel.body import F16, F32, LOG2E, LOWEST, Body, balanced, clamp
from tinyvllm.ops.kernel.lanes import LANES, axes_of, grid, load_floats, warps, zeros
from tinyvllm.ops.kernel.tiles import (
    PIECE,
    TILE_COLS,
    Operands,
    arrival,
    commit,
    copy_piece,
    quick_exp2,
    quick_maximum,
    store_vector,
    together,
)


@dataclass(frozen=True)
class Walk:
    """`count` tiles of keys from number `first` on. `is_whole`: all tokens of the tile attend to all of their keys."""

    first: UOp | int
    count: UOp
    is_whole: bool


@dataclass(frozen=True)
class _Memory:
    """Threadgroup memory for keys and values; a tile of each begins at element `base`. `begun`: the copies of
    the next tile, which begin before this tile is read."""

    keys: UOp
    values: UOp
    base: UOp | int = 0
    begun: tuple[UOp, ...] = ()

    def after(self, *ready: UOp, base: UOp | int = 0, begun: tuple[UOp, ...] = ()) -> _Memory:
        """The tile at `base`, to be used after `ready`."""
        return _Memory(self.keys.after(*ready), self.values.after(*ready), base, begun)


class AttentionTile:
    """One threadgroup's work: a tile of tokens and a KV head."""

    extra_warps: ClassVar[int] = 0  # besides those that multiply

    def __init__(
        self,
        spec: PrefillSpec,
        pool: tuple[StoredHeads, StoredHeads] | None,
        tiles: UOp,
        inputs: UOp,
        operands: Sequence[UOp],
    ) -> None:
        """`pool`: keys and values; None if the copy engine fetches them."""
        self.spec, self.mma = spec, spec.tiles
        if pool is not None:
            self.keys, self.values = pool
        self.step = self.make_inputs(inputs, operands)
        self.body, self.tiles = Body(), tiles
        body = self.body
        places = self.make_grid()
        self.lane, self.warp = body.threads(LANES), warps(body, spec.num_warps + self.extra_warps)
        self.axes = axes_of(*places, self.lane, self.warp)
        self.thread = self.warp * LANES + self.lane
        self.threads = spec.num_warps * LANES
        self.first_row = self.warp * (spec.row_blocks * self.mma.left_rows)

    def make_grid(self) -> tuple[UOp | int, ...]:
        """The axes of the threadgroups: tiles of tokens, and KV heads. Places this one on its tile."""
        tile, kv_head = grid(self.body, self.spec.max_tiles), grid(self.body, self.spec.num_kv_heads)
        # the last tokens of a prompt attend to the most keys: they go first
        self.place(self.spec.max_tiles - 1 - tile, kv_head)
        return tile, kv_head

    def place(self, tile: UOp | int, kv_head: UOp | int) -> None:
        """Let this be the work of a tile of tokens and a KV head."""
        layout, self.kv_head = self.spec.layout, kv_head
        self.first = clamp(self.tiles[tile].load(), 0, layout.num_tokens - 1)
        # from the unclamped bounds: after the last row of a full bucket, a tile is empty, although `first` is a row
        begin, end = (clamp(self.tiles[at].load(), 0, layout.num_tokens) for at in (tile, tile + 1))
        self.count = (end - begin).maximum(0)
        self.position = self.step.position(self.first)
        self.sequence = self.step.sequence(self.first)
        self.context = (self.count > 0).where(self.position + self.count, 0).minimum(self.step.positions)

    def make_inputs(self, inputs: UOp, operands: Sequence[UOp]) -> Inputs:
        return Inputs(self.spec, inputs, operands, QUERIES, with_sinks=True)

    # -- operands ------------------------------------------------------------------------------------------------------

    def stage_queries(self) -> UOp:
        """The tile's queries, rotated and scaled, in threadgroup memory."""
        spec, mma, half = self.spec, self.mma, self.spec.head_dim // 2
        shared = self.body.shared(spec.rows * spec.head_dim, F16)
        per_row, stores = half // PIECE, []
        count = spec.rows * per_row
        for start in range(0, count, self.threads):
            item, is_wanted = start + self.thread, None
            if start + self.threads > count:
                item, is_wanted = item.minimum(count - 1), item < count
            row, dim = item // per_row, item % per_row * PIECE
            for run, at in zip(self.scaled_queries(row, dim), (dim, dim + half), strict=True):
                base, slot = at // TILE_COLS * (spec.rows * TILE_COLS), at % TILE_COLS // mma.slot_cols
                stores += mma.write(shared, base, row, slot, run, is_wanted)
        return shared.after(UOp.group(*stores))

    def _query(self, queries: UOp, block: int, chunk: int, *after: UOp) -> Operands:
        """The warp's operands of a block of rows and a chunk of columns."""
        row = self.first_row + block * self.mma.left_rows
        return self.mma.left(queries, chunk * self.spec.rows * TILE_COLS, row, self.lane, *after)

    def load_queries(self, queries: UOp) -> list[Operands]:
        """All of the warp's operands, by block of rows."""
        spec = self.spec
        blocks = [[self._query(queries, i, c) for c in range(spec.chunks)] for i in range(spec.row_blocks)]
        return [[operand for chunk in block for operand in chunk] for block in blocks]

    def scaled_queries(self, row: UOp, dim: UOp) -> Halves:
        """Dimensions [dim, dim + 8) of a row of the tile, dim < D / 2, and those D / 2 further, rotated and scaled."""
        spec, token, head = self.spec, row // self.spec.group, row % self.spec.group
        source = (self.first + token.minimum((self.count - 1).maximum(0))).minimum(spec.layout.num_tokens - 1)
        low, high = self.step.rotated(QUERIES, source, self.kv_head * spec.group + head, dim)
        rope = None if self.step.tables is None else self.step.tables.rope
        scale = spec.query_scale_at(rope, self.step.position(source))
        return [value * scale for value in low], [value * scale for value in high]

    def key_slots(self, first_key: UOp | int) -> list[tuple[UOp, UOp]]:
        """As `key_slot`, of each key of a tile that the thread copies a piece of."""
        per_key = self.spec.head_dim // PIECE
        slots = []
        for start in range(0, self.spec.keys * per_key, self.threads):
            slots.append(self.key_slot(first_key + (start + self.thread) // per_key))
        return slots

    def key_slot(self, key: UOp) -> tuple[UOp, UOp]:
        """(slot, whether it is in the context and, of the tile's first row at least, in the window) of a key."""
        wanted = key < self.context
        if self.spec.window is not None:  # blocks before the window may have been given back
            wanted = wanted & (key >= self.spec.first_key(self.position))
        return self.step.slot_of(self.sequence, wanted.where(key, 0)), wanted

    def pieces(self, base: UOp | int) -> list[tuple[UOp, UOp]]:
        """(place in the tile, dimension) of each piece that the thread copies."""
        spec, per_key, places = self.spec, self.spec.head_dim // PIECE, []
        for start in range(0, spec.keys * per_key, self.threads):
            item = start + self.thread
            key, dim = item // per_key, item % per_key * PIECE
            chunk = base + dim // TILE_COLS * (spec.keys * TILE_COLS)
            places.append((chunk + self.mma.at(key, dim % TILE_COLS // self.mma.slot_cols), dim))
        return places

    def source(self, slot: UOp, dim: UOp) -> UOp:
        return slot * self.spec.slot_elements + self.kv_head * self.spec.head_dim + dim

    @property
    def begin(self) -> UOp | int:
        """The first tile of keys that a token of the tile attends to."""
        return 0 if self.spec.window is None else self.spec.first_key(self.position) // self.spec.keys

    def walks(self) -> list[Walk]:
        """The tiles of keys to attend to: first those before the tile's own tokens, which all tokens attend to, and
        then the others. With a window, all in one walk."""
        steps = (self.context + (self.spec.keys - 1)) // self.spec.keys
        if self.spec.window is not None:
            return [Walk(self.begin, (steps - self.begin).maximum(0), False)]
        whole = ((self.position + 1) // self.spec.keys).minimum(steps)
        return [Walk(0, whole, True), Walk(whole, steps - whole, False)]

    # -- the walk along the context ------------------------------------------------------------------------------------

    @property
    def lane_rows(self) -> int:
        """The number of rows for which a lane holds scores and sums."""
        return self.spec.row_blocks * (self.mma.elements // 2)

    @property
    def copies_ahead(self) -> bool:
        """Whether the next tile of keys and values is copied while one is in use."""
        return not self.spec.takes_turns

    def initial_stats(self) -> list[UOp]:
        """The maxima by row, and then the lane's sums of weights, before the first tile: nothing, or the heads'
        sinks."""
        tables, rows = self.step.tables, self.lane_rows
        if tables is None or tables.sinks is None:
            return [UOp.const(LOWEST, F32)] * rows + zeros(rows)
        bests, totals, per_block = [], [], self.mma.elements // 2
        for i in range(rows):
            row, column = self.mma.place(self.lane, 2 * (i % per_block))
            row = self.first_row + i // per_block * self.mma.left_rows + row
            head = self.kv_head * self.spec.group + row % self.spec.group
            bests.append(tables.sinks[head].load() * LOG2E)
            totals.append(column.eq(0).where(UOp.const(1.0, F32), UOp.const(0.0, F32)))  # in one lane of each row
        return bests + totals

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        """(the lane's sums of weights by row, its sums of weighted values)."""
        spec, body, mma = self.spec, self.body, self.mma
        size = spec.keys * spec.head_dim
        stages = 2 if self.copies_ahead else 1
        staged = self.stage_queries()
        queries = [] if spec.takes_turns else self.load_queries(staged)
        keys = body.shared(stages * size, F16)
        memory = _Memory(keys, keys if spec.takes_turns else body.shared(stages * size, F16))
        rows = self.lane_rows
        count = spec.row_blocks * spec.head_dim // mma.right_rows * mma.elements
        init = [*self.initial_stats(), *zeros(count)]
        registers = body.registers(len(init))
        started = UOp.group(*[registers.after(*self.axes)[i].store(value) for i, value in enumerate(init)])
        registers = registers.after(started)
        primed: tuple[UOp, ...] = ()
        if self.copies_ahead:
            first = replace(memory, base=self.begin % 2 * size)
            primed = (self._begin(first, self.key_slots(self.begin * spec.keys)),)
            for target, heads in self._quantized_parts(memory):
                primed += (*self._store_units(target, first.base, self._load_units(heads, self.begin * spec.keys)),)
        for walk in self.walks():
            if spec.takes_turns:
                registers = self._walk_in_turns(walk, staged, memory, registers)
            else:
                registers = self._walk(walk, queries, memory, registers, primed)
        last = [registers[i].load() for i in range(len(init))]
        totals = [spec.lanes.sum(total, spec.mma.row_masks) for total in last[rows : 2 * rows]]
        return totals, last[2 * rows :]

    def _walk(
        self, walk: Walk, queries: list[Operands], memory: _Memory, registers: UOp, primed: tuple[UOp, ...]
    ) -> UOp:
        """The registers after a walk. `primed`: the copies of the first tile of all walks (CUDA)."""
        spec, size = self.spec, self.spec.keys * self.spec.head_dim
        quantized = self._quantized_parts(memory)
        loop = self.body.fold_while(walk.count)
        step = loop.cast(dtypes.weakint) + walk.first
        first_key = step * spec.keys
        slots = self.key_slots(first_key + spec.keys)
        arrived = arrival(0, loop, *primed, *[slot for slot, _ in slots])
        following = replace(memory, base=(step + 1) % 2 * size)
        begun: tuple[UOp, ...] = (self._begin(following, slots, arrived),)
        parts = [(target, self._load_units(heads, first_key + spec.keys)) for target, heads in quantized]
        if parts:
            begun += (hold([value for _, units in parts for _, unit in units for value in unit.loaded], arrived),)
        tile = memory.after(arrived, base=step % 2 * size, begun=begun)
        old = [registers.after(loop)[i].load() for i in range(registers.max_numel())]
        new = self._step(queries, tile, None if walk.is_whole else first_key, old)
        converted = [
            store for target, units in parts for store in self._store_units(target, following.base, units, *new)
        ]
        stored = UOp.group(*[registers.after(loop)[i].store(value) for i, value in enumerate(new)])
        return registers.after(together(stored, *tile.begun, *converted).end(loop))

    def _walk_in_turns(self, walk: Walk, queries: UOp, memory: _Memory, registers: UOp) -> UOp:
        """The same where a tile's values overwrite its keys. What is known of its scores is held in registers
        meanwhile."""
        loop = self.body.fold_while(walk.count)
        first_key = (loop.cast(dtypes.weakint) + walk.first) * self.spec.keys
        old = [registers.after(loop)[i].load() for i in range(registers.max_numel())]
        keys = memory.after(self._fill(memory.keys.after(loop), self.keys, first_key))
        scores = self._scores_by_chunk(queries.after(loop), keys, None if walk.is_whole else first_key)
        best, total, weights, decays = self._weigh(scores, old)
        flat = [*best, *total, *decays, *[value for blocks in weights for block in blocks for value in block]]
        held = self.body.registers(len(flat))
        held = held.after(UOp.group(*[held.after(loop)[i].store(value) for i, value in enumerate(flat)]))
        read = UOp(Ops.BARRIER, src=(held,))
        values = memory.after(self._fill(memory.values.after(read), self.values, first_key))
        kept = iter([held[i].load() for i in range(len(flat))])
        best, total, decays = ([next(kept) for _ in part] for part in (best, total, decays))
        weights = [[[next(kept) for _ in block] for block in blocks] for blocks in weights]
        new = [*best, *total, *self._add_values(weights, decays, values, old[2 * self.lane_rows :])]
        stored = UOp.group(*[registers.after(loop)[i].store(value) for i, value in enumerate(new)])
        return registers.after(UOp(Ops.BARRIER, src=(stored,)).end(loop))  # before the next keys overwrite the values

    def _begin(self, memory: _Memory, slots: list[tuple[UOp, UOp]], *after: UOp) -> UOp:
        """Begin to copy a tile of keys and values, zeros outside the context. `slots`: as from `key_slots`."""
        copies = []
        for (place, dim), (slot, wanted) in zip(self.pieces(memory.base), slots, strict=True):
            at = self.source(slot, dim)
            for target, heads in ((memory.keys, self.keys), (memory.values, self.values)):
                if not heads.form.is_quantized:
                    copies.append(copy_piece(target[place], heads.codes[at], wanted, *after))
        return commit(*copies)

    def _load_units(self, heads: StoredHeads, first_key: UOp | int) -> list[tuple[UOp, Unit]]:
        """(key of the tile, codes) of each unit of a tile that the thread converts, of quantized keys or values."""
        dims = unit_dims(heads.form)
        per_key, units = self.spec.head_dim // dims, []
        for start in range(0, self.spec.keys * per_key, self.threads):
            item = start + self.thread
            key, dim = item // per_key, item % per_key * dims
            slot, wanted = self.key_slot(first_key + key)
            units.append((key, load_unit(heads, slot, self.kv_head, dim, wanted)))
        return units

    def _store_units(self, memory: UOp, base: UOp | int, units: list[tuple[UOp, Unit]], *after: UOp) -> list[UOp]:
        """Statements that convert units to float16 in threadgroup memory."""
        spec, stores = self.spec, []
        for key, unit in units:
            for dim, words in unit_pieces(spec, unit):
                chunk = base + dim // TILE_COLS * (spec.keys * TILE_COLS)
                place = chunk + self.mma.at(key, dim % TILE_COLS // self.mma.slot_cols)
                stores.append(store_vector(memory[place], words, None, *after))
        return stores

    def _quantized_parts(self, memory: _Memory) -> list[tuple[UOp, StoredHeads]]:
        """(threadgroup memory, keys or values) of those that are quantized."""
        parts = ((memory.keys, self.keys), (memory.values, self.values))
        return [(target, heads) for target, heads in parts if heads.form.is_quantized]

    def _fill(self, tile: UOp, heads: StoredHeads, first_key: UOp) -> UOp:
        """The stores of a tile of keys, or of values. Zeros outside the context, since the pool may hold anything."""
        stores, mma, per_key = [], self.mma, self.spec.head_dim // PIECE
        if heads.form.is_quantized:
            units = self._load_units(heads, first_key)
            return UOp(Ops.BARRIER, src=tuple(self._store_units(tile, 0, units)))
        for start, (slot, wanted) in zip(
            range(0, self.spec.keys * per_key, self.threads), self.key_slots(first_key), strict=True
        ):
            item = start + self.thread
            key, dim = item // per_key, item % per_key * PIECE
            at, base = self.source(slot, dim), dim // TILE_COLS * (self.spec.keys * TILE_COLS)
            values = [wanted.where(value, 0.0) for value in load_floats(heads.codes, at, PIECE)]
            stores += mma.write(tile, base, key, dim % TILE_COLS // mma.slot_cols, values)
        return UOp.group(*stores)

    def _step(self, queries: list[Operands], memory: _Memory, first_key: UOp | None, old: list[UOp]) -> list[UOp]:
        """Maxima, sums of weights and sums of values after one more tile of keys. `first_key`: the tile's first key, if
        some tokens do not attend to all of it."""
        scores = self._scores(queries, memory, first_key)
        best, total, weights, decays = self._weigh(scores, old)
        return [*best, *total, *self._add_values(weights, decays, memory, old[2 * self.lane_rows :])]

    def _scores(self, queries: list[Operands], memory: _Memory, first_key: UOp | None) -> list[list[list[UOp]]]:
        """The lane's scores of a tile of keys, by block of rows and block of keys."""
        spec, mma = self.spec, self.mma
        scores: list[list[list[UOp]]] = [[] for _ in queries]
        for block in range(spec.keys // mma.right_rows):
            first_row = block * mma.right_rows
            chunks = [
                mma.right(memory.keys, memory.base + c * (spec.keys * TILE_COLS), first_row, self.lane, *memory.begun)
                for c in range(spec.chunks)
            ]
            key = [operand for chunk in chunks for operand in chunk]
            for i, query in enumerate(queries):
                products = mma.sum(query, key, zeros(mma.elements))
                scores[i].append(self._scored(products, i, first_row, first_key))
        return scores

    def _scores_by_chunk(self, queries: UOp, memory: _Memory, first_key: UOp | None) -> list[list[list[UOp]]]:
        """The same for heads whose queries do not fit into registers: each block of keys reads them again."""
        spec, mma = self.spec, self.mma
        scores: list[list[list[UOp]]] = [[] for _ in range(spec.row_blocks)]
        last: tuple[UOp, ...] = ()  # so that a block's operands are read after the scores of the block before
        for first_row in range(0, spec.keys, mma.right_rows):
            for i in range(spec.row_blocks):
                products = zeros(mma.elements)
                for c in range(spec.chunks):
                    key = mma.right(memory.keys, memory.base + c * (spec.keys * TILE_COLS), first_row, self.lane)
                    products = mma.sum(self._query(queries, i, c, *last), key, products)
                last = (products[0],)
                scores[i].append(self._scored(products, i, first_row, first_key))
        return scores

    def _scored(self, products: list[UOp], block: int, first_row: int, first_key: UOp | None) -> list[UOp]:
        """The scores of a block of rows with the keys from row `first_row` of the tile on."""
        scores = [self.spec.score(product, lambda x: quick_exp2(x, self.mma.kind)) for product in products]
        return scores if first_key is None else self._masked(scores, block, first_key + first_row)

    def _weigh(
        self, scores: list[list[list[UOp]]], old: list[UOp]
    ) -> tuple[list[UOp], list[UOp], list[list[list[UOp]]], list[UOp]]:
        """(new maxima, new sums of weights, weights of the scores, factors by which earlier sums decay)."""
        spec, mma, rows = self.spec, self.mma, self.lane_rows
        per_block = mma.elements // 2
        new_best, new_total, weights, decays = [], [], [], []
        for i, blocks in enumerate(scores):
            for r in range(per_block):
                at = i * per_block + r
                top = balanced(_row_values(blocks, r), lambda a, b: quick_maximum(a, b, mma.kind))
                best = old[at].maximum(spec.lanes.maximum(top, spec.mma.row_masks))
                new_best.append(best)
                decays.append(quick_exp2(old[at] - best, mma.kind))
            weights.append(
                [[quick_exp2(v - new_best[i * per_block + e // 2], mma.kind) for e, v in enumerate(b)] for b in blocks]
            )
            for r in range(per_block):
                at = i * per_block + r
                new_total.append(old[rows + at] * decays[at] + balanced(_row_values(weights[i], r)))
        return new_best, new_total, weights, decays

    def _masked(self, scores: list[UOp], block: int, first_key: UOp) -> list[UOp]:
        """The scores of a block, LOWEST where the row's token does not attend to the key."""
        spec, masked = self.spec, []
        for e, score in enumerate(scores):
            row, key = self.mma.place(self.lane, e)
            token = (self.first_row + block * self.mma.left_rows + row) // spec.group
            masked.append(spec.is_seen(first_key + key, self.position + token).where(score, LOWEST))
        return masked

    def _add_values(
        self, weights: list[list[list[UOp]]], decays: list[UOp], memory: _Memory, old: list[UOp]
    ) -> list[UOp]:
        """The sums, decayed, plus weights @ values."""
        spec, mma = self.spec, self.mma
        size, dim_blocks, per_block = mma.elements, spec.head_dim // mma.right_rows, mma.elements // 2
        sums = [
            [
                [old[(i * dim_blocks + d) * size + e] * decays[i * per_block + e // 2] for e in range(size)]
                for d in range(dim_blocks)
            ]
            for i in range(len(weights))
        ]
        span = TILE_COLS // mma.right_rows  # blocks of keys in 32
        for start in range(0, spec.keys // mma.right_rows, span):
            lefts = [mma.weights(blocks[start : start + span]) for blocks in weights]
            for d in range(dim_blocks):
                dim = d * mma.right_rows
                chunk = memory.base + dim // TILE_COLS * (spec.keys * TILE_COLS)
                right = mma.transposed(
                    memory.values, chunk, start * mma.right_rows, dim % TILE_COLS, self.lane, *memory.begun
                )
                for i, left in enumerate(lefts):
                    sums[i][d] = mma.sum(left, right, sums[i][d])
        return [value for blocks in sums for block in blocks for value in block]

    # -- results -------------------------------------------------------------------------------------------------------

    def stores(self, out: UOp, totals: list[UOp], sums: list[UOp]) -> list[UOp]:
        spec, mma, stores = self.spec, self.mma, []
        size, dim_blocks, per_block = mma.elements, spec.head_dim // mma.right_rows, mma.elements // 2
        inverses = [total.reciprocal() for total in totals]
        for i in range(spec.row_blocks):
            for d in range(dim_blocks):
                for e in range(size):
                    place, column = mma.place(self.lane, e)
                    row = self.first_row + i * mma.left_rows + place
                    token, head = row // spec.group, row % spec.group
                    at = (self.first + token) * (spec.num_heads * spec.head_dim)
                    at = at + (self.kv_head * spec.group + head) * spec.head_dim + d * mma.right_rows + column
                    value = sums[(i * dim_blocks + d) * size + e] * inverses[i * per_block + e // 2]
                    is_real = (token < self.count) & (row < spec.tokens * spec.group)
                    stores.append(out[at.valid(is_real)].store(spec.result(value, out)))
        return stores


def _row_values(blocks: list[list[UOp]], row: int) -> list[UOp]:
    """The lane's values of one of its rows, which has two in each block."""
    return [value for block in blocks for value in block[2 * row : 2 * row + 2]]
