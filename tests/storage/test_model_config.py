"""ModelConfig and GenerationDefaults from both formats, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import (
    ENDOFTEXT_ID,
    IM_END_ID,
    LLAMA3_SCALING,
    GGUFTweaks,
    TinyLlama,
    hf_config,
    rope_divisors,
    write_tiny_gguf,
    write_tiny_hf_llama,
)
from tinyvllm.config import GenerationDefaults, ModelFiles, RopeScaling
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config

ODD_HEADS = {"hidden": 96, "heads": 4, "kv_heads": 1, "head_dim": 32}  # head_dim is not hidden / heads
REMOVED = object()


def hf_files(directory: Path, numbers: dict[str, Any] | None = None, **changes: Any) -> ModelFiles:
    """A directory with config.json alone, whose keys `changes` sets or removes."""
    config = hf_config(TinyLlama(**(numbers or {}))) | changes
    config = {key: value for key, value in config.items() if value is not REMOVED}
    (directory / "config.json").write_text(json.dumps(config))
    return ModelFiles("hf", directory, "tiny")


def gguf_files(directory: Path, **metadata: Any) -> ModelFiles:
    """A file with further or changed metadata."""
    prefixed = {f"llama.{key}" if "general" not in key else key: value for key, value in metadata.items()}
    return write_tiny_gguf(directory / "tiny.gguf", quant="F32", tweaks=GGUFTweaks(metadata=prefixed))


# --- both formats ------------------------------------------------------------------------------------------------


QWEN3 = {"family": "qwen3", "head_dim": 32, "norm_eps": 1e-6}


@pytest.mark.parametrize(
    "numbers", [{}, {"tie": False, "layers": 3}, ODD_HEADS, {"rope_theta": 5e5, "vocab": 300}, QWEN3]
)
def test_both_formats_tell_the_same(tmp_path: Path, numbers: Any) -> None:
    hf = read_model_config(write_tiny_hf_llama(tmp_path / "tiny", **numbers))
    gguf = read_model_config(write_tiny_gguf(tmp_path / "tiny.gguf", quant="F32", **numbers))
    assert gguf.norm_eps == pytest.approx(hf.norm_eps)  # GGUF holds it in float32
    assert {**vars(gguf), "norm_eps": 0} == {**vars(hf), "norm_eps": 0}
    model = TinyLlama(**numbers)
    assert (hf.architecture, hf.name) == (model.family, "tiny")
    assert (hf.num_layers, hf.hidden_size, hf.ffn_size) == (model.layers, model.hidden, model.ffn)
    assert (hf.num_heads, hf.num_kv_heads, hf.head_dim) == (model.heads, model.kv_heads, model.head_dim)
    assert (hf.vocab_size, hf.max_position, hf.rope.theta) == (model.vocab, model.max_position, model.rope_theta)
    assert hf.tie_embeddings == model.tie


def test_linear_scaling_is_read_from_both(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    hf = read_model_config(write_tiny_hf_llama(tmp_path / "tiny", rope_scaling=scaling))
    gguf = read_model_config(write_tiny_gguf(tmp_path / "tiny.gguf", rope_scaling=scaling))
    assert hf.rope.scaling == gguf.rope.scaling == RopeScaling("linear", 2.0)


def test_llama3_scaling_is_numbers_in_one_and_divisors_in_the_other(tmp_path: Path) -> None:
    hf = read_model_config(write_tiny_hf_llama(tmp_path / "tiny", rope_scaling=LLAMA3_SCALING))
    gguf = read_model_config(write_tiny_gguf(tmp_path / "tiny.gguf", rope_scaling=LLAMA3_SCALING))
    assert hf.rope.scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    assert hf.rope.divisors is None
    assert gguf.rope.scaling is None
    np.testing.assert_array_equal(gguf.rope.divisors, rope_divisors(TinyLlama(rope_scaling=LLAMA3_SCALING)))


def test_every_end_of_an_answer_is_known(tmp_path: Path) -> None:
    hf = write_tiny_hf_llama(tmp_path / "tiny")
    assert read_generation_defaults(hf).eos_ids == (IM_END_ID, ENDOFTEXT_ID)
    tweaks = GGUFTweaks(
        metadata={"tokenizer.ggml.eot_token_id": ENDOFTEXT_ID, "tokenizer.ggml.eom_token_id": IM_END_ID}
    )
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", tweaks=tweaks)
    assert read_generation_defaults(gguf).eos_ids == (IM_END_ID, ENDOFTEXT_ID)


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    files = hf_files(tmp_path, eos_token_id=[7, 8])
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": None, "eos_token_id": 8}
            | {"repetition_penalty": 1.1, "typical_p": 0.95}
        )
    )
    assert read_generation_defaults(files) == GenerationDefaults(0.6, 0.9, 40, None, (8, 7), 1.1, 0.95)
    metadata = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.min_p": 0.25}
    gguf = gguf_files(tmp_path, **metadata, **{"general.sampling.penalty_repeat": 1.25})
    assert read_generation_defaults(gguf) == GenerationDefaults(0.5, None, 20, 0.25, (IM_END_ID,), 1.25)


def test_without_a_generation_config_the_end_comes_from_config(tmp_path: Path) -> None:
    assert read_generation_defaults(hf_files(tmp_path, eos_token_id=[7, 8])) == GenerationDefaults(eos_ids=(7, 8))


# --- Hugging Face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3_SCALING])
def test_rope_may_be_in_its_old_or_its_new_place(tmp_path: Path, scaling: Any) -> None:
    old = read_model_config(hf_files(tmp_path, rope_theta=7000.0, rope_scaling=scaling))
    parameters = {"rope_theta": 7000.0, **(scaling or {"rope_type": "default"})}
    new = read_model_config(hf_files(tmp_path, rope_theta=REMOVED, rope_scaling=REMOVED, rope_parameters=parameters))
    assert old == new
    assert new.rope.theta == 7000.0


def test_rope_type_has_an_older_name(tmp_path: Path) -> None:
    config = read_model_config(hf_files(tmp_path, rope_scaling={"type": "linear", "factor": 4}))
    assert config.rope.scaling == RopeScaling("linear", 4.0)


def test_defaults_are_transformers_own(tmp_path: Path) -> None:
    absent = ("rope_theta", "rope_scaling", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    changes: dict[str, Any] = dict.fromkeys((*absent, "torch_dtype"), REMOVED)
    config = read_model_config(hf_files(tmp_path, **changes))
    assert (config.rope.theta, config.head_dim, config.num_kv_heads) == (10000.0, 16, 4)
    assert (config.norm_eps, config.tie_embeddings, config.dtype) == (1e-6, False, "float32")


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    """As Qwen's files have it; `layer_types` says the same."""
    switched_off = {"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 1}
    config = read_model_config(hf_files(tmp_path, QWEN3, layer_types=["full_attention"] * 2, **switched_off))
    assert config == read_model_config(hf_files(tmp_path, QWEN3))


def test_qwen3_is_found_by_its_type_too(tmp_path: Path) -> None:
    assert read_model_config(hf_files(tmp_path, QWEN3, architectures=REMOVED)).architecture == "qwen3"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_may_have_either_name(tmp_path: Path, key: str) -> None:
    changes: dict[str, Any] = {"torch_dtype": REMOVED} | {key: "bfloat16"}
    files = hf_files(tmp_path, **changes)
    assert read_model_config(files).dtype == "bfloat16"


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_quantized_layers_run_in_float16(tmp_path: Path, key: str) -> None:
    """As from GGUF: MLX's directories are in bfloat16, for which the kernels of quantized matrices are slower."""
    settings: dict[str, Any] = {key: {"group_size": 64, "bits": 4}}
    assert read_model_config(hf_files(tmp_path, torch_dtype="bfloat16", **settings)).dtype == "float16"
    assert read_model_config(hf_files(tmp_path, torch_dtype="float32", **settings)).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen9ForCausalLM"]}, r"architectures is \['Qwen9ForCausalLM'\].*known: LlamaForCausalLM"),
        ({"architectures": REMOVED, "model_type": "bert"}, r"model_type is 'bert'.*known: llama, mistral"),
        (
            {"rope_scaling": {"rope_type": "xpos", "factor": 2.0}},
            r"rope_type is 'xpos'.*known: default, linear, llama3, yarn, longrope, proportional",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            r"rope_type is 'dynamic'.*known: default",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"type is 'dynamic'.*known: default, linear, llama3"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'.*known: silu"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({"rope_parameters": {"full_attention": {}}}, r"rope_parameters is .*known: the same for every layer"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, r"attention_bias is True.*known: false"),
        ({"architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}, r"mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"sliding_window": 128}, r"sliding_window is 128.*known: null"),
        ({"sliding_window": 128, "use_sliding_window": True}, r"sliding_window is 128.*known: null"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types is \['full_attention', 'sliding_attention'\].*known: full_attention in every layer",
        ),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, r"'Qwen2MoeForCausalLM'.*known: .*Qwen3ForCausalLM"),
        ({"torch_dtype": "float64"}, r"torch_dtype is 'float64'.*known: float32, float16, bfloat16"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_model_config(hf_files(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": REMOVED}, "has no hidden_size: it must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be a whole number of at least 1"),
        ({"intermediate_size": "96"}, "intermediate_size is '96'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"head_dim": REMOVED, "hidden_size": 65}, r"hidden_size is 65: .*multiple of num_attention_heads \(4\)"),
        ({"head_dim": 15}, "head_dim is 15: rotary embeddings need an even number"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3: .*divisor of num_attention_heads \(4\)"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0: it must be a number above 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no rope_scaling.factor"),
        (
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            "low_freq_factor is 1.0: .*below high_freq_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': it must be an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': it must be true or false"),
    ],
)
def test_values_that_make_no_sense_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_model_config(hf_files(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot read"), ("[1]", "holds a list, but must hold a JSON object")]
)
def test_damaged_json_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_model_config(ModelFiles("hf", tmp_path, "tiny"))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_end_ids_that_are_no_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"eos_token_id is \['</s>'\]: it must be a token id or a list of them"):
        read_generation_defaults(hf_files(tmp_path, eos_token_id=["</s>"]))


# --- GGUF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_1", "float16")]
)
def test_dtype_is_that_of_the_unquantized_matrices(tmp_path: Path, quant: str, dtype: str) -> None:
    assert read_model_config(write_tiny_gguf(tmp_path / "tiny.gguf", quant=quant)).dtype == dtype


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "ntk"}, r"llama\.rope\.scaling\.type is 'ntk'.*known: none, linear, yarn, longrope"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
            r"llama\.rope\.scaling\.yarn_ext_factor is 0\.5.*known: 1",
        ),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8.*known: 16"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length is 8.*known: 16"),
    ],
)
def test_gguf_variants_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_model_config(gguf_files(tmp_path, **metadata))


def test_unknown_gguf_architecture_lists_the_known(tmp_path: Path) -> None:
    path = gguf_files(tmp_path).path
    content = path.read_bytes()
    assert content.count(b"\x05\0\0\0\0\0\0\0llama") == 1  # the value of general.architecture
    path.write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"))
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture is 'gemma'.*known: llama"):
        read_model_config(ModelFiles("gguf", path, "tiny"))


def test_gguf_without_an_embedding_is_refused(tmp_path: Path) -> None:
    files = write_tiny_gguf(tmp_path / "tiny.gguf", tweaks=GGUFTweaks(drop=("token_embd.weight",)))
    with pytest.raises(ModelError, match=r"has no matrix token_embd\.weight"):
        read_model_config(files)


def test_misshapen_divisors_are_refused(tmp_path: Path) -> None:
    tweaks = GGUFTweaks(extra={"rope_freqs.weight": np.ones(5)})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", tweaks=tweaks)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is F32 of shape \(5,\), not F32 of \(8,\)"):
        read_model_config(files)
