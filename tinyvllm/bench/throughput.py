"""The engine under load, offline: many requests at once, token ids in and out, without text or HTTP."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import ConditionsWatch
from tinyvllm.config import SamplingParams
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.core import EngineCore, Runner
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.scheduler import Scheduler

Report = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class ThroughputWork:
    """`num_requests` prompts of random ids, all queued at the start; each generates exactly `output_len` tokens."""

    num_requests: int = 32
    input_len: int = 128
    output_len: int = 64
    num_repeats: int = 3
    num_warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("num-prompts", self.num_requests, 1),
            ("input-len", self.input_len, 1),
            ("output-len", self.output_len, 2),  # a time between tokens needs two
            ("repeats", self.num_repeats, 1),
            ("warmup", self.num_warmup, 0),
        ):
            if value < least:
                raise TinyvllmError(f"--{flag} is {value}: give at least {least}")

    @property
    def max_model_len(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True)
class Repeat:
    """One repeat, in seconds."""

    wall_s: float
    step_s: list[float]
    token_s: list[list[float]]  # by request: when each token arrived, since the start
    num_preemptions: int
    num_padded: int = 0  # rows of graphs that held no token
    num_computed: int = 0  # tokens


def measure_throughput(runner: Runner, machine: Machine, work: ThroughputWork, report: Report) -> Row:
    """One row over all repeats. The prefix cache is off, since it would flatter the results."""
    runs, watch = [], ConditionsWatch()
    for repeat in range(-work.num_warmup, work.num_repeats):
        report("measure", work.num_warmup + repeat, work.num_warmup + work.num_repeats)
        with watch if repeat >= 0 else nullcontext():
            run = run_once(runner, work)
        if repeat >= 0:
            runs.append(run)
    report("measure", work.num_warmup + work.num_repeats, work.num_warmup + work.num_repeats)
    requests = [times for run in runs for times in run.token_s]
    num_in, num_out = work.num_requests * work.input_len, work.num_requests * work.output_len
    return Row(
        test=f"pp{work.input_len}+tg{work.output_len}, {work.num_requests} requests",
        phase="throughput",
        batch=runner.capacity.max_num_seqs,
        context=work.input_len,
        num_tokens=work.output_len,
        machine=machine,
        tok_s=Spread.of([num_out / run.wall_s for run in runs]),
        step_ms=_in_ms([seconds for run in runs for seconds in run.step_s]),
        trust=watch.trust(Estimate.of_values([num_out / run.wall_s for run in runs])),
        more={
            "requests": work.num_requests,
            "input_len": work.input_len,
            "output_len": work.output_len,
            "wall_s": Spread.of([run.wall_s for run in runs]),
            "input_tok_s": num_in / Spread.of([run.wall_s for run in runs]).mean,
            "total_tok_s": (num_in + num_out) / Spread.of([run.wall_s for run in runs]).mean,
            # since the start, when all requests were queued: includes the time in the queue
            "ttft_ms": _in_ms([times[0] for times in requests]),
            "tpot_ms": _in_ms([(times[-1] - times[0]) / (len(times) - 1) for times in requests]),
            "itl_ms": _in_ms([after - before for times in requests for before, after in itertools.pairwise(times)]),
            "e2e_ms": _in_ms([times[-1] for times in requests]),
            "preemptions": sum(run.num_preemptions for run in runs),
            # share of the rows computed by graphs that held no token
            "padding_share": sum(run.num_padded for run in runs)
            / max(1, sum(run.num_padded + run.num_computed for run in runs)),
        },
    )


def run_once(runner: Runner, work: ThroughputWork) -> Repeat:
    """Generate from all prompts, with a new scheduler and an empty pool. Raises DeviceError if a step fails."""
    capacity = runner.capacity
    block_manager = BlockManager.of(capacity, enable_prefix_caching=False)
    core = EngineCore(runner, Scheduler(block_manager, capacity))
    vocab_size = runner.model_config.vocab_size
    factory = RequestFactory(vocab_size, capacity, frozenset(), work.seed)
    params = SamplingParams(temperature=0.0, max_tokens=work.output_len, ignore_eos=True)
    rng = random.Random(work.seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(work.input_len)] for _ in range(work.num_requests)]
    token_s: dict[str, list[float]] = {str(index): [] for index in range(work.num_requests)}
    step_s: list[float] = []
    start_s = now_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        (request,) = factory.make_requests(str(index), prompt, params)
        core.add(request)
    while core.has_work:
        before_s, outs, now_s = now_s, core.step(), time.perf_counter()
        step_s.append(now_s - before_s)
        for out in outs:
            if out.token_id is None:
                raise DeviceError(f"request {out.request.request_id} failed: {out.request.error}")
            token_s[out.request.request_id].append(now_s - start_s)
    counters = core.stats.extra
    padded, computed = int(counters["num_padded_rows"]), int(counters["num_computed_tokens"])
    return Repeat(now_s - start_s, step_s, list(token_s.values()), core.scheduler.num_preemptions, padded, computed)


def _in_ms(seconds: list[float]) -> Spread:
    return Spread.of([value * 1e3 for value in seconds])
