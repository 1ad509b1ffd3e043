"""Shapes with random weights on the real device: counts that do not depend on the clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.fakes import make_model_config
from tests.sweeps import swept
from tinyvllm.bench.kernel_profile import find_bandwidth
from tinyvllm.bench.latency import Case, LatencyWork, fit_config, make_requests, measure_latency
from tinyvllm.bench.rows import Row
from tinyvllm.bench.shapes import SHAPES, find_shape
from tinyvllm.bench.subject import Subject
from tinyvllm.bench.throughput import ThroughputWork, run_once
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError, UnsupportedModelError
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling.roofline import weights_of
from tinyvllm.scheduling.plan import Scheduled, StepPlan

WORK = LatencyWork((Case("prefill", 1, 20), Case("decode", 2, 40)), num_decoded=4, num_repeats=2)
TINY = make_model_config(tie_embeddings=False, num_heads=2, head_dim=32)  # two cores can share this
KV_BYTES = TINY.kv_bytes_per_token(2)  # float16


def ignore(stage: str, done: int, total: int) -> None:
    pass


def decode_plan(runner: ModelRunner, context: int) -> StepPlan:
    requests = make_requests(runner, WORK, Case("decode", 2, context))
    return StepPlan(tuple(Scheduled(request, context, 1) for request in requests))


@pytest.fixture(scope="module", params=swept([1, 2], [1]))  # two cores: tests/ops/cpu/test_cores.py
def runner(request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    """On one core, and on two that share every layer."""
    config = fit_config(EngineConfig("tiny", max_num_batched_tokens=16, cpu_cores=request.param), WORK, TINY)
    loaded = Subject("tiny", TINY, kind="Q4_1").load(config, ignore)
    yield loaded
    loaded.close()


def measure(runner: ModelRunner) -> list[Row]:
    return measure_latency(RunnerInspector(runner), Subject("tiny", TINY).describe(runner, 1.0, 0), WORK, ignore)


def test_step_reads_every_matrix_once_and_rows_of_an_untied_table(runner: ModelRunner) -> None:
    prefill, decode = measure(runner)
    layer = 4 * 64 * 64 + 3 * 64 * 96
    num_params = 2 * layer + 2 * 260 * 64
    head_rows = 288  # 260, padded to whole panels of 32
    read_params = 2 * layer + head_rows * 64
    assert decode.machine.num_params == num_params and decode.machine.dtype == "Q4_1"
    row_bytes = 64 * 5 // 8  # Q4_1: 5 bits per weight
    assert decode.weight_bytes == read_params * 5 // 8 + 2 * row_bytes
    assert decode.kv_written_bytes == 2 * KV_BYTES
    assert decode.kv_read_bytes == round(2 * 41.5 * KV_BYTES)
    assert prefill.num_replays == 2 and prefill.kv_read_bytes == 16 * KV_BYTES
    assert decode.kernels is not None and 2 < decode.kernels <= 2 * (5 * 2 + 5)  # of both cores together
    assert prefill.kernels is not None and prefill.kernels % 2 == 0


def test_kernels_move_what_is_needed_and_activations(runner: ModelRunner) -> None:
    plans = [decode_plan(runner, context) for context in (16, 40, 41)]
    inspector = RunnerInspector(runner)
    costs = [inspector.cost(plan) for plan in plans]
    extra = [cost.moved_bytes - cost.nbytes for cost in costs]
    assert (
        extra[0] == extra[1] == extra[2] > 0
    )  # only keys and values grow with the context, and all of them are counted
    logits_bytes, hidden_bytes = 2 * 288 * 4, 2 * 64 * 4
    # an output is counted with its padding
    most = 10 * logits_bytes + 2 * 40 * hidden_bytes + 3 * inspector.output_bytes
    assert 2 * logits_bytes + 8 * hidden_bytes < extra[0] < most


def test_measuring_captures_nothing(runner: ModelRunner) -> None:
    before = runner.num_captures
    measure(runner)
    assert runner.num_captures == before == 2


def test_engine_runs_on_random_weights(runner: ModelRunner) -> None:
    run = run_once(runner, ThroughputWork(num_requests=3, input_len=18, output_len=4))
    assert [len(times) for times in run.token_s] == [4] * 3


def test_bandwidth_is_measured(runner: ModelRunner) -> None:
    assert RunnerInspector(runner).measure_bandwidth() > 0


def test_a_known_chip_has_the_bandwidth_of_its_data_sheet(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector = RunnerInspector(runner)
    monkeypatch.setattr(RunnerInspector, "measure_bandwidth", lambda self: 7e9)
    assert find_bandwidth(inspector) == 7.0
    monkeypatch.setattr(RunnerInspector, "hardware", "NVIDIA H200")
    assert find_bandwidth(inspector) == 4800.0


def test_description_has_what_a_figure_depends_on(runner: ModelRunner) -> None:
    environment = Subject("tiny", TINY).describe(runner, 1.0, seed=5).environment
    assert {"commit", "tinygrad", "python", "date", "command", "cpu", "cores"} <= set(environment)
    assert environment["seed"] == 5


def test_shapes_have_the_parameters_of_their_names() -> None:
    millions = {
        name: (weights_of(shape)[0] + weights_of(shape)[1] * (1 if shape.tie_embeddings else 2)) / 1e6
        for name, shape in SHAPES.items()
    }
    expected = {
        "smollm2-135m": 134.5,
        "tinyllama-1.1b": 1100,
        "llama-3.2-1b": 1236,
        "llama-3.1-8b": 8030,
        "qwen3-0.6b": 596,
        "qwen2.5-0.5b": 494,
        "gemma-3-270m": 268.1,
        "gemma-3-1b": 999.9,
        "gemma-4-e2b": 2279,  # without the layers' own embeddings
        "mistral-7b-v0.1": 7242,
        "mistral-7b": 7248,
        "ministral-3-8b": 8489,
        "olmo-3-7b": 7298,
        "granite-3.3-8b": 8171,
        "smollm3-3b": 3075,
        "glm-4-9b": 9400,
        "qwen2.5-7b": 7615,
        "gemma-3-4b": 3880,
        "phi-4-mini": 3836,
        "qwen3-4b": 4022,
        "qwen3-8b": 8190,
        "qwen3-14b": 14768,
        "gemma-3-12b": 11766,
        "mistral-small-24b": 23572,
        "qwen2.5-32b": 32763,
        "qwen3-30b-a3b": 30532,
        "gpt-oss-20b": 20915,
        "qwen3.5-0.8b": 752,
        "qwen3.5-27b": 26893,
        "sparse-100m": 115.5,
        "glm-4.7-flash": 29943,
        "lfm2-1.2b": 1170,
        "qwen3-next-80b-a3b": 79673,
        "qwen3.5-35b-a3b": 34659,
        "gemma-4-26b-a4b": 25247,
        "mixtral-8x7b": 46703,
        "llama-3.1-70b": 70553,
    }
    assert millions == pytest.approx(expected, rel=1e-3)


def test_shape_is_found_in_any_case_and_cut_to_layers() -> None:
    subject = Subject.of_shape("Llama-3.2-1B", "float16", num_layers=2)
    assert subject.model_config.num_layers == 2 and subject.name == "llama-3.2-1b/2-layers"


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match="tinyllama"):
        find_shape("gpt-2")


def test_more_layers_than_the_shape_has_are_refused() -> None:
    with pytest.raises(TinyvllmError, match="1 to 30"):
        Subject.of_shape("smollm2-135m", "float16", num_layers=31)
