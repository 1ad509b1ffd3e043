"""One graph per bucket, with fixed shapes and persistent inputs, so that nothing is compiled while serving.

The terms, in the order in which a graph is made:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from tinyvllm.config import Capacity
from tinyvllm.device.compiling import Compiler
from tinyvllm.device.jit_replay import JitReplay, check_same_kernels, join_steps
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
from tinyvllm.device.replay import LazyReplay, make_replay
from tinyvllm.device.scratch import Scratch
from tinyvllm.device.watching import is_watched
from tinyvllm.errors import CacheError
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.execution.watched import Describer
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import Backend, KVPool, Step
from tinyvllm.ops.coverage import Coverage, Note
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class GraphContext:
    """What the graphs of all buckets share. `outputs`: one per instance, (rows * OUT_WIDTH,) int32. `capture`: how a
    step is replayed, as in EngineConfig. `scratch`: the memory of each step's intermediate values, since one step runs
    at a time; TinyJit takes its own."""

    model: Model
    backend: Backend
    pool: KVPool
    capacity: Capacity
    outputs: tuple[Tensor, ...]
    state: SamplingState
    capture: str = "replay"
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def is_jit(self) -> bool:
        return self.capture == "tinyjit"

    @functools.cached_property
    def describer(self) -> Describer:
        """What names kernels while they are watched."""
        return Describer(self.model, self.pool, self.capacity.block_size)


@dataclass(frozen=True)
class StepCode:
    """A bucket's step as code that launches its kernels, on one instance's inputs and the outputs of all."""

    bucket: Bucket
    layout: StepLayout
    context: GraphContext
    inputs: Tensor
    outputs: tuple[Tensor, ...]  # its own first, the previous step's last

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it reads and writes, besides the model's weights and the pool."""
        return {"inputs": self.inputs, **{f"output {i}": tensor for i, tensor in enumerate(self.outputs)}}

    def forward(self) -> Tensor:
        """The logits, which are kept."""
        context = self.context
        logits = context.model(Step(self.layout, self.inputs, context.pool, self.bucket.is_decode, self.outputs[-1]))
        keep(logits)
        return logits

    def sample(self, logits: Tensor, state: SamplingState | None = None) -> Tensor:
        """The output, sampled from the logits; with a `state` from processed logits."""
        model, layout = self.context.model, self.layout
        # sampling's inputs, and so its programs, are the same for all buckets with this number of sequences
        settings = head_of_tensor(self.inputs, layout.num_sampling_words)
        vocab_size, stride, output = model.config.vocab_size, model.logit_stride, self.outputs[0]
        return self.context.backend.sample(logits, vocab_size, stride, settings, layout, output, state).realize()


class PendingGraph:
    """A bucket's graph before it is captured: its steps are restored from the store, or traced and being compiled.

    Until `finish`, nothing waits and none of its kernels run, so steps may be in flight.
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
        """The graph, with an instance for each output; each instance reads the output of the one before it. Except for
        replays on a CPU, this runs the graph on padding, which writes over the outputs: no step may be in flight."""
        forward, processed = (piece.finish(self._compiler) for piece in (self._forward, self._processed))
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

    def _trace(self) -> tuple[Piece, Piece]:
        """The step, and sampling from processed logits, on the first instance's tensors."""
        context, code = self._context, self._code(0)
        state = context.state

        def trace() -> Tensor:
            logits = code.forward()
            cut_here()
            return code.sample(logits)

        # TinyJit must see the kernels themselves, which a saved step does not have; saved programs it can use
        store = None if context.is_jit else self._compiler.store
        tensors = code.tensors | get_state_dict(
            {"model": context.model, "backend": context.backend, "pool": context.pool}
        )
        name = step_name(self.bucket, context.model, context.backend, context.pool, self._layout, tensors)
        coverage = context.backend.coverage
        forward = _restore_or_trace(trace, store, name, tensors, coverage)
        logits = Tensor(UOp.from_buffer(forward.step.kept[-1]))
        tensors = code.tensors | {"logits": logits, "counts": state.counts, "mask": state.mask, "bias": state.bias}
        sample = functools.partial(code.sample, logits, state)
        return forward, _restore_or_trace(sample, store, f"{name}-processed", tensors, coverage)


@dataclass(frozen=True)
class Piece:
    """A step that was restored from `store`, or is being compiled and then saved there under `name`. `tensors`: what it
    reads and writes. `store`: None if steps are not saved."""

    step: RecordedStep | TracedStep
    store: ProgramStore | None
    name: str
    tensors: dict[str, Tensor]
    notes: Sequence[Note] = ()  # the operations in the general kernels, noted while it was traced

    def finish(self, compiler: Compiler) -> RecordedStep:
        if isinstance(self.step, RecordedStep):
            return self.step
        step = self.step.finish(compiler)
        if self.store is not None:
            try:
                self.store.write_step(self.name, save_step(step, self.tensors, self.notes))
            except CacheError as error:
                logger.info("not saved for the next start: %s", error)
        return step


def _restore_or_trace(
    trace: Callable[[], Tensor],
    store: ProgramStore | None,
    name: str,
    tensors: dict[str, Tensor],
    coverage: Coverage,
) -> Piece:
    saved = store.read_step(name) if store is not None else None
    if isinstance(saved, SavedStep):
        try:
            step = bind_step(saved, tensors)
        except CacheError as error:
            logger.warning("a saved step is traced again: %s", error)
        else:
            coverage.restore(saved.notes)
            return Piece(step, store, name, tensors)
    with coverage.watching() as notes:
        return Piece(trace_step(trace), store, name, tensors, notes)


def step_name(
    bucket: Bucket, model: Model, backend: Backend, pool: KVPool, layout: StepLayout, tensors: dict[str, Tensor]
) -> str:
    """A hash of everything that determines what is traced: our code, the model's shape and formats, the settings.

    An attribute of the backend without a repr of its own only makes the name new at every start."""
    facts = (
        sources_digest(),
        tuning.current.digest,
        model_digest(model, backend),
        (pool.num_blocks, pool.dtype, pool.num_state_slots),
        (bucket, layout),
        {key: (tensor.numel(), tensor.dtype) for key, tensor in tensors.items()},
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def model_digest(model: Model, backend: Backend) -> str:
    """A hash of the model's shape and formats and of its backend's settings."""
    matrices = [(m.format, m.num_rows, m.num_cols, m.used_rows, m.layout) for m in model.matrices]
    settings = {key: value for key, value in sorted(vars(backend).items()) if not isinstance(value, Tensor)}
    facts = (
        (type(model).__qualname__, dataclasses.replace(model.config, name=""), model.logit_stride, matrices),
        (type(backend).__qualname__, settings),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


@functools.cache
def sources_digest() -> str:
    """A hash of this package's code, since all of it may affect a step."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()
