"""Tuning from outside: a worker process searches, so that a bad candidate crashes the worker and not the parent.

The worker announces each candidate before it tries it. If it dies or hangs, the parent saves that candidate as bad and
starts another worker, which continues where the first one stopped.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tinyvllm.errors import DeviceError
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.execution.tune_worker import run_worker
from tinyvllm.ops.kernel.tuning import load_choices

TRIAL_TIMEOUT_S = 120.0  # for one candidate, compiling included
LOAD_TIMEOUT_S = 900.0
CLOSING_S, CLOSING_SHARE = 5.0, 0.1  # of the budget, the smaller one: for the last comparison and the end of the worker
MAX_DEATHS = 20  # of workers in one search: after that, something else is wrong


@dataclass(frozen=True)
class Outcome:
    """The result of a search. `num_bad`: candidates that could not be used. `is_complete`: within its budget."""

    path: Path
    num_tried: int
    num_bad: int
    is_complete: bool


def tune(
    job: Job, budget_s: float, report: Callable[[Event], None], work: Callable[..., None] | None = None
) -> Outcome:
    """Search in workers until everything is searched or the budget is spent. Results so far are saved.

    report: called with every event. Raises DeviceError if the model does not load or workers keep dying."""
    end_s = time.monotonic() + budget_s
    tally = _Tally()
    job = replace(job, end_s=end_s - min(CLOSING_S, CLOSING_SHARE * budget_s))
    while not tally.is_done and not tally.is_out_of_time and time.monotonic() < end_s:
        tally.begun = None
        _watch_worker(job, end_s, tally, report, work or run_worker)
        if tally.begun is not None and not tally.is_out_of_time:
            tally.deaths += 1
            _write_bad(Path(tally.path), tally.begun)
            report(replace(tally.begun, what="end", message="it crashed the process"))
            if tally.deaths >= MAX_DEATHS:
                raise DeviceError(
                    f"{tally.deaths} workers died in one search, the limit, the last while trying {tally.begun.name}: "
                    "check the device with `tinyvllm doctor`; results so far are kept"
                )
        elif not tally.is_done and not tally.is_out_of_time:
            raise DeviceError(f"the tuning worker could not start: {tally.message or 'it ended without a message'}")
    return Outcome(Path(tally.path), tally.tried, tally.bad + tally.deaths, tally.is_done)


@dataclass
class _Tally:
    path: str = ""
    begun: Event | None = None
    tried: int = 0
    bad: int = 0
    deaths: int = 0
    is_done: bool = False
    is_out_of_time: bool = False
    message: str = ""


def _watch_worker(
    job: Job, end_s: float, tally: _Tally, report: Callable[[Event], None], work: Callable[..., None]
) -> None:
    """Run one worker until it ends, or until the budget does."""
    context = multiprocessing.get_context("spawn")  # a device does not survive a fork
    here, there = context.Pipe()
    process = context.Process(target=work, args=(job, there))  # no daemon: it starts processes that compile
    process.start()
    there.close()
    try:
        while not tally.is_done:
            patience_s = LOAD_TIMEOUT_S if tally.begun is None else TRIAL_TIMEOUT_S
            if not here.poll(max(0.0, min(patience_s, end_s - time.monotonic()))):
                tally.is_out_of_time = time.monotonic() >= end_s
                return
            try:
                event = here.recv()
            except EOFError:
                return
            _count(tally, event)
            report(event)
            if event.what in ("failed", "stopped"):
                return
    finally:
        process.kill()
        process.join()
        here.close()


def _count(tally: _Tally, event: Event) -> None:
    if event.what == "ready":
        tally.path = event.path
    elif event.what == "begin":
        tally.begun = event
        tally.tried += 1
    elif event.what == "end":
        tally.begun = None
        tally.bad += event.seconds is None
    elif event.what == "failed":
        tally.message = event.message
    tally.is_out_of_time = event.what == "stopped"
    tally.is_done = event.what == "done"


def _write_bad(path: Path, trial: Event) -> None:
    choices = load_choices(path)
    choices.bad.add(trial.name)
    choices.save()
