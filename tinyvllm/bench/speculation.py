"""What speculative decoding gains and costs: the same requests with drafts and without, in turn.

Real tasks need a model's files. `ReplayDrafter` needs none: it drafts what the model has answered without drafts, each
token with a given probability of being right, so the gain is known for any acceptance, even with random weights. Their
answers are sampled at a temperature at which the noise decides: at a low one many tokens are about as likely as each
other, and rounding would decide.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.rows import THROUGHPUT, Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import ConditionsWatch
from tinyvllm.config import SamplingParams, SpeculativeConfig
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.core import EngineCore, Runner
from tinyvllm.errors import DeviceError
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.draft_rule import make_rule
from tinyvllm.scheduling.drafts import AlwaysDraft, Drafter, DraftRule, Speculator
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

REPLAY_TEMPERATURE = 100.0
Report = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class SpeculationCase:
    """Requests that run together, and what drafts for them."""

    task: str
    prompts: tuple[tuple[int, ...], ...]  # token ids
    drafter: Drafter
    eos_ids: frozenset[int] = frozenset()  # ids that end an answer before `SpeculationWork.output_len`; (): none
    temperature: float | None = None  # None: the work's
    num_tokens: int = 1  # of a draft, at most
    is_adaptive: bool = False
    rule: DraftRule = field(default_factory=AlwaysDraft)

    def with_rule(self, config: SpeculativeConfig, num_tokens: int, verify_sizes: Sequence[int]) -> SpeculationCase:
        """The same case with so many drafts in every step; 0: with as many as pay, up to those of `config`."""
        is_adaptive = num_tokens == 0 and config.adaptive
        num_tokens = num_tokens or config.num_drafts
        settings = replace(config, num_speculative_tokens=num_tokens, adaptive=is_adaptive)
        rule = make_rule(settings, self.drafter, verify_sizes)
        return replace(self, num_tokens=num_tokens, is_adaptive=is_adaptive, rule=rule)

    @property
    def name(self) -> str:
        return f"{self.task}, batch {len(self.prompts)}, {'up to ' if self.is_adaptive else ''}{self.num_tokens} drafts"


@dataclass(frozen=True)
class SpeculationWork:
    """How each case runs."""

    output_len: int
    num_repeats: int = 3
    num_warmup: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Run:
    """One run of a case's requests, without their prompts' time. Seconds from the first token of all to the last."""

    outputs: list[list[int]]
    decode_s: float
    num_decoded: int  # tokens
    step_ms: list[float] = field(default_factory=list)
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def tok_s(self) -> float:
        return self.num_decoded / self.decode_s


class ReplayDrafter:
    """Drafts a known answer, in which each token is replaced by a wrong one with probability 1 - `share_right`."""

    is_free = True

    def __init__(self, share_right: float, vocab_size: int, seed: int = 0) -> None:
        self.share_right = share_right
        self.answers: dict[tuple[int, ...], list[int]] = {}  # by prompt
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)

    def expects(self, request: Request) -> bool:
        return tuple(request.prompt_ids) in self.answers

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        return [self._replay(request, count) for request, count in zip(requests, counts, strict=True)]

    def _replay(self, request: Request, count: int) -> list[int]:
        place = len(request.output_ids)
        coming = self.answers.get(tuple(request.prompt_ids), [])[place : place + count]
        return [id_ if self._rng.random() < self.share_right else (id_ + 1) % self._vocab_size for id_ in coming]

    def committed(self, plan: StepPlan, output: StepOutput) -> None: ...

    def forget(self, request: Request) -> None: ...


def measure_speculation(
    runner: Runner, machine: Machine, cases: Sequence[SpeculationCase], work: SpeculationWork, report: Report
) -> list[Row]:
    """A row for each case. Raises DeviceError if a step fails."""
    rows, num_runs = [], work.num_warmup + work.num_repeats
    for number, case in enumerate(cases):
        watch = ConditionsWatch()
        plain, drafted = [], []
        with watch:
            for repeat in range(num_runs):
                report("measure", number * num_runs + repeat, len(cases) * num_runs)
                plain.append(run_case(runner, case, work))
                if isinstance(case.drafter, ReplayDrafter):
                    case.drafter.answers = dict(zip(case.prompts, plain[-1].outputs, strict=True))
                drafted.append(run_case(runner, case, work, Speculator(case.drafter, case.rule, case.num_tokens)))
        rows.append(_row(case, machine, plain[work.num_warmup :], drafted[work.num_warmup :], watch))
    report("measure", len(cases) * num_runs, len(cases) * num_runs)
    return rows


def run_case(runner: Runner, case: SpeculationCase, work: SpeculationWork, speculator: Speculator | None = None) -> Run:
    """Answer a case's prompts with a new scheduler and an empty pool; without drafts if there is no speculator."""
    capacity = runner.capacity
    blocks = BlockManager.of(capacity, enable_prefix_caching=False)
    core = EngineCore(runner, Scheduler(blocks, capacity, speculator=speculator))
    factory = RequestFactory(runner.model_config.vocab_size, capacity, case.eos_ids, work.seed)
    params = SamplingParams(
        temperature=work.temperature if case.temperature is None else case.temperature,
        max_tokens=work.output_len,
        seed=work.seed,
        ignore_eos=not case.eos_ids,
    )
    requests = []
    for index, prompt in enumerate(case.prompts):
        (request,) = factory.make_requests(str(index), list(prompt), params)
        requests.append(request)
        core.add(request)
    while not all(request.output_ids for request in requests):
        _step(core)
    run = Run([request.output_ids for request in requests], 0.0, 0)
    num_known, start_s = sum(map(len, run.outputs)), time.perf_counter()
    before_s = start_s
    while core.has_work:
        _step(core)
        now_s = time.perf_counter()
        run.step_ms.append(1e3 * (now_s - before_s))
        before_s = now_s
    run.decode_s = before_s - start_s
    run.num_decoded = sum(map(len, run.outputs)) - num_known
    if speculator is not None:
        counts = speculator.counts
        run.num_drafts, run.num_drafted = counts.num_drafts, counts.num_draft_tokens
        run.num_accepted = counts.num_accepted_tokens
    return run


def _step(core: EngineCore) -> None:
    for out in core.step():
        if out.token_id is None:
            raise DeviceError(f"request {out.request.request_id} failed: {out.request.error}")


def _row(case: SpeculationCase, machine: Machine, plain: list[Run], drafted: list[Run], watch: ConditionsWatch) -> Row:
    num_drafted, num_accepted = sum(run.num_drafted for run in drafted), sum(run.num_accepted for run in drafted)
    rates, plain_rates = [run.tok_s for run in drafted], [run.tok_s for run in plain]
    speedups = [with_drafts / without for with_drafts, without in zip(rates, plain_rates, strict=True)]
    num_decoded = sum(run.num_decoded for run in drafted)
    return Row(
        test=case.name,
        phase=THROUGHPUT,
        batch=len(case.prompts),
        context=max(map(len, case.prompts)),
        num_tokens=num_decoded // len(drafted) // len(case.prompts),
        machine=machine,
        tok_s=Spread.of(rates),
        step_ms=Spread.of([ms for run in drafted for ms in run.step_ms]),
        trust=watch.trust(Estimate.of_values(speedups)),
        more={
            "task": case.task,
            "num_speculative_tokens": case.num_tokens,
            "is_adaptive": case.is_adaptive,
            "plain_tok_s": Spread.of(plain_rates),
            "plain_step_ms": Spread.of([ms for run in plain for ms in run.step_ms]),
            "speedup": Spread.of(speedups),
            "drafts": sum(run.num_drafts for run in drafted),
            "draft_tokens": num_drafted,
            "accepted_tokens": num_accepted,
            "acceptance": num_accepted / num_drafted if num_drafted else None,
            "mean_acceptance_length": 1 + num_accepted / max(1, sum(run.num_drafts for run in drafted)),
            "equal_tokens": _equal_share(plain, drafted),
        },
    )


def _equal_share(plain: Sequence[Run], drafted: Sequence[Run]) -> float:
    """The share of the tokens before the first that differs with drafts. 1, unless two tokens are so close that kernels
    for other numbers of rows, which round differently, prefer the other one."""
    num_equal = num_all = 0
    for before, after in zip(plain, drafted, strict=True):
        for one, other in zip(before.outputs, after.outputs, strict=True):
            num_equal += next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
            num_all += len(one)
    return num_equal / max(1, num_all)
