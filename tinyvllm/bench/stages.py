"""The whole engine on one thread, with every stage of its loop timed.

The stages: text becomes ids (tokenize), ids become a queued request (admission), the scheduler plans a step (schedule),
the plan is packed into arrays (pack), the device computes (prefill, decode), the host's part of sampling runs
(sampling), sampled rows become token ids (tokens), the scheduler takes them (commit), they become text (detokenize).
The time of the engine's own loop is `loop`. The spans are the engine's own, as when serving. The host waits for the
device at the border of each stage, so that device time does not hide behind host time. Nothing overlaps then: the
difference from a plain run is the measurement overhead.

Each stage of the host has two times: the wall time, and the processor time of its thread. What else the machine does
lengthens the former.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinyvllm.bench.prompts import make_ids, make_text
from tinyvllm.config import Capacity, ModelConfig, SamplingParams
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.output import OutputProcessor, output_of
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.profiling import measure
from tinyvllm.profiling.measure import (
    ADMISSION,
    COMMIT,
    DETOKENIZE,
    LAUNCH,
    PACK,
    SCHEDULE,
    STEP,
    TOKENIZE,
    TOKENS,
    Span,
)
from tinyvllm.profiling.request_stages import DECODE, LOOP, PREFILL
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.text.tokenizer import Tokenizer

SAMPLING = "sampling"
STAGES = (TOKENIZE, ADMISSION, SCHEDULE, PACK, PREFILL, DECODE, SAMPLING, TOKENS, COMMIT, DETOKENIZE, LOOP)
DEVICE_STAGES = (PREFILL, DECODE, SAMPLING)  # the others are the host's
ENQUEUE, WAIT, READ = "enqueue", "wait", "read"  # the components of a prefill's or a decode's time
_DEVICE_WAIT, _SAMPLE = "wait for the device", "sample"  # spans of StagedRunner only
# The engine's spans of a step, each counted without those inside it, and the parts of a step that they belong to.
_PARTS = {
    SCHEDULE: SCHEDULE,
    PACK: PACK,
    ENQUEUE: ENQUEUE,
    LAUNCH: ENQUEUE,
    _DEVICE_WAIT: WAIT,
    READ: READ,
    measure.WAIT: READ,  # the device is done by then: the runner only copies
    _SAMPLE: SAMPLING,
    TOKENS: TOKENS,
    COMMIT: COMMIT,
    DETOKENIZE: DETOKENIZE,
    STEP: LOOP,
}


class Runner(Protocol):
    """The part of execution.runner.ModelRunner that is used here."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def num_captures(self) -> int: ...

    @property
    def num_general_operations(self) -> int: ...

    @property
    def verify_sizes(self) -> tuple[int, ...]: ...

    @property
    def max_in_flight(self) -> int: ...

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, flight: Any) -> None: ...

    def collect(self, flight: Any) -> StepOutput: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Case:
    """`batch` prompts that arrive together, each answered by exactly `num_output` tokens. A prompt is real text of a
    named length, or `num_ids` random ids if `text` is None."""

    text: str | None
    num_ids: int
    batch: int
    num_output: int

    @property
    def name(self) -> str:
        prompt = f"{self.num_ids} ids" if self.text is None else f"{self.text} text"
        return f"{prompt}, batch {self.batch}"

    def __post_init__(self) -> None:
        for flag, value, least in (("batch", self.batch, 1), ("tokens", self.num_output, 2)):
            if value < least:
                raise TinyvllmError(f"--{flag} is {value}: give at least {least}")
        if self.text is None and self.num_ids < 1:
            raise TinyvllmError(f"--context is {self.num_ids}: give at least 1")


@dataclass(frozen=True)
class Took:
    """How long something took, in seconds: wall time, and its thread's processor time."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: Took) -> Took:
        return Took(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


NO_TIME = Took(0.0, 0.0)


@dataclass(frozen=True)
class StepTimes:
    """One turn of the engine loop. `parts`: its stages, where prefill or decode is divided into `enqueue`, `wait` (the
    host is idle) and `read` (copying the tokens to the host); `sampling` is the host's part of it."""

    kind: str  # prefill (mixed steps too) or decode
    num_tokens: int
    num_seqs: int
    parts: Mapping[str, Took]

    def wall_s(self, part: str) -> float:
        return self.parts.get(part, NO_TIME).wall_s

    @property
    def device_s(self) -> float:
        """From the first launch until the device is done, without other stages in between."""
        return self.wall_s(ENQUEUE) + self.wall_s(WAIT)


@dataclass(frozen=True)
class RequestTimes:
    """Times of one request. `waited_s`: from entering the queue to its first step; other requests' stages contain this
    time. `token_s`: when each of its tokens arrived, since the start of the round."""

    num_prompt_tokens: int
    waited_s: float
    token_s: tuple[float, ...]
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlainRound:
    """One repeat of a case without instrumentation."""

    wall_s: float
    requests: list[RequestTimes]

    @property
    def first_token_s(self) -> float:
        """When the last request received its first token."""
        return max(request.token_s[0] for request in self.requests)

    @property
    def num_decoded(self) -> int:
        """Tokens of all requests after `first_token_s`."""
        return sum(token_s > self.first_token_s for request in self.requests for token_s in request.token_s)

    @property
    def num_decode_steps(self) -> int:
        """Tokens of the request that generated most after `first_token_s`."""
        first_s = self.first_token_s
        return max(sum(token_s > first_s for token_s in request.token_s) for request in self.requests)


@dataclass(frozen=True)
class Round:
    """One instrumented repeat of a case, stage by stage."""

    wall_s: float
    tokenize: list[Took]
    admission: list[Took]
    steps: list[StepTimes]
    requests: list[RequestTimes]


@dataclass
class _Progress:
    request: Request
    processor: OutputProcessor | None
    start_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def times(self) -> RequestTimes:
        request = self.request
        waited_s = max(0.0, (request.scheduled_s or request.arrival_s) - request.arrival_s)
        return RequestTimes(request.num_prompt_tokens, waited_s, tuple(self.token_s), tuple(request.output_ids))


class StagedRunner:
    """A runner whose parts are timed. One step in flight; waits for the device before and after each step."""

    max_in_flight = 1
    verify_sizes = ()

    def __init__(self, runner: Runner) -> None:
        self.model_config, self.capacity = runner.model_config, runner.capacity
        self._runner = runner

    @property
    def num_captures(self) -> int:
        return self._runner.num_captures

    @property
    def num_general_operations(self) -> int:
        return self._runner.num_general_operations

    def launch(self, plan: StepPlan) -> Any:
        with measure.span(_DEVICE_WAIT):
            self._runner.wait()  # so that no work of an earlier step is counted as this one's
        kind = DECODE if plan.is_decode else PREFILL
        with measure.span(ENQUEUE, kind=kind, num_tokens=plan.num_tokens, num_seqs=len(plan.entries)):
            return self._runner.launch(plan)

    def sample(self, flight: Any) -> None:
        with measure.span(_SAMPLE):
            self._runner.sample(flight)

    def collect(self, flight: Any) -> StepOutput:
        with measure.span(_DEVICE_WAIT):
            self._runner.wait()
        with measure.span(READ):
            return self._runner.collect(flight)

    def wait(self) -> None:
        self._runner.wait()

    def close(self) -> None:
        """The runner belongs to the caller."""


class Driver:
    """Runs rounds of cases on one runner. The prefix cache is off by default, since it would flatter the results."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        seed: int = 0,
        prefix_caching: bool = False,
        params: SamplingParams | None = None,
    ) -> None:
        self.runner, self.tokenizer, self._seed, self._prefix_caching = runner, tokenizer, seed, prefix_caching
        self._params = params or SamplingParams(temperature=0.0, ignore_eos=True)
        self._factory = RequestFactory(runner.model_config.vocab_size, runner.capacity, frozenset(), seed)
        self._block_manager = self._make_block_manager()

    def run(self, case: Case) -> Round:
        """Run a case with every stage timed, waiting for the device at the border of each."""
        prompts = self._prompts(case)
        core = EngineCore(StagedRunner(self.runner), Scheduler(self._new_pool(), self.runner.capacity))
        measure.start()
        try:
            start_s = time.perf_counter()
            progress = self._admit(core, prompts, case.num_output, start_s)
            while core.has_work:
                outs = core.step()
                with measure.span(DETOKENIZE):
                    _take(outs, progress)
            wall_s = time.perf_counter() - start_s
        finally:
            recording = measure.stop()
        return _make_round(wall_s, recording.spans, list(progress.values()))

    def run_plain(self, case: Case, after_step: Callable[[StepPlan | None], None] | None = None) -> PlainRound:
        """Run a case as the engine does when serving, with overlapping steps. `after_step`, for counting, is called
        after each step with its plan; nothing overlaps then."""
        prompts = self._prompts(case)
        watched = _PlanWatcher(self.runner) if after_step else self.runner
        core = EngineCore(watched, Scheduler(self._new_pool(), self.runner.capacity))
        start_s = time.perf_counter()
        progress = self._admit(core, prompts, case.num_output, start_s)
        while core.has_work:
            _take(core.step(), progress)
            if after_step and isinstance(watched, _PlanWatcher):
                after_step(watched.take())
        wall_s = time.perf_counter() - start_s
        return PlainRound(wall_s, [one.times for one in progress.values()])

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the pool that are in use now."""
        return self.runner.capacity.num_blocks - 1 - self._block_manager.num_free

    def texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token alone; () without a tokenizer."""
        tokenizer = self.tokenizer
        return () if tokenizer is None else tuple(tokenizer.decode([token_id]) for token_id in token_ids)

    def _prompts(self, case: Case) -> list[str | list[int]]:
        """A case's prompts, as text or ids. Raises TinyvllmError for text if there is no tokenizer."""
        if case.text is None:
            vocab_size = self.runner.model_config.vocab_size
            return [make_ids(case.num_ids, vocab_size, self._seed + number) for number in range(case.batch)]
        if self.tokenizer is None:
            raise TinyvllmError(
                "a shape has no tokenizer, so its prompts are random ids: give --context LENGTHS and --prompts none"
            )
        return [make_text(case.text, number) for number in range(case.batch)]

    def _admit(
        self,
        core: EngineCore,
        prompts: Sequence[str | list[int]],
        num_output: int,
        start_s: float,
    ) -> dict[str, _Progress]:
        """Tokenize and queue the prompts, one after another."""
        progress: dict[str, _Progress] = {}
        params = dataclasses.replace(self._params, max_tokens=num_output, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                assert self.tokenizer is not None, "texts are made for a tokenizer only"
                with measure.span(TOKENIZE):
                    prompt = self.tokenizer.encode(prompt)
            with measure.span(ADMISSION):
                (request,) = self._factory.make_requests(str(number), prompt, params)
                core.add(request)
                processor = None if self.tokenizer is None else OutputProcessor(request, self.tokenizer)
                progress[request.request_id] = _Progress(request, processor, start_s)
        return progress

    def _new_pool(self) -> BlockManager:
        """The pool of a round: empty, or with the prefix cache on the same pool again, whose cached blocks are kept."""
        if not self._prefix_caching:
            self._block_manager = self._make_block_manager()
        return self._block_manager

    def _make_block_manager(self) -> BlockManager:
        capacity = self.runner.capacity
        return BlockManager.of(capacity, self._prefix_caching)


class _PlanWatcher:
    """A runner that remembers the plan it launched last."""

    def __init__(self, runner: Runner) -> None:
        self.model_config, self.capacity, self.max_in_flight = runner.model_config, runner.capacity, 1
        self.verify_sizes = runner.verify_sizes
        self._runner = runner
        self._plan: StepPlan | None = None

    @property
    def num_captures(self) -> int:
        return self._runner.num_captures

    @property
    def num_general_operations(self) -> int:
        return self._runner.num_general_operations

    def launch(self, plan: StepPlan) -> Any:
        self._plan = plan
        return self._runner.launch(plan)

    def sample(self, flight: Any) -> None:
        self._runner.sample(flight)

    def collect(self, flight: Any) -> StepOutput:
        return self._runner.collect(flight)

    def wait(self) -> None:
        self._runner.wait()

    def take(self) -> StepPlan | None:
        plan, self._plan = self._plan, None
        return plan

    def close(self) -> None:
        """The runner belongs to the caller."""


def _take(outs: Sequence[TokenOut], progress: dict[str, _Progress]) -> None:
    """Turn new tokens into text and note their times. Raises DeviceError for a request that failed."""
    for out in outs:
        one = progress[out.request.request_id]
        if out.token_id is None:
            raise DeviceError(f"request {out.request.request_id} failed: {out.request.error}")
        if one.processor is not None:
            one.processor.push(output_of(out), time.monotonic())
        one.token_s.append(time.perf_counter() - one.start_s)


def _make_round(wall_s: float, spans: Sequence[Span], progress: list[_Progress]) -> Round:
    """Group spans, which are in the order of their ends, into steps. Those that were added without a thread's stack,
    such as a request's time in the queue, overlap others and are left out."""
    alone: dict[str, list[Took]] = {TOKENIZE: [], ADMISSION: []}
    steps: list[StepTimes] = []
    inner: list[Span] = []
    for span in spans:
        if span.depth < 0:
            continue
        if span.name == STEP:
            steps.append(_make_step([*inner, span]))
            inner = []
        elif span.name == DETOKENIZE and not span.depth:
            parts = steps[-1].parts
            steps[-1] = dataclasses.replace(steps[-1], parts={**parts, DETOKENIZE: _own(span)})
        elif span.name in alone:
            alone[span.name].append(_own(span))
        else:
            inner.append(span)
    return Round(wall_s, alone[TOKENIZE], alone[ADMISSION], steps, [one.times for one in progress])


def _make_step(spans: Sequence[Span]) -> StepTimes:
    parts: dict[str, Took] = {}
    for span in spans:
        part = _PARTS.get(span.name, LOOP)
        parts[part] = parts.get(part, NO_TIME) + _own(span)
    facts = next(span.facts for span in spans if span.name == ENQUEUE)
    return StepTimes(str(facts["kind"]), int(facts["num_tokens"]), int(facts["num_seqs"]), parts)


def _own(span: Span) -> Took:
    """The time of a span outside those inside it."""
    return Took(span.own_ns / 1e9, (span.own_cpu_ns or 0) / 1e9)
