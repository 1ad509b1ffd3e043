"""One token row times a quantized matrix without converting codes to weights, on CUDA on the matrix unit.

Unpacking dominates the cost of such a product: 4-bit codes arrive from memory faster than a GPU converts them one by
one. So two codes at a time become two float16 values by an instruction or two (pairs.py), such as 1024 + code, and the
matrix unit multiplies them and adds them up in float32. What 1024 and the format's offset contribute to a group of
columns is a multiple of the sum of x over the group, the same for every row: the sums start from its negative.

x is converted to float16. Where it may exceed float16's range (`rescales_input`), it is divided by its RMS first, which
leaves at most sqrt(K), and the finished sums are multiplied by the RMS.

The sum of a group must not mix with those of other groups before it is scaled. A tile of the matrix unit has 8 tokens,
but there is only one token here: in token n of the tile, x is kept for the runs of slot n, and is zero elsewhere. Then
each column of the tile's sums belongs to one run.

METAL's matrix unit is its ordinary arithmetic, on which the seven other tokens would cost as much as the one. There a
lane multiplies the codes of its two rows with x itself (`has_products`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.formats.matrix import PANEL, Planes, high_bits
from tinyvllm.ops.formats.pairs import code_order, pair_form, read_pairs
from tinyvllm.ops.formats.runs import CodeForm, aligned_planes, group_of, group_scale, groups_in_run
from tinyvllm.ops.gpu.attention_split import SplitOperands
from tinyvllm.ops.gpu.chosen import ChosenExperts, ChosenRows
from tinyvllm.ops.gpu.vector import RowOperands, RowProductSpec
from tinyvllm.ops.kernel.body import F16, F32, U32, Body, KernelFn, balanced, cached_kernel
from tinyvllm.ops.kernel.lanes import (
    LANES,
    METAL_WARPS,
    WORDS,
    Mma,
    axes_of,
    carry,
    dot,
    floats_of_vectors,
    grid,
    load_cuda_floats,
    load_cuda_vectors,
    load_floats,
    used_after,
    warps,
    zeros,
)
from tinyvllm.ops.kernel.tiles import join_bits
from tinyvllm.ops.kernel.tuning import Tunable

PIECE = 8  # columns that a thread stages at once
MAX_WARPS = 16
MOST_RESIDENT_TILES = 2
RESIDENT_BYTES = 20 << 20
WIDE_ROWS = 32768
GROUPS_WANTED = 200  # threadgroups that keep every core of a large GPU busy
DOT_WORDS = 4  # words of each row in a piece of a dot product
LANE_ROWS = 2  # rows of a tile for which a lane holds sums
RESCALING_EPS = 1e-30  # keeps a row of zeros from being divided by zero


@dataclass(frozen=True, kw_only=True)
class QuantizedVectorSpec(RowProductSpec, Tunable):
    """A product with a quantized matrix."""

    mma: Mma  # of float16
    rescales_input: bool = False  # x is divided by its RMS, and the product multiplied by it

    @property
    def num_runs(self) -> int:
        return self.num_cols // PANEL

    @property
    def groups(self) -> int:
        """Groups of columns in a run: one (or a part of one), or two halves."""
        return groups_in_run(self.format)

    @property
    def has_products(self) -> bool:
        """Whether the matrix unit multiplies."""
        return self.mma.kind == "CUDA"

    @property
    def fills_chunks(self) -> bool:
        """Whether each slot of each chunk has a run."""
        return self.num_runs % (self.mma.slots * self.warps * self.ahead) == 0

    @property
    def form(self) -> CodeForm:
        """What the matrix unit is given for a code."""
        return pair_form(self.format, self.mma)

    @property
    def chunks(self) -> int:
        """Chunks of K: a run for each slot of the matrix unit."""
        return -(-self.num_runs // self.mma.slots)

    @property
    def warps(self) -> int:
        """Warps that split the columns between them. If the codes are loaded ahead: as few as have registers for all
        codes, but at least 8, or 4 for a normed x. Otherwise 4 for wide matrices and up to 16 for long rows, or 8 where
        they divide the chunks evenly.

        Measured on an H200 in Q4_K and in 4 bits by groups of 64, of 16 matrices of models from 1B to 8B: attention_out
        with 8 warps, not 4, takes a 1B model's step in Q4_0 from 480 to 437 us. qkv of 2,560 to 4,096 columns takes 4
        to 39 % longer with 8. Gate and up of 4,096 columns take 8 % less with 8, and of 3,072 22 % less, but 18 % more
        of 3,584 or 2,560, whose chunks 8 warps divide unevenly."""
        is_even = self.chunks % 8 == 0
        is_even_row = is_even and self.lanes.is_chained and not high_bits(self.format)
        if self.is_resident:
            share = max(1, self._room // self.tiles_at_once) + 1
            count = 4 if self.norm_eps is not None else 8
        elif self._is_chained_wide:
            count, share = 8 if self.activation is not None and is_even and self.format.bits < 8 else 4, self.chunks
        else:
            count, share = (8, self.chunks) if is_even_row else (4, 8 if self.lanes.is_chained else 4)
        while count < (MAX_WARPS if self.has_products else METAL_WARPS) and self.chunks >= share * count:
            count *= 2
        return self.knob("warps", count)

    @property
    def _is_chained_wide(self) -> bool:
        """Gate and up, or a head, of a chained device: so many rows that each threadgroup keeps few tiles."""
        return self.lanes.is_chained and (self.activation is not None or self.num_rows >= WIDE_ROWS)

    @property
    def tiles(self) -> int:
        """Tiles of rows of a threadgroup. Many, because each threadgroup stages all of x; fewer if there would not be
        enough threadgroups to fill the device. (NVIDIA H200: two tiles are within 14 % of the best for gate and up in 4
        bits, where four take 12 % less in 8 bits; four tiles take 4 to 15 % less than eight for heads.)"""
        least = 2 if self.activation is not None else 1
        wanted = 4
        if self.lanes.is_chained:
            is_small = self.is_resident or (self.activation is not None and self.format.bits < 8)
            wanted = MOST_RESIDENT_TILES if is_small else 4 if self._is_chained_wide else 8
        while wanted > least and not (self._fills_device(wanted) and self._fits_shared(wanted)):
            wanted //= 2
        return self.knob("tiles", wanted)

    @property
    def is_resident(self) -> bool:
        """Whether a chained kernel's threadgroups all run at once, and load their codes while they wait for the
        previous kernel: if the codes fit into the registers of 132 cores."""
        fits = self.num_rows * self.num_cols * self.format.code_bits / 8 <= RESIDENT_BYTES
        return self.lanes.is_chained and fits and self.experts is None  # the previous kernel chooses the experts

    @property
    def tiles_at_once(self) -> int:
        """How many of a threadgroup's tiles load their codes together."""
        if not self.has_products:
            return min(self.tiles, 1 if high_bits(self.format) else 2)
        return min(self.tiles, 4 * 16 // self.mma.rows)

    @property
    def num_groups(self) -> int:
        """Threadgroups, of each expert."""
        return self.out_rows // (self.tiles_per_section * self.mma.rows)

    @property
    def tiles_per_section(self) -> int:
        """A threadgroup's tiles of gate, and as many of up; all tiles of a matrix without the two."""
        return self.tiles // 2 if self.activation is not None else self.tiles

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"tiles": (1, 2, 4, 8, 16), "warps": (4, 8, 16), "ahead": (1, 2, 4, 8)}

    def is_possible(self) -> bool:
        least = 2 if self.activation is not None else 1
        per_group = self.tiles_per_section * self.mma.rows
        fits = self.tiles >= least and self.out_rows % per_group == 0 and per_group <= self.warps * LANES
        return fits and fits_quantized_vector(self)

    def _fills_device(self, tiles: int) -> bool:
        """Whether threadgroups of so many tiles divide the rows evenly and are enough to fill the device."""
        rows = tiles * self.mma.rows
        return self.num_rows % rows == 0 and self.num_rows // rows * self.slots >= GROUPS_WANTED

    def _fits_shared(self, tiles: int) -> bool:
        """Whether a threadgroup of so many tiles has enough memory on METAL, whose tiles are small."""
        return (
            self.has_products or self._staged_bytes(PANEL // 2) + self._warp_sum_bytes(tiles) <= self.lanes.shared_bytes
        )

    @property
    def ahead(self) -> int:
        """Chunks whose codes a warp has in flight: all of its own if there are registers for them. Wide matrices have
        other warps to run instead: one takes 12 % less than two for gate and up in Q4_K (NVIDIA H200)."""
        per_warp = -(-self.chunks // self.warps)
        if not self.has_products:
            return min(per_warp, self.knob("ahead", 1))
        rule = max(1, self._room * 16 // (self.tiles_at_once * self.mma.rows))
        if not self.is_resident and self.lanes.is_chained:
            is_even_row = self.chunks % 8 == 0 and self.tiles == 1 and not high_bits(self.format)
            rule = 1 if self._is_chained_wide else 7 if is_even_row else rule
        ahead = min(per_warp, self.knob("ahead", rule))
        while per_warp % ahead:
            ahead -= 1
        return ahead

    @property
    def _room(self) -> int:
        """Chunks of 16 rows whose codes a lane's registers hold: more if they are loaded while the previous kernel
        still runs."""
        return (4 if self.format.code_bits <= 4 else 2) * (2 if self.is_resident else 1)

    @property
    def steps(self) -> int:
        """Iterations of a warp over its chunks."""
        return -(-self.chunks // (self.warps * self.ahead))

    @property
    def shared_bytes(self) -> int:
        return self._shared_bytes(self.staged_run)

    @property
    def staged_run(self) -> int:
        """Words from one run to the next in threadgroup memory. Neighbors lie in different banks, unless K is so long
        that there is no room for the gaps between them."""
        padded = PANEL // 2 + 4
        return padded if self._shared_bytes(padded) <= self.lanes.shared_bytes else PANEL // 2

    def _shared_bytes(self, staged_run: int) -> int:
        return self._staged_bytes(staged_run) + self._warp_sum_bytes(self.tiles)

    def _staged_bytes(self, staged_run: int) -> int:
        """Of x and the sums of its groups."""
        return (self.num_runs + 1) * staged_run * 4 + self.num_runs * self.groups * 4

    def _warp_sum_bytes(self, tiles: int) -> int:
        """Of the warps' sums."""
        return self.warps * (tiles * self.mma.rows + 1 + (self.sum is not None)) * 4


@dataclass(frozen=True, kw_only=True)
class ExpertQuantizedVectorSpec(QuantizedVectorSpec):
    """The same of a row's experts."""

    chosen_experts: ChosenExperts

    @property
    def experts(self) -> ChosenExperts:
        return self.chosen_experts


def fits_quantized_vector(spec: QuantizedVectorSpec) -> bool:
    """Whether x fits into threadgroup memory, and the rows into tiles."""
    return (
        spec.shared_bytes <= spec.lanes.shared_bytes
        and spec.out_rows % spec.mma.rows == 0
        and (spec.split is None or spec.split.head_dim % PIECE == 0)
    )


# (a row, a run of x) -> (row of the whole matrix, run in it)
Locate = Callable[[UOp, UOp], tuple[UOp, UOp]]
Follow = Callable[[Sequence[UOp]], UOp]  # statements -> one that is executed after them


@dataclass(frozen=True)
class _Chunk:
    """A lane's part of a chunk: for each tile, its runs of codes and its `_factors`."""

    number: UOp
    codes: list[list[list[UOp]]]
    factors: list[list[list[tuple[UOp, UOp | None]]]]

    @property
    def values(self) -> list[UOp]:
        codes = [word for runs in self.codes for run in runs for word in run]
        factors = [pair for tile in self.factors for pairs in tile for pair in pairs]
        return codes + [value for pair in factors for value in pair if value is not None]


@cached_kernel
def quantized_vector_kernel(spec: QuantizedVectorSpec) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands)."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        buffers = list(rest)
        x_out = buffers.pop(0) if spec.sum is not None else None
        own = [buffers.pop(0) for _ in range(Planes.count(spec.format))]
        planes = aligned_planes(spec.format, own, spec.lanes.kind)
        operands, place = RowOperands.take(spec, buffers), _make_place(spec)
        rounds = _rounds(spec, place.group)
        loads = _Loads(spec, planes, place.warp, place.lane)
        early = loads.chunks(0, rounds[0]) if spec.is_resident else []
        row = stage_row(spec, place, operands, x_out, [value for chunk in early for value in chunk.values])
        loads = replace(loads, chosen=row.operands.chosen)
        totals = [
            spec.lanes.sum(total, spec.mma.slot_masks)
            for i, bases in enumerate(rounds)
            for total in _multiply_tiles(place, loads, (row.x, row.sums), bases, [] if i else early)
        ]
        results = _finish_rows(spec, place, totals, out, row.operands, row.factor)
        return spec.finish(row.stores + results, place.axes)

    return kernel


@dataclass(frozen=True)
class RowPlace:
    """A thread's place. A threadgroup has its own rows, and its warps split the columns between them."""

    body: Body
    slot: UOp | int  # which of the row's experts
    group: UOp
    lane: UOp
    warp: UOp | int
    all_warps: UOp | int | None = None  # the axis of the warps, if others than those that multiply are among them

    @property
    def axes(self) -> tuple[UOp, ...]:
        return axes_of(self.slot, self.group, self.lane, self.warp if self.all_warps is None else self.all_warps)

    @property
    def thread(self) -> UOp:
        return self.warp * LANES + self.lane


def _make_place(spec: QuantizedVectorSpec) -> RowPlace:
    body = Body()
    slot = grid(body, spec.slots)
    group, lane = body.grid(spec.num_groups), body.threads(LANES)
    return RowPlace(body, slot, group, lane, warps(body, spec.warps))


def _rounds(spec: QuantizedVectorSpec, group: UOp) -> list[list[UOp]]:
    """The first rows of the threadgroup's tiles, gate's and then up's; those of a list load their codes together."""
    per_section, size = spec.tiles_per_section, spec.tiles_at_once
    tiles = [(group * per_section + i % per_section, i // per_section) for i in range(spec.tiles)]
    bases = [tile * spec.mma.rows + section * spec.out_rows for tile, section in tiles]
    return [bases[i : i + size] for i in range(0, len(bases), size)]


def _multiply_tiles(
    place: RowPlace, loads: _Loads, staged: tuple[UOp, UOp], bases: list[UOp], early: list[_Chunk]
) -> list[UOp]:
    """The lane's sums of the tiles that begin at rows `bases`: by tile and row of the lane. `staged`: as from `_stage`;
    `early`: the chunks of the first iteration, if they are loaded already."""
    spec, body, lane = loads.spec, place.body, place.lane
    totals, past = zeros(len(bases) * LANE_ROWS), 0
    if early:
        totals, past = _add_chunks(body, spec, early, staged, lane, totals), 1
    if spec.steps == past:
        return totals
    return carry(
        body,
        totals,
        spec.steps - past,
        place.axes,
        lambda i, old: _add_chunks(body, spec, loads.chunks(i + past, bases), staged, lane, old),
    )


@dataclass(frozen=True)
class _Loads:
    """A lane's loads of codes and scales."""

    spec: QuantizedVectorSpec
    planes: Planes
    warp: UOp | int
    lane: UOp
    chosen: ChosenRows | None = None

    def chunks(self, iteration: UOp | int, bases: list[UOp]) -> list[_Chunk]:
        """An iteration's chunks of the tiles that begin at rows `bases`, all loaded before any is used: as many loads
        in flight as there are registers."""
        spec, shape = self.spec, (self.planes, self.lane, self._locate)
        first = (iteration * spec.warps + self.warp) * spec.ahead
        return [
            _Chunk(
                first + i,
                [_codes(spec, base, first + i, *shape) for base in bases],
                [_factors(spec, base, first + i, *shape) for base in bases],
            )
            for i in range(spec.ahead)
        ]

    def _locate(self, row: UOp, run: UOp) -> tuple[UOp, UOp]:
        """(row of the whole matrix, run in it); the first run for those after the last."""
        spec = self.spec
        if not spec.fills_chunks:
            run = (run < spec.num_runs).where(run, 0)
        return spec.locate(self.chosen, row, run, PANEL)


def _add_chunks(
    body: Body, spec: QuantizedVectorSpec, chunks: list[_Chunk], staged: tuple[UOp, UOp], lane: UOp, old: list[UOp]
) -> list[UOp]:
    """The lane's sums, `old` so far, after some chunks: by tile and row of the lane. `staged`: as from `_stage`."""
    new, (x, sums), share = list(old), staged, spec.mma.elements // LANE_ROWS
    for chunk in chunks:
        inputs = _inputs(spec, x, chunk.number, lane)
        start, totals = _starts(spec, sums, chunk.number, lane)
        for tile, (runs, factors) in enumerate(zip(chunk.codes, chunk.factors, strict=True)):
            if tile and not spec.has_products:
                runs, factors = _used_after(runs, factors, new[(tile - 1) * LANE_ROWS : tile * LANE_ROWS])
            products = multiply_run(body, spec, runs, inputs, start)
            for element, pairs in enumerate(factors):
                at = tile * LANE_ROWS + element // share
                for g, (scale, minimum) in enumerate(pairs):
                    new[at] = new[at] + products[g][element] * scale
                    if minimum is not None:
                        new[at] = new[at] + totals[element][g] * minimum
    return new


Factors = list[list[tuple[UOp, UOp | None]]]


def _used_after(runs: list[list[UOp]], factors: Factors, done: list[UOp]) -> tuple[list[list[UOp]], Factors]:
    """A tile's runs and factors, unpacked after `done`."""
    values = [word for run in runs for word in run]
    values += [value for pairs in factors for pair in pairs for value in pair if value is not None]
    rest = iter(used_after(values, done))
    runs = [[next(rest) for _ in run] for run in runs]
    return runs, [[(next(rest), None if low is None else next(rest)) for _, low in pairs] for pairs in factors]


@dataclass(frozen=True)
class StagedRow:
    """A row in threadgroup memory: x and its sums, as from `_stage`. `operands`: once they are awaited; `stores`: of a
    sum that the kernel computes; `factor`: of the finished product, if any."""

    operands: RowOperands
    x: UOp
    sums: UOp
    stores: list[UOp]
    factor: UOp | None

    @property
    def values(self) -> list[UOp]:
        """What must have been computed before the row is multiplied."""
        return [self.x, self.sums] if self.factor is None else [self.x, self.sums, self.factor]


def stage_row(
    spec: QuantizedVectorSpec,
    place: RowPlace,
    operands: RowOperands,
    x_out: UOp | None,
    ahead: Sequence[UOp],
    follow: Follow | None = None,
) -> StagedRow:
    """Wait for the previous kernels, and bring x into threadgroup memory. `ahead`: what is loaded, and the statements
    that are executed, meanwhile; `follow`: as in `RowSource.read_before`."""
    source = RowSource(spec, operands, place, ahead)
    loaded = source.read(place.body, place.axes) if follow is None else source.read_before(follow)
    stores, rms = [], None
    if x_out is not None:
        loaded = finish_sum(spec, place, source, loaded)
        stores = store_sum(spec, place, source, loaded, x_out)
    if spec.rescales_input:
        loaded, rms = _rescale(spec, place, source, loaded)
    return StagedRow(source.operands, *_stage(spec, place, source, loaded), stores, rms)


class RowSource:
    """The pieces of x that a thread stages; x is in a buffer, or in the splits of an attention."""

    def __init__(self, spec: QuantizedVectorSpec, operands: RowOperands, place: RowPlace, ahead: Sequence[UOp]) -> None:
        """Waits for the previous kernels, and loads `ahead` meanwhile."""
        self._spec, thread = spec, place.thread
        threads, pieces = spec.warps * LANES, spec.num_cols // PIECE
        self.inside = [
            None if start + threads <= pieces else start + thread < pieces for start in range(0, pieces, threads)
        ]
        wanted = [start + thread for start in range(0, pieces, threads)]
        self.pieces = [p if ok is None else ok.where(p, 0) for p, ok in zip(wanted, self.inside, strict=True)]
        self.norm_weights, self.sum_weights = (
            [] if weight is None else [self._load(spec, weight, piece) for piece in self.pieces]
            for weight in (operands.norm_weight, operands.sum_weight)
        )
        weights = [weight for piece in self.norm_weights + self.sum_weights for weight in piece]
        self.operands = operands.awaited(spec.lanes, [*ahead, *weights]).with_experts(spec, place.slot)
        self._split, sums, inputs = None, self.operands.split_sums, self.operands.inputs
        if spec.split is not None and sums is not None and inputs is not None:
            self._split = SplitOperands(spec.split, self.operands.x, sums, inputs)

    def read(self, body: Body, axes: tuple[UOp, ...]) -> list[list[UOp]]:
        """The pieces as float32."""
        if self._split is None:
            return [self._load(self._spec, self.operands.x, piece) for piece in self.pieces]
        return [self._split.read(body, piece * PIECE, PIECE, axes) for piece in self.pieces]

    def squares(self, loaded: list[list[UOp]]) -> UOp:
        """The sum of the squares of the thread's pieces."""
        squares = [dot(values, values) for values in loaded]
        return balanced(
            value if ok is None else ok.where(value, 0.0) for value, ok in zip(squares, self.inside, strict=True)
        )

    def read_before(self, follow: Follow) -> list[list[UOp]]:
        """`read` on CUDA, where attention combines its splits itself. `follow` is given the loads: the statement that
        it returns is executed after them, and before their values are used."""
        assert self._split is None and self._spec.lanes.kind == "CUDA"
        x = self.operands.x
        loads = [load_cuda_vectors(x, piece * PIECE, PIECE) for piece in self.pieces]
        done = follow([load for vectors in loads for load in vectors])
        return [
            floats_of_vectors([UOp(Ops.CUSTOM, WORDS, src=(load, done), arg="{0}") for load in vectors], x.dtype)
            for vectors in loads
        ]

    @staticmethod
    def _load(spec: QuantizedVectorSpec, buffer: UOp, piece: UOp) -> list[UOp]:
        load = load_cuda_floats if spec.lanes.kind == "CUDA" else load_floats
        return load(buffer, piece * PIECE, PIECE)


def finish_sum(
    spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]]
) -> list[list[UOp]]:
    """The thread's pieces of the sum, from those of y."""
    assert spec.sum is not None and source.operands.sum_residual is not None
    factor = _rms_factor(spec, place, source, loaded, spec.sum.eps) * spec.sum.scale
    new = []
    for piece, values, weights in zip(source.pieces, loaded, source.sum_weights, strict=True):
        residual = load_floats(source.operands.sum_residual, piece * PIECE, PIECE)
        new.append([r + factor * (v * w) for r, v, w in zip(residual, values, weights, strict=True)])
    if source.operands.sum_out_scale is None:
        return new
    return [[value * source.operands.sum_out_scale[0].load() for value in values] for values in new]


def store_sum(
    spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]], out: UOp
) -> list[UOp]:
    """Stores of the threadgroup's share of x."""
    stores = []
    groups = spec.num_groups
    for piece, ok, values in zip(source.pieces, source.inside, loaded, strict=True):
        is_own = (piece % groups).eq(place.group) if ok is None else (piece % groups).eq(place.group) & ok
        stores += [
            out[(piece * PIECE + i).valid(is_own)].store(value.cast(out.dtype)) for i, value in enumerate(values)
        ]
    return stores


def _rescale(
    spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]]
) -> tuple[list[list[UOp]], UOp]:
    """(the thread's pieces of x divided by its RMS; the RMS)."""
    rms = _rms(spec, place, source, loaded, RESCALING_EPS)
    factor = rms.reciprocal()
    return [[value * factor for value in values] for values in loaded], rms


def _rms_factor(
    spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]], eps: float
) -> UOp:
    """What an RMSNorm multiplies a row by."""
    return _rms(spec, place, source, loaded, eps).reciprocal()


def _rms(spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]], eps: float) -> UOp:
    """sqrt(mean square + eps) of a row, from the thread's pieces of it, in every thread."""
    total = _sum_threads(place.body, spec, source.squares(loaded), place.thread)
    return (total * (1.0 / spec.num_cols) + eps).sqrt()


def _stage(spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]]) -> tuple[UOp, UOp]:
    """(x, normed if there is a norm, as float16 in threadgroup memory: run by run in the order of the codes, and then a
    run of zeros; the float32 sum of each group of the stored values)."""
    body, thread = place.body, place.thread
    staged_run = spec.staged_run
    staged = body.shared((spec.num_runs + 1) * staged_run, U32)
    sums = body.shared(spec.num_runs * spec.groups)
    at, inside, order = source.pieces, source.inside, code_order(spec.format, spec.mma)
    if spec.norm_eps is not None:
        scale = _rms_factor(spec, place, source, loaded, spec.norm_eps)
        loaded = [
            [v * scale * w for v, w in zip(*pair, strict=True)]
            for pair in zip(loaded, source.norm_weights, strict=True)
        ]
    stores = [staged[(spec.num_runs * staged_run + thread).valid(thread < PANEL // 2)].store(0)]
    for piece, ok, values in zip(at, inside, loaded, strict=True):
        # by a statement of our own: tinygrad would drop the rounding, and the sum would not be that of x as stored
        halves = [UOp(Ops.CUSTOM, F16, src=(value.cast(F16),), arg="{0}") for value in values]
        part = piece % (PANEL // PIECE)
        start = piece // (PANEL // PIECE) * staged_run + part // 2 * 2 + part % 2 * 8
        for i in range(0, PIECE, 4):
            for j in range(2):
                word = join_bits(*[halves[i + order[2 * j + side]] for side in range(2)])
                target = start + i + j
                stores.append(staged[target if ok is None else target.valid(ok)].store(word))
        total = spec.lanes.sum(balanced(half.cast(F32) for half in halves), (1, 2) if spec.groups == 1 else (1,))
        per_sum = PANEL // spec.groups // PIECE
        is_first = (piece % per_sum).eq(0) if ok is None else (piece % per_sum).eq(0) & ok
        stores.append(sums[(piece // per_sum).valid(is_first)].store(total))
    done = UOp.group(*stores)
    return staged.after(done), sums.after(done)


def _sum_threads(body: Body, spec: QuantizedVectorSpec, value: UOp, thread: UOp) -> UOp:
    """The sum over a threadgroup, in every thread."""
    total, partial = spec.lanes.sum(value), body.shared(spec.warps)
    stored = partial[(thread // LANES).valid((thread % LANES).eq(0))].store(total)
    return balanced(partial.after(stored)[i].load() for i in range(spec.warps))


def _inputs(spec: QuantizedVectorSpec, staged: UOp, chunk: UOp, lane: UOp) -> list[list[UOp]]:
    """The lane's runs of x: those of the slot with the token's number; zeros for other tokens. On METAL the one run of
    its slot."""
    runs = []
    if not spec.has_products:
        _, slot = spec.mma.row_runs(lane)[0]
        run = chunk * spec.mma.slots + slot
        start = (run if spec.fills_chunks else (run < spec.num_runs).where(run, spec.num_runs)) * spec.staged_run
        return [[staged[start + i].load() for i in range(PANEL // 2)]]
    for token, slot in spec.mma.token_runs(lane):
        run = chunk * spec.mma.slots + slot
        is_own = token.eq(slot) & (run < spec.num_runs)
        start = is_own.where(run, spec.num_runs) * spec.staged_run
        runs.append([staged[start + i].load() for i in range(PANEL // 2)])
    return runs


def _starts(spec: QuantizedVectorSpec, sums: UOp, chunk: UOp, lane: UOp) -> tuple[list[list[UOp]], list[list[UOp]]]:
    """(by group, what a tile's sums start from; by element and group, the sum of x over the element's run)."""
    totals = []
    for element in range(spec.mma.elements):
        column, _ = spec.mma.place(lane, element)
        run = chunk * spec.mma.slots + column % spec.mma.slots
        is_used = (column < spec.mma.slots) & (run < spec.num_runs)
        at = is_used.where(run, 0) * spec.groups
        totals.append([is_used.where(sums[at + g].load(), 0.0) for g in range(spec.groups)])
    if spec.form.excess == 0.0:
        return [zeros(spec.mma.elements)] * spec.groups, totals
    return [[total[g] * -spec.form.start for total in totals] for g in range(spec.groups)], totals


def multiply_run(
    body: Body, spec: QuantizedVectorSpec, runs: list[list[UOp]], inputs: list[list[UOp]], starts: list[list[UOp]]
) -> list[list[UOp]]:
    """A tile's sums by group. Pairs of words belong to the first and the second half of the run in turn."""
    products = []
    for g, start in enumerate(starts):
        words = [i for i in range(PANEL // 2) if spec.groups == 1 or i // 2 % 2 == g]
        w, x = ([[run[i] for i in words] for run in side] for side in (runs, inputs))
        if spec.has_products:
            products.append(spec.mma.multiply_words(body, w, x, start))
        else:
            products.append(_add_dots(spec.mma, w, x[0], start))
    return products


def _add_dots(mma: Mma, rows: list[list[UOp]], x: list[UOp], totals: list[UOp]) -> list[UOp]:
    """`totals` plus the dot product of each row with x, in words of two halves. A few words of all rows follow each
    other, so that few unpacked codes are in registers at a time."""
    new = list(totals)
    for first in range(0, len(x), DOT_WORDS):
        piece = [row[first : first + DOT_WORDS] for row in rows]
        if first:
            piece = [used_after(words, new) for words in piece]
        for at, words in enumerate(piece):
            for word, other in zip(words, x[first : first + DOT_WORDS], strict=True):
                for code, value in zip(mma.pair_of(word), mma.pair_of(other), strict=True):
                    new[at] = new[at] + code.cast(F32) * value.cast(F32)
    return new


def _codes(
    spec: QuantizedVectorSpec, base: UOp, chunk: UOp, planes: Planes, lane: UOp, locate: Locate
) -> list[list[UOp]]:
    """The lane's runs of a tile that begins at row `base`."""
    mma = spec.mma
    runs = [locate(base + row, chunk * mma.slots + slot) for row, slot in mma.row_runs(lane)]
    return [read_pairs(planes, row, run, spec.matrix_cols // PANEL, mma) for row, run in runs]


def _factors(
    spec: QuantizedVectorSpec, base: UOp, chunk: UOp, planes: Planes, lane: UOp, locate: Locate
) -> list[list[tuple[UOp, UOp | None]]]:
    """By element and group: the scale, and the minimum if the format has one."""
    fmt, factors = spec.format, []
    for element in range(spec.mma.elements):
        column, row = spec.mma.place(lane, element)
        row, run = locate(base + row, chunk * spec.mma.slots + column % spec.mma.slots)
        groups = [group_of(fmt, run, g) for g in range(spec.groups)]
        scales = [group_scale(planes.scale, row, group, fmt, spec.matrix_cols) for group in groups]
        if spec.form.unit != 1.0:
            scales = [scale * spec.form.unit for scale in scales]
        minima: list[UOp | None] = [None] * spec.groups
        if planes.minimum is not None:
            minima = [group_scale(planes.minimum, row, group, fmt, spec.matrix_cols) for group in groups]
        factors.append(list(zip(scales, minima, strict=True)))
    return factors


def _finish_rows(
    spec: QuantizedVectorSpec, place: RowPlace, totals: list[UOp], out: UOp, operands: RowOperands, rms: UOp | None
) -> list[UOp]:
    """Add the warps' sums through threadgroup memory; then one thread for each row computes the epilogue. `rms`: what x
    was divided by, if it was."""
    mma, count = spec.mma, spec.tiles * spec.mma.rows
    shared = place.body.shared(spec.warps * count)
    stores = []
    for i, total in enumerate(totals):
        column, row = mma.place(place.lane, i % LANE_ROWS * (mma.elements // LANE_ROWS))
        at = place.warp * count + i // LANE_ROWS * mma.rows + row
        stores.append(shared[at.valid(column.eq(0))].store(total))
    shared = shared.after(UOp.group(*stores))
    per_group = spec.tiles_per_section * mma.rows
    is_inside = place.thread < per_group
    index = is_inside.where(place.thread, 0)

    def summed(at: UOp) -> UOp:
        total = balanced(shared[at + w * count].load() for w in range(spec.warps))
        return total if rms is None else total * rms

    value, target = summed(index), place.group * per_group + index
    if spec.activation is not None:
        (value,) = spec.gate(operands.chosen, [value], [summed(index + per_group)], [target])
    else:
        value = spec.epilogue(operands, value, target)
    if operands.chosen is not None:
        target = operands.chosen.target(target, spec.out_rows)
    return [out[target.valid(is_inside)].store(value.cast(out.dtype))]
