"""The step loop's body: schedule, execute, commit. Synchronous, on one thread, with token ids in and out."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Protocol

from tinyvllm.config import Capacity, ModelConfig
from tinyvllm.errors import EngineDeadError
from tinyvllm.scheduling.plan import StepOutput, StepPlan, StepStats, TokenOut
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

MAX_CONSECUTIVE_FAILURES = 3  # one may be an accident of its batch; this many in a row are a broken device

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of execution.runner.ModelRunner."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def num_captures(self) -> int: ...

    def execute(self, plan: StepPlan) -> StepOutput: ...

    def close(self) -> None: ...


class EngineCore:
    """Moves requests one step at a time. Everything here, `abort` too, happens between two steps.

    `stats` is a new object after every change, so another thread may read it at any time.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.stats = StepStats(
            num_captures=runner.num_captures,
            num_free_blocks=scheduler.block_manager.num_free,
            extra={"num_steps": 0, "num_failed_steps": 0, "num_computed_tokens": 0, "num_output_tokens": 0},
        )
        self._num_failures = 0  # consecutive

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a new request. RequestError or ContextLengthError for one that can never run."""
        self.scheduler.add(request)
        self._publish(self.stats)

    def abort(self, request_id: str) -> Request | None:
        """End a request now and free its blocks. None when it is unknown or has finished."""
        request = self.scheduler.abort(request_id)
        self._publish(self.stats)
        return request

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        """End a request for a reason that only its text shows; one that has just ended takes on the new reason."""
        self.scheduler.finish(request, reason, stop_reason, error)
        self._publish(self.stats)

    def step(self) -> list[TokenOut]:
        """Run one step; return each request's new token or its end. [] when there is nothing to do.

        A step that throws ends its requests with finish_reason "error", and the next step may succeed.
        Raises EngineDeadError after MAX_CONSECUTIVE_FAILURES of them.
        """
        start_s = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        scheduled_s = time.perf_counter()
        try:
            output = self.runner.execute(plan)
            executed_s = time.perf_counter()
            outs = self.scheduler.commit(plan, output)
        except Exception as error:
            outs = self._fail(plan, error)
            self._publish(self._count(self.stats, num_failed_steps=1))
            if self._num_failures >= MAX_CONSECUTIVE_FAILURES:
                raise EngineDeadError(
                    f"{self._num_failures} steps in a row have failed, the last with {_describe(error)}"
                ) from error
            return outs
        self._num_failures = 0
        stats = self._count(
            self.stats,
            num_steps=1,
            num_computed_tokens=plan.num_tokens,
            num_output_tokens=sum(out.token_id is not None for out in outs),
        )
        stats.schedule_s = scheduled_s - start_s
        stats.pack_s, stats.device_s = output.pack_s, output.device_s
        stats.commit_s = time.perf_counter() - executed_s
        stats.num_tokens, stats.num_seqs = plan.num_tokens, len(plan.entries)
        self._publish(stats)
        return outs

    def _fail(self, plan: StepPlan, error: Exception) -> list[TokenOut]:
        self._num_failures += 1
        message = f"the step that computed this request failed with {_describe(error)}"
        names = ", ".join(entry.request.request_id for entry in plan.entries)
        logger.error("a step failed (%d in a row), and with it %s", self._num_failures, names, exc_info=error)
        for entry in plan.entries:
            self.scheduler.finish(entry.request, "error", error=message)
        return [TokenOut(entry.request, None, None, "error") for entry in plan.entries]

    def _publish(self, stats: StepStats) -> None:
        """Replace `stats` by a copy with the gauges of this moment."""
        self.stats = dataclasses.replace(
            stats,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.scheduler.block_manager.num_free,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            num_preemptions=self.scheduler.num_preemptions,
            num_captures=self.runner.num_captures,
        )

    @staticmethod
    def _count(stats: StepStats, **more: int) -> StepStats:
        """A copy with the counters of `extra`, all since start, moved on."""
        return dataclasses.replace(stats, extra={name: n + more.get(name, 0) for name, n in stats.extra.items()})


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
