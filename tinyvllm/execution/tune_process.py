"""Tuning from outside: a worker process searches, so that a bad candidate crashes the worker and not the parent.

The worker announces each candidate before it prepares it (traces and compiles it) and before it tries it. If it dies or
hangs, the parent saves that candidate as bad and starts another worker, which continues where the first one stopped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path

from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.execution.tune_worker import run_worker
from tinyvllm.ops.kernel.tuning import load_choices

TRIAL_TIMEOUT_S = 120.0  # for preparing one candidate, and for trying it
LOAD_TIMEOUT_S = 900.0
END_S = 5.0  # for a worker that has closed its pipe
CLOSING_S, CLOSING_SHARE = 5.0, 0.1  # of the budget, the smaller one: for the last comparison and the end of the worker
MAX_DEATHS = 20  # of workers in one search: after that, something else is wrong


@dataclass(frozen=True)
class Outcome:
    """The result of a search. `num_bad`: candidates that could not be used. `is_complete`: within its budget."""

    path: Path | None  # None: the budget ended before the model was loaded
    num_tried: int
    num_bad: int
    is_complete: bool


def tune(
    job: Job, budget_s: float, report: Callable[[Event], None], work: Callable[..., None] | None = None
) -> Outcome:
    """Search in workers until everything is searched or the budget is spent. Results so far are saved.

    report: called with every event. Raises TinyvllmError if there are no such steps or no such model; DeviceError if
    a worker ends while it works on no candidate (it loads the model, or runs a step as it was), or workers keep dying.
    """
    end_s = time.monotonic() + budget_s
    tally = _Tally()
    job = replace(job, end_s=end_s - min(CLOSING_S, CLOSING_SHARE * budget_s))
    while not tally.is_done and not tally.is_out_of_time and time.monotonic() < end_s:
        tally.begun, tally.bucket, tally.refusal = None, "", ""
        _watch_worker(job, end_s, tally, report, work or run_worker)
        job = replace(job, is_again=job.is_again and not tally.path)  # the first one that has loaded has forgotten
        if tally.begun is not None and not tally.is_out_of_time:
            tally.deaths += 1
            tally.tried += tally.begun.what == "prepare"
            _write_bad(Path(tally.path), tally.begun)
            report(replace(tally.begun, what="end", message=f"the process {tally.ending} {tally.where}"))
            if tally.deaths >= MAX_DEATHS:
                raise DeviceError(
                    f"{tally.deaths} workers died in one search, the limit, the last {tally.where}, "
                    f"{tally.begun.name}: check the device with `tinyvllm doctor`; results so far are kept"
                )
        elif tally.refusal:
            raise TinyvllmError(tally.refusal)
        elif not tally.is_done and not tally.is_out_of_time:
            raise DeviceError(f"the search's process {tally.ending} {tally.where}{_kept(tally)}")
    path = Path(tally.path) if tally.path else None
    return Outcome(path, tally.tried, tally.bad + tally.deaths, tally.is_done)


def _kept(tally: _Tally) -> str:
    return f"; results so far are in {tally.path}" if tally.tried else ""


@dataclass
class _Tally:
    path: str = ""
    begun: Event | None = None
    tried: int = 0
    bad: int = 0
    deaths: int = 0
    is_done: bool = False
    is_out_of_time: bool = False
    bucket: str = ""  # whose search has begun
    ending: str = ""  # of the last worker
    refusal: str = ""  # why no worker can do the job

    @property
    def where(self) -> str:
        """What the worker was doing."""
        if self.begun is not None:
            doing = "preparing" if self.begun.what == "prepare" else "timing"
            return f"while {doing} a candidate of {self.begun.kernel} in {self.begun.bucket}"
        if self.bucket:
            return f"in {self.bucket}, while no candidate was tried"
        return "after loading the model, before any step" if self.path else "while loading the model"


def _watch_worker(
    job: Job, end_s: float, tally: _Tally, report: Callable[[Event], None], work: Callable[..., None]
) -> None:
    """Run one worker until it ends, or until the budget does."""
    context = multiprocessing.get_context("spawn")  # a device does not survive a fork
    here, there = context.Pipe()
    process = context.Process(target=work, args=(job, there))  # no daemon: it starts processes that compile
    with _without_interrupts():
        process.start()
    there.close()
    try:
        while not tally.is_done:
            patience_s = LOAD_TIMEOUT_S if tally.begun is None else TRIAL_TIMEOUT_S
            # the process as well: those that it started may hold its end of the pipe when it is dead
            ready = wait([here, process.sentinel], max(0.0, min(patience_s, end_s - time.monotonic())))
            if not ready:
                tally.is_out_of_time = time.monotonic() >= end_s
                tally.ending = f"gave no answer for {patience_s:g} s"
                return
            try:
                event = here.recv() if here.poll() else None
            except EOFError:
                event = None
            if event is None:
                process.join(END_S)
                tally.ending = f"ended with exit code {process.exitcode}"
                return
            _count(tally, event)
            report(event)
            if event.what in ("refused", "failed", "stopped"):
                return
    finally:
        process.kill()
        process.join()
        here.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started here not hear the Ctrl-C of the terminal, which all get: this one ends them."""
    resource_tracker.ensure_running()  # else it is started by the first process, and then unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _count(tally: _Tally, event: Event) -> None:
    if event.what == "ready":
        tally.path = event.path
    elif event.what == "bucket":
        tally.bucket = event.bucket
    elif event.what in ("prepare", "begin"):
        tally.begun = event
        tally.tried += event.what == "begin"
    elif event.what == "end":
        tally.begun = None
        tally.bad += event.seconds is None
    elif event.what == "refused":
        tally.ending, tally.refusal = f"failed ({event.message})", event.message
    elif event.what == "failed":
        tally.ending = f"failed ({event.message})"
    elif event.what == "saved":
        tally.begun, tally.bucket = None, ""
    tally.is_out_of_time = event.what == "stopped"
    tally.is_done = event.what == "done"


def _write_bad(path: Path, trial: Event) -> None:
    choices = load_choices(path)
    choices.bad.add(trial.name)
    choices.save()
