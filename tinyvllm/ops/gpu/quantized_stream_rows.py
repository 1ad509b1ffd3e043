"""A few token rows (2 to 8) times a quantized matrix on Hopper: codes stream through threadgroup memory.

All warps multiply each stage: they split its columns into chunks of 256. Each group of columns has sums of its own,
which are multiplied by the group's scale: for so few rows, that takes fewer instructions than scaling the weights.
Minimums of 16 bits times the sums of x over the groups are a product as well, of a few columns: in tf32, in which they
are exact, and sums have two parts. Minimums in steps of a byte (K quants) are multiplied one by one: 1 % faster.
The warps' sums of a tile are added up through threadgroup memory while the next tile is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import PANEL
from tinyvllm.ops.formats.pairs import code_order, pair_forms, read_quarter
from tinyvllm.ops.formats.runs import groups_in_run
from tinyvllm.ops.gpu.chunk_scales import ChunkScales, Scaled
from tinyvllm.ops.gpu.plane_ring import (
    ARRIVE,
    CHUNK_COLS,
    LEAST_BYTES,
    MAX_WARPS,
    RING_BYTES,
    SLOTS,
    STAGE_BYTES,
    TILE_ROWS,
    Ring,
    RingWalk,
    SharedPlane,
    Stage,
    chunks_of_warp,
    number,
    plane_copies,
    wanted_parts,
    wanted_warps,
)
from tinyvllm.ops.gpu.product import PackedProductSpec
from tinyvllm.ops.gpu.quantized_vector import RowPlace
from tinyvllm.ops.kernel.body import F16, F32, I32, U32, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, MULTIPROCESSORS, statement, wait
from tinyvllm.ops.kernel.lanes import (
    LANES,
    await_previous,
    axes_of,
    carry,
    grid,
    multiply_tf32,
    warps,
    zeros,
)

TOKENS = 8  # of a tile of the matrix unit
MAX_TOKENS = 8
PAIRED_BYTES = 112 << 10  # of threadgroup memory, of which two threadgroups fit on a multiprocessor
FEW_ROWS, FEW_BYTES, MANY_BYTES = 8192, 60 << 10, 136 << 10
PIECE = 8  # sums of a tile that a warp adds up at once, each by four lanes
PIECE_LANES, PIECE_MASKS = LANES // PIECE, (8, 16)
TERMS = 8  # columns of a product in tf32
SEEN_BITS = 0xFFFFE000  # of a float32 in tf32
EXACT_SCALES = ("float16", "bfloat16")  # in tf32
KEEP = "if ({0}) *((float*)(shared_memory + {1})) = {2};"
KEEP_TWO = "*((float2*)(shared_memory + {0})) = make_float2({1}, {2});"
STORE_TWO = "if ({0}) *((uint2*)(shared_memory + {1})) = make_uint2({2}, {3});"
PERMUTE = "__byte_perm({0}, {1}, %#x)"


@dataclass(frozen=True, kw_only=True)
class StreamedMatrixSpec(PackedProductSpec):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up, T up to 8."""

    @property
    def groups(self) -> int:
        return groups_in_run(self.format)

    @property
    def splits(self) -> int:
        """S: so many that x fits into threadgroup memory beside the ring. Of few rows, so many that staging x does not
        take longer than the codes (NVIDIA H200, 8 tokens and 4,096 columns in Q4_K: two splits take 8.6 to 7.8 us for
        6,144 rows, and 7.1 to 5.9 for 4,096). Equal ones if there are, otherwise the last one has fewer chunks (a step
        of qwen2.5-7b in Q4_K with 4 layers: 5 splits of down's 74 chunks 413 us, 4 or 8 splits 422)."""
        most, size = FEW_BYTES if self.num_rows <= FEW_ROWS else MANY_BYTES, self.num_tokens * self.num_cols * 2
        counts = (1,) if self.is_gated else sorted(range(1, 9), key=lambda s: (self.chunks % s > 0, s))
        fitting = (s for s in counts if size // s <= most and self._has_stages(s))
        return self.knob("splits", next(fitting, counts[-1]))

    def _has_stages(self, splits: int) -> bool:
        """Whether the columns of so many splits have parts that are not too large for a stage."""
        cols = -(-self.chunks // splits) * CHUNK_COLS
        size = TILE_ROWS * sum(size for _, size in self.planes) * cols
        return size <= STAGE_BYTES * wanted_parts(self.planes, cols)

    @property
    def chunks(self) -> int:
        return self.num_cols // CHUNK_COLS

    @property
    def has_one_chunk(self) -> bool:
        """Whether a warp's only chunk of x stays in registers. Others would fill them if they were read before the
        loop over tiles."""
        return self.parts == 1 and self.warps == self.part_chunks and self.token_tiles == 1

    @property
    def token_tiles(self) -> int:
        return -(-self.num_tokens // TOKENS)

    @property
    def held_tokens(self) -> int:
        """Tokens of all tiles."""
        return self.token_tiles * TOKENS

    @property
    def split_cols(self) -> int:
        """Columns of a split; the last one may have fewer."""
        return self.part_chunks * self.parts * CHUNK_COLS

    @property
    def parts(self) -> int:
        """Parts of the columns: enough for a ring beside x."""
        chunks = -(-self.chunks // self.splits)
        parts = wanted_parts(self.planes, chunks * CHUNK_COLS)
        if "parts" in dict(self.chosen):
            return self.knob("parts", parts)
        for more in range(parts, chunks // 2 + 1):
            turned = replace(self, chosen=(*self.chosen, ("parts", more)))
            if chunks % more == 0 and turned.dynamic_bytes <= HOPPER_SHARED_BYTES:
                return more
        return parts

    @property
    def part_chunks(self) -> int:
        """Chunks of a part; the last one of all may have fewer."""
        return -(-self.chunks // (self.splits * self.parts))

    @property
    def last_chunks(self) -> int:
        return self.chunks - (self.splits * self.parts - 1) * self.part_chunks

    @property
    def warps(self) -> int:
        return self.knob("warps", wanted_warps(self.part_chunks))

    @property
    def stages(self) -> int:
        return self.ring.stages

    @cached_property
    def ring(self) -> Ring:
        tiles = self.out_rows // (TILE_ROWS // 2 if self.is_gated else TILE_ROWS)
        part_cols = self.part_chunks * CHUNK_COLS
        ring = Ring(
            out_rows=self.out_rows,
            is_gated=self.is_gated,
            copies=plane_copies(self.planes, self.format, self.num_cols, part_cols, by_words=True),
            splits=self.splits,
            parts=self.parts,
            stages=1,
            groups=min(tiles, MULTIPROCESSORS // self.splits),
            warps=self.warps,
        )
        room = min(RING_BYTES, PAIRED_BYTES - self._fixed_bytes)
        return replace(ring, stages=self.knob("stages", ring.wanted_stages(room)))

    @property
    def token_bytes(self) -> int:
        """From one token's x to the next one's, in threadgroup memory: two tokens' words lie in different banks."""
        return self.split_cols * 2 + 64

    @property
    def _fixed_bytes(self) -> int:
        """Dynamic threadgroup memory besides the ring."""
        per_token = self.token_bytes + self.split_cols // PANEL * self.groups * 12
        return self.held_tokens * per_token + 2 * self.partial_bytes

    @property
    def sums_at(self) -> int:
        """Where x's sums over groups begin, after x."""
        return self.ring.bytes + self.num_tokens * self.token_bytes

    @property
    def starts_at(self) -> int:
        """Where the sums' starts begin: four floats for each group and two tokens, as a lane holds them."""
        return self.sums_at + self.split_cols // PANEL * self.groups * self.held_tokens * 4

    @property
    def partials_at(self) -> int:
        return self.starts_at + self.split_cols // PANEL * self.groups * self.held_tokens * 8

    @property
    def partial_bytes(self) -> int:
        """Of the warps' sums of a tile."""
        return self.warps * self.partial_stride * 4

    @property
    def partial_stride(self) -> int:
        """From one warp's sums of a tile to the next one's: lanes that add up those of four warps read different
        banks."""
        return TILE_ROWS * self.held_tokens + PIECE

    @property
    def dynamic_bytes(self) -> int:
        return max(LEAST_BYTES, self.partials_at + 2 * self.partial_bytes)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        splits = () if self.is_gated else (1, 2, 4, 5)
        return {"splits": splits, "parts": (1, 2, 4, 7), "warps": (4, 8, 16), "stages": (2, 3, 4, 6)}

    def is_possible(self) -> bool:
        return (
            self.num_tokens <= MAX_TOKENS
            and self.num_cols % CHUNK_COLS == 0
            and self.last_chunks > 0
            and 1 < self.warps <= min(MAX_WARPS, self.part_chunks)
            and self.out_rows % TILE_ROWS == 0
            and self.format.grid is None
            and self.mma.dtype == F16
            and self.ring.is_possible
            and self.dynamic_bytes <= HOPPER_SHARED_BYTES
        )

    @property
    def weighs_minimums(self) -> bool:
        """Whether minimums are multiplied by the matrix unit, in tf32."""
        form = self.format.minimum
        return form is not None and not form.has_steps and form.dtype in EXACT_SCALES


@cached_kernel
def streamed_matrix_kernel(spec: StreamedMatrixSpec) -> KernelFn:
    """fn(out, *planes, x): see StreamedMatrixSpec."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        *planes, x = operands
        body = Body()
        split, group, lane = grid(body, spec.splits), body.grid(spec.ring.groups), body.threads(LANES)
        place = RowPlace(body, 0, group, lane, warps(body, spec.warps))
        walk = RingWalk(spec.ring, spec.format, body, group, split, planes, spec.dynamic_bytes)
        (x,) = await_previous(spec.lanes, x, ahead=[walk.begun])
        rows = _StreamedRows(spec, place, walk, split)
        end = rows.multiply(rows.stage(x), out)
        size = spec.num_rows * spec.num_cols
        return finish(
            end.end(*reversed(axes_of(split, group, lane, place.warp))),
            f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}",
            ops=2 * spec.num_tokens * size,
            nbytes=int(size * spec.format.code_bits / 8),
        )

    return kernel


class _StreamedRows:
    """Several rows' product."""

    def __init__(self, spec: StreamedMatrixSpec, place: RowPlace, walk: RingWalk, split: UOp | int) -> None:
        self.spec, self.place, self.walk, self.split = spec, place, walk, split

    def stage(self, x: UOp) -> UOp:
        """Put x into threadgroup memory, run by run in the order of the codes, and its sums over groups."""
        spec, place = self.spec, self.place
        threads, pieces = spec.warps * LANES, spec.split_cols // 8
        stores = []
        for start in range(0, spec.num_tokens * pieces, threads):
            index = place.thread + start
            inside = index < spec.num_tokens * pieces
            if spec.last_chunks < spec.part_chunks:
                inside &= self.split * spec.split_cols + index % pieces * 8 < spec.num_cols
            index = inside.where(index, 0)
            token, piece = index // pieces, index % pieces
            words = spec.mma.load_pairs(x, token * spec.num_cols + self.split * spec.split_cols + piece * 8, 8)
            part, run = piece % 4, piece // 4
            at = spec.ring.bytes + token * spec.token_bytes + run * 64 + part // 2 * 8 + part % 2 * 32
            halves: list[UOp] = []
            for i in range(2):
                pair = words[2 * i : 2 * i + 2]
                stores.append(statement(STORE_TWO, inside, number(at + 16 * i), *self._in_order(pair)))
                halves += [
                    bits.cast(dtypes.ushort).bitcast(F16).cast(F32)
                    for word in pair
                    for bits in (word & 0xFFFF, word >> 16)
                ]
            stores += self._store_sums(inside, token, piece, spec.lanes.sum(balanced(halves), (1,)))
        return UOp(Ops.BARRIER, src=tuple(stores))

    def _in_order(self, pair: list[UOp]) -> list[UOp]:
        """Four neighbors of x in the order of the codes."""
        if code_order(self.spec.format, self.spec.mma) == (0, 1, 2, 3):
            return pair
        return [UOp(Ops.CUSTOM, U32, src=tuple(pair), arg=PERMUTE % selector) for selector in (0x5410, 0x7632)]

    def _store_sums(self, inside: UOp, token: UOp, piece: UOp, own: UOp) -> list[UOp]:
        """Stores of the sums of x over the groups of a run, and of what the products start from. `own`: the sum over
        the thread's half of the run."""
        spec, run, is_second = self.spec, piece // 4, (piece % 4) // 2
        forms, other = pair_forms(spec.format, spec.mma), spec.lanes.shuffle(own, 2)
        first = [-form.start for form in forms]
        if spec.groups == 1:
            group, is_first, total = run, (piece % 4).eq(0), own + other
            start = own * first[0] + other * first[1]
        else:
            group, is_first, total = run * 2 + is_second, (piece % 2).eq(0), own
            start = own * is_second.eq(0).where(UOp.const(first[0], F32), first[1])
        is_first = is_first & inside
        stores = [statement(KEEP, is_first, number(spec.sums_at + (group * spec.held_tokens + token) * 4), total)]
        at = spec.starts_at + (group * (spec.held_tokens // 2) + token // 2) * 16 + token % 2 * 4
        return stores + [statement(KEEP, is_first, number(at + 8 * i), start) for i in range(2)]

    def multiply(self, staged: UOp, out: UOp) -> UOp:
        spec, place = self.spec, self.place
        loop, tile = self.walk.loop()
        outer = place.axes if loop is None else (*place.axes, loop)
        outer = (*outer, *axes_of(self.split))

        def step(part: UOp | int, old: list[UOp]) -> list[UOp]:
            return self.walk.step(tile, part, old, lambda stage: self._add(stage, staged, old), staged)

        totals = carry(place.body, zeros(4 * spec.token_tiles), spec.parts, outer, step)
        first = spec.partials_at + number(tile) % 2 * spec.partial_bytes
        kept = []
        for i in range(0, len(totals), 2):
            row, token = place.lane // 4 + i // 2 % 2 * 8, i // 4 * TOKENS + place.lane % 4 * 2
            at = first + (place.warp * spec.partial_stride + row * spec.held_tokens + token) * 4
            kept.append(statement(KEEP_TWO, number(at), *totals[i : i + 2]))
        if loop is not None:  # otherwise there is no tile before
            before = number(tile) - 1
            stored = self._store(out, before, self._wait(before, *totals), before >= 0)
            kept = [statement(KEEP_TWO, *kept_two.src, *stored) for kept_two in kept]
        arrived = statement(ARRIVE, spec.ring.done_at + number(tile) % 2 * 8, *kept)
        end = arrived if loop is None else arrived.end(loop)
        last = number(self.walk.tiles) - 1
        return UOp.group(*self._store(out, last, self._wait(last, end), None))

    def _wait(self, tile: UOp, *after: UOp) -> UOp:
        """Until all warps have stored their sums of a tile. There is no tile before the first: no wait."""
        return wait(self.spec.ring.done_at + (tile + 2) % 2 * 8, (tile + 4) // 2 % 2, *after)

    def _add(self, stage: Stage, staged: UOp, old: list[UOp]) -> list[UOp]:
        spec = self.spec

        def add(local: UOp, before: list[UOp]) -> list[UOp]:
            return self._add_chunk(stage, staged, local, local + stage.part * spec.part_chunks, before)

        existing = None
        if spec.last_chunks < spec.part_chunks:
            is_last = number(stage.part + self.split * spec.parts).eq(spec.splits * spec.parts - 1)
            existing = is_last.where(UOp.const(spec.last_chunks, I32), spec.part_chunks)
        return chunks_of_warp(spec.part_chunks, spec.warps, self.place.warp, old, add, existing)

    def _add_chunk(self, stage: Stage, staged: UOp, local: UOp, chunk: UOp, old: list[UOp]) -> list[UOp]:
        """A lane's sums after a chunk: by its two rows, two tokens each."""
        spec, lane = self.spec, self.place.lane
        rows = [self.walk.planes(stage, lane // 4 + 8 * half) for half in range(2)]
        form = pair_forms(spec.format, spec.mma)[0]
        scales = [ChunkScales(planes.scale, spec.format, local, form.unit) for planes in rows]
        minima = [ChunkScales(planes.minimum, spec.format, local) for planes in rows if planes.minimum is not None]
        single = [] if spec.weighs_minimums else minima  # multiplied one by one
        scaled = [Scaled(scales[i // 2 % 2]) for i in range(len(old))]
        shifted = [Scaled((single or scales)[i // 2 % 2]) for i in range(len(old))]
        for run in range(SLOTS):
            codes = [read_quarter(planes, local * SLOTS + run, lane % 4, spec.mma) for planes in rows]
            for tile in range(spec.token_tiles):
                x = _TileOfX(spec, stage, staged, lane, tile, chunk * SLOTS + run)
                for g in range(spec.groups):
                    cut = slice(g * 4 // spec.groups, (g + 1) * 4 // spec.groups)
                    start = x.starts(g) if form.excess else zeros(4)
                    acc = spec.mma.multiply_words(
                        self.place.body, [words[cut] for words in codes], [x.words[cut]], start
                    )
                    for e, value in enumerate(acc):
                        scaled[4 * tile + e].add(value, scales[e // 2].of_run(run, g))
                        if single:
                            shifted[4 * tile + e].add(x.sums(g)[e % 2], single[e // 2].of_run(run, g))
        new = [shifted[i].added_to(scaled[i].added_to(value)) for i, value in enumerate(old)]
        return self._add_minima(minima, stage, staged, chunk, new) if spec.weighs_minimums else new

    def _add_minima(
        self, minima: Sequence[ChunkScales], stage: Stage, staged: UOp, chunk: UOp, old: list[UOp]
    ) -> list[UOp]:
        """A lane's sums after a chunk's minimums, of its two rows, times sums of x over the groups."""
        spec, lane, new = self.spec, self.place.lane, list(old)
        sums = SharedPlane(F32, UOp.const(spec.sums_at, I32), staged if spec.has_one_chunk else stage.waited)
        count = SLOTS * spec.groups
        for tile in range(spec.token_tiles):
            products = zeros(4)
            for first in range(0, count, TERMS):
                columns = [lane % 4 + first + half for half in (0, TERMS // 2)]
                groups = [column * (PANEL // spec.groups) // spec.format.group for column in columns]
                weights = [[minimum.at_group(group).bitcast(U32) for group in groups] for minimum in minima]
                values = [
                    sums.at((chunk * count + column) * spec.held_tokens + tile * TOKENS + lane // 4)
                    for column in columns
                ]
                upper = [value.bitcast(U32) & SEEN_BITS for value in values]
                lower = [(v - high.bitcast(F32)).bitcast(U32) for v, high in zip(values, upper, strict=True)]
                for right in (upper, lower):
                    products = multiply_tf32(self.place.body, weights, right, products)
            for e, product in enumerate(products):
                total = Scaled(minima[e // 2])
                total.add_weighed(product)
                new[4 * tile + e] = total.added_to(new[4 * tile + e])
        return new

    def _store(self, out: UOp, tile: UOp, kept: UOp, exists: UOp | None) -> list[UOp]:
        """Add up the warps' sums of a tile: a warp adds eight neighbors, with four lanes for each."""
        spec, place, ring, stores = self.spec, self.place, self.spec.ring, []
        pieces = ring.out_tile * spec.held_tokens // PIECE
        for start in range(0, pieces, spec.warps):
            piece = number(place.warp) + start
            is_own = piece < pieces
            at = is_own.where(piece, 0) * PIECE + place.lane % PIECE
            row, token = at // spec.held_tokens, at % spec.held_tokens
            value = self._total(tile, row, token, kept)
            if spec.activation is not None:
                up = self._total(tile, row + ring.out_tile, token, kept)
                (value,) = gated(spec.activation, [value], [up])
            target = (tile.maximum(0) * ring.groups + place.group) * ring.out_tile + row
            inside = is_own & (place.lane < PIECE) & (token < spec.num_tokens)
            inside = inside if exists is None else inside & exists
            token = token.minimum(spec.num_tokens - 1)
            to = (self.split * spec.num_tokens + token) * spec.out_rows + target
            stores.append(out[to.valid(inside)].store(value.cast(out.dtype)))
        return stores

    def _total(self, tile: UOp, row: UOp, token: UOp, kept: UOp) -> UOp:
        """The sum of a tile's row for a token over the warps, of which each of four lanes adds some."""
        spec, values = self.spec, []
        sums = SharedPlane(F32, spec.partials_at + (tile + 2) % 2 * spec.partial_bytes, kept)
        for first in range(0, spec.warps, PIECE_LANES):
            warp = self.place.lane // PIECE + first
            at = warp * spec.partial_stride + row * spec.held_tokens + token
            if first + PIECE_LANES <= spec.warps:
                values.append(sums.at(at))
            else:
                value = sums.at((warp < spec.warps).where(at, 0))
                values.append((warp < spec.warps).where(value, 0.0))
        return spec.lanes.sum(balanced(values), PIECE_MASKS)


class _TileOfX:
    """What a lane reads of x for a run and a tile of tokens: its words, and for its two tokens the sums over groups and
    what the products start from."""

    def __init__(self, spec: StreamedMatrixSpec, stage: Stage, staged: UOp, lane: UOp, tile: int, run: UOp) -> None:
        self.spec, self.run, self.first_token = spec, run, tile * TOKENS + lane % 4 * 2
        token = (tile * TOKENS + lane // 4).minimum(spec.num_tokens - 1)
        x = SharedPlane(
            U32, number(spec.ring.bytes + token * spec.token_bytes), staged if spec.has_one_chunk else stage.waited
        )
        self.words = x.words(run * (PANEL // 2) + lane % 4 * 4, 4)
        self._sums, self._starts = (
            SharedPlane(U32, UOp.const(at, I32), stage.waited) for at in (spec.sums_at, spec.starts_at)
        )

    def sums(self, group: int) -> list[UOp]:
        at = (self.run * self.spec.groups + group) * self.spec.held_tokens + self.first_token
        return [word.bitcast(F32) for word in self._sums.words(at, 2)]

    def starts(self, group: int) -> list[UOp]:
        """By the lane's elements of a tile."""
        at = (self.run * self.spec.groups + group) * (self.spec.held_tokens // 2) + self.first_token // 2
        return [word.bitcast(F32) for word in self._starts.words(at * 4, 4)]
