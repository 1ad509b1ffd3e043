"""What the files of Mistral 3, Phi, SmolLM3, OLMo, Granite and GLM say, and GGUF's ropes as llama.cpp reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tinyvllm.config import ModelConfig, ModelFiles, QueryScaling, Rope, RopeScaling
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.checkpoint import language_model_tensors
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.model_config import read_model_config

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


def read(directory: Path, name: str, values: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    content = SIZES | {"architectures": [name]} | (values or {}) | changes
    (directory / "config.json").write_text(json.dumps(content))
    return read_model_config(ModelFiles("hf", directory, "tiny"))


def read_gguf(
    directory: Path, architecture: str, metadata: dict[str, Any] | None = None, **tensors: np.ndarray
) -> ModelConfig:
    path = directory / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, values in {"token_embd.weight": np.zeros((300, 64), np.float32), **tensors}.items():
        writer.add_tensor(name, values)
    for key, value in (metadata or {}).items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_model_config(ModelFiles("gguf", path, "tiny"))


# --- Mistral and Ministral ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text_type", "architecture"), [("mistral", "mistral"), ("ministral3", "ministral3"), (None, "mistral")]
)
def test_the_language_model_of_mistral3_is_of_the_class_that_its_text_config_names(
    tmp_path: Path, text_type: str | None, architecture: str
) -> None:
    text = SIZES | {"model_type": text_type, "sliding_window": None, "head_dim": 32}
    config = read(tmp_path, "Mistral3ForConditionalGeneration", {"text_config": text, "vision_config": {}})
    assert (config.architecture, config.head_dim, config.window) == (architecture, 32, None)
    tensor = StoredTensor((1,), lambda: np.zeros(1), "F32", 4)
    stored = ("language_model.model.norm.weight", "vision_tower.ln_pre.weight", "language_model.lm_head.weight")
    names = language_model_tensors(dict.fromkeys(stored, tensor), architecture)
    assert set(names) == {"model.norm.weight", "lm_head.weight"}


def test_a_text_config_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Mistral3ForConditionalGeneration.*is not supported"):
        read(tmp_path, "Mistral3ForConditionalGeneration", {"text_config": SIZES | {"model_type": "mistral4"}})


def test_ministrals_layers_have_windows_unless_layer_types_says_otherwise(tmp_path: Path) -> None:
    config = read(tmp_path, "MinistralForCausalLM", sliding_window=128)
    assert [kind.window for kind in config.layers] == [128] * 4
    kinds = ["full_attention", "sliding_attention"] * 2
    config = read(tmp_path, "MinistralForCausalLM", sliding_window=128, layer_types=kinds)
    assert [kind.window for kind in config.layers] == [None, 128, None, 128]


def test_ministral3s_rope_is_the_class_default_where_the_file_says_nothing(tmp_path: Path) -> None:
    config = read(tmp_path, "Ministral3ForCausalLM", max_position_embeddings=262144)
    assert config.rope == Rope(1e6, RopeScaling("yarn", 16.0, original_max_position=16384))
    assert config.query_scaling == QueryScaling(0.1, 16384)
    assert all(kind.query_scaling == config.query_scaling for kind in config.layers)


# --- Phi ---------------------------------------------------------------------------------------------------------


def test_phi4_minis_rope(tmp_path: Path) -> None:
    """microsoft/Phi-4-mini-instruct's settings, with fewer factors."""
    config = read(
        tmp_path,
        "Phi3ForCausalLM",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.1, 1.3, 2.0, 3.0, 9.5]},
        sliding_window=262144,
    )
    assert (config.window, config.rope.num_dims) == (None, 12)
    assert config.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert config.rope.scaling is not None
    assert config.rope.scaling.long_factors[-1] == 9.5


def test_phi3s_window_and_its_old_name_of_longrope(tmp_path: Path) -> None:
    assert read(tmp_path, "Phi3ForCausalLM", max_position_embeddings=4096, sliding_window=2047).window == 2047
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for kind in ("su", "yarn"):
        config = read(tmp_path, "Phi3ForCausalLM", rope_scaling={"type": kind, **factors})
        assert config.rope.scaling is not None
        assert config.rope.scaling.kind == "longrope"
    with pytest.raises(ModelError, match=r"short_factor is .*: it must be a list of 8 numbers above 0"):
        read(tmp_path, "Phi3ForCausalLM", rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": [2.0] * 8})


def test_a_share_of_a_head_that_does_not_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"partial_rotary_factor is 0\.2: .*an even number of dimensions"):
        read(tmp_path, "Phi3ForCausalLM", partial_rotary_factor=0.2)


# --- SmolLM3, Granite, GLM, OLMo, biases -------------------------------------------------------------------------


def test_smollm3s_layers_without_a_rope(tmp_path: Path) -> None:
    def ropeless(config: ModelConfig) -> list[bool]:
        return [kind.rope is None for kind in config.layers]

    assert ropeless(read(tmp_path, "SmolLM3ForCausalLM")) == [False, False, False, True]
    assert ropeless(read(tmp_path, "SmolLM3ForCausalLM", no_rope_layer_interval=2)) == [False, True] * 2
    assert ropeless(read(tmp_path, "SmolLM3ForCausalLM", no_rope_layers=[0, 1, 1, 0, 1])) == [True, False, False, True]
    assert ropeless(read_gguf(tmp_path, "smollm3")) == [False, False, False, True]
    with pytest.raises(ModelError, match=r"no_rope_layers is \[1\]: it must be a list of at least 4 of 0 and 1"):
        read(tmp_path, "SmolLM3ForCausalLM", no_rope_layers=[1])


def test_granites_multipliers_are_1_where_the_file_says_nothing(tmp_path: Path) -> None:
    config = read(tmp_path, "GraniteForCausalLM")
    assert (config.embedding_scale, config.residual_scale, config.score_scale, config.logit_scale) == (1, 1, 1, 1)
    config = read_gguf(tmp_path, "granite")
    assert (config.embedding_scale, config.residual_scale, config.score_scale, config.logit_scale) == (1, 1, None, 1)
    config = read_gguf(tmp_path, "granite", {"logit_scale": 8.0, "rope.scaling.finetuned": False})
    assert (config.logit_scale, config.layers[0].rope) == (0.125, None)


def test_glm4s_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "Glm4ForCausalLM", head_dim=16)
    assert (config.rope, config.biases) == (Rope(10000.0, num_dims=8, is_interleaved=True), ("qkv",))
    assert read(tmp_path, "GlmForCausalLM", head_dim=16, attention_bias=False).biases == ()


def test_olmo3s_windowed_layers_keep_the_rope_that_was_not_stretched(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = read(tmp_path, "Olmo3ForCausalLM", sliding_window=64, rope_scaling=yarn)
    assert [kind.window for kind in config.layers] == [64, 64, 64, None]
    assert config.layers[0].rope == Rope(500000.0)
    assert config.layers[3].rope is not None
    assert config.layers[3].rope.scaling == RopeScaling("yarn", 4.0, original_max_position=128)
    assert read_gguf(tmp_path, "olmo2").window is None  # OLMo 2's


def test_biases_are_flags_in_config_json_and_tensors_in_gguf(tmp_path: Path) -> None:
    config = read(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    assert config.biases == ("qkv", "out", "ffn")
    assert config.layers[0].has_bias
    assert read(tmp_path, "Qwen3ForCausalLM", head_dim=16, attention_bias=True).biases == ("qkv", "out")
    names = ("attn_q", "attn_k", "attn_output", "ffn_down")
    tensors: dict[str, Any] = {f"blk.0.{name}.bias": np.zeros(64, np.float32) for name in names}
    assert read_gguf(tmp_path, "llama", **tensors).biases == ("qkv", "out", "ffn")


# --- GGUF's ropes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.factor": 2.0}, RopeScaling("linear", 2.0)),  # llama.cpp's issue 2544
        ({"rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_a_factor_without_a_type_is_linear(
    tmp_path: Path, metadata: dict[str, Any], scaling: RopeScaling | None
) -> None:
    assert read_gguf(tmp_path, "llama", metadata).rope == Rope(10000.0, scaling)


def test_ggufs_yarn(tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    rope = read_gguf(tmp_path, "qwen2", yarn).rope
    assert rope.scaling == RopeScaling("yarn", 4.0, original_max_position=128)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    more = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5}
    rope = read_gguf(tmp_path, "qwen2", yarn | more | {"rope.scaling.yarn_log_multiplier": 1.0}).rope
    assert rope.scaling == RopeScaling("yarn", 4.0, original_max_position=128, beta_fast=16.0, beta_slow=2.0)
    assert rope.attention_factor == 0.5


def test_ggufs_longrope_is_two_tensors(tmp_path: Path) -> None:
    short, long = np.arange(1, 7, dtype=np.float32), np.arange(2, 8, dtype=np.float32)
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    metadata = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.2}
    rope = read_gguf(tmp_path, "phi3", metadata, **tensors).rope
    assert rope.scaling == RopeScaling(
        "longrope", original_max_position=64, short_factors=tuple(short.tolist()), long_factors=tuple(long.tolist())
    )
    assert rope.num_dims == 12
    assert rope.attention_factor == pytest.approx(1.2)
    with pytest.raises(ModelError, match=r"has no tensor rope_factors_long\.weight, which it needs"):
        read_gguf(tmp_path, "phi3", metadata, **{"rope_factors_short.weight": short})
