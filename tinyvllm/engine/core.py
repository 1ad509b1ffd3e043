"""The body of the step loop: schedule, launch, collect, commit. Runs on one thread; token ids in, token ids out.

Where the device can feed a step with the previous step's tokens, two steps are in flight: while one runs, the next is
planned, packed and enqueued, so the device never waits for Python. The end of a request is then seen one step late.

Drafts (scheduling/drafts.py) continue known tokens. So when the speculator wants to draft, the step in flight is
collected first, and a step with drafts before anything else is planned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from tinyvllm.config import Capacity, ModelConfig, SamplingParams
from tinyvllm.engine.adapters import EngineAdapters, require_adapters
from tinyvllm.engine.step_clock import (
    CAPTURE,
    COMMIT,
    DECODE,
    DRAFT,
    LOOP,
    PACK,
    PREFILL,
    SCHEDULE,
    TOKENS,
    Passage,
    StepClock,
)
from tinyvllm.errors import EngineDeadError, InvariantError
from tinyvllm.faults import reach
from tinyvllm.profiling import measure
from tinyvllm.scheduling.plan import StepOutput, StepPlan, StepStats, TokenOut, count_step
from tinyvllm.scheduling.request import Request, Status
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.tiers import DISK, HOST, POOL

MAX_CONSECUTIVE_FAILURES = 3  # one may be caused by its batch; this many in a row mean a broken device

# since start; padded rows are the rows of a graph beyond its step's tokens
COUNTERS = ("num_steps", "num_failed_steps", "num_computed_tokens", "num_padded_rows", "num_output_tokens")
FETCH_POLL_S = 2e-3  # how long a step waits for the disk, or for an adapter's files, if no request can run before
MAX_IN_FLIGHT = 2  # one that runs, and the next

logger = logging.getLogger(__name__)


class Launched(Protocol):
    """A step that a runner has launched."""

    @property
    def pack_s(self) -> float:
        """Seconds of `launch` that went to packing its inputs."""


class Runner(Protocol):
    """The part of execution.runner.ModelRunner that the engine uses."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def num_captures(self) -> int: ...

    @property
    def num_general_operations(self) -> int:
        """Operations, of all layers, in the general kernels because no fused kernel covers them."""

    @property
    def verify_sizes(self) -> tuple[int, ...]:
        """Token rows of the graphs for steps with drafts, ascending; () without any."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be launched before the first of them is collected: 1, or MAX_IN_FLIGHT."""

    def launch(self, plan: StepPlan) -> Any:
        """Enqueue a step; the device feeds it the tokens in flight. Returns a handle for `sample` and `collect`."""

    def sample(self, handle: Any) -> None:
        """Enqueue the sampling that `launch` deferred because it depends on the previous step's tokens.

        Call it after those are committed. Does nothing if `launch` deferred nothing."""

    def collect(self, handle: Any) -> StepOutput:
        """Wait for the oldest launched step and read its tokens."""

    def wait(self) -> None:
        """Return when the device has run everything that was launched. Raises what the device raises."""

    def close(self) -> None: ...


class Captures(Protocol):
    """The part of execution.captures.Captures that the engine uses: it makes graphs while the engine serves."""

    @property
    def num_to_come(self) -> int:
        """Graphs that `advance` has not made yet."""

    @property
    def num_failed(self) -> int:
        """Graphs that could not be made."""

    @property
    def is_next_compiled(self) -> bool:
        """Whether the next `advance` instantiates a graph; if so, no step may be in flight."""

    def advance(self) -> None:
        """Do part of the work on the next graph. Returns soon, and never raises."""


@dataclass
class LaunchedStep:
    """A step on the device, and how long it took to schedule."""

    plan: StepPlan
    handle: Any
    schedule_s: float
    launch_s: float  # without packing, and with the sampling that was enqueued later
    launched_s: float  # when it was launched, by the engine's clock
    begun_s: float  # when its scheduling began

    @property
    def stage(self) -> int:
        """What the device's time counts as."""
        return DECODE if self.plan.has_no_prompts else PREFILL


class EngineCore:
    """Advances requests one step at a time. Call every method, `abort` included, between two steps only.

    `stats` is replaced by a new object on every change, so other threads may read it at any time.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        captures: Captures | None = None,
        *,
        captures_when_idle: bool = False,
        adapters: EngineAdapters | None = None,
    ) -> None:
        """`captures` makes the graphs that the runner lacks; None if it has them all. captures_when_idle: the caller
        is to call `advance_captures` only while no request runs. adapters: those that requests may ask for; None: they
        are off."""
        self.runner = runner
        self.scheduler = scheduler
        self.captures_when_idle = captures_when_idle
        self.adapters = adapters
        self._captures = captures
        self.stats = StepStats(
            num_captures=runner.num_captures,
            num_general_operations=runner.num_general_operations,
            num_captures_to_come=captures.num_to_come if captures is not None else 0,
            num_free_blocks=scheduler.block_manager.num_free,
            extra=dict.fromkeys(COUNTERS, 0),
        )
        self.clock = StepClock()
        self._in_flight: deque[LaunchedStep] = deque()  # oldest first
        self._num_failures = 0  # consecutive
        self._collected_s = 0.0  # when the latest step was collected, by `clock`
        self._was_busy = False  # there was work left then
        self._tiers = scheduler.block_manager.tiers

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError or ContextLengthError if it can never run."""
        self.clock.mark(LOOP)
        if request.adapter:
            require_adapters(self.adapters).require(request.adapter)
        request.queued_s, request.passage = self.clock.now_s, Passage.begin(self.clock)
        self.scheduler.add(request)
        self._publish(self.stats)

    def abort(self, request_id: str) -> Request | None:
        """End a request now and free its blocks. None if it is unknown or has finished."""
        self.clock.mark(LOOP)
        request = self.scheduler.abort(request_id)
        self._publish(self.stats)
        return request

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        """End a request for a reason found in its text. If it has just ended, the new reason replaces the old one."""
        self.scheduler.finish(request, reason, stop_reason, error)
        self._publish(self.stats)

    def look_up_prefix(self, prompt_ids: list[int], hash_seed: bytes = b"") -> list[int]:
        """Tokens of a prompt that are cached: in the pool, there or in host memory, and there or on disk."""
        manager = self.scheduler.block_manager
        if not manager.enable_prefix_caching:
            return [0, 0, 0]
        request = Request("", prompt_ids, SamplingParams(), hash_seed=hash_seed)
        return [manager.num_found(request, depth) * manager.block_size for depth in (POOL, HOST, DISK)]

    @property
    def has_captures_to_come(self) -> bool:
        """Whether graphs are still to be made, by calling `advance_captures` between steps."""
        return self._captures is not None and self._captures.num_to_come > 0

    def advance_captures(self) -> list[TokenOut]:
        """Do part of the work on the next graph. If it instantiates one, collect the steps in flight first.

        Returns their new tokens and ends. Raises what `step` raises."""
        captures = self._captures
        outs: list[TokenOut] = []
        if captures is None:
            return []
        if captures.is_next_compiled:
            try:
                while self._in_flight:
                    self._collect(outs)
            except Exception as error:
                outs += self._fail([], error)
        self.clock.mark(LOOP)
        with measure.span(measure.CAPTURE):
            captures.advance()
        self.clock.mark(CAPTURE)
        self._publish(self.stats)
        return outs

    def step(self) -> list[TokenOut]:
        """Launch a step if anything can be scheduled; collect the oldest when the maximum is in flight.

        Returns new tokens and ends; [] if there is nothing to do, or nothing to read yet. If a step raises, the
        requests of all steps in flight end with finish_reason "error", and the next step may succeed. If a step cannot
        be planned, all requests end so, since any of them may be half planned. Raises EngineDeadError after
        MAX_CONSECUTIVE_FAILURES of those in a row, and if a failure has left the pool inconsistent.
        """
        with measure.span(measure.STEP) as span:
            return self._step(span)

    def _step(self, span: measure.OpenSpan | measure.Nothing) -> list[TokenOut]:
        outs = self._end_unreadable()
        self.clock.mark(LOOP)
        try:
            self._collect_for_drafts(outs)
        except Exception as error:
            return outs + self._fail([], error)
        try:
            self._draft()
            with measure.span(measure.SCHEDULE):
                reach("engine.schedule")
                plan = self.scheduler.schedule()
        except InvariantError:
            raise
        except Exception as error:
            return outs + self._fail(self.scheduler.requests, error)
        schedule_s = self.clock.mark(SCHEDULE)
        if plan is None and not self._in_flight:
            if self.scheduler.is_fetching:
                self._wait_for_files()
            return outs
        if measure.is_on():
            span.tell(**_facts(plan or self._in_flight[0].plan))
            _measure_queues(plan)
        try:
            if plan is not None:
                self._launch(plan, schedule_s)
            self._collect_due(plan, outs)
        except Exception as error:
            outs += self._fail([] if plan is None else list(plan.requests), error)
        if not self.has_work:
            self.flush_tiers()
        return outs

    def _end_unreadable(self) -> list[TokenOut]:
        """End the requests whose adapter could not be read again. None of them runs."""
        outs = []
        for request, reason in [] if self.adapters is None else self.adapters.take_unreadable():
            logger.error("request %s ends, because its adapter cannot be read again: %s", request.request_id, reason)
            self.scheduler.finish(request, "error", error=f"the adapter cannot be read again: {reason}")
            outs.append(TokenOut(request, token_id=None, finish_reason="error"))
        if outs:
            self._publish(self.stats)
        return outs

    def _wait_for_files(self) -> None:
        """Wait a moment for blocks or for an adapter, without which nothing can run."""
        if self._tiers is not None:
            self._tiers.poll(FETCH_POLL_S)
        elif self.adapters is not None:
            self.adapters.wait(FETCH_POLL_S)

    @property
    def has_backlog(self) -> bool:
        """Whether the disk is to get blocks while nothing runs, by calling `flush_tiers` now and then."""
        return self._tiers is not None and self._tiers.has_backlog

    def flush_tiers(self) -> None:
        """Begin what the tiers would do before the next step."""
        if self._tiers is not None:
            self._tiers.flush()
            self._publish(self.stats)

    def _draft(self) -> None:
        """Have tokens guessed for the next step, if all tokens are known."""
        speculator = self.scheduler.speculator
        if speculator is not None and not self._in_flight:
            with measure.span(measure.DRAFT):
                speculator.draft(self.scheduler.running)
            self.clock.mark(DRAFT)

    def _collect_for_drafts(self, outs: list[TokenOut]) -> None:
        """Collect what is in flight if the next step cannot be planned before, because that has drafts, or this one is
        to have some."""
        speculator = self.scheduler.speculator
        if speculator is None or not self._in_flight:
            return
        if self._in_flight[-1].plan.num_drafts or speculator.wants(self.scheduler.running):
            while self._in_flight:
                self._collect(outs)
            self.clock.mark(LOOP)

    def _collect_due(self, plan: StepPlan | None, outs: list[TokenOut]) -> None:
        """Collect the steps whose time it is after `plan` was launched, or after nothing was, and enqueue the sampling
        that this deferred."""
        if plan is None or len(self._in_flight) == MAX_IN_FLIGHT:
            self._collect(outs)
        if plan is not None:
            reach("engine.sample")
            self.clock.mark(LOOP)
            latest = self._in_flight[-1]
            self.runner.sample(latest.handle)
            latest.launch_s += self.clock.mark(latest.stage)
            # pooled hidden states are in scratch memory, which the next step would overwrite
            if self.runner.max_in_flight == 1 or plan.pooled:
                self._collect(outs)

    def _launch(self, plan: StepPlan, schedule_s: float) -> None:
        reach("engine.launch")
        clock = self.clock
        for request in plan.admitted:
            if request.passage is not None:
                request.passage.leave_queue()
        if self._tiers is not None:
            with measure.span(measure.TIERS):
                self._tiers.before_step()
            clock.mark(SCHEDULE)
        handle: Launched = self.runner.launch(plan)
        if self._tiers is not None:
            self._tiers.launched()
        launch_s = clock.mark_divided(DECODE if plan.has_no_prompts else PREFILL, handle.pack_s, PACK)
        launched_s = clock.now_s - launch_s
        step = LaunchedStep(plan, handle, schedule_s, launch_s, launched_s, launched_s - handle.pack_s - schedule_s)
        with measure.span(measure.COMMIT):
            self.scheduler.advance(plan)
        clock.mark(COMMIT)
        self._in_flight.append(step)

    def _collect(self, outs: list[TokenOut]) -> None:
        """Wait for the oldest step, commit its tokens, and add them to `outs`, which has what was known if it fails."""
        step = self._in_flight[0]
        reach("engine.collect")
        clock = self.clock
        clock.mark(LOOP)
        output = self.runner.collect(step.handle)
        wait_s = clock.mark_divided(step.stage, output.tokens_s, TOKENS)
        if step.plan.admitted or not step.plan.has_no_prompts:
            _note_chunks(step, step.launch_s + wait_s)
        seconds = self._note_pace(step, output.num_rows)
        if self._tiers is not None:
            self._tiers.collected(0 if step.plan.has_no_prompts else step.plan.num_tokens, seconds)
        with measure.span(measure.COMMIT):
            num_before = len(outs)
            self.scheduler.commit(step.plan, output, outs)
        commit_s = clock.mark(COMMIT)
        self._in_flight.popleft()
        self._was_busy = self.has_work
        self._num_failures = 0
        stats = self._count(
            self.stats,
            num_steps=1,
            num_computed_tokens=step.plan.num_tokens,
            num_padded_rows=max(0, output.num_rows - step.plan.num_tokens),
            num_output_tokens=sum(out.token_id is not None for out in outs[num_before:]),
        )
        stats.schedule_s = step.schedule_s
        stats.pack_s, stats.device_s = output.pack_s, output.device_s
        stats.commit_s, stats.end_s = commit_s, clock.now_s
        stats.step_sizes = count_step(stats.step_sizes, step.plan.num_tokens)
        stats.num_tokens, stats.num_seqs = step.plan.num_tokens, len(step.plan.requests)
        self._publish(stats)

    def _note_pace(self, step: LaunchedStep, num_rows: int) -> float:
        """Tell the scheduler how long a step has taken that was collected now: since it was launched, or since the step
        before it, which was in flight then, was collected. Returns the seconds."""
        now_s = self.clock.now_s
        seconds = now_s - max(step.launched_s, self._collected_s)
        if self.scheduler.pace is not None and num_rows and (step.plan.is_decode or not step.plan.has_no_prompts):
            self.scheduler.pace.note(num_rows, step.plan.is_decode, seconds)
        if self.scheduler.speculator is not None and num_rows:
            since_s = self._collected_s if self._was_busy else min(step.begun_s, now_s)
            self.scheduler.speculator.rule.note_step(step.plan, num_rows, now_s - since_s)
        self._collected_s = now_s
        return seconds

    def check(self) -> None:
        """After an unexpected error: raise EngineDeadError if the pool is inconsistent."""
        try:
            self.scheduler.audit()
        except InvariantError as error:
            raise EngineDeadError(f"a failure has left the pool of blocks inconsistent: {error}") from error

    def _fail(self, requests: list[Request], error: Exception) -> list[TokenOut]:
        """End the requests of all steps in flight, and `requests`, of a step that may not have been launched."""
        self._num_failures += 1
        in_flight = [request for step in self._in_flight for request in step.plan.requests]
        if self._in_flight:  # the next step's inputs take the place of theirs
            with contextlib.suppress(Exception):  # what failed once may fail again
                self.runner.wait()
        self._in_flight.clear()
        if self._tiers is not None:
            self._tiers.settled()
        failed = dict.fromkeys(in_flight + requests)  # in order, without duplicates
        message = f"the step that computed this request failed with {_describe(error)}"
        outs = []
        for request in failed:
            if request.status is not Status.FINISHED:
                self.scheduler.finish(request, "error", error=message)
                outs.append(TokenOut(request, token_id=None, finish_reason="error"))
        if self.scheduler.adapters is not None:
            self.scheduler.adapters.write_again()
        names = ", ".join(out.request.request_id for out in outs)
        logger.error("a step failed (%d in a row), ending %s", self._num_failures, names, exc_info=error)
        self._publish(self._count(self.stats, num_failed_steps=1))
        self.check()
        if self._num_failures >= MAX_CONSECUTIVE_FAILURES:
            raise EngineDeadError(
                f"{self._num_failures} steps in a row have failed, the last with {_describe(error)}"
            ) from error
        return outs

    def _publish(self, stats: StepStats) -> None:
        """Replace `stats` by a copy with the current gauges."""
        states = self.scheduler.block_manager.state_pool
        if states is not None:
            stats = dataclasses.replace(
                stats,
                num_live_states=states.num_live,
                num_checkpoints=states.num_checkpoints,
                num_checkpoint_hits=states.num_hits,
                num_checkpoint_evictions=states.num_evictions,
            )
        if self._tiers is not None:
            stats = dataclasses.replace(stats, extra={**stats.extra, **self._tiers.counts()})
        speculator = self.scheduler.speculator
        if speculator is not None:
            counts = speculator.counts
            num_unused = len(stats.accepted_per_position) - len(counts.per_position)
            stats = dataclasses.replace(
                stats,
                num_drafts=counts.num_drafts,
                num_draft_tokens=counts.num_draft_tokens,
                num_accepted_tokens=counts.num_accepted_tokens,
                accepted_per_position=(*counts.per_position, *[0] * num_unused),
            )
        self.stats = dataclasses.replace(
            stats,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.scheduler.block_manager.num_free,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            num_preemptions=self.scheduler.num_preemptions,
            num_captures=self.runner.num_captures,
            num_general_operations=self.runner.num_general_operations,
            num_captures_to_come=self._captures.num_to_come if self._captures is not None else 0,
            num_failed_captures=self._captures.num_failed if self._captures is not None else 0,
        )

    @staticmethod
    def _count(stats: StepStats, **more: int) -> StepStats:
        """A copy with the counters in `extra` increased by `more`."""
        return dataclasses.replace(stats, extra={name: n + more.get(name, 0) for name, n in stats.extra.items()})


def _note_chunks(step: LaunchedStep, seconds: float) -> None:
    """Tell the requests whose prompts a step computed how long the device took."""
    admitted = set(step.plan.admitted)
    for entry in step.plan.entries:
        request = entry.request
        if request.passage is not None and (not entry.decodes or request in admitted):
            request.passage.add_chunk(step.stage, seconds)


def _facts(plan: StepPlan) -> dict[str, measure.Fact]:
    """Attributes of a step's span."""
    if plan.has_no_prompts:
        kind = "verify" if plan.num_drafts else "decode"
    else:
        kind = "mixed" if any(entry.decodes for entry in plan.entries) else "prefill"
    return {"kind": kind, "tokens": plan.num_tokens, "sequences": len(plan.requests)}


def _measure_queues(plan: StepPlan | None) -> None:
    """Record the queue time of requests that are scheduled for the first time."""
    now_ns = time.perf_counter_ns()
    for entry in plan.entries if plan is not None else ():
        request = entry.request
        if entry.start == request.num_cached_tokens and not request.num_output_tokens and not request.num_preemptions:
            waited_ns = max(0, int((time.monotonic() - request.queued_s) * 1e9))
            measure.add(measure.QUEUE, now_ns - waited_ns, now_ns, request=request.request_id)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
