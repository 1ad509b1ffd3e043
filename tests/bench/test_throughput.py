"""The engine under load: every token is counted, and times are attributed to the right request."""

from __future__ import annotations

import pytest

from tests.bench.fakes import FakeRunner, make_machine
from tinyvllm.bench.rows import Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.throughput import ThroughputWork, measure_throughput, run_once
from tinyvllm.config import Capacity
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.scheduling.plan import StepOutput, StepPlan

WORK = ThroughputWork(num_requests=5, input_len=20, output_len=4, num_repeats=2, num_warmup=1)


def measure(runner: FakeRunner, work: ThroughputWork = WORK) -> Row:
    return measure_throughput(runner, make_machine(None), work, lambda stage, done, total: None)


def test_every_request_generates_its_tokens_in_order() -> None:
    run = run_once(FakeRunner(), WORK)
    assert [len(times) for times in run.token_s] == [4] * 5
    assert all(times == sorted(times) and times[0] > 0 for times in run.token_s)
    assert sum(run.step_s) == pytest.approx(run.wall_s) and run.wall_s >= max(times[-1] for times in run.token_s)


def test_prompts_are_computed_whole_in_every_repeat() -> None:
    runner = FakeRunner()
    measure(runner)
    computed = sum(stop - start for step in runner.steps for _, start, stop, _ in step)
    assert computed == 3 * 5 * (20 + 4 - 1)  # the last token of each is never fed back


def test_row_has_rates_and_spreads_over_all_repeats() -> None:
    row = measure(FakeRunner())
    assert (row.phase, row.batch, row.context, row.num_tokens, row.tok_s.count) == ("throughput", 4, 20, 4, 2)
    counts = {name: value.count for name, value in row.more.items() if isinstance(value, Spread)}
    assert counts == {"wall_s": 2, "ttft_ms": 10, "tpot_ms": 10, "itl_ms": 30, "e2e_ms": 10}
    assert row.more["total_tok_s"] == pytest.approx(row.more["input_tok_s"] * 24 / 20)
    assert (row.kernels, row.nbytes, row.floor_ms, row.floor_share) == (None, None, None, None)


def test_preemptions_are_counted() -> None:
    runner = FakeRunner()
    runner.capacity = Capacity(8, 16, 112, 4, 64)  # seven blocks: two sequences of 50 tokens do not fit
    work = ThroughputWork(num_requests=2, input_len=47, output_len=20, num_repeats=1, num_warmup=0)
    assert measure(runner, work).more["preemptions"] > 0


def test_failed_step_ends_the_benchmark() -> None:
    class Failing(FakeRunner):
        def execute(self, plan: StepPlan) -> StepOutput:
            raise RuntimeError("lost the device")

    with pytest.raises(DeviceError, match="lost the device"):
        run_once(Failing(), WORK)


def test_bad_numbers_name_their_flag() -> None:
    with pytest.raises(TinyvllmError, match="--output-len is 1"):
        ThroughputWork(output_len=1)
