"""Tiles in threadgroup memory for the matrix unit: how they are filled, and how a lane reads its operands from them.

A tile is (rows, 32) values of 16 bits, in a float16 buffer; bfloat16 is stored as its bits. CUDA has instructions for
filling and for reading (cp.async, ldmatrix) that tinygrad does not know: they are inline PTX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.ops.kernel.body import F16, F32
from tinyvllm.ops.kernel.lanes import WORDS, Mma, VectorType

TILE_COLS = 32
PIECE = 8  # values that one asynchronous copy moves: 16 bytes

COPY = (
    'asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: '
    '"r"((unsigned)__cvta_generic_to_shared({0})), "l"({1}), "r"({2}) : "memory");'
)
COMMIT = 'asm volatile("cp.async.commit_group;" ::: "memory");'
WAIT = 'asm volatile("cp.async.wait_group %d;" ::: "memory");'
READ = (
    '[&]{{ uint4 r; asm volatile("ldmatrix.sync.aligned.m8n8.x4%s.shared.b16 {{%%0, %%1, %%2, %%3}}, [%%4];" : '
    '"=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"((unsigned)__cvta_generic_to_shared({0})) : "memory"); '
    "return r; }}()"
)
MULTIPLY = (
    'asm("mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 {{%%0, %%1, %%2, %%3}}, {{%%4, %%5, %%6, %%7}}, '
    '{{%%8, %%9}}, {{%%0, %%1, %%2, %%3}};" : "+f"(%s), "+f"(%s), "+f"(%s), "+f"(%s) : '
    '"r"({%d}.x), "r"({%d}.y), "r"({%d}.z), "r"({%d}.w), "r"({%d}.%s), "r"({%d}.%s));'
)
MULTIPLY_FLOATS = "[&]{{ float4 c = make_float4({0}, {1}, {2}, {3}); %s return c; }}()"
MOVE_PIECE = "*((uint4*)({0})) = *((uint4*)({1}));"
PACK = '[&]{{ uint r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"({1}), "f"({0})); return r; }}()'
EXP2 = '[&]{{ float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"({0})); return r; }}()'
LOG2 = '[&]{{ float r; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"({0})); return r; }}()'
PTX_NAMES = {dtypes.half: "f16", dtypes.bfloat16: "bf16"}


FLOATS = VectorType(20, 128, "float4", None)

# what a lane feeds: values for each instruction, or on CUDA words of two values, four words at once
Operands = list[list[UOp]] | list[UOp]


@dataclass(frozen=True)
class TileMma:
    """Products of tiles: sums[l, r] += sum over 32 columns c of left[l, c] * right[r, c], in blocks of one
    instruction."""

    mma: Mma

    @property
    def left_rows(self) -> int:
        """Rows of a block of the left operand."""
        return 16 if self.is_cuda else 8

    @property
    def right_rows(self) -> int:
        return 8

    @property
    def kind(self) -> str:
        return self.mma.kind

    @property
    def is_cuda(self) -> bool:
        return self.kind == "CUDA"

    @property
    def elements(self) -> int:
        """Sums of a block that one lane holds."""
        return self.mma.elements

    @property
    def slot_cols(self) -> int:
        """Columns of a slot, the columns that a lane reads at once."""
        return TILE_COLS // self.mma.slots

    def place(self, lane: UOp, element: int) -> tuple[UOp, UOp]:
        """(left row, right row) of a lane's sum in the block. Elements 2i and 2i + 1 are neighbors in a left row."""
        if self.is_cuda:
            return lane // 4 + element // 2 * 8, lane % 4 * 2 + element % 2
        return self.mma.place(lane, element)

    def add(self, left: Operands, right: Operands, sums: UOp, first: int) -> UOp:
        """A statement that adds the product of a left and a right block to the registers `sums` from `first` on.

        It comes after the loop or the stores that `sums` is after, and only the end of a loop can wait for it."""
        places = [sums[first + e] for e in range(self.elements)]
        if self.is_cuda:
            operands = (*places, *left, *right)
            lines = _multiplications([f"*{{{i}}}" for i in range(4)], len(left), len(places), self.mma)
            return UOp(Ops.CUSTOM, dtypes.void, src=operands, arg=lines)
        new = self.sum(left, right, [place.load() for place in places])
        return UOp.group(*[place.store(value) for place, value in zip(places, new, strict=True)])

    def sum(self, left: Operands, right: Operands, sums: list[UOp]) -> list[UOp]:
        """`sums` plus the product of a left and a right block."""
        if self.is_cuda:
            lines = _multiplications(["c.x", "c.y", "c.z", "c.w"], len(left), len(sums), self.mma)
            block = UOp(Ops.CUSTOM, FLOATS, src=(*sums, *left, *right), arg=MULTIPLY_FLOATS % lines)
            return [UOp(Ops.CUSTOMI, F32, src=(block,), arg=f"{{0}}.{name}") for name in "xyzw"]
        block = UOp.stack(*sums)
        for a, b in zip(left, right, strict=True):
            block = self.mma.tile(a, b, block)
        return [block.index(e) for e in range(self.elements)]

    # -- reading -------------------------------------------------------------------------------------------------------

    def at(self, row: UOp, slot: UOp | int) -> UOp:
        """The index of a row's slot. CUDA reads one slot of eight rows at a time, and copies all slots of a few rows;
        the exclusive or avoids bank conflicts in both."""
        if self.is_cuda:
            slot = slot ^ (row // 2 % 4)
        return row * TILE_COLS + slot * self.slot_cols

    def left(self, tile: UOp, base: UOp | int, first_row: UOp | int, lane: UOp, *after: UOp) -> Operands:
        """The lane's operands for the block that begins at `first_row` of the tile at `base`. They are read after
        `after`; METAL needs only what `tile` itself is after."""
        if self.is_cuda:  # the four 8 x 8 matrices: rows, rows + 8, then the same at the next eight columns
            row = first_row + lane % 16
            return [read_matrices(tile[base + self.at(row, k * 2 + lane // 16)], *after) for k in range(2)]
        # permuting columns in both operands does not change the product: each lane's slots are runs of neighbors
        return self._runs(tile, base, first_row, self.mma.token_runs(lane))

    def right(self, tile: UOp, base: UOp | int, first_row: UOp | int, lane: UOp, *after: UOp) -> Operands:
        if self.is_cuda:
            return [read_matrices(tile[base + self.at(first_row + lane % 8, lane // 8)], *after)]
        return self._runs(tile, base, first_row, self.mma.row_runs(lane))

    def transposed(
        self, tile: UOp, base: UOp | int, first_row: UOp | int, first_col: int, lane: UOp, *after: UOp
    ) -> Operands:
        """The right operand of 8 columns from `first_col` on and 32 rows, to be multiplied by `weights` of those
        rows."""
        if self.is_cuda:
            start = tile[base + self.at(first_row + lane, first_col // self.slot_cols)]
            return [read_matrices(start, *after, transposed=True)]
        row, column = self.mma.place(lane, 0)
        starts = [base + (first_row + i * 8 + row) * TILE_COLS + first_col + column for i in range(TILE_COLS // 8)]
        return [[self.decode(tile[start + e].load()) for e in range(2)] for start in starts]

    def upright(self, tile: UOp, base: UOp | int, first_row: UOp | int, lane: UOp, *after: UOp) -> Operands:
        """The right operand of 8 rows from `first_row` on, to be multiplied by `weights` of its 32 columns."""
        if self.is_cuda:
            return self.right(tile, base, first_row, lane, *after)
        row, column = self.mma.place(lane, 0)  # `right` permutes columns, which `weights` are not
        starts = [base + (first_row + column) * TILE_COLS + i * 8 + row for i in range(TILE_COLS // 8)]
        return [[self.decode(tile[start + e * TILE_COLS].load()) for e in range(2)] for start in starts]

    def weights(self, blocks: list[list[UOp]]) -> Operands:
        """Four adjacent blocks of sums as a left operand of 32 columns; each value is in the right lane already."""
        if not self.is_cuda:
            return [[value.cast(self.mma.dtype) for value in block] for block in blocks]
        pairs = [[pack_words(block[e], block[e + 1]) for e in (0, 2)] for block in blocks]
        words = [[*pairs[k], *pairs[k + 1]] for k in (0, 2)]
        return [UOp(Ops.CUSTOM, WORDS, src=tuple(four), arg="make_uint4({0}, {1}, {2}, {3})") for four in words]

    def _runs(self, tile: UOp, base: UOp | int, first_row: UOp | int, runs: list[tuple[UOp, UOp]]) -> Operands:
        starts = [base + self.at(first_row + row, slot) for row, slot in runs]
        return [[self.decode(tile[start + i].load()) for start in starts] for i in range(self.slot_cols)]

    # -- writing -------------------------------------------------------------------------------------------------------

    def decode(self, value: UOp) -> UOp:
        return value if self.mma.dtype == F16 else value.bitcast(self.mma.dtype)

    def encode(self, value: UOp) -> UOp:
        value = value.cast(self.mma.dtype)
        return value if self.mma.dtype == F16 else value.bitcast(F16)

    def write(
        self,
        tile: UOp,
        base: UOp | int,
        row: UOp,
        first_slot: UOp | int,
        values: Sequence[UOp],
        is_wanted: UOp | None = None,
    ) -> list[UOp]:
        """Stores of whole slots of a row, if `is_wanted` (None: always)."""
        stores, width = [], self.slot_cols
        for i in range(0, len(values), width):
            start = base + self.at(row, first_slot + i // width)
            for j, value in enumerate(values[i : i + width]):
                at = start + j if is_wanted is None else (start + j).valid(is_wanted)
                stores.append(tile[at].store(self.encode(value)))
        return stores


# -- CUDA only ---------------------------------------------------------------------------------------------------------


def read_matrices(start: UOp, *after: UOp, transposed: bool = False) -> UOp:
    """ldmatrix: a lane's four words, one of each of four 8 x 8 matrices. Lane l passes the address of row l % 8 of
    matrix l / 8; its word holds two neighbors of row l / 4, or of column l / 4 if transposed."""
    return UOp(Ops.CUSTOM, WORDS, src=(start, *after), arg=READ % (".trans" * transposed))


def _multiplications(sums: list[str], count: int, first: int, mma: Mma) -> str:
    """The text of sums (16 x 8) += left * right. left: `count` adjacent blocks of (16 x 16), right: blocks of (8 x 32);
    they are the operands from number `first` on."""
    name, lines = PTX_NAMES[mma.dtype], []
    for k in range(count):
        words = ("x", "y") if k % 2 == 0 else ("z", "w")
        left, right = first + k, first + count + k // 2
        lines.append(MULTIPLY % (name, name, *sums, left, left, left, left, right, words[0], right, words[1]))
    return "\n".join(lines)


def copy_piece(target: UOp, source: UOp, is_wanted: UOp | None, *after: UOp) -> UOp:
    """Start to copy 16 bytes from device to threadgroup memory; zeros if not `is_wanted` (None: always wanted)."""
    whole = UOp.const(16, dtypes.int)
    size = whole if is_wanted is None else is_wanted.where(whole, 0)
    names_type = UOp.const(0.0, F16)  # makes tinygrad declare float16, as some operand has it
    return UOp(Ops.CUSTOM, dtypes.void, src=(target, source, size, names_type, *after), arg=COPY)


def commit(*copies: UOp) -> UOp:
    """Make the copies since the last commit one group."""
    return UOp(Ops.CUSTOM, dtypes.void, src=copies, arg=COMMIT)


def arrival(pending: int, *after: UOp) -> UOp:
    """A barrier: all but the `pending` latest groups of copies have arrived, those of all threads."""
    waited = UOp(Ops.CUSTOM, dtypes.void, src=after, arg=WAIT % pending)
    return UOp(Ops.BARRIER, src=(waited,))


def together(*statements: UOp) -> UOp:
    """Group stores and other statements; `UOp.group` takes stores only."""
    return UOp(Ops.NOOP, dtypes.void, src=statements)


def store_vector(target: UOp, words: Sequence[UOp], is_wanted: UOp | None = None, *after: UOp) -> UOp:
    """A statement that stores one, two or four words, at a multiple of their bytes. CUDA's compiler does not know that
    buffers are aligned, and would store each value by itself."""
    count = len(words)
    operands = ", ".join(f"{{{1 + i}}}" for i in range(count))
    value = operands if count == 1 else f"make_uint{count}({operands})"
    text = f"*((uint{count if count > 1 else ''}*)({{0}})) = {value};"
    return _if_wanted(text, (target, *words), is_wanted, after)


def store_values(buffer: UOp, at: UOp, values: Sequence[UOp], is_wanted: UOp | None = None) -> list[UOp]:
    """Statements that store neighbors of 4, 8 or a multiple of 16 bytes, which begin at a multiple of so many in an
    aligned buffer."""
    words, per_word = words_of(values, buffer.dtype), 4 // buffer.dtype.itemsize
    return [store_vector(buffer[at + i * per_word], words[i : i + 4], is_wanted) for i in range(0, len(words), 4)]


def words_of(values: Sequence[UOp], dtype: DType) -> list[UOp]:
    """The words of neighboring values, which are stored in a dtype of 32 or 16 bits."""
    if dtype == F32:
        return [value.cast(F32).bitcast(dtypes.uint) for value in values]
    pack = pack_words if values[0].dtype == F32 else join_bits
    return [pack(low, high) for low, high in zip(values[::2], values[1::2], strict=True)]


def move_piece(target: UOp, source: UOp, is_wanted: UOp | None = None, *after: UOp) -> UOp:
    """A statement that copies eight float16, between multiples of 16 bytes."""
    return _if_wanted(MOVE_PIECE, (target, source), is_wanted, after)


def _if_wanted(text: str, operands: tuple[UOp, ...], is_wanted: UOp | None, after: tuple[UOp, ...]) -> UOp:
    if is_wanted is not None:
        text, operands = f"if ({{{len(operands)}}}) {text}", (*operands, is_wanted)
    return UOp(Ops.CUSTOM, dtypes.void, src=(*operands, *after), arg=text)


def pack_words(low: UOp, high: UOp) -> UOp:
    """Two float32 values, rounded to float16, in one word."""
    return UOp(Ops.CUSTOM, dtypes.uint, src=(low, high, UOp.const(0.0, F16)), arg=PACK)


def join_bits(low: UOp, high: UOp) -> UOp:
    """Two values of 16 bits in one word."""
    low, high = (value.bitcast(dtypes.ushort).cast(dtypes.uint) for value in (low, high))
    return low | high << 16


# -- arithmetic --------------------------------------------------------------------------------------------------------


def quick_division(top: UOp, bottom: UOp, kind: str) -> UOp:
    """top / bottom by the device's fast division, accurate to 2 ulp of float32."""
    return UOp(Ops.CUSTOM, F32, src=(top, bottom), arg="__fdividef({0}, {1})") if kind == "CUDA" else top / bottom


def quick_exp2(x: UOp, kind: str) -> UOp:
    """2**x by the device's approximation, accurate to 2 ulp; very negative x gives 0."""
    return UOp(Ops.CUSTOM, F32, src=(x,), arg=EXP2) if kind == "CUDA" else x.exp2()


def quick_log2(x: UOp, kind: str) -> UOp:
    """log2 of a normal number by the device's approximation, accurate to 2 ^ -21 near 1."""
    return UOp(Ops.CUSTOM, F32, src=(x,), arg=LOG2) if kind == "CUDA" else x.log2()


def quick_maximum(a: UOp, b: UOp, kind: str) -> UOp:
    """The maximum of two numbers in one instruction; tinygrad's takes two."""
    return UOp(Ops.CUSTOMI, F32, src=(a, b), arg="fmaxf({0}, {1})") if kind == "CUDA" else a.maximum(b)
