"""What the files of families with recurrent layers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.storage.test_families import read, read_gguf
from tinyvllm.config import ConvKind, ModelConfig, Rope, StateKind
from tinyvllm.errors import ModelError, UnsupportedModelError

# Qwen/Qwen3.5-27B's file, without what does not matter here
QWEN3_5_27B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "model_type": "qwen3_5"},
}
STATE_27B = StateKind(num_heads=48, num_key_heads=16, key_dim=128, value_dim=128, conv_width=4, norm_eps=1e-6)
GGUF_SSM = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 48,
    "ssm.inner_size": 48 * 128,
}


def recurrent(config: ModelConfig) -> str:
    """A letter for each layer."""
    return "".join("a" if kind.state is None else "r" for kind in config.layers)


def test_every_fourth_layer_of_qwen3_5_has_attention(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3_5_27B)
    assert (config.architecture, config.dtype, config.norm_offset) == ("qwen3_5", "bfloat16", 1.0)
    assert recurrent(config) == "rrra" * 16
    assert config.layers[0].state == config.state == STATE_27B
    assert config.rope == Rope(1e7, num_dims=64)
    assert config.layers[3].has_output_gate and config.layers[3].rope == config.rope
    assert config.state_bytes == 48 * STATE_27B.num_bytes
    assert config.kv_bytes_per_token(2) == 16 * 2 * 2 * 4 * 256  # of the layers with attention alone


def test_its_class_knows_what_the_file_does_not_say(tmp_path: Path) -> None:
    text = {key: QWEN3_5_27B["text_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 24, "vocab_size": 248320, "model_type": "qwen3_5_text"}
    config = read(tmp_path, text | {"architectures": ["Qwen3_5ForCausalLM"]})
    assert recurrent(config) == "rrra" * 16
    assert (config.head_dim, config.num_kv_heads, config.rope.num_dims) == (256, 4, 64)
    assert config.state is not None and (config.state.num_heads, config.state.num_key_heads) == (32, 16)
    config = read(tmp_path, text | {"architectures": ["Qwen3_5ForCausalLM"], "full_attention_interval": 8})
    assert recurrent(config) == "rrrrrrra" * 8


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer_types": ["linear_attention"] * 64}, "full_attention in one layer at least"),
        ({"layer_types": ["mamba"] * 64}, "a list of full_attention and linear_attention"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"linear_num_value_heads": 40}, r"a multiple of linear_num_key_heads \(16\)"),
        ({"attention_bias": True}, "no biases"),
        ({"layer_types": ["full_attention"] * 63}, r"a list of num_hidden_layers \(64\) entries"),
        ({"layer_types": ["full_attention"] * 63, "use_sliding_window": False}, r"num_hidden_layers \(64\) entries"),
        ({"layer_types": None, "full_attention_interval": 65}, "full_attention_interval is 65, .* up to 64"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1: it must be a whole number of at least 2"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    text = QWEN3_5_27B["text_config"] | changes
    with pytest.raises((ModelError, UnsupportedModelError), match=problem):
        read(tmp_path, QWEN3_5_27B, text_config=text)


def test_gguf_has_the_numbers_of_state_space_models(tmp_path: Path) -> None:
    """The layers that draft come after the model's own, and are not among them."""
    config = read_gguf(tmp_path, "qwen35", layers=9, nextn_predict_layers=1, **GGUF_SSM)
    assert (config.num_layers, recurrent(config), config.norm_offset) == (8, "rrrarrra", 0.0)
    assert config.state == replace(STATE_27B, norm_eps=config.norm_eps)
    config = read_gguf(tmp_path, "qwen35", full_attention_interval=2, **GGUF_SSM)
    assert recurrent(config) == "rara"
    flags: dict[str, Any] = {"attention.recurrent_layers": [True, False, False, True]}
    assert recurrent(read_gguf(tmp_path, "qwen35", **GGUF_SSM, **flags)) == "raar"
    drafting: dict[str, Any] = {"attention.recurrent_layers": [True, False, True], "nextn_predict_layers": 1}
    assert recurrent(read_gguf(tmp_path, "qwen35", layers=3, **GGUF_SSM, **drafting)) == "ra"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ssm.inner_size": 100}, "inner_size"),
        ({"ssm.conv_kernel": 1}, "ssm.conv_kernel is 1: it must be a whole number of at least 2"),
        ({"ssm.state_size": 2**30}, r"would have \d+ channels .*: they must have at most 1048576"),
        ({"attention.recurrent_layers": [True, False]}, "a list with a flag for each of 4 layers"),
        ({"attention.recurrent_layers": 2}, "a list with a flag for each of 4 layers"),
        ({"attention.recurrent_layers": [True] * 4}, "false in one layer at least"),
        ({"full_attention_interval": 5}, "full_attention_interval is 5"),
    ],
)
def test_gguf_numbers_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        read_gguf(tmp_path, "qwen35", **GGUF_SSM | changes)


# LiquidAI/LFM2-1.2B's file, without what does not matter here
LFM2_1_2B: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "conv_L_cache": 3,
    "conv_bias": False,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 65536,
}


def test_lfm2s_layers_are_convolutions_but_for_those_that_it_lists(tmp_path: Path) -> None:
    config = read(tmp_path, LFM2_1_2B)
    assert recurrent(config) == "rrarrarrarararar"
    assert config.state == ConvKind.of(2048, conv_width=3) and config.state.num_bytes == 4 * 3 * 2048
    assert (config.ffn_size, config.norm_eps, config.tie_embeddings, config.head_dim) == (8192, 1e-5, True, 64)
    kinds = ["conv" if kind == "r" else "full_attention" for kind in recurrent(config)]
    other = {"layer_types": kinds, "intermediate_size": 10752, "block_ff_dim": None, "tie_embedding": False}
    config = read(tmp_path, LFM2_1_2B | {"full_attn_idxs": None, "block_auto_adjust_ff_dim": False} | other)
    assert (recurrent(config), config.ffn_size, config.tie_embeddings) == ("rrarrarrarararar", 10752, False)
    with pytest.raises(UnsupportedModelError, match="conv_bias is True"):
        read(tmp_path, LFM2_1_2B, conv_bias=True)
    with pytest.raises(ModelError, match="conv_L_cache is 1: it must be a whole number of at least 2"):
        read(tmp_path, LFM2_1_2B, conv_L_cache=1)
    for layers in (3, [], [16], [[1]], ["2"]):
        with pytest.raises(ModelError, match=r"full_attn_idxs is .* less than num_hidden_layers \(16\)"):
            read(tmp_path, LFM2_1_2B, full_attn_idxs=layers)


def test_gguf_has_no_heads_of_keys_where_a_layer_is_a_convolution(tmp_path: Path) -> None:
    heads: dict[str, Any] = {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3}
    config = read_gguf(tmp_path, "lfm2", **heads)
    assert recurrent(config) == "rara" and config.state == ConvKind.of(64, conv_width=3)
    assert [kind.num_kv_heads for kind in config.layers] == [0, 2, 0, 2]
    with pytest.raises(ModelError, match=r"head_count_kv is \[0, 0, 0, 0\]: it must be above 0 in one layer"):
        read_gguf(tmp_path, "lfm2", **heads | {"attention.head_count_kv": [0, 0, 0, 0]})
