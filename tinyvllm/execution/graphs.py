"""One recorded step a bucket: fixed shapes, persistent inputs, nothing compiled while serving."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from tinyvllm.config import Capacity
from tinyvllm.errors import CacheError
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.model.registry import Model
from tinyvllm.ops import tuning
from tinyvllm.ops.adjust import SamplingState
from tinyvllm.ops.backend import Backend, KVPool
from tinyvllm.ops.device import DeviceHandle
from tinyvllm.ops.program_store import ProgramStore
from tinyvllm.ops.recording import (
    Call,
    SavedStep,
    Step,
    bind_step,
    cut_here,
    head_of,
    keep,
    rebind,
    record,
    save_step,
)
from tinyvllm.ops.replay import make_replay
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """One form of a bucket's step, with inputs and output of its own. A graph has as many as steps may be in flight:
    while one runs, another is filled, and each reads the tokens of the one before from the other's output."""

    packer: InputPacker  # fills the host's side of the inputs
    send: Callable[[], None]  # moves the packed inputs to the device
    step: Step
    run: Callable[[], None]  # enqueues the step on what was sent last
    device: DeviceHandle
    adjusted: Step  # sampling from the step's logits as requests want them adjusted

    @cached_property
    def run_forward(self) -> Callable[[], None]:
        """Enqueues the step up to its logits. Made when first asked for: nothing is compiled for it."""
        return make_replay(self.device, head_of(self.step))

    @cached_property
    def run_adjusted(self) -> Callable[[], None]:
        """Enqueues the adjusted sampling, after `run_forward`."""
        return make_replay(self.device, self.adjusted)


@dataclass(frozen=True)
class Graph:
    """A bucket's step, in each of its lanes."""

    bucket: Bucket
    layout: StepLayout
    inputs: Tensor  # of the first lane, whose calls are looked at
    hidden: tuple[Buffer, ...]  # (T, columns) before the last norm, side by side; () of a decode bucket
    lanes: tuple[Lane, ...]

    @property
    def calls(self) -> tuple[Call, ...]:
        """What one run launches."""
        return self.lanes[0].step.calls

    @property
    def num_kernels(self) -> int:
        return len(self.calls)


def capture(
    bucket: Bucket,
    model: Model,
    backend: Backend,
    pool: KVPool,
    capacity: Capacity,
    outputs: Sequence[Tensor],
    state: SamplingState,
    store: ProgramStore | None = None,
) -> Graph:
    """A bucket's step, from `store` or else traced, compiled and kept there: a lane for each of `outputs`, which are
    (rows * OUT_WIDTH,) int32 and shared by all buckets. The step of a lane reads the output of the lane before it."""
    layout, device = bucket.layout(capacity), backend.device
    buffers = [device.input_buffer(layout.size) for _ in outputs]
    inputs, output, newest = buffers[0].tensor, outputs[0], outputs[-1]

    vocab_size, stride = model.config.vocab_size, model.logit_stride

    def trace() -> Tensor:
        logits = model(layout, inputs, pool, is_decode=bucket.is_decode, newest=newest)
        keep(logits)
        cut_here()
        return backend.sample(logits, vocab_size, stride, inputs, layout, output).realize()

    own = {"inputs": inputs, **{f"output {i}": tensor for i, tensor in enumerate(outputs)}}
    tensors = own | get_state_dict({"model": model, "backend": backend, "pool": pool})
    name = step_name(bucket, model, backend, pool, layout, tensors)
    first = _restore_or_record(trace, store, name, tensors)
    logits = Tensor(UOp.from_buffer(first.kept[-1]))

    def trace_adjusted() -> Tensor:
        return backend.sample(logits, vocab_size, stride, inputs, layout, output, state).realize()

    tensors = own | {"logits": logits, "counts": state.counts, "mask": state.mask, "bias": state.bias}
    adjusted = _restore_or_record(trace_adjusted, store, f"{name}-adjusted", tensors)
    lanes = []
    for index, buffer in enumerate(buffers):
        packer = InputPacker(layout, buffer.host)
        buffer.send()
        turned = {old: outputs[(i + index) % len(outputs)] for i, old in enumerate(outputs)}
        others = turned | {inputs: buffer.tensor} if index else {}
        step = rebind(first, others)
        run = make_replay(device, step)
        if not device.is_cpu:  # a GPU's graph is made by its first run: on padding alone, which touches the dummy block
            run()
        lanes.append(Lane(packer, buffer.send, step, run, device, rebind(adjusted, others)))
    device.wait()
    return Graph(bucket, layout, inputs, first.kept[:-1], tuple(lanes))


def _restore_or_record(
    trace: Callable[[], Tensor], store: ProgramStore | None, name: str, tensors: dict[str, Tensor]
) -> Step:
    if store is None:
        return record(trace)
    return _restore(store, name, tensors) or _record_and_keep(trace, store, name, tensors)


def _restore(store: ProgramStore, name: str, tensors: dict[str, Tensor]) -> Step | None:
    saved = store.read_step(name)
    if not isinstance(saved, SavedStep):
        return None
    try:
        return bind_step(saved, tensors)
    except CacheError as error:
        logger.warning("a kept step is made anew: %s", error)
        return None


def _record_and_keep(trace: Callable[[], Tensor], store: ProgramStore, name: str, tensors: dict[str, Tensor]) -> Step:
    step = record(trace, store)
    try:
        store.write_step(name, save_step(step, tensors))
    except CacheError as error:
        logger.info("not kept for the next start: %s", error)
    return step


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
