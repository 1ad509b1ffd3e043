"""Which tensor gets which ggml type: as in files that llama.cpp's llama-quantize wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinyvllm.convert.ggml_types import MIXTURES, ModelFacts, choose_type
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.resolve import installed_path, models_dir

LLAMA_8B = ModelFacts("llama", 32, 32, 8, has_head=True)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def types(part: str, mixture: str, facts: ModelFacts = LLAMA_8B, columns: int = 4096) -> list[str]:
    """Of a part in each layer."""
    names = [f"blk.{layer}.{part}.weight" for layer in range(facts.num_layers)]
    return [choose_type(name, (64, columns), MIXTURES[mixture], facts, "F16") for name in names]


def test_q4_k_m_gives_more_bits_to_the_ends_and_to_every_third_layer() -> None:
    expected = [4 if i >= 4 and i < 28 and (i - 4) % 3 != 2 else 6 for i in range(32)]
    assert types("attn_v", "q4_k_m") == types("ffn_down", "q4_k_m") == [f"Q{bits}_K" for bits in expected]
    assert set(types("attn_q", "q4_k_m")) == {"Q4_K"} and set(types("attn_qkv", "q4_k_m")) == {"Q5_K"}


def test_q4_k_s_gives_more_bits_to_the_first_layers() -> None:
    assert types("attn_v", "q4_k_s") == types("ffn_down", "q4_k_s") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert set(types("attn_v", "q5_k_s")) == {"Q5_K"}


def test_iq4_nl_gives_more_bits_where_few_keys_serve_many_queries() -> None:
    assert set(types("attn_v", "iq4_nl")) == {"Q5_K"} and types("ffn_down", "iq4_nl")[3:5] == ["Q5_K", "IQ4_NL"]


def test_70b_has_larger_values() -> None:
    facts = ModelFacts("llama", 80, 64, 8, has_head=True)
    assert set(types("attn_v", "q4_k_m", facts)) == {"Q5_K", "Q6_K"}


def test_the_head_is_the_embedding_if_there_is_no_other() -> None:
    tied = ModelFacts("llama", 32, 32, 8, has_head=False)
    for facts, embedding in ((LLAMA_8B, "Q4_K"), (tied, "Q6_K")):
        assert choose_type(EMBEDDING, (9, 256), MIXTURES["q4_k_m"], facts, "F16") == embedding
    assert choose_type(HEAD, (9, 256), MIXTURES["q4_0"], LLAMA_8B, "F16") == "Q6_K"
    assert choose_type(HEAD, (9, 256), MIXTURES["q8_0"], LLAMA_8B, "F16") == "Q8_0"


def test_rows_that_are_not_whole_blocks_take_another_type() -> None:
    assert set(types("attn_q", "q4_k", columns=576)) == {"Q5_0"} and set(types("attn_q", "q5_k", columns=576)) == {
        "Q5_1"
    }
    assert set(types("attn_q", "q6_k", columns=576)) == {"Q8_0"} and set(types("attn_q", "q4_0", columns=40)) == {"F16"}


def test_convolutions_of_recurrent_layers_stay_in_float32() -> None:
    """ggml_ssm_conv reads no other type."""
    for part in ("ssm_conv1d", "shortconv.conv"):
        assert set(types(part, "q8_0", columns=4)) == set(types(part, "f16", columns=4)) == {"F32"}


def test_norms_and_small_matrices_are_not_quantized() -> None:
    mixture = MIXTURES["q4_k_m"]
    assert choose_type("blk.0.attn_norm.weight", (64,), mixture, LLAMA_8B, "BF16") == "F32"
    assert choose_type("per_layer_model_proj.weight", (64, 256), mixture, LLAMA_8B, "BF16") == "BF16"
    assert choose_type("per_layer_model_proj.weight", (64, 256), MIXTURES["f32"], LLAMA_8B, "BF16") == "F32"


@pytest.mark.model
def test_a_real_q4_k_m_file_has_these_types() -> None:
    """Gemma 3 270M, which others quantized with llama.cpp."""
    directory = Path(os.environ["TINYVLLM_MODELS"]) if "TINYVLLM_MODELS" in os.environ else models_dir()
    file = GGUFFile(installed_path("gemma-3-270m", directory))
    facts = ModelFacts("gemma3", 18, 4, 1, has_head=False)
    for name, tensor in file.tensors.items():
        assert choose_type(name, tensor.shape, MIXTURES["q4_k_m"], facts, "F16") == tensor.ggml_type, name
