"""A step as the list of kernels that it launches: recorded once, without running anything.

This is what tinygrad's TinyJit does in three calls, less the making of a graph, which `replay.py` does by device.
A recorded step has two forms: `Step` in memory, and `SavedStep` without any buffer, for another process to bind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tinygrad import Device, Tensor, UOp
from tinygrad.codegen import to_program_key
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.engine import realize
from tinygrad.helpers import BEAM, getenv
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.tensor import all_tensors
from tinygrad.uop.ops import Ops, buffers, graph_rewrite

from tinyvllm.errors import CacheError, InvariantError
from tinyvllm.ops.program_store import ProgramStore, slim


@dataclass(frozen=True)
class Call:
    """One launch. `target`: a compiled PROGRAM, or a COPY; `buffers`: its arguments."""

    target: UOp
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True)
class Step:
    """Owns its scratch memory and its output, which every run overwrites. `borrowed`: what was there before it. `cut`:
    how many calls come before the place that `cut_here` marked; all of them where it marked none. `kept`: what `keep`
    was given."""

    calls: tuple[Call, ...]
    output: Tensor
    borrowed: tuple[Buffer, ...]
    cut: int
    kept: tuple[Buffer, ...]


@dataclass(frozen=True)
class SavedStep:
    """A step in plain values and programs.

    bases: (the name of a borrowed tensor, or None for scratch; elements; dtype; device, a CPU's core). views: (base,
    byte offset, elements, dtype). calls: (program, views). output: a base. cut: as in Step. kept: bases."""

    bases: tuple[tuple[str | None, int, DType, str], ...]
    views: tuple[tuple[int, int, int, DType], ...]
    programs: tuple[UOp, ...]
    calls: tuple[tuple[int, tuple[int, ...]], ...]
    output: int
    cut: int
    kept: tuple[int, ...]


def record(trace: Callable[[], Tensor], store: ProgramStore | None = None) -> Step:
    """Call `trace`, which realizes and returns one tensor, and compile what this would have run.

    Programs come from `store` where it has them, and are kept there where it has not."""
    before = {id(buffer): buffer for buffer in buffers.values()}
    recorder = _Recorder()
    realize.capturing.append(recorder)
    try:
        output = trace()
    finally:
        realize.capturing.clear()
    linear = memory_plan_rewrite(UOp(Ops.LINEAR, src=tuple(recorder.calls)), set(buffers) | set(_live_buffers()))
    calls = tuple(_make_call(call) for call in _compile(linear, store).src)
    if len(calls) != len(recorder.calls):
        raise InvariantError(f"a step of {len(recorder.calls)} kernels became one of {len(calls)}")
    bases = {id(buffer.base): buffer.base for call in calls for buffer in call.buffers}
    cut = len(calls) if recorder.cut is None else recorder.cut
    kept = tuple(tensor.uop.base.buffer for tensor in recorder.kept)
    return Step(calls, output, tuple(base for key, base in bases.items() if key in before), cut, kept)


def cut_here() -> None:
    """While recording: mark this place as the step's cut."""
    for recorder in realize.capturing:
        if isinstance(recorder, _Recorder):
            recorder.cut = len(recorder.calls)


def keep(*tensors: Tensor) -> None:
    """While recording: finish these tensors, and let no other use their place, so that they can be read after a run."""
    for recorder in realize.capturing:
        if isinstance(recorder, _Recorder):
            tensors[0].realize(*tensors[1:])
            recorder.kept += tensors  # while they live, the memory planner lets nothing else have their place


class _Recorder:
    """What tinygrad hands schedules to instead of running them."""

    def __init__(self) -> None:
        self.calls: list[UOp] = []
        self.cut: int | None = None
        self.kept: list[Tensor] = []

    def add_linear(self, linear: UOp, var_vals: dict[str, int]) -> None:
        self.calls += linear.src


def _live_buffers() -> Iterator[UOp]:
    """Buffers that a living tensor refers to: the memory planner must leave them alone."""
    for reference in list(all_tensors):
        if (tensor := reference()) is not None:
            yield from (uop for uop in tensor.uop.toposort() if uop.op is Ops.BUFFER)


def _compile(linear: UOp, store: ProgramStore | None) -> UOp:
    """tinygrad's `compile_linear` without its own way to submit to a CPU, and with the store around the compiler."""
    if beam := getenv("JITBEAM", BEAM.value):
        linear = graph_rewrite(linear, realize.pm_beam, ctx=beam, walk=True)
    if store is None:
        linear = realize.lower_and_compile(linear)
    else:
        with store.around_compiler(_program_keys(linear)):
            linear = realize.lower_and_compile(linear)
    return graph_rewrite(linear, realize.pm_optimize_local_size, walk=True)


def _program_keys(linear: UOp) -> set[tuple]:
    """tinygrad's keys of the programs that the step's kernels become."""
    kernels = {(call.src[0], call.src[1].device) for call in linear.src if call.src[0].op is Ops.SINK}
    return {to_program_key(kernel, Device[device].renderer) for kernel, device in kernels}


def _make_call(call: UOp) -> Call:
    target, args = call.src[0], call.src[1:]
    if target.op not in (Ops.PROGRAM, Ops.COPY) or any(arg.is_bound_var for arg in args):
        raise InvariantError(f"a step launches kernels and copies of fixed shapes, but this one has {target.op}")
    return Call(target, tuple(arg.buffer for arg in args))


def head_of(step: Step) -> Step:
    """The part of a step before its cut, on the same memory."""
    return replace(step, calls=step.calls[: step.cut])


def rebind(step: Step, others: Mapping[Tensor, Tensor]) -> Step:
    """The same step on other tensors of the same sizes; its scratch memory is shared, so the two must not overlap."""
    swaps = {id(old.uop.base.buffer): new.uop.base.buffer.ensure_allocated() for old, new in others.items()}

    def swap(buffer: Buffer) -> Buffer:
        base = swaps.get(id(buffer.base))
        return buffer if base is None else _view(base, buffer.offset, buffer.size, buffer.dtype)

    calls = tuple(Call(call.target, tuple(swap(buffer) for buffer in call.buffers)) for call in step.calls)
    output = Tensor(UOp.from_buffer(swap(step.output.uop.base.buffer)))
    return replace(step, calls=calls, output=output, borrowed=tuple(swap(base) for base in step.borrowed))


# -- saved, and bound again ------------------------------------------------------------------------------------------


def save_step(step: Step, named: Mapping[str, Tensor]) -> SavedStep:
    """The step without its buffers. Raises CacheError where it copies, or borrows what is not among `named`."""
    names = {id(tensor.uop.base.buffer): name for name, tensor in named.items()}
    unnamed = [base for base in step.borrowed if id(base) not in names]
    copies = [call for call in step.calls if call.target.op is not Ops.PROGRAM]
    if unnamed or copies:
        raise CacheError(f"a step with {len(copies)} copies and {len(unnamed)} buffers without a name cannot be saved")
    bases, views, programs = _Numbers(), _Numbers(), _Numbers()

    def number_view(buffer: Buffer) -> int:
        return views.of((bases.of(buffer.base), buffer.offset, buffer.size, buffer.dtype))

    calls = tuple(
        (programs.of(slim(call.target)), tuple(number_view(buffer) for buffer in call.buffers)) for call in step.calls
    )
    output = bases.of(step.output.uop.base.buffer)
    kept = tuple(bases.of(buffer) for buffer in step.kept)
    described = tuple((names.get(id(base)), base.size, base.dtype, base.device) for base in bases.order)
    return SavedStep(described, tuple(views.order), tuple(programs.order), calls, output, step.cut, kept)


class _Numbers:
    """Numbers things in the order in which they first come."""

    def __init__(self) -> None:
        self.order: dict = {}

    def of(self, key: object) -> int:
        return self.order.setdefault(key, len(self.order))


def bind_step(saved: SavedStep, named: Mapping[str, Tensor]) -> Step:
    """The step on this process's tensors, with scratch memory of its own. Raises CacheError where they do not fit."""
    bases = []
    for name, size, dtype, device in saved.bases:
        if name is None:
            bases.append(Buffer(device, size, dtype))
            continue
        if name not in named:
            raise CacheError(f"the saved step reads {name}, which this model has not")
        base = named[name].uop.base.buffer
        if (base.size, base.dtype, base.device) != (size, dtype, device):
            raise CacheError(f"the saved step reads {name} of {size} {dtype} on {device}, but it is {base}")
        bases.append(base)
    views = [_view(bases[base], offset, size, dtype) for base, offset, size, dtype in saved.views]
    calls = tuple(Call(saved.programs[program], tuple(views[i] for i in args)) for program, args in saved.calls)
    output = Tensor(UOp.from_buffer(bases[saved.output].ensure_allocated()))
    borrowed = tuple(base for base, (name, *_) in zip(bases, saved.bases, strict=True) if name is not None)
    return Step(calls, output, borrowed, saved.cut, tuple(bases[base].ensure_allocated() for base in saved.kept))


def _view(base: Buffer, offset: int, size: int, dtype: DType) -> Buffer:
    return base if (offset, size, dtype) == (0, base.size, base.dtype) else base.view(size, dtype, offset)
