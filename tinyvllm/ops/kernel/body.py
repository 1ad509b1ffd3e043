"""The building blocks of our UOp kernels: axes, registers, and arithmetic that vectorizes.

A kernel is a function from 1-D buffer UOps to a SINK. `Tensor.custom_kernel` calls it; tinygrad marks that method
"alpha", so `run_kernel` is the only place that uses it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import canonicalize_device
from tinygrad.dtype import AddrSpace, DType
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, KernelInfo

from tinyvllm.device.disk_cache import share_disk_cache
from tinyvllm.device.recording import MOST_ROWS, Share, launch, launch_rows
from tinyvllm.errors import InvariantError

share_disk_cache()  # before the first kernel is compiled, on whatever thread

F32, F16, I32, U32, U16 = dtypes.float, dtypes.half, dtypes.int, dtypes.uint, dtypes.uint16
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
NEG_INF = float("-inf")
LOWEST = -3.0e38  # below every logit, yet finite: inf - inf would be NaN

KernelFn = Callable[..., UOp]


class Body:
    """Fresh axis numbers and register slots for one kernel."""

    def __init__(self) -> None:
        self._axis = 0
        self._slot = 0

    def _range(self, size: int | UOp, kind: AxisType, dtype: DType | None = None) -> UOp:
        self._axis += 1
        if dtype is not None:
            return UOp.range(size, self._axis - 1, kind, dtype=dtype)
        return UOp.range(size, self._axis - 1, kind)

    def loop(self, size: int) -> UOp:
        """A counted loop whose iterations are independent."""
        return self._range(size, AxisType.LOOP)

    def fold(self, size: int) -> UOp:
        """A counted loop that carries registers from one iteration to the next."""
        return self._range(size, AxisType.REDUCE)

    def fold_while(self, size: UOp) -> UOp:
        """A fold whose length is data. The range is int32; without a dtype it would be 64-bit.

        tinygrad must not be able to prove that the length is at most 1: it drops such a loop, and with it the order of
        the stores around it."""
        if size.vmax < 2:
            raise InvariantError(f"a loop of at most {size.vmax} iterations cannot order its stores")
        return self._range(size.cast(I32), AxisType.REDUCE, dtype=I32)

    def loop_up_to(self, size: UOp | int) -> UOp:
        """A loop whose iterations are independent, and whose length may be data, up to 2 or more."""
        return self.fold_while(size) if isinstance(size, UOp) else self.loop(size)

    def repeat(self) -> UOp:
        """A do-while loop, ended by `.end(loop, goes_on)`: it runs at least once. It must not be inside another loop,
        and the length of a loop inside it must not depend on the values that it carries."""
        self._axis += 1
        return UOp.loop(self._axis - 1)

    def grid(self, size: int) -> UOp:
        """Independent work items: threadgroups on a GPU; on a CPU commands of the worker (at most one such axis)."""
        return self._range(size, AxisType.GLOBAL)

    def threads(self, size: int) -> UOp:
        """Threads of a threadgroup. The first such axis is the fastest varying one (lid.x)."""
        return self._range(size, AxisType.LOCAL)

    def label(self) -> int:
        """A number that makes a variable's name unique in a statement in the device's language."""
        self._slot += 1
        return self._slot - 1

    def registers(self, size: int, dtype: DType = F32) -> UOp:
        self._slot += 1
        return UOp.placeholder((size,), dtype, self._slot - 1, addrspace=AddrSpace.REG)

    def shared(self, size: int, dtype: DType = F32) -> UOp:
        """Threadgroup memory."""
        self._slot += 1
        return UOp.placeholder((size,), dtype, self._slot - 1, addrspace=AddrSpace.LOCAL)


def fill(body: Body, registers: UOp, value: float, *after: UOp) -> UOp:
    """Set all registers to `value`, inside the loops and after the stores in `after`."""
    target, count = registers.after(*after), registers.max_numel()
    if count == 1:
        return registers.after(target[0].store(value))
    i = body.loop(count)
    return registers.after(target[i].store(value).end(i))


def finish(stores: Sequence[UOp] | UOp, name: str, *, ops: int = 0, nbytes: int = 0) -> UOp:
    """Close a kernel. `ops` and `nbytes` are its operations and the bytes it moves, for the roofline.

    The tag and the empty opts disable tinygrad's heuristics and BEAM: BEAM times candidates on uninitialized buffers,
    where a kernel that follows an index tensor would access memory anywhere."""
    sink = UOp.sink(*([stores] if isinstance(stores, UOp) else stores), arg=_info(name, ops, nbytes))
    return sink.rtag(1)


def _info(name: str, ops: int, nbytes: int) -> KernelInfo:
    # estimates by hand: tinygrad cannot evaluate a loop bound that is data
    return KernelInfo(name=name, opts_to_apply=(), estimates=Estimates(ops=ops, lds=nbytes, mem=nbytes))


def cached_kernel(make: Callable[..., KernelFn]) -> Callable[..., KernelFn]:
    """Cache a kernel maker by its arguments, and the UOps that it emits by the placeholders: all layers share a
    kernel."""

    @functools.cache
    def cached(*args: object) -> KernelFn:
        return functools.cache(make(*args))

    return functools.wraps(make)(cached)


def run_kernel(
    fn: KernelFn, outputs: Sequence[Tensor], inputs: Iterable[Tensor], share: Share | None = None
) -> list[Tensor]:
    """Run `fn(*outputs, *inputs)`; returns the written `outputs`. Use the returned tensors, because they carry the
    order of execution. (While a step is recorded, the order is that of the calls.) share: this core's, if the kernel is
    one for all cores."""
    tensors = [*outputs, *inputs]
    if launch(fn, tensors, share):
        return tensors[: len(outputs)]
    return Tensor.custom_kernel(*tensors, fxn=fn)[: len(outputs)]


def run_row_kernel(
    make: Callable[[int], KernelFn],
    num_rows: int,
    outputs: Sequence[Tensor],
    inputs: Iterable[Tensor],
    shared: Sequence[Tensor] = (),
    most: int = MOST_ROWS,
    share: Share | None = None,
) -> list[Tensor]:
    """`run_kernel` for `make(num_rows)`, a kernel whose rows are independent work items (`Body.grid`), and nothing else
    in it depends on their number. In recorded steps of any number of rows it is one program, made for `most`, of
    which each step launches as many as it has. `shared`: the tensors whose size does not depend on it."""
    tensors = [*outputs, *inputs]
    if launch_rows(make, tensors, num_rows, shared, most, share):
        return tensors[: len(outputs)]
    return run_kernel(make(num_rows), outputs, tensors[len(outputs) :], share)


def empty(size: int, dtype: DType = F32, device: str | None = None) -> Tensor:
    """A new buffer to write into. New each time: a second call with the same tensors would not run again."""
    # not Tensor.empty, whose reshapes of a flat buffer were a fifth of the time of tracing a step
    return Tensor(UOp.new_buffer(canonicalize_device(device), size, dtype))


def clamp(index: UOp, low: int, high: int) -> UOp:
    """Bound an index that was read from memory, so that no access is out of bounds and tinygrad can prove that 32 bits
    suffice."""
    return index.maximum(low).minimum(high).cast(dtypes.weakint)


def bits_of_bfloat(value: UOp) -> UOp:
    """A value rounded to bfloat16, as the float16 of the same bits: float16 can be loaded in vectors."""
    return value.cast(dtypes.bfloat16).bitcast(dtypes.half)


def balanced(values: Iterable[UOp], combine: Callable[[UOp, UOp], UOp] = lambda a, b: a + b) -> UOp:
    """Combine by a balanced tree: short dependency chains, and always the same shape and rounding."""
    level = list(values)
    while len(level) > 1:
        pairs = [combine(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


def exp2(x: UOp) -> UOp:
    """2**x for x in [-126, 126] (clamped), relative error below 3e-7, in arithmetic that clang vectorizes.

    2**x = 2**n * 2**f, with n = round(x) in the exponent bits and 2**f, f in [-0.5, 0.5], by a Taylor polynomial of
    degree 6 (the remainder is (ln2/2)**7 / 7! = 1.2e-7). tinygrad's own exp2 has selects for inf and nan.
    """
    x = x.maximum(-126.0).minimum(126.0)
    n = (x + 127.5).cast(I32)  # positive, so that the cast's truncation is a floor
    # placed so that tinygrad cannot reassociate: (x - n) + 127 would round x first, with an error of 2.9e-6
    f = x - (n - 127).cast(F32)
    p = UOp.const(LN2**6 / math.factorial(6), F32)
    for k in range(5, -1, -1):
        p = p * f + LN2**k / math.factorial(k)
    return p * (n << 23).bitcast(F32)


def log2(x: UOp) -> UOp:
    """log2 of a normal positive float, absolute error below 2e-7 near 1 and 1e-6 elsewhere; vectorizes.

    With the mantissa m in [sqrt(1/2), sqrt(2)): ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172 (series to s**9).
    """
    bits = x.bitcast(I32)
    shifted = bits - 0x3F3504F3  # bits of sqrt(1/2), so that the exponent changes there and not at 1
    n = shifted >> 23
    m = (bits - (n << 23)).bitcast(F32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = UOp.const(1.0 / 9.0, F32)
    for c in (1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0):
        p = p * z + c
    return n.cast(F32) + s * p * (2.0 * LOG2E)
