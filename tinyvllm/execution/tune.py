"""The search for a bucket's fastest kernels: real steps on the real weights, one kernel at a time.

A candidate is timed where it will run, within the recorded step, since caches and launch gaps matter as much as the
kernel. It takes turns with the step that it is compared with, since clocks and the power limit change by the second.
Meanwhile other processes trace and compile the steps of the next candidates. A candidate that changes what the step
computes is rejected. The search runs in a process of its own (`tune_worker.py`), since a bad kernel may crash it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyvllm.config import SamplingParams
from tinyvllm.device.compiling import num_workers
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.execution.buckets import Bucket, least_context, lengths_that_fill
from tinyvllm.execution.captures import POLL_S
from tinyvllm.execution.graphs import Graph, PendingGraph
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.tuning import Chosen, Tunable, candidates, combinations
from tinyvllm.scheduling.block_manager import fixed_states, fixed_tables
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan
from tinyvllm.scheduling.request import Request, TokenLogprobs

TURN_S, PROMPT_TURN_S = 6e-3, 50e-3  # a turn's least time; a prompt's step is bound by power, to which clocks adapt
TURNS_S = 0.5  # all turns together, about
LEAST_TURNS, MOST_TURNS = 5, 11
LEAST_GAIN, LEAST_WINS = 0.005, 0.8  # of a step's time, and of the turns: a gain that is smaller or seldom is noise
MOST_CONTEXT = 512  # tokens: the attention of a longer context would hide what a product gains
TOKEN_SEED, POOL_SEED = 11, 13
NEAR, NUM_NEAR = 0.05, 5  # log-probabilities: tokens this near each other may change places, if among the likeliest
PREDICTION_ERROR = 0.08  # of cost.py's times, of candidates of one kernel compared with each other (docs/KERNELS.md)
MOST_TRIED = 24  # candidates of a kernel
WHOLE_STEP = "whole step"  # the name of the last comparison, of all that was kept


@dataclass(frozen=True)
class Trial:
    """A candidate about to be tried, or its result. `name` is the same in every process. `place` of `total`: among the
    bucket's candidates."""

    bucket: str
    kernel: str
    chosen: Chosen
    name: str
    place: int = 0
    total: int = 0
    seconds: float | None = None  # of a step with this candidate
    before_s: float = 0.0  # of the step that it took turns with
    is_kept: bool = False


def search(
    runner: ModelRunner,
    bucket: Bucket,
    begin: Callable[[Trial], None],
    end_s: float = math.inf,
    prepare: Callable[[Trial], None] = lambda trial: None,
) -> Iterator[Trial]:
    """Try candidates of every tunable kernel of a bucket, the most promising ones first, and keep the best in
    `tuning.current`. Yields every result, and at last what everything that was kept gains together. Ends early at
    `end_s` (time.monotonic).

    begin, prepare: called before a candidate runs, and before this process traces or compiles it or waits for other
    processes that do, so that a watcher knows which one it was if the process dies or hangs."""
    steps, choices = _Steps(runner, bucket), tuning.current
    with choices.watching() as asked:
        first = steps.first()
    specs, first_s = dict(asked), steps.time(first)
    for key, spec in specs.items():
        yield Trial(bucket.name, describe(spec), (), key, seconds=first_s, before_s=first_s)
    queue = in_order(specs, choices.num_asked, first_s)
    for candidate in _begun(steps, _new_candidates(bucket, specs, queue), end_s, prepare):
        begin(candidate.trial)
        result = steps.compare(candidate)
        if result.is_kept:
            choices.chosen[candidate.key] = result.chosen
        else:
            (choices.bad if result.seconds is None else choices.slow).add(result.name)
        yield result
    runner.captures.replace(steps.best.graph)
    if steps.best is not first:
        duel = steps.duel(first, steps.best)
        trial = Trial(bucket.name, WHOLE_STEP, (), bucket.name)
        yield replace(trial, seconds=duel.seconds, before_s=duel.before_s, is_kept=True)
    if time.monotonic() < end_s:
        for key in specs:
            choices.chosen.setdefault(key, ())
        choices.searched.add(runner.tuning_name(bucket))


@dataclass(frozen=True)
class Duel:
    """Two steps that were timed in turn. `wins`: the share of the turns in which the second one was faster."""

    before_s: float
    seconds: float
    wins: float

    @property
    def is_gain(self) -> bool:
        return self.seconds < self.before_s * (1 - LEAST_GAIN) and self.wins >= LEAST_WINS


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


@dataclass(frozen=True, eq=False)
class _Step:
    """A captured step, with its inputs on the device."""

    graph: Graph

    def run(self) -> None:
        self.graph.instances[0].run()


@dataclass
class _Candidate:
    """Values of a kernel's knobs, in the step that was the best when it was begun."""

    key: str
    trial: Trial
    base: _Step
    pending: PendingGraph | None = None  # None: it cannot be built

    @property
    def is_ready(self) -> bool:
        """Whether the device can run it, or it cannot be built."""
        return self.pending is None or self.pending.is_recorded

    @property
    def can_advance(self) -> bool:
        """Whether other processes have done something for it."""
        return self.pending is not None and self.pending.can_advance

    def advance(self) -> None:
        """Take over what other processes have done for it."""
        try:
            with _choice(self.key, self.trial.chosen):  # if it was lost, it is traced here
                if self.pending is not None:
                    self.pending.advance()
        except Exception:
            self.pending = None


class _Steps:
    """A bucket's steps, all with the same inputs and so with the same results. `best`: the fastest one so far."""

    best: _Step

    def __init__(self, runner: ModelRunner, bucket: Bucket) -> None:
        self._runner, self._bucket, self._device = runner, bucket, runner.backend.device
        self._plan, self._checked = make_plan(runner, bucket), make_plan(runner, bucket, NUM_NEAR)
        self._expected = StepOutput((), ())
        self._turn_s = PROMPT_TURN_S if bucket.is_for_prompts and not self._device.is_cpu else TURN_S
        if not bucket.is_for_prompts:  # it reads keys and values, which are all zero in a new pool
            tables = [table for entry in self._plan.entries for table in entry.request.tables]
            RunnerInspector(runner).fill_pool(1 + max(map(max, tables), default=0), POOL_SEED)

    def first(self) -> _Step:
        """The step with the current choices, whose results are those that are expected from then on."""
        self._runner.captures.remake(self._bucket)
        graph = self._runner.captures.graphs[self._bucket]
        self._expected = self._runner.execute(self._checked)
        self.best = self._ready(graph)
        return self.best

    def begun(self, candidate: _Candidate) -> _Candidate:
        """The candidate, which other processes trace and compile from now on."""
        candidate.pending = None
        with contextlib.suppress(Exception), _choice(candidate.key, candidate.trial.chosen):
            candidate.pending = self._runner.captures.begin_again(self._bucket)
        return candidate

    def compare(self, candidate: _Candidate) -> Trial:
        """The result of a candidate. If it is kept, its step is the best one from then on."""
        trial, step = candidate.trial, self._try(candidate)
        if step is None:
            return trial
        duel = self.duel(candidate.base, step)
        if duel.is_gain and candidate.base is not self.best:  # something else was kept since it was begun
            step = self._try(self.begun(candidate))
        if duel.is_gain and step is not None:  # the gain must hold again
            duel = self.duel(self.best, step)
            if duel.is_gain:
                self.best = step
        return replace(trial, seconds=duel.seconds, before_s=duel.before_s, is_kept=self.best is step)

    def _try(self, candidate: _Candidate) -> _Step | None:
        """The candidate's step; None if it cannot be built or computes something else."""
        if candidate.pending is None:
            return None
        with contextlib.suppress(Exception), _choice(candidate.key, candidate.trial.chosen):
            graph = candidate.pending.finish()
            self._runner.captures.replace(graph)
            if is_alike(self._runner.execute(self._checked), self._expected):
                return self._ready(graph)
        return None

    def duel(self, before: _Step, after: _Step) -> Duel:
        """The two steps, timed in turn."""
        return time_in_turn(self._device, before.run, after.run, self._turn_s)

    def time(self, step: _Step) -> float:
        """The step's seconds."""
        return self.duel(step, step).before_s

    @property
    def is_on_cpu(self) -> bool:
        return self._device.is_cpu

    def _ready(self, graph: Graph) -> _Step:
        instance = graph.instances[0]
        instance.packer.pack(self._plan)
        instance.send()
        return _Step(graph)


def _new_candidates(
    bucket: Bucket, specs: Mapping[str, Tunable], queue: Sequence[tuple[str, Chosen]]
) -> list[tuple[str, Trial]]:
    """(kernel's key, trial) of those that were not tried before."""
    known = tuning.current.bad | tuning.current.slow
    named = [(key, chosen, f"{key} {dict(chosen)}") for key, chosen in queue]
    new = [(key, chosen, name) for key, chosen, name in named if name not in known]
    return [
        (key, Trial(bucket.name, describe(specs[key]), chosen, name, place, len(new)))
        for place, (key, chosen, name) in enumerate(new, 1)
    ]


def _begun(
    steps: _Steps, queue: Sequence[tuple[str, Trial]], end_s: float, prepare: Callable[[Trial], None]
) -> Iterator[_Candidate]:
    """The candidates, each once it is compiled; as many are begun in advance as there are processes. On a CPU, whose
    cores run the steps, one after another. `prepare` is called with the one that this process works on or, when it
    waits for other processes, with the one that it has waited for longest."""
    num_ahead = 1 if steps.is_on_cpu else max(1, num_workers())
    waiting, pending = deque(queue), list[_Candidate]()
    awaited: _Candidate | None = None
    while (waiting or pending) and time.monotonic() < end_s:
        while waiting and len(pending) < num_ahead:
            key, trial = waiting.popleft()
            if trial.chosen != tuning.current.chosen.get(key, ()):
                awaited = None
                prepare(trial)
                pending.append(steps.begun(_Candidate(key, trial, steps.best)))
        ready = next((one for one in pending if one.is_ready), None)
        advancing = next((one for one in pending if one.can_advance), None)
        if ready is not None:
            awaited = None
            pending.remove(ready)
            yield ready
        elif advancing is not None:
            awaited = None
            prepare(advancing.trial)
            advancing.advance()
        elif pending:
            if awaited is not pending[0]:  # once: a candidate that hangs is found by how long nothing is said
                awaited = pending[0]
                prepare(awaited.trial)
            time.sleep(POLL_S)


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


def time_in_turn(device: DeviceHandle, before: Callable[[], None], after: Callable[[], None], turn_s: float) -> Duel:
    """Two functions, each of which enqueues a step, replayed for `turn_s` at a time. It ends when the second one is
    known to win too seldom."""
    after()
    repeats = max(1, math.ceil(turn_s / _seconds(device, before, 2)))
    once_s = _seconds(device, before, repeats)
    num_turns = min(max(round(TURNS_S / (2 * repeats * once_s)), LEAST_TURNS), MOST_TURNS)
    times: tuple[list[float], list[float]] = [], []
    lost = 0
    while len(times[1]) < num_turns and lost <= num_turns * (1 - LEAST_WINS):
        pair = [(times[0], before), (times[1], after)]
        for taken, run in pair if len(times[0]) % 2 == 0 else reversed(pair):
            taken.append(_seconds(device, run, repeats))
        lost += times[1][-1] >= times[0][-1]
    return Duel(float(np.median(times[0])), float(np.median(times[1])), 1 - lost / len(times[1]))


def _seconds(device: DeviceHandle, run: Callable[[], None], repeats: int) -> float:
    device.wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    device.wait()
    return (time.perf_counter() - start) / repeats


def is_alike(output: StepOutput, expected: StepOutput) -> bool:
    """Whether the greedy tokens are equal, with log-probabilities that differ by NEAR at most. Tokens may change places
    that are as near each other in both: other orders of the same sums do that, too."""
    rows = zip(output.token_ids, output.logprobs, expected.token_ids, expected.logprobs, strict=True)
    return all(
        found is not None
        and wanted is not None
        and abs(found.chosen - wanted.chosen) <= NEAR
        and (token == other or (_is_near(other, found) and _is_near(token, wanted)))
        for token, found, other, wanted in rows
    )


def _is_near(token: int, logprobs: TokenLogprobs) -> bool:
    """Whether the token is nearly as likely as the likeliest one."""
    return any(other == token and value >= logprobs.chosen - NEAR for other, value in logprobs.top)


def make_plan(runner: ModelRunner, bucket: Bucket, logprobs: int | None = None) -> StepPlan:
    """A full step: a decode bucket's sequences, or a verify bucket's only one, at half the longest context for which
    the pool has room; or prompts that fill a token bucket. With `logprobs`, for so many tokens, it computes the same
    each time: recurrent states are read where nothing is written, if there is room."""
    capacity, rng = runner.capacity, np.random.default_rng(TOKEN_SEED)
    if not bucket.is_for_prompts:
        num_seqs = bucket.num_seqs if bucket.is_decode else 1
        room = (capacity.num_blocks - 1) // num_seqs * capacity.block_size - bucket.num_drafts
        longest = min(bucket.max_context or capacity.max_model_len, capacity.max_model_len)
        lengths = [max(1, min(longest // 2, room // 2, MOST_CONTEXT))] * num_seqs
        lengths[0] = max(lengths[0], least_context(bucket, runner.buckets))
    else:
        lengths = lengths_that_fill(bucket, min(capacity.max_model_len, capacity.num_tokens))
    num_drafts, vocab_size = bucket.num_drafts, runner.model_config.vocab_size
    tables = fixed_tables(capacity.groups, [-(-(length + num_drafts) // capacity.block_size) for length in lengths])
    states, entries, unwritten = fixed_states(capacity, len(lengths)), [], capacity.num_state_slots - 1
    for index, length in enumerate(lengths):
        prompt, drafts = (rng.integers(0, vocab_size, count).tolist() for count in (length, num_drafts))
        params, state = SamplingParams(temperature=0.0, logprobs=logprobs), states[index]
        if state is not None and logprobs is not None and len(lengths) < unwritten:
            state.read_slot = unwritten
        request = Request(f"tune-{index}", prompt, params, tables=tables[index], state=state)
        start = 0 if bucket.is_for_prompts else len(prompt) - 1
        entries.append(Scheduled(request, start, len(prompt) + num_drafts - start, tuple(drafts)))
    return StepPlan(tuple(entries))


def describe(spec: Tunable) -> str:
    """The name of a spec's kernel in tables."""
    name = str(getattr(spec, "name", "")) or type(spec).__name__.removesuffix("Spec").lower()
    size = [str(getattr(spec, field)) for field in ("num_tokens", "num_rows", "num_cols") if hasattr(spec, field)]
    return f"{name} {'x'.join(size)}".strip()
