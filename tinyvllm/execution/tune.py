"""The search for a bucket's fastest kernels: real steps on the real weights, one kernel at a time.

A candidate is timed where it will run, within the recorded step, since caches and launch gaps matter as much as the
kernel. A candidate that changes a token is rejected. The search runs in a process of its own (`tune_worker.py`), since
a bad kernel may crash it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tinyvllm.config import SamplingParams
from tinyvllm.execution.buckets import Bucket, lengths_that_fill
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.tuning import Chosen, Tunable, candidates
from tinyvllm.scheduling.block_manager import fixed_states, fixed_tables
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

NUM_WARM, NUM_TIMED = 3, 20
LEAST_GAIN = 0.01  # of a step's time: a smaller gain is noise
MOST_CONTEXT = 512  # tokens: the attention of a longer context would hide what a product gains
FILL_TOKEN_SEED = 11


@dataclass(frozen=True)
class Trial:
    """A candidate about to be tried, or its result. `name` is the same in every process."""

    bucket: str
    kernel: str
    chosen: Chosen
    name: str
    seconds: float | None = None  # of a step with this candidate


def search(runner: ModelRunner, bucket: Bucket, bad: set[str], begin: Callable[[Trial], None]) -> Iterator[Trial]:
    """Try the candidates of every tunable kernel of a bucket, and keep the best in `tuning.current`. `begin` is called
    before each, so that a watcher knows which one ran when the process died. Yields every result."""
    plan = make_plan(runner, bucket)
    with tuning.current.watching() as asked:
        best_s, expected = time_step(runner, bucket, plan)
    for key, spec in list(asked.items()):
        first, *others = candidates(spec)
        yield Trial(bucket.name, describe(first), (), key, best_s)
        best = tuning.current.chosen.get(key, ())
        for candidate in others:
            trial = Trial(bucket.name, describe(spec), candidate.chosen, f"{key} {dict(candidate.chosen)}")
            if trial.name in bad or candidate.chosen == best:
                continue
            begin(trial)
            seconds = _try(runner, bucket, plan, key, candidate.chosen, expected)
            yield Trial(trial.bucket, trial.kernel, trial.chosen, trial.name, seconds)
            if seconds is None:
                bad.add(trial.name)
            elif seconds < best_s * (1 - LEAST_GAIN):
                # the machine may have been busy before: the gain must hold against a new measurement of the best
                best_s = min(best_s, time_step(runner, bucket, plan)[0])
                yield Trial(bucket.name, trial.kernel, best, f"{key} {dict(best)}", best_s)
                if seconds < best_s * (1 - LEAST_GAIN):
                    best, best_s = candidate.chosen, seconds
                    tuning.current.chosen[key] = best
        tuning.current.chosen[key] = best
    tuning.current.searched.add(runner.tuning_name(bucket))
    runner.captures.remake(bucket)


def _try(
    runner: ModelRunner, bucket: Bucket, plan: StepPlan, key: str, chosen: Chosen, expected: np.ndarray
) -> float | None:
    """A step's seconds with a candidate; None if it cannot be built or gives other tokens."""
    before = tuning.current.chosen.get(key)
    tuning.current.chosen[key] = chosen
    try:
        seconds, tokens = time_step(runner, bucket, plan)
    except Exception:
        return None
    finally:
        if before is None:
            del tuning.current.chosen[key]
        else:
            tuning.current.chosen[key] = before
    return seconds if np.array_equal(tokens, expected) else None


def time_step(runner: ModelRunner, bucket: Bucket, plan: StepPlan) -> tuple[float, np.ndarray]:
    """The median seconds of a bucket's step with the current choices, and its tokens."""
    runner.captures.remake(bucket)
    times: list[float] = []
    for repeat in range(NUM_WARM + NUM_TIMED):
        start = time.perf_counter()
        output = runner.execute(plan)
        if repeat >= NUM_WARM:
            times.append(time.perf_counter() - start)
    return float(np.median(times)), np.array(output.token_ids)


def make_plan(runner: ModelRunner, bucket: Bucket) -> StepPlan:
    """A full step: a decode bucket's sequences at half the longest context for which the pool has room, or prompts that
    fill a token bucket."""
    capacity, rng = runner.capacity, np.random.default_rng(FILL_TOKEN_SEED)
    if bucket.is_decode:
        room = (capacity.num_blocks - 1) // bucket.num_seqs * capacity.block_size
        lengths = [max(1, min(capacity.max_model_len // 2, room // 2, MOST_CONTEXT))] * bucket.num_seqs
    else:
        lengths = lengths_that_fill(bucket, min(capacity.max_model_len, capacity.num_tokens))
    tables = fixed_tables(capacity.groups, [-(-length // capacity.block_size) for length in lengths])
    states, entries = fixed_states(capacity, len(lengths)), []
    for index, length in enumerate(lengths):
        prompt = rng.integers(0, runner.model_config.vocab_size, length).tolist()
        params, state = SamplingParams(temperature=0.0), states[index]
        request = Request(f"tune-{index}", prompt, params, tables=tables[index], state=state)
        start = len(prompt) - 1 if bucket.is_decode else 0
        entries.append(Scheduled(request, start, len(prompt) - start))
    return StepPlan(tuple(entries))


def describe(spec: Tunable) -> str:
    """The name of a spec's kernel in tables."""
    name = str(getattr(spec, "name", "")) or type(spec).__name__.removesuffix("Spec").lower()
    size = [str(getattr(spec, field)) for field in ("num_tokens", "num_rows", "num_cols") if hasattr(spec, field)]
    return f"{name} {'x'.join(size)}".strip()
