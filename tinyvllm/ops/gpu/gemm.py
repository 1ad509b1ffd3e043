"""Matrix products of many token rows: tiles of both operands in threadgroup memory, multiplied on the matrix unit.

A threadgroup computes a tile of tokens times a tile of the matrix's rows, in steps of 32 columns. CUDA copies the next
columns asynchronously while it multiplies the current ones. Quantized weights are unpacked on their way into the tile,
once for all of its tokens. METAL's tiles have a layout of their own (gemm_metal.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import LOG2E, Arithmetic, gated
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.runs import aligned_planes, read_run
from tinyvllm.ops.gpu.gemm_hopper import (
    CACHED_TOKENS,
    CYCLES_PER_SECOND,
    MIN_STEPS,
    ROW_TILES,
    RUN_ROWS,
    WgmmaSpec,
    best_cut,
    wgmma_kernel,
)
from tinyvllm.ops.gpu.gemm_hopper_unpack import unpacking_wgmma_kernel
from tinyvllm.ops.gpu.gemm_metal import metal_sums
from tinyvllm.ops.gpu.product import GatedRows
from tinyvllm.ops.gpu.token_tiles import ExpertTile, ExpertTiles, TokenTile
from tinyvllm.ops.kernel.body import (
    F16,
    F32,
    I32,
    U32,
    Body,
    KernelFn,
    bits_of_bfloat,
    cached_kernel,
    empty,
    finish,
    run_kernel,
)
from tinyvllm.ops.kernel.hopper import WGMMA_COLS
from tinyvllm.ops.kernel.lanes import LANES, Mma, axes_of, grid, load_floats, warps
from tinyvllm.ops.kernel.tiles import (
    PIECE,
    TILE_COLS,
    TileMma,
    arrival,
    commit,
    copy_piece,
    move_piece,
    quick_division,
    store_vector,
    together,
    words_of,
)
from tinyvllm.ops.kernel.tuning import Tunable

DENSE = Format("float16", 16)
MIN_TOKENS = 65  # the fewest rows that are worth a tile of tokens on CUDA
METAL_TILES = (8, 16, 32, 64)  # tokens of a tile
UNPACK_TOKENS = 256  # the fewest rows for which weights are unpacked first
UNPACK_ELEMENTS = 640 << 20  # of the largest matrix, or stack of experts, that is unpacked first: 1.25 GiB of float16
STAGES = 3  # tiles of an operand that CUDA holds: one is multiplied, two are being copied
GROUPS_WANTED = 128  # threadgroups that keep a large GPU busy
SHORTEST_SPLIT = 16  # the fewest steps of 32 columns that are worth a threadgroup


def takes_tiles(mma: Mma, num_tokens: int) -> bool:
    """Whether a product of so many rows is one of tiles in threadgroup memory."""
    # on METAL, a kernel that unpacks weights into each simdgroup's registers would need more than a thread has
    return num_tokens >= (2 if mma.kind == "METAL" else MIN_TOKENS)


def quick_arithmetic(kind: str) -> Arithmetic:
    """The device's own exponential and fast division."""
    return Arithmetic(lambda x: x.exp2(), lambda x, slope: quick_division(x, (x * (slope * -LOG2E)).exp2() + 1.0, kind))


@dataclass(frozen=True)
class GemmSpec(GatedRows, Tunable):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up."""

    name: str
    mma: Mma
    format: Format
    x_dtype: DType
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up
    has_wgmma: bool = False  # the device has wgmma, Hopper's matrix instruction of four warps
    adds_residual: bool = False  # if S is 1

    @property
    def experts(self) -> ExpertTiles | None:
        """Set if the matrix has an axis of experts: then N is of one, and each tile of tokens has its own."""
        return None

    @property
    def tiles(self) -> TileMma:
        return TileMma(self.mma)

    @property
    def is_async(self) -> bool:
        """Whether x is copied asynchronously, as it is stored."""
        return self.mma.kind == "CUDA" and self.x_dtype == self.mma.dtype == F16

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's kernel is used, possibly after unpacking. Its `splits` then count, because the output is
        allocated for them."""
        is_read = self.weights_as_stored or self.is_bfloat or self.unpacks_first or self.unpacks_in_stages
        return self.fits_wgmma and is_read

    @property
    def fits_wgmma(self) -> bool:
        """Whether Hopper's kernel takes matrices of these sizes."""
        is_long = self.num_cols % WGMMA_COLS == 0 and self.num_cols >= MIN_STEPS * WGMMA_COLS
        return self.has_wgmma and is_long and self.out_rows % RUN_ROWS == 0

    @property
    def wgmma(self) -> WgmmaSpec:
        """The spec of Hopper's kernel, with the size of its tiles."""
        shape = (self.num_tokens, self.num_rows, self.num_cols)
        fmt = self.format if self.unpacks_in_stages else None
        row_tile, splits = best_cut(*shape, self.is_gated, fmt)
        cut = (self.knob("wgmma_rows", row_tile), self.knob("splits", splits))
        return WgmmaSpec(self.name, self.mma, *shape, *cut, self.activation, self.adds_residual, fmt)

    @property
    def wgmma_rows(self) -> int:
        """Rows of the matrix in a tile of Hopper's kernel."""
        return self.wgmma.row_tile

    @property
    def is_unpacked(self) -> bool:
        """Whether Hopper's kernel multiplies quantized weights, unpacked to float16."""
        return self.fits_wgmma and self.format.is_quantized and self.is_async

    @property
    def unpacks_first(self) -> bool:
        """Whether a separate kernel unpacks them first: with many tokens, each of whose tiles would unpack them again,
        and if they fit into scratch memory."""
        fits = self.num_rows * self.num_cols <= UNPACK_ELEMENTS
        return self.is_unpacked and fits and self.num_tokens >= UNPACK_TOKENS

    @property
    def can_unpack_in_stages(self) -> bool:
        """Whether they can be unpacked on their way into the stages; a codebook of a grid is too large for that."""
        return self.is_unpacked and not self.unpacks_first and self.format.grid is None

    @property
    def unpacks_in_stages(self) -> bool:
        """Whether they are: only where `tinyvllm tune` has found the same tokens, sooner. Its first form took half of
        the time for 128 rows on an H200; as it is now, it has not run on one."""
        return self.can_unpack_in_stages and self.knob("in_stages", 0) == 1

    @property
    def is_bfloat(self) -> bool:
        """Whether the matrix is stored in bfloat16, and multiplied as such."""
        return self.format.name == "bfloat16" and self.mma.dtype == dtypes.bfloat16

    @property
    def rounds_input(self) -> bool:
        """Whether a separate kernel rounds x to bfloat16 first, for Hopper's kernel."""
        return self.uses_wgmma and self.is_bfloat

    @property
    def weights_as_stored(self) -> bool:
        """Whether weights are copied asynchronously, as they are stored."""
        return self.is_async and self.format.name == "float16"

    @property
    def token_tile(self) -> int:
        """Tokens of a tile; on METAL the fewest that hold all tokens."""
        if self.mma.kind == "CUDA":
            return 128
        return next((tile for tile in METAL_TILES if tile >= self.num_tokens), METAL_TILES[-1])

    @property
    def row_tile(self) -> int:
        """Rows of the matrix in a tile; of gate and up, half each."""
        return 128 if self.mma.kind == "CUDA" else 64

    @property
    def warp_grid(self) -> tuple[int, int]:
        """(warps along the tokens, warps along the rows)."""
        return (2, 2) if self.token_tile >= 64 else (1, 4)

    @property
    def num_warps(self) -> int:
        return self.warp_grid[0] * self.warp_grid[1]

    @property
    def token_groups(self) -> int:
        return -(-self.num_tokens // self.token_tile)

    @property
    def row_groups(self) -> int:
        return -(-self.num_rows // self.row_tile)

    @property
    def splits(self) -> int:
        """S: splits of K, each with its own threadgroups, if there are too few tiles to fill the device."""
        if self.uses_wgmma:
            return self.wgmma.splits
        splits, steps = 1, self.num_cols // TILE_COLS
        while (
            not self.is_gated
            and self.token_groups * self.row_groups * splits < GROUPS_WANTED
            and steps % (splits * 2) == 0
            and steps // (splits * 2) >= SHORTEST_SPLIT
        ):
            splits *= 2
        return self.knob("splits", splits)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        splits = () if self.is_gated else (1, 2, 4, 8)
        in_stages = (0, 1) if self.can_unpack_in_stages else ()
        return {"wgmma_rows": ROW_TILES if self.uses_wgmma else (), "splits": splits, "in_stages": in_stages}

    def is_possible(self) -> bool:
        step = MIN_STEPS * WGMMA_COLS if self.uses_wgmma else TILE_COLS
        if self.unpacks_in_stages and not self.wgmma.fits_unpacking:
            return False
        return self.splits == 1 or self.num_cols % (self.splits * step) == 0

    @property
    def predicted_s(self) -> float | None:
        return self.wgmma.cycles / CYCLES_PER_SECOND if self.uses_wgmma else None

    @property
    def tile_cols(self) -> int:
        """Columns of a step: 32, or on METAL 64 if they divide the columns of a split, and if the next step's weights
        and x fit into registers beside the rest."""
        is_long = self.mma.kind == "METAL" and self.num_cols // self.splits % (2 * TILE_COLS) == 0
        fits = self.format.is_quantized or self.x_dtype != F32
        return 2 * TILE_COLS if is_long and fits else TILE_COLS

    @property
    def steps(self) -> int:
        """Steps of `tile_cols` columns of a threadgroup."""
        return self.num_cols // self.tile_cols // self.splits


@dataclass(frozen=True)
class ExpertGemmSpec(GemmSpec):
    """The same with experts: T are the pairs of a token and an expert."""

    expert_tiles: ExpertTiles = field(kw_only=True)

    @property
    def experts(self) -> ExpertTiles:
        return self.expert_tiles

    @property
    def token_tile(self) -> int:
        return self.expert_tiles.tile_rows

    @property
    def token_groups(self) -> int:
        return self.expert_tiles.num_tiles

    @property
    def splits(self) -> int:
        return 1

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {}


def multiply_rows(
    spec: GemmSpec, out: Tensor, planes: Sequence[Tensor], x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Run the product into `out`, after unpacking the weights if that is faster; adds `residual` (T, N) if given."""
    spec = replace(spec, adds_residual=residual is not None)
    if spec.mma.kind == "METAL":
        spec = replace(spec, x_dtype=x.dtype)
    if spec.rounds_input and x.dtype != F16:
        x = round_rows(x, spec.num_tokens, spec.num_cols)
    if spec.unpacks_first:
        whole = empty(spec.num_rows * spec.num_cols, F16, str(out.device))
        planes = run_kernel(unpack_kernel(spec.format, spec.num_rows, spec.num_cols), [whole], planes)
    rest = [] if residual is None else [residual]
    if spec.uses_wgmma:
        maps = empty(spec.wgmma.map_size, U32, str(out.device))
        make = unpacking_wgmma_kernel if spec.unpacks_in_stages else wgmma_kernel
        return run_kernel(make(spec.wgmma), [out, maps], [*planes, x, *rest])[0]
    return run_kernel(gemm_kernel(spec), [out], [*planes, x, *rest])[0]


@cached_kernel
def gemm_kernel(spec: GemmSpec) -> KernelFn:
    """fn(out, *planes, x[, residual][, tile map, sorted pairs[, bias]]): see GemmSpec. Token rows after the last repeat
    it, and are not stored."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        tile = GemmTile(spec, list(rest))
        sums = tile.sums()
        stores = tile.stores(out, sums)
        name = f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
        matrices = 1 if spec.experts is None else spec.experts.work[1]
        nbytes = int(matrices * spec.num_rows * spec.num_cols * spec.format.code_bits / 8)
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(UOp.group(*stores).end(*reversed(tile.axes)), name, ops=ops, nbytes=nbytes)

    return kernel


@cached_kernel
def unpack_kernel(fmt: Format, num_rows: int, num_cols: int, dtype: DType = F16) -> KernelFn:
    """fn(out (N, K), *planes): a quantized matrix as float16, or as bfloat16 in a float16 buffer, on CUDA. A thread
    unpacks a run of 32 values; through threadgroup memory, neighboring threads then store neighboring pieces of 16
    bytes."""

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body, runs, threads = Body(), num_rows * num_cols // PANEL, 128
        group, thread = grid(body, -(-runs // threads)), body.threads(threads)
        run, per_row = (group * threads + thread).minimum(runs - 1), num_cols // PANEL
        per_run, stride = PANEL // PIECE, PANEL + PIECE  # padded by a piece: different banks
        reader = aligned_planes(fmt, planes, "CUDA")
        values = read_run(reader, run // per_row, run % per_row, num_cols, PANEL).values(F32 if dtype == F16 else dtype)
        words = words_of(values, F16)
        shared, size = body.shared(threads * stride, F16), PIECE // 2
        stored = [
            store_vector(shared[thread * stride + i * PIECE], words[i * size : (i + 1) * size]) for i in range(per_run)
        ]
        ready, stores = UOp(Ops.BARRIER, src=(together(*stored),)), []
        for start in range(0, threads * per_run, threads):
            piece = start + thread
            number = group * threads * per_run + piece
            is_inside = number < runs * per_run if runs % threads else None
            source = shared[piece // per_run * stride + piece % per_run * PIECE]
            stores.append(move_piece(out[number * PIECE], source, is_inside, ready))
        name = f"unpack_{fmt.name}_{num_rows}x{num_cols}"
        ended = together(*stores).end(*reversed(axes_of(group, thread)))
        return finish(ended, name, nbytes=num_rows * num_cols * 3)

    return kernel


def round_rows(x: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """x (T, K) as bfloat16, in a float16 buffer."""
    rounded = empty(num_rows * num_cols, F16, str(x.device))
    return run_kernel(round_kernel(num_rows, num_cols), [rounded], [x])[0]


@cached_kernel
def round_kernel(num_rows: int, num_cols: int) -> KernelFn:
    """fn(out (T, K) float16, x): x rounded to bfloat16, as its bits."""

    def kernel(out: UOp, x: UOp) -> UOp:
        body, threads, pieces = Body(), 256, num_rows * num_cols // PIECE
        group, thread = grid(body, -(-pieces // threads)), body.threads(threads)
        at = (group * threads + thread).minimum(pieces - 1) * PIECE  # the last one again: no condition
        halves = [bits_of_bfloat(value) for value in load_floats(x, at, PIECE)]
        stores = UOp.group(*[out[at + i].store(value) for i, value in enumerate(halves)])
        ended = stores.end(*reversed(axes_of(group, thread)))
        return finish(ended, f"round_{num_rows}x{num_cols}", nbytes=6 * num_rows * num_cols)

    return kernel


class GemmTile:
    """One threadgroup's work: a tile of tokens times a tile of rows, over a split of the columns."""

    def __init__(self, spec: GemmSpec, operands: list[UOp]) -> None:
        self.spec, self.mma, body = spec, spec.tiles, Body()
        own = [operands.pop(0) for _ in range(Planes.count(spec.format))]
        self.planes = aligned_planes(spec.format, own, spec.mma.kind)
        self.x = operands.pop(0)
        self.residual = operands.pop(0) if spec.adds_residual else None
        # threadgroups that run together share rows of the matrix, and as much of x as fits into the cache
        together = 1 if spec.experts is not None else min(spec.token_groups, CACHED_TOKENS // spec.token_tile)
        if spec.token_groups % together:
            together = spec.token_groups
        self.split, outer = grid(body, spec.splits), grid(body, spec.token_groups // together)
        self.row_group, inner = grid(body, spec.row_groups), grid(body, together)
        token_group = outer * together + inner
        self.tile = TokenTile(token_group * spec.token_tile, spec.token_tile, spec.num_tokens)
        if spec.experts is not None:
            self.tile = ExpertTile(spec.experts, token_group, spec.num_rows, operands)
        self.lane, warp = body.threads(LANES), warps(body, spec.num_warps)
        self.axes = axes_of(self.split, outer, self.row_group, inner, self.lane, warp)
        self.body, self.thread = body, warp * LANES + self.lane
        down, across = spec.warp_grid
        self.token_blocks = spec.token_tile // down // self.mma.left_rows
        self.row_blocks = spec.row_tile // across // self.mma.right_rows
        self.warp_token = warp // across * (spec.token_tile // down)
        self.warp_row = warp % across

    @property
    def threads(self) -> int:
        return self.spec.num_warps * LANES

    # -- the tile's rows -----------------------------------------------------------------------------------------------

    def block_row(self, block: int) -> UOp:
        """The tile's row where a block of the warp's rows begins. Of gate and up, the first half are gate."""
        per_warp = self.spec.row_tile // self.spec.warp_grid[1]
        size = self.mma.right_rows
        if not self.spec.is_gated:
            return self.warp_row * per_warp + block * size
        half = self.row_blocks // 2
        start = self.warp_row * (per_warp // 2) + block % half * size
        return start + block // half * (self.spec.row_tile // 2)

    def matrix_row(self, row: UOp) -> UOp:
        """The matrix's row for a row of the tile; its last row for those after the end."""
        spec = self.spec
        if not spec.is_gated:
            whole = self.row_group * spec.row_tile + row
            whole = whole if spec.num_rows % spec.row_tile == 0 else whole.minimum(spec.num_rows - 1)
            return self.tile.matrix_row(whole)
        half = spec.row_tile // 2
        inner = self.row_group * half + row % half
        if spec.out_rows % half:
            inner = inner.minimum(spec.out_rows - 1)
        return self.tile.matrix_row(inner + row // half * spec.out_rows)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def sums(self) -> list[UOp]:
        """The tile's sums, by block of tokens, block of rows and element."""
        if self.mma.mma.kind == "METAL":
            return metal_sums(self)
        return self.sums_async() if self.spec.is_async else self.sums_plain()

    def place(self, element: int) -> tuple[UOp, UOp]:
        """(token, row) of a lane's sum in its block. On METAL, rows are the left operand."""
        place = self.mma.place(self.lane, element)
        return place if self.mma.is_cuda else (place[1], place[0])

    def sums_async(self) -> list[UOp]:
        """The tile's sums; the next columns are copied meanwhile (CUDA)."""
        spec, body, steps = self.spec, self.body, self.spec.steps
        size = spec.token_tile * TILE_COLS
        tile_x = body.shared(STAGES * size, F16)
        weight_stages = STAGES if spec.weights_as_stored else 2
        weight_size = spec.row_tile * TILE_COLS
        tile_w = body.shared(weight_stages * weight_size, F16)

        def begin(step: UOp | int, *after: UOp) -> UOp:
            """Begin the copies for a step, if it exists."""
            wanted = None if isinstance(step, int) and step < steps else UOp.const(0, I32) + step < steps
            slot = step % STAGES
            copies = self._copies(tile_x, slot * size, step, wanted, after, is_x=True)
            if spec.weights_as_stored:
                copies += self._copies(tile_w, slot * weight_size, step, wanted, after, is_x=False)
            return commit(*copies)

        primed: list[UOp] = []
        for stage in range(STAGES - 1):
            primed.append(begin(stage, *primed[-1:]))
        unpacked: list[UOp] = []
        if not spec.weights_as_stored:
            unpacked = self._unpack(tile_w, 0, 0)
        registers, count = body.registers(self.num_sums), self.num_sums
        zeroed = UOp.group(*[registers.after(*self.axes)[i].store(UOp.const(0.0, F32)) for i in range(count)])
        registers = registers.after(zeroed)
        loop, turn = self.loop()
        arrived = arrival(STAGES - 2, loop, primed[-1], *unpacked)
        begun = begin(turn + (STAGES - 1), arrived)
        added = self._multiply(
            tile_x.after(arrived),
            turn % STAGES * size,
            tile_w.after(arrived),
            turn % weight_stages * weight_size,
            registers.after(loop),
            begun,
        )
        ends = [added, begun]
        if not spec.weights_as_stored:
            following = (turn + 1).minimum(steps - 1)
            ends += self._unpack(tile_w.after(arrived), (turn + 1) % 2 * weight_size, following)
        done = together(*ends).end(loop)
        return [registers.after(done)[i].load() for i in range(count)]

    def _copies(
        self, tile: UOp, base: UOp | int, step: UOp | int, wanted: UOp | None, after: tuple[UOp, ...], *, is_x: bool
    ) -> list[UOp]:
        """Copies of a tile of x or of weights. `wanted`: whether to copy; None: always."""
        spec, copies = self.spec, []
        rows = spec.token_tile if is_x else spec.row_tile
        source = self.x if is_x else self.planes.codes
        per_row = TILE_COLS // PIECE
        for start in range(0, rows * per_row, self.threads):
            piece = start + self.thread
            row, slot = piece // per_row, piece % per_row
            whole = self.tile.source(row) if is_x else self.matrix_row(row)
            at = whole * spec.num_cols + (self.split * spec.steps + step) * TILE_COLS + slot * PIECE
            copies.append(copy_piece(tile[base + self.mma.at(row, slot)], source[at], wanted, *after))
        return copies

    def sums_plain(self) -> list[UOp]:
        """The tile's sums; each step loads its columns and then multiplies them (CUDA, where x must be converted)."""
        spec, body = self.spec, self.body
        tile_x = body.shared(spec.token_tile * TILE_COLS, F16)
        tile_w = body.shared(spec.row_tile * TILE_COLS, F16)
        registers, count = body.registers(self.num_sums), self.num_sums
        zeroed = UOp.group(*[registers.after(*self.axes)[i].store(UOp.const(0.0, F32)) for i in range(count)])
        registers = registers.after(zeroed)
        loop, turn = self.loop()
        filled = UOp.group(*self._load_x(tile_x.after(loop), turn), *self._unpack(tile_w.after(loop), 0, turn))
        added = self._multiply(tile_x.after(filled), 0, tile_w.after(filled), 0, registers.after(loop))
        done = UOp(Ops.BARRIER, src=(added,)).end(loop)  # before the tiles are overwritten
        return [registers.after(done)[i].load() for i in range(count)]

    def loop(self) -> tuple[UOp, UOp]:
        """(a loop over the steps, the step's number)."""
        turns = self.tile.turns(self.spec.steps)
        if isinstance(turns, int):
            loop = self.body.fold(turns)
            return loop, loop
        loop = self.body.fold_while(turns)
        return loop, UOp.const(0, dtypes.weakint) + self.tile.turn(loop, self.spec.steps)

    def _load_x(self, tile: UOp, step: UOp) -> list[UOp]:
        spec, stores = self.spec, []
        per_row = TILE_COLS // PIECE
        for start in range(0, spec.token_tile * per_row, self.threads):
            piece = start + self.thread
            row, slot = piece // per_row, piece % per_row
            at = self.tile.source(row) * spec.num_cols + (self.split * spec.steps + step) * TILE_COLS + slot * PIECE
            stores += self.mma.write(tile, 0, row, slot * (PIECE // self.mma.slot_cols), load_floats(self.x, at, PIECE))
        return stores

    def _unpack(self, tile: UOp, base: UOp | int, step: UOp | int) -> list[UOp]:
        """Stores of a tile of unpacked weights. A thread takes as many columns as share words and scales."""
        spec, stores = self.spec, []
        cols = TILE_COLS if spec.format.is_quantized else PIECE
        per_row = TILE_COLS // cols
        pieces = spec.row_tile * per_row
        for start in range(0, pieces, self.threads):
            piece = start + self.thread
            is_wanted = None
            if pieces < start + self.threads:  # fewer rows than threads
                is_wanted, piece = piece < pieces, piece % pieces
            row, run_in_step = piece // per_row, piece % per_row
            run = ((self.split * spec.steps + step) * per_row) + run_in_step
            values = read_run(self.planes, self.matrix_row(row), run, spec.num_cols, cols).values(self.mma.mma.dtype)
            slot = run_in_step * (cols // self.mma.slot_cols)
            stores += self.mma.write(tile, base, row, slot, values, is_wanted)
        return stores

    @property
    def num_sums(self) -> int:
        return self.token_blocks * self.row_blocks * self.mma.elements

    def _multiply(self, tile_x: UOp, base_x: UOp | int, tile_w: UOp, base_w: UOp | int, sums: UOp, *after: UOp) -> UOp:
        """Add the product of one step's columns to the warp's sums."""
        mma, statements = self.mma, []
        lefts = [
            mma.left(tile_x, base_x, self.warp_token + block * mma.left_rows, self.lane, *after)
            for block in range(self.token_blocks)
        ]
        rights = [
            mma.right(tile_w, base_w, self.block_row(block), self.lane, *after) for block in range(self.row_blocks)
        ]
        for i, left in enumerate(lefts):
            for j, right in enumerate(rights):
                statements.append(mma.add(left, right, sums, (i * self.row_blocks + j) * mma.elements))
        return together(*statements)

    # -- results -------------------------------------------------------------------------------------------------------

    def stores(self, out: UOp, sums: list[UOp]) -> list[UOp]:
        spec, mma, stores = self.spec, self.mma, []
        half = self.row_blocks // 2 if spec.is_gated else self.row_blocks

        def block(i: int, j: int) -> list[UOp]:
            at = (i * self.row_blocks + j) * mma.elements
            return sums[at : at + mma.elements]

        for i in range(self.token_blocks):
            for j in range(half):
                first_row = self.row_group * (spec.row_tile // (2 if spec.is_gated else 1)) + self.block_row(j)
                values = self._biased(block(i, j), first_row)
                if spec.activation is not None:
                    ups = self._biased(block(i, j + half), first_row + spec.out_rows)
                    values = gated(spec.activation, values, ups, quick_arithmetic(mma.mma.kind))
                for e, value in enumerate(values):
                    token, row = self.place(e)
                    stores.append(self._store(out, first_row, row, i, token, value))
        return stores

    def _biased(self, values: list[UOp], first_row: UOp) -> list[UOp]:
        """A block's sums plus the bias of their rows."""
        rows = [first_row + self.place(e)[1] for e in range(len(values))]
        inside = [row.minimum(self.spec.num_rows - 1) for row in rows]
        return [self.tile.finished(value, row) for value, row in zip(values, inside, strict=True)]

    def _store(self, out: UOp, first_row: UOp, row: UOp, block: int, token: UOp, value: UOp) -> UOp:
        spec = self.spec
        index = self.warp_token + block * self.mma.left_rows + token
        at = (self.split * spec.num_tokens + self.tile.target(index)) * spec.out_rows + first_row + row
        exists = self.tile.exists(index)
        if exists is not None:
            at = at.valid(exists)
        if spec.num_rows % spec.row_tile:
            at = at.valid(first_row < spec.out_rows)
        if self.residual is not None:
            value = value + self.residual[at].load().cast(F32)
        return out[at].store(self.tile.passed_on(value).cast(out.dtype))
