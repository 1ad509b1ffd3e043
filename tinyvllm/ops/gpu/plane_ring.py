"""A ring of stages in threadgroup memory (Hopper), through which the planes of a quantized matrix stream.

A threadgroup walks along a list of tiles of 16 rows. The copy engine brings them into the ring's stages (bulk copies,
which need no tensor map), while the warps read those that have arrived. So enough bytes are in flight however many
registers a lane has, and the first stages arrive before the previous kernel has ended on all multiprocessors. Small
loads, such as of the scales of 32 columns, read threadgroup memory: from device memory they would take more time than
the codes.

The copy engine takes about 60 cycles for each copy, so that a stage is copied in a few: whole planes of 16 rows where
that is possible. Of one row's products, a warp of its own fetches: from before the previous kernel has ended until the
ring is full, and then what the others have read. Only a few stages are on their way at once, because other loads would
wait for all of them. Of several rows' products, whose warps need the registers, the warp that is the last to have read
a stage fills it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import PANEL, Planes, high_bits
from tinyvllm.ops.formats.runs import PlaneReader
from tinyvllm.ops.kernel.body import F32, I32, U32, Body
from tinyvllm.ops.kernel.hopper import (
    HINT,
    HOPPER_SHARED_BYTES,
    ONCE,
    POLICY,
    WAIT_AT,
    declare,
    hidden,
    make_barriers,
    statement,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, VectorType

TILE_ROWS = 16
SLOTS = 8  # runs of a chunk: one for each token of the matrix unit's tile
CHUNK_COLS = SLOTS * PANEL
MAX_WARPS = 16
MAX_STAGES = 8
MAX_BITS, FEWEST_CODES = 4, 1 << 23  # of a matrix that is worth a ring
LEAST_SIDE_OF_FLOATS = 2560  # of its rows and columns, if scales and minimums are floats
FEWEST_CODES_OF_A_ROW = 1 << 21  # the same for one row, unless scales are bytes
FEWEST_STEPS_OF_A_ROW = 5 << 20  # the same if they are
FEWEST_FLOATS_OF_A_ROW = 20 << 20  # the same of e4m3
BARRIER_BYTES = 256
MIN_WARPS = 7  # that are worth a stage
STAGE_BYTES = 76_000  # that a stage takes at most
RING_BYTES = 100_000  # that a ring takes at most
# Threadgroup memory that a kernel takes at least, so that no two of its threadgroups share a multiprocessor: in a step
# they would start two by two on those that happen to be free, and others would have nothing to do
LEAST_BYTES = (HOPPER_SHARED_BYTES >> 1) + 1024

BULK = (
    f'asm volatile("{{{{{{{{ {ONCE}cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{HINT} '
    f'[%0], [%1], %2, [%3]{POLICY}; }}}}}}}}"'
    ' :: "r"({to}), "l"({source}), "r"({count}), "r"(full) : "memory");'
)
ELECT = (
    'asm volatile("{{{{ .reg .pred is_one;\\nelect.sync _|is_one, 0xffffffff;\\n'
    'selp.u32 %0, 1, 0, is_one; }}}}" : "=r"(one));'
)
# {0}: the threadgroup's number among those with its columns; {1}: its units; {2}: its first part of the columns
FETCH = """auto fetch = [&](int unit) {{{{
  unsigned one;
  {elect}
  if (one && unit < (int)({{1}})) {{{{
    int tile = unit / {parts}, part = unit % {parts};
    long long first = (long long)(tile * {groups} + (int)({{0}})) * {out_tile};
    unsigned full = shared + {barriers} + unit % {stages} * 8, to = shared + unit % {stages} * {stage_bytes};
    unsigned slot = shared + {slots_at} + tile % {slots} * {tile_bytes};
    unsigned bytes = (part == 0 ? {first_bytes} : {bytes}){missing};
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(full), "r"(bytes) : "memory");
{copies}
  }}}}
  __syncwarp();
}}}};
if (threadIdx.y == 0 && threadIdx.x < {stages}) ((int*)(shared_memory + {counts}))[threadIdx.x] = 0;"""
MEET_ALL = 'asm volatile("bar.sync 0;" ::: "memory");'
BEGIN = "if (threadIdx.y == 0) for (int unit = 0; unit < {stages}; unit++) fetch(unit);"
# The warp that is the last to have read a stage fills it again
RELEASE = """{{{{
  int unit = {{0}}, turn = 0;
  __syncwarp();
  if (threadIdx.x == 0) turn = atomicAdd((int*)(shared_memory + {counts}) + unit % {stages}, 1);
  turn = __shfl_sync(0xffffffffu, turn, 0);
  if (turn == {warps} * (unit / {stages} + 1) - 1) fetch(unit + {stages});
}}}}"""
# The warp after the others keeps the ring full. The threads that meet from here on are the others
KEEP_FULL = """if (threadIdx.y == {warps}) {{{{
  for (int unit = 0; unit < (int)({{0}}); unit++) {{{{
    if (unit >= {stages}) {drained}
    int ahead = *((volatile int*)(shared_memory + {counts})) ? {ahead} : {early};
    if (unit >= ahead) {arrived}
    fetch(unit);
  }}}}
  return;
}}}}
#define __syncthreads() asm volatile("bar.sync 1, {threads};" ::: "memory")"""
HURRY = "if (threadIdx.x == 0 && threadIdx.y == 0) *((volatile int*)(shared_memory + {counts})) = 1;"
ARRIVE = (
    "__syncwarp();\nif (threadIdx.x == 0) "
    'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared + {0}) : "memory");'
)
LOAD = "*((%s*)(shared_memory + {0}))"
NAMES: Mapping[DType, str] = {
    dtypes.uint: "unsigned int",
    dtypes.uchar: "unsigned char",
    dtypes.char: "signed char",
    dtypes.ushort: "unsigned short",
    dtypes.half: "half",
    dtypes.float: "float",
}
VECTORS = {4: VectorType(20, 128, "uint4", None), 2: VectorType(21, 64, "uint2", None)}


def number(value: UOp | int) -> UOp:
    """An operand of a statement."""
    return UOp.const(0, I32) + value


@dataclass(frozen=True)
class PlaneCopy:
    """How a plane of a tile is copied: `part_bytes` of each row with every part of the columns, or what is left with
    the last one, `stride` bytes apart; or all of the rows' bytes at once, with the first part (`stride` 0)."""

    dtype: DType
    row_bytes: int
    part_bytes: int
    stride: int

    @property
    def bytes(self) -> int:
        """Bytes of threadgroup memory in a stage, or for a tile."""
        return TILE_ROWS * (self.stride or self.row_bytes)

    @property
    def copied_bytes(self) -> int:
        return TILE_ROWS * (self.part_bytes if self.stride else self.row_bytes)

    def missing_bytes(self, num_parts: int) -> int:
        """How much less of each row the last part has."""
        return num_parts * self.part_bytes - self.row_bytes if self.stride else 0


@dataclass(frozen=True)
class Ring:
    """The shape of a ring: `stages` stages, each with a part of the columns of a tile's rows. `splits` lists of
    threadgroups have `parts` parts each. A tile has 16 rows of the matrix, or 8 each of gate and up."""

    out_rows: int
    is_gated: bool
    copies: tuple[PlaneCopy, ...]
    splits: int
    parts: int
    stages: int
    groups: int  # threadgroups of a split
    warps: int
    teams: int = 1  # of warps, which take the tiles in turn

    @property
    def all_parts(self) -> int:
        """Parts of the columns, of which the last one may have fewer."""
        return self.splits * self.parts

    @property
    def team_warps(self) -> int:
        return self.warps // self.teams

    @property
    def out_tile(self) -> int:
        return TILE_ROWS // 2 if self.is_gated else TILE_ROWS

    @property
    def out_tiles(self) -> int:
        return self.out_rows // self.out_tile

    @property
    def most_tiles(self) -> int:
        """Tiles that a threadgroup has at most."""
        return -(-self.out_tiles // self.groups)

    @property
    def stage_bytes(self) -> int:
        return -(-sum(copy.bytes for copy in self.copies if copy.stride) // 128) * 128

    @property
    def tile_bytes(self) -> int:
        return -(-sum(copy.bytes for copy in self.copies if not copy.stride) // 128) * 128

    @property
    def slots(self) -> int:
        """Tiles whose planes are in memory: a tile's slot is filled again once a stage of a later tile is empty."""
        return -(-(self.stages + self.parts - 1) // self.parts)

    def wanted_stages(self, room: int) -> int:
        """As many as there is room for, but at least two."""
        return max(2, min(MAX_STAGES, room // (self.stage_bytes + self.tile_bytes // self.parts)))

    @property
    def barriers_at(self) -> int:
        return self.stages * self.stage_bytes + self.slots * self.tile_bytes

    @property
    def done_at(self) -> int:
        """Where the barriers begin that say that all warps have stored their sums of a tile."""
        return self.barriers_at + self.stages * 8

    @property
    def counts_at(self) -> int:
        """Where the numbers of warps begin that have read a stage."""
        return self.barriers_at + self.stages * 16

    @property
    def bytes(self) -> int:
        return self.barriers_at + BARRIER_BYTES

    @property
    def is_possible(self) -> bool:
        piece = TILE_ROWS // 2 if self.is_gated else TILE_ROWS
        fits = [
            (math.gcd(copy.part_bytes, copy.row_bytes) if copy.stride else piece * copy.row_bytes) % 16 == 0
            and copy.row_bytes % 2 == 0
            for copy in self.copies
        ]
        return 2 <= self.stages <= MAX_STAGES and all(fits)

    def place_of(self, index: int, slot: UOp, tile: UOp) -> UOp:
        """Where a plane begins, in a stage, for the number of a tile."""
        before = self.copies[:index]
        if self.copies[index].stride:
            return slot * self.stage_bytes + sum(copy.bytes for copy in before if copy.stride)
        first = self.stages * self.stage_bytes + sum(copy.bytes for copy in before if not copy.stride)
        return tile % self.slots * self.tile_bytes + first


def plane_copies(
    planes: Sequence[tuple[DType, float]], fmt: Format, num_cols: int, part_cols: int, *, by_words: bool
) -> tuple[PlaneCopy, ...]:
    """`planes`: the dtype and the bytes of a column of each. A copy of a few kilobytes costs the copy engine as much as
    one of a few bytes, so planes are copied whole where lanes may read them: scales, whose rows lie in the same banks,
    but are small, and codes of whole rows, unless lanes read them `by_words`. The rows of other codes are placed so
    that lanes read different banks."""
    found = []
    for i, (dtype, size) in enumerate(planes):
        row, part = int(size * num_cols), int(size * part_cols)
        is_code = i <= (high_bits(fmt) > 0)
        is_whole = not is_code or (part == row and not by_words)
        pad = 64 if i == 0 and fmt.bits < 8 and not by_words else 16
        found.append(PlaneCopy(dtype, row, part, 0 if is_whole else -(-part // 128) * 128 + pad))
    return tuple(found)


@dataclass(frozen=True)
class Stage:
    """A stage that has arrived: its place, the number of its tile in the threadgroup, the part of the columns."""

    slot: UOp
    tile: UOp
    part: UOp | int
    waited: UOp


class SharedPlane(PlaneReader):
    """A plane in dynamic threadgroup memory, from a byte on, to be read after a statement."""

    def __init__(self, dtype: DType, place: UOp, after: UOp) -> None:
        self.dtype, self.place, self.after = dtype, place, after

    def at(self, index: UOp | int) -> UOp:
        place = number(self.place + index * self.dtype.itemsize)
        return UOp(Ops.CUSTOM, self.dtype, src=(place, self.after), arg=LOAD % NAMES[self.dtype])

    def words(self, index: UOp | int, count: int) -> list[UOp]:
        """Neighboring words, whose first is at a multiple of `count` (up to four)."""
        width = next(width for width in (4, 2, 1) if count % width == 0)
        found: list[UOp] = []
        while len(found) < count:
            place = number(self.place + (index + len(found)) * 4)
            if width == 1:
                found.append(UOp(Ops.CUSTOM, U32, src=(place, self.after), arg=LOAD % NAMES[U32]))
                continue
            kind = VECTORS[width]
            loaded = UOp(Ops.CUSTOM, kind, src=(place, self.after), arg=LOAD % kind.name)
            found += [UOp(Ops.CUSTOMI, U32, src=(loaded,), arg=f"{{0}}.{name}") for name in "xyzw"[:width]]
        return found


class RingWalk:
    """A threadgroup's way along its tiles: `number` is its own among those of its split."""

    def __init__(
        self,
        ring: Ring,
        fmt: Format,
        body: Body,
        number_: UOp,
        split: UOp | int,
        planes: Sequence[UOp],
        total: int,
        ahead: tuple[int, int] | None = None,
        team: UOp | int = 0,
    ) -> None:
        """`total`: bytes of dynamic threadgroup memory. `ahead`: if given, the threadgroup has one more warp, which
        does nothing but fetch, with so many stages on their way before `hurry`, and after it. `team`: of the warp."""
        self.ring, self.format, self.body, self.split, self.team = ring, fmt, body, split, team
        tiles, groups = ring.out_tiles, ring.groups
        # how many tiles it has
        self.tiles: UOp | int = tiles // groups if tiles % groups == 0 else (tiles - 1 - number_) // groups + 1
        units = number(self.tiles * ring.parts)
        memory = declare(total)
        text = FETCH.format(
            elect=ELECT,
            parts=ring.parts,
            groups=groups,
            out_tile=ring.out_tile,
            stages=ring.stages,
            stage_bytes=ring.stage_bytes,
            slots=ring.slots,
            slots_at=ring.stages * ring.stage_bytes,
            tile_bytes=ring.tile_bytes,
            barriers=ring.barriers_at,
            counts=ring.counts_at,
            bytes=sum(copy.copied_bytes for copy in ring.copies if copy.stride),
            missing=self._if_last(TILE_ROWS * sum(copy.missing_bytes(ring.all_parts) for copy in ring.copies)),
            first_bytes=sum(copy.copied_bytes for copy in ring.copies),
            copies="\n".join(self._copies()),
        )
        first_part = number(split * ring.parts)
        fetch = statement(text, number(number_), units, first_part, *[plane[0] for plane in planes], memory)
        barriers = make_barriers(ring.barriers_at, ring.stages, 1, ring.team_warps, memory)
        ready = statement(MEET_ALL, fetch, barriers)
        self._has_fetcher = ahead is not None
        if ahead is not None:
            self.begun = statement(self._keep_full(ahead), units, ready)
        else:
            self.begun = statement(BEGIN.format(stages=ring.stages), ready)

    def _keep_full(self, ahead: tuple[int, int]) -> str:
        ring = self.ring
        drained = f"shared + {ring.done_at} + unit % {ring.stages} * 8", f"(unit / {ring.stages} - 1) & 1"
        before = "(unit - ahead)"
        arrived = f"shared + {ring.barriers_at} + {before} % {ring.stages} * 8", f"{before} / {ring.stages} & 1"
        waits = [WAIT_AT.format(*one).replace("{", "{{").replace("}", "}}") for one in (drained, arrived)]
        return KEEP_FULL.format(
            warps=ring.warps,
            stages=ring.stages,
            early=ahead[0],
            ahead=ahead[1],
            counts=ring.counts_at,
            drained=waits[0],
            arrived=waits[1],
            threads=ring.warps * LANES,
        )

    def hurry(self, after: Sequence[UOp]) -> UOp:
        """Let as many stages be on their way as are wanted, after some loads: these would wait for what is fetched
        before."""
        self.begun = statement(HURRY.format(counts=self.ring.counts_at), self.begun, *after)
        return self.begun

    def _copies(self) -> list[str]:
        ring, lines, at, tile_at = self.ring, [], 0, 0
        pieces = 2 if ring.is_gated else 1
        for i, copy in enumerate(ring.copies):
            source = f"(const char*)({{{i + 3}}})"
            if copy.stride:
                own = f"(row & 7) + (row >> 3) * {ring.out_rows}" if ring.is_gated else "row"
                to = f"to + {at} + row * {copy.stride}"
                source += f" + (first + {own}) * {copy.row_bytes} + (part + {{2}}) * {copy.part_bytes}"
                lines.append(f"    #pragma unroll\n    for (int row = 0; row < {TILE_ROWS}; row++)")
                count = f"{copy.part_bytes}{self._if_last(copy.missing_bytes(ring.all_parts))}"
                lines.append("      " + BULK.format(to=to, source=source, count=count))
                at += copy.bytes
                continue
            size = copy.copied_bytes // pieces
            for piece in range(pieces):
                rows = f" + (first + {piece * ring.out_rows}) * {copy.row_bytes}"
                to = f"slot + {tile_at + piece * size}"
                lines.append("    if (part == 0) " + BULK.format(to=to, source=source + rows, count=size))
            tile_at += copy.bytes
        return lines

    def _if_last(self, missing: int) -> str:
        """What is subtracted from a number of bytes, in the source: those that the last part has not."""
        return f" - (part + (int)({{2}}) == {self.ring.all_parts - 1} ? {missing} : 0)" if missing else ""

    def loop(self) -> tuple[UOp | None, UOp | int]:
        """A loop over the tiles of the warp's team, if there are several, and the tile's number in it."""
        if self.ring.teams > 1:
            turns = number((self.tiles - self.team + self.ring.teams - 1) // self.ring.teams)
            loop = self.body.fold_while(hidden(turns))  # there may be only one
            return loop, loop.cast(dtypes.weakint) * self.ring.teams + self.team
        if isinstance(self.tiles, int):
            loop = self.body.fold(self.tiles) if self.tiles > 1 else None
            return loop, 0 if loop is None else loop
        loop = self.body.fold_while(self.tiles)
        return loop, loop.cast(dtypes.weakint)

    def step(
        self, tile: UOp | int, part: UOp | int, old: list[UOp], add: Callable[[Stage], list[UOp]], *after: UOp
    ) -> list[UOp]:
        """A lane's sums after a stage; `add` computes them. The stage is released, and one before it refilled."""
        ring = self.ring
        unit = number(tile * ring.parts + part)
        slot = unit % ring.stages
        full = slot * 8 + ring.barriers_at
        waited = wait(full, unit // ring.stages % 2, self.begun, *after, *old)
        new = add(Stage(slot, number(tile), part, waited))
        if self._has_fetcher:
            released = statement(ARRIVE, slot * 8 + ring.done_at, *new)
        else:
            text = RELEASE.format(counts=ring.counts_at, stages=ring.stages, warps=ring.warps)
            released = statement(text, unit, *new)
        return [UOp(Ops.CUSTOM, F32, src=(value, released), arg="{0}") for value in new]

    def planes(self, stage: Stage, row: UOp) -> Planes:
        """The planes of one of a stage's rows, from the first column of the part on."""
        found = []
        for i, copy in enumerate(self.ring.copies):
            place = self.ring.place_of(i, stage.slot, stage.tile) + row * (copy.stride or copy.row_bytes)
            if not copy.stride:
                place = place + (stage.part + self.split * self.ring.parts) * copy.part_bytes
            found.append(SharedPlane(copy.dtype, place, stage.waited))
        return Planes(self.format, found)


def wanted_parts(planes: Sequence[tuple[DType, float]], num_cols: int) -> int:
    """The fewest parts of so many columns of which a stage takes at most STAGE_BYTES; if none has whole chunks for
    MIN_WARPS warps, the most that do."""
    chunks, best = num_cols // CHUNK_COLS, 1
    row_bytes = sum(size for _, size in planes) * num_cols
    for parts in (parts for parts in range(1, chunks + 1) if chunks % parts == 0):
        if chunks // parts < MIN_WARPS:
            break
        best = parts
        if TILE_ROWS * row_bytes / parts <= STAGE_BYTES:
            break
    return best


def is_worth_streaming_row(fmt: Format, num_rows: int, num_cols: int) -> bool:
    """Whether one row's product is faster with a ring than with loads into registers: where a multiprocessor has some
    tiles, and each of the fewest warps a chunk.

    NVIDIA H200, a step: 8B in MLX's 4 bits 1,609 us instead of 1,899 (1,620 with attention_out, 4,096 rows of 4,096
    columns), in Q6_K (8 layers) 618 instead of 915, in Q8_0 (8 layers) 670 instead of 715. 1B in Q4_0, whose matrices
    have 4 to 34 million codes: 363 instead of 394 (375 with those of 8 million codes and more, 395 with 25).
    8B in FP8 (8 layers): 627 instead of 692 (633 with attention_out). In Q4_K, whose scales are in steps of a byte: 1B
    (8 layers) 187.8 with qkv of 6.3 million codes, 189.8 without, 189.4 with attention_out of 4.2 million as well;
    gemma-3-4b (7 layers) 336 with attention_out of 5.2 million, 344 without."""
    if fmt.is_float8:
        return num_cols >= MIN_WARPS * CHUNK_COLS and num_rows * num_cols >= FEWEST_FLOATS_OF_A_ROW
    if fmt.scale is not None and fmt.scale.has_steps:
        return num_rows * num_cols >= FEWEST_STEPS_OF_A_ROW
    return num_cols >= MIN_WARPS * CHUNK_COLS and num_rows * num_cols >= FEWEST_CODES_OF_A_ROW


def is_worth_streaming(fmt: Format, num_rows: int, num_cols: int) -> bool:
    """Whether a product of a few rows is faster with a ring than with loads into registers: of codes up to 4 bits with
    minimums, whose scales and minimums are many small loads, where a multiprocessor has some tiles. Without steps of a
    byte (MLX), matrices must have large sides as well.

    NVIDIA H200, 8B in MLX's 4 bits, a step with 4 layers: 368 us instead of 408 at 8 rows, 346 instead of 365 at 3.
    Phi-4-mini, whose smallest matrix has 3,072 rows and columns, 267 instead of 311 at 8 rows; Qwen3-4B (2,560 columns)
    244 instead of 249. 1B with 6 layers: 236 instead of 219."""
    if fmt.minimum is None or fmt.bits > MAX_BITS:
        return False
    is_large = fmt.minimum.has_steps or min(num_rows, num_cols) >= LEAST_SIDE_OF_FLOATS
    return is_large and num_rows * num_cols >= FEWEST_CODES


def wanted_warps(chunks: int) -> int:
    """Warps that share so many chunks: as many as there can be whose shares are equal, but for the last one's."""
    return -(-chunks // -(-chunks // MAX_WARPS))


def chunks_of_warp(
    chunks: int,
    num_warps: int,
    warp: UOp | int,
    old: list[UOp],
    add: Callable[[UOp | int, list[UOp]], list[UOp]],
    existing: UOp | None = None,
) -> list[UOp]:
    """A lane's sums after its warp's share of a stage's chunks, each of which `add` adds. `existing`: how many of them
    there are, if the last part has fewer."""
    share = -(-chunks // num_warps)
    new = old
    for i in range(share):
        local = warp * share + i
        if existing is None and share * num_warps == chunks:
            new = add(local, new)
            continue
        inside = number(local) < (chunks if existing is None else existing)
        added = add(inside.where(local, 0), new)
        new = [inside.where(value, before) for value, before in zip(added, new, strict=True)]
    return new
