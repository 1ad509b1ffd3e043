"""A step as the list of kernels that it launches, recorded once without running anything.

Our kernels are noted in the order of the calls, with the buffers they were given. They need nothing of tinygrad's
scheduler, which used to take most of a start. Other tensor operations are scheduled when they are realized.
A step is first a `TracedStep`, whose kernels are still being compiled, then a `RecordedStep`; on disk it is a
`SavedStep` without buffers, which another process binds to its own. A step that another process traces comes as an
`OutlinedStep`, a saved step whose kernels are still to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.engine import realize
from tinygrad.helpers import BEAM, getenv
from tinygrad.renderer import Estimates
from tinygrad.tensor import all_tensors
from tinygrad.uop.ops import Ops, buffers

from tinyvllm.device.compiling import Compiler, Kernel
from tinyvllm.device.memory_plan import Launch, plan_memory
from tinyvllm.device.program_store import ProgramStore, slim
from tinyvllm.errors import CacheError, InvariantError

MOST_ROWS = 1 << 12  # of a program for any number of rows; times a vocabulary's size it is an int32
MOST_BLOCKS = 1 << 6  # the same of a program whose work items are blocks of 64 rows

# the PTX with which a kernel waits for the previous one: a program that has it may start early (cuda_graph.py)
AWAIT_PREVIOUS = "griddepcontrol.wait"


@dataclass(frozen=True)
class Call:
    """One launch. `target`: a compiled PROGRAM or a COPY. `buffers`: its arguments."""

    target: UOp
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True)
class RecordedStep:
    """Owns its scratch memory and its output, which every run overwrites. `borrowed`: buffers that existed before it.
    `cut`: how many calls come before `cut_here`; all if it was not called. `kept`: the buffers of `keep`'s tensors."""

    calls: tuple[Call, ...]
    output: Tensor
    borrowed: tuple[Buffer, ...]
    cut: int
    kept: tuple[Buffer, ...]


def with_repeated_call(step: RecordedStep) -> RecordedStep:
    """The step with its call of the most bytes repeated, which computes the same result: a kernel does not write what
    it reads."""
    sizes = [sum(buffer.nbytes for buffer in call.buffers) for call in step.calls]
    place = sizes.index(max(sizes))
    calls = (*step.calls[: place + 1], *step.calls[place:])
    return replace(step, calls=calls, cut=step.cut + (place < step.cut))


@dataclass(frozen=True)
class SavedStep:
    """A step as plain values and programs, without buffers.

    bases: (the name of a borrowed tensor, or None for scratch; elements; dtype; device, a CPU's core). views: (base,
    byte offset, elements, dtype). calls: (program, views). output: a base. cut: as in RecordedStep. kept: bases."""

    bases: tuple[tuple[str | None, int, DType, str], ...]
    views: tuple[tuple[int, int, int, DType], ...]
    programs: tuple[UOp, ...]
    calls: tuple[tuple[int, tuple[int, ...]], ...]
    output: int
    cut: int
    kept: tuple[int, ...]
    notes: tuple[tuple[Any, ...], ...] = ()  # what its tracing noted (ops/coverage.py), in plain values


@dataclass(frozen=True)
class Extent:
    """How much of its kernel a launch runs. rows: how many, if the kernel is one for any number of rows. part: a
    numerator and a denominator, of the operations and bytes of as many rows, if it is one for cores' different shares.
    """

    rows: int | None = None
    part: tuple[int, int] = (1, 1)


WHOLE = Extent()


@dataclass(frozen=True)
class Share:
    """A core's share of a result, computed by a kernel for any core's share, which is made for the largest one. own,
    most: units of both, as panels or heads. scaled: the tensors whose sizes are in proportion to them."""

    own: int
    most: int
    scaled: tuple[Tensor, ...]

    def sizes_of_most(self, tensors: Sequence[Tensor]) -> list[int]:
        """The tensors' elements, as those of the largest share."""
        scaled = set(map(id, self.scaled))
        sizes = [(tensor, tensor.uop.max_numel()) for tensor in tensors]
        return [size * self.most // self.own if id(tensor) in scaled else size for tensor, size in sizes]

    @property
    def part(self) -> tuple[int, int]:
        """`Extent.part`."""
        return self.own, self.most


@dataclass(frozen=True)
class OutlinedStep:
    """A step without buffers and programs. `kernels`: those whose programs it lacks, in the order of
    `SavedStep.programs`; `extents`: as in TracedStep."""

    step: SavedStep
    kernels: tuple[Kernel, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class TracedStep:
    """A step before its kernels are compiled. `launches`: a kernel's SINK or a COPY, with its buffers."""

    launches: tuple[tuple[UOp, tuple[Buffer, ...]], ...]
    extents: tuple[Extent, ...]  # of each launch
    output: Tensor
    borrowed: tuple[Buffer, ...]
    cut: int
    kept: tuple[Buffer, ...]

    @property
    def kernels(self) -> set[Kernel]:
        """The kernels to compile."""
        return {(target, args[0].device) for target, args in self.launches if target.op is Ops.SINK}

    def finish(self, compiler: Compiler) -> RecordedStep:
        """The recorded step. Waits until all kernels are compiled."""
        programs = compiler.programs(self.kernels)
        calls = tuple(
            Call(with_extent(programs.get((target, args[0].device), target), extent), args)
            for (target, args), extent in zip(self.launches, self.extents, strict=True)
        )
        return RecordedStep(calls, self.output, self.borrowed, self.cut, self.kept)


def record(trace: Callable[[], Tensor], store: ProgramStore | None = None) -> RecordedStep:
    """Call `trace`, which realizes and returns one tensor, and compile the kernels that this would have run.

    Programs come from `store` if it has them, and are saved there if not."""
    return trace_step(trace).finish(Compiler(store))


def trace_step(trace: Callable[[], Tensor], *, shares_rows: bool = True) -> TracedStep:
    """Call `trace`, which realizes and returns one tensor, and note the kernels that this would have run.

    shares_rows: kernels whose rows are independent are those for any number of rows."""
    before = {id(buffer): buffer for buffer in buffers.values()}
    recorder = _Recorder(shares_rows)
    with collect_kept() as kept_tensors:
        realize.capturing.append(recorder)
        try:
            output = trace()
        finally:
            realize.capturing.clear()
    if beam := getenv("JITBEAM", BEAM.value):
        recorder.launches = [(_with_beam(target, beam), args) for target, args in recorder.launches]
    held = set(_live_buffers())
    places = plan_memory(recorder.launches, lambda buffer: buffer in buffers or buffer in held)
    launches = tuple(_make_launch(target, args, places) for target, args in recorder.launches)
    bases = {id(buffer.base): buffer.base for _, args in launches for buffer in args}
    cut = len(launches) if recorder.cut is None else recorder.cut
    kept = tuple(tensor.uop.base.buffer for tensor in kept_tensors)
    borrowed = tuple(base for key, base in bases.items() if key in before)
    return TracedStep(launches, tuple(recorder.extents), output, borrowed, cut, kept)


def launch(fn: Callable[..., UOp], tensors: Sequence[Tensor], share: Share | None = None) -> bool:
    """While a step is traced: note that the kernel `fn` runs on these tensors next. Returns False at any other time.
    share: this core's, if the kernel is one for all cores."""
    if not (_kept and realize.capturing):
        return False
    _realize(tensors)
    shapes = [tensor.uop.max_shard_shape for tensor in tensors]
    if share is not None:
        shapes = [(size,) for size in share.sizes_of_most(tensors)]
    kernel = fn(*[_placeholder(shape, tensors[slot].dtype, slot) for slot, shape in enumerate(shapes)])
    _note(realize.capturing[0], kernel, tensors, Extent(part=(1, 1) if share is None else share.part))
    return True


def launch_rows(
    make: Callable[[int], Callable[..., UOp]],
    tensors: Sequence[Tensor],
    num_rows: int,
    shared: Sequence[Tensor],
    most: int = MOST_ROWS,
    share: Share | None = None,
) -> bool:
    """`launch` for `make(most)`, of whose rows only `num_rows` run. Except for the `shared` tensors, each has as
    many elements in every row. Returns False also if steps of different numbers of rows do not share the kernel.
    most: MOST_ROWS, or for rows that are blocks of rows, MOST_BLOCKS."""
    recorder = realize.capturing[0] if _kept and realize.capturing else None
    if not isinstance(recorder, _Recorder) or not recorder.shares_rows or num_rows > most:
        return False
    common = set(map(id, shared))
    sizes = [tensor.uop.max_numel() for tensor in tensors] if share is None else share.sizes_of_most(tensors)
    if any(size % num_rows for tensor, size in zip(tensors, sizes, strict=True) if id(tensor) not in common):
        return False
    _realize(tensors)
    slots = [
        _placeholder((size if id(tensor) in common else size // num_rows * most,), tensor.dtype, slot)
        for slot, (tensor, size) in enumerate(zip(tensors, sizes, strict=True))
    ]
    _note(recorder, make(most)(*slots), tensors, Extent(num_rows, (1, 1) if share is None else share.part))
    return True


def _realize(tensors: Sequence[Tensor]) -> None:
    """Put those into buffers that are not yet in one. Those that our kernels wrote are."""
    if missing := [tensor for tensor in tensors if not tensor.uop.has_buffer_identity()]:
        missing[0].realize(*missing[1:])


@cache
def _placeholder(shape: tuple[int, ...], dtype: DType, slot: int) -> UOp:
    """A kernel's argument. The layers of a model ask for the same ones."""
    return UOp.placeholder(shape, dtype, slot)


def _note(recorder: Any, kernel: UOp, tensors: Sequence[Tensor], extent: Extent) -> None:
    """Let a recorder, ours or TinyJit's, receive a launch."""
    args = tuple(tensor.uop.base for tensor in tensors)
    if isinstance(recorder, _Recorder):
        recorder.add(kernel, args, extent)
    else:
        kernel = kernel if extent == WHOLE else _scaled(kernel, *extent.part)
        recorder.add_linear(UOp(Ops.LINEAR, src=(kernel.call(*args),)), {})


def with_extent(program: UOp, extent: Extent) -> UOp:
    """A program as it is launched."""
    if extent == WHOLE:
        return program
    info, sink = program.arg, program.src[0]
    if extent.rows is None:
        return program.replace(src=(_scaled(sink, *extent.part), *program.src[1:]))
    most = next((most for most in (MOST_ROWS, MOST_BLOCKS) if most in info.global_size), MOST_ROWS)
    sizes = tuple(extent.rows if size == most else size for size in info.global_size)
    if sum(size == most for size in info.global_size) != 1:
        raise InvariantError(
            f"{info.name} has work items {info.global_size}, of which one should be {MOST_ROWS} or {MOST_BLOCKS}"
        )
    sink = _scaled(sink, extent.rows * extent.part[0], most * extent.part[1])
    return program.replace(src=(sink, *program.src[1:]), arg=replace(info, global_size=sizes))


def _scaled(sink: UOp, numerator: int, denominator: int) -> UOp:
    """A kernel with a part of its operations and bytes."""
    old = sink.arg.estimates
    estimates = Estimates(*(amount * numerator // denominator for amount in (old.ops, old.lds, old.mem)))
    return sink.replace(arg=replace(sink.arg, estimates=estimates))


def cut_here() -> None:
    """While a step is recorded: mark this place as its cut."""
    for recorder in realize.capturing:
        if isinstance(recorder, _Recorder):
            recorder.cut = len(recorder.launches)


def keep(*tensors: Tensor) -> None:
    """While a step is traced: realize these tensors and reserve their memory, so that they can be read after a run."""
    if _kept:
        tensors[0].realize(*tensors[1:])
        _kept[-1].extend(tensors)


_kept: list[list[Tensor]] = []  # the tensors of `keep` in the step that is being traced; empty if none is


@contextmanager
def collect_kept() -> Iterator[list[Tensor]]:
    """Trace a step in this block: kernels are noted in the order of the calls. The list fills with `keep`'s tensors; as
    long as it lives, the memory planner gives their memory to nothing else."""
    _kept.append([])
    try:
        yield _kept[-1]
    finally:
        _kept.pop()


class _Recorder:
    """Receives the kernels that tinygrad would otherwise run, through the hook that TinyJit uses."""

    def __init__(self, shares_rows: bool) -> None:
        self.shares_rows = shares_rows
        self.launches: list[Launch] = []
        self.extents: list[Extent] = []  # of each launch
        self.cut: int | None = None

    def add(self, target: UOp, args: tuple[UOp, ...], extent: Extent = WHOLE) -> None:
        self.launches.append((target, args))
        self.extents.append(extent)

    def add_linear(self, linear: UOp, var_vals: dict[str, int]) -> None:
        for call in linear.src:
            self.add(call.src[0], call.src[1:])


def _live_buffers() -> Iterator[UOp]:
    """Buffers of live tensors, which the memory planner must not touch."""
    for reference in list(all_tensors):
        if (tensor := reference()) is not None:
            uop = tensor.uop.base
            yield from [uop] if uop.op is Ops.BUFFER else (uop for uop in uop.toposort() if uop.op is Ops.BUFFER)


def _with_beam(target: UOp, beam: int) -> UOp:
    """A kernel for a search of this width, unless it has a width."""
    if target.op is not Ops.SINK or target.arg.beam:
        return target
    return target.replace(arg=replace(target.arg, beam=beam))


def _make_launch(target: UOp, args: tuple[UOp, ...], places: Mapping[UOp, Buffer]) -> tuple[UOp, tuple[Buffer, ...]]:
    if target.op not in (Ops.SINK, Ops.COPY) or any(arg.op is not Ops.BUFFER and arg.is_bound_var for arg in args):
        raise InvariantError(f"a step launches kernels and copies of fixed shapes, but this one has {target.op}")
    return target, tuple(places.get(arg) or arg.buffer for arg in args)


def head_of(step: RecordedStep) -> RecordedStep:
    """The step up to its cut, on the same memory."""
    return replace(step, calls=step.calls[: step.cut])


def head_of_tensor(tensor: Tensor, size: int) -> Tensor:
    """The first `size` elements of a flat tensor, on the same memory."""
    base = tensor.uop.base.buffer
    return Tensor(UOp.from_buffer(view_of(base, 0, size, base.dtype).ensure_allocated()))


def rebind(step: RecordedStep, others: Mapping[Tensor, Tensor]) -> RecordedStep:
    """The same step on other tensors of the same sizes. Both share scratch memory, so they must not overlap in time."""
    swaps = {id(old.uop.base.buffer): new.uop.base.buffer.ensure_allocated() for old, new in others.items()}

    def swap(buffer: Buffer) -> Buffer:
        base = swaps.get(id(buffer.base))
        return buffer if base is None else view_of(base, buffer.offset, buffer.size, buffer.dtype)

    calls = tuple(Call(call.target, tuple(swap(buffer) for buffer in call.buffers)) for call in step.calls)
    output = Tensor(UOp.from_buffer(swap(step.output.uop.base.buffer)))
    return replace(step, calls=calls, output=output, borrowed=tuple(swap(base) for base in step.borrowed))


# -- saving and binding ----------------------------------------------------------------------------------------------


def save_step(step: RecordedStep, named: Mapping[str, Tensor], notes: Iterable[tuple[Any, ...]] = ()) -> SavedStep:
    """The step without its buffers. Raises CacheError if it copies, or borrows a buffer that is not among `named`."""
    calls = [(slim(call.target), call.buffers) for call in step.calls]
    others = sum(target.op is not Ops.PROGRAM for target, _ in calls)
    saved, programs = _without_buffers(step, calls, named, notes, others)
    return replace(saved, programs=tuple(programs))


def outline_step(step: TracedStep, named: Mapping[str, Tensor], notes: Iterable[tuple[Any, ...]] = ()) -> OutlinedStep:
    """What `save_step` gives once the kernels are compiled, without their programs. Raises CacheError too."""
    launches = [((target, extent), args) for (target, args), extent in zip(step.launches, step.extents, strict=True)]
    others = sum(target.op is not Ops.SINK for target, _ in step.launches)
    saved, targets = _without_buffers(step, launches, named, notes, others)
    devices = {target: args[0].device for target, args in step.launches}
    kernels = tuple((target, devices[target]) for target, _ in targets)
    return OutlinedStep(saved, kernels, tuple(extent for _, extent in targets))


def _without_buffers(
    step: RecordedStep | TracedStep,
    launches: Iterable[tuple[Any, tuple[Buffer, ...]]],
    named: Mapping[str, Tensor],
    notes: Iterable[tuple[Any, ...]],
    num_copies: int,
) -> tuple[SavedStep, list[Any]]:
    """The step without its programs, and the distinct targets of its launches."""
    names = {id(tensor.uop.base.buffer): name for name, tensor in named.items()}
    unnamed = [base for base in step.borrowed if id(base) not in names]
    if unnamed or num_copies:
        raise CacheError(f"a step with {num_copies} copies and {len(unnamed)} buffers without a name cannot be saved")
    bases, views, targets = _Numbers(), _Numbers(), _Numbers()

    def number_view(buffer: Buffer) -> int:
        return views.of((bases.of(buffer.base), buffer.offset, buffer.size, buffer.dtype))

    calls = tuple((targets.of(target), tuple(number_view(buffer) for buffer in args)) for target, args in launches)
    saved = SavedStep(
        bases=(),
        views=tuple(views.order),
        programs=(),
        calls=calls,
        output=bases.of(step.output.uop.base.buffer),
        cut=step.cut,
        kept=tuple(bases.of(buffer) for buffer in step.kept),
        notes=tuple(notes),
    )
    described = tuple((names.get(id(base)), base.size, base.dtype, base.device) for base in bases.order)
    return replace(saved, bases=described), list(targets.order)


class _Numbers:
    """Numbers keys in the order of their first use."""

    def __init__(self) -> None:
        self.order: dict = {}

    def of(self, key: object) -> int:
        return self.order.setdefault(key, len(self.order))


def bind_step(saved: SavedStep, named: Mapping[str, Tensor]) -> RecordedStep:
    """The step on this process's tensors. Its scratch memory is its own and not allocated yet.

    Raises CacheError if the tensors do not fit."""
    bases = []
    for name, size, dtype, device in saved.bases:
        if name is None:
            bases.append(Buffer(device, size, dtype))
            continue
        if name not in named:
            raise CacheError(f"the saved step reads {name}, which this model does not have")
        base = named[name].uop.base.buffer
        if (base.size, base.dtype, base.device) != (size, dtype, device):
            raise CacheError(f"the saved step reads {name} of {size} {dtype} on {device}, but it is {base}")
        bases.append(base)
    views = [view_of(bases[base], offset, size, dtype) for base, offset, size, dtype in saved.views]
    calls = tuple(Call(saved.programs[program], tuple(views[i] for i in args)) for program, args in saved.calls)
    output = Tensor(UOp.from_buffer(bases[saved.output].ensure_allocated()))
    borrowed = tuple(base for base, (name, *_) in zip(bases, saved.bases, strict=True) if name is not None)
    return RecordedStep(calls, output, borrowed, saved.cut, tuple(bases[base] for base in saved.kept))


def view_of(base: Buffer, offset: int, size: int, dtype: DType) -> Buffer:
    """`size` elements from `offset` bytes on; the buffer itself if that is all of it."""
    return base if (offset, size, dtype) == (0, base.size, base.dtype) else base.view(size, dtype, offset)
