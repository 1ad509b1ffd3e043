"""What the chunked form of a recurrent layer computes without the states: a step's chunks, and for each of them the
matrices T and P that `recurrent_chunks.py` defines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinygrad import UOp
from tinygrad.dtype import DType

from tinyvllm.ops.coverage import in_words
from tinyvllm.ops.gpu.recurrent_rows import (
    GpuRecurrentSpec,
)
from tinyvllm.ops.kernel.body import (
    F16,
    F32,
    I32,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    finish,
)
from tinyvllm.ops.kernel.lanes import LANES, Lanes, Mma, axes_of, grid, load_floats, warps, zeros
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS, TileMma
from tinyvllm.ops.recurrent_spec import Sequence, sequence_at

CHUNK = TILE_COLS  # rows
SQUARE = CHUNK * CHUNK
WARP_COLS = 16  # columns of the state that a warp has
SOLVE_WARPS = 4
FAR = 1 << 20  # more rows than a step has


@dataclass(frozen=True, kw_only=True)
class ChunkSpec(GpuRecurrentSpec):
    """A recurrent layer in steps of many rows."""

    lanes: Lanes
    mma: Mma  # of float16

    @property
    def tiles(self) -> TileMma:
        return TileMma(self.mma)

    @property
    def max_chunks(self) -> int:
        """Numbers of chunks in a step: see `Chunk`."""
        return self.layout.num_tokens // CHUNK + self.layout.num_seqs

    @property
    def splits(self) -> int:
        """Threadgroups that share a head's columns; 0 if no number suits the shape."""
        return self.knob("splits", next((count for count in (2, 1, 4, 8) if self._fits(count)), 0))

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"splits": (1, 2, 4)}

    def is_possible(self) -> bool:
        return self._fits(self.splits)

    def _fits(self, splits: int) -> bool:
        """Whether no thread would be without a piece of a chunk's keys to copy."""
        warps_in_all = self.kind.value_dim // WARP_COLS
        return warps_in_all % splits == 0 and warps_in_all // splits <= min(8, self.kind.key_dim // PIECE)

    @property
    def num_warps(self) -> int:
        """Those of a threadgroup."""
        return self.kind.value_dim // WARP_COLS // self.splits

    @property
    def unit_chunks(self) -> int:
        """Tiles of 32 columns in a key."""
        return self.kind.key_dim // TILE_COLS

    def uncovered_shape(self) -> str:
        """What of the layer's shape the kernels do not cover, in words; "" if they cover it."""
        kind = self.kind
        has_odd_keys = kind.key_dim % TILE_COLS > 0 or kind.key_dim > 128
        return in_words(
            [f"keys of {kind.key_dim}"] * has_odd_keys
            + [f"values of {kind.value_dim}"] * (kind.value_dim % WARP_COLS > 0 or self.splits == 0)
        )


@dataclass(frozen=True)
class Chunk:
    """The i-th chunk of sequence s. Its number is f // 32 + i + s, with f the sequence's first row: different chunks
    have different numbers, since floor(a) + ceil(b) <= floor(a + b) + 1."""

    first_row: UOp
    count: UOp  # rows

    def row(self, i: UOp, spec: ChunkSpec) -> UOp:
        """Its i-th row, or another one if it has fewer."""
        return clamp(self.first_row + i, 0, spec.layout.num_tokens - 1)


def chunk_of(sequence: Sequence, index: UOp) -> Chunk:
    """The index-th chunk of a sequence, without rows if the sequence has fewer chunks."""
    count = (sequence.count - index * CHUNK).maximum(0).minimum(CHUNK)
    return Chunk(sequence.first_row + index * CHUNK, count)


def find_chunk(spec: ChunkSpec, inputs: UOp, number: UOp | int) -> tuple[Chunk, UOp]:
    """(the chunk of this number, its rows and those of the sequence after it: 0 if there is no such chunk)."""
    layout, found = spec.layout, UOp.const(0, I32)

    def first_number(index: UOp) -> UOp:
        return clamp(inputs[layout.offset("first_rows") + index].load(), 0, layout.num_tokens) // CHUNK + index

    for bit in reversed(range((layout.num_seqs - 1).bit_length())):  # the last sequence that begins at or before it
        wanted = found + (1 << bit)
        index = clamp(wanted, 0, layout.num_seqs - 1)
        is_further = (wanted < layout.num_seqs) & (first_number(index) <= number)
        found = is_further.where(wanted, found)
    index = clamp(found, 0, layout.num_seqs - 1)
    place = (number - first_number(index)).maximum(0)
    # of rows as they are, not clamped: `_Solve._if_any` needs a number whose bound tinygrad does not know
    begin, end = (inputs[layout.offset("first_rows") + at].load() for at in (index, index + 1))
    rest = (end - begin - place.cast(I32) * CHUNK).maximum(0)
    return chunk_of(sequence_at(spec, inputs, index), place), rest


@cached_kernel
def solve_kernel(spec: ChunkSpec) -> KernelFn:
    """fn(squares (chunks, Hv, 2, 32, 32) float16, gates (chunks, Hv, 2, 32), inputs, units, mixed): T and P of each
    chunk and head, and the summed exponents and betas of its rows."""

    def kernel(squares: UOp, gates: UOp, inputs: UOp, units: UOp, mixed: UOp) -> UOp:
        solve = _Solve(spec, inputs, units, mixed)
        kk, qk = solve.products()
        exponents, own, stores = solve.gates(gates)
        a, more = solve.weigh(squares, kk, qk, exponents, own)
        stores += [*more, *solve.invert(squares, a)]
        kind, tokens = spec.kind, spec.layout.num_tokens
        ops = 2 * tokens * CHUNK * kind.num_heads * (2 * kind.key_dim + CHUNK // 3)
        nbytes = 4 * tokens * (kind.key_size + kind.num_heads * (CHUNK + 4))
        done = UOp.group(*stores).end(*reversed(solve.axes))
        return finish(done, f"solve_chunks_{tokens}x{kind.num_heads}x{kind.key_dim}", ops=ops, nbytes=nbytes)

    return kernel


class _Solve:
    """A threadgroup's work: one chunk and value head."""

    def __init__(self, spec: ChunkSpec, inputs: UOp, units: UOp, mixed: UOp) -> None:
        self.spec, self.mma, self.body = spec, spec.tiles, Body()
        number, self.head = grid(self.body, spec.max_chunks), grid(self.body, spec.kind.num_heads)
        self.lane, self.warp = self.body.threads(LANES), warps(self.body, SOLVE_WARPS)
        self.thread, self.threads = self.warp * LANES + self.lane, SOLVE_WARPS * LANES
        self.is_first = self.thread < LANES
        self.chunk, self.rest = find_chunk(spec, inputs, number)
        self.once = self._if_any(self.rest)  # a threadgroup without work ends
        self.units, self.mixed = units.after(self.once), mixed.after(self.once)
        self.axes = (*axes_of(number, self.head, self.lane, self.warp), self.once)
        self.place = number * spec.kind.num_heads + self.head

    def _if_any(self, rows: UOp) -> UOp:
        """A loop of one pass if there are rows, or else of none."""
        return self.body.fold_while((rows + (FAR - 1)) // FAR)

    def _shared(self, size: int, dtype: DType = F32) -> UOp:
        return self.body.shared(size, dtype).after(self.once)

    def products(self) -> list[UOp]:
        """k[i] . k[j] and q[i] . k[j], in threadgroup memory."""
        spec, mma = self.spec, self.mma
        queries, keys = (self._stage(section) for section in range(2))
        first, size, found = self.warp * mma.right_rows, CHUNK * TILE_COLS, []
        right = [op for c in range(spec.unit_chunks) for op in mma.right(keys, c * size, first, self.lane)]
        for left_tile in (keys, queries):
            shared, stores = self._shared(SQUARE), []
            for block in range(CHUNK // mma.left_rows):
                row = block * mma.left_rows
                left = [op for c in range(spec.unit_chunks) for op in mma.left(left_tile, c * size, row, self.lane)]
                for e, value in enumerate(mma.sum(left, right, zeros(mma.elements))):
                    i, j = mma.place(self.lane, e)
                    stores.append(shared[(row + i) * CHUNK + first + j].store(value))
            found.append(shared.after(UOp.group(*stores)))
        return found

    def _stage(self, section: int) -> UOp:
        """The chunk's queries or keys, in threadgroup memory; zeros for rows that it does not have."""
        spec, mma, stores = self.spec, self.mma, []
        shared = self._shared(CHUNK * spec.kind.key_dim, F16)
        for i, dim, _ in pieces(spec, mma, self.thread, self.threads):
            values = load_floats(self.units, unit_place(spec, self.chunk, section, self.head, i, dim), PIECE)
            values = [(i < self.chunk.count).where(value, 0.0) for value in values]
            slot = dim % TILE_COLS // mma.slot_cols
            stores += mma.write(shared, dim // TILE_COLS * (CHUNK * TILE_COLS), i, slot, values)
        return shared.after(UOp.group(*stores))

    def gates(self, gates: UOp) -> tuple[UOp, UOp, list[UOp]]:
        """(exponents summed up to each row, exponents and then betas, both in threadgroup memory; their stores). Rows
        that the chunk does not have neither decay nor change a state."""
        spec, i = self.spec, self.lane
        at = self.chunk.row(i, spec) * spec.mixed_cols + self.head
        own = [(i < self.chunk.count).where(self.mixed[at + start].load(), 0.0) for start in spec.gate_starts]
        shared = self._shared(2 * CHUNK)
        leads = [(n * CHUNK + i).valid(self.is_first) for n in range(2)]
        shared = shared.after(UOp.group(*[shared[at].store(value) for at, value in zip(leads, own, strict=True)]))
        total = balanced((i >= j).where(shared[j].load(), 0.0) for j in range(CHUNK))
        summed = self._shared(CHUNK)
        summed = summed.after(summed[i.valid(self.is_first)].store(total))
        base = self.place * (2 * CHUNK) + i
        places = [(base + n * CHUNK).valid(self.is_first) for n in range(2)]
        stores = [gates[at].store(value) for at, value in zip(places, (total, own[1]), strict=True)]
        return summed, shared.after(summed), stores

    def weigh(self, squares: UOp, kk: UOp, qk: UOp, exponents: UOp, own: UOp) -> tuple[UOp, list[UOp]]:
        """(A in threadgroup memory, stores of P)."""
        a, stores, kept = self._shared(SQUARE), [], []
        for start in range(0, SQUARE, self.threads):
            at = start + self.thread
            i, j = at // CHUNK, at % CHUNK
            decay = (exponents[i].load() - exponents[j].load()).minimum(0.0).exp2()
            kept.append(a[at].store((i > j).where(own[CHUNK + i].load() * kk[at].load() * decay, 0.0)))
            value = (i >= j).where(qk[at].load() * decay, 0.0)
            stores.append(squares[self.place * (2 * SQUARE) + SQUARE + at].store(value.cast(F16)))
        return a.after(UOp.group(*kept)), stores

    def invert(self, squares: UOp, a: UOp) -> list[UOp]:
        """Stores of T = (I + A)^-1, a column for each lane of the first warp, by forward substitution."""
        column: list[UOp] = []
        alone = self._if_any(self.is_first.where(self.rest, 0))
        a = a.after(alone)
        for i in range(CHUNK):
            own = self.lane.eq(i).where(UOp.const(1.0, F32), 0.0)
            known = [a[i * CHUNK + j].load() * value for j, value in enumerate(column)]
            column.append(own - balanced(known) if known else own)
        base = self.place * (2 * SQUARE) + self.lane
        stores = [squares[base + i * CHUNK].store(t.cast(F16)) for i, t in enumerate(column)]
        return [UOp.group(*stores).end(alone)]


def pieces(spec: ChunkSpec, mma: TileMma, thread: UOp, threads: int) -> list[tuple[UOp, UOp, UOp]]:
    """(row, first column, place in the tiles) of each piece of a chunk's queries or keys that a thread copies."""
    found, per_row = [], spec.kind.key_dim // PIECE
    for start in range(0, CHUNK * per_row, threads):
        item = start + thread
        i, dim = item // per_row, item % per_row * PIECE
        tile = dim // TILE_COLS * (CHUNK * TILE_COLS)
        found.append((i, dim, tile + mma.at(i, dim % TILE_COLS // mma.slot_cols)))
    return found


def unit_place(spec: ChunkSpec, chunk: Chunk, section: int, head: UOp | int, i: UOp, dim: UOp) -> UOp:
    """Where column `dim` of a chunk's i-th query or key is in `units`."""
    kind = spec.kind
    start = section * kind.key_size + head // spec.group * kind.key_dim
    return chunk.row(i, spec) * spec.unit_cols + start + dim
