"""Tracing a bucket's steps: in this process, or in another one, which has the model's shape without its weights.

Tracing takes the interpreter for up to seconds, in which no stream gets a token. So while the engine serves, other
processes trace, several at once. What they answer is what this process would have traced: the same calls on the same
named buffers, and the same kernels. This process compiles, binds and captures them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.helpers import Context
from tinygrad.renderer import Renderer

from tinyvllm.device import meta
from tinyvllm.device.clang_flags import knows_flags
from tinyvllm.device.clang_server import make_library
from tinyvllm.device.compiling import (
    Key,
    PackedKernel,
    Pending,
    begin_elsewhere,
    can_trace_elsewhere,
    key_of,
    practise,
    prepare_elsewhere,
    settings,
)
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import Extent, OutlinedStep, SavedStep, TracedStep, cut_here, outline_step, trace_step
from tinyvllm.device.scratch import Scratch
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.early_start import MANY_LAYERS, PREPARE
from tinyvllm.execution.step_code import GraphContext, StepCode
from tinyvllm.faults import reach
from tinyvllm.ops.backends import import_kernels, practice_kernel
from tinyvllm.ops.coverage import Note
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.tuning import Chosen

logger = logging.getLogger(__name__)


def trace_forward(code: StepCode) -> tuple[TracedStep, list[Note]]:
    """The step, and the operations in the general kernels."""

    def trace() -> Tensor:
        logits = code.forward()
        cut_here()
        return code.sample(logits)

    with code.context.backend.coverage.watching() as notes:
        return trace_step(trace, shares_rows=not code.context.is_jit), notes


def trace_sampling(code: StepCode, logits: Tensor) -> tuple[TracedStep, list[Note]]:
    """Sampling from processed logits, after the part of the step before its cut."""
    sample = functools.partial(code.sample, logits, code.context.state)
    with code.context.backend.coverage.watching() as notes:
        return trace_step(sample, shares_rows=not code.context.is_jit), notes


@dataclass(frozen=True)
class TracedElsewhere:
    """A bucket's step and its sampling from processed logits, without programs: the keys of each step's kernels, in the
    order of its programs, each with its launch's extent. `kernels`: those of both."""

    steps: tuple[SavedStep, SavedStep]
    keys: tuple[tuple[tuple[Key, Extent], ...], tuple[tuple[Key, Extent], ...]]
    kernels: dict[Key, PackedKernel]


def prepare_tracing(device: DeviceHandle, num_layers: int, num_buckets: int) -> None:
    """Start the other processes, if they are going to trace: they begin while this one loads the weights."""
    if num_layers * num_buckets >= MANY_LAYERS and can_trace_elsewhere():
        prepare_elsewhere(PREPARE, device.is_cpu)


class EarlyTrace:
    """A trace that was begun before the weights were loaded: a Pending of (the step's name, its trace). It is taken if
    the name turns out to be the expected one, which has everything that the trace depends on."""

    def __init__(self, pending: Pending, what: str) -> None:
        """what: the bucket's name, for messages."""
        self._pending = pending
        self._what = what
        self._result: tuple[str, TracedElsewhere | None] | None = None
        self._name: str | None = None  # the expected one

    @property
    def is_done(self) -> bool:
        return self._result is not None or self._pending.is_done

    def expect(self, name: str) -> bool:
        """Say what the step's name should be. False if it is known to be another, or the trace is lost."""
        self._name = name
        return not self.is_done or self.wait() is not None

    def withdraw(self) -> bool:
        """`Pending.withdraw`. The trace is lost then."""
        if not self._pending.withdraw():
            return False
        self._result = "", None
        return True

    def wait(self) -> TracedElsewhere | None:
        """The trace; None if it is lost, or not that of the expected step."""
        if self._result is None:
            self._result = self._pending.wait() or ("", None)
        name, traced = self._result
        if traced is not None and self._name not in (None, name):
            logger.info("%s is traced again: what was traced early is %s, not %s", self._what, name, self._name)
            self._result, traced = ("", None), None
        return traced


class Tracer:
    """Has other processes trace the buckets of one context."""

    def __init__(self, context: GraphContext, early: Mapping[Bucket, EarlyTrace] | None = None) -> None:
        """early: traces that were begun before the weights were loaded."""
        self._context = context
        self._early = dict(early or {})
        self._payload = b""
        self._has_failed = False

    def begin(self, bucket: Bucket, urgency: int, name: str) -> Pending | EarlyTrace | None:
        """Start tracing; the result is a TracedElsewhere. None if this process has to trace. name: the step's."""
        early = self._early.pop(bucket, None)
        if early is not None and early.expect(name):
            return early
        if self._context.is_jit or self._has_failed or not can_trace_elsewhere():
            return None
        try:
            task = (renderers_of(self._context.backend.device), settings(), self._dumped, bucket, _chosen_now())
        except Exception as error:  # of pickle, for something that it cannot take along
            self._has_failed = True
            logger.warning("this process traces every step: %s: %s", type(error).__name__, error)
            return None
        return begin_elsewhere(_trace_there, task, f"the trace of {bucket.name}", urgency)

    @property
    def _dumped(self) -> bytes:
        """What tracing needs besides choices, about 100 KB."""
        if not self._payload:
            self._payload = meta.dump(replace(self._context, scratch=Scratch()))
        return self._payload


def _chosen_now() -> dict[str, Chosen]:
    """A copy of the tuned choices: a task is pickled later, when a search may have turned to others."""
    return dict(tuning.current.chosen)


def renderers_of(device: DeviceHandle) -> dict[str, Renderer]:
    return {name: Device[name].renderer for name in device.cores or (device.name,)}


# ---- In the process ----


def prepare_there(is_cpu: bool) -> None:
    """Finding this function has imported what tracing needs, except the kernels. In a template, whose processes have
    what it finds out and has practised."""
    import_kernels(is_cpu)
    if is_cpu:
        knows_flags()
        make_library()
        practise(practice_kernel())


Task = tuple[Mapping[str, Renderer], dict[str, Any], bytes, Bucket, dict[str, Chosen]]


def _trace_there(task: Task) -> TracedElsewhere:
    reach("trace.worker")
    renderers, settings_there, payload, bucket, chosen = task
    context = _load(payload, renderers)
    tuning.use(tuning.Choices(chosen=chosen))
    with Context(**settings_there):
        return trace_both(code_of(bucket, context))


def _load(payload: bytes, renderers: Mapping[str, Renderer]) -> GraphContext:
    meta.use_meta_devices(renderers)
    context: GraphContext = meta.load(payload)
    return context


def code_of(bucket: Bucket, context: GraphContext) -> StepCode:
    layout = context.layout(bucket)
    inputs = meta.make_tensor(context.backend.device.name, layout.size, dtypes.int)
    return StepCode(bucket, layout, context, inputs, context.outputs)


def trace_both(code: StepCode) -> TracedElsewhere:
    """Raises CacheError if a step cannot be without its buffers."""
    traced, notes = trace_forward(code)
    forward = outline_step(traced, code.named, notes)
    logits = Tensor(UOp.from_buffer(traced.kept[-1]))
    traced, notes = trace_sampling(code, logits)
    sampling = outline_step(traced, code.sampling_tensors(logits), notes)
    kernels: dict[Key, PackedKernel] = {}
    keys = _pack(forward, kernels), _pack(sampling, kernels)
    return TracedElsewhere((forward.step, sampling.step), keys, kernels)


def _pack(step: OutlinedStep, kernels: dict[Key, PackedKernel]) -> tuple[tuple[Key, Extent], ...]:
    """The keys of the step's kernels. Adds to `kernels` those that it lacks."""
    keys = tuple(map(key_of, step.kernels))
    for key, kernel in zip(keys, step.kernels, strict=True):
        if key not in kernels:
            kernels[key] = PackedKernel.of(kernel)
    return tuple(zip(keys, step.extents, strict=True))
