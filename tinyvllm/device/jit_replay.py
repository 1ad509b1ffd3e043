"""Running a step with tinygrad's TinyJit: the standard way, with which our own replays are compared.

TinyJit gets the same kernels in the same order as our recorder (`recording.launch`); it plans their memory, makes a
graph of them for the device, and launches it. It cannot share intermediate memory between steps, be saved without its
buffers, or run a CPU's cores side by side: docs/CAPTURE.md.

With DEBUG=2 every step runs this way, whatever --capture says, because tinygrad's executor prints a line for each
kernel that it launches. `JitReplay.describe` gives these lines the names and the counts that our own profiles have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tinygrad import Tensor, TinyJit, UOp
from tinygrad.engine.realize import get_runtime, runtime_cache
from tinygrad.helpers import DEBUG, JIT, NO_COLOR, Context, ansistrip, getenv
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import Ops, buffers

from tinyvllm.device.recording import Call, RecordedStep, collect_kept
from tinyvllm.device.replay import count_dependent
from tinyvllm.device.watching import is_watched
from tinyvllm.errors import DeviceError, InvariantError

KERNEL_BY_KERNEL = 2  # tinygrad's JIT=2: captured, but launched one by one
MAX_AMOUNT = 1 << 62  # bytes or operations of one launch

logger = logging.getLogger(__name__)
Amounts = Callable[[], Sequence[tuple[int, int]]]  # (bytes, operations) of each launch of the step that runs next


def choose_capture(wanted: str) -> str:
    """How steps are captured: as requested, or by TinyJit if kernels are watched, since our replays print nothing."""
    if not is_watched():
        return wanted
    logger.warning(
        "DEBUG=%d: every step runs kernel by kernel through tinygrad's executor, which waits after each one. Use the "
        "lines for shares and counts, and a run without DEBUG for the speed",
        DEBUG.value,
    )
    return "tinyjit"


class JitReplay:
    """A function captured by TinyJit. Making one runs it once, on what its buffers hold then.

    `trace` launches kernels on buffers that all exist before, and returns one tensor. It takes no arguments, because a
    step's inputs, pool and output stay where they are."""

    is_own_launch = False

    def __init__(self, trace: Callable[[], Tensor]) -> None:
        check_environment()
        before = {id(buffer) for buffer in buffers.values()}
        kept: list[Tensor] = []

        def traced() -> Tensor:
            with collect_kept() as tensors:
                output = trace()
            kept.extend(tensors)  # alive until TinyJit has planned the memory of the rest
            return output

        self._jit = TinyJit(traced)
        self._jit.cnt = 1  # capture now: a plain run before would find nothing that is not in its buffer yet
        # capturing runs the function on padding, which is no step: its kernels have no lines
        jit = KERNEL_BY_KERNEL if is_watched() else JIT.value  # DEBUG=2 prints a graph as one line
        with Context(JIT=jit, DEBUG=min(DEBUG.value, 1)):
            output = self._jit()
        self.step = _as_step(tuple(_calls(self._jit.captured.linear)), output, before, kept)
        self._amounts: Amounts | None = None

    @property
    def num_barriers(self) -> int:
        return count_dependent(self.step)

    def __call__(self) -> None:
        if self._amounts is None:
            self._jit()
            return
        values: dict[str, int] = {}
        for number, (nbytes, flops) in enumerate(self._amounts()):
            values |= {_bytes_name(number): nbytes, _flops_name(number): flops}
        self._jit.captured([], values)

    def describe(self, labels: Sequence[str], amounts: Amounts) -> None:
        """Let the lines of DEBUG=2 begin with these labels, and count what `amounts` says at each run. tinygrad's own
        estimates take a loop whose length comes from data, as attention's, for as long as it may be."""
        captured = self._jit.captured
        named = [
            _described(call, number, label)
            for number, (call, label) in enumerate(zip(captured.linear.src, labels, strict=True))
        ]
        captured.linear, self._amounts = captured.linear.replace(src=tuple(named)), amounts


def _described(call: UOp, number: int, label: str) -> UOp:
    """A call whose program has the label in its name, and variables as its estimates. It is the same program, so it
    shares the one that is loaded; tinygrad finds that by a key that contains the name."""
    program = call.src[0]
    if program.op is not Ops.PROGRAM:
        return call
    nbytes, flops = (UOp.variable(name, 0, MAX_AMOUNT) for name in (_bytes_name(number), _flops_name(number)))
    sink, *rest = program.src
    sink = sink.replace(arg=replace(sink.arg, estimates=Estimates(ops=flops, lds=nbytes, mem=nbytes)))
    # a name from the cache of programs may have the colors of an earlier start
    name = ansistrip(program.arg.name) if NO_COLOR else program.arg.name
    info = replace(program.arg, name=f"{label}: {name}")
    named = program.replace(src=(sink, *rest), arg=info)
    device = call.src[1].device
    runtime_cache[named.key, device] = get_runtime(device, program)
    return call.replace(src=(named, *call.src[1:]))


def _bytes_name(number: int) -> str:
    return f"bytes{number}"


def _flops_name(number: int) -> str:
    return f"operations{number}"


def check_environment() -> None:
    """Raise DeviceError if a setting of tinygrad's keeps TinyJit from capturing a step kernel by kernel."""
    instead = "unset DEBUG" if is_watched() else "use --capture replay"
    if JIT.value == 0:
        raise DeviceError(f"JIT=0 turns TinyJit off: unset it, or {instead}")
    if getenv("HCQ2"):
        raise DeviceError(f"HCQ2=1 merges a step's kernels, so TinyJit's cannot be checked: unset it, or {instead}")


def join_steps(first: RecordedStep, second: RecordedStep) -> RecordedStep:
    """Two steps as one, cut between them, with the output of the second."""
    used = {id(buffer.base) for call in first.calls for buffer in call.buffers}
    borrowed = first.borrowed + tuple(base for base in second.borrowed if id(base) not in used)
    calls = first.calls + second.calls
    return RecordedStep(calls, second.output, borrowed, len(first.calls), first.kept + second.kept)


def _what_runs(target: UOp) -> tuple[Any, ...]:
    """A call's target without what its code was made from: a program for a part of its work (`Extent`) gets the part's
    operations and bytes before its code is made by TinyJit, and afterwards by us."""
    return (target.arg, *[part.key for part in target.src[2:]]) if target.op is Ops.PROGRAM else (target.key,)


def check_same_kernels(name: str, captured: RecordedStep, recorded: RecordedStep) -> None:
    """Raise InvariantError if TinyJit captured programs other than the recorded ones, or in another order."""
    ours, theirs = ([_what_runs(call.target) for call in step.calls] for step in (recorded, captured))
    if ours != theirs:
        raise InvariantError(
            f"graph {name}: TinyJit captured {len(theirs)} kernels that are not the {len(ours)} recorded"
        )


def _calls(linear: UOp) -> Iterator[Call]:
    """The launches of a captured step, those inside the device's graphs too."""
    for call in linear.src:
        target = call.src[0]
        if target.op is Ops.CUSTOM_FUNCTION and target.arg == "graph":
            yield from _calls(target.src[0])
        else:
            yield Call(target, tuple(argument.buffer for argument in call.src[1:]))


def _as_step(calls: tuple[Call, ...], output: Tensor, before: set[int], kept: list[Tensor]) -> RecordedStep:
    bases = {id(buffer.base): buffer.base for call in calls for buffer in call.buffers}
    borrowed = tuple(base for key, base in bases.items() if key in before)
    return RecordedStep(calls, output, borrowed, len(calls), tuple(tensor.uop.base.buffer for tensor in kept))
