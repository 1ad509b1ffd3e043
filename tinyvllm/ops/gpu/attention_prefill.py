"""Attention of steps with many rows on devices with matrix units: prompts, slices of prompts, and decodes beside them.

A threadgroup serves one KV head and a tile of consecutive tokens of one sequence; the tile's rows are its tokens times
the query heads that share the KV head, so keys and values are loaded once for all of them. It walks along the
sequence's context in tiles of keys, through the block table, with the online softmax of FlashAttention-2 (Dao 2023).

Which tokens make up a tile follows from the step's inputs alone (`tile_map_kernel`): a tile begins where another
sequence does and at multiples of its size in positions, so that no tile mixes sequences and none is known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from tinygrad import Tensor, UOp, dtypes

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionLayer, AttentionSpec
from tinyvllm.ops.backend import Step
from tinyvllm.ops.kernel.body import (
    F16,
    F32,
    I32,
    LOWEST,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    empty,
    finish,
    run_kernel,
)
from tinyvllm.ops.kernel.hopper import (
    WGMMA_COLS,
    WGMMA_TOKENS,
    arrive_copies,
    copy_async,
    declare,
    has_wgmma,
    multiply_wgmma,
    read_sums,
    store_words,
    weigh_wgmma,
)
from tinyvllm.ops.kernel.lanes import LANES, Lanes, Mma, axes_of, dot, grid, load_floats, warps, zeros
from tinyvllm.ops.kernel.tiles import (
    PIECE,
    PTX_NAMES,
    TILE_COLS,
    Operands,
    TileMma,
    arrival,
    commit,
    copy_piece,
    pack_words,
    quick_exp2,
    quick_maximum,
    together,
)

ROW_BYTES = WGMMA_COLS * 2  # of a row of Hopper's tiles
MAP_THREADS = 256
MIN_LOOP = 2  # iterations that a loop must be able to run: Body.fold_while

Number = TypeVar("Number", int, UOp)


COVERED = ("a window", "a softcap", "biases", "no rope")  # of what AttentionSpec may ask for
MAX_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class PrefillSpec(AttentionSpec):
    """Attention of any rows, over paged KV in float16."""

    lanes: Lanes
    mma: Mma
    qkv_parts: tuple[int, ...]  # partial sums of each part of qkv: (S, T, columns)
    has_wgmma: bool = False  # the device has Hopper's instructions for four warps

    def uncovered_shape(self) -> str:
        """Why the kernels do not serve it, in words; "" where they do."""
        if rest := self.uncovered(COVERED):
            return rest
        if self.head_dim not in (64, 128) or self.group > MAX_GROUP:
            return f"{self.num_heads} over {self.num_kv_heads} heads of {self.head_dim}"
        return "" if self.holds_whole_sections() else "queries, keys and values that share a matrix in parts"

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's kernel attends: a head's row is one of its tiles'."""
        return self.has_wgmma and self.mma.dtype == F16 and self.head_dim == WGMMA_COLS

    @property
    def num_warps(self) -> int:
        return 8 if self.uses_wgmma else 4

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory of Hopper's kernel: queries, and two tiles of keys and values."""
        return (self.rows + 4 * self.keys) * ROW_BYTES

    @property
    def tiles(self) -> TileMma:
        return TileMma(self.mma)

    @property
    def row_blocks(self) -> int:
        """Blocks of rows that a warp owns: as many as its registers hold the sums of."""
        return 2 if self.head_dim <= 64 and not self.uses_wgmma else 1

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.num_warps * self.row_blocks * self.tiles.left_rows

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.rows // self.group

    @property
    def keys(self) -> int:
        """Keys of a tile: CUDA holds two tiles of keys and values beside the queries, METAL one, in its memory."""
        return 64 if self.tiles.is_cuda and self.head_dim <= 64 else 32

    @property
    def chunks(self) -> int:
        """Tiles of 32 columns in a head."""
        return self.head_dim // TILE_COLS

    @property
    def max_tiles(self) -> int:
        """Tiles that a step can have: each sequence cuts at most two short."""
        layout = self.layout
        return min(layout.num_tokens, layout.num_tokens // self.tokens + 2 * layout.num_seqs)

    @property
    def map_threads(self) -> int:
        return min(MAP_THREADS, -(-self.layout.num_tokens // LANES) * LANES)

    @property
    def map_size(self) -> int:
        """Words of the map of tiles: one more than there can be tiles, and a whole number for each thread."""
        return -(-(self.max_tiles + 1) // self.map_threads) * self.map_threads

    @property
    def for_map(self) -> PrefillSpec:
        """The same of a layer without a window or a softcap, by which the map of tiles does not differ."""
        return replace(self, window=None, softcap=None)

    def section(self, index: int) -> tuple[int, int]:
        """(part of qkv, first column there) of the queries (0), keys (1) or values (2)."""
        start = self.section_start(index)
        ends = list(accumulate(self.qkv_cols))
        part = next(i for i, end in enumerate(ends) if end > start)
        return part, start - (ends[part] - self.qkv_cols[part])

    def parts(self, *sections: int) -> list[int]:
        """Which parts of qkv hold these sections. A kernel must read every buffer that it is given."""
        return sorted({self.section(index)[0] for index in sections})


def attend_tiles(
    spec: PrefillSpec,
    out: Tensor,
    pool: tuple[Tensor, Tensor],
    layer: AttentionLayer,
    step: Step,
    qkv: Sequence[Tensor],
) -> Tensor:
    """Rotate, write keys and values to the pool, attend: `out` (T, H * D)."""
    spec = replace(spec, has_wgmma=has_wgmma(str(out.device)))
    written = [step.inputs, *layer.key_tables, *[qkv[i] for i in spec.parts(KEYS, VALUES)]]
    keys, values = run_kernel(store_kernel(spec), list(pool), written)
    read = [keys, values, _tile_map(spec, step), step.inputs, *layer.tables, *[qkv[i] for i in spec.parts(QUERIES)]]
    return run_kernel(prefill_kernel(spec), [out], read)[0]


def _tile_map(spec: PrefillSpec, step: Step) -> Tensor:
    """Which rows make up a tile: computed in the step's first layer with such tiles, and kept for the others."""
    name = f"tiles of {spec.tokens} tokens"
    if name not in step.kept:
        fresh = empty(spec.map_size, I32, str(step.inputs.device))
        step.kept[name] = run_kernel(tile_map_kernel(spec.for_map), [fresh], [step.inputs])[0]
    return step.kept[name]


class _Inputs:
    """A step's inputs inside a kernel."""

    def __init__(self, spec: PrefillSpec, inputs: UOp, operands: Sequence[UOp] = (), *sections: int) -> None:
        """`operands`: the tables and parts of qkv of a kernel that reads these sections."""
        self.spec, self.inputs = spec, inputs
        layout, rest = spec.layout, list(operands)
        self.tables = spec.take_tables(rest, with_sinks=QUERIES in sections) if sections else None
        self.parts = dict(zip(spec.parts(*sections), rest, strict=True))
        self.positions = max(layout.max_blocks * layout.block_size, MIN_LOOP * spec.keys)

    def position(self, row: UOp) -> UOp:
        return clamp(self.inputs[self.spec.layout.offset("positions") + row].load(), 0, self.positions - 1)

    def sequence(self, row: UOp) -> UOp:
        return clamp(self.inputs[self.spec.layout.offset("seq_rows") + row].load(), 0, self.spec.layout.num_seqs)

    def slot(self, row: UOp) -> UOp:
        """Where a row's key and value go."""
        last = self.spec.num_blocks * self.spec.layout.block_size - 1
        return clamp(self.inputs[self.spec.layout.offset("slots") + row].load(), 0, last)

    def slot_of(self, sequence: UOp, key: UOp) -> UOp:
        """Where a sequence's key lies in the pool."""
        layout = self.spec.layout
        at = layout.offset("block_tables") + sequence * layout.max_blocks + key // layout.block_size
        return clamp(self.inputs[at].load(), 0, self.spec.num_blocks - 1) * layout.block_size + key % layout.block_size

    def loaded(self, section: int, row: UOp, head: UOp | int, dim: UOp) -> list[UOp]:
        """Dimensions [dim, dim + 8) of a head of queries, keys or values, with their biases."""
        spec = self.spec
        index, start = spec.section(section)
        cols = spec.qkv_cols[index]
        at = row * cols + start + head * spec.head_dim + dim
        rows = [
            load_floats(self.parts[index], at + s * (spec.layout.num_tokens * cols), PIECE)
            for s in range(spec.qkv_parts[index])
        ]
        values = [balanced(column) for column in zip(*rows, strict=True)]
        if self.tables is None or self.tables.bias is None:
            return values
        biases = load_floats(self.tables.bias, spec.bias_start(section) + head * spec.head_dim + dim, PIECE)
        return [a + b for a, b in zip(values, biases, strict=True)]

    def rotated(self, section: int, row: UOp, head: UOp | int, dim: UOp) -> tuple[list[UOp], list[UOp]]:
        """Dimensions [dim, dim + 8), dim < D / 2, and their partners D / 2 further, normed where heads are, and rotated
        by the row's position (half-split pairs, Su et al. 2021). A head's pieces are those of neighbouring lanes."""
        assert self.tables is not None
        half, rope, head_norm = self.spec.head_dim // 2, self.tables.rope, self.tables.head_norm
        low, high = self.loaded(section, row, head, dim), self.loaded(section, row, head, dim + half)
        if head_norm is not None and self.spec.head_eps is not None:
            scale, weight = self._head_scale(low + high, self.spec.head_eps), section * self.spec.head_dim + dim
            low, high = (
                [v * scale * w for v, w in zip(run, load_floats(head_norm, at, PIECE), strict=True)]
                for run, at in ((low, weight), (high, weight + half))
            )
        if rope is None:
            return low, high
        at = self.position(row) * self.spec.head_dim + dim
        cos, sin = load_floats(rope, at, PIECE), load_floats(rope, at + half, PIECE)
        turned = list(zip(low, high, cos, sin, strict=True))
        return [a * c - b * s for a, b, c, s in turned], [b * c + a * s for a, b, c, s in turned]

    def _head_scale(self, values: list[UOp], eps: float) -> UOp:
        """1 / sqrt(mean square + eps) of a head, of which each of D / 16 neighbouring lanes holds 16 values."""
        spec = self.spec
        masks = [1 << i for i in range((spec.head_dim // len(values)).bit_length() - 1)]
        total = spec.lanes.sum(dot(values, values), masks)
        return (total * (1.0 / spec.head_dim) + eps).sqrt().reciprocal()


# -- keys and values into the pool -------------------------------------------------------------------------------------


@cached_kernel
def store_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(keys, values, inputs, *tables but sinks, *qkv[parts(1, 2)]): every row's rotated key and its value go to its
    slot."""

    def kernel(keys: UOp, values: UOp, inputs: UOp, *operands: UOp) -> UOp:
        body, half = Body(), spec.head_dim // 2
        step = _Inputs(spec, inputs, operands, KEYS, VALUES)
        per_row = spec.num_kv_heads * half // PIECE
        count, threads = spec.layout.num_tokens * per_row, 128
        group, thread = grid(body, -(-count // threads)), body.threads(threads)
        item = group * threads + thread
        is_inside = None if count % threads == 0 else item < count
        if is_inside is not None:
            item = is_inside.where(item, 0)
        row, head, dim = item // per_row, item % per_row // (half // PIECE), item % (half // PIECE) * PIECE
        at = step.slot(row) * spec.slot_elements + head * spec.head_dim + dim
        low, high = step.rotated(1, row, head, dim)
        new = [(keys, at, low), (keys, at + half, high)]
        new += [(values, at + d, step.loaded(2, row, head, dim + d)) for d in (0, half)]
        stores = []
        for target, start, run in new:
            for i, value in enumerate(run):
                place = start + i if is_inside is None else (start + i).valid(is_inside)
                stores.append(target[place].store(value.cast(target.dtype)))
        tokens, width = spec.layout.num_tokens, spec.slot_elements
        name = f"store_kv_{tokens}x{width}"
        done = UOp.group(*stores).end(*reversed(axes_of(group, thread)))
        return finish(done, name, ops=6 * tokens * width, nbytes=12 * tokens * width)

    return kernel


# -- which rows make up a tile -----------------------------------------------------------------------------------------


@cached_kernel
def tile_map_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(tiles (map_size,) int32, inputs): the first row of each tile, and behind the last the number of rows that
    are not padding. One threadgroup: each thread counts the tiles that begin in some consecutive rows."""

    def kernel(tiles: UOp, inputs: UOp) -> UOp:
        body, rows = Body(), spec.layout.num_tokens
        step = _Inputs(spec, inputs)
        threads = spec.map_threads
        per_thread = -(-rows // threads)
        thread = body.threads(threads)

        def begins(i: UOp | int) -> tuple[UOp, UOp, UOp]:
            """Row i of the thread's; whether a tile begins there; whether it is more than padding."""
            row = thread * per_thread + i
            inside = row < rows
            safe = inside.where(row, 0)
            sequence, before = step.sequence(safe), step.sequence((safe - 1).maximum(0))
            is_real = inside & (sequence < spec.layout.num_seqs)
            is_first = row.eq(0) | sequence.ne(before) | (step.position(safe) % spec.tokens).eq(0)
            return row, is_real & is_first, is_real

        counts = body.registers(2, I32)
        start = UOp.group(*[counts.after(thread)[i].store(UOp.const(0, I32)) for i in range(2)])
        counts = counts.after(start)
        loop = body.fold(per_thread) if per_thread > 1 else None
        inner = counts if loop is None else counts.after(loop)
        _, is_first, is_real = begins(0 if loop is None else loop)
        added = UOp.group(
            *[inner[i].store(inner[i].load() + flag.cast(I32)) for i, flag in enumerate((is_first, is_real))]
        )
        counts = counts.after(added if loop is None else added.end(loop))
        shared = body.shared(2 * threads, I32)
        shared = shared.after(UOp.group(*[shared[i * threads + thread].store(counts[i].load()) for i in range(2)]))

        sums = body.registers(3, I32)  # tiles before this thread's, all tiles, all rows
        start = UOp.group(*[sums.after(shared)[i].store(UOp.const(0, I32)) for i in range(3)])
        sums = sums.after(start)
        other = body.fold(threads)
        inner, here = sums.after(other), shared[other].load()
        new = [(other < thread).where(here, 0), here, shared[threads + other].load()]
        summed = UOp.group(*[inner[i].store(inner[i].load() + value) for i, value in enumerate(new)]).end(other)
        before, total, end = (sums.after(summed)[i].load() for i in range(3))

        index, flag = body.registers(1, I32), body.registers(1, I32)
        index = index.after(index.after(summed)[0].store(before))
        again = body.fold(per_thread) if per_thread > 1 else None
        inner = index if again is None else index.after(again)
        row, is_first, _ = begins(0 if again is None else again)
        # by way of a register: what tinygrad knew of a store's condition, it would write into all the sums before it
        held = flag.after(flag.after(inner)[0].store(is_first.cast(I32)))[0].load()
        place = clamp(inner[0].load(), 0, spec.map_size - 1)
        written = tiles[place.valid(held.ne(0))].store(row.cast(I32))
        moved = inner.after(written)[0].store(inner[0].load() + held)
        done = UOp.group(written, moved)
        stores = [done if again is None else done.end(again)]
        for first in range(0, spec.map_size, threads):
            stores.append(tiles[(first + thread).valid(first + thread >= total)].store(end))
        return finish(UOp.group(*stores).end(thread), f"tile_map_{rows}", nbytes=16 * rows)

    return kernel


# -- attention ---------------------------------------------------------------------------------------------------------


@cached_kernel
def prefill_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, tiles, inputs, *tables, *qkv[parts(0)]). Rows of padding stay as they are."""

    def kernel(out: UOp, keys: UOp, values: UOp, tiles: UOp, inputs: UOp, *operands: UOp) -> UOp:
        kind = _HopperTile if spec.uses_wgmma else _AttentionTile
        tile = kind(spec, keys, values, tiles, inputs, operands)
        totals, sums = tile.attend()
        stores = tile.stores(out, totals, sums)
        tokens, context = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        return finish(
            UOp.group(*stores).end(*reversed(tile.axes)),
            f"prefill_attention_{tokens}x{spec.num_heads}x{spec.head_dim}",
            ops=4 * tokens * spec.num_heads * spec.head_dim * context,
            nbytes=4 * tokens * spec.slot_elements * context // spec.tokens,
        )

    return kernel


class _AttentionTile:
    """One threadgroup's work: a tile of tokens and a KV head."""

    def __init__(
        self, spec: PrefillSpec, keys: UOp, values: UOp, tiles: UOp, inputs: UOp, operands: Sequence[UOp]
    ) -> None:
        self.spec, self.mma, self.keys, self.values = spec, spec.tiles, keys, values
        self.step = _Inputs(spec, inputs, operands, QUERIES)
        body, layout = Body(), spec.layout
        tile, self.kv_head = grid(body, spec.max_tiles), grid(body, spec.num_kv_heads)
        self.lane, self.warp = body.threads(LANES), warps(body, spec.num_warps)
        self.axes = axes_of(tile, self.kv_head, self.lane, self.warp)
        self.body, self.thread = body, self.warp * LANES + self.lane
        self.threads = spec.num_warps * LANES
        tile = spec.max_tiles - 1 - tile  # the last tokens of a prompt have most to attend: they go first
        self.first = clamp(tiles[tile].load(), 0, layout.num_tokens - 1)
        # of the bounds as they are: a tile behind the last row of a full bucket has none, where `first` is the last row
        begin, end = (clamp(tiles[at].load(), 0, layout.num_tokens) for at in (tile, tile + 1))
        self.count = (end - begin).maximum(0)
        self.position = self.step.position(self.first)
        self.sequence = self.step.sequence(self.first)
        self.context = (self.count > 0).where(self.position + self.count, 0).minimum(self.step.positions)
        self.first_row = self.warp * (spec.row_blocks * self.mma.left_rows)

    # -- operands ------------------------------------------------------------------------------------------------------

    def queries(self) -> list[Operands]:
        """The warp's rows of queries, rotated and scaled, by blocks."""
        spec, mma, half = self.spec, self.mma, self.spec.head_dim // 2
        shared = self.body.shared(spec.rows * spec.head_dim, F16)
        scale, per_row, stores = spec.query_scale, half // PIECE, []
        for start in range(0, spec.rows * per_row, self.threads):
            item = start + self.thread
            row, dim = item // per_row, item % per_row * PIECE
            for run, at in zip(self.rotated_queries(row, dim), (dim, dim + half), strict=True):
                scaled = [value * scale for value in run]
                stores += mma.write(
                    shared, at // TILE_COLS * (spec.rows * TILE_COLS), row, at % TILE_COLS // mma.slot_cols, scaled
                )
        shared = shared.after(UOp.group(*stores))
        blocks = []
        for block in range(spec.row_blocks):
            row = self.first_row + block * mma.left_rows
            operands = [mma.left(shared, c * spec.rows * TILE_COLS, row, self.lane) for c in range(spec.chunks)]
            blocks.append([operand for chunk in operands for operand in chunk])
        return blocks

    def rotated_queries(self, row: UOp, dim: UOp) -> tuple[list[UOp], list[UOp]]:
        """Dimensions [dim, dim + 8) of a row of the tile, dim < D / 2, and their partners."""
        spec, token, head = self.spec, row // self.spec.group, row % self.spec.group
        source = (self.first + token.minimum((self.count - 1).maximum(0))).minimum(spec.layout.num_tokens - 1)
        return self.step.rotated(0, source, self.kv_head * spec.group + head, dim)

    def key_slots(self, first_key: UOp | int) -> list[tuple[UOp, UOp]]:
        """(slot, whether it is in the context) of the keys of a tile whose pieces the thread moves."""
        per_key = self.spec.head_dim // PIECE
        slots = []
        for start in range(0, self.spec.keys * per_key, self.threads):
            key = first_key + (start + self.thread) // per_key
            wanted = key < self.context
            slots.append((self.step.slot_of(self.sequence, wanted.where(key, 0)), wanted))
        return slots

    def pieces(self, base: UOp | int) -> list[tuple[UOp, UOp]]:
        """(place in the tile, dimension) of the pieces that the thread moves."""
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

    def walks(self, steps: UOp) -> list[tuple[UOp | int, UOp, bool]]:
        """(first tile of keys, number of tiles, whether all tokens attend to all of them): those before the tokens' own
        places, and then the others; with a window all in one."""
        if self.spec.window is not None:
            return [(self.begin, (steps - self.begin).maximum(0), False)]
        whole = ((self.position + 1) // self.spec.keys).minimum(steps)
        return [(0, whole, True), (whole, steps - whole, False)]

    # -- the walk along the context ------------------------------------------------------------------------------------

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        """The lane's totals of weights by row, and sums of weighted values."""
        spec, body, mma = self.spec, self.body, self.mma
        size = spec.keys * spec.head_dim
        stages = 2 if mma.is_cuda else 1
        queries = self.queries()
        tile_k, tile_v = body.shared(stages * size, F16), body.shared(stages * size, F16)
        steps = (self.context + (spec.keys - 1)) // spec.keys
        rows = spec.row_blocks * (mma.elements // 2)
        count = spec.row_blocks * spec.head_dim // mma.right_rows * mma.elements
        init = [UOp.const(LOWEST, F32)] * rows + zeros(rows + count)
        registers = body.registers(len(init))
        started = UOp.group(*[registers.after(*self.axes)[i].store(value) for i, value in enumerate(init)])
        registers = registers.after(started)
        begin = self.begin
        primed: tuple[UOp, ...] = ()
        if mma.is_cuda:
            primed = (self._begin(tile_k, tile_v, begin * spec.keys, begin % 2 * size),)
        for first, count, is_whole in self.walks(steps):
            registers = self._walk(
                first, count, queries, tile_k, tile_v, registers, rows, is_whole=is_whole, primed=primed
            )
        last = [registers[i].load() for i in range(len(init))]
        totals = [spec.lanes.sum(total, spec.mma.row_masks) for total in last[rows : 2 * rows]]
        return totals, last[2 * rows :]

    def _walk(
        self,
        first: UOp | int,
        count: UOp,
        queries: list[Operands],
        tile_k: UOp,
        tile_v: UOp,
        registers: UOp,
        rows: int,
        *,
        is_whole: bool,
        primed: tuple[UOp, ...],
    ) -> UOp:
        """The registers behind `count` tiles of keys, from tile number `first` on."""
        spec, mma, size = self.spec, self.mma, self.spec.keys * self.spec.head_dim
        loop = self.body.fold_while(count)
        step = loop.cast(dtypes.weakint) + first
        first_key = step * spec.keys
        begun: tuple[UOp, ...] = ()
        if mma.is_cuda:
            slots = self.key_slots(first_key + spec.keys)
            arrived = arrival(0, loop, *primed, *[slot for slot, _ in slots])
            begun = (self._begin(tile_k, tile_v, first_key + spec.keys, (step + 1) % 2 * size, slots, arrived),)
            base, tile_k, tile_v = step % 2 * size, tile_k.after(arrived), tile_v.after(arrived)
        else:
            filled = UOp.group(*self._fill(tile_k.after(loop), tile_v.after(loop), first_key))
            base, tile_k, tile_v = 0, tile_k.after(filled), tile_v.after(filled)
        old = [registers.after(loop)[i].load() for i in range(registers.max_numel())]
        new = self._step(queries, tile_k, tile_v, base, None if is_whole else first_key, old, rows, begun)
        stored = UOp.group(*[registers.after(loop)[i].store(value) for i, value in enumerate(new)])
        return registers.after(together(stored, *begun).end(loop))

    def _begin(
        self,
        tile_k: UOp,
        tile_v: UOp,
        first_key: UOp | int,
        base: UOp | int,
        slots: list[tuple[UOp, UOp]] | None = None,
        *after: UOp,
    ) -> UOp:
        """Begin to copy a tile of keys and values; zeros behind the context."""
        copies = []
        for (place, dim), (slot, wanted) in zip(self.pieces(base), slots or self.key_slots(first_key), strict=True):
            at = self.source(slot, dim)
            copies.append(copy_piece(tile_k[place], self.keys[at], wanted, *after))
            copies.append(copy_piece(tile_v[place], self.values[at], wanted, *after))
        return commit(*copies)

    def _fill(self, tile_k: UOp, tile_v: UOp, first_key: UOp) -> list[UOp]:
        """Stores of a tile of keys and values; zeros behind the context, where others may have left anything."""
        stores, mma, per_key = [], self.mma, self.spec.head_dim // PIECE
        for start, (slot, wanted) in zip(
            range(0, self.spec.keys * per_key, self.threads), self.key_slots(first_key), strict=True
        ):
            item = start + self.thread
            key, dim = item // per_key, item % per_key * PIECE
            at, base = self.source(slot, dim), dim // TILE_COLS * (self.spec.keys * TILE_COLS)
            for tile, pool in ((tile_k, self.keys), (tile_v, self.values)):
                values = [wanted.where(value, 0.0) for value in load_floats(pool, at, PIECE)]
                stores += mma.write(tile, base, key, dim % TILE_COLS // mma.slot_cols, values)
        return stores

    def _step(
        self,
        queries: list[Operands],
        tile_k: UOp,
        tile_v: UOp,
        base: UOp | int,
        first_key: UOp | None,
        old: list[UOp],
        rows: int,
        begun: tuple[UOp, ...],
    ) -> list[UOp]:
        """Maxima, totals and sums behind one more tile of keys; `first_key` where not all tokens attend all of it."""
        spec, mma = self.spec, self.mma
        per_block, key_blocks = mma.elements // 2, spec.keys // mma.right_rows
        scores: list[list[list[UOp]]] = [[] for _ in queries]
        for block in range(key_blocks):
            chunks = [
                mma.right(tile_k, base + c * (spec.keys * TILE_COLS), block * mma.right_rows, self.lane, *begun)
                for c in range(spec.chunks)
            ]
            key = [operand for chunk in chunks for operand in chunk]
            for i, query in enumerate(queries):
                products = mma.sum(query, key, zeros(mma.elements))
                products = [spec.score(product, lambda x: quick_exp2(x, mma)) for product in products]
                if first_key is not None:
                    products = self._masked(products, i, first_key + block * mma.right_rows)
                scores[i].append(products)
        new_best, new_total, weights, decays = [], [], [], []
        for i, blocks in enumerate(scores):
            for r in range(per_block):
                at = i * per_block + r
                top = balanced(
                    [value for block in blocks for value in block[2 * r : 2 * r + 2]],
                    lambda a, b: quick_maximum(a, b, mma),
                )
                best = old[at].maximum(spec.lanes.maximum(top, spec.mma.row_masks))
                new_best.append(best)
                decays.append(quick_exp2(old[at] - best, mma))
            weights.append(
                [[quick_exp2(v - new_best[i * per_block + e // 2], mma) for e, v in enumerate(b)] for b in blocks]
            )
            for r in range(per_block):
                at = i * per_block + r
                added = balanced([value for block in weights[i] for value in block[2 * r : 2 * r + 2]])
                new_total.append(old[rows + at] * decays[at] + added)
        return [*new_best, *new_total, *self._add_values(weights, decays, tile_v, base, old[2 * rows :], begun)]

    def _masked(self, scores: list[UOp], block: int, first_key: UOp) -> list[UOp]:
        """Scores of keys that are no later than their row's token."""
        spec, masked = self.spec, []
        for e, score in enumerate(scores):
            row, key = self.mma.place(self.lane, e)
            token = (self.first_row + block * self.mma.left_rows + row) // spec.group
            masked.append(spec.is_seen(first_key + key, self.position + token).where(score, LOWEST))
        return masked

    def _add_values(
        self,
        weights: list[list[list[UOp]]],
        decays: list[UOp],
        tile_v: UOp,
        base: UOp | int,
        old: list[UOp],
        begun: tuple[UOp, ...],
    ) -> list[UOp]:
        """The decayed sums and weights @ values."""
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
                chunk = base + dim // TILE_COLS * (spec.keys * TILE_COLS)
                right = mma.transposed(tile_v, chunk, start * mma.right_rows, dim % TILE_COLS, self.lane, *begun)
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
                    stores.append(out[at.valid(is_real)].store(value.cast(out.dtype)))
        return stores


class _HopperTile(_AttentionTile):
    """The same on Hopper: two groups of four warps with 64 rows each, whose scores and sums are the unit's registers.

    Rows of queries, keys and values are 128 bytes, swizzled as the unit wants them."""

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        spec, body = self.spec, self.body
        memory = declare(spec.shared_bytes)
        begin = self.begin
        primed = (self._put_queries(memory), self._copy(begin % 2, self.key_slots(begin * spec.keys), memory))
        stats, sums = body.registers(4), body.registers(spec.head_dim // 8 * 4)  # two rows' maxima and totals
        init = [UOp.const(LOWEST, F32)] * 2 + zeros(2)
        stats = stats.after(UOp.group(*[stats.after(*self.axes)[i].store(value) for i, value in enumerate(init)]))
        zeroed = [sums.after(*self.axes)[i].store(value) for i, value in enumerate(zeros(sums.max_numel()))]
        sums = sums.after(UOp.group(*zeroed))
        steps = (self.context + (spec.keys - 1)) // spec.keys
        for first, count, is_whole in self.walks(steps):
            stats, sums = self._walk_wgmma(first, count, stats, sums, primed, is_whole=is_whole)
        totals = [spec.lanes.sum(stats[2 + row].load(), spec.mma.row_masks) for row in range(2)]
        return totals, [sums[i].load() for i in range(sums.max_numel())]

    def _put_queries(self, memory: UOp) -> UOp:
        """The tile's queries, rotated and scaled, in threadgroup memory."""
        spec, half = self.spec, self.spec.head_dim // 2
        scale, per_row, last = spec.query_scale, half // PIECE, memory
        for start in range(0, spec.rows * per_row, self.threads):
            item = start + self.thread
            row, dim = item // per_row, item % per_row * PIECE
            for run, at in zip(self.rotated_queries(row, dim), (dim, dim + half), strict=True):
                scaled = [value * scale for value in run]
                words = [pack_words(*scaled[i : i + 2]) for i in range(0, PIECE, 2)]
                last = store_words(swizzled_place(row, at // PIECE), words, last)
        return last

    def _copy(self, stage: UOp | int, slots: list[tuple[UOp, UOp]], *after: UOp) -> UOp:
        """Begin to copy a tile of keys and values to a stage; zeros behind the context."""
        spec, per_key, last = self.spec, self.spec.head_dim // PIECE, list(after)
        base = self._stage(stage)
        for start, (slot, wanted) in zip(range(0, spec.keys * per_key, self.threads), slots, strict=True):
            item = start + self.thread
            place, source = swizzled_place(item // per_key, item % per_key), self.source(slot, item % per_key * PIECE)
            last = [copy_async(base + place, self.keys[source], wanted, *last)]
            last = [copy_async(base + spec.keys * ROW_BYTES + place, self.values[source], wanted, *last)]
        return commit(*last)

    def _stage(self, stage: UOp | int) -> UOp | int:
        """Where a stage begins, behind the queries."""
        return stage * (2 * self.spec.keys * ROW_BYTES) + self.spec.rows * ROW_BYTES

    def _walk_wgmma(
        self, first: UOp | int, count: UOp, stats: UOp, sums: UOp, primed: tuple[UOp, ...], *, is_whole: bool
    ) -> tuple[UOp, UOp]:
        """Maxima and totals, and sums, behind `count` tiles of keys, from tile number `first` on."""
        spec, type_name = self.spec, PTX_NAMES[self.mma.mma.dtype]
        loop = self.body.fold_while(count)
        step = (loop.cast(dtypes.weakint) + first).minimum(self.step.positions // spec.keys)  # 32 bits wide
        first_key = step * spec.keys
        slots = self.key_slots(first_key + spec.keys)
        arrived = arrive_copies(loop, *primed, *[slot for slot, _ in slots])
        begun = self._copy((step + 1) % 2, slots, arrived)
        keys = self._stage(step % 2)
        scores = self.body.registers(spec.keys // 8 * 4)
        rows = self.warp // 4 * (WGMMA_TOKENS * ROW_BYTES)
        scored = multiply_wgmma(type_name, rows, keys, scores.after(loop), 0, arrived, begun, is_fresh=True)
        values = read_sums(scores, scored)
        values = [spec.score(value, lambda x: quick_exp2(x, self.mma)) for value in values]
        blocks = [values[i : i + 4] for i in range(0, len(values), 4)]
        if not is_whole:
            blocks = [self._masked(block, 0, first_key + i * 8) for i, block in enumerate(blocks)]
        old = [stats.after(loop)[i].load() for i in range(4)]
        new, decays, weights = self._weigh(blocks, old)
        scaled = [
            sums.after(loop)[i].store(sums.after(loop)[i].load() * decays[i % 4 // 2]) for i in range(sums.max_numel())
        ]
        pairs = [[pack_words(*block[e : e + 2]) for e in (0, 2)] for block in weights]
        words = [[*pairs[i], *pairs[i + 1]] for i in range(0, len(pairs), 2)]
        weighed = weigh_wgmma(type_name, words, keys + spec.keys * ROW_BYTES, sums.after(UOp.group(*scaled)), begun)
        kept = UOp.group(*[stats.after(loop)[i].store(value) for i, value in enumerate(new)])
        done = together(weighed, begun, kept).end(loop)
        return stats.after(done), sums.after(done)

    def _weigh(self, scores: list[list[UOp]], old: list[UOp]) -> tuple[list[UOp], list[UOp], list[list[UOp]]]:
        """The two rows' new maxima and totals, what sums shrink by, and the scores' weights."""
        spec, mma = self.spec, self.mma
        best, decays, totals = [], [], []
        for row in range(2):
            values = [value for block in scores for value in block[2 * row : 2 * row + 2]]
            top = balanced(values, lambda a, b: quick_maximum(a, b, mma))
            best.append(old[row].maximum(spec.lanes.maximum(top, spec.mma.row_masks)))
            decays.append(quick_exp2(old[row] - best[row], mma))
        weights = [[quick_exp2(value - best[e // 2], mma) for e, value in enumerate(block)] for block in scores]
        for row in range(2):
            added = balanced([value for block in weights for value in block[2 * row : 2 * row + 2]])
            totals.append(old[2 + row] * decays[row] + added)
        return [*best, *totals], decays, weights


def swizzled_place(row: Number, piece: Number) -> Number:
    """Where a piece of 16 bytes of a row lies in a tile of Hopper's."""
    return row * ROW_BYTES + (piece ^ (row % 8)) % 8 * (PIECE * 2)  # % 8: tinygrad does not know how large an xor gets
