"""Matrix products of many token rows on METAL: how a threadgroup computes the sums of its tile.

Apple's GPUs multiply 8 x 8 matrices on their ordinary arithmetic units, in 16 cycles at best, and whatever else a
simdgroup issues takes cycles from that. So this file is about issuing little else:

- A simdgroup has 4 x 4 accumulators: each operand that it loads serves four products.
- A lane loads its part of four operands at once, as 16 neighboring bytes. Permuting the columns of both operands does
  not change a product, and the permutation is chosen so that a quantized run's words of two codes are operands.
- Four independent products follow each other before an accumulator is used again.
- A step has 64 columns, so that each thread unpacks one run of 32 weights between two barriers.
- The next step's data is loaded from memory before this step's products and waits in registers. A second tile in
  threadgroup memory would do the same, but leave room for fewer threadgroups on a core.

docs/METAL.md has the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from tinygrad import UOp
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.pairs import pair_form, read_pairs
from tinyvllm.ops.formats.runs import Run, read_run, run_factors
from tinyvllm.ops.gpu.token_tiles import TokenTile
from tinyvllm.ops.kernel.body import F16, F32, U16, U32, Body
from tinyvllm.ops.kernel.lanes import Mma, load_floats, outer_loads
from tinyvllm.ops.kernel.simdgroups import PAD, PARTS, declared, elements, loaded, operands, padded, product, statement
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS, TileMma

SLICES = TILE_COLS // 8  # products of 8 columns in 32
INDEPENDENT = 4  # products before an accumulator is used again
HALF_ULP = 0x8000  # of a bfloat16, in a float32's bits

Store = tuple[UOp, UOp, UOp | None]  # (place in a tile, value, whether it is wanted; None: always)


class Shape(Protocol):
    """What is read of a GemmSpec."""

    @property
    def format(self) -> Format: ...
    @property
    def num_cols(self) -> int: ...
    @property
    def row_tile(self) -> int: ...
    @property
    def token_tile(self) -> int: ...
    @property
    def tile_cols(self) -> int: ...
    @property
    def steps(self) -> int: ...


class Frame(Protocol):
    """What is used of a GemmTile: a threadgroup's place, and its rows of x and of the matrix."""

    body: Body
    axes: tuple[UOp, ...]
    lane: UOp
    thread: UOp
    split: UOp | int
    planes: Planes
    x: UOp
    tile: TokenTile
    mma: TileMma
    token_blocks: int
    row_blocks: int
    warp_token: UOp

    @property
    def spec(self) -> Shape: ...
    @property
    def threads(self) -> int: ...
    def block_row(self, block: int) -> UOp: ...
    def matrix_row(self, row: UOp) -> UOp: ...
    def loop(self) -> tuple[UOp, UOp]: ...


def metal_sums(frame: Frame) -> list[UOp]:
    """The sums of a threadgroup's tile: each lane's, by block of tokens, block of rows and element."""
    return _MetalSums(frame).sums()


class _MetalSums:
    """The tile of W is the left operand, that of x the right one: a lane holds one row and two neighboring tokens.

    W lies in threadgroup memory as (chunk of 32 columns, row, pair of columns p, slice, column of the pair), x as
    (chunk, pair of tokens, column 2 * p + its place in the pair, slice, token of the pair). A slice is what one product
    multiplies; a lane reads the slices of its row and p, or of its column and tokens, in one piece. Both are
    padded, see PAD.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame, self.spec, self.body, self.lane = frame, frame.spec, frame.body, frame.lane
        self.mma = frame.mma.mma
        self.is_half = self.mma.dtype == F16
        self.chunks = self.spec.tile_cols // TILE_COLS

    def sums(self) -> list[UOp]:
        spec, body, steps = self.spec, self.body, self.spec.steps
        tile_w = body.shared(padded(spec.row_tile * spec.tile_cols), F16)
        tile_x = body.shared(padded(spec.token_tile * spec.tile_cols), F16)
        names = [f"sum{i}" for i in range(self.frame.row_blocks * self.frame.token_blocks)]
        zeroed = statement([declared(names)], *self.frame.axes, has_scope=False)
        first = self._written(tile_w, self._w_stores(0)) + self._written(tile_x, self._x_stores(0))
        filled = UOp(Ops.BARRIER, src=(zeroed, *first))
        loop, turn = self.frame.loop()
        following = (turn + 1).minimum(steps - 1)
        pending = _Pending(body, loop, self._w_stores(following), self._x_stores(following))
        multiplied = self._multiply(tile_w.after(filled, loop), tile_x.after(filled, loop))
        read = UOp(Ops.BARRIER, src=(multiplied, *pending.kept))
        stores_w, stores_x = pending.stores(read)
        stored = self._written(tile_w.after(read), stores_w) + self._written(tile_x.after(read), stores_x)
        done = UOp(Ops.BARRIER, src=tuple(stored)).end(loop)
        return elements(names, done)

    # -- products ------------------------------------------------------------------------------------------------------

    def _multiply(self, tile_w: UOp, tile_x: UOp) -> UOp:
        """Add one step's products to the simdgroup's sums."""
        row, column = self.mma.head(self.lane), self.mma.column(self.lane)
        token = self.frame.warp_token + column
        operands = [
            (
                [
                    tile_w[self._w_place(chunk, self.frame.block_row(block) + row, column // 2)]
                    for block in range(self.frame.row_blocks)
                ],
                [
                    tile_x[self._x_place(chunk, (token + block * 8) // 2, row, 0)]
                    for block in range(self.frame.token_blocks)
                ],
            )
            for chunk in range(self.chunks)
        ]
        return multiply_blocks(self.mma, operands)

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _w_place(self, chunk: UOp | int, row: UOp, pair: UOp | int) -> UOp:
        return chunk * padded(self.spec.row_tile * TILE_COLS) + row * TILE_COLS + row // 2 * PAD + pair * 8

    def _x_place(self, chunk: UOp | int, tokens: UOp, column: UOp, piece: UOp | int) -> UOp:
        base = chunk * padded(self.spec.token_tile * TILE_COLS) + tokens * (2 * TILE_COLS + PAD)
        return base + column * 8 + piece * 2

    @staticmethod
    def _written(tile: UOp, stores: Iterable[Store]) -> list[UOp]:
        return [tile[place if wanted is None else place.valid(wanted)].store(value) for place, value, wanted in stores]

    def _units(self, count: int) -> list[tuple[UOp, UOp | None]]:
        """(number, whether it exists; None: always) of each of `count` units of work that the thread does."""
        units, threads = [], self.frame.threads
        for start in range(0, count, threads):
            unit = start + self.frame.thread
            units.append((unit, None) if start + threads <= count else (unit % count, unit < count))
        return units

    # -- weights -------------------------------------------------------------------------------------------------------

    def _w_stores(self, step: UOp | int) -> list[Store]:
        """Stores of a step's weights: a unit of work is a run of 32, or 8 where weights are not quantized."""
        spec, stores = self.spec, []
        cols = PANEL if spec.format.is_quantized else PIECE
        per_row = spec.tile_cols // cols
        for unit, wanted in self._units(spec.row_tile * per_row):
            row, part = unit // per_row, unit % per_row
            run = (self.frame.split * spec.steps + step) * per_row + part
            values = self._weights(self.frame.matrix_row(row), run)
            chunk = part // (TILE_COLS // cols)
            for i, value in enumerate(values):
                pair = i // 8 if spec.format.is_quantized else part % SLICES
                stores.append((self._w_place(chunk, row, pair) + i % 8, value, wanted))
        return stores

    def _weights(self, row: UOp, run: UOp) -> list[UOp]:
        """A unit's weights as they lie in the tile."""
        spec, planes = self.spec, self.frame.planes
        if spec.format.is_quantized:
            words = read_pairs(planes, row, run, spec.num_cols // PANEL, self.mma)
            factors = run_factors(planes, pair_form(spec.format, self.mma), row, run, spec.num_cols)
            # words of four neighbors alternate between the halves of the run, and so between its groups
            floats = [half.cast(F32) for word in words for half in self.mma.pair_of(word)]
            scaled = [Run(floats[i : i + 4], [factors[i // 4 % len(factors)]]) for i in range(0, PANEL, 4)]
            return [self._encode(value) for four in scaled for value in four.values(F32)]
        if spec.format.name == "bfloat16" and not self.is_half:
            start = row * (spec.num_cols // 2) + run * (PIECE // 2)
            words = [planes.codes[start + i].load() for i in range(PIECE // 2)]
            return [half for word in words for half in (_as_half(word), _as_half(word >> 16))]
        if spec.format.name == "float16" and self.is_half:
            start = row * spec.num_cols + run * PIECE
            return [planes.codes[start + i].load() for i in range(PIECE)]
        return [self._encode(value) for value in read_run(planes, row, run, spec.num_cols, PIECE).values(F32)]

    def _encode(self, value: UOp) -> UOp:
        """A float32 as it lies in a tile. Rounding to bfloat16 takes ties upwards, in half the instructions."""
        return value.cast(F16) if self.is_half else _as_half((value.bitcast(U32) + HALF_ULP) >> 16)

    # -- x -------------------------------------------------------------------------------------------------------------

    def _x_stores(self, step: UOp | int) -> list[Store]:
        """Stores of a step's x: a unit of work is two tokens' pieces of 8 columns."""
        spec, stores = self.spec, []
        per_row = spec.tile_cols // PIECE
        for unit, wanted in self._units(spec.token_tile // 2 * per_row):
            tokens, part = unit // per_row, unit % per_row
            chunk, piece = part // SLICES, part % SLICES
            runs = [
                self._x_piece(tokens * 2 + i, (self.frame.split * spec.steps + step) * per_row + part) for i in (0, 1)
            ]
            for col in range(PIECE):
                column, first = self._place_of(piece, col)
                place = self._x_place(chunk, tokens, column, first)
                stores += [(place + i, run[col], wanted) for i, run in enumerate(runs)]
        return stores

    def _x_piece(self, token: UOp, piece: UOp) -> list[UOp]:
        at = self.frame.tile.source(token) * self.spec.num_cols + piece * PIECE
        if self.frame.x.dtype == F16:  # in a bfloat16 model, a norm's results as their bits
            return [self.frame.x[at + i].load() for i in range(PIECE)]
        return [self._encode(value) for value in load_floats(self.frame.x, at, PIECE)]

    def _place_of(self, piece: UOp, col: int) -> tuple[UOp, UOp | int]:
        """(2 * pair of columns + place in it, slice) of column `col` of a piece of 8 in 32."""
        if not self.spec.format.is_quantized:
            return piece * 2 + col % 2, col // 2
        four, place = col // 4, col % 4  # as the codes in `read_pairs`: 0 and 2, 1 and 3 are pairs
        return piece % 2 * 4 + four * 2 + place // 2, piece // 2 * 2 + place % 2


def multiply_blocks(mma: Mma, chunks: Sequence[tuple[list[UOp], list[UOp]]]) -> UOp:
    """A statement that adds to each accumulator its own products, of a left and a right block and 32 columns of each
    chunk; accumulators of the first right block come first. `chunks`: where a lane's 16 bytes of each left and right
    block begin.

    Of the left blocks only two or three are in registers at a time. An accumulator is used again after as many products
    as there are right blocks, or twice as many where those are few, when its last product has left the pipeline."""
    lines: list[str] = []
    for number, (lefts, rights) in enumerate(chunks):
        first = number * (len(lefts) + len(rights))
        left_names = [f"a{number}_{i}" for i in range(len(lefts))]
        right_names = [f"b{number}_{i}" for i in range(len(rights))]
        loads = [loaded(name, first + i) for i, name in enumerate((*left_names, *right_names))]
        lines += [*loads[len(lefts) :], *operands(mma.dtype, right_names), loads[0]]
        at_once = 1 if len(rights) >= INDEPENDENT else min(2, len(lefts))
        for j in range(0, len(lefts), at_once):
            some = left_names[j : j + at_once]
            lines += [*loads[j + 1 : min(j + at_once + 1, len(lefts))], *operands(mma.dtype, some)]
            lines += [
                product(f"sum{i * len(lefts) + j + k}", left + part, right + part)
                for part in PARTS
                for k, left in enumerate(some)
                for i, right in enumerate(right_names)
            ]
    return statement(lines, *(start for lefts, rights in chunks for start in (*lefts, *rights)))


# -- loads ahead -------------------------------------------------------------------------------------------------------


class _Pending:
    """Stores of the next step's data, which is loaded before this step's products and waits in registers."""

    def __init__(self, body: Body, loop: UOp, *stores: list[Store]) -> None:
        self._stores = stores
        self._loads = outer_loads([value for some in stores for _, value, _ in some])
        counts = Counter(load.dtype for load in self._loads)
        self._registers = {dtype: body.registers(count, dtype) for dtype, count in counts.items()}
        self.kept = [place.store(load) for load, place in zip(self._loads, self._places(loop), strict=True)]

    def _places(self, after: UOp) -> list[UOp]:
        """The register of each loaded value."""
        used: Counter[DType] = Counter()
        places = []
        for load in self._loads:
            places.append(self._registers[load.dtype].after(after)[used[load.dtype]])
            used[load.dtype] += 1
        return places

    def stores(self, after: UOp) -> list[list[Store]]:
        """The stores, from the registers."""
        known = {load: place.load() for load, place in zip(self._loads, self._places(after), strict=True)}
        return [
            [(place, value.substitute(known, walk=True), wanted) for place, value, wanted in some]
            for some in self._stores
        ]


def _as_half(word: UOp) -> UOp:
    """A word's low half, in a float16."""
    return word.cast(U16).bitcast(F16)
