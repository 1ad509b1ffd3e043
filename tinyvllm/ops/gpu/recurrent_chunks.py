"""Recurrent layers over prompts on CUDA and METAL: the chunked form of the gated delta rule on the matrix unit.

A sequence's rows are divided into chunks of 32, from its first row in the step on. In a chunk (Yang et al. 2024, "Gated
Delta Networks", sec. 3.3; the UT transform of Joffrain et al. 2006), with e[i] the sum of the decays' exponents up to
row i, and S the state before the chunk:

    A[i, j] = beta[i] (k[i] . k[j]) 2^(e[i] - e[j]), j < i      T = (I + A)^-1
    P[i, j] = (q[i] . k[j]) 2^(e[i] - e[j]), j <= i
    R = beta (V - 2^e K S)      D = T R      O = 2^e Q S + P D      S = 2^e[31] S + (2^(e[31] - e) K)^T D

T and P depend on no state: `solve_kernel` computes them for all chunks at once. `scan_kernel` passes along a sequence's
chunks. Columns of S are independent: each warp has 16 of them, as rows of S^T, in the sums of its matrix unit, where
every product of a chunk leaves what the next one needs. Operands are float16, sums and decays float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp, dtypes

from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.recurrent_rows import (
    Inputs,
    Projections,
    gate_heads,
    mix_rows,
)
from tinyvllm.ops.gpu.recurrent_solve import (
    CHUNK,
    SQUARE,
    WARP_COLS,
    Chunk,
    ChunkSpec,
    chunk_of,
    pieces,
    solve_kernel,
    unit_place,
)
from tinyvllm.ops.kernel.body import (
    F16,
    F32,
    Body,
    KernelFn,
    cached_kernel,
    clamp,
    empty,
    finish,
    run_kernel,
)
from tinyvllm.ops.kernel.lanes import LANES, axes_of, grid, load_floats, warps, zeros
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS, Operands, arrival, commit, copy_piece, together
from tinyvllm.ops.recurrent_spec import CONVOLVED, RecurrentLayer, sequence_at

MIN_ROWS = 64  # rows of a step from which on its sequences are divided into chunks

Blocks = list[list[UOp]]  # the sums of neighboring blocks of a product, as a lane has them


def recur_by_chunks(spec: ChunkSpec, out: Tensor, layer: RecurrentLayer, step: Step, parts: list[Tensor]) -> Tensor:
    """A recurrent layer's outputs, written to `out`; its states, to the pool."""
    matrices, convs = step.pool.matrices[layer.index], step.pool.convs[layer.index]
    assert isinstance(matrices, Tensor) and isinstance(convs, Tensor)
    device, tokens, heads = str(out.device), step.num_tokens, spec.kind.num_heads
    units, mixed = mix_rows(spec, layer, step, parts, F16)
    squares = empty(spec.max_chunks * heads * 2 * SQUARE, F16, device)
    gates = empty(spec.max_chunks * heads * 2 * CHUNK, F32, device)
    squares, gates = run_kernel(solve_kernel(spec), [squares, gates], [step.inputs, units, mixed])
    o = empty(tokens * spec.kind.value_size, F32, device)
    read = [step.inputs, units, mixed, squares, gates, *[parts[i] for i in spec.parts(*CONVOLVED)]]
    o, *_ = run_kernel(scan_kernel(spec), [o, matrices, convs], read)
    return gate_heads(spec, out, layer, step, parts, o)


@cached_kernel
def scan_kernel(spec: ChunkSpec) -> KernelFn:
    """fn(o (T, Hv * Dv), matrices, convs, inputs, units, mixed, squares, gates, *parts): each sequence's chunks one
    after another. Moves the states to the slots where they go."""

    def kernel(o: UOp, matrices: UOp, convs: UOp, inputs: UOp, *rest: UOp) -> UOp:
        scan = _Scan(spec, inputs, matrices, _Sources(*rest[:4]))
        state = scan.run(o)
        source = Inputs(Projections(spec, rest[4:], *CONVOLVED), convs, convs, scan.sequence)
        is_first = (scan.lane * 0 + scan.split).eq(0)
        stores = [*scan.store(matrices, state), *source.keep_head(scan.head, is_first, scan.thread, scan.threads)]
        kind, layout = spec.kind, spec.layout
        tokens, seqs = layout.num_tokens, min(layout.num_seqs, layout.num_tokens)
        ops = 2 * tokens * (3 * kind.matrix_elements + 2 * CHUNK * kind.value_size)
        nbytes = 2 * seqs * kind.num_bytes + tokens * (4 * kind.key_size + 8 * kind.value_size)
        nbytes += tokens * kind.num_heads * (4 * CHUNK + 8)
        done = UOp.group(*stores).end(*reversed(scan.axes))
        name = f"scan_chunks_{tokens}x{kind.num_heads}x{kind.key_dim}x{kind.value_dim}"
        return finish(done, name, ops=ops, nbytes=nbytes)

    return kernel


@dataclass(frozen=True)
class _Sources:
    """What the scan reads."""

    units: UOp
    mixed: UOp
    squares: UOp
    gates: UOp


@dataclass(frozen=True)
class _Memory:
    """A chunk in threadgroup memory, from element `base` on: queries, keys, T, P. `begun`: the copies of the next one,
    which begin before this one is read."""

    spec: ChunkSpec
    tile: UOp
    base: UOp | int = 0
    begun: tuple[UOp, ...] = ()

    def start(self, which: int) -> UOp | int:
        """Where the queries (0), keys (1), T (2) or P (3) begin."""
        units = CHUNK * self.spec.kind.key_dim
        return self.base + (0, units, 2 * units, 2 * units + SQUARE)[which]

    @staticmethod
    def size(spec: ChunkSpec) -> int:
        return 2 * CHUNK * spec.kind.key_dim + 2 * SQUARE


class _Scan:
    """A warp's work: WARP_COLS columns of the state of one sequence and value head."""

    def __init__(self, spec: ChunkSpec, inputs: UOp, matrices: UOp, sources: _Sources) -> None:
        self.spec, self.mma, self.matrices, self.sources, self.body = spec, spec.tiles, matrices, sources, Body()
        body, kind, num_warps = self.body, spec.kind, spec.num_warps
        self.seq, self.head = grid(body, spec.layout.num_seqs), grid(body, kind.num_heads)
        self.split = grid(body, spec.splits)
        self.lane, self.warp = body.threads(LANES), warps(body, num_warps)
        self.axes = axes_of(self.seq, self.head, self.split, self.lane, self.warp)
        self.thread, self.threads = self.warp * LANES + self.lane, num_warps * LANES
        self.sequence = sequence_at(spec, inputs, self.seq)
        self.first_col = (self.split * num_warps + self.warp) * WARP_COLS
        self.row_blocks = WARP_COLS // self.mma.left_rows
        self.key_blocks = kind.key_dim // self.mma.right_rows
        self.row_block_cols = CHUNK // self.mma.right_rows

    def _elements(self) -> list[tuple[UOp, UOp]]:
        """(row, column) in the state of each of the lane's sums of S^T: by block of columns, block of rows, element."""
        found = []
        for b in range(self.row_blocks):
            for n in range(self.key_blocks):
                for e in range(self.mma.elements):
                    col, row = self.mma.place(self.lane, e)
                    found.append((row + n * self.mma.right_rows, col + (self.first_col + b * self.mma.left_rows)))
        return found

    def _place(self, slot: UOp, row: UOp, col: UOp) -> UOp:
        kind = self.spec.kind
        return ((slot * kind.num_heads + self.head) * kind.key_dim + row) * kind.value_dim + col

    def store(self, matrices: UOp, state: list[UOp]) -> list[UOp]:
        sequence = self.sequence
        return [
            matrices[self._place(sequence.write_slot, row, col).valid(sequence.count > 0)].store(value)
            for (row, col), value in zip(self._elements(), state, strict=True)
        ]

    def run(self, o: UOp) -> list[UOp]:
        """The lane's sums of S^T after all chunks. Writes the outputs."""
        spec, body, sequence = self.spec, self.body, self.sequence
        is_old = (sequence.count > 0) & sequence.position.ne(0)
        places = [self._place(sequence.read_slot, row, col).valid(is_old) for row, col in self._elements()]
        registers = body.registers(len(places))
        old = [self.matrices[place].load() for place in places]
        registers = registers.after(UOp.group(*[registers.after(*self.axes)[i].store(v) for i, v in enumerate(old)]))
        size, is_cuda = _Memory.size(spec), self.mma.is_cuda
        memory = _Memory(spec, body.shared((2 if is_cuda else 1) * size, F16))
        primed = (self._begin(memory, UOp.const(0, dtypes.weakint)),) if is_cuda else ()
        loop = body.fold_while((sequence.count + (CHUNK - 1)) // CHUNK)
        index = loop.cast(dtypes.weakint)
        if is_cuda:
            arrived = arrival(0, loop, *primed)
            begun = (self._begin(replace(memory, base=(index + 1) % 2 * size), index + 1, arrived),)
            memory = replace(memory, tile=memory.tile.after(arrived), base=index % 2 * size, begun=begun)
        else:
            filled = UOp.group(*self._fill(replace(memory, tile=memory.tile.after(loop)), index))
            memory = replace(memory, tile=memory.tile.after(filled))
        state = [registers.after(loop)[i].load() for i in range(len(places))]
        new, stores = self._step(memory, index, state, o)
        stored = UOp.group(*[registers.after(loop)[i].store(value) for i, value in enumerate(new)], *stores)
        registers = registers.after(together(stored, *memory.begun).end(loop))
        return [registers[i].load() for i in range(len(places))]

    # -- a chunk in threadgroup memory ---------------------------------------------------------------------------------

    def _number(self, index: UOp) -> UOp:
        """The number of the sequence's index-th chunk, and its head, in what `solve_kernel` wrote."""
        number = clamp(self.sequence.first_row // CHUNK + index + self.seq, 0, self.spec.max_chunks - 1)
        return number * self.spec.kind.num_heads + self.head

    def _square_pieces(self) -> list[tuple[UOp, UOp, UOp | None]]:
        """(place in T and then P, place in their tiles, whether it exists) of the pieces that the thread copies."""
        found: list[tuple[UOp, UOp, UOp | None]] = []
        for start in range(0, 2 * SQUARE // PIECE, self.threads):
            item, inside = start + self.thread, None
            if start + self.threads > 2 * SQUARE // PIECE:
                inside = item < 2 * SQUARE // PIECE
                item = inside.where(item, 0)
            at = item * PIECE
            row = at // TILE_COLS
            tile = row // CHUNK * SQUARE + self.mma.at(row % CHUNK, at % TILE_COLS // self.mma.slot_cols)
            found.append((at, tile, inside))
        return found

    def _begin(self, memory: _Memory, index: UOp, *after: UOp) -> UOp:
        """Begin to copy a chunk to threadgroup memory, zeros for rows that it does not have."""
        spec, copies, sources, tile = self.spec, [], self.sources, memory.tile
        chunk, number = chunk_of(self.sequence, index), self._number(index)
        for i, dim, place in pieces(spec, self.mma, self.thread, self.threads):
            for section in range(2):
                at = unit_place(spec, chunk, section, self.head, i, dim)
                copies.append(
                    copy_piece(tile[memory.start(section) + place], sources.units[at], i < chunk.count, *after)
                )
        for at, place, inside in self._square_pieces():
            source = sources.squares[number * (2 * SQUARE) + at]
            target = tile[memory.start(2) + place]
            assert inside is None, "threads beyond the last piece would overwrite the first"
            copies.append(copy_piece(target, source, chunk.count > 0, *after))
        return commit(*copies)

    def _fill(self, memory: _Memory, index: UOp) -> list[UOp]:
        """Stores of the same, without asynchronous copies."""
        spec, stores, sources, tile = self.spec, [], self.sources, memory.tile
        chunk, number = chunk_of(self.sequence, index), self._number(index)
        for i, dim, _ in pieces(spec, self.mma, self.thread, self.threads):
            slot, base = dim % TILE_COLS // self.mma.slot_cols, dim // TILE_COLS * (CHUNK * TILE_COLS)
            for section in range(2):
                at = unit_place(spec, chunk, section, self.head, i, dim)
                values = [(i < chunk.count).where(value, 0.0) for value in load_floats(sources.units, at, PIECE)]
                stores += self.mma.write(tile, memory.start(section) + base, i, slot, values)
        for at, _, inside in self._square_pieces():
            row = at // TILE_COLS
            values = load_floats(sources.squares, number * (2 * SQUARE) + at, PIECE)
            base, slot = memory.start(2) + row // CHUNK * SQUARE, at % TILE_COLS // self.mma.slot_cols
            stores += self.mma.write(tile, base, row % CHUNK, slot, values, inside)
        return stores

    # -- products ------------------------------------------------------------------------------------------------------

    def _step(self, memory: _Memory, index: UOp, state: list[UOp], o: UOp) -> tuple[list[UOp], list[UOp]]:
        """(the lane's sums of S^T after a chunk, stores of its outputs)."""
        chunk, rows = chunk_of(self.sequence, index), _Rows(self, index)
        new, stores, size = [], [], self.mma.elements
        per_block = self.key_blocks * size
        for b in range(self.row_blocks):
            flat = state[b * per_block : (b + 1) * per_block]
            blocks = [flat[n * size : (n + 1) * size] for n in range(self.key_blocks)]
            left = [op for n in range(0, self.key_blocks, 4) for op in self.mma.weights(blocks[n : n + 4])]
            known, asked = (self._times_units(left, memory, section) for section in (1, 0))
            values = self._values(chunk, b)
            rest = [
                [rows.beta(n, e) * (v[e] - rows.decay(n, e) * k[e]) for e in range(size)]
                for n, (v, k) in enumerate(zip(values, known, strict=True))
            ]
            deltas = self._times_square(rest, memory, 2, [zeros(size)] * len(rest))
            start = [[rows.decay(n, e) * q[e] for e in range(size)] for n, q in enumerate(asked)]
            outputs = self._times_square(deltas, memory, 3, start)
            stores += self._outputs(o, chunk, b, outputs)
            late = [[rows.later(n, e) * d[e] for e in range(size)] for n, d in enumerate(deltas)]
            for value in self._add_keys(late, memory, [[rows.last * s for s in block] for block in blocks]):
                new += value
        return new, stores

    def _times_units(self, left: Operands, memory: _Memory, section: int) -> Blocks:
        """S^T times the chunk's queries or keys, by block of its rows."""
        mma, found = self.mma, []
        for n in range(self.row_block_cols):
            right = [
                op
                for c in range(self.spec.unit_chunks)
                for op in mma.upright(
                    memory.tile,
                    memory.start(section) + c * (CHUNK * TILE_COLS),
                    n * mma.right_rows,
                    self.lane,
                    *memory.begun,
                )
            ]
            found.append(mma.sum(left, right, zeros(mma.elements)))
        return found

    def _times_square(self, blocks: Blocks, memory: _Memory, which: int, start: Blocks) -> Blocks:
        """start + blocks (columns x rows j) times T or P (rows i x rows j), by block of rows i."""
        mma, left = self.mma, self.mma.weights(blocks)
        return [
            mma.sum(
                left, mma.upright(memory.tile, memory.start(which), n * mma.right_rows, self.lane, *memory.begun), sums
            )
            for n, sums in enumerate(start)
        ]

    def _add_keys(self, blocks: Blocks, memory: _Memory, start: Blocks) -> Blocks:
        """start + blocks (columns x rows) times the chunk's keys, by block of the state's rows."""
        mma, left, found = self.mma, self.mma.weights(blocks), []
        for n, sums in enumerate(start):
            dim = n * mma.right_rows
            tile = memory.start(1) + dim // TILE_COLS * (CHUNK * TILE_COLS)
            right = mma.transposed(memory.tile, tile, 0, dim % TILE_COLS, self.lane, *memory.begun)
            found.append(mma.sum(left, right, sums))
        return found

    def _cells(self, block: int) -> list[list[tuple[UOp, UOp]]]:
        """(row of the chunk, column of the head) of the lane's sums of columns x rows, by block of rows."""
        mma, found = self.mma, []
        for n in range(self.row_block_cols):
            places = [mma.place(self.lane, e) for e in range(mma.elements)]
            first = self.first_col + block * mma.left_rows
            found.append([(row + n * mma.right_rows, col + first) for col, row in places])
        return found

    def _values(self, chunk: Chunk, block: int) -> Blocks:
        """The chunk's values; zeros for rows that it does not have."""
        spec, start = self.spec, self.head * self.spec.kind.value_dim
        return [
            [
                (i < chunk.count).where(
                    self.sources.mixed[chunk.row(i, spec) * spec.mixed_cols + start + col].load(), 0.0
                )
                for i, col in cells
            ]
            for cells in self._cells(block)
        ]

    def _outputs(self, o: UOp, chunk: Chunk, block: int, outputs: Blocks) -> list[UOp]:
        kind = self.spec.kind
        return [
            o[
                (chunk.row(i, self.spec) * kind.value_size + self.head * kind.value_dim + col).valid(i < chunk.count)
            ].store(value)
            for cells, values in zip(self._cells(block), outputs, strict=True)
            for (i, col), value in zip(cells, values, strict=True)
        ]


class _Rows:
    """The gates of a chunk's rows, for the lane's sums of columns x rows."""

    def __init__(self, scan: _Scan, index: UOp) -> None:
        base, mma, self.size = scan._number(index) * (2 * CHUNK), scan.mma, scan.mma.elements
        gates, rows = scan.sources.gates, [mma.place(scan.lane, e)[1] for e in range(mma.elements)]
        places = [[row + n * mma.right_rows for row in rows] for n in range(scan.row_block_cols)]
        exponents = [[gates[base + row].load() for row in block] for block in places]
        last = gates[base + (CHUNK - 1)].load()
        self._betas = [[gates[base + CHUNK + row].load() for row in block] for block in places]
        self._decays = [[e.exp2() for e in block] for block in exponents]
        self._later = [[(last - e).minimum(0.0).exp2() for e in block] for block in exponents]
        self.last = last.exp2()

    def beta(self, block: int, element: int) -> UOp:
        return self._betas[block][element]

    def decay(self, block: int, element: int) -> UOp:
        """The decay of the state, from before the chunk to a row."""
        return self._decays[block][element]

    def later(self, block: int, element: int) -> UOp:
        """The decay of what a row adds to the state, from there to the chunk's end."""
        return self._later[block][element]
