"""A few token rows (up to 8) times a quantized matrix on Hopper, by clusters of threadgroups that split its columns.

Each threadgroup of a cluster keeps its share of x: each warp the columns of its own, in registers. So the loop over
tiles reads codes and scales alone, which the copy engine brings (tensor maps: one copy for each plane of a stage), and
memory has room for more stages than beside all of x. Teams of warps take the cluster's tiles of 16 rows in turn; a
team's warps split the threadgroup's columns.

A tile's sums are scattered over the cluster: each threadgroup gets all warps' sums of its share of the tile's rows in
its own memory (st.async, which counts on its barrier), and adds them up one tile later. So no kernel has to add up the
parts of the columns, and no threadgroup writes what it has not summed. A warp that has sent the sums of a tile has read
those of the tile before: two slots for each team are enough.

Codes are float16 numbers where they lie, subnormal ones: code * 2^-24 in a byte's lower half, 16 times that in the
upper half, for which x is divided by 16. Groups' sums are multiplied by their scales. Minimums, and offsets of codes,
times the sums of x over groups are a product in tf32, of x's sums in two parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from tinygrad import Tensor, UOp
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.device.handle import upload
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import PANEL, Matrix, Planes, high_bits
from tinyvllm.ops.formats.pairs import code_order
from tinyvllm.ops.formats.runs import groups_in_run, packed_bits
from tinyvllm.ops.gpu.chunk_scales import ChunkScales, Scaled
from tinyvllm.ops.gpu.plane_ring import (
    CHUNK_COLS,
    LEAST_BYTES,
    LEAST_SIDE_OF_FLOATS,
    MEET_ALL,
    SLOTS,
    TILE_ROWS,
    SharedPlane,
    number,
)
from tinyvllm.ops.gpu.product import PackedProductSpec
from tinyvllm.ops.kernel.body import F16, F32, U32, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.hopper import (
    HINT,
    HOPPER_SHARED_BYTES,
    MAP_WORDS,
    ONCE,
    POLICY,
    WAIT,
    Box,
    acquire_map,
    declare,
    hidden,
    make_clusters,
    share_multiprocessor,
    statement,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, await_previous, multiply_tf32, warps, zeros
from tinyvllm.ops.kernel.tensor_map import encode_map

# of products that are worth it: rows, codes of a matrix, columns that e4m3 has a multiple of
MIN_TOKENS, FEWEST_CODES, FEWEST_FLOATS, EVEN_COLS = 2, 24 << 20, 16 << 20, 2048
LEAST_SIDE = 3584  # of rows and columns, except those of plane_ring.py
FEWEST_CHUNKS = 5  # of a threadgroup
FEW_THREADGROUPS = 4  # of a cluster, which has more only for longer rows
MOST_COLS_OF_FLOATS = 3584  # of e4m3, a threadgroup's share
MAX_TOKENS = 8  # of a tile of the matrix unit
ALIGNED = 16  # bytes of which what a copy reads begins at a multiple
PLACED = 128  # the same in threadgroup memory
ROW_BYTES = 128  # of a block of codes, the span that the copy engine swizzles
UNITS = ROW_BYTES // 16  # pieces of a block's row, each of four lanes' words
STAGES = 2  # of each team
# by their size: those that fit at once, one threadgroup on a multiprocessor (H200, cudaOccupancyMaxActiveClusters)
MOST_CLUSTERS = {2: 66, 4: 30, 8: 15}
MIN_WARPS, MOST_WARPS = 14, 17  # of a threadgroup: fewer wait for their own instructions, more have too few registers
CHAINS = 4  # of products that are added up before the loop
SLOT_TILES = 2  # tiles whose sums are on their way
HALF_ROWS = TILE_ROWS // 2  # a tile has as many rows of the matrix's second half: of a gated product's up
FLOATS = TILE_ROWS * MAX_TOKENS  # sums of a tile
SUBNORMAL = 2.0**24  # what a code where it lies is smaller by
SIXTEENTH = 0x2C002C00  # two float16 of 1/16
ONES = 0x3C003C00  # two float16 of 1
SEEN_BITS = 0xFFFFE000  # of a float32 in tf32
LOW_CODES, HIGH_CODES = 0x000F000F, 0x00F000F0
PERMUTE = "__byte_perm({0}, {1}, %#x)"
Number = TypeVar("Number", int, UOp)

BARRIERS = """if (threadIdx.x == 0 && threadIdx.y == {warp}) {{{{
  for (int i = 0; i < {count}; i++)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared + {at} + i * 8) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  for (int i = {first_sums}; i < {x}; i++)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared + {at} + i * 8), "r"({bytes})
      : "memory");
}}}}
if (threadIdx.y == 0 && threadIdx.x < {stages}) ((int*)(shared_memory + {counts}))[threadIdx.x] = 0;"""
MEET_CLUSTER = 'asm volatile("barrier.cluster.arrive.release;" ::: "memory");'
AWAIT_CLUSTER = 'asm volatile("barrier.cluster.wait.acquire;" ::: "memory");'
# {0}: maps; {1}: the team's first tile; {2}: its steps; {3}: the team; {4}: the rank in the cluster; then the planes
FETCH = """auto fetch = [&](int turn) {{{{
  if (turn < (int)({{2}})) {{{{
    int slot = (int)({{3}}) * {stages} + turn % {stages}, row = ((int)({{1}}) + turn * {stride}) * {out_tile};
    int rank = (int)({{4}});
    unsigned full = shared + {full} + slot * 8, to = shared + slot * {stage_bytes};
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], {bytes};" :: "r"(full) : "memory");
{copies}
  }}}}
}}}};"""
COPY = (
    f'    asm volatile("{{{{{{{{ {ONCE}cp.async.bulk.tensor.{{dims}}d.shared::cluster.global.mbarrier::complete_tx::'
    f'bytes{HINT} [%0], [%1, {{{{{{{{{{coordinates}}}}}}}}}}], [%2]{POLICY}; }}}}}}}}" :: '
    '"r"(to + {place}), "l"((const char*)({{0}}) + {map}), "r"(full), '
    '{operands} : "memory");'
)
COPY_ROWS = (
    f'    asm volatile("{{{{{{{{ {ONCE}cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{HINT} '
    f'[%0], [%1], {{size}}, [%2]{POLICY}; }}}}}}}}" :: '
    '"r"(to + {place}), "l"((const char*)({{{plane}}}) + (long long)(row + {first}) * {row}), "r"(full) : "memory");'
)
BEGIN = (
    "if (threadIdx.x == 0 && threadIdx.y % {warps} == 0) for (int turn = {first}; turn < {end}; turn++) fetch(turn);"
)
STAGE_X = """if (threadIdx.x == 0 && threadIdx.y == 0) {{{{
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], {bytes};" :: "r"(shared + {barrier}) : "memory");
  for (int token = 0; token < {tokens}; token++)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], {row}, [%2];"
      :: "r"(shared + {place} + token * {stride}),
         "l"((const char*)({{0}}) + token * {row_stride} + (int)({{1}}) * {row}), "r"(shared + {barrier}) : "memory");
}}}}"""
WAIT_IF = f"if ({{2}}) {{{{ {WAIT} }}}}"
# the last warp of a team that has read a stage fills it again
RELEASE = """__syncwarp();
if (threadIdx.x == 0) {{{{
  int turn = {{0}}, slot = (int)({{1}}) * {stages} + turn % {stages};
  if (atomicAdd((int*)(shared_memory + {counts}) + slot, 1) == {warps} * (turn / {stages} + 1) - 1)
    fetch(turn + {stages});
}}}}"""
MATRICES = """unsigned {name}_0, {name}_1, {name}_2, {name}_3;
asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{{%0, %1, %2, %3}}}}, [%4];"
  : "=r"({name}_0), "=r"({name}_1), "=r"({name}_2), "=r"({name}_3) : "r"(shared + {{0}}) : "memory");"""
# {0}: a place, {1}: a barrier, both found in the memory of the threadgroup {2} of the cluster
FIND_THERE = """unsigned there, barrier_there;
asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared + {0}), "r"({2}));
asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier_there) : "r"(shared + {1}), "r"({2}));"""
SEND = (
    'asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {{%1, %2, %3, %4}}, [%5];" :: '
    '"r"(there + ({0})), "f"({1}), "f"({2}), "f"({3}), "f"({4}), "r"(barrier_there + ({5})) : "memory");'
)
EXPECT_AGAIN = (
    'if ({1}) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%%0], %d;" :: "r"(shared + {0}) : "memory");'
)


@dataclass(frozen=True)
class PlaneBox:
    """How a plane's share of a stage is copied: `bytes` of each of its 16 rows, codes in blocks of 128, swizzled; or
    whole rows, if a tensor map cannot describe them."""

    dtype: DType
    row_bytes: int  # of the whole matrix
    chunk_bytes: int
    bytes: int
    place: int  # in a stage
    is_code: bool

    @property
    def is_whole(self) -> bool:
        return self.row_bytes % ALIGNED != 0

    @property
    def blocks(self) -> int:
        return self.bytes // ROW_BYTES

    @property
    def size(self) -> int:
        return TILE_ROWS * self.bytes


@dataclass(frozen=True, kw_only=True)
class ClusteredMatrixSpec(PackedProductSpec):
    """out (T, N) = x (T, K) @ w.T in float32, or out (T, N / 2) = activation(gate) * up, T up to 8."""

    @property
    def splits(self) -> int:
        """Parts of the sums that others have to add up."""
        return 1

    @property
    def num_tiles(self) -> int:
        return self.num_rows // TILE_ROWS

    @property
    def cluster(self) -> int:
        """Threadgroups that split the columns: the fewest with which x fits beside the ring and most warps have columns
        (clusters of two take all multiprocessors, those of four and eight 120)."""
        chunks = self.num_cols // CHUNK_COLS
        sizes = [size for size in (2, 4, 8) if chunks % size == 0 and chunks // size <= MOST_WARPS]
        return next((size for size in sizes if MOST_WARPS // (chunks // size) * (chunks // size) >= MIN_WARPS), 2)

    @property
    def chunks(self) -> int:
        """Chunks of a threadgroup: one for each warp of a team."""
        return self.num_cols // CHUNK_COLS // self.cluster

    @property
    def teams(self) -> int:
        """Teams of warps, which take the cluster's tiles in turn."""
        return self.knob("teams", max(1, MOST_WARPS // max(1, self.chunks)))

    @property
    def team_warps(self) -> int:
        return self.chunks

    @property
    def warps(self) -> int:
        return self.team_warps * self.teams

    @property
    def clusters(self) -> int:
        return max(1, min(MOST_CLUSTERS[self.cluster], self.num_tiles // self.teams))

    @property
    def share_cols(self) -> int:
        """Columns of a threadgroup."""
        return self.chunks * CHUNK_COLS

    @property
    def parts(self) -> int:
        """Warps whose sums make up a tile's."""
        return self.cluster * self.team_warps

    @cached_property
    def boxes(self) -> tuple[PlaneBox, ...]:
        found: list[PlaneBox] = []
        place = 0
        for i, (dtype, size) in enumerate(self.planes):
            share = int(size * self.share_cols)
            bytes_ = -(-(share + ALIGNED - math.gcd(share, ALIGNED)) // ALIGNED) * ALIGNED  # copies begin at a multiple
            row_bytes = int(size * self.num_cols)
            bytes_ = row_bytes if row_bytes % ALIGNED else bytes_
            box = PlaneBox(dtype, row_bytes, int(size * CHUNK_COLS), bytes_, place, i == 0)
            found.append(box)
            place += -(-box.size // PLACED) * PLACED
        return tuple(found)

    @property
    def map_boxes(self) -> dict[int, Box]:
        """What one copy takes of a plane, by the planes that have tensor maps: as many rows of each half."""
        rows, own = (self.num_rows // 2, 2), (HALF_ROWS, 2)
        found = {}
        for i, box in enumerate(self.boxes):
            strides = (box.row_bytes, box.row_bytes * self.num_rows // 2)
            if box.is_code:
                sizes = (ROW_BYTES // 2, *rows, box.row_bytes // ROW_BYTES)
                found[i] = Box(sizes, (*strides, ROW_BYTES), (ROW_BYTES // 2, *own, box.blocks))
            elif not box.is_whole:
                found[i] = Box((box.row_bytes // 2, *rows), strides, (box.bytes // 2, *own), is_swizzled=False)
        return found

    @property
    def stage_bytes(self) -> int:
        last = self.boxes[-1]
        return -(-(last.place + last.size) // 1024) * 1024

    @property
    def stages(self) -> int:
        """Of each team. (NVIDIA H200, 28,672 rows of 4,096 columns in Q4_K: two 23.8 us, three 24.8, four 27.4: what is
        on its way delays x.)"""
        return self.knob("stages", STAGES)

    @property
    def early(self) -> int:
        """Those that are on their way before x has been asked for, which waits until they have come."""
        return min(self.stages, self.knob("early", 1))

    @property
    def slot_bytes(self) -> int:
        """Of one warp's sums of a threadgroup's share of a tile."""
        return FLOATS * 4 // self.cluster

    @property
    def x_stride(self) -> int:
        """From one token's x to the next one's, in threadgroup memory: lanes read different banks."""
        return self.share_cols * 2 + 32

    @property
    def x_bytes(self) -> int:
        return self.num_tokens * self.x_stride

    @property
    def slots_at(self) -> int:
        return self.teams * self.stages * self.stage_bytes

    @property
    def x_at(self) -> int:
        return self.slots_at + self.slot_bytes * self.parts * SLOT_TILES * self.teams

    @property
    def barriers_at(self) -> int:
        """Of the stages, of the slots, and of x."""
        return self.x_at + self.x_bytes

    @property
    def slot_barriers_at(self) -> int:
        return self.barriers_at + self.teams * self.stages * 8

    @property
    def x_barrier_at(self) -> int:
        return self.slot_barriers_at + self.teams * SLOT_TILES * 8

    @property
    def counts_at(self) -> int:
        return self.x_barrier_at + 8

    @property
    def dynamic_bytes(self) -> int:
        return max(LEAST_BYTES, self.counts_at + self.teams * self.stages * 4)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"teams": (1, 2, 4), "stages": (2, 3, 4), "early": (1, 2)}

    @property
    def is_wanted(self) -> bool:
        """Whether it is faster than the other kernels, if it is possible: for large matrices, with at least 14 warps.

        NVIDIA H200, 8 rows: 8B's steps, 4 layers, Q4_K 340 us instead of 377; 14B's in MLX's 4 bits, 3 layers, 365
        (403 without down), in Q4_K 406 instead of 428. Qwen2.5-7B's (3,584 columns), 4 layers, in Q4_K 391 instead of
        413; Qwen3-4B's (2,560), 4 layers, in MLX's 4 bits 221 instead of 244. 70B's four products in Q4_K 159 instead
        of 216, in MLX's 4 bits 152 instead of 203. Phi-4-mini's (3,072, of which a threadgroup of four would have three
        chunks), 4 layers, in Q4_K 289 instead of 276. The smallest product (4,096 x 4,096) takes 8.3 us instead of 8.2
        in Q4_K, 9.2 instead of 8.9 in FP8. With 5,120 columns (14B, 3 layers) an earlier form took 660 us instead of
        567 in FP8. 1B's products in Q4_0 25.2 instead of
        22.9. 3 rows: 8B's step in FP8, 4 layers, 401 instead of 443; its products in Q4_K 56.2 instead of 58.9, in
        MLX's 4 bits 53.7 instead of 56.0. 2 rows, whole steps of 8B: 1.95 ms instead of 2.13 in Q4_K, 1.78 instead of
        2.04 in MLX's 4 bits, 2.31 instead of 2.60 in FP8."""
        fmt, side = self.format, min(self.num_rows, self.num_cols)
        least = FEWEST_FLOATS if fmt.is_float8 else FEWEST_CODES
        is_even = self.num_cols % EVEN_COLS == 0 or not fmt.is_float8
        has_floats = fmt.minimum is not None and not fmt.minimum.has_steps
        return (
            self.num_tokens >= MIN_TOKENS
            and side >= (LEAST_SIDE_OF_FLOATS if has_floats else LEAST_SIDE)
            and self.chunks >= FEWEST_CHUNKS
            and self.num_rows * self.num_cols >= least
            and is_even
            and (self.cluster <= FEW_THREADGROUPS or self.num_cols > FEW_THREADGROUPS * MOST_WARPS * CHUNK_COLS)
            and self.warps >= MIN_WARPS
            and not (fmt.is_float8 and (self.cluster > FEW_THREADGROUPS or self.share_cols > MOST_COLS_OF_FLOATS))
        )

    def is_possible(self) -> bool:
        chunks = self.num_cols // CHUNK_COLS
        return (
            self.num_tokens <= MAX_TOKENS
            and takes_clusters(self.format)
            and self.num_cols % CHUNK_COLS == 0
            and chunks % self.cluster == 0
            and self.warps <= MOST_WARPS
            and FLOATS // self.cluster <= self.team_warps * LANES
            and self.num_rows % TILE_ROWS == 0
            and self.num_tiles >= self.teams * self.clusters
            and self.mma.dtype == F16
            and not self.boxes[0].is_whole
            and all(box.chunk_bytes % 2 == 0 and box.row_bytes * TILE_ROWS // 2 % ALIGNED == 0 for box in self.boxes)
            and self.stages >= 2
            and self.teams * self.stages <= LANES
            and self.dynamic_bytes <= HOPPER_SHARED_BYTES
        )


def make_maps(spec: ClusteredMatrixSpec, matrix: Matrix) -> Tensor:
    """The tensor maps of a matrix's planes, one after the other; of those that are copied without, zeros."""
    words = np.zeros((len(matrix.planes), MAP_WORDS), np.uint32)
    for i, box in spec.map_boxes.items():
        words[i] = encode_map(matrix.planes[i].uop.base.buffer, box)
    return upload(words.reshape(-1), str(matrix.planes[0].device))


def takes_clusters(fmt: Format) -> bool:
    """Whether codes are of 4 bits that stand for integers, in groups of whole runs, or e4m3."""
    if fmt.grid is not None or not fmt.is_quantized or groups_in_run(fmt) > 1 or high_bits(fmt):
        return False
    if fmt.is_float8:
        return True
    is_integer = packed_bits(fmt) == (4, 0) and fmt.codebook is None
    if not is_integer or (fmt.offset and fmt.minimum is not None):
        return False
    weighed = fmt.scale if fmt.minimum is None else fmt.minimum  # exact in tf32
    assert weighed is not None
    return weighed.span == CHUNK_COLS if weighed.has_steps else weighed.dtype in ("float16", "bfloat16")


def sum_place(cluster: int, rank: Number, place: Number) -> tuple[Number, Number, Number]:
    """(row, token, half) of a sum in a threadgroup's share of a tile: a row in the first half of the tile's rows, or in
    the second one, as the matrix unit's lanes hold them, four sums each. Of a gated product, halves are gate and up."""
    lane, element = rank * (LANES // cluster) + place // 4, place % 4
    return lane // 4, lane % 4 * 2 + element % 2, element // 2


@cached_kernel
def clustered_matrix_kernel(spec: ClusteredMatrixSpec) -> KernelFn:
    """fn(out, maps, *planes, x): see ClusteredMatrixSpec. maps: of the planes, as `map_boxes` describes them."""

    def kernel(out: UOp, maps: UOp, *operands: UOp) -> UOp:
        *planes, x = operands
        rows = _ClusteredRows(spec, out, maps, planes)
        (x,) = await_previous(spec.lanes, x, ahead=[rows.begun])
        end = rows.multiply(rows.keep(x))
        size = spec.num_rows * spec.num_cols
        return finish(
            end.end(*reversed(rows.axes)),
            f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}",
            ops=2 * spec.num_tokens * size,
            nbytes=int(size * spec.format.code_bits / 8),
        )

    return kernel


@dataclass(frozen=True)
class _HeldX:
    """A warp's x of a chunk: four words of each run, and the sums over its runs in two parts, if they are needed."""

    words: list[list[UOp]]
    upper: list[UOp]
    lower: list[UOp]


class _ClusteredRows:
    """A threadgroup's share of the product."""

    def __init__(self, spec: ClusteredMatrixSpec, out: UOp, maps: UOp, planes: Sequence[UOp]) -> None:
        self.spec, self.out, self.body = spec, out, Body()
        self.group, self.lane = self.body.grid(spec.clusters * spec.cluster), self.body.threads(LANES)
        warp = warps(self.body, spec.warps)
        assert isinstance(warp, UOp)
        self.axes = (self.group, self.lane, warp)
        self.rank, self.team, self.part = self.group % spec.cluster, warp // spec.team_warps, warp % spec.team_warps
        self.stride = spec.teams * spec.clusters
        self.first = self.team * spec.clusters + self.group // spec.cluster  # the team's first tile
        self.steps = (spec.num_tiles - 1 - self.first) // self.stride + 1
        memory = make_clusters(spec.cluster, declare(spec.dynamic_bytes), share_multiprocessor(1))
        # one thread for the threadgroup: each of 16 that acquired them would take as long as writing them
        maps_read = [acquire_map(maps[i * MAP_WORDS], memory, warp=0) for i in spec.map_boxes]
        count = spec.teams * (spec.stages + SLOT_TILES) + 1
        barriers = BARRIERS.format(
            warp=spec.warps - 1,
            at=spec.barriers_at,
            count=count,
            first_sums=spec.teams * spec.stages,
            x=count - 1,
            bytes=spec.parts * spec.slot_bytes,
            stages=spec.teams * spec.stages,
            counts=spec.counts_at,
        )
        made = statement(MEET_ALL, *maps_read, statement(barriers, memory))
        text = FETCH.format(
            stages=spec.stages,
            stride=self.stride,
            out_tile=HALF_ROWS,
            full=spec.barriers_at,
            stage_bytes=spec.stage_bytes,
            bytes=sum(box.size for box in spec.boxes),
            copies="\n".join(self._copy(i, box) for i, box in enumerate(spec.boxes)),
        )
        numbers = [number(value) for value in (self.first, self.steps, self.team, self.rank)]
        operands = [maps[0], *numbers, *[plane[0] for plane in planes]]
        fetch = statement(text, *operands, statement(MEET_CLUSTER, made))
        self.begun = statement(BEGIN.format(warps=spec.team_warps, first=0, end=spec.early), fetch)

    def _copy(self, index: int, box: PlaneBox) -> str:
        spec = self.spec
        if box.is_whole:
            size, half = HALF_ROWS * box.row_bytes, spec.num_rows // 2
            return "\n".join(
                COPY_ROWS.format(
                    place=box.place + i * size, plane=5 + index, first=i * half, size=size, row=box.row_bytes
                )
                for i in range(2)
            )
        own = box.chunk_bytes * spec.chunks
        first = f"rank * {own} / {ALIGNED} * {ALIGNED // 2}"
        at = ["0", "row", "0", f"rank * {box.blocks}"] if box.is_code else [first, "row", "0"]
        return COPY.format(
            dims=len(at),
            coordinates=", ".join(f"%{3 + i}" for i in range(len(at))),
            operands=", ".join(f'"r"({text})' for text in at),
            place=box.place,
            map=index * MAP_WORDS * 4,
        )

    # -- x -------------------------------------------------------------------------------------------------------------

    def keep(self, x: UOp) -> _HeldX:
        """The warp's x."""
        spec = self.spec
        text = STAGE_X.format(
            bytes=spec.num_tokens * spec.share_cols * 2,
            barrier=spec.x_barrier_at,
            tokens=spec.num_tokens,
            row=spec.share_cols * 2,
            place=spec.x_at,
            stride=spec.x_stride,
            row_stride=spec.num_cols * 2,
        )
        asked = statement(text, x[0], number(self.rank))
        rest = BEGIN.format(warps=spec.team_warps, first=spec.early, end=spec.stages)
        staged = statement(f"{rest}\n__syncwarp();", asked)
        self.staged = wait(number(spec.x_barrier_at), number(0), staged)
        token = (self.lane // 4).minimum(spec.num_tokens - 1)
        plane = SharedPlane(U32, number(spec.x_at + token * spec.x_stride), self.staged)
        return self._held(plane, self.part * (CHUNK_COLS // 2))

    def _held(self, plane: SharedPlane, first: UOp) -> _HeldX:
        """`first`: the first word of the warp's chunk."""
        spec, words = self.spec, []
        for run in range(SLOTS):
            at = first + run * (PANEL // 2) + self.lane % 4 * 2
            halves = [plane.words(number(at + half * (PANEL // 4)), 2) for half in range(2)]
            words.append([word for pair in halves for word in self._in_order(pair)])
        upper: list[UOp] = []
        lower: list[UOp] = []
        if self.weighs:
            chains, nothing = [zeros(4) for _ in range(CHAINS)], [UOp.const(0, U32)] * 4
            for run, four in enumerate(words):
                ones = [(self.lane // 4).eq(run).where(UOp.const(ONES, U32), UOp.const(0, U32))] * 4
                old = chains[run % CHAINS]
                chains[run % CHAINS] = spec.mma.multiply_words(self.body, [four, nothing], [ones], old)
            sums = [balanced(column) for column in zip(*chains, strict=True)]
            upper = [value.bitcast(U32) & SEEN_BITS for value in sums[:2]]
            lower = [(v - high.bitcast(F32)).bitcast(U32) for v, high in zip(sums[:2], upper, strict=True)]
        if not spec.format.is_float8:
            sixteenth = UOp.const(SIXTEENTH, U32)
            words = [four[:2] + [spec.mma.fuse((word,), sixteenth, None)[0] for word in four[2:]] for four in words]
        return _HeldX(words, upper, lower)

    @property
    def weighs(self) -> bool:
        """Whether the sums of x over groups are multiplied by something."""
        return self.spec.format.minimum is not None or self.spec.format.offset != 0

    def _in_order(self, pair: list[UOp]) -> list[UOp]:
        """Four neighbors of x in the order of the codes."""
        if code_order(self.spec.format, self.spec.mma) == (0, 1, 2, 3):
            return pair
        return [UOp(Ops.CUSTOM, U32, src=tuple(pair), arg=PERMUTE % selector) for selector in (0x5410, 0x7632)]

    # -- products ------------------------------------------------------------------------------------------------------

    def multiply(self, held: _HeldX) -> UOp:
        spec, share = self.spec, LANES // self.spec.cluster  # lanes whose sums a threadgroup gets
        own = (self.team * SLOT_TILES * spec.parts + self.rank * spec.team_warps + self.part) * spec.slot_bytes
        places = [spec.slots_at + own + self.lane % share * 16, spec.slot_barriers_at + self.team * (SLOT_TILES * 8)]
        cluster = statement(AWAIT_CLUSTER, self.staged)
        there = statement(FIND_THERE, *map(number, (*places, self.lane // share)), cluster)
        loop = self.body.fold_while(hidden(self.steps))
        turn = loop.cast(self.lane.dtype)
        slot = self.team * spec.stages + turn % spec.stages
        waited = wait(number(spec.barriers_at + slot * 8), number(turn // spec.stages % 2), there, self.begun)
        totals = self._add(held, slot * spec.stage_bytes, turn, waited)
        stored = self._store(turn - 1, totals, turn > 0)
        offsets = [turn % SLOT_TILES * (spec.parts * spec.slot_bytes), turn % SLOT_TILES * 8]
        sent = statement(SEND, number(offsets[0]), *totals, number(offsets[1]), *stored)
        return UOp.group(*self._store(self.steps - 1, [sent.end(loop)], None))

    def _add(self, held: _HeldX, stage: UOp, turn: UOp, waited: UOp) -> list[UOp]:
        """A lane's sums of a tile over the warp's columns: by its two rows, two tokens each. Releases the stage."""
        spec = self.spec
        rows = [self._planes(stage, self.lane // 4 + 8 * half, waited) for half in range(2)]
        codes, read = self._codes(stage, waited)
        unit = 1.0 if spec.format.is_float8 else SUBNORMAL
        scales = [ChunkScales(planes.scale, spec.format, self.part, unit) for planes in rows]
        weighed, weights = self._weights(rows) if self.weighs else ([], [])
        read += [one.of_run(run, 0) for one in scales for run in range(SLOTS)]
        read += [word for row in weights for word in row]
        read += [one.common for one in (*scales, *weighed) if one.common is not None]
        text = RELEASE.format(stages=spec.stages, counts=spec.counts_at, warps=spec.team_warps)
        released = statement(text, number(turn), number(self.team), *read)
        totals = self._multiplied(codes, scales, held)
        if self.weighs:
            totals = self._add_weighed(weighed, weights, held, totals)
        return [UOp(Ops.CUSTOM, F32, src=(value, released), arg="{0}") for value in totals]

    def _planes(self, stage: UOp, row: UOp, waited: UOp) -> Planes:
        found = []
        for box in self.spec.boxes:
            before = self.rank * (box.chunk_bytes * self.spec.chunks)
            before = before if box.is_whole else before % ALIGNED
            found.append(SharedPlane(box.dtype, number(stage + box.place + row * box.bytes + before), waited))
        return Planes(self.spec.format, found)

    def _codes(self, stage: UOp, waited: UOp) -> tuple[list[list[list[UOp]]], list[UOp]]:
        """(by runs, the words of a lane's two rows that its columns share; the statements that read them)."""
        lane, pieces = self.lane, SLOTS * (2 if self.spec.format.is_float8 else 1)
        per_run = pieces // SLOTS
        found: list[list[UOp]] = []
        read: list[UOp] = []
        swizzled = number(lane % 8) ^ number(lane // 16)
        for piece in range(0, pieces, 2):
            block = self.part * (pieces // UNITS) + piece // UNITS
            place = stage + block * (TILE_ROWS * ROW_BYTES) + lane % 16 * ROW_BYTES + (swizzled ^ piece % UNITS) * 16
            name = f"codes{self.body.label()}"
            done = statement(MATRICES.format(name=name), number(place), waited)
            read.append(done)
            zero = UOp.const(0, U32)
            words = [UOp(Ops.CUSTOM, U32, src=(zero, done), arg=f"{name}_{i}") for i in range(4)]
            found += [words[:2], words[2:]]
        runs = [found[i : i + per_run] for i in range(0, pieces, per_run)]
        return [[[pair[row] for pair in run] for row in range(2)] for run in runs], read

    def _unpacked(self, words: list[UOp]) -> list[UOp]:
        """A run's codes in a row, as words of two halves."""
        if self.spec.format.is_float8:
            return [self.spec.mma.float8_pair(word, odd) for word in words for odd in range(2)]
        (word,) = words
        return [moved & mask for mask in (LOW_CODES, HIGH_CODES) for moved in (word, word >> 8)]

    def _multiplied(self, codes: list[list[list[UOp]]], scales: list[ChunkScales], x: _HeldX) -> list[UOp]:
        """A lane's sums of codes times x, each group's times its scale."""
        spec, per_group = self.spec, min(SLOTS, max(1, self.spec.format.group // PANEL))
        scaled = [Scaled(scales[e // 2]) for e in range(4)]
        for first in range(0, SLOTS, per_group):
            sums = zeros(4)
            for run in range(first, first + per_group):
                rows = [self._unpacked(words) for words in codes[run]]
                sums = spec.mma.multiply_words(self.body, rows, [x.words[run]], sums)
            for e, value in enumerate(sums):
                scaled[e].add(value, scales[e // 2].of_run(first, 0))
        return [one.added_to(UOp.const(0.0, F32)) for one in scaled]

    def _weights(self, rows: Sequence[Planes]) -> tuple[list[ChunkScales], list[list[UOp]]]:
        """What the sums of x over a lane's two runs are multiplied by, in its two rows."""
        fmt, found = self.spec.format, []
        for planes in rows:
            if planes.minimum is not None:
                found.append(ChunkScales(planes.minimum, fmt, self.part))
            else:
                found.append(ChunkScales(planes.scale, fmt, self.part, float(-fmt.offset)))
        groups = [(self.lane % 4 * 2 + i) * PANEL // fmt.group for i in range(2)]
        return found, [[one.at_group(group).bitcast(U32) for group in groups] for one in found]

    def _add_weighed(self, scales: list[ChunkScales], weights: list[list[UOp]], x: _HeldX, old: list[UOp]) -> list[UOp]:
        products = zeros(4)
        for right in (x.upper, x.lower):
            products = multiply_tf32(self.body, weights, right, products)
        totals = [Scaled(scales[e // 2]) for e in range(4)]
        for total, product in zip(totals, products, strict=True):
            total.add_weighed(product)
        return [total.added_to(value) for total, value in zip(totals, old, strict=True)]

    # -- sums ----------------------------------------------------------------------------------------------------------

    def _store(self, turn: UOp, after: Sequence[UOp], exists: UOp | None) -> list[UOp]:
        """Add up what the cluster's warps have sent of a tile, and store it. Each of the team's warps adds up some of
        the threadgroup's sums, with some lanes for each. Unless `exists` is None, the slot is then used again."""
        spec, lane = self.spec, self.lane
        slot = self.team * SLOT_TILES + (turn + SLOT_TILES) % SLOT_TILES
        barrier, parity = number(spec.slot_barriers_at + slot * 8), number((turn + SLOT_TILES) // SLOT_TILES + 1) % 2
        ready = wait(barrier, parity, *after) if exists is None else statement(WAIT_IF, barrier, parity, exists, *after)
        count, lanes = self._summed
        place = self.part.minimum(self._summers - 1) * count + lane % count
        plane = SharedPlane(F32, number(spec.slots_at + slot * (spec.parts * spec.slot_bytes)), ready)
        values = []
        for first in range(0, spec.parts, lanes):
            part = lane // count + first
            value = plane.at(part.minimum(spec.parts - 1) * (spec.slot_bytes // 4) + place)
            values.append(value if first + lanes <= spec.parts else (part < spec.parts).where(value, 0.0))
        value = spec.lanes.sum(balanced(values), [mask for mask in (4, 8, 16) if mask >= count])
        row, token, half = sum_place(spec.cluster, self.rank, place)
        inside = (self.part < self._summers) & (lane < count) & (token < spec.num_tokens)
        if spec.activation is not None:
            (value,) = gated(spec.activation, [value], [spec.lanes.shuffle(value, 2)])
            inside &= half.eq(0)
        else:
            row = row + half * (spec.num_rows // 2)
        target = (self.first + turn.maximum(0) * self.stride) * HALF_ROWS + row
        at = token.minimum(spec.num_tokens - 1) * spec.out_rows + target
        inside = inside if exists is None else inside & exists
        stored = [self.out[at.valid(inside)].store(value.cast(self.out.dtype))]
        if exists is not None:
            again = exists & self.part.eq(0) & lane.eq(0)
            stored.append(statement(EXPECT_AGAIN % (spec.parts * spec.slot_bytes), barrier, again, ready))
        return stored

    @property
    def _summers(self) -> int:
        """Warps of a team that add up sums."""
        most = min(self.spec.team_warps, FLOATS // self.spec.cluster // 4)
        return 1 << (most.bit_length() - 1)

    @property
    def _summed(self) -> tuple[int, int]:
        """(sums that a warp adds up at once, lanes for each)."""
        count = FLOATS // self.spec.cluster // self._summers
        return count, LANES // count
