"""Running a step with tinygrad's TinyJit: the standard way, with which our own replays are compared.

TinyJit gets the same kernels in the same order as our recorder (`recording.launch`); it plans their memory, makes a
graph of them for the device, and launches it. It cannot share intermediate memory between steps, be saved without its
buffers, or run a CPU's cores side by side: docs/CAPTURE.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tinygrad import Tensor, TinyJit, UOp
from tinygrad.helpers import DEBUG, JIT, Context, getenv
from tinygrad.uop.ops import Ops, buffers

from tinyvllm.device.recording import Call, RecordedStep, collect_kept
from tinyvllm.errors import DeviceError, InvariantError

KERNEL_BY_KERNEL = 2  # tinygrad's JIT=2: captured, but launched one by one


class JitReplay:
    """A function captured by TinyJit. Making one runs it once, on what its buffers hold then.

    `trace` launches kernels on buffers that all exist before, and returns one tensor. It takes no arguments, because a
    step's inputs, pool and output stay where they are."""

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
        with Context(JIT=KERNEL_BY_KERNEL if DEBUG >= 2 else JIT.value):  # DEBUG=2 prints a graph as one line
            output = self._jit()
        self.step = _as_step(tuple(_calls(self._jit.captured.linear)), output, before, kept)

    def __call__(self) -> None:
        self._jit()


def check_environment() -> None:
    """Raise DeviceError if a setting of tinygrad's keeps TinyJit from capturing a step kernel by kernel."""
    if JIT.value == 0:
        raise DeviceError("JIT=0 turns TinyJit off: unset it, or use --capture replay")
    if getenv("HCQ2"):
        raise DeviceError(
            "HCQ2=1 merges a step's kernels, so TinyJit's cannot be checked: unset it, or use --capture replay"
        )


def join_steps(first: RecordedStep, second: RecordedStep) -> RecordedStep:
    """Two steps as one, cut between them, with the output of the second."""
    used = {id(buffer.base) for call in first.calls for buffer in call.buffers}
    borrowed = first.borrowed + tuple(base for base in second.borrowed if id(base) not in used)
    calls = first.calls + second.calls
    return RecordedStep(calls, second.output, borrowed, len(first.calls), first.kept + second.kept)


def check_same_kernels(name: str, captured: RecordedStep, recorded: RecordedStep) -> None:
    """Raise InvariantError if TinyJit captured programs other than the recorded ones, or in another order."""
    ours, theirs = ([call.target.key for call in step.calls] for step in (recorded, captured))
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
