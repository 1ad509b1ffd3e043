"""Made-up plans: what they compute, where it lies, and how a row is counted from them."""

from __future__ import annotations

import pytest

from tests.bench.fakes import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, FakeRunner, make_machine, make_model_config
from tinyvllm.bench import latency
from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.latency import Case, LatencyWork, fit_config, make_requests, measure_latency, prefill_plans
from tinyvllm.bench.rows import Row
from tinyvllm.config import EngineConfig
from tinyvllm.errors import CapacityError, DeviceError, TinyvllmError
from tinyvllm.execution.buckets import make_buckets
from tinyvllm.execution.limits import resolve_limits


def make_work(*cases: Case, **changes: int) -> LatencyWork:
    return LatencyWork(cases, **({"num_decoded": 3, "num_repeats": 2, "num_warmup": 1} | changes))


def measure(runner: FakeRunner, work: LatencyWork) -> list[Row]:
    return measure_latency(runner, make_machine(), work, lambda stage, done, total: None)


# ---- Decode ----


def test_decode_goes_on_from_its_context_and_feeds_its_tokens() -> None:
    runner = FakeRunner()
    measure(runner, make_work(Case("decode", 2, 100)))
    assert len(runner.steps) == (1 + 2) * 3  # warm-up and repeats
    for number, step in enumerate(runner.steps):
        position = 100 + number % 3
        assert [(start, stop) for _, start, stop, _ in step] == [(position, position + 1)] * 2
        if number % 3:
            assert [token for *_, token in step] == [runner.token_id] * 2


def test_sequences_own_distinct_blocks_that_hold_all_their_tokens() -> None:
    runner, case = FakeRunner(), Case("decode", 3, 100)
    requests = make_requests(runner, make_work(case, num_decoded=30), case)
    blocks = [block for request in requests for block in request.tables[0]]
    assert sorted(blocks) == list(range(1, 1 + 3 * 9))  # ceil(130 / 16) each, and never block 0
    assert blocks != sorted(blocks)


def test_decode_row_counts_steps_kernels_and_bytes() -> None:
    (row,) = measure(FakeRunner(), make_work(Case("decode", 2, 100)))
    assert (row.phase, row.batch, row.context, row.num_tokens) == ("decode", 2, 100, 3)
    assert row.test == "tg3 @ d100, batch 2"
    assert (row.tok_s.count, row.step_ms.count, row.num_replays, row.kernels) == (2, 6, 1, 10)
    assert row.kv_read_bytes == 2 * 101 * KV_BYTES_PER_TOKEN  # the mean of contexts 100, 101 and 102
    assert row.kv_written_bytes == 2 * KV_BYTES_PER_TOKEN
    assert row.nbytes == WEIGHT_BYTES + row.kv_read_bytes + row.kv_written_bytes and row.bytes_ratio == 2


def test_floor_is_bytes_over_bandwidth() -> None:
    (row,) = measure(FakeRunner(), make_work(Case("decode", 2, 100)))
    assert row.nbytes is not None and row.floor_ms == pytest.approx(row.nbytes / 1e6 * 1e3)  # 0.001 GB/s
    assert row.floor_ms is not None and row.floor_share == pytest.approx(row.floor_ms / row.step_ms.median)


def test_logits_without_a_finite_value_are_an_error() -> None:
    with pytest.raises(DeviceError, match="finite"):
        measure(FakeRunner(token_id=-1), make_work(Case("decode", 1, 8)))


# ---- Prefill ----


def test_prefill_computes_the_prompt_in_pieces_of_the_budget() -> None:
    runner = FakeRunner(budget=64)
    (row,) = measure(runner, make_work(Case("prefill", 1, 150)))
    assert [[(start, stop) for _, start, stop, _ in step] for step in runner.steps[:3]] == [
        [(0, 64)],
        [(64, 128)],
        [(128, 150)],
    ]
    assert len(runner.steps) == 3 * (1 + 2)
    assert (row.test, row.num_replays, row.kernels, row.step_ms.count) == ("pp150", 3, 30, 2)
    assert row.nbytes == 3 * WEIGHT_BYTES + (64 + 128) * KV_BYTES_PER_TOKEN + 150 * KV_BYTES_PER_TOKEN


def test_prompts_share_steps() -> None:
    runner = FakeRunner()
    requests = make_requests(runner, make_work(Case("prefill", 3, 50)), Case("prefill", 3, 50))
    plans = prefill_plans(requests, 64)
    assert [[(e.request.request_id, e.start, e.count) for e in plan.entries] for plan in plans] == [
        [("prefill-0", 0, 50), ("prefill-1", 0, 14)],
        [("prefill-1", 14, 36), ("prefill-2", 0, 28)],
        [("prefill-2", 28, 22)],
    ]
    assert sum(len(plan.sampled) for plan in plans) == 3


# ---- The pool and the settings ----


def test_every_block_that_is_read_is_filled() -> None:
    runner = FakeRunner()
    measure(runner, make_work(Case("prefill", 1, 100), Case("decode", 4, 200), Case("decode", 1, 100)))
    assert runner.filled == [1 + 4 * 13]


def test_case_beyond_the_pool_is_refused_before_anything_runs() -> None:
    runner = FakeRunner(num_blocks=10)
    with pytest.raises(CapacityError, match="need 28 KV blocks, but the pool has 9"):
        measure(runner, make_work(Case("decode", 1, 16), Case("decode", 4, 100)))
    assert runner.steps == []


def test_settings_have_only_the_buckets_that_run() -> None:
    work = make_work(Case("prefill", 1, 300), Case("decode", 1, 64), Case("decode", 8, 64))
    config = fit_config(EngineConfig("tiny"), work, make_model_config())
    assert [bucket.name for bucket in make_buckets(resolve_limits(config), config)] == [
        "decode 1",
        "decode 8",
        "prefill 64",
        "prefill 256",
    ]
    assert (config.max_num_seqs, config.max_model_len) == (8, 301)


def test_decode_alone_has_the_smallest_prefill_bucket() -> None:
    config = fit_config(EngineConfig("tiny"), make_work(Case("decode", 4, 64)), make_model_config())
    assert [bucket.name for bucket in make_buckets(resolve_limits(config), config)] == ["decode 4", "prefill 4"]


def test_case_beyond_the_model_is_refused() -> None:
    with pytest.raises(TinyvllmError, match=r"600.*--context"):
        fit_config(EngineConfig("tiny"), make_work(Case("decode", 1, 596)), make_model_config())


@pytest.mark.parametrize(
    ("case", "flag"),
    [
        (Case("decode", 0, 8), "--batch"),
        (Case("decode", 1, -1), "--context"),
        (Case("prefill", 1, 1), "--prefill"),
    ],
)
def test_bad_numbers_name_their_flag(case: Case, flag: str) -> None:
    with pytest.raises(TinyvllmError, match=flag):
        make_work(case)


def test_no_case_is_refused() -> None:
    with pytest.raises(TinyvllmError, match="nothing to measure"):
        make_work()


# ---- Repeats ----


def test_cases_take_turns() -> None:
    runner = FakeRunner()
    measure(runner, make_work(Case("decode", 1, 100), Case("decode", 2, 50), num_decoded=1))
    assert [len(step) for step in runner.steps] == [1, 2] * 3


def test_noisy_cases_are_repeated_and_rows_say_how_far_they_can_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, noisy = FakeRunner(), {"left": 2}

    def is_noisy(estimate: Estimate) -> bool:
        noisy["left"] -= 1
        return noisy["left"] >= 0

    monkeypatch.setattr(latency, "is_noisy", is_noisy)
    rows = measure(runner, make_work(Case("decode", 1, 100), Case("decode", 2, 50), num_decoded=1, num_extra=3))
    assert [len(step) for step in runner.steps] == [1, 2] * 3 + [1, 2]  # both are asked twice, and were noisy once
    assert [row.tok_s.count for row in rows] == [3, 3]
    for row in rows:
        assert row.trust is not None and row.as_json()["trust"]["grade"] == row.trust.grade
