"""One graph per bucket, with fixed shapes and persistent inputs, so that nothing is compiled while serving.

The terms, in the order in which a graph is made:

- A step is *traced*: the model's code runs once, and each kernel that it would launch is noted (`TracedStep`).
  Another process can do it, which has the model's shape without its weights (`tracing.py`).
- A step is *recorded* once the traced kernels are compiled: programs and buffers in launch order (`RecordedStep`). It
  is saved to disk without its buffers (`SavedStep`) and restored by a later start.
- A bucket is *captured* once its recorded steps can be run: a `Graph`, with an instance for each step that may be in
  flight. Until then it is a `PendingGraph`.
- A graph is *replayed*: one call enqueues all its kernels (`device/replay.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer

from tinyvllm.device.compiling import Compiler
from tinyvllm.device.jit_replay import JitReplay, check_same_kernels, join_steps
from tinyvllm.device.recording import Call, RecordedStep, head_of, rebind
from tinyvllm.device.replay import LazyReplay, make_replay
from tinyvllm.device.watching import is_watched
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.execution.pending_steps import PendingSteps
from tinyvllm.execution.step_code import GraphContext, StepCode
from tinyvllm.execution.tracing import Tracer
from tinyvllm.ops.step_inputs import StepLayout


@dataclass(frozen=True)
class GraphInstance:
    """A bucket's step with inputs and an output of its own. A graph has one for each step that may be in flight: while
    one runs, another is filled, and each reads the tokens of the previous step from the other's output."""

    packer: InputPacker  # fills the host's side of the inputs
    send: Callable[[], None]  # moves the packed inputs to the device
    step: RecordedStep  # what `run` launches
    processed: RecordedStep  # what `run_processed` launches: sampling from processed logits
    routings: tuple[Buffer, ...]  # (T * k,) int32: the experts that each sparse layer chose (ops/experts_spec.py)
    hidden: tuple[Buffer, ...]  # (T, columns) before the last norm, side by side; () of a decode bucket
    run: Callable[[], None]  # enqueues the step on what was sent last
    run_forward: Callable[[], None]  # enqueues the step up to its logits
    run_processed: Callable[[], None]  # enqueues the sampling from processed logits, after `run_forward`


@dataclass(frozen=True)
class Graph:
    """A bucket's step, in each of its instances."""

    bucket: Bucket
    layout: StepLayout
    inputs: Tensor  # of the first instance, whose calls are inspected
    instances: tuple[GraphInstance, ...]
    trace_s: float  # seconds of tracing its steps, or restoring them

    @property
    def calls(self) -> tuple[Call, ...]:
        """The launches of one run."""
        return self.instances[0].step.calls

    @property
    def num_kernels(self) -> int:
        return len(self.calls)


class PendingGraph:
    """A bucket's graph before it is captured: its steps are restored from the store, or traced and being compiled.

    Until `finish`, nothing waits and none of its kernels run, so steps may be in flight.
    """

    def __init__(
        self,
        bucket: Bucket,
        context: GraphContext,
        compiler: Compiler,
        tracer: Tracer | None = None,
        urgency: int = 0,
        *,
        is_restored_only: bool = False,
    ) -> None:
        """tracer, urgency, is_restored_only: those of `PendingSteps`."""
        self.bucket = bucket
        self.trace_s = 0.0
        self._context, device = context, context.backend.device
        self._layout = context.layout(bucket)
        self._buffers = [device.input_buffer(self._layout.size) for _ in context.outputs]
        with self._timed():
            self._steps = PendingSteps(self._code(0), compiler, tracer, urgency, is_restored_only=is_restored_only)

    @property
    def is_traced(self) -> bool:
        """Whether all its kernels are known, and being compiled."""
        return self._steps.is_traced

    @property
    def is_compiled(self) -> bool:
        """Whether `finish` would wait for no other process."""
        return self._steps.is_compiled

    @property
    def is_recorded(self) -> bool:
        """Whether `finish` would wait for the device alone."""
        return self._steps.is_recorded

    @property
    def can_advance(self) -> bool:
        """Whether the next part before `finish` is ready."""
        return self._steps.can_advance

    def advance(self) -> bool:
        """Do the next part before `finish` if it is ready. Returns whether there was something to do."""
        with self._timed():
            return self._steps.advance()

    def trace_here(self) -> bool:
        """Trace now if no other process has begun to. Returns whether it did."""
        with self._timed():
            return self._steps.trace_here()

    def finish(self) -> Graph:
        """The graph, with an instance for each output; each instance reads the output of the one before it. Except for
        replays on a CPU, this runs the graph on padding, which writes over the outputs: no step may be in flight."""
        forward, processed = self._steps.record()
        if not self._context.is_jit:
            forward, processed = self._context.scratch.place(forward, processed)
        instances = []
        for index, buffer in enumerate(self._buffers):
            packer = InputPacker(self._layout, buffer.host)
            buffer.send()
            make = self._jit_instance if self._context.is_jit else self._replay_instance
            instances.append(make(index, packer, buffer.send, forward, processed))
        self._context.backend.device.wait()
        return Graph(self.bucket, self._layout, self._buffers[0].tensor, tuple(instances), self.trace_s)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.trace_s += time.perf_counter() - start_s

    @property
    def _num_routings(self) -> int:
        """How many sparse layers keep what they chose, before anything else is kept."""
        return len(self._context.model.config.sparse_layers)

    def _code(self, index: int) -> StepCode:
        outputs = self._context.outputs
        turned = outputs[index:] + outputs[:index]
        return StepCode(self.bucket, self._layout, self._context, self._buffers[index].tensor, turned)

    def _replay_instance(
        self, index: int, packer: InputPacker, send: Callable[[], None], forward: RecordedStep, processed: RecordedStep
    ) -> GraphInstance:
        """The steps recorded on the first instance's tensors, rebound to this one's."""
        device, own, first = self._context.backend.device, self._code(index).tensors, self._code(0).tensors
        others = {first[name]: own[name] for name in first} if index else {}
        step, processed = rebind(forward, others), rebind(processed, others)
        run = make_replay(device, step)
        if not device.is_cpu:  # a GPU's graph is built by its first run: on padding, in the dummy block
            run()
        return GraphInstance(
            packer=packer,
            send=send,
            step=step,
            processed=processed,
            routings=step.kept[: self._num_routings],
            hidden=step.kept[self._num_routings : -1],
            run=run,
            run_forward=LazyReplay(device, head_of(step)),
            run_processed=LazyReplay(device, processed),
        )

    def _jit_instance(
        self, index: int, packer: InputPacker, send: Callable[[], None], forward: RecordedStep, processed: RecordedStep
    ) -> GraphInstance:
        """The step's code captured by TinyJit: the forward pass, sampling, and sampling from processed logits. It must
        give the kernels of the recorded steps, which are compiled already."""
        code = self._code(index)
        run_forward = JitReplay(code.forward)
        kept = run_forward.step.kept
        logits = Tensor(UOp.from_buffer(kept[-1]))
        run_sample = JitReplay(lambda: code.sample(logits))
        run_processed = JitReplay(lambda: code.sample(logits, self._context.state))
        step = join_steps(run_forward.step, run_sample.step)
        for captured, recorded in ((step, forward), (run_processed.step, processed)):
            check_same_kernels(self.bucket.name, captured, recorded)
        if is_watched():
            describer, inputs = self._context.describer, code.inputs
            describer.describe_step(step, run_forward, run_sample, packer, inputs)
            describer.describe_sampling(run_processed, packer, inputs)

        def run() -> None:
            run_forward()
            run_sample()

        return GraphInstance(
            packer=packer,
            send=send,
            step=step,
            processed=run_processed.step,
            routings=kept[: self._num_routings],
            hidden=kept[self._num_routings : -1],
            run=run,
            run_forward=run_forward,
            run_processed=run_processed,
        )
