"""A step of each family renders for devices that are not here, within their limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from tinygrad import dtypes

from tests import sweeps
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.ops.rendering import GENERAL_TARGETS, check_limits, gpu_backend, kernels_of, unwritten
from tests.sweeps import swept
from tinyvllm.config import ModelConfig, QueryScaling, Rope
from tinyvllm.model.registry import make_model
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.backend import Step
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.storage.model_config import read_model_config


@pytest.mark.parametrize(
    ("name", "is_decode"),
    swept(
        product(("gemma3", "mistral", "qwen2", "gpt_oss", "gemma4_26b", "gemma4_e2b"), (True, False)),
        [],  # by default: all at once, below; prompts and experts in tests/ops/test_rendering.py
    ),
)
def test_a_step_renders_within_the_limits(tmp_path: Path, name: str, is_decode: bool) -> None:
    config = read_model_config(write_hf(tmp_path, RECIPES[name]))
    # one of each kind, if there are two
    config = replace(config, num_layers=2, windowed=(True, False), logit_softcap=25.0)
    if config.layer_sizes:  # and one that reads the first one's keys
        own = config.layer_sizes[:2]
        sizes = (*own, replace(own[0], kv_layer=0))
        config = replace(config, num_layers=3, windowed=(True, False, True), layer_sizes=sizes)
    check_step(config, is_decode=is_decode)


@pytest.mark.parametrize(("name", "is_decode"), swept(product(("qwen3_5", "lfm2"), (True, False)), [("lfm2", True)]))
def test_recurrent_layers_and_gated_attention_render(tmp_path: Path, name: str, is_decode: bool) -> None:
    config = read_model_config(write_hf(tmp_path, RECIPES[name]))
    check_step(replace(config, num_layers=2, recurrent=(True, False)), is_decode=is_decode)


@pytest.mark.parametrize("is_decode", swept((True, False), [True]))
def test_what_other_families_ask_for_renders_all_at_once(tmp_path: Path, is_decode: bool) -> None:
    """OLMo's norms, after only and of whole queries and keys; Ministral 3's scaled queries; GLM-4's rope; a layer
    without one; Granite's multipliers; every bias."""
    config = read_model_config(write_hf(tmp_path, RECIPES["olmo3"]))
    config = replace(
        config,
        num_layers=2,
        windowed=(True, False),
        rope=Rope(10000.0, num_dims=16, is_interleaved=True),
        local_rope=None,
        ropeless=(False, True),
        query_scaling=QueryScaling(0.1, 8),
        biases=("qkv", "out", "ffn"),
        embedding_scale=12.0,
        residual_scale=0.22,
        logit_scale=0.125,
        score_scale=0.0078125,
    )
    check_step(config, is_decode=is_decode)


def check_step(config: ModelConfig, *, is_decode: bool) -> None:
    backend = gpu_backend("float16")
    model = make_model(config, RandomWeights("float16", seed=0), backend, 64, lambda done, total: None)
    groups, states = model.pool_groups, model.config.states
    shape = (4, 4, 2, 16, len(groups)) if is_decode else (16, 3, 2, 16, len(groups))
    layout = StepLayout(*shape, has_states=bool(states))
    pool = backend.make_pool(groups, 5, layout.block_size, "float16", states, 5 if states else 0)
    logits = model(Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode))
    kernels = kernels_of([logits])
    assert {kernel.arg.name.split("_")[0] for kernel in kernels} >= {"embed", "write", "attention"}
    for kernel in kernels:  # by default for one: tests/ops/test_rendering.py says why
        check_limits(kernel, *(GENERAL_TARGETS if sweeps.is_sweeping else ("CUDA sm_90",)))
