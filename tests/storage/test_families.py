"""What each family's files say: windows, ropes, defaults of transformers' classes, and llama.cpp's meaning of GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tinyvllm.config import ModelConfig, ModelFiles, Rope, RopeScaling
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
QWEN2 = SIZES | {"architectures": ["Qwen2ForCausalLM"]}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"]}
GEMMA3 = SIZES | {"architectures": ["Gemma3ForCausalLM"], "head_dim": 32, "sliding_window": 128}
# google/gemma-3-4b-it's file: what is not here is the class's default
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}
LOCAL_5_OF_6 = (True, True, True, True, True, False)


def read(directory: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(values | changes))
    return read_model_config(ModelFiles("hf", directory, "tiny"))


def read_gguf(directory: Path, architecture: str, layers: int = 4, **metadata: Any) -> ModelConfig:
    path = directory / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), np.float32))
    for key, value in metadata.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_model_config(ModelFiles("gguf", path, "tiny"))


def windows(config: ModelConfig) -> list[int | None]:
    return [kind.window for kind in config.layers]


# --- The text part of multimodal Qwen -----------------------------------------------------------------------------

MROPE = {"mrope_section": [2, 3, 3], "type": "mrope"}


@pytest.mark.parametrize(
    ("dense", "multimodal", "rope"),
    [
        ("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration", MROPE),
        ("Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration", MROPE | {"rope_type": "default"}),
        ("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration", {"mrope_interleaved": True, "rope_type": "default"}),
    ],
)
def test_text_has_plain_positions_in_multimodal_qwen(
    tmp_path: Path, dense: str, multimodal: str, rope: dict[str, Any]
) -> None:
    expected = read(tmp_path, SIZES | {"architectures": [dense], "rope_theta": 1e6})
    text = SIZES | {"rope_theta": 1e6, "rope_scaling": rope}
    whole = {"architectures": [multimodal], "vision_config": {"depth": 1}}
    assert read(tmp_path, whole | {"text_config": text}) == expected
    assert read(tmp_path, whole | text) == expected  # older files have the text model's keys at the top


def test_gguf_says_how_an_embedding_model_pools(tmp_path: Path) -> None:
    assert read_gguf(tmp_path, "qwen3").pooling is None
    assert [read_gguf(tmp_path, "qwen3", pooling_type=i).pooling for i in (0, 1, 2, 3)] == [None, "mean", "cls", "last"]


# --- Gemma 2 -----------------------------------------------------------------------------------------------------


def test_gemma2s_class_has_windows_and_softcaps_where_the_file_says_nothing(tmp_path: Path) -> None:
    config = read(tmp_path, SIZES | {"architectures": ["Gemma2ForCausalLM"], "max_position_embeddings": 8192})
    assert windows(config) == [4096, None, 4096, None]
    assert (config.head_dim, config.score_softcap, config.logit_softcap) == (256, 50.0, 30.0)
    assert (config.score_scale, config.norm_offset, config.tie_embeddings) == (None, 1.0, True)
    config = read(tmp_path, SIZES | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None})
    assert (config.score_softcap, config.logit_softcap) == (None, 30.0)


def test_gguf_has_llama_cpps_values_for_gemma2(tmp_path: Path) -> None:
    config = read_gguf(tmp_path, "gemma2", **{"context_length": 8192})
    assert windows(config) == [4096, None, 4096, None]
    assert (config.score_softcap, config.logit_softcap, config.score_scale) == (50.0, 30.0, None)
    config = read_gguf(
        tmp_path, "gemma2", layers=46, **{"attention.sliding_window": 128, "final_logit_softcapping": 20.0}
    )
    assert (config.window, config.logit_softcap, config.score_scale) == (128, 20.0, (64 // 4) ** -0.5)


# --- Gemma 4 -----------------------------------------------------------------------------------------------------

WINDOW, FULL = "sliding_attention", "full_attention"
# google/gemma-4-E2B's keys, with fewer layers
GEMMA4_E2B: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": {"hidden_size": 1024},
    "dtype": "bfloat16",
    "model_type": "gemma4",
    "text_config": {
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "layer_types": [WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL],
        "model_type": "gemma4_text",
        "num_attention_heads": 8,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "sliding_window": 512,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": True,
    },
}


def read_gemma4(directory: Path, **changes: Any) -> ModelConfig:
    return read(directory, GEMMA4_E2B | {"text_config": GEMMA4_E2B["text_config"] | changes})


def test_gemma4s_last_layers_read_the_keys_of_the_last_of_their_kind(tmp_path: Path) -> None:
    config = read_gemma4(tmp_path)
    assert [kind.kv_layer for kind in config.layers] == [None, None, None, 1, 1, 2]
    assert windows(config) == [512, 512, None, 512, 512, None]
    assert [kind.head_dim for kind in config.layers] == [256, 256, 512, 256, 256, 512]
    assert config.ffn_sizes == [6144] * 3 + [12288] * 3
    assert (config.per_layer_size, config.score_scale, config.logit_softcap, config.norm_offset) == (256, 1.0, 30.0, 0)
    assert config.layers[0].rope == Rope(10000.0)
    assert config.layers[2].rope == Rope(1e6, RopeScaling("proportional", proportion=0.25))


def test_gemma4s_global_layers_are_read_from_either_form(tmp_path: Path) -> None:
    """Values are keys there, of fewer heads: in Google's keys, and in those that transformers writes."""
    keys = {"attention_k_eq_v": True, "num_kv_shared_layers": 0, "num_key_value_heads": 4}
    google = read_gemma4(tmp_path, **keys, num_global_key_value_heads=2)
    assert [kind.num_kv_heads for kind in google.layers] == [4, 4, 2, 4, 4, 2]
    assert [kind.has_v_from_k for kind in google.layers] == [False, False, True, False, False, True]
    by_layer = {str(layer): {"head_dim": 512, "num_key_value_heads": 2} for layer in (2, 5)}
    assert read_gemma4(tmp_path, **keys, global_head_dim=None, per_layer_config=by_layer) == google


def test_gemma4s_unified_model_has_no_embeddings_of_layers(tmp_path: Path) -> None:
    text = {key: value for key, value in GEMMA4_E2B["text_config"].items() if key != "hidden_size_per_layer_input"}
    config = read(tmp_path, {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": text})
    assert (config.architecture, config.per_layer_size, config.max_position) == ("gemma4_unified", 0, 262144)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True, "num_experts": None}, "has no num_experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4: it must be less than"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input is 1000"),
        ({"rope_parameters": None}, "has no rope_parameters"),
    ],
)
def test_what_gemma4_would_compute_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_gemma4(tmp_path, **changes)


# --- Mistral -----------------------------------------------------------------------------------------------------


def test_mistrals_window_is_the_class_default_where_the_file_says_nothing(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL, max_position_embeddings=32768)
    assert (config.architecture, windows(config)) == ("mistral", [4096] * 4)
    assert read(tmp_path, SIZES | {"model_type": "mistral", "max_position_embeddings": 32768}) == config


@pytest.mark.parametrize("changes", [{"sliding_window": None}, {"sliding_window": 512}, {}])
def test_mistral_has_no_window_where_it_is_null_or_holds_every_position(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert windows(read(tmp_path, MISTRAL, **changes)) == [None] * 4


def test_mistral_with_windows_by_layer_is_another_class(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer_types is .*known: full_attention in every layer"):
        read(tmp_path, MISTRAL, layer_types=["full_attention", "sliding_attention"] * 2)


# --- Qwen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwens_window_is_off_unless_the_file_turns_it_on(tmp_path: Path, name: str) -> None:
    stated = {"architectures": [name], "sliding_window": 128}
    assert windows(read(tmp_path, QWEN2, **stated)) == [None] * 4
    on = read(tmp_path, QWEN2, **stated, use_sliding_window=True, max_window_layers=1)
    assert windows(on) == [None, 128, 128, 128]
    assert windows(read(tmp_path, QWEN2, **stated, use_sliding_window=True)) == [None] * 4  # from layer 28 on
    kinds = ["full_attention", "sliding_attention"] * 2
    by_layer = read(tmp_path, QWEN2, **stated, use_sliding_window=True, layer_types=kinds)
    assert windows(by_layer) == [None, 128, None, 128]
    assert by_layer.windowed == (False, True)


def test_qwen2_is_found_by_its_type_and_in_gguf(tmp_path: Path) -> None:
    assert read(tmp_path, SIZES | {"model_type": "qwen2"}).architecture == "qwen2"
    assert read_gguf(tmp_path, "qwen2").architecture == "qwen2"


def test_layer_types_are_one_for_each_layer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer_types is .*: it must be a list of num_hidden_layers \(4\) entries"):
        read(tmp_path, QWEN2, use_sliding_window=True, layer_types=["full_attention"])
    with pytest.raises(
        UnsupportedModelError, match=r"layer_types is .*known: a list of full_attention and sliding_att"
    ):
        read(tmp_path, QWEN2, use_sliding_window=True, layer_types=["chunked_attention"] * 4)


# --- Gemma 3 -----------------------------------------------------------------------------------------------------


def test_gemma3_4b_is_mostly_class_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3_4B)
    assert (config.architecture, config.activation, config.norm_offset) == ("gemma3", "gelu_tanh", 1.0)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position, config.tie_embeddings) == (262208, 131072, True)
    assert (config.window, config.windowed) == (1024, LOCAL_5_OF_6)
    assert (config.rope.theta, config.rope.scaling) == (1e6, RopeScaling("linear", 8.0))
    assert config.local_rope == Rope(10000.0)
    assert (config.dtype, config.score_scale) == ("bfloat16", None)  # 256 ** -0.5, which is head_dim ** -0.5
    assert read_generation_defaults(ModelFiles("hf", tmp_path, "tiny")).eos_ids == (1, 106)
    assert [kind.rope for kind in config.layers[4:6]] == [Rope(10000.0), Rope(1e6, RopeScaling("linear", 8.0))]


def test_gemma3s_three_ways_to_say_which_layers_are_local(tmp_path: Path) -> None:
    every_third = [128, 128, None, 128]
    assert windows(read(tmp_path, GEMMA3)) == [128] * 4  # each 6th is full
    assert windows(read(tmp_path, GEMMA3, sliding_window_pattern=3)) == every_third
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = read(tmp_path, GEMMA3, layer_types=kinds)
    assert windows(config) == every_third
    assert config.windowed == (True, True, False)
    assert windows(read(tmp_path, GEMMA3, layer_types=["full_attention"] * 4)) == [None] * 4


def test_gemma3s_ropes_are_in_either_place(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 2e6, "rope_local_base_freq": 5000.0, "rope_scaling": linear}
    config = read(tmp_path, GEMMA3, **old)
    assert (config.rope.theta, config.rope.scaling, config.local_rope) == (
        2e6,
        RopeScaling("linear", 8.0),
        Rope(5000.0),
    )
    new = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_theta": 2e6} | linear,
    }
    assert read(tmp_path, GEMMA3, rope_parameters=new) == config
    stretched = read(tmp_path, GEMMA3, rope_parameters=new, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert stretched.rope.scaling == RopeScaling("linear", 2.0)
    assert stretched.local_rope == Rope(5000.0)


def test_gemma3s_local_layers_keep_their_rope_in_a_window_of_all_positions(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3, sliding_window=512, sliding_window_pattern=2)
    assert [kind.rope for kind in config.layers[:2]] == [Rope(10000.0), Rope(1e6)]


def test_gemma3s_scale_and_softcap(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3, query_pre_attn_scalar=168, final_logit_softcapping=30.0)
    assert (config.score_scale, config.score_softcap, config.logit_softcap) == (168**-0.5, None, 30.0)
    assert read(tmp_path, GEMMA3).score_scale == 256**-0.5  # the class's default, of heads of 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'.*known: gelu_pytorch_tanh"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0.*known: null"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_gemma3_would_compute_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, GEMMA3, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": None}, "has no sliding_window: it must be a whole number"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0: it must be a whole number of at least 1"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0: it must be a number above 0"),
        ({"head_dim": 33}, "head_dim is 33: rotary embeddings need an even number"),
        ({"rope_parameters": {"sliding_attention": 3}}, "sliding_attention is 3: it must be an object"),
    ],
)
def test_gemma3s_values_that_make_no_sense_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, GEMMA3, **changes)


# --- GGUF --------------------------------------------------------------------------------------------------------


def test_gemma3_in_gguf_has_llama_cpps_pattern_and_local_rope(tmp_path: Path) -> None:
    keys = {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 1e6}
    config = read_gguf(tmp_path, "gemma3", layers=7, **keys, **{"attention.sliding_window": 128})
    assert (config.window, config.windowed, config.local_rope) == (128, LOCAL_5_OF_6, Rope(10000.0))
    assert (config.activation, config.norm_offset, config.score_scale) == ("gelu_tanh", 0.0, None)
    assert config.overflows_float16 and not read_gguf(tmp_path, "llama").overflows_float16
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    config = read_gguf(tmp_path, "gemma3", layers=7, **keys, **scaled, **{"attention.sliding_window": 128})
    assert config.layers[5].rope == Rope(1e6, RopeScaling("linear", 8.0))
    assert config.layers[6].rope == Rope(10000.0)


def test_a_llama_file_with_a_window_is_mistrals(tmp_path: Path) -> None:
    config = read_gguf(tmp_path, "llama", **{"attention.sliding_window": 128})
    assert (config.architecture, windows(config)) == ("llama", [128] * 4)
    assert windows(read_gguf(tmp_path, "llama", **{"attention.sliding_window": 512})) == [None] * 4


@pytest.mark.parametrize("pattern", [2, [True, False, True, False]])
def test_a_gguf_file_may_state_its_pattern(tmp_path: Path, pattern: Any) -> None:
    metadata: dict[str, Any] = {"attention.sliding_window": 128, "attention.sliding_window_pattern": pattern}
    assert windows(read_gguf(tmp_path, "gemma3", **metadata)) == [128, None, 128, None]


def test_gguf_means_another_scale_for_gemma3_27b(tmp_path: Path) -> None:
    assert read_gguf(tmp_path, "gemma3", layers=62).score_scale == (64 // 4) ** -0.5


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("qwen2", {"attention.sliding_window": 128}, r"qwen2\.attention\.sliding_window is 128.*known: 0"),
        ("llama", {"final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping is 30\.0.*known: 0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"gemma3\.attn_logit_softcapping is 50\.0.*known: 0"),
    ],
)
def test_gguf_settings_that_the_family_does_not_understand_are_refused(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf(tmp_path, architecture, **metadata)


def test_gguf_flags_are_one_for_each_layer(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"attention.sliding_window": 128, "attention.sliding_window_pattern": [True]}
    with pytest.raises(ModelError, match=r"sliding_window_pattern is .*one flag for each of 4 layers"):
        read_gguf(tmp_path, "gemma3", **metadata)
