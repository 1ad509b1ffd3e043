"""The process that searches. It announces each candidate first, so that a crash can be blamed on the candidate."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

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
    except Exception as error:
        pipe.send(Event("failed", message=f"{type(error).__name__}: {error}"))
    pipe.close()


def _search_all(job: Job, pipe: Connection) -> None:
    runner = _load(job, lambda stage, done, total: pipe.send(Event("stage", bucket=stage, place=done, total=total)))
    buckets = [bucket for bucket in runner.buckets if not job.buckets or bucket.name in job.buckets]
    choices = tuning.current
    pipe.send(Event("ready", path=str(choices.path), buckets=tuple(bucket.name for bucket in buckets)))
    for done, bucket in enumerate(buckets):
        if runner.tuning_name(bucket) not in choices.searched:
            now_s = time.monotonic()
            end_s = now_s + (job.end_s - now_s) / (len(buckets) - done)  # an equal share; what is left goes to the next
            for trial in search(runner, bucket, lambda trial: pipe.send(_event_of("begin", trial)), end_s):
                pipe.send(_event_of("end", trial))
                choices.save()
        choices.save()
        pipe.send(Event("saved", bucket=bucket.name))
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
