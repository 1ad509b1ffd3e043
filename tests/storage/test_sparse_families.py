"""What the files of models with experts say: config.json of the published ones, and GGUF's metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.storage.test_dense_families import read, read_gguf
from tinyvllm.bench.shapes import SHAPES
from tinyvllm.config import ExpertsKind
from tinyvllm.errors import ModelError, UnsupportedModelError

QWEN3_30B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "rope_theta": 1000000.0,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "use_sliding_window": False,
}
GPT_OSS_20B = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "model_type": "gpt_oss",
}
MIXTRAL_8X7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "model_type": "mixtral",
}
GEMMA4_26B = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size": 262144,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma4_text",
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("Qwen3MoeForCausalLM", QWEN3_30B),
    "gpt-oss-20b": ("GptOssForCausalLM", GPT_OSS_20B),
    "mixtral-8x7b": ("MixtralForCausalLM", MIXTRAL_8X7B),
    "gemma-4-26b-a4b": ("Gemma4ForCausalLM", GEMMA4_26B),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_shape_of_benchmarks(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, *PUBLISHED[name])
    factor = found.rope.attention_factor
    rope = replace(found.rope, attention_factor=round(factor, 4))
    assert replace(found, name=name, rope=rope, dtype="float16") == SHAPES[name]


def test_which_layers_have_experts(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = read(tmp_path, "Qwen3MoeForCausalLM", QWEN3_30B, **changes)
    assert [config.experts_of(layer) is not None for layer in range(6)] == [False, True, False, False, False, True]


def test_olmoe_does_not_renormalize_and_gpt_oss_has_its_own_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "OlmoeForCausalLM").experts == ExpertsKind(64, 8, 96, renormalizes=False)
    config = read(tmp_path, "GptOssForCausalLM")
    assert config.biases == ("qkv", "out") and config.windowed == (True, False) and config.window == 128
    assert config.rope.scaling is not None and not config.rope.scaling.truncate
    assert config.experts is not None and config.experts.activation == "clamped_swiglu"


@pytest.mark.parametrize(
    ("name", "values", "changes", "message"),
    [
        ("Qwen3MoeForCausalLM", QWEN3_30B, {"num_experts_per_tok": 129}, r"num_experts_per_tok is 129: .* at most 128"),
        ("Qwen3MoeForCausalLM", QWEN3_30B, {"num_experts": None}, "has no num_experts"),
        ("Qwen3MoeForCausalLM", QWEN3_30B, {"mlp_only_layers": 3}, "mlp_only_layers is 3: .* a list of layers"),
        ("GptOssForCausalLM", GPT_OSS_20B, {"swiglu_limit": 10.0}, r"swiglu_limit is 10.0, .* known: 7.0"),
        ("OlmoeForCausalLM", {}, {"clip_qkv": 8.0}, "clip_qkv is 8.0, which is not supported"),
    ],
)
def test_what_would_give_other_tokens_is_refused(
    tmp_path: Path, name: str, values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, name, values, **changes)


# --- GGUF ------------------------------------------------------------------------------------------------------------

EXPERTS = {"expert_count": 8, "expert_used_count": 2}
ROUTERS = {f"blk.{layer}.ffn_gate_inp.weight": np.zeros((8, 64), np.float32) for layer in range(4)}


def test_a_llama_with_experts_is_mixtral(tmp_path: Path) -> None:
    config = read_gguf(tmp_path, "llama", EXPERTS)
    assert (config.architecture, config.experts) == ("mixtral", ExpertsKind(8, 2, 96))
    assert read_gguf(tmp_path, "llama").architecture == "llama"
    assert read_gguf(tmp_path, "llama", {"expert_count": 0}).architecture == "llama"


def test_gguf_s_layers_without_a_router_are_dense(tmp_path: Path) -> None:
    metadata = EXPERTS | {"expert_feed_forward_length": 32}
    config = read_gguf(tmp_path, "qwen3moe", metadata, **ROUTERS)
    assert config.experts == ExpertsKind(8, 2, 32) and config.with_experts == ()
    dense_first = {name: values for name, values in ROUTERS.items() if ".0." not in name}
    assert read_gguf(tmp_path, "qwen3moe", metadata, **dense_first).with_experts == (False, True, True, True)


def test_experts_in_a_family_without_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"qwen2.expert_count is 8, .* known: 0 \(no experts\)"):
        read_gguf(tmp_path, "qwen2", EXPERTS)
    with pytest.raises(UnsupportedModelError, match=r"qwen3moe.expert_count is None, .* known: 1 and more"):
        read_gguf(tmp_path, "qwen3moe")
    with pytest.raises(ModelError, match=r"has no gpt-oss.attention.sliding_window"):
        read_gguf(tmp_path, "gpt-oss", EXPERTS | {"expert_feed_forward_length": 32})
    with pytest.raises(ModelError, match=r"has no olmoe.expert_used_count"):
        read_gguf(tmp_path, "olmoe", {"expert_count": 8})
