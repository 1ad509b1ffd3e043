"""Workers of a search that play a device: importable, because they run in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinyvllm.config import CACHE_DIR_VARIABLE
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.ops.kernel.tuning import load_choices

NUM_CANDIDATES = 4
FATAL = "kernel {'tiles': 2}"
HANGS = "hangs"  # the name of a file


def _search(job: Job, pipe: Connection, fatal: object, when: str = "begin") -> None:
    """Go through candidates that were not bad before. `job.kind` is the path of the choices, if it has one. `fatal` is
    called after the event `when` of FATAL."""
    path = job.kind or str(Path(os.environ[CACHE_DIR_VARIABLE], "choices.json"))
    choices = load_choices(Path(path))
    pipe.send(Event("ready", path=path, buckets=("decode 1",)))
    pipe.send(Event("bucket", bucket="decode 1"))
    for number in range(NUM_CANDIDATES):
        name = f"kernel {{'tiles': {number}}}"
        if name in choices.bad:
            continue
        for what in ("prepare", "begin"):
            pipe.send(Event(what, bucket="decode 1", kernel="kernel", name=name))
            if name == FATAL and what == when and callable(fatal):
                fatal()
        end = Event("end", bucket="decode 1", kernel="kernel", name=name, seconds=1.0 + number / 2, before_s=1.0)
        pipe.send(replace(end, chosen=(("tiles", number),)) if number else end)
    pipe.send(Event("done"))


def _hang() -> None:
    """And say so, so that a test need not wait to find out."""
    Path(os.environ[CACHE_DIR_VARIABLE], HANGS).touch()
    time.sleep(600)


def well(job: Job, pipe: Connection) -> None:
    _search(job, pipe, None)


def dying(job: Job, pipe: Connection) -> None:
    _search(job, pipe, lambda: os._exit(139))


def hanging(job: Job, pipe: Connection) -> None:
    _search(job, pipe, _hang)


def saying_why(job: Job, pipe: Connection) -> None:
    """A model without knobs."""
    pipe.send(Event("ready", path=job.kind, buckets=("decode 1",)))
    pipe.send(Event("bucket", bucket="decode 1"))
    pipe.send(Event("saved", bucket="decode 1", message="nothing to tune"))
    pipe.send(Event("done"))


def interrupted(job: Job, pipe: Connection) -> None:
    """By the Ctrl-C that the terminal sends to all of its processes."""
    os.kill(os.getpid(), signal.SIGINT)
    _search(job, pipe, None)


def slow(job: Job, pipe: Connection) -> None:
    """It has loaded the model when the budget ends."""
    pipe.send(Event("ready", path=os.environ[CACHE_DIR_VARIABLE], buckets=("decode 1",)))
    pipe.send(Event("stopped"))


def out_of_time(job: Job, pipe: Connection) -> None:
    pipe.send(Event("stopped"))


def dying_early(job: Job, pipe: Connection) -> None:
    """While it traces or compiles the candidate."""
    _search(job, pipe, lambda: os._exit(139), "prepare")


def hanging_early(job: Job, pipe: Connection) -> None:
    _search(job, pipe, _hang, "prepare")


def dying_real(job: Job, pipe: Connection) -> None:
    """The real worker, which dies while it traces one row per pass, unless one has died."""
    from tinyvllm.execution.captures import Captures  # here: the others need not wait for the engine
    from tinyvllm.execution.tune_worker import run_worker
    from tinyvllm.ops.kernel import tuning

    begin_again = Captures.begin_again

    def begin(self: Captures, bucket: Any) -> Any:
        if not tuning.current.bad and (("rows_per_pass", 1),) in tuning.current.chosen.values():
            os._exit(139)
        return begin_again(self, bucket)

    Captures.begin_again = begin  # type: ignore[method-assign]
    run_worker(job, pipe)


def failing(job: Job, pipe: Connection) -> None:
    pipe.send(Event("failed", message="ModelError: there is no such model"))


def refusing(job: Job, pipe: Connection) -> None:
    pipe.send(Event("refused", message="no step is called 'decode 3'"))


def silent(job: Job, pipe: Connection) -> None:
    os._exit(3)


def dying_in_a_step(job: Job, pipe: Connection) -> None:
    """Of the bucket's own step, before there is a candidate."""
    pipe.send(Event("ready", path=job.kind, buckets=("decode 1",)))
    pipe.send(Event("bucket", bucket="decode 1"))
    os._exit(3)
