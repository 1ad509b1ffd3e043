"""The process that searches. It announces each candidate before it traces it and before it runs it, so that a crash can
be blamed on the candidate."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.buckets import named
from tinyvllm.execution.captures import Progress
from tinyvllm.execution.runner import ModelRunner, load_random_runner, load_runner
from tinyvllm.execution.tune import Trial, search
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.ops.kernel import tuning
from tinyvllm.processes import die_with_parent


def run_worker(job: Job, pipe: Connection) -> None:
    """Load, search bucket by bucket, save after each."""
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    try:
        _search_all(job, pipe)
    except TinyvllmError as error:
        pipe.send(Event("refused", message=str(error)))
    except Exception as error:
        pipe.send(Event("failed", message=f"{type(error).__name__}: {error}"))
    pipe.close()


def _search_all(job: Job, pipe: Connection) -> None:
    runner = _load(job, lambda stage, done, total: pipe.send(Event("stage", bucket=stage, place=done, total=total)))
    buckets = named(job.buckets, runner.buckets) if job.buckets else runner.buckets
    choices = tuning.current
    if job.is_again:
        choices.forget(map(runner.tuning_name, buckets))

    def announce(what: str) -> Callable[[Trial], None]:
        return lambda trial: pipe.send(_event_of(what, trial))

    pipe.send(Event("ready", path=str(choices.path), buckets=tuple(bucket.name for bucket in buckets)))
    for done, bucket in enumerate(buckets):
        if runner.tuning_name(bucket) in choices.searched:
            pipe.send(Event("saved", bucket=bucket.name, message="searched before"))
            continue
        pipe.send(Event("bucket", bucket=bucket.name))
        num_left = sum(runner.tuning_name(later) not in choices.searched for later in buckets[done:])
        now_s = time.monotonic()
        end_s = now_s + (job.end_s - now_s) / num_left  # an equal share; what is left goes to the next
        num_results = 0
        for trial in search(runner, bucket, announce("begin"), end_s, announce("prepare")):
            pipe.send(_event_of("end", trial))
            choices.save()
            num_results += 1
        choices.save()
        pipe.send(Event("saved", bucket=bucket.name, message="" if num_results else "nothing to tune"))
    is_complete = all(runner.tuning_name(bucket) in choices.searched for bucket in buckets)
    pipe.send(Event("done" if is_complete else "stopped"))


def _load(job: Job, progress: Progress) -> ModelRunner:
    if job.files is not None:
        return load_runner(job.files, job.config, progress)
    assert job.shape is not None, f"{job} has neither files nor a shape"
    return load_random_runner(job.shape, job.kind, job.config, progress)


def _event_of(what: str, trial: Trial) -> Event:
    fields: dict[str, Any] = vars(trial)
    return Event(what, **fields)
