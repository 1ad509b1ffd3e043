"""What a family may ask of the decoder that none of ours does yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.ops.builders import Piece, make_step
from tests.sweeps import swept
from tinyvllm.arrays import HostMatrix
from tinyvllm.config import LayerKind, ModelConfig, Rope
from tinyvllm.device.handle import open_device
from tinyvllm.device.recording import record
from tinyvllm.device.replay import make_replay
from tinyvllm.model.decoder import Decoder
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.backend import Backend, Step, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

CONFIG = ModelConfig(
    architecture="shared",
    num_layers=2,
    hidden_size=64,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_position=64,
    rope=Rope(10000.0),
    norm_eps=1e-5,
    tie_embeddings=True,
)
TOKENS = [3, 14, 15, 92, 65, 35, 89]


class SharedKeys(Decoder):
    """Its second layer has queries alone, and attends to a window of the first layer's keys and values."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        own = replace(config.kind_of(0), has_bias=True, head_norm_eps=config.norm_eps)
        return own, replace(own, kv_layer=0, window=3)


class NamedWeights(RandomWeights):
    """Random weights that remember their names."""

    def __init__(self) -> None:
        super().__init__("float32", seed=0)
        self.names: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        self.names.add(name)
        return super().take(name, shape)


def logits(backend: Backend, weights: NamedWeights, *steps: tuple[StepLayout, Piece]) -> np.ndarray:
    """(V,) after the last of the steps, which together compute all tokens."""
    model = SharedKeys(CONFIG, weights, backend, num_positions=32)
    pool, values = backend.make_pool(pool_groups(model.config.layers), 3, 8, "float32"), np.zeros(0)
    for layout, piece in steps:
        buffer = make_step(layout, [piece])
        layout.views(buffer)["token_ids"][: piece.count] = TOKENS[piece.start : piece.start + piece.count]
        values = run(model, Step(layout, backend.device.upload(buffer), pool, layout.num_tokens == 1))
    return values[: CONFIG.vocab_size]


def run(model: SharedKeys, step: Step) -> np.ndarray:
    """Kernels in the order of their calls, which alone says that the second layer reads what the first one writes."""
    if isinstance(model.backend, ReferenceBackend):
        return np.asarray(model(step).numpy())
    device, recorded = model.backend.device, record(lambda: model(step).realize())
    make_replay(device, recorded)()
    device.wait()
    return np.asarray(recorded.output.numpy())


@pytest.mark.parametrize("decodes", swept((False, True), []))  # by default: tests/ops/test_kv_formats.py
def test_a_layer_may_read_an_earlier_layers_keys_and_values(decodes: bool) -> None:
    weights, count = NamedWeights(), len(TOKENS)
    many, one = StepLayout(8, 1, 2, 8), StepLayout(1, 1, 2, 8)
    expected = logits(ReferenceBackend(open_device()), weights, (many, Piece(0, count)))
    of_second = {name.removeprefix("model.layers.1.self_attn.") for name in weights.names if "layers.1.self" in name}
    assert of_second == {"q_proj.weight", "q_proj.bias", "q_norm.weight", "o_proj.weight"}
    steps = [(many, Piece(0, count - 1)), (one, Piece(count - 1))] if decodes else [(many, Piece(0, count))]
    found = logits(CpuBackend(open_device(), None), NamedWeights(), *steps)
    np.testing.assert_allclose(found, expected, atol=1e-4)
