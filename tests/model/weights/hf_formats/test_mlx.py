"""MLX's directories: exactly the values that MLX gives the same tensors (data/mlx.safetensors, by write_mlx.py)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import write_json
from tests.model.weights.hf_formats.write_mlx import CASES, COLS, DATA, ROWS
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.hf_formats import assemble_matrices
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import StoredTensor


def open_cases(directory: Path, **changes: Any) -> dict[str, StoredTensor]:
    """Every case a module of one directory, with settings under its own path."""
    shutil.copy(DATA, directory / "model.safetensors")
    quantization = {"group_size": 64, "bits": 4} | CASES | changes
    write_json(directory / "config.json", {"quantization": quantization, "quantization_config": quantization})
    return assemble_matrices(directory, read_safetensors(directory))


def test_values_are_mlx_s(tmp_path: Path) -> None:
    tensors = open_cases(tmp_path)
    for name, case in CASES.items():
        stored, expected = tensors[f"{name}.weight"], tensors[f"{name}.expected"].read()
        matrix = stored.read()
        assert isinstance(matrix, QuantizedMatrix), name
        assert (
            stored.format_name == matrix.format.name == case.get("mode", f"mlx-{case['bits']}bit-g{case['group_size']}")
        )
        assert stored.shape == matrix.shape == (ROWS, COLS)
        np.testing.assert_array_equal(to_float32(matrix), expected, err_msg=name)
    assert len(tensors) == 2 * len(CASES), "scales and biases are left over"


def test_scales_of_both_signs_and_of_each_dtype_are_covered(tmp_path: Path) -> None:
    matrices = [
        tensor.read()
        for name, tensor in open_cases(tmp_path).items()
        if name.startswith("affine") and name.endswith(".weight")
    ]
    found = {
        (str(matrix.scale.base.dtype), bool((matrix.scale.base < 0).any()))
        for matrix in matrices
        if isinstance(matrix, QuantizedMatrix)
    }
    assert found >= {(dtype, True) for dtype in ("float32", "float16", "bfloat16")}


def test_settings_for_all_modules_are_used_where_a_module_has_none(tmp_path: Path) -> None:
    name = "affine4_g64_" + next(name for name in CASES if name.startswith("affine4_g64")).rpartition("_")[2]
    for own in (None, True, {"bits": 4}):
        assert open_cases(tmp_path, **{name: own})[f"{name}.weight"].format_name == "mlx-4bit-g64"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 8}, WeightMismatchError, r"affine4_g64_\w+\.scales has shape \(4, 4\), but 8 bits in groups of 64"),
        ({"bits": 7}, UnsupportedModelError, r"bits is 7, .*known: 1, 2, 3, 4, 5, 6, 8"),
        ({"group_size": 48}, UnsupportedModelError, r"group_size is 48, .*known: 32, 64, 128"),
        ({"mode": "nf4"}, UnsupportedModelError, r"mode is 'nf4', .*known: affine, mxfp4"),
        ({"mode": "mxfp4"}, UnsupportedModelError, r"4 bits in groups of 64: mxfp4 has 4 bits in groups of 32"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = next(name for name in CASES if name.startswith("affine4_g64"))
    with pytest.raises(error, match=message):
        open_cases(tmp_path, **{name: {"bits": 4, "group_size": 64} | settings})


def test_missing_biases_are_named(tmp_path: Path) -> None:
    open_cases(tmp_path)
    tensors = read_safetensors(tmp_path)
    name = next(name for name in CASES if name.startswith("affine"))
    del tensors[f"{name}.biases"]
    with pytest.raises(WeightMismatchError, match=rf"has {name}\.scales, .* but no {name}\.biases"):
        assemble_matrices(tmp_path, tensors)
