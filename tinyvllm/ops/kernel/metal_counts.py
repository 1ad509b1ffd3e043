"""What a simdgroup of a METAL kernel issues, counted in the kernel's instructions as tinygrad lists them.

Apple's compiler sees the rendered source, and may do better. It is not asked here, so these rules stand for it, each
after the throughputs in github.com/philipturner/metal-benchmarks:

- A product and a sum that follows it are one instruction; so is a conversion between float16 and float32 with its use.
- Addresses take the additions that are in the source, except of constants in threadgroup memory. Loads and stores take
  one instruction for up to 16 bytes a lane.
- Values that already lie side by side in registers are a vector for nothing. Others are moved, one instruction each.
- Shifts, products and conversions of integers, exponentials and reciprocals take one instruction each, and several
  cycles of a unit that works beside the others.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import tc
from tinygrad.device import Compiler
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import Target, getenv
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import MetalRenderer
from tinygrad.uop.ops import Ops

LANES = 32
LOOP_INSTRUCTIONS = 3  # of an iteration: an addition, a comparison, a branch
SHUFFLE_CYCLES = 2
COMPLEX_CYCLES = {Ops.EXP2: 4, Ops.LOG2: 4, Ops.RECIPROCAL: 6, Ops.SQRT: 8, Ops.SHL: 4, Ops.SHR: 4}
INTEGER_CYCLES = 4  # of a product, or of a conversion to or from a float
SIMPLE = {
    *(Ops.ADD, Ops.SUB, Ops.MUL, Ops.MAX, Ops.AND, Ops.OR, Ops.XOR),
    *(Ops.CMPLT, Ops.CMPNE, Ops.CMPEQ, Ops.WHERE, Ops.NEG, Ops.FDIV, Ops.TRUNC),
}
PRODUCT = "simdgroup_multiply_accumulate"


@dataclass(frozen=True)
class MetalCounts:
    """What one simdgroup of a kernel issues from its start to its end. Bytes are those of a lane. `cycles` of a kind of
    instruction are those of the unit that works beside the others."""

    products: float  # of 8 x 8 matrices
    shared_loads: float
    shared_load_bytes: float
    shared_stores: float
    shared_store_bytes: float
    device_loads: float
    device_load_bytes: float
    device_stores: float
    arithmetic: float  # instructions of one cycle
    floats: float  # of these, float32's, which use the units of the products
    complex_instructions: float
    complex_cycles: float
    moves: float
    barriers: float
    simdgroups: int  # of a threadgroup
    groups: int
    threadgroup_bytes: int
    registers: int  # of 32 bits a lane: the most that live at once, in the order of the source

    @property
    def beside(self) -> float:
        """Instructions beside the products."""
        memory = self.shared_loads + self.shared_stores + self.device_loads + self.device_stores
        return memory + self.arithmetic + self.complex_instructions + self.moves + self.barriers


def count_kernel(kernel: UOp, *turns: int) -> list[MetalCounts]:
    """Count a kernel, compiled for Apple9's renderer. `turns`: iterations of the loops whose length is data; the counts
    for each of them, or for 1."""
    with _vector_loads():
        program = to_program(kernel, _renderer())
    uops = program.src[1].src
    sizes = {str(uop.arg): _const(uop.src[0]) for uop in uops if uop.op is Ops.SPECIAL}
    shared = [uop for uop in uops if uop.op is Ops.BUFFER and uop.addrspace is AddrSpace.LOCAL]
    return [
        MetalCounts(
            **_Counting(uops, some).totals(),
            simdgroups=-(-math.prod(size for name, size in sizes.items() if name.startswith("l")) // LANES),
            groups=math.prod(size for name, size in sizes.items() if name.startswith("g")),
            threadgroup_bytes=sum(_elements(uop) * uop.dtype.itemsize for uop in shared),
            registers=-(-_live_bytes(uops) // 4),
        )
        for some in turns or (1,)
    ]


def _renderer() -> Renderer:
    """METAL's renderer without the device, which its constructor would look for."""
    renderer = MetalRenderer.__new__(MetalRenderer)
    Renderer.__init__(renderer, Target("METAL", arch="Apple9"))
    renderer.tensor_cores, renderer.compiler = tc.metal, Compiler()
    return renderer


@contextmanager
def _vector_loads() -> Iterator[None]:
    """Let tinygrad combine loads, as on METAL, also where DMC says otherwise for the CPU."""
    old = os.environ.get("DMC")
    os.environ["DMC"] = "0"
    getenv.cache_clear()
    try:
        yield
    finally:
        if old is None:
            del os.environ["DMC"]
        else:
            os.environ["DMC"] = old
        getenv.cache_clear()


# -- instructions ------------------------------------------------------------------------------------------------------


class _Counting:
    """Walks along a kernel's instructions, each as often as its loops run."""

    def __init__(self, uops: Sequence[UOp], turns: int) -> None:
        self.uops, self.turns = uops, turns
        self.found: dict[str, float] = defaultdict(float)
        self.users: dict[UOp, list[UOp]] = {}
        for uop in uops:
            for source in uop.src:
                self.users.setdefault(source, []).append(uop)

    def totals(self) -> dict[str, float]:
        """By the names of MetalCounts."""
        times = [1]
        for uop in self.uops:
            if uop.op is Ops.RANGE:
                length = uop.src[0]
                times.append(times[-1] * (_const(length) if _is_const(length) else self.turns))
                self.found["arithmetic"] += times[-1] * LOOP_INSTRUCTIONS
            elif uop.op is Ops.END:
                times.pop()
            else:
                for name, number in self._of(uop).items():
                    self.found[name] += times[-1] * number

        names = [name for name, kind in MetalCounts.__annotations__.items() if kind == "float"]
        return {name: float(self.found[name]) for name in names}

    def _of(self, uop: UOp) -> dict[str, float]:
        if uop.op in (Ops.LOAD, Ops.STORE):
            return self._of_memory(uop)
        if uop.op is Ops.CUSTOM or uop.op is Ops.CUSTOMI:
            return self._of_text(str(uop.arg))
        if uop.op is Ops.WMMA:
            return {"products": 1}
        if uop.op is Ops.STACK:
            return {"moves": self._moves(uop)}
        if uop.op is Ops.BARRIER:
            return {"barriers": 1}
        if uop.op is Ops.IF:
            return {"arithmetic": 1}
        if self._is_free(uop):
            return {}
        if uop.op in COMPLEX_CYCLES:
            return {"complex_instructions": 1, "complex_cycles": COMPLEX_CYCLES[uop.op]}
        if _is_integer_product(uop) or _is_conversion(uop):
            return {"complex_instructions": 1, "complex_cycles": INTEGER_CYCLES}
        if uop.op not in SIMPLE:
            return {}
        return {"arithmetic": 1, "floats": int(uop.dtype == dtypes.float)}

    @staticmethod
    def _of_text(text: str) -> dict[str, float]:
        scaled = text.count(" *= ")
        words = [int(count) for count in re.findall(r"threadgroup uint(\d)\*", text)]
        counts: dict[str, float] = {"products": text.count(PRODUCT), "arithmetic": scaled, "floats": scaled}
        counts |= {"shared_loads": len(words), "shared_load_bytes": 4 * sum(words)}
        shuffles = text.count("simd_shuffle")
        return counts | {"complex_instructions": shuffles, "complex_cycles": SHUFFLE_CYCLES * shuffles}

    @staticmethod
    def _of_memory(uop: UOp) -> dict[str, float]:
        is_load = uop.op is Ops.LOAD
        value = uop if is_load else uop.src[1]
        nbytes = value.dtype.itemsize * _elements(value)
        space = uop.src[0].addrspace
        if space is AddrSpace.REG:
            return {}
        name = "shared" if space is AddrSpace.LOCAL else "device"
        kind = f"{name}_load" if is_load else f"{name}_store"
        return {f"{kind}s": -(-nbytes // 16), f"{kind}_bytes": nbytes}

    def _is_free(self, uop: UOp) -> bool:
        """Whether an instruction is part of the one that uses it, or of none."""
        if all(_is_const(source) for source in uop.src) and uop.src:
            return True
        users = self.users.get(uop, [])
        if uop.op is Ops.MUL and dtypes.is_float(uop.dtype) and len(users) == 1 and users[0].op is Ops.ADD:
            return True  # fused, unless both summands are products: then only one is
        if uop.op is Ops.ADD and users and all(_is_threadgroup_place(user) for user in users):
            return _is_const(uop.src[1])  # threadgroup memory is addressed by a register and a constant
        takes_half = uop.op in (Ops.AND, Ops.SHR) and _is_const(uop.src[1]) and _const(uop.src[1]) in (16, 0xFFFF)
        return takes_half and all(user.op is Ops.CAST and user.dtype.itemsize == 2 for user in users)

    @staticmethod
    def _moves(uop: UOp) -> int:
        """Moves for a vector: none if its values are computed in place, or are neighbors already."""
        places = [_register_place(source) for source in uop.src]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return len(known)
        buffer, first = known[0]
        is_run = first % len(places) == 0 and known == [(buffer, first + i) for i in range(len(places))]
        return 0 if is_run else len(places)


def _register_place(uop: UOp) -> tuple[UOp, int] | None:
    """(vector or registers, place) of a value that was loaded before; None if it is computed."""
    if uop.op is Ops.INDEX and uop.src[0].op is Ops.LOAD and _is_const(uop.src[1]):
        return uop.src[0], _const(uop.src[1])
    if uop.op is Ops.LOAD and uop.src[0].addrspace is AddrSpace.REG and uop.src[0].op is Ops.INDEX:
        place = uop.src[0].src[1]
        if _is_const(place):
            return uop.src[0].src[0].buf_uop, _const(place)
    return None


def _is_threadgroup_place(uop: UOp) -> bool:
    return uop.op in (Ops.INDEX, Ops.SHRINK) and uop.addrspace is AddrSpace.LOCAL


def _is_integer_product(uop: UOp) -> bool:
    return uop.op is Ops.MUL and not dtypes.is_float(uop.dtype)


def _is_conversion(uop: UOp) -> bool:
    if uop.op is not Ops.CAST or _is_const(uop.src[0]) or not hasattr(uop.src[0], "dtype"):
        return False
    kinds = [dtypes.is_float(some.dtype) for some in (uop, uop.src[0])]
    return kinds[0] != kinds[1] and uop.src[0].dtype != dtypes.bool and uop.dtype != dtypes.bool


def _is_rounding(uop: UOp) -> bool:
    """Whether it makes a float16 of a float32, which then has a register of its own."""
    if uop.op is not Ops.CAST or _is_const(uop.src[0]) or not hasattr(uop.src[0], "dtype"):
        return False
    are_floats = dtypes.is_float(uop.dtype) and dtypes.is_float(uop.src[0].dtype)
    return are_floats and uop.dtype.itemsize < uop.src[0].dtype.itemsize


# -- registers ---------------------------------------------------------------------------------------------------------


def _live_bytes(uops: Sequence[UOp]) -> int:
    """The most bytes of values that a lane holds at once: each from where it is computed to its last use, or to the end
    of the loop in which it is used. A register that is declared holds one from a store to the last load of it."""
    changes: Counter[int] = Counter()
    loops = _loops(uops)
    for value, (begin, end) in _spans(uops).items():
        for first, final in loops:
            if begin < first <= end < final:
                end = final
        changes[begin] += _register_bytes(value)
        changes[end] -= _register_bytes(value)
    live = most = 0
    for i, (uop, declared) in enumerate(zip(uops, _declared_bytes(uops), strict=True)):
        live += changes[i]
        if uop.op is Ops.CUSTOM:
            live += _kept_bytes(str(uop.arg))
            most = max(most, live + declared + _operand_bytes(str(uop.arg)))
        most = max(most, live + declared)
    return most


def _declared_bytes(uops: Sequence[UOp]) -> list[int]:
    """After each instruction, the bytes of declared registers whose values are still to be loaded."""
    loops = dict(_loops(uops))
    begins = {end: begin for begin, end in loops.items()}
    live: list[set[tuple[UOp, int]]] = [set() for _ in range(len(uops) + 1)]  # before each instruction
    after: list[set[tuple[UOp, int]]] = [set() for _ in uops]
    for _ in range(1 + len(loops)):  # what is live where a loop begins is so at its end
        for i in reversed(range(len(uops))):
            after[i] = live[i + 1] | live[begins[i]] if i in begins else live[i + 1]
            loaded, stored = _touched(uops[i])
            live[i] = (after[i] - stored) | loaded
    return [sum(max(2, buffer.dtype.itemsize) for buffer, _ in some) for some in after]


def _touched(uop: UOp) -> tuple[set[tuple[UOp, int]], set[tuple[UOp, int]]]:
    """The declared registers that an instruction loads, and that it overwrites."""
    if uop.op not in (Ops.LOAD, Ops.STORE) or uop.src[0].addrspace is not AddrSpace.REG:
        return set(), set()
    buffer, place = uop.src[0].buf_uop, uop.src[0].src[1] if uop.src[0].op is Ops.INDEX else None
    is_known = place is not None and _is_const(place)
    touched = {(buffer, _const(place))} if is_known else {(buffer, i) for i in range(_elements(buffer))}
    if uop.op is Ops.LOAD:
        return touched, set()
    return set(), touched if is_known else set()


def _spans(uops: Sequence[UOp]) -> dict[UOp, tuple[int, int]]:
    """Of each value that is used: where it is computed, and its last use."""
    place = {uop: i for i, uop in enumerate(uops)}
    spans = {}
    for i, uop in enumerate(uops):
        for holder in (holder for source in uop.src for holder in _holders(source)):
            if holder in place:
                spans[holder] = (place[holder], i)
    return spans


def _loops(uops: Sequence[UOp]) -> list[tuple[int, int]]:
    """(first, last) place of each loop."""
    begins, loops = [], []
    for i, uop in enumerate(uops):
        if uop.op is Ops.RANGE:
            begins.append(i)
        elif uop.op is Ops.END:
            loops.append((begins.pop(), i))
    return loops


def _holders(uop: UOp) -> Iterator[UOp]:
    """The values whose registers hold it. A vector's elements, values that cost nothing, and places at a constant
    distance from another one have no registers of their own."""
    if uop.op in (Ops.INDEX, Ops.SHRINK):
        for source in uop.src[1:]:
            yield from _holders(source)
    if uop.op is Ops.STACK:
        for source in uop.src:
            yield from _holders(source)
        return
    is_offset = uop.op is Ops.ADD and dtypes.is_int(uop.dtype) and _is_const(uop.src[1])
    is_alias = uop.op in (Ops.INDEX, Ops.SHRINK, Ops.AFTER, Ops.BITCAST) or is_offset
    if is_alias or (uop.op is Ops.CAST and not _is_conversion(uop) and not _is_rounding(uop)):
        yield from _holders(uop.src[0])
    else:
        yield uop


def _register_bytes(uop: UOp) -> int:
    if _is_const(uop):
        return 0
    if uop.op in (Ops.LOAD, Ops.WMMA, Ops.SPECIAL, Ops.RANGE, Ops.CAST) or uop.op in SIMPLE or uop.op in COMPLEX_CYCLES:
        size = 4 if uop.dtype in (dtypes.weakint, dtypes.bool) else max(2, uop.dtype.itemsize)
        return size * _elements(uop)
    return 0


def _kept_bytes(text: str) -> int:
    """Of matrices that a statement declares and that stay to the end: sums of products, and queries."""
    if PRODUCT in text:
        return 0
    return 8 * len(re.findall(r"\bsum\d+ =", text)) + 16 * len(re.findall(r"uint4 q", text))


def _operand_bytes(text: str) -> int:
    """Of matrices inside a statement: scores, weights, and the operands that are loaded together. In products of tiles
    those are all right blocks and two left ones; in attention a chunk of keys, or four blocks of values at most."""
    lefts, rights = (len(re.findall(rf"uint4 {side}0_", text)) for side in "ab")
    values = [int(words) for words in re.findall(r"uint(\d) v\d", text)]
    loads = 4 * (rights + min(2, lefts) + len(re.findall(r"uint4 k0_", text)))
    if PRODUCT in text:
        loads += 4 * len(re.findall(r"uint4 q\d+_0 ", text))
    loads += sum(values[:4])
    scores, weights = (len(set(re.findall(rf"\b{name}\d+_\d+", text))) for name in "sp")
    return 4 * loads + 8 * scores + 4 * weights


def _elements(uop: UOp) -> int:
    return math.prod(int(size) for size in uop.shape)


def _is_const(uop: UOp) -> bool:
    return uop.op is Ops.CONST or (uop.op is Ops.CAST and uop.src[0].op is Ops.CONST)


def _const(uop: UOp) -> int:
    return int((uop.src[0] if uop.op is Ops.CAST else uop).val)
