"""A bucket's two steps before they are recorded: restored from the store, traced by another process, or traced here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp

from tinyvllm.device.compiling import Compiler, Pending
from tinyvllm.device.recording import RecordedStep, SavedStep, TracedStep, bind_step, save_step, with_extent
from tinyvllm.errors import CacheError
from tinyvllm.execution.step_code import StepCode
from tinyvllm.execution.tracing import TracedElsewhere, Tracer, trace_forward, trace_sampling
from tinyvllm.ops.coverage import Note

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Traced:
    """A step that this process has traced. `name`: the stored step's. `tensors`: what it reads and writes. `notes`: the
    operations in the general kernels."""

    name: str
    step: TracedStep
    tensors: dict[str, Tensor]
    notes: Sequence[Note]


class PendingSteps:
    """The step and sampling from processed logits, on one instance's tensors.

    Nothing waits until `record`. With a tracer, another process traces what the store lacks, and `advance` takes over
    what is ready; without one, this process traces at once."""

    def __init__(
        self,
        code: StepCode,
        compiler: Compiler,
        tracer: Tracer | None = None,
        urgency: int = 0,
        *,
        is_restored_only: bool = False,
    ) -> None:
        """urgency: of the jobs for other processes, as in `CompileWorkers.submit`. is_restored_only: nothing is traced,
        so that the steps are either recorded now or never."""
        self._code, self._compiler, self._urgency = code, compiler, urgency
        # TinyJit must see the kernels themselves, which a saved step does not have; saved programs it can use
        self._store = None if code.context.is_jit else compiler.store
        self._named = code.named
        name = code.name
        self._names = name, f"{name}-processed"
        self._recorded: list[RecordedStep] = []  # the step, then the sampling; both at the end
        self._traced: list[_Traced] = []  # those that are not recorded, in this order, and are being compiled
        self._elsewhere: TracedElsewhere | None = None
        self._compiling: list[Pending] = []
        self._restore()
        is_done = self.is_recorded or is_restored_only
        self._tracing = None if is_done or tracer is None else tracer.begin(code.bucket, urgency, name)
        if not is_done and self._tracing is None:
            self._trace()

    @property
    def is_recorded(self) -> bool:
        """Whether `record` returns at once."""
        return len(self._recorded) == 2

    @property
    def is_traced(self) -> bool:
        """Whether all kernels are known, and being compiled."""
        return self._tracing is None

    @property
    def is_compiled(self) -> bool:
        """Whether `record` would wait for no other process."""
        return self.is_traced and all(pending.is_done for pending in self._compiling)

    @property
    def can_advance(self) -> bool:
        """Whether the next part is ready."""
        if self._tracing is not None:
            return self._tracing.is_done
        return self.is_compiled and not self.is_recorded

    def advance(self) -> bool:
        """Do the next part if it is ready: take over another process's trace, or bind the compiled kernels. Returns
        whether there was something to do."""
        if not self.can_advance:
            return False
        if self._tracing is not None:
            self._take_trace()
        else:
            self.record()
        return True

    def trace_here(self) -> bool:
        """Trace now if no other process has begun to. Returns whether it did."""
        if self._tracing is None or not self._tracing.withdraw():
            return False
        self._tracing = None
        self._trace()
        return True

    def record(self) -> tuple[RecordedStep, RecordedStep]:
        """The steps. Waits for tracing and compiling; raises what they raise."""
        if self._tracing is not None:
            self._take_trace()
        if self._elsewhere is not None:
            self._bind(self._elsewhere)
        for traced in self._traced:
            self._recorded.append(traced.step.finish(self._compiler))
            self._save(self._recorded[-1], traced)
        self._traced.clear()
        forward, sampling = self._recorded
        return forward, sampling

    def _restore(self) -> None:
        """Those that the store has."""
        for name in self._names:
            saved = self._store.read_step(name) if self._store is not None else None
            if not isinstance(saved, SavedStep):
                return
            try:
                self._recorded.append(bind_step(saved, self._tensors))
            except CacheError as error:
                logger.warning("a saved step is traced again: %s", error)
                return
            self._code.context.backend.coverage.restore(saved.notes)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """What the next step to be recorded reads and writes."""
        return self._code.sampling_tensors(_logits_of(self._recorded[0])) if self._recorded else self._named

    def _trace(self) -> None:
        """Those that are not restored. The first one's kernels are compiled while the second is traced."""
        code, (name, sampling_name) = self._code, self._names
        if not self._recorded:
            step, notes = trace_forward(code)
            self._begin(_Traced(name, step, self._named, notes))
        logits = _logits_of(self._recorded[0] if self._recorded else self._traced[0].step)
        step, notes = trace_sampling(code, logits)
        self._begin(_Traced(sampling_name, step, code.sampling_tensors(logits), notes))

    def _begin(self, traced: _Traced) -> None:
        self._traced.append(traced)
        self._compiling += self._compiler.begin(traced.step.kernels)

    def _save(self, step: RecordedStep, traced: _Traced) -> None:
        if self._store is not None:
            try:
                self._store.write_step(traced.name, save_step(step, traced.tensors, traced.notes))
            except CacheError as error:
                logger.info("not saved for the next start: %s", error)

    # -- traced elsewhere --------------------------------------------------------------------------------------------

    def _take_trace(self) -> None:
        """Begin to compile what another process has traced; trace here if it was lost."""
        assert self._tracing is not None
        self._elsewhere = self._tracing.wait()
        self._tracing = None
        if self._elsewhere is None:
            self._trace()
        else:
            self._recorded.clear()
            self._compiling = self._compiler.begin_packed(self._elsewhere.kernels, self._urgency)

    def _bind(self, traced: TracedElsewhere) -> None:
        """The steps with their programs, on this process's tensors."""
        self._elsewhere = None
        for name, step, keys in zip(self._names, traced.steps, traced.keys, strict=True):
            programs = self._compiler.programs_of(key for key, _ in keys)
            launched = (with_extent(program, extent) for program, (_, extent) in zip(programs, keys, strict=True))
            saved = replace(step, programs=tuple(launched))
            try:
                self._recorded.append(bind_step(saved, self._tensors))
            except CacheError as error:
                logger.warning("a step that another process traced is traced again: %s", error)
                self._recorded.clear()
                self._trace()
                return
            self._code.context.backend.coverage.restore(saved.notes)
            if self._store is not None:
                self._store.write_step(name, saved)


def _logits_of(forward: RecordedStep | TracedStep) -> Tensor:
    return Tensor(UOp.from_buffer(forward.kept[-1]))
