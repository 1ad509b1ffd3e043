"""Both formats of a tiny model say the same: the same config, and the same weights under the same names. So GGUF gives
what the Hugging Face format gives, which test_tiny.py compares with transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.families.recipe import write_gguf, write_hf
from tests.families.recipes import RECIPES
from tinyvllm.arrays import to_float32
from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.registry import complete_config
from tinyvllm.model.rope import rope_table
from tinyvllm.model.weights.checkpoint import Checkpoint, open_checkpoint
from tinyvllm.storage.model_config import read_model_config

POSITIONS = 192


NUMBERS = ("norm_eps", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap")
OTHERS = ("num_layers", "hidden_size", "vocab_size", "max_position", "tie_embeddings", "activation", "ffn_sizes")


def check_config(found: ModelConfig, expected: ModelConfig) -> None:
    """What is not of a format, and not of a layer."""
    for name in OTHERS:
        assert getattr(found, name) == getattr(expected, name), name
    for name in NUMBERS:
        assert close(getattr(found, name), getattr(expected, name)), name
    assert {"out", "ffn"} & set(found.biases) == {"out", "ffn"} & set(expected.biases)


def check_layer(found: LayerKind, expected: LayerKind) -> None:
    same, other = (
        replace(
            kind,
            rope=None,
            score_scale=None,
            query_scaling=None,
            head_norm_eps=None,
            value_norm_eps=None,
            state=kind.state and replace(kind.state, norm_eps=0.0),
        )
        for kind in (found, expected)
    )
    assert same == other
    if found.state is not None and expected.state is not None:
        assert close(found.state.norm_eps, expected.state.norm_eps)
        return
    for name in ("scale", "head_norm_eps", "value_norm_eps"):
        assert close(getattr(found, name), getattr(expected, name)), name
    if found.rope is None or expected.rope is None:
        assert found.rope == expected.rope
        return
    assert found.rope.is_interleaved == expected.rope.is_interleaved
    np.testing.assert_allclose(
        rope_table(found.rope, found.head_dim, POSITIONS, found.query_scaling),
        rope_table(expected.rope, expected.head_dim, POSITIONS, expected.query_scaling),
        atol=2e-5,
    )


def close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found == expected
    return bool(found == pytest.approx(expected, rel=1e-6))


def values_of(checkpoint: Checkpoint, offset: float) -> dict[str, np.ndarray]:
    """Every tensor, norms with what is added to them."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        values = to_float32(tensor.read())
        is_norm = values.ndim == 1 and not name.endswith(".bias") and ".linear_attn." not in name
        found[name] = values + np.float32(offset) if is_norm else values
    return found


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.gguf_arch])
def test_gguf_says_what_the_hugging_face_format_says(tmp_path: Path, name: str) -> None:
    both = [write_gguf(tmp_path / "tiny.gguf", RECIPES[name]), write_hf(tmp_path / "tiny", RECIPES[name])]
    configs = [read_model_config(files) for files in both]
    check_config(*configs)
    layers = [complete_config(config).layers for config in configs]
    for found, expected in zip(*layers, strict=True):
        check_layer(found, expected)
    found, expected = (
        values_of(open_checkpoint(files, config), config.norm_offset)
        for files, config in zip(both, configs, strict=True)
    )
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-6, err_msg=key)
