"""Tuning from outside: a worker process searches, and dies of a bad candidate in the parent's stead.

The worker says what it is about to try before it tries. When it ends or hangs in the middle, the parent writes that
candidate down as bad and starts another, which goes on where the first was.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinyvllm.config import EngineConfig, ModelConfig, ModelFiles
from tinyvllm.errors import DeviceError

TRIAL_TIMEOUT_S = 120.0  # for one candidate, compiling included
LOAD_TIMEOUT_S = 900.0
LEAST_GAIN = 0.01  # of a step's time: a candidate that gains less is noise
MAX_DEATHS = 20  # of workers in one search: then something else is wrong


@dataclass(frozen=True)
class Job:
    """What to tune: a model's files, or a shape with random weights of `kind`. `buckets`: names; (): all."""

    config: EngineConfig
    files: ModelFiles | None = None
    shape: ModelConfig | None = None
    kind: str = ""
    buckets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """What a worker says. `what`: ready (bucket names in `buckets`), begin, end, saved, done or failed."""

    what: str
    path: str = ""
    buckets: tuple[str, ...] = ()
    bucket: str = ""
    kernel: str = ""
    name: str = ""
    chosen: tuple[tuple[str, int], ...] = ()
    seconds: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a search did. `num_bad`: candidates that could not be used. `is_complete`: within its budget."""

    path: Path
    num_tried: int
    num_bad: int
    is_complete: bool


def tune(
    job: Job, budget_s: float, report: Callable[[Event], None], work: Callable[..., None] | None = None
) -> Outcome:
    """Search in workers until all is done or the budget is spent; what was found by then is kept.

    report: called with every event. Raises DeviceError when the model does not load, or workers keep dying."""
    end_s = time.monotonic() + budget_s
    tally = _Tally()
    while not tally.is_done and time.monotonic() < end_s:
        tally.begun = None
        _watch_worker(job, end_s, tally, report, work or run_worker)
        if tally.begun is not None and not tally.is_out_of_time:
            tally.deaths += 1
            _write_bad(Path(tally.path), tally.begun)
            report(replace(tally.begun, what="end", message="the process died of it"))
            if tally.deaths >= MAX_DEATHS:
                raise DeviceError(f"{tally.deaths} workers have died in one search, the last of {tally.begun.name}")
        elif not tally.is_done and not tally.is_out_of_time:
            raise DeviceError(f"the tuning worker could not start: {tally.message or 'it ended without a word'}")
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
    """One worker's life, or what the budget leaves of it."""
    context = multiprocessing.get_context("spawn")  # a device does not survive a fork
    here, there = context.Pipe()
    process = context.Process(target=work, args=(job, there), daemon=True)
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
            if event.what == "failed":
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
    tally.is_done = event.what == "done"


def _write_bad(path: Path, trial: Event) -> None:
    from tinyvllm.ops.kernel.tuning import load_choices  # without opening the device

    choices = load_choices(path)
    choices.bad.add(trial.name)
    choices.save()


def run_worker(job: Job, pipe: Connection) -> None:
    """The worker: load, search bucket by bucket, save after each."""
    try:
        _search_all(job, pipe)
    except Exception as error:
        pipe.send(Event("failed", message=f"{type(error).__name__}: {error}"))
    pipe.close()


def _search_all(job: Job, pipe: Connection) -> None:
    from tinyvllm.execution.runner import load_random_runner, load_runner
    from tinyvllm.execution.tune import Trial, search
    from tinyvllm.ops.kernel import tuning

    if job.files is not None:
        runner = load_runner(job.files, job.config)
    else:
        assert job.shape is not None
        runner = load_random_runner(job.shape, job.kind, job.config)
    buckets = [bucket for bucket in runner.buckets if not job.buckets or bucket.name in job.buckets]
    choices = tuning.current
    pipe.send(Event("ready", path=str(choices.path), buckets=tuple(bucket.name for bucket in buckets)))

    def event_of(what: str, trial: Trial) -> Event:
        fields: dict[str, Any] = vars(trial)
        return Event(what, **fields)

    for bucket in buckets:
        if runner.tuning_name(bucket) not in choices.searched:
            for trial in search(runner, bucket, choices.bad, lambda trial: pipe.send(event_of("begin", trial))):
                pipe.send(event_of("end", trial))
                choices.save()
        choices.save()
        pipe.send(Event("saved", bucket=bucket.name))
    pipe.send(Event("done"))
