"""While prompts come in, those that decode wait at most so many times as long as without prompts."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest

from tests.engine.fakes import FakeModelRunner
from tests.scheduling.fakes import Flights, make_capacity, make_request, make_runner, run, run_alone
from tests.sweeps import in_both, length, swept
from tinyvllm.config import EngineConfig
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.step_clock import StepClock
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.step_pace import FIRST_SIZE, LEAST_CHUNK, MOST_AGE, MOST_SAMPLES, StepPace

Device = Callable[[int], float]  # seconds of a step of so many rows


def paced(stretch: float = 3.0, **fields: int) -> Scheduler:
    capacity = make_capacity(
        **{"num_blocks": 400, "block_size": 64, "max_num_seqs": 64, "max_num_batched_tokens": 8192, **fields}
    )
    return Scheduler(BlockManager.of(capacity), capacity, pace=StepPace(stretch))


def rows_of(plan: StepPlan) -> int:
    """Of the smallest graph that holds the plan."""
    return (
        1 << (plan.num_tokens - 1).bit_length() if plan.is_decode else max(16, 1 << (plan.num_tokens - 1).bit_length())
    )


DEVICES: dict[str, Device] = {
    "H200, 1B": lambda rows: 0.75e-3 + 3.1e-6 * rows,
    "H200, 8B": lambda rows: 3.9e-3 + 24e-6 * rows,
    "two cores, 135M": lambda rows: 4.5e-3 + 1.1e-3 * rows,
    "steep beyond 512": lambda rows: 1e-3 + 1e-6 * rows + 2e-5 * max(0, rows - 512),
}


@pytest.mark.parametrize(
    ("device", "num_decoding"),
    swept(itertools.product(DEVICES, [1, 24]), [*((device, 1) for device in DEVICES), ("steep beyond 512", 24)]),
)
def test_prompts_of_4096_stretch_a_step_by_the_factor_at_most(device: str, num_decoding: int) -> None:
    scheduler, seconds = paced(), DEVICES[device]
    pace = scheduler.pace
    assert pace is not None
    flights = Flights(scheduler, make_runner(scheduler))
    for number in range(num_decoding):
        scheduler.add(make_request(f"decoding {number}", 8, max_tokens=500))
    mixed: list[tuple[float, int]] = []
    rng = random.Random(0)
    for turn in range(260):
        if turn % 50 == 0 and scheduler.num_waiting == 0 and scheduler.num_running == num_decoding:
            scheduler.add(make_request(f"prompt {turn}", 4096, max_tokens=1))
        plan = flights.step_plan()
        took_s = seconds(rows_of(plan)) * rng.uniform(0.97, 1.03)
        pace.note(rows_of(plan), plan.is_decode, took_s)
        if not plan.is_decode and turn > 10:
            mixed.append((took_s, plan.num_tokens))
    plain_s = seconds(1 << (num_decoding - 1).bit_length())
    smallest = max(16, 1 << (num_decoding + LEAST_CHUNK - 1).bit_length())
    over = [took_s / plain_s for took_s, tokens in mixed if tokens > smallest and took_s > 3.1 * plain_s]
    assert len(over) <= 0.02 * 260, "sizes that turned out to take longer are tried once"
    fastest = max(tokens for _, tokens in mixed)
    fitting = [rows for rows in (16 << i for i in range(10)) if rows >= num_decoding + LEAST_CHUNK]
    best = max((rows for rows in fitting if seconds(rows) <= 2.8 * plain_s), default=num_decoding + LEAST_CHUNK)
    assert fastest >= min(best, 4096), "prompts are no slower than they have to be"


def test_a_step_that_decodes_nothing_is_not_limited() -> None:
    scheduler = paced()
    assert scheduler.pace is not None
    scheduler.pace.note(1, True, 1.0)
    scheduler.pace.note(8192, False, 1e6)
    scheduler.add(make_request("prompt", 9000))
    plan = scheduler.schedule()
    assert plan is not None and plan.num_tokens == 8192


def test_a_size_that_was_slow_by_accident_is_used_again() -> None:
    pace = StepPace(3.0)
    for _ in range(MOST_SAMPLES):
        pace.note(8, True, 1.0)
        pace.note(64, False, 1.5)
        pace.note(256, False, 2.0)
        pace.note(512, False, 2.5)
    assert pace.limit(8, 512) == 512
    assert pace.limit(8, 300) == 300
    for _ in range(MOST_SAMPLES // 2):
        pace.note(512, False, 60.0)
    assert pace.limit(8, 512) == 512, "the median counts"
    pace.note(512, False, 60.0)
    assert pace.limit(8, 512) == 256
    for _ in range(MOST_AGE // 2 + 1):
        pace.note(64, False, 1.5)
        pace.note(256, False, 2.0)
    assert pace.limit(8, 512) == 512, "that was long ago"


def test_a_prompt_advances_however_slow_its_steps_are() -> None:
    pace = StepPace(1.5)
    pace.note(4, True, 1.0)
    pace.note(32, False, 50.0)
    assert pace.limit(4, 4096) == 4 + LEAST_CHUNK, "smaller steps may be faster"
    pace.note(16, False, 25.0)
    assert pace.limit(4, 4096) == 16, "no step is smaller than 16 rows"


def test_a_burst_of_prompts_is_not_held_back_by_the_few_that_decode() -> None:
    pace = StepPace(3.0)
    pace.note(8, True, 1.0)
    for rows, seconds in ((64, 1.5), (256, 2.5), (1024, 6.0), (4096, 20.0)):
        pace.note(rows, False, seconds)
    assert [pace.limit(8, 4096, num_prompts) for num_prompts in (1, 8, 16, 60)] == [256, 256, 1024, 4096]


@pytest.mark.parametrize("device", swept(["H200, 1B", "H200, 8B"], ["H200, 1B"]))
def test_the_first_burst_after_a_start_is_not_held_back_for_lack_of_a_plain_step(device: str) -> None:
    """It took 2.4 to 3 times as long with 64 tokens in each step."""
    seconds, took_s = DEVICES[device], {}
    for is_known in (True, False):
        scheduler = paced(max_num_seqs=256, num_blocks=2000)
        assert scheduler.pace is not None
        for rows in (1 << i for i in range(9) if is_known):
            scheduler.pace.note(rows, True, seconds(rows))
        flights = Flights(scheduler, make_runner(scheduler))
        for number in range(60):
            scheduler.add(make_request(f"{number}", 600, max_tokens=16))
        took_s[is_known] = 0.0
        while scheduler.has_work:
            plan = flights.step_plan()
            took_s[is_known] += seconds(rows_of(plan))
            scheduler.pace.note(rows_of(plan), plan.is_decode, seconds(rows_of(plan)))
    assert took_s[False] < 1.2 * took_s[True]


def test_a_burst_larger_than_any_batch_before_is_not_held_back() -> None:
    """With the time of 64 rows as that of 140, it came down to steps of 256 tokens: on an H200, the last of 256 prompts
    had its first token after 480 ms instead of 172."""
    seconds, took_s = DEVICES["H200, 1B"], dict[int, float]()
    for largest in (64, 256):
        scheduler = paced(max_num_seqs=256, num_blocks=2000)
        assert scheduler.pace is not None
        for rows in (1 << i for i in range(largest.bit_length())):
            scheduler.pace.note(rows, True, seconds(rows))
        flights = Flights(scheduler, make_runner(scheduler))
        for number in range(256):
            scheduler.add(make_request(f"{number}", 128, max_tokens=300))
        took_s[largest] = 0.0
        while scheduler.num_waiting or any(request.num_output_tokens == 0 for request in scheduler.running):
            plan = flights.step_plan()
            took_s[largest] += seconds(rows_of(plan))
            scheduler.pace.note(rows_of(plan), plan.is_decode, seconds(rows_of(plan)))
    assert took_s[64] < 1.1 * took_s[256]


def test_requests_without_a_seat_do_not_raise_the_limit() -> None:
    scheduler = paced(max_num_seqs=8)
    pace = scheduler.pace
    assert pace is not None
    flights = Flights(scheduler, make_runner(scheduler))
    for number in range(7):
        scheduler.add(make_request(f"decoding {number}", 8, max_tokens=500))
    flights.step_plan()
    for rows, seconds in ((64, 1.5), (256, 2.5), (1024, 6.0), (4096, 20.0)):
        pace.note(8, True, 1.0)
        pace.note(rows, False, seconds)
    for number in range(100):
        scheduler.add(make_request(f"prompt {number}", 4096))
    assert flights.step_plan().num_tokens == 256


def test_nothing_known_is_a_chunk_of_moderate_size() -> None:
    assert StepPace(3.0).limit(4, 8192) == FIRST_SIZE
    assert StepPace(3.0).limit(60, 8192) == 60 + LEAST_CHUNK
    assert StepPace(3.0).limit(4, 16) == 16


@in_both
def test_chunks_of_any_pace_change_no_token() -> None:
    for seed in range(length(4, 16)):
        rng = random.Random(seed)
        scheduler = paced(
            rng.choice((1.01, 2.0, 5.0)), max_num_batched_tokens=rng.choice((16, 64, 200)), max_num_seqs=8
        )
        pace = scheduler.pace
        assert pace is not None
        for _ in range(20):
            pace.note(rng.choice((1, 2, 4, 8, 16, 64, 256)), rng.random() < 0.5, rng.expovariate(1.0))
        requests = [make_request(f"r{i}", rng.randrange(1, 150), max_tokens=rng.randrange(1, 20)) for i in range(12)]
        assert run(scheduler, *requests, depth=rng.choice((1, 2))) == [run_alone(one) for one in requests]


class TimedRunner(FakeModelRunner):
    """Steps of 8 rows for 5 s each, by a clock of its own; the device runs one at a time."""

    max_in_flight = 2

    def __init__(self) -> None:
        super().__init__()
        self.now_s, self._free_s = 100.0, 0.0

    def launch(self, plan: StepPlan) -> StepOutput:
        self.now_s += 0.5
        self._free_s = max(self.now_s, self._free_s) + 5.0
        output = dataclasses.replace(super().launch(plan), num_rows=8)
        output.__dict__["done_s"] = self._free_s
        return output

    def collect(self, flight: StepOutput) -> StepOutput:
        self.now_s = max(self.now_s, flight.__dict__["done_s"])
        return super().collect(flight)


def test_the_engine_notes_how_long_each_step_ran() -> None:
    runner = TimedRunner()
    core = EngineCore(runner, Scheduler(BlockManager.of(runner.capacity), runner.capacity, pace=StepPace(3.0)))
    core.clock = StepClock(lambda: runner.now_s)
    noted: list[tuple[int, bool, float]] = []
    assert core.scheduler.pace is not None
    core.scheduler.pace.note = lambda *one: noted.append(one)  # type: ignore[method-assign]
    core.add(make_request("r", 5, max_tokens=4))
    while core.has_work:
        core.step()
    assert [one[:2] for one in noted] == [(8, False), *[(8, True)] * 3]
    assert noted[0][2] == pytest.approx(5.25), "with the launch of 0.5 s, of which packing is 0.25"
    assert [one[2] for one in noted[1:]] == pytest.approx([5.0] * 3), "from the end of the step before"


def test_a_factor_that_allows_no_prompt_is_refused() -> None:
    with pytest.raises(TinyvllmError, match=r"--max-step-stretch is 0.5: give a number above 1, or 0 for no limit"):
        EngineConfig(model="m", max_step_stretch=0.5)
