"""The search for a bucket's fastest kernels: real steps on the real weights, one kernel at a time.

A candidate is timed where it will run, within the recorded step, since caches and launch gaps matter as much as the
kernel. A candidate that changes a token is rejected. The search runs in a process of its own (`tune_worker.py`), since
a bad kernel may crash it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyvllm.config import SamplingParams
from tinyvllm.execution.buckets import Bucket, lengths_that_fill
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.tuning import Chosen, Tunable, candidates, combinations
from tinyvllm.scheduling.block_manager import fixed_states, fixed_tables
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

NUM_WARM, NUM_TIMED = 3, 20
LEAST_GAIN = 0.01  # of a step's time: a smaller gain is noise
MOST_CONTEXT = 512  # tokens: the attention of a longer context would hide what a product gains
FILL_TOKEN_SEED = 11
PREDICTION_ERROR = 0.08  # of cost.py's times, of candidates of one kernel compared with each other (docs/KERNELS.md)
MOST_TRIED = 24  # candidates of a kernel
LOOKAHEAD = 8  # candidates that are compiled in advance


@dataclass(frozen=True)
class Trial:
    """A candidate about to be tried, or its result. `name` is the same in every process."""

    bucket: str
    kernel: str
    chosen: Chosen
    name: str
    seconds: float | None = None  # of a step with this candidate


def search(runner: ModelRunner, bucket: Bucket, bad: set[str], begin: Callable[[Trial], None]) -> Iterator[Trial]:
    """Try candidates of every tunable kernel of a bucket, the most promising ones first, and keep the best in
    `tuning.current`. `begin` is called before each, so that a watcher knows which one ran when the process died. Yields
    every result."""
    plan = make_plan(runner, bucket)
    with tuning.current.watching() as asked:
        best_s, expected = time_step(runner, bucket, plan)
    specs = dict(asked)
    for key, spec in specs.items():
        yield Trial(bucket.name, describe(spec), (), key, best_s)
    queue = in_order(specs, tuning.current.num_asked, best_s)
    trials = [Trial(bucket.name, describe(specs[key]), chosen, f"{key} {dict(chosen)}") for key, chosen in queue]
    left = [pair for pair in zip(queue, trials, strict=True) if pair[1].name not in bad]
    foresight = _Foresight(runner, bucket, [pair[0] for pair in left])
    for (key, chosen), trial in left:
        best = tuning.current.chosen.get(key, ())
        if chosen == best:
            continue
        foresight.look_ahead_of(key, chosen)
        begin(trial)
        seconds = _try(runner, bucket, plan, key, chosen, expected)
        yield replace(trial, seconds=seconds)
        if seconds is None:
            bad.add(trial.name)
        elif seconds < best_s * (1 - LEAST_GAIN):
            # the machine may have been busy before: the gain must hold against a new measurement of the best
            best_s = min(best_s, time_step(runner, bucket, plan)[0])
            yield Trial(bucket.name, trial.kernel, best, f"{key} {dict(best)}", best_s)
            if seconds < best_s * (1 - LEAST_GAIN):
                best_s = seconds
                tuning.current.chosen[key] = chosen
    for key in specs:
        tuning.current.chosen.setdefault(key, ())
    tuning.current.searched.add(runner.tuning_name(bucket))
    runner.captures.remake(bucket)


def in_order(specs: Mapping[str, Tunable], counts: Mapping[str, int], step_s: float) -> list[tuple[str, Chosen]]:
    """(kernel's key, values) of all kernels' candidates, by the time that each can be expected to gain.

    Kernels with a predicted time have combinations of all knobs. The gain is the kernel's time in the step times the
    expected improvement (Mockus 1975) of a candidate whose time is off its prediction by a normal error of
    PREDICTION_ERROR. Other kernels have one knob turned at a time, near values first."""
    ranked: list[tuple[float, str, Chosen]] = []
    for key, spec in specs.items():
        predicted_s = spec.predicted_s
        if predicted_s is None:
            share_s, others = step_s / len(specs), [*candidates(spec)][1:]
            ratios = [1 + LEAST_GAIN * place for place in range(len(others))]
        else:
            share_s, others = predicted_s * counts[key], combinations(spec)[1 : 1 + MOST_TRIED]
            ratios = [(other.predicted_s or predicted_s) / predicted_s for other in others]
        ranked += [
            (share_s * expected_gain(ratio), key, other.chosen) for ratio, other in zip(ratios, others, strict=True)
        ]
    return [(key, chosen) for _, key, chosen in sorted(ranked, key=lambda item: item[0], reverse=True)]


def expected_gain(ratio: float) -> float:
    """The expected share of its time that a kernel gains from a candidate that is predicted to take `ratio` as long."""
    z = (1 - ratio) / PREDICTION_ERROR
    density, below = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), (1 + math.erf(z / math.sqrt(2))) / 2
    return PREDICTION_ERROR * (density + z * below)


class _Foresight:
    """Compiles the next candidates' kernels in other processes while one is timed. On a CPU, whose cores run the steps,
    it does nothing."""

    def __init__(self, runner: ModelRunner, bucket: Bucket, queue: Sequence[tuple[str, Chosen]]) -> None:
        self._runner, self._bucket, self._queue = runner, bucket, queue
        self._next = 0 if not runner.backend.device.is_cpu else len(queue)

    def look_ahead_of(self, key: str, chosen: Chosen) -> None:
        """Begin with what comes after this candidate, and with itself."""
        end = min(len(self._queue), self._queue.index((key, chosen)) + 1 + LOOKAHEAD)
        for ahead in self._queue[self._next : end]:
            with contextlib.suppress(Exception), _choice(*ahead):  # fails again when it is tried
                self._runner.captures.foresee(self._bucket)
        self._next = max(self._next, end)


@contextlib.contextmanager
def _choice(key: str, chosen: Chosen) -> Iterator[None]:
    """A kernel's values for a time."""
    before = tuning.current.chosen.get(key)
    tuning.current.chosen[key] = chosen
    try:
        yield
    finally:
        if before is None:
            del tuning.current.chosen[key]
        else:
            tuning.current.chosen[key] = before


def _try(
    runner: ModelRunner, bucket: Bucket, plan: StepPlan, key: str, chosen: Chosen, expected: np.ndarray
) -> float | None:
    """A step's seconds with a candidate; None if it cannot be built or gives other tokens."""
    try:
        with _choice(key, chosen):
            seconds, tokens = time_step(runner, bucket, plan)
    except Exception:
        return None
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
    """A full step: a decode bucket's sequences, or a verify bucket's only one, at half the longest context for which
    the pool has room; or prompts that fill a token bucket."""
    capacity, rng = runner.capacity, np.random.default_rng(FILL_TOKEN_SEED)
    if not bucket.is_for_prompts:
        num_seqs = bucket.num_seqs if bucket.is_decode else 1
        room = (capacity.num_blocks - 1) // num_seqs * capacity.block_size - bucket.num_drafts
        lengths = [max(1, min(capacity.max_model_len // 2, room // 2, MOST_CONTEXT))] * num_seqs
    else:
        lengths = lengths_that_fill(bucket, min(capacity.max_model_len, capacity.num_tokens))
    num_drafts, vocab_size = bucket.num_drafts, runner.model_config.vocab_size
    tables = fixed_tables(capacity.groups, [-(-(length + num_drafts) // capacity.block_size) for length in lengths])
    states, entries = fixed_states(capacity, len(lengths)), []
    for index, length in enumerate(lengths):
        prompt, drafts = (rng.integers(0, vocab_size, count).tolist() for count in (length, num_drafts))
        params, state = SamplingParams(temperature=0.0), states[index]
        request = Request(f"tune-{index}", prompt, params, tables=tables[index], state=state)
        start = 0 if bucket.is_for_prompts else len(prompt) - 1
        entries.append(Scheduled(request, start, len(prompt) + num_drafts - start, tuple(drafts)))
    return StepPlan(tuple(entries))


def describe(spec: Tunable) -> str:
    """The name of a spec's kernel in tables."""
    name = str(getattr(spec, "name", "")) or type(spec).__name__.removesuffix("Spec").lower()
    size = [str(getattr(spec, field)) for field in ("num_tokens", "num_rows", "num_cols") if hasattr(spec, field)]
    return f"{name} {'x'.join(size)}".strip()
