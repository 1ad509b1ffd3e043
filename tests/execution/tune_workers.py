"""Workers of a search that play a device: importable, because they run in processes of their own."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection

from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.ops.kernel.tuning import load_choices

NUM_CANDIDATES = 4
FATAL = "kernel {'tiles': 2}"


def _search(job: Job, pipe: Connection, fatal: object) -> None:
    """Go through candidates that were not bad before. `job.kind` is the path of the choices."""
    from pathlib import Path

    choices = load_choices(Path(job.kind))
    pipe.send(Event("ready", path=job.kind, buckets=("decode 1",)))
    for number in range(NUM_CANDIDATES):
        name = f"kernel {{'tiles': {number}}}"
        if name in choices.bad:
            continue
        pipe.send(Event("begin", bucket="decode 1", kernel="kernel", name=name))
        if name == FATAL and callable(fatal):
            fatal()
        end = Event("end", bucket="decode 1", kernel="kernel", name=name, seconds=1.0 + number / 2, before_s=1.0)
        pipe.send(replace(end, chosen=(("tiles", number),)) if number else end)
    pipe.send(Event("done"))


def well(job: Job, pipe: Connection) -> None:
    _search(job, pipe, None)


def dying(job: Job, pipe: Connection) -> None:
    _search(job, pipe, lambda: os._exit(139))


def hanging(job: Job, pipe: Connection) -> None:
    _search(job, pipe, lambda: time.sleep(600))


def failing(job: Job, pipe: Connection) -> None:
    pipe.send(Event("failed", message="ModelError: there is no such model"))


def silent(job: Job, pipe: Connection) -> None:
    os._exit(1)
