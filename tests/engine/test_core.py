from __future__ import annotations

import logging

import pytest

from tests.engine.fakes import FakeModelRunner
from tests.scheduling.fakes import make_request, run_alone
from tinyvllm.engine.core import EngineCore
from tinyvllm.errors import ContextLengthError, EngineDeadError, InvariantError
from tinyvllm.faults import Fault, planned
from tinyvllm.profiling import measure
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.scheduler import Scheduler


def make_core(runner: FakeModelRunner | None = None) -> EngineCore:
    runner = runner or FakeModelRunner()
    capacity = runner.capacity
    return EngineCore(runner, Scheduler(BlockManager.of(capacity), capacity))


def fail(*steps: int, **capacity: int) -> FakeModelRunner:
    """A runner whose steps of these numbers throw."""
    runner = FakeModelRunner(**capacity)
    number = iter(range(1000))

    def before_step(plan: StepPlan) -> None:
        if next(number) in steps:
            raise RuntimeError("the device is on fire")

    runner.before_step = before_step
    return runner


def test_a_step_without_work_is_nothing() -> None:
    core = make_core()
    assert core.step() == []
    assert core.stats.extra["num_steps"] == 0


def test_steps_move_every_request_to_its_end() -> None:
    core, requests = make_core(), [make_request(f"r{i}", 5 + i) for i in range(3)]
    for request in requests:
        core.add(request)
    outs = []
    while core.has_work:
        outs += core.step()
    assert len(outs) == 24
    assert [request.output_ids for request in requests] == [run_alone(request) for request in requests]


def test_stats_count_what_happened() -> None:
    core = make_core()
    core.add(make_request("a", 9, max_tokens=2))
    core.add(make_request("b", 9, max_tokens=2))
    assert (core.stats.num_waiting, core.stats.num_running) == (2, 0)
    core.step()
    stats = core.stats
    assert (stats.num_tokens, stats.num_seqs, stats.num_running, stats.num_waiting) == (18, 2, 2, 0)
    assert stats.num_free_blocks == 999 - 6
    assert (stats.pack_s, stats.device_s, stats.num_captures) == (0.25, 0.5, 3)
    assert stats.schedule_s > 0 and stats.commit_s > 0
    assert stats.prefix_queries == 18
    core.step()
    assert stats.num_tokens == 18, "what was read does not change"
    stats = core.stats
    assert (stats.num_running, stats.num_free_blocks) == (0, 999)
    counters = {"num_steps": 2, "num_failed_steps": 0, "num_computed_tokens": 20, "num_output_tokens": 4}
    counters["num_padded_rows"] = 0  # a runner that says nothing of its graphs
    assert stats.extra == counters


def test_abort_is_seen_in_the_stats_without_a_step() -> None:
    core = make_core()
    core.add(make_request("a"))
    core.step()
    assert core.abort("a") is not None
    assert core.abort("a") is None
    assert (core.stats.num_running, core.stats.num_free_blocks) == (0, 999)


def test_a_refused_request_leaves_nothing_behind() -> None:
    core = make_core()
    with pytest.raises(ContextLengthError):
        core.add(make_request(prompt=256))
    assert not core.has_work


def test_a_step_that_throws_ends_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    core = make_core(fail(1))
    first = [make_request(f"r{i}", 9) for i in range(8)]  # as many as run at once
    waiting = make_request("waiting")
    for request in (*first, waiting):
        core.add(request)
    core.step()
    with caplog.at_level(logging.ERROR):
        outs = core.step()
    assert {out.request for out in outs} == set(first)
    assert all((out.finish_reason, out.token_id) == ("error", None) for out in outs)
    assert first[0].error == "the step that computed this request failed with RuntimeError: the device is on fire"
    assert "Traceback" in caplog.text and "r0, r1" in caplog.text
    core.scheduler.block_manager.audit()
    while core.has_work:
        core.step()
    assert waiting.output_ids == run_alone(waiting)
    assert core.stats.extra["num_failed_steps"] == 1
    assert core.stats.num_free_blocks == 999


def test_what_a_failed_step_wrote_is_not_a_cached_prefix() -> None:
    core = make_core(fail(1))
    core.add(make_request("a", range(20)))
    core.step()
    core.step()
    again = make_request("b", range(20))
    core.add(again)
    core.step()
    assert again.num_cached_tokens == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_failed_steps_leave_no_states_behind(depth: int) -> None:
    runner = fail(3, 30, num_state_slots=10, num_blocks=40)
    runner.max_in_flight = depth
    core = make_core(runner)
    requests = [make_request(f"r{i}", range(i // 4, 9 + i // 4), max_tokens=9 + i % 7) for i in range(40)]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
        core.scheduler.block_manager.audit()
    states = core.scheduler.block_manager.state_pool
    assert states is not None and core.stats.extra["num_failed_steps"] == 2
    states.begin_step()
    assert states.num_live == 0 and states.num_checkpoints > 0
    ends = [request.finish_reason for request in requests]
    assert ends.count("error") > 3 and ends.count("length") > 3
    for request in requests:
        if request.finish_reason == "length":
            assert request.output_ids == run_alone(request)
    again = [make_request(f"again{i}", range(i, 12 + i)) for i in range(4)]
    for request in again:
        core.add(request)
    while core.has_work:
        core.step()
    assert [request.output_ids for request in again] == [run_alone(request) for request in again]


def test_failures_in_a_row_end_the_engine() -> None:
    core = make_core(fail(0, 1, 3, 4, 5))
    for index in range(5):
        core.add(make_request(f"r{index}", max_tokens=1))
        core.step()
    core.add(make_request("last"))
    with pytest.raises(EngineDeadError, match="3 steps in a row have failed, the last with RuntimeError"):
        core.step()


def test_an_output_that_does_not_fit_its_plan_is_a_failed_step() -> None:
    runner = FakeModelRunner()
    core, request = make_core(runner), make_request()
    runner.execute = lambda plan: StepOutput((1, 2), (None, None))  # type: ignore[method-assign]
    core.add(request)
    (out,) = core.step()
    assert (out.finish_reason, request.finish_reason) == ("error", "error")
    assert "samples 1 tokens" in str(request.error)


def test_a_broken_invariant_of_the_scheduler_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    core.add(make_request())
    monkeypatch.setattr(core.scheduler.block_manager, "grow", lambda request, num_tokens: False)
    monkeypatch.setattr(core.scheduler, "_place", lambda request, max_count: False)
    with pytest.raises(InvariantError, match="0 running, 1 waiting, 999 blocks free"):
        core.step()


def overlapped(runner: FakeModelRunner | None = None) -> EngineCore:
    """A core whose device takes a step before the one before was read."""
    core = make_core(runner)
    core.runner.max_in_flight = 2  # type: ignore[misc]
    return core


def test_overlapped_steps_give_the_same_tokens() -> None:
    core, requests = overlapped(), [make_request(f"r{i}", 5 + i, max_tokens=3 + i % 4) for i in range(20)]
    for request in requests:
        core.add(request)
    outs = []
    while core.has_work:
        outs += core.step()
    assert [request.output_ids for request in requests] == [run_alone(request) for request in requests]
    assert len(outs) == sum(len(request.output_ids) for request in requests)
    assert all(request.num_in_flight == 0 for request in requests)
    assert core.stats.num_free_blocks == 999


def test_a_length_is_known_ahead_and_an_end_of_text_is_one_step_late() -> None:
    runner = FakeModelRunner()
    core = overlapped(runner)
    core.add(make_request("a", max_tokens=4))
    while core.has_work:
        core.step()
    assert len(runner.plans) == 4
    request = make_request("b", max_tokens=9, eos_ids=[run_alone(make_request("b", max_tokens=9))[1]])
    core.add(request)
    while core.has_work:
        core.step()
    assert (request.finish_reason, len(request.output_ids)) == ("stop", 2)
    assert len(runner.plans) == 4 + 3


def test_what_ends_in_flight_says_nothing_more() -> None:
    core, gone, stays = overlapped(), make_request("gone"), make_request("stays")
    core.add(gone)
    core.add(stays)
    for _ in range(3):
        core.step()
    assert gone.num_in_flight == 1
    assert core.abort("gone") is gone
    num_output = len(gone.output_ids)
    outs = []
    while core.has_work:
        outs += core.step()
    assert len(gone.output_ids) == num_output and all(out.request is stays for out in outs)
    assert stays.output_ids == run_alone(stays)
    core.scheduler.block_manager.audit()


def test_an_overlapped_step_that_throws_ends_all_that_is_in_flight() -> None:
    core = overlapped(fail(2))
    first, late = [make_request(f"r{i}") for i in range(8)], make_request("late")
    for request in (*first, late):
        core.add(request)
    outs = []
    while core.has_work:
        outs += core.step()
    assert [out.request for out in outs if out.finish_reason == "error"] == first
    assert all(len(request.output_ids) == 1 for request in first), "the second step's token was never read"
    assert late.output_ids == run_alone(late)
    assert core.stats.num_free_blocks == 999


@pytest.mark.parametrize("depth", [1, 2])
def test_a_steps_time_is_named_while_somebody_measures(depth: int) -> None:
    core = make_core()
    core.runner.max_in_flight = depth  # type: ignore[misc]
    requests = [make_request(f"r{i}", 5 + i, max_tokens=3) for i in range(3)]
    for request in requests:
        core.add(request)
    measure.start()
    try:
        while core.has_work:
            core.step()
    finally:
        recording = measure.stop()
    kinds = [span.facts.get("kind") for span in recording.named(measure.STEP)]
    assert kinds == ["prefill", "decode", "decode"] + ["decode"] * (depth - 1), "the last reads what is in flight"
    assert recording.totals[measure.SCHEDULE].count == len(kinds)
    assert {span.facts["request"] for span in recording.named(measure.QUEUE)} == {"r0", "r1", "r2"}
    for span in recording.named(measure.STEP):
        assert 0 < span.inner_ns <= span.duration_ns


def test_what_ended_before_an_error_in_the_same_commit_is_told() -> None:
    core = make_core(FakeModelRunner(block_size=4))
    first, second = make_request("a", [1, 2, 3, 4], max_tokens=1), make_request("b", [5, 6, 7, 8], max_tokens=8)
    for request in (first, second):
        core.add(request)
    with planned(Fault("pool.seal", "memory", at=2)):
        outs = core.step()
    assert [(out.request, out.finish_reason) for out in outs] == [(first, "length"), (second, "error")]
    assert "MemoryError: planned at pool.seal" in str(second.error) and not core.has_work
    core.scheduler.audit()


def test_a_step_that_cannot_be_planned_ends_all_requests_and_the_next_is_served() -> None:
    core = make_core()
    requests = [make_request(name, 20, max_tokens=4) for name in "ab"]
    for request in requests:
        core.add(request)
    with planned(Fault("pool.grow", "memory", at=7)):
        outs = core.step()
    assert [(out.request, out.finish_reason) for out in outs] == [(request, "error") for request in requests]
    core.scheduler.audit()
    core.add(make_request("c", 20, max_tokens=1))
    assert [out.finish_reason for out in core.step()] == ["length"]


def test_an_inconsistent_pool_ends_the_engine() -> None:
    core = make_core()
    core.add(make_request(max_tokens=1))
    with planned(Fault("pool.free")), pytest.raises(EngineDeadError, match="request r has ended, but holds blocks"):
        core.step()
