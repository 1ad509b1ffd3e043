"""The whole engine on one thread, with every stage of its loop timed.

The stages: text becomes ids (tokenize), ids become a queued request (queue), the scheduler plans a step and commits its
tokens (schedule), the plan is packed into arrays (pack), the device computes (prefill, decode), tokens become text
(detokenize). The time of the engine's own loop is `rest`. The host waits for the device at the border of each stage, so
that device time does not hide behind host time. Nothing overlaps then: the difference from a plain run is the
measurement overhead.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinyvllm.bench.prompts import make_ids, make_text
from tinyvllm.config import Capacity, ModelConfig, SamplingParams
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.output import OutputProcessor, output_of
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.profiling.measure import DETOKENIZE, PACK, QUEUE, SCHEDULE, STEP, TOKENIZE, Recorder, Span
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.text.tokenizer import Tokenizer

PREFILL, DECODE, SAMPLING, REST = "prefill", "decode", "sampling", "rest"
STAGES = (TOKENIZE, QUEUE, SCHEDULE, PACK, PREFILL, DECODE, SAMPLING, DETOKENIZE, REST)
ENQUEUE, WAIT, READ = "enqueue", "wait", "read"  # the components of a prefill's or a decode's time


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
class StepTimes:
    """Seconds of one turn of the engine loop. `device_s`: from the first launch until the device is done; during
    `wait_s` of it the host was idle. `read_s`: copying the tokens to the host."""

    kind: str  # prefill (mixed steps too) or decode
    num_tokens: int
    num_seqs: int
    schedule_s: float
    pack_s: float
    enqueue_s: float
    wait_s: float
    read_s: float
    rest_s: float
    detokenize_s: float

    @property
    def device_s(self) -> float:
        return self.enqueue_s + self.wait_s


@dataclass(frozen=True)
class RequestTimes:
    """Times of one request. `waited_s`: from entering the queue to its first step; other requests' stages contain this
    time. `token_s`: when each of its tokens arrived, since the start of the round."""

    num_prompt_tokens: int
    waited_s: float
    token_s: tuple[float, ...]


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
    tokenize_s: list[float]
    queue_s: list[float]
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
        return RequestTimes(request.num_prompt_tokens, waited_s, tuple(self.token_s))


class StagedRunner:
    """A runner whose parts are timed. One step in flight; waits for the device before and after each step."""

    max_in_flight = 1

    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self.model_config, self.capacity = runner.model_config, runner.capacity
        self._runner, self._recorder = runner, recorder

    @property
    def num_captures(self) -> int:
        return self._runner.num_captures

    @property
    def num_general_operations(self) -> int:
        return self._runner.num_general_operations

    def launch(self, plan: StepPlan) -> Any:
        self._runner.wait()  # so that no work of an earlier step is counted as this one's
        kind = DECODE if plan.is_decode else PREFILL
        with self._recorder.span(ENQUEUE, kind=kind, num_tokens=plan.num_tokens, num_seqs=len(plan.entries)):
            return self._runner.launch(plan)

    def sample(self, flight: Any) -> None:
        with self._recorder.span(ENQUEUE):
            self._runner.sample(flight)

    def collect(self, flight: Any) -> StepOutput:
        with self._recorder.span(WAIT):
            self._runner.wait()
        with self._recorder.span(READ) as span:
            output = self._runner.collect(flight)
        span.tell(pack_s=output.pack_s)
        return output

    def wait(self) -> None:
        self._runner.wait()

    def close(self) -> None:
        """The runner belongs to the caller."""


class StagedScheduler(Scheduler):
    """A scheduler whose methods are timed."""

    recorder: Recorder

    def schedule(self) -> StepPlan | None:
        with self.recorder.span(SCHEDULE):
            return super().schedule()

    def advance(self, plan: StepPlan) -> None:
        with self.recorder.span(SCHEDULE):
            super().advance(plan)

    def commit(self, plan: StepPlan, output: StepOutput, outs: list[TokenOut] | None = None) -> list[TokenOut]:
        with self.recorder.span(SCHEDULE):
            return super().commit(plan, output, outs)


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
        recorder = Recorder()
        scheduler = StagedScheduler(self._new_pool(), self.runner.capacity)
        scheduler.recorder = recorder
        core = EngineCore(StagedRunner(self.runner, recorder), scheduler)
        start_s = time.perf_counter()
        progress = self._admit(core, prompts, case.num_output, recorder, start_s)
        while core.has_work:
            with recorder.span(STEP):
                outs = core.step()
            with recorder.span(DETOKENIZE):
                _take(outs, progress)
        wall_s = time.perf_counter() - start_s
        return _make_round(wall_s, recorder.finish().spans, list(progress.values()))

    def run_plain(self, case: Case, after_step: Callable[[StepPlan | None], None] | None = None) -> PlainRound:
        """Run a case as the engine does when serving, with overlapping steps. `after_step`, for counting, is called
        after each step with its plan; nothing overlaps then."""
        prompts = self._prompts(case)
        watched = _PlanWatcher(self.runner) if after_step else self.runner
        core = EngineCore(watched, Scheduler(self._new_pool(), self.runner.capacity))
        start_s = time.perf_counter()
        progress = self._admit(core, prompts, case.num_output, Recorder(1), start_s)
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
        recorder: Recorder,
        start_s: float,
    ) -> dict[str, _Progress]:
        """Tokenize and queue the prompts, one after another."""
        progress: dict[str, _Progress] = {}
        params = dataclasses.replace(self._params, max_tokens=num_output, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                assert self.tokenizer is not None, "texts are made for a tokenizer only"
                with recorder.span(TOKENIZE):
                    prompt = self.tokenizer.encode(prompt)
            with recorder.span(QUEUE):
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
    """Group spans, which are in the order of their ends, into steps."""
    alone: dict[str, list[float]] = {TOKENIZE: [], QUEUE: []}
    steps: list[StepTimes] = []
    inner: list[Span] = []
    for span in spans:
        if span.name == STEP:
            steps.append(_make_step(span, inner))
            inner = []
        elif span.name == DETOKENIZE:
            steps[-1] = dataclasses.replace(steps[-1], detokenize_s=_seconds(span))
        elif span.name in alone:
            alone[span.name].append(_seconds(span))
        else:
            inner.append(span)
    return Round(
        wall_s,
        alone[TOKENIZE],
        alone[QUEUE],
        steps,
        [one.times for one in progress],
    )


def _make_step(step: Span, inner: Sequence[Span]) -> StepTimes:
    def total_s(name: str) -> float:
        return sum(_seconds(span) for span in inner if span.name == name)

    launched = next(span for span in inner if span.name == ENQUEUE and span.facts)
    pack_s = sum(float(span.facts["pack_s"]) for span in inner if span.name == READ)
    return StepTimes(
        kind=str(launched.facts["kind"]),
        num_tokens=int(launched.facts["num_tokens"]),
        num_seqs=int(launched.facts["num_seqs"]),
        schedule_s=total_s(SCHEDULE),
        pack_s=pack_s,
        enqueue_s=total_s(ENQUEUE) - pack_s,
        wait_s=total_s(WAIT),
        read_s=total_s(READ),
        rest_s=step.own_ns / 1e9,
        detokenize_s=0.0,
    )


def _seconds(span: Span) -> float:
    return span.duration_ns / 1e9
