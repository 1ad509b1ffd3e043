"""Products of many token rows with quantized weights on Hopper: four warps unpack them on their way into the stages.

The other warps multiply as in gemm_hopper.py. A thread that unpacks has the same places in each stage. It loads the
codes of the next stage before it waits for this one, and holds them in registers. Of a cluster's two threadgroups each
unpacks half of the rows, which the copy engine then copies to the other one.

Each tile of tokens unpacks the weights again, which takes longer than multiplying them: a stage of 256 rows takes 1,870
cycles where its products take 1,090 (H200, Q4_K, two threadgroups). With more than two tiles of tokens, unpacking the
whole matrix first takes no longer. What did not help: two pairs of warps that take turns at the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.formats.matrix import PANEL, Planes, code_lanes
from tinyvllm.ops.formats.pairs import read_halves
from tinyvllm.ops.gpu.gemm_hopper import FETCHER, TOKEN_TILE, UNPACKERS, WgmmaSpec, WgmmaWork, finish_wgmma_kernel
from tinyvllm.ops.gpu.token_tiles import TokenTile
from tinyvllm.ops.kernel.body import I32, Body, KernelFn, cached_kernel
from tinyvllm.ops.kernel.hopper import (
    MAP_WORDS,
    WGMMA_COLS,
    acquire_map,
    arrive,
    copy_there,
    expect,
    fetch,
    publish_stores,
    store_words,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, LOAD_WORDS, WORDS
from tinyvllm.ops.kernel.tiles import together

ROW_BYTES = WGMMA_COLS * 2  # of a stage


@cached_kernel
def unpacking_wgmma_kernel(spec: WgmmaSpec) -> KernelFn:
    """fn(out, maps (map_size,) uint32, *planes, x[, residual][, tile map, sorted pairs[, bias]]): see WgmmaSpec."""

    def kernel(out: UOp, maps: UOp, *operands: UOp) -> UOp:
        assert spec.fits_unpacking, f"{spec} cannot unpack in its stages"
        return finish_wgmma_kernel(spec, _UnpackingWork(spec, out, maps, operands))

    return kernel


class _UnpackingWork(WgmmaWork):
    """One threadgroup's work."""

    fetchers = UNPACKERS

    def __init__(self, spec: WgmmaSpec, out: UOp, maps: UOp, operands: Sequence[UOp]) -> None:
        assert spec.format is not None
        count = Planes.count(spec.format)
        self.buffers, self.planes = operands[:count], Planes(spec.format, operands[:count])
        super().__init__(spec, out, maps, operands[0], operands[count], operands[count + 1 :])
        self.unpacker = (self.warp - FETCHER).maximum(0)  # which of the warps that unpack
        self.is_first = self.role.eq(FETCHER) & self.lane.eq(0)

    @property
    def arrivals(self) -> int:
        return 1 + UNPACKERS

    def fetch_tiles(self, ready: UOp) -> UOp:
        """Fetch the tokens and unpack the rows of all stages of all tiles in order, each as soon as it is empty."""
        spec = self.spec
        loop, turn, number = self.loop_tiles(self.role >= FETCHER, one_lane=False)
        split, first_row, tile = self.tile(number)
        begin, step = split * spec.steps, self.body.fold(spec.steps)
        later, earliest = (step + 1).minimum(spec.steps - 1), UOp.const(0, I32).cast(dtypes.weakint)
        here, ahead, first = (self._read(first_row, tile, begin + each) for each in (step, later, earliest))
        held = here.hold(self.body, first, loop, ready)
        words = here.held([array.after(step) for array in held])
        place, full, empty, parity = self.stage(turn * spec.steps + step)
        target = self.maps[self.number * (2 * MAP_WORDS)]
        waited = wait(empty, 1 - parity, step, acquire_map(target, loop, ready), *ahead.values)
        last = expect(full, self._fetched_rows * ROW_BYTES, waited, condition=self.is_first)
        at = [(begin + step) * WGMMA_COLS, UOp.const(0, I32) + tile.first]
        last = fetch(place, target, full, at, last, condition=self.is_first)
        published = publish_stores(self._store(place, words, last))
        if spec.cluster > 1:
            published = self._share(place, full, published)
        filled = arrive(full, self.lane.eq(0), published)
        moved = here.move([array.after(step, filled) for array in held], ahead)
        return together(filled, *moved).end(step).end(loop)

    @property
    def _fetched_rows(self) -> int:
        """Rows of a stage that the copy engine brings: tokens, and what the cluster's other threadgroup unpacks."""
        return TOKEN_TILE + self.spec.row_tile - self.spec.unpacked_rows

    def _place(self, number: int) -> tuple[UOp, UOp]:
        """(row of the tile, half of the stage's columns) of one of a thread's runs: a warp has 16 rows."""
        at = (number * UNPACKERS + self.unpacker) * LANES + self.lane
        return at // 2 + self.rank * self.spec.unpacked_rows, at % 2

    def _read(self, first_row: UOp, tile: TokenTile, stage: UOp) -> _Read:
        """The thread's runs of a stage."""
        spec, planes, words, fours = self.spec, self.planes, [], []
        group, section, count = 4 * spec.run, spec.row_tile // (2 if spec.is_gated else 1), code_lanes(planes.fmt) // 4
        for i in range(spec.runs):
            at, half = self._place(i)
            # as `WgmmaSpec.row_box` permutes rows
            row = at // group * group + at % 8 // 2 * spec.run + at % group // 8 * 2 + at % 2
            row = first_row + row // section * spec.out_rows + row % section
            row, run = tile.matrix_row(row.minimum(spec.num_rows - 1)), stage * 2 + half
            words.append(read_halves(planes, row, run, spec.num_cols, spec.mma))
            if count % 4 == 0:
                start = (row * (spec.num_cols // PANEL) + run) * count
                fours += [[planes.codes[start + (j + k)] for k in range(4)] for j in range(0, count, 4)]
        return _Read(words, fours, self.buffers)

    def _store(self, place: UOp, words: list[list[UOp]], last: UOp) -> UOp:
        """Store a stage's runs, swizzled as the copy engine does it."""
        for i, run in enumerate(words):
            row, half = self._place(i)
            for j in range(0, len(run), 4):
                piece = (half * 4 + j // 4) ^ (row % 8)
                last = store_words(place + (TOKEN_TILE + row) * ROW_BYTES + piece * 16, run[j : j + 4], last)
        return last

    def _share(self, place: UOp, full: UOp, last: UOp) -> UOp:
        """Copy the warp's rows to the other threadgroup."""
        rows = LANES // 2
        for i in range(self.spec.runs):
            row = self.rank * self.spec.unpacked_rows + (i * UNPACKERS + self.unpacker) * rows
            at = place + (TOKEN_TILE + row) * ROW_BYTES
            last = copy_there(at, rows * ROW_BYTES, full, 1 - self.rank, self.lane.eq(0), last)
        return last


@dataclass
class _Read:
    """Runs of weights as words, and what they read from device memory. `fours`: places of four neighboring words of
    codes, which are loaded at once. `buffers`: the weights' planes."""

    words: list[list[UOp]]
    fours: list[list[UOp]]
    buffers: Sequence[UOp]

    def __post_init__(self) -> None:
        graph = UOp.sink(*[word for run in self.words for word in run])
        loads = [uop for uop in graph.toposort() if uop.op is Ops.LOAD]
        self.loads = [load for load in loads if load.src[0].src[0] in self.buffers]  # not the number of an expert
        known: dict[UOp, UOp] = {}
        for four in self.fours:
            loaded = UOp(Ops.CUSTOM, WORDS, src=(four[0],), arg=LOAD_WORDS)
            for place, name in zip(four, "xyzw", strict=True):
                known[place.load()] = UOp(Ops.CUSTOMI, dtypes.uint, src=(loaded,), arg=f"{{0}}.{name}")
        self.values = [known.get(load, load) for load in self.loads]

    def hold(self, body: Body, first: _Read, *after: UOp) -> list[UOp]:
        """Registers for what is read, which begin with the values of `first`."""
        arrays = [body.registers(1, load.dtype) for load in self.loads]
        stored = UOp.group(*first.move([array.after(*after) for array in arrays], first))
        return [array.after(stored) for array in arrays]

    def held(self, arrays: Sequence[UOp]) -> list[list[UOp]]:
        """The words of what is in the registers."""
        known = {load: array[0].load() for load, array in zip(self.loads, arrays, strict=True)}
        words = iter(UOp.sink(*[word for run in self.words for word in run]).substitute(known).src)
        return [[next(words) for _ in run] for run in self.words]

    def move(self, arrays: Sequence[UOp], source: _Read) -> list[UOp]:
        """Store what `source` has read in the registers."""
        return [array[0].store(value) for array, value in zip(arrays, source.values, strict=True)]
