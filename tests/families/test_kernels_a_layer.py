"""How many kernels a layer of each family takes on CUDA and METAL: traced, without the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from tinygrad import dtypes
from tinygrad.uop.ops import Ops

from tests.ops.rendering import KINDS, rendered, unwritten
from tests.sweeps import swept
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import ExpertsKind, ModelConfig, Rope, StateKind
from tinyvllm.device.recording import trace_step
from tinyvllm.model.registry import make_model
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.backend import Step, pool_groups
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.profiling.predict import FACTORS

LLAMA = {1: 5, 8: 7, 100: 8}  # kernels a layer, by the tokens of a step; of 100, in a step with prompts


def narrow(shape: str, **changes: object) -> ModelConfig:
    """Three layers of a known model, narrower: one that embeds, and finds the tiles of a prompt, and two others."""
    size = {"hidden_size": 512, "ffn_size": 2048, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 320}
    return replace(find_shape(shape), num_layers=3, **(size | changes))  # type: ignore[arg-type]


GRANITE = {"architecture": "granite", "residual_scale": 0.22, "embedding_scale": 12.0, "logit_scale": 0.1}
GLM4 = {"architecture": "glm4", "rope": Rope(1e4, num_dims=64, is_interleaved=True), "num_heads": 16, "num_kv_heads": 1}
# by family: its layers, and how many kernels each takes more than Llama's for a single row
FAMILIES: dict[str, tuple[ModelConfig, int]] = {
    "llama": (narrow("llama-3.1-8b"), 0),
    "qwen2": (narrow("qwen2.5-7b"), 0),
    "qwen3": (narrow("qwen3-0.6b"), 0),
    "mistral": (narrow("mistral-7b-v0.1"), 0),
    "phi3": (narrow("phi-4-mini"), 0),
    "phi3, heads of 96": (narrow("phi-4-mini", head_dim=96, rope=Rope(1e4), num_heads=4, num_kv_heads=4), 0),
    "smollm3": (narrow("llama-3.1-8b", architecture="smollm3", ropeless=(False, False, True)), 0),
    "granite": (narrow("llama-3.1-8b", **GRANITE), 0),
    "gemma3": (narrow("gemma-3-4b"), 1),
    "gemma2": (narrow("gemma-3-4b", architecture="gemma2", score_softcap=50.0, logit_softcap=30.0), 1),
    "glm4": (narrow("llama-3.1-8b", hidden_size=768, biases=("qkv",), **GLM4), 1),
}


def kernels_a_layer(
    kind: str, config: ModelConfig, tokens: int, weights: str, first: str = "gate_up"
) -> tuple[list[str], list[str]]:
    """(names of the kernels from one layer's kernel called `first` to the next one's, why some are general)."""
    backend = rendered(kind, is_chained=kind == "CUDA")
    model = make_model(config, RandomWeights(weights, seed=0), backend, 64, lambda done, total: None)
    layers = model.config.layers
    states = {index: layer.state for index, layer in enumerate(layers) if layer.state is not None}
    groups = pool_groups(layers)
    layout = StepLayout(tokens, min(tokens, 8), 4, 16, num_groups=len(groups), has_states=bool(states))
    pool = backend.make_pool(groups, 5, layout.block_size, "float16", states, 9 if states else 0)
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, tokens < 100)
    launches = trace_step(lambda: backend.whole(model(step)).realize()).launches
    names = [sink.arg.name for sink, _ in launches if sink.op is Ops.SINK]
    starts = [i for i, name in enumerate(names) if name.startswith(first)]
    return names[starts[-2] : starts[-1]], backend.coverage.lines()


ALWAYS = ("llama", "qwen2", "gemma3")  # in more steps than others
TRACED = [("CUDA", "llama", 8), ("CUDA", "llama", 100)]  # METAL's steps: test_step_counts.py
LIKES = ("mistral", "phi3", "smollm3", "granite", "gemma2")  # others have their layers
TRACED += [("CUDA", family, 1) for family in FAMILIES if family not in LIKES]


@pytest.mark.parametrize(("kind", "family", "tokens"), swept(product(KINDS, FAMILIES, LLAMA), TRACED))
def test_a_family_takes_at_most_one_kernel_a_layer_more_than_llama(kind: str, family: str, tokens: int) -> None:
    """Norms after products take one more for a single row, and none where rows are normed apart anyway."""
    config, more = FAMILIES[family]
    for weights in ("float16", "Q4_0") if tokens == 1 and family in ALWAYS else ("float16",):
        names, reasons = kernels_a_layer(kind, config, tokens, weights)
        assert len(names) == LLAMA[tokens] + (more if tokens == 1 else 0), (weights, names)
        assert not reasons, reasons


QWEN3_5 = {"head_dim": 256, "num_heads": 8, "state": StateKind(4, 2, 128, 128, 4, 1e-6), "has_output_gate": True}
# kernels of a layer, by the tokens of a step
RECURRENT, GATED = {1: 5, 8: 7, 100: 9}, {1: 7, 8: 9, 100: 10}


@pytest.mark.parametrize(
    "tokens", [1, pytest.param(8, marks=pytest.mark.sweep), pytest.param(100, marks=pytest.mark.sweep)]
)
@pytest.mark.parametrize(("recurrent", "counts"), [((True, True, True), RECURRENT), ((True, False, False), GATED)])
def test_kernels_of_recurrent_layers_and_of_gated_attention(
    tokens: int, recurrent: tuple[bool, ...], counts: dict[int, int]
) -> None:
    """Attention takes one more for the gate's product, and one for the gate."""
    config = narrow("qwen3.5-0.8b", **(QWEN3_5 | {"recurrent": recurrent}))
    names, reasons = kernels_a_layer("CUDA", config, tokens, "float16")
    assert len(names) == counts[tokens] and not reasons, (names, reasons)


@pytest.mark.parametrize(
    "tokens", [1, pytest.param(8, marks=pytest.mark.sweep), pytest.param(100, marks=pytest.mark.sweep)]
)
def test_a_sparse_layer_takes_as_many_kernels_more_as_predictions_say(tokens: int) -> None:
    """A router, the choice, and for several rows their order."""
    config = narrow("qwen3-30b-a3b", experts=ExpertsKind(8, 2, 512))
    names, reasons = kernels_a_layer("CUDA", config, tokens, "float16", first="router")
    column = {1: 0, 8: 1, 100: 2}[tokens]
    assert len(names) == LLAMA[tokens] + FACTORS["CUDA"].sparse_kernels[column], names
    assert not reasons, reasons
