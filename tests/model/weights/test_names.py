"""Tensors' names and rotary order, family by family, against the gguf package's own map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.builders import GGUFTweaks, interleave_rotary_rows, write_tiny_gguf
from tinyvllm.arrays import to_float32
from tinyvllm.model.weights.checkpoint import language_model_tensors, open_checkpoint
from tinyvllm.model.weights.gguf import canonical_name
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.model_config import read_model_config

LAYER = ("input_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
NORMS = {
    "llama": ("post_attention_layernorm",),
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm", *HEAD_NORMS),
    "gemma3": (
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        *HEAD_NORMS,
    ),
}


@pytest.mark.parametrize("architecture", NORMS)
def test_llama_cpps_names_become_hugging_faces(architecture: str) -> None:
    """llama.cpp's converter uses this map of the gguf package."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 4)
    parts = [*LAYER, *ATTENTION, *NORMS[architecture]]
    expected = [f"model.layers.3.{part}.weight" for part in parts]
    expected += [f"model.layers.3.self_attn.{part}_proj.bias" for part in "qkv"]
    expected += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for name in expected:
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is not None:  # gemma3's head is always its embedding
            assert canonical_name(gguf_name, architecture) == name


def test_biases_of_a_family_with_interleaved_pairs_are_reordered(tmp_path: Path) -> None:
    bias = np.arange(64, dtype=np.float32)
    shuffled = interleave_rotary_rows(bias[:, None], 16)[:, 0]
    tweaks = GGUFTweaks(extra={"blk.0.attn_q.bias": shuffled})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="F32", tweaks=tweaks)
    config = read_model_config(files)
    name = "model.layers.0.self_attn.q_proj.bias"
    np.testing.assert_array_equal(to_float32(open_checkpoint(files, config).take(name, (64,))), bias)
    other = open_checkpoint(files, replace(config, architecture="qwen2"))
    np.testing.assert_array_equal(to_float32(other.take(name, (64,))), shuffled)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.vision_tower.encoder.weight", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.other.weight", "model.other.weight"),  # stays, to be refused as a surplus
    ],
)
def test_the_text_part_of_a_model_with_a_vision_tower(stored: str, name: str | None) -> None:
    tensor = StoredTensor((1,), lambda: np.zeros(1), "float32", 4)
    assert language_model_tensors({stored: tensor}, "gemma3") == ({} if name is None else {name: tensor})
    assert language_model_tensors({stored: tensor}, "llama") == {stored: tensor}
