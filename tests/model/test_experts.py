"""A sparse feed-forward: what it takes from a checkpoint, and its shared expert, stacked with the others or apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.ops.builders import largest_difference, normal
from tinyvllm.arrays import HostMatrix
from tinyvllm.config import ExpertsKind, KVFormats, ModelConfig, Rope
from tinyvllm.device.handle import open_device
from tinyvllm.model.experts import SparseFeedForward, load_sparse
from tinyvllm.model.loading import Loader
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.backend import KVPool, Step
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

HIDDEN, TOKENS = 64, 5
KIND = ExpertsKind(6, 2, 32, shared_size=32, has_shared_gate=True)
CONFIG = ModelConfig(
    architecture="qwen3_moe",
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=64,
    max_position=64,
    rope=Rope(1e4),
    norm_eps=1e-6,
    tie_embeddings=False,
    experts=KIND,
)


class Weights(RandomWeights):
    """Values of float16; those of the shared expert are stored in `shared`."""

    def __init__(self, shared: str) -> None:
        super().__init__("float16", 0)
        self.shared = shared

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        values = super().take(name, shape)
        assert isinstance(values, np.ndarray)
        return values.astype(self.shared) if ".shared_expert." in name else values


def load(kind: ExpertsKind, shared: str) -> tuple[SparseFeedForward, ReferenceBackend]:
    backend = ReferenceBackend(open_device())
    loader = Loader(replace(CONFIG, experts=kind), Weights(shared), backend)
    return load_sparse(loader, 0, kind, "post_attention_layernorm", None), backend


def run(kind: ExpertsKind, shared: str) -> np.ndarray:
    layer, backend = load(kind, shared)
    inputs = backend.device.upload(np.zeros(1, np.int32))
    step = Step(StepLayout(TOKENS, 1, 1, 16), inputs, KVPool({}, {}, {}, KVFormats.of("float32")), is_decode=False)
    return layer.run(backend, backend.device.upload(normal(TOKENS, HIDDEN, seed=1)), step).numpy()


@pytest.mark.parametrize("has_gate", [True, False])
def test_a_shared_expert_is_stacked_only_in_the_others_format(has_gate: bool) -> None:
    kind = replace(KIND, has_shared_gate=has_gate)
    stacked, apart = load(kind, "float16")[0], load(kind, "float32")[0]
    assert stacked.shared is None and stacked.layer.stacks_shared and stacked.layer.num_chosen == 3
    assert stacked.layer.gate_up.num_experts == stacked.layer.down.num_experts == 7
    assert apart.shared is not None and not apart.layer.stacks_shared and apart.layer.gate_up.num_experts == 6
    assert {*apart.matrices} == {"router", "experts gate_up", "experts down", "shared gate_up", "shared down"}


def test_a_shared_expert_adds_the_same_in_either_place() -> None:
    assert largest_difference(run(KIND, "float16"), run(KIND, "float32")) < 1e-6


def test_a_larger_shared_expert_stays_apart() -> None:
    layer, _ = load(replace(KIND, shared_size=96), "float16")
    assert layer.shared is not None and layer.shared.down.num_cols == 96
