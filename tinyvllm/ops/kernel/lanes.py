"""The building blocks of GPU kernels, besides body.py: sums across lanes, carried registers, matrix units.

Two things depend on the kind of device, and both are here: how a lane gets another lane's value, and which elements of
a matrix product a lane holds. A device without either (OpenCL) takes the general kernels of ops/gpu/backend.py.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tinygrad import Device, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.ops.kernel.body import F32, I32, Body, balanced

LANES = 32  # threads that run in lockstep: CUDA's warp, METAL's simdgroup
SHARED_BYTES = 32 << 10  # threadgroup memory that every device has (METAL's limit; CUDA has 48 KiB)


class VectorType(DType):
    """A CUDA vector type that tinygrad sees as one value."""

    def __repr__(self) -> str:
        return f"VectorType({self.name})"


SHUFFLES = {"CUDA": "__shfl_xor_sync(0xffffffffu,{0},%d)", "METAL": "simd_shuffle_xor({0},%d)"}
METAL_WARPS = 8  # of a threadgroup that runs however many registers its kernel needs; 16 take at most 104 of a thread's
HELD = "{0}"  # of a value that is the same as another one
LEADING = {Ops.RANGE, Ops.SPECIAL, Ops.PARAM, Ops.BUFFER, Ops.INDEX}  # what leads to loads, and is not computed of any
HALF_PAIR = 0x64006400  # two float16 of 1024, whose lowest mantissa bit is worth 1
# word & mask | bits as one instruction; the compiler keeps one of the two constants in a register
AND_OR = (
    '[](uint w){{{{ uint d; asm("lop3.b32 %0, %1, {0:#x}, {1:#x}, 0xea;" : "=r"(d) : "r"(w)); return d; }}}}({{0}})'
)
# the lambda's argument is the word's lower or upper half, which the instruction takes without a shift
FLOAT8_PAIR = (
    '[](unsigned short e){{{{ unsigned d; asm("%s" : "=r"(d) : "h"(e)); return d; }}}}((unsigned short)({0} >> %d))'
)
FLOAT8_TO = {
    dtypes.half: "cvt.rn.f16x2.e4m3x2 %0, %1;",
    dtypes.bfloat16: (
        "{{ .reg .b32 pair;\\n.reg .b16 low, high;\\n.reg .f32 first, second;\\ncvt.rn.f16x2.e4m3x2 pair, %1;\\n"
        "mov.b32 {{low, high}}, pair;\\ncvt.f32.f16 first, low;\\ncvt.f32.f16 second, high;\\n"
        "cvt.rn.bf16x2.f32 %0, second, first; }}"
    ),
}
MULTIPLY_WORDS = (
    'asm("mma.sync.aligned.{kind}'
    ' {{{{%0,%1,%2,%3}}}}, {{{{%4,%5,%6,%7}}}}, {{{{%8,%9}}}}, {{{{%0,%1,%2,%3}}}};"'
    ' : "+{c}"({sums}_0), "+{c}"({sums}_1), "+{c}"({sums}_2), "+{c}"({sums}_3) : {words});'
)
WORDS = VectorType(20, 128, "uint4", None)  # four words of two halves
TWO_WORDS = VectorType(20, 64, "uint2", None)
LOAD_WORDS = "*((uint4*)({0}))"
LOAD_TWO = "*((uint2*)({0}))"
LOAD_WORDS_IF = "({1} ? *((uint4*)({0})) : make_uint4(0u, 0u, 0u, 0u))"
PERMUTE = "__byte_perm({0}, %#x, %#x)"
PERMUTE_BY = "__byte_perm({0}, {1}, {2})"  # nibbles of {2}, without their highest bits, choose among eight bytes
FUSE = (
    '[](uint a, uint b, uint c){{ uint d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); '
    "return d; }}({0}, {1}, {2})"
)
BOTH = '[](half h){{ uint d; asm("mov.b32 %0, {{%1, %1}};" : "=r"(d) : "h"(__half_as_ushort(h))); return d; }}({0})'
# The next kernel may start as soon as all threadgroups of this one have, and there is room: it waits for the end itself
START_NEXT = 'asm volatile("griddepcontrol.launch_dependents;" ::: "memory");'
CHAIN = f'{START_NEXT}\nasm volatile("{AWAIT_PREVIOUS};" ::: "memory");'
WAITED = "// each thread has waited: its loads need no barrier"
# (columns of the right operand, rows of the left one, terms) of one instruction
MATRIX_DIMS = {"CUDA": (8, 16, 16), "METAL": (8, 8, 8)}


@dataclass(frozen=True)
class Lanes:
    """A kind of device whose lanes can exchange values. Hashable, because it is part of the kernels' cache keys."""

    kind: str  # CUDA or METAL
    matrix_dtypes: tuple[DType, ...] = ()  # operands of its matrix unit with float32 sums
    is_chained: bool = False  # a kernel may start before the previous one has ended: see `await_previous`
    has_float8: bool = False  # an instruction converts two e4m3 numbers to float16

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory that a kernel may declare."""
        return 48 << 10 if self.kind == "CUDA" else SHARED_BYTES

    def shuffle(self, value: UOp, mask: int) -> UOp:
        """The float32 `value` of the lane whose number differs in the bits of `mask`."""
        # CUSTOM, not CUSTOMI: it is evaluated once, into a variable
        return UOp(Ops.CUSTOM, F32, src=(value,), arg=SHUFFLES[self.kind] % mask)

    def sum(self, value: UOp, masks: Sequence[int] = (16, 8, 4, 2, 1)) -> UOp:
        """The sum over the lanes that `masks` connect, in each of them."""
        for mask in masks:
            value = value + self.shuffle(value, mask)
        return value

    def maximum(self, value: UOp, masks: Sequence[int] = (16, 8, 4, 2, 1)) -> UOp:
        """The maximum over the lanes that `masks` connect, in each of them."""
        for mask in masks:
            value = value.maximum(self.shuffle(value, mask))
        return value


def lanes_of(device_name: str) -> Lanes | None:
    """The lanes of an opened device; None if kernels have no way to exchange values between them."""
    kind = device_name.split(":")[0]
    if kind not in SHUFFLES:
        return None
    cores = Device[device_name].renderer.tensor_cores
    fitting = [core.dtype_in for core in cores if core.dims == MATRIX_DIMS[kind] and core.dtype_out == dtypes.float]
    sm = _cuda_version(device_name)
    return Lanes(kind, tuple(fitting), sm >= 90, sm >= 89)  # no matrix unit before sm_80 and Apple7


def _cuda_version(device_name: str) -> int:
    """90 of sm_90; 0 if the device is not CUDA."""
    arch: str = Device[device_name].renderer.target.arch
    return int(arch[3:].rstrip("a")) if arch.startswith("sm_") else 0


@dataclass(frozen=True)
class Mma:
    """Tiles of out[token, row] += sum over k of x[token, k] * w[row, k] on a device's matrix unit.

    Permuting k in both operands does not change the product. So each lane reads a run of consecutive columns, `slots`
    adjacent runs make up a chunk, and no operand passes through threadgroup memory.
    """

    kind: str
    dtype: DType  # of the operands
    has_float8: bool = False  # as in Lanes

    @property
    def rows(self) -> int:
        """Rows of w in a tile; a tile has 8 tokens."""
        return MATRIX_DIMS[self.kind][1]

    @property
    def slots(self) -> int:
        """Runs in a chunk."""
        return 4 if self.kind == "CUDA" else 8

    @property
    def elements(self) -> int:
        """Sums of a tile that one lane holds."""
        return 4 if self.kind == "CUDA" else 2

    def row_runs(self, lane: UOp) -> list[tuple[UOp, UOp]]:
        """(row in the tile, slot) of the two runs of w that a lane feeds."""
        if self.kind == "CUDA":
            return [(lane // 4, lane % 4), (lane // 4 + 8, lane % 4)]
        across, down = _metal_place(lane)
        return [(down, across), (down + 1, across)]

    def token_runs(self, lane: UOp) -> list[tuple[UOp, UOp]]:
        """(token in the tile, slot) of the runs of x that a lane feeds: one (CUDA) or two (METAL)."""
        if self.kind == "CUDA":
            return [(lane // 4, lane % 4)]
        across, down = _metal_place(lane)
        return [(across, down), (across, down + 1)]

    def place(self, lane: UOp, element: int | UOp) -> tuple[UOp, UOp]:
        """(token, row) of a lane's sum in the tile."""
        if self.kind == "CUDA":
            return lane % 4 * 2 + element % 2, lane // 4 + element // 2 * 8
        across, down = _metal_place(lane)
        return across, down + element

    def head(self, lane: UOp) -> UOp:
        """The first row of the left operand, and of the sums, that a lane holds."""
        return lane // 4 if self.kind == "CUDA" else _metal_place(lane)[0]

    def column(self, lane: UOp) -> UOp:
        """The first of the two columns that a lane holds in that row of the sums."""
        return lane % 4 * 2 if self.kind == "CUDA" else _metal_place(lane)[1]

    @property
    def row_masks(self) -> tuple[int, ...]:
        """Masks that connect the lanes of the same row: `Lanes.sum` with these adds up a row."""
        return (1, 2) if self.kind == "CUDA" else (1, 8)

    @property
    def slot_masks(self) -> tuple[int, ...]:
        """Masks that connect the lanes that hold one row of w's sums with the tokens below `slots`: `Lanes.sum` with
        these adds them."""
        return (1,) if self.kind == "CUDA" else (2, 4, 16)

    def to_halves(self, word: UOp, mask: int, pair: int = HALF_PAIR) -> UOp:
        """A word of two float16: 1024 (or those of another pair) + each of the two small integers of `word & mask`."""
        if self.kind == "CUDA":
            return UOp(Ops.CUSTOM, dtypes.uint, src=(word,), arg=AND_OR.format(mask, pair))
        return (word & mask) | pair

    @property
    def takes_subnormals(self) -> bool:
        """Whether the matrix unit is known to compute with subnormal float16."""
        return self.kind == "CUDA"

    def float8_pair(self, word: UOp, which: int) -> UOp:
        """Bytes 2 * which and 2 * which + 1 of a word, which are e4m3 numbers, as a word of two numbers of `dtype`."""
        assert self.has_float8, f"{self} does not convert e4m3"
        text = FLOAT8_PAIR % (FLOAT8_TO[self.dtype], 16 * which)
        return UOp(Ops.CUSTOM, dtypes.uint, src=(word,), arg=text)

    def scaled(self, word: UOp, factor: float) -> UOp:
        """A word's two halves times a constant."""
        low, high = (half * UOp.const(factor, dtypes.half) for half in _in_halves([word]))
        low, high = (half.bitcast(dtypes.ushort).cast(dtypes.uint) for half in (low, high))
        return low | high << 16

    def look_up(self, word: UOp, table: Sequence[int]) -> tuple[UOp, UOp]:
        """The bytes that eight codes of 4 bits have in a table of 16: (those of the low halves of the word's bytes,
        those of the high halves), each in the order of the bytes."""
        assert len(table) == 16, f"a table of {len(table)} bytes"
        quarters = [sum(byte << 8 * i for i, byte in enumerate(table[q : q + 4])) for q in range(0, 16, 4)]
        quarter = [UOp.const(value, dtypes.uint) for value in quarters]
        if self.kind != "CUDA":
            low, high = ([_table_byte(word, i * 8 + side, quarter) << i * 8 for i in range(4)] for side in (0, 4))
            return balanced(low, operator.or_), balanced(high, operator.or_)
        # the lower and the upper eight bytes by the codes' lower three bits, then those of the right half; four codes
        # at a time
        is_upper, found = (word & 0x88888888) >> 1 | 0x32103210, []
        for shift in (0, 16):
            codes, halves = (side >> shift if shift else side for side in (word, is_upper))
            first, second = (_permuted(quarter[q], quarter[q + 1], codes) for q in (0, 2))
            found.append(_permuted(first, second, halves))
        even, odd = (UOp.const(places, dtypes.uint) for places in (0x6420, 0x7531))
        return _permuted(found[0], found[1], even), _permuted(found[0], found[1], odd)

    # a pair: two float16 values, on CUDA in one word

    def byte_pair(self, word: UOp, which: int, above: int) -> UOp:
        """Bytes 2 * which and 2 * which + 1 of a word, each extended by `above` as its high byte, as one word."""
        if self.kind == "CUDA":
            selector = 0x4342 if which else 0x4140
            return UOp(Ops.CUSTOM, dtypes.uint, src=(word,), arg=PERMUTE % (above * 0x01010101, selector))
        moved = word >> 16 if which else word
        return (moved & 0xFF) | ((moved & 0xFF00) << 8) | (above << 8 | above << 24)

    def pair_of(self, word: UOp) -> tuple[UOp, ...]:
        """A word's two halves as a pair."""
        return (word,) if self.kind == "CUDA" else tuple(_in_halves([word]))

    def both(self, value: UOp | float) -> UOp:
        """A factor or addend of `fuse` that is the same for both values of a pair: a constant or a float16."""
        if isinstance(value, UOp):
            return UOp(Ops.CUSTOM, dtypes.uint, src=(value,), arg=BOTH) if self.kind == "CUDA" else value
        if self.kind != "CUDA":
            return UOp.const(value, dtypes.half)
        (bits,) = struct.unpack("<H", struct.pack("<e", value))
        return UOp.const(bits << 16 | bits, dtypes.uint)

    def fuse(self, pair: tuple[UOp, ...], factor: UOp, addend: UOp | None) -> tuple[UOp, ...]:
        """pair * factor + addend, in float16."""
        if self.kind == "CUDA":
            src = (pair[0], factor, self.both(0.0) if addend is None else addend)
            return (UOp(Ops.CUSTOM, dtypes.uint, src=src, arg=FUSE),)
        return tuple(value * factor if addend is None else value * factor + addend for value in pair)

    def load_pairs(self, buffer: UOp, at: UOp, count: int) -> list[UOp]:
        """`count` neighbors in a float16 buffer (a multiple of 8), as an operand of `multiply_pairs`."""
        if self.kind == "METAL":
            return [buffer[at + i].load() for i in range(count)]
        # the zero is not rendered: it makes tinygrad include the header that declares the buffer's type
        zero = UOp.const(0.0, buffer.dtype)
        words = [UOp(Ops.CUSTOM, WORDS, src=(buffer[at + i], zero), arg=LOAD_WORDS) for i in range(0, count, 8)]
        return [UOp(Ops.CUSTOMI, dtypes.uint, src=(four,), arg=f"{{0}}.{name}") for four in words for name in "xyzw"]

    def multiply_pairs(self, body: Body, w: list[list[UOp]], x: list[list[UOp]], start: list[UOp]) -> list[UOp]:
        """Like `multiply`, with operands in pairs; returns a tile's sums, which begin at `start`."""
        if self.kind == "CUDA":
            return self.multiply_words(body, w, x, start)
        sums = self.multiply(w, x, UOp.stack(*start))
        return [sums.index(e) for e in range(self.elements)]

    def multiply_words(self, body: Body, w: list[list[UOp]], x: list[list[UOp]], start: Sequence[UOp]) -> list[UOp]:
        """Like `multiply`, with operands in words of two halves; returns a tile's sums, which begin at `start`.

        On CUDA this is inline PTX: tinygrad would split the words, and the compiler would move every half."""
        if self.kind == "METAL":
            sums = self.multiply([_in_halves(run) for run in w], [_in_halves(run) for run in x], UOp.stack(*start))
            return [sums.index(e) for e in range(self.elements)]
        kind = "f16" if self.dtype == dtypes.half else "bf16"
        return _multiply_inline(body, f"m16n8k16.row.col.f32.{kind}.{kind}.f32", F32, w, x[0], start)

    def multiply(self, w: list[list[UOp]], x: list[list[UOp]], sums: UOp) -> UOp:
        """Add the product of one chunk to `sums`. w: the lane's `row_runs`, x: its `token_runs`, both of `dtype`."""
        if self.kind == "METAL":
            for a, b, c, d in zip(x[0], x[1], w[0], w[1], strict=True):
                sums = self.tile((a, b), (c, d), sums)
            return sums
        low, high, right = w[0], w[1], x[0]
        for i in range(0, len(low), 4):
            left = (*low[i : i + 2], *high[i : i + 2], *low[i + 2 : i + 4], *high[i + 2 : i + 4])
            sums = self.tile(left, right[i : i + 4], sums)
        return sums

    def tile(self, left: Sequence[UOp], right: Sequence[UOp], sums: UOp) -> UOp:
        """One instruction. The left operand is rows of w on CUDA, and tokens on METAL."""
        return UOp.wmma(UOp.stack(*left), UOp.stack(*right), sums, MATRIX_DIMS[self.kind], self.kind, LANES)


def multiply_bytes(body: Body, w: list[list[UOp]], x: list[UOp], start: Sequence[UOp]) -> list[UOp]:
    """As `Mma.multiply_words` on CUDA, of words of four bytes: unsigned ones of w, signed ones of x, and int32 sums."""
    return _multiply_inline(body, "m16n8k32.row.col.s32.u8.s8.s32", I32, w, x, start)


def multiply_tf32(body: Body, w: list[list[UOp]], x: list[UOp], start: Sequence[UOp]) -> list[UOp]:
    """As `Mma.multiply_words` on CUDA, of words of float32, of which the matrix unit ignores the lowest 13 bits. A
    lane's words of w are in columns 4 apart."""
    return _multiply_inline(body, "m16n8k8.row.col.f32.tf32.tf32.f32", F32, w, x, start)


def _multiply_inline(
    body: Body, kind: str, dtype: DType, w: list[list[UOp]], x: list[UOp], start: Sequence[UOp]
) -> list[UOp]:
    """A tile's sums after instructions of a kind, two words of each operand at a time. w: the lane's two rows."""
    (low, high), name = w, f"sums{body.label()}"
    type_name, letter = ("float", "f") if dtype == F32 else ("int", "r")
    lines = [f"{type_name} " + ", ".join(f"{name}_{e} = {{{e}}}" for e in range(4)) + ";"]
    operands = list(start)
    for i in range(0, len(low), 2):
        words = ", ".join(f'"r"({{{len(operands) + j}}})' for j in range(6))
        lines.append(MULTIPLY_WORDS.format(sums=name, words=words, kind=kind, c=letter))
        operands += [low[i], high[i], low[i + 1], high[i + 1], x[i], x[i + 1]]
    done = UOp(Ops.CUSTOM, dtypes.void, src=tuple(operands), arg="\n".join(lines))
    # the zero is not rendered: it tells tinygrad the shape, one value
    zero = UOp.const(0.0, F32) if dtype == F32 else UOp.const(0, dtype)
    return [UOp(Ops.CUSTOM, dtype, src=(zero, done), arg=f"{name}_{e}") for e in range(4)]


def _in_halves(words: Sequence[UOp]) -> list[UOp]:
    return [bits.cast(dtypes.ushort).bitcast(dtypes.half) for word in words for bits in (word & 0xFFFF, word >> 16)]


def _table_byte(word: UOp, start: int, quarters: Sequence[UOp]) -> UOp:
    """The byte that the code at bit `start` of a word has in a table of four words."""
    is_second, is_upper = (word & 4 << start).ne(0), (word & 8 << start).ne(0)
    quarter = is_upper.where(is_second.where(quarters[3], quarters[2]), is_second.where(quarters[1], quarters[0]))
    at = word << 3 - start if start < 3 else word >> start - 3
    return quarter >> (at & 24) & 0xFF


def _permuted(low: UOp, high: UOp, selector: UOp) -> UOp:
    return UOp(Ops.CUSTOM, dtypes.uint, src=(low, high, selector), arg=PERMUTE_BY)


def _metal_place(lane: UOp) -> tuple[UOp, UOp]:
    """(row, first of two columns) of an 8 x 8 simdgroup matrix that a lane holds."""
    quad = lane // 4
    return quad // 4 % 2 * 4 + lane // 2 % 4, quad // 2 % 2 * 4 + lane % 2 * 2


# -- dependent launch --------------------------------------------------------------------------------------------------


def await_previous(lanes: Lanes, *buffers: UOp, ahead: Iterable[UOp] = (), has_barrier: bool = True) -> tuple[UOp, ...]:
    """The buffers, which may be read once the previous kernels have ended. With CUDA's programmatic dependent launch,
    each of our kernels passes its inputs through here, once, except those that no kernel of a step writes: weights and
    the step's inputs. Kernels start in order, but before this point none of the earlier ones need have ended: what a
    kernel writes there, no other kernel of the step may use.

    `ahead`: values of such inputs, to be loaded while the kernel waits, and statements and loads of several words, to
    be executed before. Otherwise the compiler, which does not know of the wait, would load them where they are used.
    `has_barrier`: whether the threads meet there, which costs a product of one row 0.1 us (`HopperRenderer`)."""
    if not lanes.is_chained:
        return buffers
    ahead = list(ahead)
    words = (WORDS, TWO_WORDS)
    done = dict.fromkeys(
        uop
        for value in ahead
        for uop in value.toposort()
        if uop.op is Ops.LOAD or (uop.op is Ops.CUSTOM and uop.dtype in words)
    )
    done |= dict.fromkeys(value for value in ahead if value.op is Ops.CUSTOM and value.dtype == dtypes.void)
    # after a barrier, because tinygrad does not order loads after a CUSTOM statement
    text = CHAIN if has_barrier else f"{CHAIN}\n{WAITED}"
    ready = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=tuple(done), arg=text),))
    return tuple(buffer.after(ready) for buffer in buffers)


# -- axes and registers ------------------------------------------------------------------------------------------------


def warps(body: Body, count: int) -> UOp | int:
    """An axis over the warps of a threadgroup; 0 if there is only one."""
    return body.threads(count) if count > 1 else 0


def grid(body: Body, count: int) -> UOp | int:
    """An axis over threadgroups; 0 if there is only one."""
    return body.grid(count) if count > 1 else 0


def axes_of(*axes: UOp | int) -> tuple[UOp, ...]:
    """Those of `axes` that are axes and not the constant 0."""
    return tuple(axis for axis in axes if isinstance(axis, UOp))


Iteration = Callable[[UOp | int, list[UOp]], list[UOp]]  # (iteration, old values) -> new values


def carry(body: Body, init: Sequence[UOp], count: int | UOp, outer: Sequence[UOp], step: Iteration) -> list[UOp]:
    """Carry values through a loop in float32 registers, from `init`: new = step(iteration, old). Returns the last ones.

    `outer`: the axes and loops around this one. A single iteration needs no loop.
    """
    if isinstance(count, int) and count == 1:
        return step(0, list(init))
    registers = body.registers(len(init))
    start = UOp.group(*[registers.after(*outer)[i].store(value) for i, value in enumerate(init)])
    registers = registers.after(start)
    loop = body.fold(count) if isinstance(count, int) else body.fold_while(count)
    old = [registers.after(loop)[i].load() for i in range(len(init))]
    new = step(loop.cast(dtypes.weakint) if loop.dtype != dtypes.weakint else loop, old)
    done = UOp.group(*[registers.after(loop)[i].store(value) for i, value in enumerate(new)]).end(loop)
    return [registers.after(done)[i].load() for i in range(len(init))]


def load_floats(buffer: UOp, at: UOp, count: int) -> list[UOp]:
    """Neighbors as float32, by one vector load or a few."""
    return [buffer[at + i].load().cast(F32) for i in range(count)]


def load_cuda_floats(buffer: UOp, at: UOp, count: int, dtype: DType | None = None) -> list[UOp]:
    """`load_floats` of neighbors of 8 bytes, or of a multiple of 16, which begin at a multiple of so many in an aligned
    buffer, by vector loads. CUDA's compiler does not know of the alignment, and would load each value by itself.
    `dtype`: what the values are, if the buffer's is another one."""
    if count * buffer.dtype.itemsize == 8:
        load = UOp(Ops.CUSTOM, TWO_WORDS, src=(buffer[at], UOp.const(0.0, buffer.dtype)), arg=LOAD_TWO)
        return _floats_of_words(_words_of([load], 2), dtype or buffer.dtype)
    return floats_of_vectors(load_cuda_vectors(buffer, at, count), dtype or buffer.dtype)


def load_cuda_vectors(buffer: UOp, at: UOp, count: int) -> list[UOp]:
    """The loads of `load_cuda_floats`, each of 16 bytes."""
    # the zero is not rendered: it makes tinygrad include the header that declares the buffer's type
    zero, per_load = UOp.const(0.0, buffer.dtype), 16 // buffer.dtype.itemsize
    return [UOp(Ops.CUSTOM, WORDS, src=(buffer[at + i], zero), arg=LOAD_WORDS) for i in range(0, count, per_load)]


def load_cuda_words_if(is_wanted: UOp, buffer: UOp, at: UOp, count: int) -> list[UOp]:
    """The `count` words of neighbors from `at` on, a multiple of 16 bytes, in an aligned buffer; zeros unless
    `is_wanted`."""
    zero, size = UOp.const(0.0, buffer.dtype), buffer.dtype.itemsize  # zero: as in `load_cuda_vectors`
    places = [buffer[at + i] for i in range(0, count * 4 // size, 16 // size)]
    return _words_of([UOp(Ops.CUSTOM, WORDS, src=(place, is_wanted, zero), arg=LOAD_WORDS_IF) for place in places], 4)


def floats_of_vectors(loads: Sequence[UOp], dtype: DType) -> list[UOp]:
    """The values in vectors of four words."""
    return _floats_of_words(_words_of(loads, 4), dtype)


def _floats_of_words(words: Sequence[UOp], dtype: DType) -> list[UOp]:
    if dtype == F32:
        return [word.bitcast(F32) for word in words]
    if dtype == dtypes.bfloat16:
        return [half.bitcast(F32) for word in words for half in (word << 16, word & 0xFFFF0000)]
    return [half.cast(F32) for half in _in_halves(words)]


def load_cuda_words(buffer: UOp, at: UOp, count: int, *after: UOp) -> list[UOp]:
    """`count` neighboring words of an aligned buffer, by one load of two or a few of four, after some statements.
    tinygrad would load each by itself."""
    if count == 1:
        return [buffer[at].load()]
    size, kind, text = (4, WORDS, LOAD_WORDS) if count % 4 == 0 else (2, TWO_WORDS, LOAD_TWO)
    loads = [UOp(Ops.CUSTOM, kind, src=(buffer[at + i], *after), arg=text) for i in range(0, count, size)]
    return _words_of(loads, size)


def words_of_vectors(loads: Sequence[UOp]) -> list[UOp]:
    """The words in vectors of four."""
    return _words_of(loads, 4)


def _words_of(loads: Sequence[UOp], size: int) -> list[UOp]:
    """The words of vectors of so many."""
    return [UOp(Ops.CUSTOMI, dtypes.uint, src=(load,), arg=f"{{0}}.{name}") for load in loads for name in "xyzw"[:size]]


def hold(body: Body, values: Sequence[UOp]) -> tuple[list[UOp], UOp]:
    """(the same values in registers, a UOp after which they are there: what is loaded from a buffer after it is not
    loaded before they have been computed)."""
    registers = body.registers(len(values), values[0].dtype)
    registers = registers.after(UOp.group(*[registers[i].store(value) for i, value in enumerate(values)]))
    return [registers[i].load() for i in range(len(values))], registers


def used_after(values: Sequence[UOp], done: Sequence[UOp]) -> list[UOp]:
    """The same values, computed from their loads after `done` are. tinygrad would compute them as early as it can, and
    hold them all in registers until each is used."""
    known = {load: UOp(Ops.CUSTOM, load.dtype, src=(load, *done), arg=HELD) for load in outer_loads(values)}

    def rebuilt(uop: UOp) -> UOp:
        if uop not in known:
            src = uop.src if uop.op in LEADING else tuple(rebuilt(source) for source in uop.src)
            known[uop] = uop if src == uop.src else uop.replace(src=src)
        return known[uop]

    return [rebuilt(value) for value in values]


def outer_loads(values: Sequence[UOp]) -> list[UOp]:
    """The loads that the values are computed from, also those that are `used_after` something already, without those
    that only lead to other loads."""
    found: dict[UOp, None] = {}
    seen: set[UOp] = set()
    todo = list(reversed(values))
    while todo:
        uop = todo.pop()
        if uop in seen:
            continue
        seen.add(uop)
        if uop.op is Ops.LOAD or (uop.op is Ops.CUSTOM and uop.arg == HELD):
            found[uop] = None
        elif uop.op not in LEADING:
            todo += reversed(uop.src)
    return list(found)


def dot(a: Sequence[UOp], b: Sequence[UOp]) -> UOp:
    return balanced(x * y for x, y in zip(a, b, strict=True))


def zeros(count: int) -> list[UOp]:
    return [UOp.const(0.0, F32)] * count
