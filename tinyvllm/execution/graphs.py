"""One graph a bucket: fixed shapes, persistent inputs, nothing compiled while serving.

The words, in the order in which a graph comes to be:

- A step is *traced*: the model's code runs once, and each kernel that it would launch is noted (`TracedStep`).
- A step is *recorded* once the traced kernels are compiled: programs and buffers in launch order (`RecordedStep`). It
  is saved to disk without its buffers (`SavedStep`) and restored by a later start.
- A bucket is *captured* once its recorded steps can be run: a `Graph`, with an instance for each step that may be in
  flight. Until then it is a `PendingGraph`.
- A graph is *replayed*: one call enqueues all its kernels (`device/replay.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from tinyvllm.config import Capacity
from tinyvllm.device.compiling import Compiler
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.device.recording import (
    Call,
    RecordedStep,
    SavedStep,
    TracedStep,
    bind_step,
    cut_here,
    head_of,
    head_of_tensor,
    keep,
    rebind,
    save_step,
    trace_step,
)
from tinyvllm.device.replay import make_replay
from tinyvllm.device.scratch import Scratch
from tinyvllm.errors import CacheError
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import Backend, KVPool
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphInstance:
    """One form of a bucket's step, with inputs and output of its own. A graph has as many as steps may be in flight:
    while one runs, another is filled, and each reads the tokens of the one before from the other's output."""

    packer: InputPacker  # fills the host's side of the inputs
    send: Callable[[], None]  # moves the packed inputs to the device
    step: RecordedStep
    run: Callable[[], None]  # enqueues the step on what was sent last
    device: DeviceHandle
    processed: RecordedStep  # sampling from the step's logits as requests want them processed

    @cached_property
    def run_forward(self) -> Callable[[], None]:
        """Enqueues the step up to its logits. Made when first asked for: nothing is compiled for it."""
        return make_replay(self.device, head_of(self.step))

    @cached_property
    def run_processed(self) -> Callable[[], None]:
        """Enqueues the processed sampling, after `run_forward`."""
        return make_replay(self.device, self.processed)


@dataclass(frozen=True)
class Graph:
    """A bucket's step, in each of its instances."""

    bucket: Bucket
    layout: StepLayout
    inputs: Tensor  # of the first instance, whose calls are looked at
    hidden: tuple[Buffer, ...]  # (T, columns) before the last norm, side by side; () of a decode bucket
    instances: tuple[GraphInstance, ...]
    trace_s: float  # seconds of tracing its steps, or reading them

    @property
    def calls(self) -> tuple[Call, ...]:
        """What one run launches."""
        return self.instances[0].step.calls

    @property
    def num_kernels(self) -> int:
        return len(self.calls)


@dataclass(frozen=True)
class GraphContext:
    """What the graphs of all buckets share. `outputs`: one an instance, (rows * OUT_WIDTH,) int32. `scratch`: the
    memory of each step's intermediate values, since one step runs at a time."""

    model: Model
    backend: Backend
    pool: KVPool
    capacity: Capacity
    outputs: tuple[Tensor, ...]
    state: SamplingState
    scratch: Scratch = field(default_factory=Scratch)


class PendingGraph:
    """A bucket's graph before it is captured: its steps are restored from the store, or traced and being compiled.

    Nothing waits until `finish`. Nothing of it runs before, either, so that steps may be in flight meanwhile.
    """

    def __init__(self, bucket: Bucket, context: GraphContext, compiler: Compiler) -> None:
        self.bucket = bucket
        start_s = time.perf_counter()
        self._context, self._compiler, device = context, compiler, context.backend.device
        self._layout = bucket.layout(context.capacity)
        self._buffers = [device.input_buffer(self._layout.size) for _ in context.outputs]
        self._forward, self._processed = self._trace()
        traced = [piece.step for piece in (self._forward, self._processed) if isinstance(piece.step, TracedStep)]
        self._pending = [one for step in traced for one in compiler.begin(step.kernels)]
        self.trace_s = time.perf_counter() - start_s

    @property
    def is_compiled(self) -> bool:
        """Whether `finish` would wait for no compiler."""
        return all(pending.is_done for pending in self._pending)

    def finish(self) -> Graph:
        """The graph, with an instance for each output; each instance reads the output of the one before it. On a GPU
        this runs the graph on padding, which writes over the outputs: no step may be in flight."""
        context, device = self._context, self._context.backend.device
        forward, processed = (piece.finish(self._compiler) for piece in (self._forward, self._processed))
        forward, processed = context.scratch.place(forward, processed)
        instances, inputs, outputs = [], self._buffers[0].tensor, context.outputs
        for index, buffer in enumerate(self._buffers):
            packer = InputPacker(self._layout, buffer.host)
            buffer.send()
            turned = {old: outputs[(i + index) % len(outputs)] for i, old in enumerate(outputs)}
            others = turned | {inputs: buffer.tensor} if index else {}
            step = rebind(forward, others)
            run = make_replay(device, step)
            if not device.is_cpu:  # a GPU's graph is made by its first run: on padding alone, in the dummy block
                run()
            instances.append(GraphInstance(packer, buffer.send, step, run, device, rebind(processed, others)))
        device.wait()
        return Graph(self.bucket, self._layout, inputs, forward.kept[:-1], tuple(instances), self.trace_s)

    def _trace(self) -> tuple[Piece, Piece]:
        """The step, and sampling from its logits as requests want them processed."""
        context, layout = self._context, self._layout
        model, backend, state = context.model, context.backend, context.state
        inputs, output, newest = self._buffers[0].tensor, context.outputs[0], context.outputs[-1]
        vocab_size, stride = model.config.vocab_size, model.logit_stride
        # the part that sampling reads is the same for all buckets of so many sequences, and so are its programs
        settings = head_of_tensor(inputs, layout.num_sampling_words)

        def trace() -> Tensor:
            logits = model(layout, inputs, context.pool, is_decode=self.bucket.is_decode, newest=newest)
            keep(logits)
            cut_here()
            return backend.sample(logits, vocab_size, stride, settings, layout, output).realize()

        own = {"inputs": inputs, **{f"output {i}": tensor for i, tensor in enumerate(context.outputs)}}
        tensors = own | get_state_dict({"model": model, "backend": backend, "pool": context.pool})
        name = step_name(self.bucket, model, backend, context.pool, layout, tensors)
        forward = _restore_or_trace(trace, self._compiler.store, name, tensors)
        logits = Tensor(UOp.from_buffer(forward.step.kept[-1]))

        def trace_processed() -> Tensor:
            return backend.sample(logits, vocab_size, stride, settings, layout, output, state).realize()

        tensors = own | {"logits": logits, "counts": state.counts, "mask": state.mask, "bias": state.bias}
        return forward, _restore_or_trace(trace_processed, self._compiler.store, f"{name}-processed", tensors)


@dataclass(frozen=True)
class Piece:
    """A step that was restored, or is being made and then kept under `name`; `tensors`: what it reads and writes."""

    step: RecordedStep | TracedStep
    name: str
    tensors: dict[str, Tensor]

    def finish(self, compiler: Compiler) -> RecordedStep:
        if isinstance(self.step, RecordedStep):
            return self.step
        step = self.step.finish(compiler)
        if compiler.store is not None:
            try:
                compiler.store.write_step(self.name, save_step(step, self.tensors))
            except CacheError as error:
                logger.info("not kept for the next start: %s", error)
        return step


def _restore_or_trace(
    trace: Callable[[], Tensor], store: ProgramStore | None, name: str, tensors: dict[str, Tensor]
) -> Piece:
    step = _restore(store, name, tensors) if store is not None else None
    return Piece(step or trace_step(trace), name, tensors)


def _restore(store: ProgramStore, name: str, tensors: dict[str, Tensor]) -> RecordedStep | None:
    saved = store.read_step(name)
    if not isinstance(saved, SavedStep):
        return None
    try:
        return bind_step(saved, tensors)
    except CacheError as error:
        logger.warning("a kept step is made anew: %s", error)
        return None


def step_name(
    bucket: Bucket, model: Model, backend: Backend, pool: KVPool, layout: StepLayout, tensors: dict[str, Tensor]
) -> str:
    """A hash of everything that decides what is traced: our code, the model's shape and formats, the settings.

    An attribute of the backend that has no repr of its own only makes the name new at every start."""
    facts = (
        sources_digest(),
        tuning.current.digest,
        model_digest(model, backend),
        (pool.num_blocks, pool.dtype),
        (bucket, layout),
        {key: (tensor.numel(), tensor.dtype) for key, tensor in tensors.items()},
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def model_digest(model: Model, backend: Backend) -> str:
    """A hash of the model's shape and formats and of how its backend was set up."""
    matrices = [(m.format, m.num_rows, m.num_cols, m.used_rows, m.layout) for m in model.matrices]
    settings = {key: value for key, value in sorted(vars(backend).items()) if not isinstance(value, Tensor)}
    facts = (
        (type(model).__qualname__, dataclasses.replace(model.config, name=""), model.logit_stride, matrices),
        (type(backend).__qualname__, settings),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


@functools.cache
def sources_digest() -> str:
    """A hash of this package's code, all of which may decide what a step is."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()
