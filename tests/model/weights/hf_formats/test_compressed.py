"""compressed-tensors', bitsandbytes' and gpt-oss's matrices: exactly the values that their own code gives
(data/compressed.safetensors, by write_compressed.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.model.weights.hf_formats.directory import assemble, check
from tests.model.weights.hf_formats.write_compressed import BNB_CASES, CASES, COLS, DATA, ROWS, WIDE_COLS
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import StoredTensor

SETTINGS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CASES["fp8_block"][1]}},
}
BNB_SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def values_of(stored: StoredTensor) -> np.ndarray:
    values = stored.read()
    assert isinstance(values, np.ndarray)
    return values


def test_values_are_compressed_tensors(tmp_path: Path) -> None:
    names = tuple(f"{name}." for name in CASES)
    tensors = assemble(tmp_path, SETTINGS, DATA, names)
    assert len(tensors) == 2 * len(CASES), sorted(tensors)
    for name, (_, _, ours) in CASES.items():
        stored, expected = tensors[f"{name}.weight"], values_of(tensors[f"{name}.expected"])
        if name == "nvfp4":  # its scales are divided by the global one there, and multiplied by its reciprocal here
            assert stored.format_name == ours
            np.testing.assert_allclose(to_float32(stored.read()), expected, rtol=2**-23)
        else:
            check(stored, ours, expected)


def test_values_are_bitsandbytes(tmp_path: Path) -> None:
    tensors = assemble(tmp_path, BNB_SETTINGS, DATA, tuple(f"{name}." for name in BNB_CASES))
    assert len(tensors) == 2 * len(BNB_CASES), sorted(tensors)
    for name in ("nf4", "nf4_nested", "fp4_nested"):
        check(tensors[f"{name}.weight"], name[:3], values_of(tensors[f"{name}.expected"]))


def test_codes_of_bitsandbytes_may_be_stored_as_wider_values(tmp_path: Path) -> None:
    plain = assemble(tmp_path / "plain", BNB_SETTINGS, DATA, ("nf4.",))
    parts = {
        name: values_of(tensor) for name, tensor in read_safetensors(tmp_path / "plain").items() if name[:4] == "nf4."
    }
    parts["nf4.weight"] = parts["nf4.weight"].reshape(-1).view(bfloat16)
    stored = assemble(tmp_path / "wide", BNB_SETTINGS, parts)["nf4.weight"]
    check(stored, "nf4", values_of(plain["nf4.expected"]))


def test_blocks_that_go_on_in_the_next_row_are_converted(tmp_path: Path) -> None:
    tensors = assemble(tmp_path, BNB_SETTINGS, DATA, ("nf4_wide.",))
    stored = tensors["nf4_wide.weight"]
    assert (stored.format_name, stored.is_converted, stored.shape) == ("nf4", True, (ROWS, WIDE_COLS))
    expected = values_of(tensors["nf4_wide.expected"])
    np.testing.assert_array_equal(values_of(stored), expected.astype(np.float16))


def test_values_of_experts_in_mxfp4_are_transformers(tmp_path: Path) -> None:
    tensors = assemble(tmp_path, {"quant_method": "mxfp4"}, DATA, ("experts.",))
    check(tensors["experts.up"], "mxfp4", values_of(tensors["experts.expected"]))


def test_zeros_in_the_middle_take_no_memory(tmp_path: Path) -> None:
    tensors = assemble(tmp_path, SETTINGS, DATA, ("w4_",))
    matrices = {name: tensors[f"{name}.weight"].read() for name in ("w4_g128", "w4_g128_zeros")}
    for name, has_minimum in {"w4_g128": False, "w4_g128_zeros": True}.items():
        matrix = matrices[name]
        assert isinstance(matrix, QuantizedMatrix)
        assert (matrix.minimum is not None) == has_minimum


def test_activation_order_is_refused_with_the_remedy(tmp_path: Path) -> None:
    packed = {
        "a.weight_packed": np.zeros((8, COLS // 8), np.int32),
        "a.weight_scale": np.ones((8, 2), np.float32),
        "a.weight_shape": np.array([8, COLS]),
        "a.weight_g_idx": np.arange(COLS, dtype=np.int32) // 128,
    }
    assert assemble(tmp_path, SETTINGS, packed)["a.weight"].format_name == "w4a16-g128"
    packed["a.weight_g_idx"] = packed["a.weight_g_idx"][::-1]
    with pytest.raises(UnsupportedModelError, match=r"a was quantized in activation order .*take a file"):
        assemble(tmp_path, SETTINGS, packed)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_scale": None}, WeightMismatchError, r"has a\.weight_packed, .* but no a\.weight_scale"),
        ({"weight_scale": np.ones((8, 3), np.float32)}, WeightMismatchError, r"a\.weight_scale has shape \(8, 3\)"),
        ({"weight_scale": np.ones((2, 8, 2), np.float32)}, WeightMismatchError, r"weight_scale has shape \(2, 8, 2\)"),
        ({"weight_shape": np.array([8, 250])}, UnsupportedModelError, r"a packs 250 columns in 32 words of 32 bits"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    parts = {
        "weight_packed": np.zeros((8, COLS // 8), np.int32),
        "weight_scale": np.ones((8, 2), np.float32),
        "weight_shape": np.array([8, COLS]),
    } | changes
    tensors = {f"a.{end}": values for end, values in parts.items() if values is not None}
    with pytest.raises(error, match=message):
        assemble(tmp_path, SETTINGS, tensors)
