"""Products of several token rows with quantized weights on Hopper: wgmma takes the weights from registers.

The weights are the instruction's left operand, 64 rows for four warps, so codes are unpacked where they are multiplied:
no float16 weights pass through memory of any kind. The tokens are its right operand, 8 to 256 of them; of more, each
tile unpacks the weights again, while the tensor cores multiply.

A lane reads whole runs of 32 codes, one of four neighboring runs in each of its two rows. So a group's scale is
computed by the lane that needs it, and by no other. The columns are therefore multiplied in the order of
token_order.py, in which the tokens are written before. Warps of their own copy codes and scales into a ring of stages,
from before the previous kernel ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property

from tinygrad import UOp
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import PANEL, Planes, high_bits
from tinyvllm.ops.formats.pairs import read_placed
from tinyvllm.ops.gpu.gemm_hopper import HOPPER_ARITHMETIC
from tinyvllm.ops.gpu.plane_ring import SharedPlane
from tinyvllm.ops.gpu.product import PackedProductSpec
from tinyvllm.ops.gpu.stream_hopper import MEMORY_RATE
from tinyvllm.ops.gpu.token_order import CHUNK_COLS, Number, token_cols, token_place
from tinyvllm.ops.kernel.body import F16, F32, I32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    HOPPER_SHARED_BYTES,
    MULTIPROCESSORS,
    SHARE_REGISTERS,
    WAIT_AT,
    WGMMA_COLS,
    WGMMA_TOKENS,
    arrive,
    await_earlier,
    declare,
    finish_wgmma,
    make_barriers,
    read_sums,
    start_rows,
    statement,
    take_registers,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import CHAIN, LANES, axes_of
from tinyvllm.ops.kernel.tiles import PTX_NAMES, pack_words, together

GROUP_ROWS = WGMMA_TOKENS  # of one instruction
MIN_TOKENS, MAX_TOKENS = 9, 512
MAX_TILE = 256  # tokens of an instruction
LEAST_TILE = 96  # tokens of a tile of several: smaller ones were never the fastest (NVIDIA H200)
MAX_SUMS = 128  # registers of a lane that hold sums
FEW_SUMS, MORE_SUMS = 64, 104  # up to which a block's weights of a chunk, or half of them, fit beside them, twice
# codes of the smallest matrices that are worth it, and those of a step of few rows
MIN_CODES, MIN_CODES_OF_FEW, FEW_TOKENS = 2 << 20, 24 << 20, 16
MIN_SIDE = 1024  # the least rows and columns for more tokens than FEW_COLS; smaller ones were not compared
CUT = ("row_tile", "splits", "token_tiles")  # what a product is cut by
SPAN_COLS = 1024  # columns whose scales are copied at once, so that copies are sectors of memory or more
MAX_STAGES = 12
PIECE = 16  # bytes of a copy
ROW_TILES, SPLITS = (64, 128, 192, 256), (1, 2, 4, 8)
BARRIER_BYTES = 256
COPIERS = 4  # warps that copy: `registers` counts on four
FEW_COLS = 64  # tokens of a tile
# what a product costs, in ns and in bytes per ns: fitted to 172 kernels of 35 products that were timed on an H200
CACHE_RATE = 9500.0  # from the L2 cache to all multiprocessors
BLOCK_TIME, TOKEN_TIME = 150.0, 1.4  # of 64 rows and a chunk of columns, and in addition of each token
MANY_BLOCK_TIME, MANY_TOKEN_TIME = 70.0, 2.5  # the same in tiles of more tokens than FEW_COLS
LONE_TIME, LONE_MANY_TIME = 1.1, 1.3  # times as long for a single group, beside whose unpacking nothing is multiplied
QUARTERS_TIME = 1.12  # times as long in quarters of a chunk; a single group then multiplies all the time
FIRST_TIME = 3900.0  # until the first tile has begun
RESULT_BYTES = 6.0  # of a partial result, as if from memory: it is written and read in the L2 cache


def reads_runs(fmt: Format) -> bool:
    """Whether lanes can read a format's runs from threadgroup memory: codes and scales that lie by columns. An e4m3
    code's instruction takes neighbors, which is another order of columns than token_order.py's."""
    return (
        fmt.is_quantized
        and fmt.grid is None
        and not fmt.is_float8
        and not any(scale.has_multiplier for scale in fmt.scales)
    )


@dataclass(frozen=True)
class _PlaneCopy:
    """How a plane's part of a stage, or of a span of stages, is copied: `size` bytes of each row, from `row_bytes` a
    row in memory to `pitch` a row in threadgroup memory, in pieces of `piece` bytes."""

    dtype: DType
    row_bytes: int
    size: int
    pitch: int
    piece: int

    @property
    def pieces(self) -> int:
        """Of a row."""
        return self.size // self.piece if self.piece else 0


@dataclass(frozen=True, kw_only=True)
class QuantizedWgmmaSpec(PackedProductSpec):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up. x is as
    `order_rows_kernel` writes it."""

    orders_result: bool = False  # out is in the order of x

    @property
    def token_tiles(self) -> int:
        """Tiles that the tokens are cut into."""
        return self.knob("token_tiles", self._cut[2])

    @property
    def all_tokens(self) -> int:
        """Tokens of x in memory."""
        return token_cols(self.num_tokens)

    @property
    def token_cols(self) -> int:
        """Tokens of a tile."""
        return token_cols(-(-self.num_tokens // self.token_tiles))

    @property
    def token_groups(self) -> int:
        """Tiles of tokens."""
        return -(-self.all_tokens // self.token_cols)

    @property
    def row_tile(self) -> int:
        """Rows of the matrix in a tile; of gate and up, half each."""
        return self.knob("row_tile", self._cut[0])

    @property
    def splits(self) -> int:
        """S."""
        return self.knob("splits", self._cut[1])

    @cached_property
    def _cut(self) -> tuple[int, int, int]:
        """(rows of the matrix in a tile, splits of K, tiles of tokens) by the rule."""
        chosen = dict(self.chosen)
        if len(cut := [chosen[name] for name in CUT if name in chosen]) == len(CUT):
            return cut[0], cut[1], cut[2]
        return best_cut(self)

    @property
    def out_tile(self) -> int:
        return self.row_tile // 2 if self.is_gated else self.row_tile

    @property
    def pairs_results(self) -> bool:
        """Whether the rows of a lane's two blocks have results that are neighbors in the order of x. It then stores two
        at once, and eight lanes 32 bytes."""
        is_chunk = self.out_tile == CHUNK_COLS and self.out_rows % CHUNK_COLS == 0
        return self.orders_result and is_chunk and self.blocks == 2

    @property
    def groups(self) -> int:
        """Groups of four warps that multiply. Three keep the tensor cores busy while they unpack."""
        return 3 if self.row_tile == 3 * GROUP_ROWS else min(2, self.row_tile // GROUP_ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows of each group."""
        return self.row_tile // GROUP_ROWS // self.groups

    @property
    def multipliers(self) -> int:
        """Warps that multiply."""
        return self.groups * GROUP_WARPS

    @property
    def row_groups(self) -> int:
        return -(-self.out_rows // self.out_tile)

    @property
    def num_tiles(self) -> int:
        return self.splits * self.row_groups * self.token_groups

    @property
    def units(self) -> int:
        """Threadgroups. Each walks along a list of tiles."""
        return min(self.num_tiles, MULTIPROCESSORS)

    @property
    def chunks(self) -> int:
        """Chunks of 128 columns of a stage. The registers of one product's weights are filled while the product before
        is computed: so a stage has two products for each group, be it of two blocks or of two chunks."""
        is_even = self.num_cols // CHUNK_COLS // self.splits % 2 == 0
        return 2 if self.blocks == 1 and is_even and self.token_cols <= FEW_COLS else 1

    @property
    def num_sums(self) -> int:
        """Of a lane."""
        return self.blocks * self.token_cols // 2

    @property
    def parts(self) -> int:
        """Products that a block's chunk is cut into, so that registers hold fewer weights at once. A stage has two or
        more for each group."""
        if self.num_sums <= FEW_SUMS and self.chunks * self.blocks > 1:
            return 1
        return 2 if self.num_sums <= MORE_SUMS else 4

    @property
    def registers(self) -> tuple[int, int] | None:
        """Of a lane that multiplies, and of one that copies; None: equally many. Together they are those of a launch
        (PTX ISA, "setmaxnreg"): a kernel that asks for more waits forever."""
        if self.groups == 3:
            return 152, 56
        return (224, 56) if self.groups == 2 and self.num_sums > FEW_SUMS else None

    @property
    def stage_cols(self) -> int:
        return self.chunks * CHUNK_COLS

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.num_cols // self.stage_cols // self.splits

    @property
    def span_steps(self) -> int:
        """Stages whose scales are copied at once."""
        return min(self.steps, SPAN_COLS // self.stage_cols)

    @property
    def spans(self) -> int:
        """Spans of a tile."""
        return -(-self.steps // self.span_steps)

    @cached_property
    def codes(self) -> tuple[_PlaneCopy, ...]:
        """The copies of each stage."""
        count = 1 + (high_bits(self.format) > 0)
        return tuple(self._copy(dtype, size, CHUNK_COLS, PIECE) for dtype, size in self.planes[:count])

    @cached_property
    def scales(self) -> tuple[_PlaneCopy, ...]:
        """The copies of each span."""
        cols, count = self.span_steps * self.stage_cols, len(self.codes)
        return tuple(self._copy(dtype, size, cols, 4) for dtype, size in self.planes[count:])

    def _copy(self, dtype: DType, size: float, cols: int, least: int) -> _PlaneCopy:
        row, part = int(size * self.num_cols), int(size * cols)
        share = int(size * self.num_cols / self.splits)
        piece = next((p for p in (16, 8, 4) if p >= least and not (row % p or part % p or share % p)), 0)
        pitch = -(-part // PIECE) * PIECE
        # eight rows' pieces lie in different banks; a lane's run of codes of 4 bits is a piece, of 8 bits two
        is_code_run = cols == CHUNK_COLS and part == CHUNK_COLS // PANEL * PIECE
        return _PlaneCopy(dtype, row, part, pitch if is_code_run or pitch // PIECE % 2 else pitch + PIECE, piece)

    def _fits(self, copy: _PlaneCopy) -> bool:
        """Whether the copying lanes have whole rows, each the same ones of gate and up."""
        return COPIERS * LANES % self.pieces_of(copy) == 0

    def rows_at_once(self, copy: _PlaneCopy) -> int:
        """Rows that the lanes copy at once."""
        return COPIERS * LANES // self.pieces_of(copy)

    def pieces_of(self, copy: _PlaneCopy) -> int:
        """Pieces of a row that are copied at once."""
        return copy.pieces * (self.chunks if copy in self.codes else 1)

    @property
    def token_bytes(self) -> int:
        """Of a stage's tokens."""
        return self.token_cols * self.stage_cols * 2

    @cached_property
    def stage_bytes(self) -> int:
        codes = self.chunks * self.row_tile * sum(copy.pitch for copy in self.codes)
        return -(-(self.token_bytes + codes) // 1024) * 1024

    @cached_property
    def span_bytes(self) -> int:
        return self.row_tile * sum(copy.pitch for copy in self.scales)

    @cached_property
    def stages(self) -> int:
        most = min(MAX_STAGES, HOPPER_SHARED_BYTES // self.stage_bytes)
        return next((s for s in range(most, 2, -1) if self._bytes(s) <= HOPPER_SHARED_BYTES), 2)

    @cached_property
    def slots(self) -> int:
        return self._slots(self.stages)

    def _slots(self, stages: int) -> int:
        """Spans in threadgroup memory: as many as so many neighboring stages belong to."""

        def span(number: int) -> int:
            return number // self.steps * self.spans + number % self.steps // self.span_steps

        # those that begin in a tile's first span stand for all that end in their tile
        firsts = {*range(min(self.steps, self.span_steps)), *range(max(0, self.steps - stages), self.steps)}
        most = max(span(first + stages - 1) - span(first) for first in firsts) + 1
        return min(most, self.spans * -(-self.num_tiles // self.units))

    def _bytes(self, stages: int) -> int:
        return stages * self.stage_bytes + self._slots(stages) * self.span_bytes + BARRIER_BYTES

    @property
    def spans_at(self) -> int:
        """Where the scales begin in threadgroup memory."""
        return self.stages * self.stage_bytes

    @property
    def barriers_at(self) -> int:
        return self.spans_at + self.slots * self.span_bytes

    @property
    def shared_bytes(self) -> int:
        return self._bytes(self.stages)

    @property
    def predicted_s(self) -> float:
        return self.nanoseconds / 1e9

    @property
    def nanoseconds(self) -> float:
        """A rough cost, to choose between tiles. A turn of tiles takes as long as the slowest of: codes from memory,
        codes and tokens from the L2 cache, and unpacking and multiplying them. In addition, partial sums are written
        and read."""
        codes, tokens = self.row_tile * CHUNK_COLS * self.format.code_bits / 8, self.token_cols * CHUNK_COLS * 2
        if self.token_cols <= FEW_COLS:
            own, cached, lone = BLOCK_TIME + self.token_cols * TOKEN_TIME, (codes + tokens) / CACHE_RATE, LONE_TIME
        else:
            own, cached, lone = MANY_BLOCK_TIME + self.token_cols * MANY_TOKEN_TIME, 0.0, LONE_MANY_TIME
        if self.parts == 4:
            own *= QUARTERS_TIME
        elif self.groups == 1:
            own *= lone
        own *= self.row_tile // GROUP_ROWS
        read = codes / self.token_groups / MEMORY_RATE  # by those that have the same rows, once
        turns = [min(self.num_tiles - first, self.units) for first in range(0, self.num_tiles, self.units)]
        chunks = sum(max(active * read, active * cached, own) for active in turns)
        added = 0.0 if self.is_gated else RESULT_BYTES * self.splits * self.num_tokens * self.num_rows / MEMORY_RATE
        return self.steps * self.chunks * chunks + FIRST_TIME + added

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "row_tile": ROW_TILES,
            "splits": () if self.is_gated else SPLITS,
            "token_tiles": tuple(token_tiles(self.num_tokens)) if self.num_tokens > FEW_COLS else (),
        }

    @property
    def is_wanted(self) -> bool:
        """Whether this kernel is faster than others: with few rows, `matrix_kernel` begins sooner; with many, unpacking
        the whole matrix first costs less than unpacking it for each tile of tokens."""
        if self.num_tokens > FEW_COLS and min(self.num_rows, self.num_cols) < MIN_SIDE:
            return False
        least = MIN_CODES if self.num_tokens > FEW_TOKENS else MIN_CODES_OF_FEW
        return self.num_tokens >= MIN_TOKENS and self.num_rows * self.num_cols >= least

    @property
    def next_takes_order(self) -> bool:
        """Whether the product that follows a gated one, from its hidden values back to as many columns as x has, reads
        them in this order if it has the same format."""
        after = replace(self, num_rows=self.num_cols, num_cols=self.out_rows, activation=None, chosen=())
        return after.is_wanted and after.is_possible()

    def is_possible(self) -> bool:
        return (
            self.mma.dtype == F16
            and reads_runs(self.format)
            and 1 < self.num_tokens <= MAX_TOKENS
            and self.num_cols % (CHUNK_COLS * self.splits) == 0
            and self.steps >= 2
            and all(copy.piece and copy.size for copy in (*self.codes, *self.scales))
            and all(self._fits(copy) for copy in (*self.codes, *self.scales))
            and self.out_rows >= self.out_tile
            and self.row_tile in ROW_TILES
            and self.out_rows % (8 * GROUP_WARPS) == 0
            and self.units >= 2
            and self.num_sums <= MAX_SUMS
            and (self.groups < 3 or FEW_COLS < self.token_cols <= 2 * FEW_SUMS)
            and self.shared_bytes <= HOPPER_SHARED_BYTES
        )


def token_tiles(num_tokens: int) -> range:
    """Numbers of tiles that tokens may be cut into."""
    return range(-(-num_tokens // MAX_TILE), max(1, num_tokens // LEAST_TILE) + 1)


@cache
def best_cut(spec: QuantizedWgmmaSpec) -> tuple[int, int, int]:
    """The fastest (rows of the matrix in a tile, splits of K, tiles of tokens) by `nanoseconds`."""
    cuts = itertools.product(ROW_TILES, (1,) if spec.is_gated else SPLITS, token_tiles(spec.num_tokens))
    specs = [replace(spec, chosen=(*spec.chosen, *zip(CUT, cut, strict=True))) for cut in cuts]
    specs.sort(key=lambda one: one.nanoseconds)
    best = next((one for one in specs if one.is_possible()), specs[0])
    return best.row_tile, best.splits, best.token_tiles


@cached_kernel
def quantized_wgmma_kernel(spec: QuantizedWgmmaSpec) -> KernelFn:
    """fn(out, *planes, x): see QuantizedWgmmaSpec."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        assert spec.is_possible(), f"{spec} {spec.chosen} is not possible"
        work = _QuantizedWork(spec, out, operands)
        ready = work.prepare()
        done = UOp(Ops.BARRIER, src=(work.copy(ready), work.multiply(ready)))
        size = spec.num_rows * spec.num_cols
        return finish(
            done.end(*reversed(work.axes)),
            f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}",
            ops=2 * spec.num_tokens * size,
            nbytes=int(size * spec.format.code_bits / 8),
        )

    return kernel


# The warps that copy. $0: the threadgroup's number; $1: x; $2 and so on: the planes
COPY = """if (threadIdx.y >= %(multipliers)d) {
  %(registers)s
  int lane = (threadIdx.y - %(multipliers)d) * 32 + threadIdx.x, number = 0, spans = 0;
  bool has_waited = false;
  auto fetch_tokens = [&](int tile, int step, int number) {
    int stage = tile / %(token_groups)d / %(row_groups)d * %(steps)d + step;
    int token = min(tile %% %(token_groups)d * %(token_tile)d, %(last_token)d);
    unsigned slot = number %% %(stages)d;
    unsigned full = shared + %(full_at)d + slot * 8, to = shared + slot * %(stage_bytes)d;
    const char* from = (const char*)($1) + ((long long)stage * %(panels)d * %(all_tokens)d + token) * 128;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%%0], %(token_bytes)d;" :: "r"(full) : "memory");
    for (int i = 0; i < %(copies)d; i++)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%%0], [%%1], %(copy_bytes)d, [%%2];"
        :: "r"(to + i * %(copy_bytes)d), "l"(from + i * %(all_tokens)d * 128), "r"(full) : "memory");
  };
  for (int tile = $0; tile < %(tiles)d; tile += %(units)d) {
    int split = tile / %(token_groups)d / %(row_groups)d;
    long long first = min(tile / %(token_groups)d %% %(row_groups)d * %(out_tile)d, %(last_first)d);
%(sources)s
    for (int step = 0; step < %(steps)d; step++, number++) {
      unsigned slot = number %% %(stages)d;
      unsigned full = shared + %(full_at)d + slot * 8, to = shared + slot * %(stage_bytes)d;
      if (number >= %(stages)d) {
        unsigned empty = full + %(stages)d * 8, parity = (number / %(stages)d - 1) & 1;
        %(wait)s
      }
      if (step %% %(span_steps)d == 0) {
        unsigned span = shared + %(spans_at)d + spans++ %% %(slots)d * %(span_bytes)d;
        int cols = min(%(span_steps)d, %(steps)d - step) * %(stage_cols)d;
%(scale_copies)s
      }
%(code_copies)s
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%%0];" :: "r"(full) : "memory");
      if (has_waited && lane == 0) fetch_tokens(tile, step, number);
      if (!has_waited && (number == %(early)d || tile + %(units)d >= %(tiles)d && step == %(last_step)d)) {
        has_waited = true;
        %(chain)s
        if (lane == 0) for (int i = 0; i <= number; i++)
          fetch_tokens($0 + i / %(steps)d * %(units)d, i %% %(steps)d, i);
      }
    }
  }
}"""
SOURCE = (
    "    const char* from_%(index)d = (const char*)(%(plane)s) + (first + %(row)s) * %(row_bytes)d"
    " + split * %(split_bytes)d + lane %% %(pieces)d * %(piece)d;"
)
COPY_PIECE = (
    '%(condition)sasm volatile("cp.async.%(cache)s.shared.global [%%0], [%%1], %(piece)d;" :: "r"(%(to)s),'
    ' "l"(%(source)s) : "memory");'
)


STORE_PAIR = "*((unsigned int*)({0})) = {1};"


# Where the bits of a row's number among those of a chunk go, if results are paired: a warp's rows of two blocks are
# then 16 neighbors in the order of x
PAIRED_BITS = (5, 6, 0, 4, 2, 1, 3)


def paired_row(row: Number) -> Number:
    """The output's row that a row of the tile's two blocks has: their bits in another order."""
    return sum((row // (1 << i) % 2 * (1 << bit) for i, bit in enumerate(PAIRED_BITS)), start=row * 0)


class _QuantizedWork:
    """One threadgroup's work: its tiles of the list, one after another."""

    def __init__(self, spec: QuantizedWgmmaSpec, out: UOp, operands: Sequence[UOp]) -> None:
        self.spec, self.out = spec, out
        *self.planes, self.x = operands
        body = self.body = Body()
        self.unit = body.grid(spec.units)
        self.lane, self.warp = body.threads(LANES), body.threads(spec.multipliers + COPIERS)
        self.role = uniform(self.warp)  # the warp's number, without limits that tinygrad knows
        self.axes = axes_of(self.unit, self.lane, self.warp)
        # for the conditions of stores: if they told tinygrad the warp, it would simplify the loops around the stores by
        # it, and so make second loops
        self.multiplier = clamp(self.role, 0, spec.multipliers - 1)
        self.group = self.multiplier // GROUP_WARPS
        self.turns = (spec.num_tiles - 1 - self.unit) // spec.units + 1

    def prepare(self) -> UOp:
        """The UOp after which memory and barriers are ready."""
        spec = self.spec
        barriers = make_barriers(
            spec.barriers_at, spec.stages, COPIERS * LANES + 1, spec.multipliers, declare(spec.shared_bytes)
        )
        return UOp(Ops.BARRIER, src=(barriers,))

    # -- the warps that copy -------------------------------------------------------------------------------------------

    def copy(self, ready: UOp) -> UOp:
        """Copy all stages of all tiles in order, each as soon as it is empty; the tokens, once the previous kernel has
        ended."""
        spec = self.spec
        text = COPY % dict(
            multipliers=spec.multipliers,
            full_at=spec.barriers_at,
            stages=spec.stages,
            stage_bytes=spec.stage_bytes,
            token_bytes=spec.token_bytes,
            registers="" if spec.registers is None else SHARE_REGISTERS % ("dec", spec.registers[1]),
            token_groups=spec.token_groups,
            token_tile=spec.token_cols,
            last_token=spec.all_tokens - spec.token_cols,
            all_tokens=spec.all_tokens,
            panels=spec.stage_cols // WGMMA_COLS,
            copies=1 if spec.token_groups == 1 else spec.stage_cols // WGMMA_COLS,
            copy_bytes=spec.token_bytes if spec.token_groups == 1 else spec.token_cols * WGMMA_COLS * 2,
            tiles=spec.num_tiles,
            units=spec.units,
            row_groups=spec.row_groups,
            out_tile=spec.out_tile,
            last_first=spec.out_rows - spec.out_tile,
            sources="\n".join(self._source(i, copy) for i, copy in enumerate((*spec.codes, *spec.scales))),
            steps=spec.steps,
            wait=WAIT_AT.format("empty", "parity"),
            span_steps=spec.span_steps,
            spans_at=spec.spans_at,
            slots=spec.slots,
            span_bytes=spec.span_bytes,
            stage_cols=spec.stage_cols,
            scale_copies="\n".join(self._copies(spec.scales, len(spec.codes), "span", 0)),
            code_copies="\n".join(self._copies(spec.codes, 0, "to", spec.token_bytes)),
            early=spec.stages - 1,
            last_step=spec.steps - 1,
            chain=CHAIN if spec.lanes.is_chained else "",
        )
        operands = [self.unit.cast(I32), self.x[0], *[plane[0] for plane in self.planes]]
        text = text.replace("{", "{{").replace("}", "}}")
        for i in reversed(range(len(operands))):
            text = text.replace(f"${i}", f"{{{i}}}")
        return statement(text, *operands, ready)

    def _source(self, index: int, copy: _PlaneCopy) -> str:
        """The text of where a lane's pieces of a plane's rows begin in memory, in a tile."""
        spec, pieces = self.spec, self.spec.pieces_of(copy)
        row = f"lane / {pieces}"
        if spec.pairs_results:
            row = " + ".join(f"(lane / {pieces} >> {i} & 1) * {1 << bit}" for i, bit in enumerate(PAIRED_BITS))
        return SOURCE % dict(
            index=index,
            row=row,
            plane=f"${index + 2}",
            pieces=pieces,
            row_bytes=copy.row_bytes,
            split_bytes=copy.row_bytes // spec.splits,
            piece=copy.piece,
        )

    def _copies(self, copies: Sequence[_PlaneCopy], first: int, to: str, place: int) -> list[str]:
        """The text of the copies of a stage's codes, or of a span's scales: each lane copies the same piece of every
        so many rows, so that addresses are constants."""
        spec, lines = self.spec, []
        for index, copy in enumerate(copies, first):
            size, conditions, pieces = Fraction(copy.row_bytes, spec.num_cols), [], spec.pieces_of(copy)
            at_once = spec.rows_at_once(copy)
            if first and spec.steps % spec.span_steps:
                conditions.append(f"lane % {pieces} * {copy.piece} < cols * {size.numerator} / {size.denominator}")
            own = f"lane / {pieces} * {copy.pitch} + lane % {copy.pieces} * {copy.piece}"
            if pieces > copy.pieces:  # a chunk's rows follow those of the chunk before
                own += f" + lane % {pieces} / {copy.pieces} * {spec.row_tile * copy.pitch}"
            done = f"step * {spec.stage_cols} * {size.numerator} / {size.denominator}"
            for row in range(0, spec.row_tile, at_once):
                inside = [f"lane / {pieces} < {spec.row_tile - row}"] if row + at_once > spec.row_tile else []
                condition = f"if ({' && '.join(conditions + inside)}) " if conditions + inside else ""
                values = dict(condition=condition, cache="cg" if copy.piece == PIECE else "ca", piece=copy.piece)
                values |= dict(to=f"{to} + {place + row * copy.pitch} + {own}")
                values |= dict(source=f"from_{index} + {done} + {self._row_bytes(copy, row)}")
                lines.append(COPY_PIECE % values)
            place += spec.row_tile * copy.pitch * (pieces // copy.pieces)
        return [" " * (8 if first else 6) + line for line in lines]

    def _row_bytes(self, copy: _PlaneCopy, row: int) -> str:
        """The text of the bytes between a lane's first row and its one of those from `row` of the tile on."""
        spec, pieces = self.spec, self.spec.pieces_of(copy)
        if not spec.is_gated:
            return f"{row * copy.row_bytes}ll"
        if row < spec.out_tile < row + spec.rows_at_once(copy):  # some lanes have rows of up, which are elsewhere
            up = f"(lane / {pieces} < {spec.out_tile - row} ? 0 : {(spec.out_rows - spec.out_tile) * copy.row_bytes}ll)"
            return f"{row * copy.row_bytes}ll + {up}"
        own = row % spec.out_tile
        own = paired_row(own) if spec.pairs_results else own
        return f"{(own + (spec.out_rows if row >= spec.out_tile else 0)) * copy.row_bytes}ll"

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def multiply(self, ready: UOp) -> UOp:
        """Multiply all stages in order, each as soon as it is full, and store the results of each tile."""
        spec = self.spec
        count = spec.token_cols // 2
        chain = f"if (threadIdx.y < {spec.multipliers}) {{{{ {CHAIN} }}}}" if spec.lanes.is_chained else ""
        begun, multiplies = statement(chain, ready), self.role < spec.multipliers
        branches, turns = [], multiplies.where(self.turns, 0)
        if spec.registers is not None:
            # the compiler uses more registers only inside of a branch that has asked for them, and all that follows
            # has to depend on it: otherwise it is rendered before the branch, for the warps that copy, too
            branches, turns = [self.body.fold_while(uniform(multiplies.where(UOp.const(1, I32), 0)))], self.turns
            begun = take_registers(spec.registers[0], *branches, begun)
        loop = self.body.fold_while(uniform(turns))
        turn = clamp(loop, 0, max(2, -(-spec.num_tiles // spec.units)) - 1)  # never a single one, as in stream_hopper
        sums = [self.body.registers(count) for _ in range(spec.blocks)]
        zero = UOp.const(0.0, F32)
        cleared = [array.after(loop, begun)[i].store(zero) for array in sums for i in range(count)]
        sums = [array.after(UOp.group(*cleared)) for array in sums]
        step = self.body.fold(spec.steps)
        added = self._add_stage(turn, step, [array.after(step) for array in sums], begun)
        sums = [array.after(added.end(step)) for array in sums]
        last = finish_wgmma(sums[0])
        for array in sums[1:]:
            last = finish_wgmma(array, last)
        released = self._release(turn * spec.steps + (spec.steps - 1), None, last)
        results = [read_sums(array, released) for array in sums]
        stores = self._paired_stores(turn, results) if spec.pairs_results else self._stores(turn, results)
        return stores.end(loop, *branches)

    def _stage(self, number: UOp) -> tuple[UOp, UOp, UOp, UOp]:
        """(stage, full barrier, empty barrier, parity of the phase) of the stage of that number since the beginning.
        The first three are bytes of threadgroup memory."""
        spec = self.spec
        slot, turn = number % spec.stages, number // spec.stages
        full = slot * 8 + spec.barriers_at
        return slot * spec.stage_bytes, full, full + spec.stages * 8, turn % 2

    def _add_stage(self, turn: UOp, step: UOp, sums: Sequence[UOp], begun: UOp) -> UOp:
        """Start to add the products of a stage, and release the previous one."""
        spec, number = self.spec, turn * self.spec.steps + step
        place, full, _, parity = self._stage(number)
        last, statements = wait(full, parity, begun), []
        stride = spec.token_cols * WGMMA_COLS * 2
        for chunk in range(spec.chunks):
            for block, array in enumerate(sums):
                scaled = last  # after which scales are read: once for all parts
                for first in range(0, CHUNK_COLS, CHUNK_COLS // spec.parts):
                    # read after the product before has started: then its predecessor, which may have used the same
                    # registers, is done
                    rows = [self._weights(turn, step, chunk, place, row, last, scaled) for row in self._rows(block)]
                    steps = range(first // 16, (first + CHUNK_COLS // spec.parts) // 16)
                    words = [rows[i % 2][s * 2 + i // 2] for s in steps for i in range(4)]
                    panel = chunk * (CHUNK_COLS // WGMMA_COLS) + first // WGMMA_COLS
                    right = place + (panel * stride + first % WGMMA_COLS * 2)
                    last = start_rows(PTX_NAMES[spec.mma.dtype], words, right, array, True, last, stride=stride)
                    last = await_earlier(1, last)
                    statements.append(last)
                    if len(statements) == 1:
                        last = self._release((number - 1).maximum(0), step > 0, last)
                        statements.append(last)
        return together(*statements)

    def _release(self, number: UOp, condition: UOp | None, *after: UOp) -> UOp:
        """Tell the copying warps that this warp has read a stage. The warps of a group do not wait for each other."""
        is_one = self.lane.eq(0)
        return arrive(self._stage(number)[2], is_one if condition is None else is_one & condition, *after)

    def _rows(self, block: int) -> list[UOp]:
        """A lane's two rows of the tile in one of its group's blocks; of gate and up, the same row of both."""
        spec = self.spec
        group, warp = self.group, self.multiplier % GROUP_WARPS
        first = (group * spec.blocks + block) * GROUP_WARPS + warp
        if spec.is_gated:
            row = first * 8 + self.lane // 4
            return [row, row + spec.out_tile]
        row = first * 16 + self.lane // 4
        return [row, row + 8]

    def _weights(self, turn: UOp, step: UOp, chunk: int, place: UOp, row: UOp, after: UOp, scaled: UOp) -> list[UOp]:
        """A lane's weights in one of its rows: of a run of a chunk of the stage. Codes are read after one statement,
        and scales after another one."""
        spec, planes = self.spec, []
        at = place + spec.token_bytes
        for copy in spec.codes:
            size = spec.row_tile * copy.pitch
            planes.append(SharedPlane(copy.dtype, at + chunk * size + row * copy.pitch, after))
            at = at + spec.chunks * size
        span = turn * spec.spans + step // spec.span_steps
        at = span % spec.slots * spec.span_bytes + spec.spans_at
        for copy in spec.scales:
            planes.append(SharedPlane(copy.dtype, at + row * copy.pitch, scaled))
            at = at + spec.row_tile * copy.pitch
        run = (step % spec.span_steps * spec.chunks + chunk) * (CHUNK_COLS // PANEL) + self.lane % 4
        return read_placed(Planes(spec.format, planes), self.lane % 4, run, spec.mma)

    def _tile(self, turn: UOp) -> tuple[UOp, UOp, UOp]:
        """(first row of the output, first token, split) of a tile. The last tiles end with the last row or token."""
        spec = self.spec
        number = (turn * spec.units + self.unit).minimum(spec.num_tiles - 1)
        first = (number // spec.token_groups % spec.row_groups * spec.out_tile).minimum(spec.out_rows - spec.out_tile)
        first_token = (number % spec.token_groups * spec.token_cols).minimum(spec.all_tokens - spec.token_cols)
        return first, first_token, number // spec.token_groups // spec.row_groups

    def _stores(self, turn: UOp, blocks: Sequence[list[UOp]]) -> UOp:
        """Store the results: a lane has two neighboring tokens of every eight, in two rows of each block."""
        spec, stores = self.spec, []
        first, first_token, split = self._tile(turn)
        has_more = spec.all_tokens > spec.num_tokens  # in the last eight tokens, which are in the last tile
        for block, values in enumerate(blocks):
            for row, found in zip(self._rows(block), self._results(values), strict=False):
                for i, value in enumerate(found):
                    token = first_token + self._token(i)
                    at = (split * spec.num_tokens + token) * spec.out_rows + first + row
                    if spec.orders_result:
                        at = token_place(token, first + row, spec.all_tokens)
                    if has_more and (spec.token_groups > 1 or i // 2 * 8 + 8 > spec.num_tokens):
                        at = at.valid(token < spec.num_tokens)
                    stores.append(self.out[at].store(value.cast(self.out.dtype)))
        return UOp.group(*stores)

    def _paired_stores(self, turn: UOp, blocks: Sequence[list[UOp]]) -> UOp:
        """The same if `pairs_results`. Tokens after the last have places of their own."""
        spec, stores = self.spec, []
        first, first_token, _ = self._tile(turn)
        row = first + paired_row(self._rows(0)[0])
        pairs = zip(*[self._results(values)[0] for values in blocks], strict=True)
        for i, pair in enumerate(pairs):
            at = self.out[token_place(first_token + self._token(i), row, spec.all_tokens)]
            stores.append(statement(STORE_PAIR, at, pack_words(*pair)))
        return together(*stores)

    def _results(self, values: list[UOp]) -> list[list[UOp]]:
        """A block's results in each of a lane's rows."""
        lower, upper = (
            [values[i + j] for i in range(0, len(values), 4) for j in range(2)] for values in (values, values[2:])
        )
        if self.spec.activation is None:
            return [lower, upper]
        return [gated(self.spec.activation, lower, upper, HOPPER_ARITHMETIC)]

    def _token(self, number: int) -> UOp:
        """The token of a lane's results of that number, in the tile."""
        return number // 2 * 8 + self.lane % 4 * 2 + number % 2
