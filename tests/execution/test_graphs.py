"""What a captured step consists of. Counts do not flake, as times do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.sweeps import swept
from tinyvllm.config import Capacity
from tinyvllm.device.compiling import Compiler
from tinyvllm.device.handle import open_device
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.graphs import PendingGraph
from tinyvllm.execution.step_code import GraphContext
from tinyvllm.model.registry import Model, find_family
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.ops.backend import pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.kernel.body import I32
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.sample import OUT_WIDTH
from tinyvllm.storage.model_config import read_model_config

CAPACITY = Capacity(num_blocks=9, block_size=8, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)


# whose layers the fused kernels cover
@pytest.fixture(scope="module", params=("llama", pytest.param("qwen3", marks=pytest.mark.sweep)))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    files = write_tiny_hf_llama(tmp_path_factory.mktemp("models") / request.param, family=request.param)
    config = read_model_config(files)
    return find_family(config)(config, open_checkpoint(files, config), CpuBackend(open_device(), None), 64)


LAUNCHES = [
    # norm+qkv, attention, out+residual, norm+gate+up, down+residual · embed, head, sampling
    (Bucket.decode(1), 5, 4),
    (Bucket.decode(2), 5, 4),
    # keys and values are written before: another row may attend to them · rows are taken
    (Bucket(16, False, 2), 6, 5),
    (Bucket(32, False, 2), 8, 5),  # and many rows are normed apart
]


@pytest.mark.parametrize(
    ("bucket", "a_layer", "outside"),
    swept(LAUNCHES, [LAUNCHES[0], LAUNCHES[2], LAUNCHES[3]]),
    ids=lambda value: value.name if isinstance(value, Bucket) else str(value),
)
def test_a_step_launches_so_many_kernels(model: Any, bucket: Bucket, a_layer: int, outside: int) -> None:
    pool = model.backend.make_pool(pool_groups(model.config.layers), 9, 8, "float16")
    outputs = tuple(model.backend.device.zeros(CAPACITY.max_num_seqs * OUT_WIDTH, I32) for _ in range(2))
    state = SamplingState(model.backend.device, CAPACITY.max_num_seqs, model.config.vocab_size)
    graph = PendingGraph(
        bucket, GraphContext(model, model.backend, pool, CAPACITY, outputs, state), Compiler()
    ).finish()
    assert graph.num_kernels == a_layer * model.config.num_layers + outside
    assert graph.num_kernels - graph.instances[0].step.cut == 2, "what each row's parts have, and the draw"
    assert len(graph.instances[0].processed.calls) == 7, (
        "and masks with penalties, biases, typical_p, the counting, logprobs"
    )
