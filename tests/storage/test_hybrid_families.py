"""What the files of families with recurrent layers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.storage.test_families import read, read_gguf
from tinyvllm.config import ModelConfig, Rope, StateKind
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
    with pytest.raises(ModelError, match="inner_size"):
        read_gguf(tmp_path, "qwen35", **GGUF_SSM | {"ssm.inner_size": 100})
