"""The search for faster kernels: what it may change, what it remembers, and that it outlives a bad candidate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.execution import tune_workers
from tinyvllm.arrays import Format
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig, ModelFiles
from tinyvllm.errors import DeviceError
from tinyvllm.execution import tune as tune_module
from tinyvllm.execution import tune_process
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.execution.tune import Trial, expected_gain, in_order, make_plan, search
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.execution.tune_process import tune
from tinyvllm.ops.gpu.gemm import GemmSpec
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.body import F16
from tinyvllm.ops.kernel.lanes import Mma

BUCKET = Bucket.decode(2)


@pytest.fixture
def runner(tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRunner]:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    config = EngineConfig("tiny", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8, num_gpu_blocks_override=9)
    yield load_runner(tiny_gguf_files, config)
    tuning.use(tuning.Choices())


def run_search(runner: ModelRunner, begun: list[Trial] | None = None) -> list[Trial]:
    return list(search(runner, BUCKET, tuning.current.bad, (begun if begun is not None else []).append))


def test_a_search_goes_over_every_tunable_kernel_once_and_is_remembered(runner: ModelRunner) -> None:
    begun: list[Trial] = []
    trials = run_search(runner, begun)
    kernels = {trial.kernel.split()[0] for trial in trials}
    assert kernels == {"qkv", "attention_out", "gate_up", "down", "lm_head"}
    assert begun and {trial.name for trial in begun} <= {trial.name for trial in trials}
    assert all(trial.seconds is not None for trial in trials)
    tuning.current.save()
    path = tuning.current.path
    assert path is not None and path.is_file() and "tinygrad" in path.name
    again = tuning.load_choices(path)
    assert again.chosen == tuning.current.chosen and runner.tuning_name(BUCKET) in again.searched
    assert not runner.is_tuned, "other buckets were not searched"


def test_the_fastest_candidate_is_chosen_and_traced(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are invented: one row per pass takes half as long in the down projection, and nothing else matters."""
    real = tune_module.time_step

    def time_step(runner: ModelRunner, bucket: Bucket, plan: object) -> tuple[float, object]:
        _, tokens = real(runner, bucket, plan)  # type: ignore[arg-type]
        return (
            0.5 if any(value == (("rows_per_pass", 1),) for value in tuning.current.chosen.values()) else 1.0
        ), tokens

    monkeypatch.setattr(tune_module, "time_step", time_step)
    monkeypatch.setattr(tune_module, "NUM_TIMED", 1)
    run_search(runner)
    chosen = [value for value in tuning.current.chosen.values() if value]
    assert chosen == [(("rows_per_pass", 1),)]
    with tuning.current.watching() as asked:
        runner.captures.remake(BUCKET)
    assert sum(tuning.choose(spec).rows_per_pass == 1 for spec in asked.values()) == 1  # type: ignore[attr-defined]


def test_a_candidate_that_changes_a_token_is_bad(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tune_module.time_step

    def time_step(runner: ModelRunner, bucket: Bucket, plan: object) -> tuple[float, object]:
        seconds, tokens = real(runner, bucket, plan)  # type: ignore[arg-type]
        return seconds / (1000 if tuning.current.chosen else 1), tokens + any(tuning.current.chosen.values())

    monkeypatch.setattr(tune_module, "time_step", time_step)
    trials = run_search(runner)
    tried = [trial for trial in trials if trial.chosen]
    assert tried and all(trial.seconds is None for trial in tried)
    assert tuning.current.bad == {trial.name for trial in tried}
    assert not any(tuning.current.chosen.values())
    begun: list[Trial] = []
    run_search(runner, begun)
    assert not begun, "what was bad is not tried again"


def test_choices_make_steps_of_their_own(runner: ModelRunner) -> None:
    digest = tuning.current.digest
    run_search(runner)
    assert tuning.current.digest != digest


def test_candidates_that_may_gain_most_come_first() -> None:
    """A kernel that takes most of a step is searched first, and its candidates by their predicted times."""
    shape = dict(mma=Mma("CUDA", F16), format=Format("float16", 16), x_dtype=F16, num_rows=65536, num_cols=4096)
    specs = {name: GemmSpec(name=name, **shape, num_tokens=256, has_wgmma=True) for name in ("rare", "frequent")}
    order = in_order(specs, {"rare": 1, "frequent": 32}, 1e-3)
    assert order[0][0] == "frequent" and [key for key, _ in order].count("rare") == len(order) // 2
    times = [replace(specs["rare"], chosen=chosen).predicted_s or 0.0 for key, chosen in order if key == "rare"]
    assert times == sorted(times) and len(times) > 4, times
    assert expected_gain(0.9) > expected_gain(1.0) > expected_gain(1.1) > 0
    assert expected_gain(0.5) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("bucket", [Bucket.decode(1), BUCKET, Bucket(8, False, 2)], ids=lambda bucket: bucket.name)
def test_a_plan_fills_its_bucket(runner: ModelRunner, bucket: Bucket) -> None:
    plan = make_plan(runner, bucket)
    assert (plan.num_tokens, plan.is_decode) == (bucket.num_tokens, bucket.is_decode)
    blocks = [block for entry in plan.entries for block in entry.request.tables[0]]
    assert len(set(blocks)) == len(blocks) and 0 not in blocks and max(blocks) < runner.capacity.num_blocks


def run_process(tmp_path: Path, worker: object, budget_s: float = 60.0) -> tuple[tune_process.Outcome, list[Event]]:
    events: list[Event] = []
    job = Job(EngineConfig("tiny"), kind=str(tmp_path / "choices.json"))
    return tune(job, budget_s, events.append, worker), events  # type: ignore[arg-type]


def test_a_search_that_goes_well_is_complete(tmp_path: Path) -> None:
    outcome, events = run_process(tmp_path, tune_workers.well)
    assert (outcome.is_complete, outcome.num_tried, outcome.num_bad) == (True, tune_workers.NUM_CANDIDATES, 0)
    assert [event.what for event in events][:2] == ["ready", "begin"]


@pytest.mark.parametrize("worker", [tune_workers.dying, tune_workers.hanging], ids=["dies", "hangs"])
def test_what_a_worker_dies_of_is_remembered_and_another_goes_on(
    tmp_path: Path, worker: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_process, "TRIAL_TIMEOUT_S", 3.0)
    outcome, events = run_process(tmp_path, worker)
    assert (outcome.is_complete, outcome.num_bad) == (True, 1)
    assert tuning.load_choices(outcome.path).bad == {tune_workers.FATAL}
    assert [event.message for event in events if event.name == tune_workers.FATAL][-1] == "it crashed the process"


def test_a_spent_budget_ends_the_search_and_blames_nobody(tmp_path: Path) -> None:
    outcome, _ = run_process(tmp_path, tune_workers.hanging, budget_s=4.0)
    assert (outcome.is_complete, outcome.num_bad) == (False, 0)


@pytest.mark.parametrize(
    ("worker", "why"), [(tune_workers.failing, "there is no such model"), (tune_workers.silent, "")]
)
def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path, worker: object, why: str) -> None:
    with pytest.raises(DeviceError, match=f"could not start.*{why}"):
        run_process(tmp_path, worker)
