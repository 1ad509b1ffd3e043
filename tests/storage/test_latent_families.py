"""What the files of GLM-4.7-Flash and DeepSeek say about latents and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.storage.test_dense_families import SIZES
from tests.storage.test_dense_families import read_gguf as read_gguf_file
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import ExpertsKind, LatentKind, ModelConfig, ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.model_config import read_model_config

# zai-org/GLM-4.7-Flash's config.json, without what nothing here reads
GLM = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}


def read(directory: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(values | changes))
    return read_model_config(ModelFiles("hf", directory, "glm-4.7-flash"))


def test_glm_s_own_settings_give_its_shape(tmp_path: Path) -> None:
    found, shape = read(tmp_path, GLM, dtype="float16"), find_shape("glm-4.7-flash")
    assert found == shape
    kind = found.layers[0]
    assert (kind.scale, kind.stored_elements) == (256**-0.5, 576)
    assert found.experts_of(0) is None and found.experts_of(1) == shape.experts


def test_deepseek_s_yarn_scales_scores(tmp_path: Path) -> None:
    own = {"architectures": ["DeepseekV3ForCausalLM"], "rope_scaling": YARN, "max_position_embeddings": 163840}
    found = read(tmp_path, SIZES | own)
    assert found.latent == LatentKind(rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536)
    assert found.layers[0].scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)
    assert found.rope.attention_factor == 1.0 and found.rope.num_dims == 64 and found.rope.is_interleaved
    assert found.experts == ExpertsKind(
        num_experts=256,
        top_k=8,
        ffn_size=2048,
        score="sigmoid",
        scale=2.5,
        num_groups=8,
        top_groups=4,
        has_choice_bias=True,
        shared_size=2048,
    )
    assert found.with_experts == (False, False, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "group_limited_greedy"}, "topk_method"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    own = {"architectures": ["DeepseekV2ForCausalLM"], "num_experts_per_tok": 6}
    with pytest.raises((ModelError, UnsupportedModelError), match=message):
        read(tmp_path, SIZES | own, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, r"n_group is 3: .* a divisor of the number of experts \(64\)"),
        ({"n_group": 64, "topk_group": 64}, "n_group is 64: .* 2 or more in a group"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group is 5: it must be at most 4 \(n_group\)"),
        ({"n_group": 32, "topk_group": 1}, "topk_group is 1: .* enough groups of 2 experts to choose 4 from"),
        ({"mlp_layer_types": [["dense"]] * 47}, "mlp_layer_types is .* dense and sparse"),
    ],
)
def test_groups_and_layers_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, GLM, **changes)


def test_gguf_of_groups_chosen_by_their_best_score_is_refused(tmp_path: Path) -> None:
    keys = {
        "rope.dimension_count": 16,
        "attention.kv_lora_rank": 64,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_group_count": 4,
    }
    with pytest.raises(UnsupportedModelError, match="expert_group_count"):
        read_gguf_file(tmp_path, "deepseek2", keys)
