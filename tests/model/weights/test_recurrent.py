"""Tensors of recurrent layers are those of Hugging Face's Qwen3.5, whichever format stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.builders import random_rows, write_json, write_safetensors
from tests.families.recipe import Recipe, make_weights, write_gguf, write_hf
from tests.families.recipes.qwen3_5 import RECIPES, mlx_tensors
from tinyvllm.arrays import to_float32
from tinyvllm.config import ModelFiles, StateKind
from tinyvllm.errors import WeightMismatchError
from tinyvllm.model.dry_load import require_tensors
from tinyvllm.model.registry import complete_config
from tinyvllm.model.weights.checkpoint import open_checkpoint, unread_lines
from tinyvllm.model.weights.quant import decompose
from tinyvllm.model.weights.recurrent import from_hf, take_col_blocks
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.families.delta_net import UNREAD
from tinyvllm.storage.model_config import read_model_config

DENSE = RECIPES["qwen3_5"]


def values(files: ModelFiles) -> dict[str, np.ndarray]:
    """Every tensor of the model, whose files must have each that it takes and no other."""
    config = complete_config(read_model_config(files))
    require_tensors(config, open_checkpoint(files, config))
    checkpoint = open_checkpoint(files, config)
    return {name: to_float32(tensor.read()) for name, tensor in checkpoint.tensors.items()}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def test_mlx_adds_one_to_norms_and_moves_the_taps_of_convolutions(tmp_path: Path) -> None:
    expected = values(write_hf(tmp_path / "hf", DENSE))

    check_equal(values(write_hf(tmp_path / "mlx", DENSE, transform=mlx_tensors)), expected)


def test_the_vision_tower_and_the_layers_that_draft_are_left_out(tmp_path: Path) -> None:
    expected = values(write_hf(tmp_path / "tiny", DENSE))
    text = dict(DENSE.config) | {"dtype": "float32"}
    write_json(
        tmp_path / "tiny/config.json",
        {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text},
    )
    weights = {name.replace("model.", "model.language_model.", 1): w for name, w in make_weights(DENSE).items()}
    weights |= {name: np.ones((4, 32), np.float32) for name in ("model.visual.merger.norm.weight", "mtp.fc.weight")}
    write_safetensors(tmp_path / "tiny/model.safetensors", weights)
    check_equal(values(ModelFiles("hf", tmp_path / "tiny", "tiny")), expected)
    assert unread_lines(read_safetensors(tmp_path / "tiny"), UNREAD) == [
        "visual: 1 tensors, 0.0 GB not loaded: this model runs text only",
        "mtp: 1 tensors, 0.0 GB not loaded: method mtp of --speculative-config is off",
    ]


def test_gguf_files_have_the_layers_that_draft_after_the_models_own(tmp_path: Path) -> None:
    expected = values(write_gguf(tmp_path / "tiny.gguf", DENSE))
    layers = DENSE.config["num_hidden_layers"]
    more = {f"blk.{layers}.{name}.weight": np.ones((4, 32), np.float32) for name in ("attn_q", "nextn.eh_proj")}
    drafting = replace(DENSE, gguf_keys=dict(DENSE.gguf_keys) | {"nextn_predict_layers": 1}, gguf_more=more)
    files = write_gguf(tmp_path / "drafting.gguf", with_layers(drafting, layers + 1))
    check_equal(values(files), expected)


def with_layers(recipe: Recipe, count: int) -> Recipe:
    """The same file, but for the number of layers that it states."""
    tensors, weights = recipe.gguf_tensors, make_weights(recipe)
    assert tensors is not None
    config = dict(recipe.config) | {"num_hidden_layers": count}
    return replace(recipe, config=config, gguf_tensors=lambda _: tensors(weights))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blk.0.ssm_conv1d.weight", lambda conv: conv[:, :3], r"conv1d.weight has shape \(256, 3\), .* \(256, 1, 4\)"),
        ("blk.0.ssm_a", np.negative, r"tiny.gguf: tensor .*A_log has the value .*: GGUF files hold -exp\(A_log\)"),
    ],
)
def test_gguf_tensors_that_make_no_sense_are_named(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    def changed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert DENSE.gguf_tensors is not None
        found = DENSE.gguf_tensors(weights)
        return found | {name: np.ascontiguousarray(change(found[name]))}

    files = write_gguf(tmp_path / "tiny.gguf", replace(DENSE, gguf_tensors=changed))
    with pytest.raises(WeightMismatchError, match=message):
        values(files)


def test_fused_projections_of_another_size_are_named() -> None:
    kind = StateKind(num_heads=6, num_key_heads=2, key_dim=4, value_dim=8, conv_width=4, norm_eps=1e-6)
    tensor = StoredTensor((111, 64), lambda: np.zeros((111, 64), np.float32), "float32", 0)
    message = r"in_proj_qkvz\.weight has shape \(111, 64\), .* ask for 112 rows: 2 heads"
    with pytest.raises(WeightMismatchError, match=message):
        from_hf(Path("tiny"), {"model.layers.0.linear_attn.in_proj_qkvz.weight": tensor}, kind)


def test_fused_projections_are_split_by_key_heads() -> None:
    """As transformers' Qwen3NextGatedDeltaNet.fix_query_key_value_ordering takes their products apart."""
    kind = StateKind(num_heads=6, num_key_heads=2, key_dim=4, value_dim=8, conv_width=4, norm_eps=1e-6)
    rows = np.arange(2 * (2 * 4 + 2 * 3 * 8)).reshape(2, -1)
    q, k, v, z = (part.reshape(-1) for part in np.split(rows, [4, 8, 32], axis=1))
    b, a = (part.reshape(-1) for part in np.split(np.arange(12).reshape(2, 6), 2, axis=1))
    expected = {"in_proj_qkv": np.concatenate([q, k, v]), "in_proj_z": z, "in_proj_b": b, "in_proj_a": a}

    def column(count: int) -> StoredTensor:
        matrix = np.arange(count, dtype=np.float32).reshape(-1, 1)
        return StoredTensor(matrix.shape, lambda: matrix, "float32", matrix.nbytes)

    prefix = "model.layers.0.linear_attn."
    fused = {f"{prefix}in_proj_qkvz.weight": column(112), f"{prefix}in_proj_ba.weight": column(12)}
    found = from_hf(Path("tiny"), fused, kind)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        f"{prefix}{name}.weight": (len(index), 1) for name, index in expected.items()
    }
    for name, index in expected.items():
        np.testing.assert_array_equal(to_float32(found[f"{prefix}{name}.weight"].read())[:, 0], index)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XS", "IQ1_S", "MXFP4"])
def test_columns_of_quantized_matrices_keep_their_values_in_another_order(kind: str) -> None:
    """Of K quants' 256 columns, each half is a head's; of other blocks, a whole number."""
    width, order = 128, np.array([2, 0, 3, 1])
    raw = random_rows(np.random.default_rng(0), kind, 8, 4 * width)
    matrix = decompose(kind, raw, (8, 4 * width))
    expected = to_float32(matrix).reshape(8, 4, width)[:, order].reshape(8, -1)
    moved = take_col_blocks(matrix, order, width)
    assert not isinstance(moved, np.ndarray) and moved.format.bits == matrix.format.bits
    np.testing.assert_array_equal(to_float32(moved), expected)


def test_columns_of_heads_that_share_a_group_become_float16() -> None:
    matrix = decompose("Q8_0", random_rows(np.random.default_rng(0), "Q8_0", 4, 64), (4, 64))
    moved = take_col_blocks(matrix, np.array([1, 0, 3, 2]), 16)
    expected = to_float32(matrix).reshape(4, 4, 16)[:, [1, 0, 3, 2]].reshape(4, -1)
    assert isinstance(moved, np.ndarray) and moved.dtype == np.float16
    np.testing.assert_allclose(moved, expected, rtol=1e-3)
