"""A step's kernels one by one on a GPU: named by what they do, timed by the device, with their bytes and operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import TinyLlama, write_tiny_hf_llama
from tests.execution.test_profile import decode_plan
from tinyvllm.bench import doctor
from tinyvllm.config import EngineConfig, SamplingParams
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.profiling.kernels import StepProfile, tabulate
from tinyvllm.profiling.trace import parse_trace
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

from tinygrad.helpers import Context  # isort: skip  (tinyvllm makes its settings first)

pytestmark = pytest.mark.sweep  # tests/execution/test_profile.py does the like on the CPU

MODEL = TinyLlama()
PROMPT = 70  # more rows than a decode step has: the kernels for prompts


CONFIG = EngineConfig(
    model="tiny",
    max_num_seqs=1,
    max_model_len=96,
    max_num_batched_tokens=80,
    token_buckets=(80,),
    compile_cache=False,
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    loaded = load_runner(write_tiny_hf_llama(tmp_path_factory.mktemp("model")), CONFIG)
    loaded.warm_up()
    yield loaded
    loaded.close()


def prefill_plan() -> StepPlan:
    request = Request("0", [7] * PROMPT, SamplingParams(), tables=[[1, 2, 3, 4, 5]])
    return StepPlan((Scheduled(request, 0, PROMPT),))


def profile(runner: ModelRunner, plan: StepPlan) -> StepProfile:
    return RunnerInspector(runner).profile(plan, repeats=1, warmup=0)


@pytest.mark.parametrize("plan", [decode_plan(20), prefill_plan()], ids=["decode", "prefill"])
def test_fused_kernels_are_named_by_what_they_do(runner: ModelRunner, plan: StepPlan) -> None:
    found = profile(runner, plan)
    labels = [kernel.label for kernel in found.kernels]
    for layer in range(MODEL.layers):
        for operation in ("qkv", "attention", "attention out", "gate up", "down"):
            assert f"layer {layer} · {operation}" in labels, labels
    assert labels[0] == "embed" and "head" in labels and labels[-1] == "sample"
    assert not any("other" in label for label in labels)
    assert not found.is_graphed and all(kernel.seconds > 0 for kernel in found.kernels)


def test_a_step_calculates_what_its_weights_and_tokens_ask(runner: ModelRunner) -> None:
    decode, prompt = (
        {row.label: row.flops for row in tabulate(profile(runner, plan).kernels)}
        for plan in (decode_plan(20), prefill_plan())
    )
    assert decode["gate up"] == 2 * MODEL.layers * MODEL.hidden * 2 * MODEL.ffn
    assert prompt["gate up"] == PROMPT * (decode["gate up"] or 0)
    each = 4 * MODEL.layers * MODEL.heads * MODEL.head_dim
    assert decode["attention"] == each * 21
    assert prompt["attention"] == each * PROMPT * (PROMPT + 1) // 2


def test_the_doctor_names_the_family_and_the_limits_and_says_where_graphs_are_missing(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygrad import Device
    from tinygrad.runtime.graph.metal import MetalGraph

    metal = Device["METAL"]
    monkeypatch.setattr(metal, "graph", MetalGraph)
    found = next(doctor.device(RunnerInspector(runner), 1.0))
    assert found.status == doctor.GOOD and f", {metal.arch}" in found.value and metal.arch.startswith(("Apple", "Mac"))
    monkeypatch.setattr(metal, "graph", None)
    found = next(doctor.device(RunnerInspector(runner), 1.0))
    assert found.status == doctor.ODD and "without graphs" in found.value and "virtual machine" in found.remedy
    (programs,) = doctor.programs(RunnerInspector(runner))
    assert programs.status == doctor.GOOD and "threadgroup memory" in programs.value


def test_a_log_of_debug_2_has_the_kernels_of_a_profile_and_no_graph(
    runner: ModelRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Context(DEBUG=2):
        watched = load_runner(write_tiny_hf_llama(tmp_path), CONFIG)
        watched.warm_up()
        capsys.readouterr()
        tokens = watched.execute(prefill_plan()).token_ids
        trace = parse_trace(capsys.readouterr().out)
    lines, kernels = trace.kernels(last_steps=1), profile(runner, prefill_plan()).kernels
    assert trace.num_untimed == 0 and [line.label for line in lines] == [kernel.label for kernel in kernels]
    with RunnerInspector(runner).account() as account:
        assert tokens == runner.execute(prefill_plan()).token_ids
        counts = account.take()
    assert counts.graph_launches == 1 and counts.barriers == counts.kernels == len(kernels), "METAL's has one for each"
    watched.close()
