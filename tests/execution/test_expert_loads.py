"""The experts that a step's tokens chose: read after a run, and counted in its bytes and operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.builders import NUM_TOKENS
from tests.execution.test_profile import decode_plan, prefill_plan
from tinyvllm.config import EngineConfig, ExpertsKind, ModelConfig, Rope
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.profile import read_loads
from tinyvllm.execution.runner import load_random_runner
from tinyvllm.profiling.expert_load import describe_loads
from tinyvllm.profiling.kernels import tabulate
from tinyvllm.profiling.roofline import experts_touched
from tinyvllm.scheduling.plan import StepPlan

HIDDEN, FFN, EXPERTS, TOP_K = 64, 32, 16, 3
SPARSE = ModelConfig(
    name="sparse",
    architecture="qwen3_moe",
    num_layers=3,
    hidden_size=HIDDEN,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=NUM_TOKENS,  # as of other tiny models, whose programs sample here, too
    max_position=64,
    rope=Rope(1e4),
    norm_eps=1e-5,
    tie_embeddings=True,
    experts=ExpertsKind(EXPERTS, TOP_K, FFN),
    with_experts=(False, True, True),
)
EXPERT_BYTES = 2 * 3 * HIDDEN * FFN  # float16


@pytest.fixture(scope="module")
def inspector() -> Iterator[RunnerInspector]:
    config = EngineConfig(
        model="sparse",
        max_num_seqs=8,
        max_model_len=64,
        max_num_batched_tokens=8,
        token_buckets=(8,),
        decode_buckets=(8,),  # as many rows in all steps, which share programs
        cpu_cores=2,
    )
    runner = load_random_runner(SPARSE, "float16", config)
    runner.warm_up()
    yield RunnerInspector(runner)
    runner.close()


def test_one_token_reads_k_experts_of_each_layer(inspector: RunnerInspector) -> None:
    plan = decode_plan(9)
    loads = inspector.profile(plan, repeats=1, warmup=0).experts
    assert [load.layer for load in loads] == [1, 2]
    for load in loads:
        assert (load.num_touched, load.num_pairs, load.busiest) == (TOP_K, TOP_K, 1)
        assert load.nbytes == TOP_K * EXPERT_BYTES
    dense = sum(matrix.nbytes for matrix in inspector.runner.model.matrices if not matrix.num_experts)
    for cost in (inspector.cost(plan), inspector.cost(plan, loads)):
        assert cost.weight_bytes == dense + 2 * TOP_K * EXPERT_BYTES


@pytest.mark.parametrize("plan", [decode_plan(9), decode_plan(9, 5, 2), prefill_plan(7)], ids=["1", "3", "prefill"])
def test_bytes_and_operations_are_those_of_the_chosen_experts(inspector: RunnerInspector, plan: StepPlan) -> None:
    profile = inspector.profile(plan, repeats=1, warmup=0)
    tokens, loads = plan.num_tokens, profile.experts
    assert [load.num_pairs for load in loads] == [tokens * TOP_K] * 2, "rows that pad the bucket do not count"
    rows = {row.label: row for row in tabulate(profile.kernels)}
    assert rows["experts gate up"].flops == 2 * 2 * tokens * TOP_K * 2 * HIDDEN * FFN
    assert rows["experts down"].flops == 2 * 2 * tokens * TOP_K * HIDDEN * FFN
    cost = inspector.cost(plan, loads)
    assert sum(kernel.nbytes or 0 for kernel in profile.kernels) == cost.moved_bytes
    least = sum(load.num_touched for load in loads) * EXPERT_BYTES
    expected = 2 * experts_touched(SPARSE.experts or ExpertsKind(1, 1, 1), tokens) * EXPERT_BYTES
    assert cost.weight_bytes - inspector.cost(plan).weight_bytes == pytest.approx(least - expected, abs=2)


def test_the_ids_are_those_of_the_last_run(inspector: RunnerInspector) -> None:
    """They survive the kernels after the router, which would otherwise take their memory."""
    runner, plan = inspector.runner, prefill_plan(7)
    runner.execute(plan)
    graph = runner.captures.graph_for(plan)
    for buffer in graph.instances[0].routings:
        ids = runner.backend.device.read_ints(buffer).reshape(8, TOP_K)
        assert ids.min() >= 0 and ids.max() < EXPERTS
        assert all(len(set(row)) == TOP_K for row in ids.tolist())
    loads = read_loads(graph, runner.model, runner.backend.device, plan)
    assert sum(load.busiest for load in loads) >= 2 * int(np.ceil(7 * TOP_K / EXPERTS))
    assert describe_loads([]) == []
    (line,) = describe_loads([replace(load, num_touched=7, nbytes=10**6) for load in loads])
    assert "of 16 in each of 2 layers: 7 to 7, 7.0 on average" in line and "2.0 MB" in line
