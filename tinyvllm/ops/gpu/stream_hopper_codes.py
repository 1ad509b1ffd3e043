"""Products with e4m3 codes on Hopper: weights go from the ring into wgmma through registers.

As in stream_hopper.py, one warp keeps a ring of stages full, by TMA, and the others multiply. Here the matrix's rows
are wgmma's left operand, which may come from registers: each lane reads its codes of a stage and makes float16 of them,
so that nothing is written back to threadgroup memory. The tokens are the right operand, in tiles of up to 128. A stage
has as many columns as a scale is for. For up to 64 tokens its sums start from zero, and are multiplied by the row's
scale in float32, so that no weight is rounded; for more, weights are multiplied by it, in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from tinygrad import UOp, dtypes

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import Planes, float_of_scale
from tinyvllm.ops.gpu.gemm_hopper import HOPPER_ARITHMETIC
from tinyvllm.ops.gpu.plane_ring import SharedPlane
from tinyvllm.ops.gpu.stream_hopper import (
    CACHE_RATE,
    LEAST_UNITS,
    MEMORY_RATE,
    MIN_SPLIT_COLS,
    Number,
    Stage,
    StreamSpec,
    StreamWork,
    Tile,
    finish_stream_kernel,
)
from tinyvllm.ops.kernel.body import F16, F32, I32, U32, KernelFn, cached_kernel, clamp
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    WGMMA_COLS,
    WGMMA_TOKENS,
    Box,
    arrive,
    await_products,
    fetch,
    read_sums,
    start_rows,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, Lanes, Mma
from tinyvllm.ops.kernel.tiles import PTX_NAMES, together

CODE_COLS = 128  # of a stage: a row's codes are a panel of 128 bytes, and have one scale
STEP_COLS = 16  # of one wgmma
MIN_TOKENS, MAX_TOKENS = 17, 512
TILE_TOKENS = 128  # of a tile, at most
SCALED_TOKENS = 64  # up to which sums are scaled, and not weights
MIN_CODES = 4 << 20  # of a matrix that is worth it
UNIT = 2.0**5  # that float16 scales are multiplied by, so that small ones stay normal numbers
MAX_ROW_TILE = 256
WARP_ROWS = 16
# what a product costs, in ns (measured on an H200)
# Of the tensor cores, for a group of warps: a stage's eight wgmma take 4 cycles for each token, and about 19 each in
# addition, while groups unpack
TOKEN_TIME, PRODUCT_TIME = 2.3, 85.0
FEW_GROUPS_TIME = 1.1  # times as long where at most two groups take turns
CHAIN_TIME = 400.0  # of a stage, at least: reading codes, two batches of products, and scaling their sums
FIRST_TIME, TURN_TIME = 4500.0, 500.0  # of the first tile and of each other one, in addition to its stages


@dataclass(frozen=True)
class CodeStreamSpec(StreamSpec):
    """The same for e4m3 codes with a scale for each row and 128 columns."""

    format: Format = field(kw_only=True)

    @property
    def _cut(self) -> tuple[int, int]:
        chosen = dict(self.chosen)
        if "row_tile" in chosen and "splits" in chosen:
            return chosen["row_tile"], chosen["splits"]
        shape = (self.num_tokens, self.num_rows, self.num_cols)
        return best_code_cut(*shape, self.is_gated, self.adds_residual, self.format)

    @property
    def scales_weights(self) -> bool:
        """Whether weights are multiplied by their scales, in float16: for many tokens that takes fewer instructions and
        registers than scaling each stage's sums in float32."""
        return self.num_tokens > SCALED_TOKENS

    @property
    def token_groups(self) -> int:
        return -(-self.num_tokens // TILE_TOKENS)

    @property
    def token_rows(self) -> int:
        """Token rows of a tile and of a stage, in whole blocks of 8."""
        return -(-self.num_tokens // (8 * self.token_groups)) * 8

    @property
    def panels(self) -> int:
        """Panels of token columns of a stage."""
        return CODE_COLS // WGMMA_COLS

    @property
    def groups(self) -> int:
        """Groups of four warps, each of which multiplies 64 rows of the matrix."""
        return -(-self.row_tile // WGMMA_TOKENS)

    @property
    def readers(self) -> int:
        """Warps that say that they have read a stage."""
        return self.groups * GROUP_WARPS

    @property
    def stage_bytes(self) -> int:
        return self.token_bytes * self.panels + self.row_tile * CODE_COLS

    @property
    def read_bytes(self) -> int:
        return self.stage_bytes

    @property
    def row_box(self) -> Box:
        """Codes, as half as many float16."""
        return Box((self.num_cols // 2, self.num_rows), (self.num_cols,), (WGMMA_COLS, self.row_tile // self.boxes))

    @property
    def steps(self) -> int:
        return self.num_cols // CODE_COLS // self.splits

    @property
    def nanoseconds(self) -> float:
        rows, tokens = self.row_tile * CODE_COLS, self.token_bytes * self.panels
        cached = (rows + tokens) / CACHE_RATE
        multiplied = self.groups * (self.token_rows * TOKEN_TIME + PRODUCT_TIME)
        multiplied = max(multiplied * (FEW_GROUPS_TIME if self.groups <= 2 else 1.0), CHAIN_TIME)
        turns = [min(self.num_tiles - first, self.units) for first in range(0, self.num_tiles, self.units)]
        stages = sum(max(active * rows / self.token_groups / MEMORY_RATE, cached, multiplied) for active in turns)
        added = 0.0 if self.is_gated else 8 * self.splits * self.num_tokens * self.num_rows / MEMORY_RATE
        return self.steps * stages + FIRST_TIME + (len(turns) - 1) * TURN_TIME + added

    @property
    def is_wanted(self) -> bool:
        """Whether this kernel is faster than others. (NVIDIA H200, steps of 6 layers of Llama-3.1-8B: of 64 rows 0.91
        ms instead of 1.76, of 512 rows 2.80 instead of 3.53. Of 16 rows the largest product takes 11 % less, but a step
        with it 1.06 ms instead of 0.78: the kernels around it wait for whole multiprocessors.)"""
        size = self.num_rows * self.num_cols
        return MIN_TOKENS <= self.num_tokens <= MAX_TOKENS and size >= MIN_CODES

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "row_tile": (32, 48, 64, 96, 112, 128, 160, 192, 224, 256),
            "splits": () if self.is_gated or self.adds_residual else (1, 2, 4, 8),
        }

    def is_possible(self) -> bool:
        threads = (self.groups * GROUP_WARPS + 1) * LANES
        return (
            self.row_tile <= MAX_ROW_TILE
            and self.row_tile % (WARP_ROWS * self.boxes) == 0
            and self.num_tokens <= MAX_TOKENS
            and self.out_rows % WARP_ROWS == 0
            and self.num_cols % (CODE_COLS * self.splits) == 0
            and self.steps >= 2
            and self.stages >= 2
            and self.units >= LEAST_UNITS
            and self.mma.has_float8
            and (self.mma.dtype == F16 or not self.scales_weights)
            and threads * (self.token_rows // (2 if self.scales_weights else 1) + 56) <= 64 << 10
            and self.groups <= (3 if self.scales_weights else 4)
        )


def reads_codes(fmt: Format) -> bool:
    """Whether the kernel reads matrices of a format."""
    scale = fmt.scale
    if not fmt.is_float8 or scale is None or scale.has_steps or scale.has_multiplier or fmt.minimum is not None:
        return False
    return fmt.group == scale.span == CODE_COLS


@cache
def best_code_cut(
    num_tokens: int, num_rows: int, num_cols: int, is_gated: bool, adds_residual: bool, fmt: Format
) -> tuple[int, int]:
    """The fastest (rows of the matrix in a tile, splits of K) for a product, by `nanoseconds`."""
    activation = "silu" if is_gated else None
    mma = Mma("CUDA", F16, has_float8=True)
    shape = (num_tokens, num_rows, num_cols, activation, adds_residual)
    whole = CodeStreamSpec("", Lanes("CUDA"), mma, *shape, format=fmt)
    specs = [
        replace(whole, chosen=(("row_tile", rows), ("splits", splits)))
        for rows in range(WARP_ROWS * whole.boxes, MAX_ROW_TILE + 1, WARP_ROWS * whole.boxes)
        for splits in ((1,) if is_gated or adds_residual else (1, 2, 4, 8))
        if num_cols // splits >= MIN_SPLIT_COLS or splits == 1
    ]
    possible = [spec for spec in specs if spec.is_possible()] or specs
    best = min(possible, key=lambda spec: spec.nanoseconds)
    return best.row_tile, best.splits


@cached_kernel
def code_stream_kernel(spec: CodeStreamSpec) -> KernelFn:
    """fn(out, maps (map_size,) uint32, *planes, x[, residual]): see CodeStreamSpec."""

    def kernel(out: UOp, maps: UOp, *operands: UOp) -> UOp:
        assert spec.is_possible(), f"{spec} {spec.chosen} is not possible"
        count = Planes.count(spec.format)
        work = _CodeStream(spec, out, maps, operands[0], operands[count], operands[count + 1 :])
        work.planes = Planes(spec.format, operands[:count])
        return finish_stream_kernel(spec, work, spec.format.name, spec.format.code_bits)

    return kernel


def row_of(spec: CodeStreamSpec, warp: Number, half: int, lane: Number) -> Number:
    """The output's row, counted from the tile's first, of the lane's results in the upper or lower half of its warp's
    16 rows. Of gate and up, the upper half has gate's rows and the lower one up's."""
    rows = WARP_ROWS // spec.boxes
    return warp * rows + lane // 4 + (0 if spec.is_gated else half * rows // 2)


class _CodeStream(StreamWork):
    """One threadgroup's work."""

    spec: CodeStreamSpec
    planes: Planes

    def _fetch_rows(self, stage: Stage, step: UOp, tile: Tile, *after: UOp) -> UOp:
        spec, (place, full, *_), (split, first_row, _) = self.spec, stage, tile
        last = after
        col = (split * spec.steps + step) * (CODE_COLS // 2)
        for box in range(spec.boxes):
            target = self._rows(place, 0) + box * (spec.row_tile // spec.boxes * CODE_COLS)
            at = [col, first_row + box * spec.out_rows]
            last = (fetch(target, self._map(1), full, at, *last, is_read_once=spec.reads_once),)
        return last[0]

    def multiply(self, begun: UOp) -> UOp:
        """Multiply all stages in order, each as soon as it is full, and store the results of each tile."""
        spec, count = self.spec, self.spec.token_rows // 2
        loop = self.body.fold_while(uniform(self.is_fetcher.where(0, self.turns)))
        tile = self._tile(clamp(loop, 0, self.most_turns - 1))
        totals, scales = self.body.registers(count), self.body.registers(2)
        # of a stage, where its sums are scaled
        sums = totals if spec.scales_weights else self.body.registers(count)
        empty = totals.after(loop, begun)
        totals = totals.after(UOp.group(*[empty[i].store(UOp.const(0.0, F32)) for i in range(count)]))
        first = [scales.after(loop, begun)[i].store(value) for i, value in enumerate(self._scales(tile, 0))]
        scales = scales.after(UOp.group(*first))
        step = self.body.fold(spec.steps)
        here, now = totals.after(step), [scales.after(step)[i].load() for i in range(2)]
        number = clamp(loop, 0, self.most_turns - 1) * spec.steps + step
        later = self._scales(tile, (step + 1).minimum(spec.steps - 1))  # loaded while this stage is multiplied
        added_to = here if spec.scales_weights else sums.after(step)
        done, released = self._multiply_stage(number, added_to, now, begun, *later, *now)
        stores = [scales.after(step, released)[i].store(value) for i, value in enumerate(later)]
        if spec.scales_weights:
            ended = together(*stores, released).end(step)
            return self._store(tile, [value * (1 / UNIT) for value in read_sums(sums, ended)]).end(loop)
        for i, value in enumerate(read_sums(added_to, done)):
            stores.append(here[i].store(here[i].load() + value * now[i // 2 % 2]))
        ended = together(*stores, released).end(step)
        return self._store(tile, [totals.after(ended)[i].load() for i in range(count)]).end(loop)

    @property
    def _warp(self) -> UOp:
        """The warp whose rows this one reads: the last one that has any, for those of the last group that have none."""
        return self.multiplier.minimum(self.spec.row_tile // WARP_ROWS - 1)

    def _scales(self, tile: Tile, step: UOp | int) -> list[UOp]:
        """The scales of the lane's two rows for a stage."""
        spec, (split, first_row, _), found = self.spec, tile, []
        assert self.planes.scale is not None
        for half in range(2):
            row = first_row + row_of(spec, self._warp, half, self.lane) + (half * spec.out_rows if spec.is_gated else 0)
            at = row.minimum(spec.num_rows - 1) * (spec.num_cols // CODE_COLS) + split * spec.steps + step
            found.append(float_of_scale(self.planes.scale.base[at].load(), self.planes.scale.format))
        return found

    def _multiply_stage(self, number: UOp, sums: UOp, scales: list[UOp], begun: UOp, *after: UOp) -> tuple[UOp, UOp]:
        """(the UOp after which the sums of a stage may be read, the one after which it is released)."""
        spec, (place, full, empty, parity) = self.spec, self._stage(number)
        last, half = wait(full, parity, begun, *after), CODE_COLS // STEP_COLS // 2
        factors = [spec.mma.both((scale * UNIT).cast(F16)) for scale in scales]
        for panel in range(spec.panels):
            words = [word for i in range(half) for word in self._words(place, panel * half + i, last)]
            if spec.scales_weights:
                words = [spec.mma.fuse((word,), factors[i % 2], None)[0] for i, word in enumerate(words)]
            right, adds = place + panel * spec.token_bytes, spec.scales_weights or panel > 0
            last = start_rows(PTX_NAMES[spec.mma.dtype], words, right, sums, adds, last)
            if panel == spec.panels - 1 or spec.groups > 2:  # the latter have registers for half a stage's words
                last = await_products(0, sums, last)
        return last, arrive(empty, self.lane.eq(0), last)

    def _words(self, place: UOp, step: int, after: UOp) -> list[UOp]:
        """The lane's weights of 16 columns: of its upper and lower row, two of the first eight columns and two of the
        others."""
        spec, lane, found = self.spec, self.lane, []
        row = row_of(spec, self._warp, 0, lane)
        first = self._rows(place, 0) + row * CODE_COLS + lane // 4 * 16 + lane % 4 * 2
        piece = first.cast(I32) ^ (step * 16)  # the copy engine swizzles pieces by the row's number among eight
        below = spec.out_tile if spec.is_gated else WARP_ROWS // 2
        for part in range(2):
            for half in range(2):
                at = piece + (part * 8 + half * below * CODE_COLS)
                pair = SharedPlane(dtypes.ushort, at, after).at(0).cast(U32)
                found.append(spec.mma.float8_pair(pair, 0))
        return found

    def _store(self, tile: Tile, values: list[UOp]) -> UOp:
        """Store a tile's sums: of each eight tokens, a lane has two of two rows."""
        spec, (split, first_row, first_token), stores = self.spec, tile, []
        for block in range(spec.token_rows // 8):
            four = values[4 * block : 4 * block + 4]
            if spec.activation is not None:
                four = gated(spec.activation, four[:2], four[2:], HOPPER_ARITHMETIC)
            for i, value in enumerate(four):
                token = first_token + self.lane % 4 * 2 + (8 * block + i % 2)
                own = row_of(spec, self.multiplier, i // 2, self.lane)
                row = first_row + own
                at = (split * spec.num_tokens + token.minimum(spec.num_tokens - 1)) * spec.out_rows + row
                exists = token < spec.num_tokens if spec.num_tokens % spec.token_rows else None
                if spec.out_rows % spec.out_tile:
                    exists = row < spec.out_rows if exists is None else exists & (row < spec.out_rows)
                if spec.row_tile % WGMMA_TOKENS:
                    exists = own < spec.out_tile if exists is None else exists & (own < spec.out_tile)
                at = at if exists is None else at.valid(exists)
                if self.residual is not None:
                    value = value + self.residual[at].load().cast(F32)
                stores.append(self.out[at].store(value.cast(self.out.dtype)))
        return UOp.group(*stores)
