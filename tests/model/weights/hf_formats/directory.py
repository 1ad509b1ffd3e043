"""Builder: what a directory with these settings and tensors gives."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.builders import write_json
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.model.weights.hf_formats import assemble_matrices
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import StoredTensor


def assemble(
    directory: Path,
    settings: Mapping[str, Any] | None,
    tensors: Path | Mapping[str, np.ndarray],
    names: tuple[str, ...] = ("",),
) -> dict[str, StoredTensor]:
    """`settings`: quantization_config, if any. `names`: beginnings of the names of the tensors that are there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors"
    if isinstance(tensors, Path):
        shutil.copy(tensors, path)
    else:
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    write_json(directory / "config.json", {} if settings is None else {"quantization_config": settings})
    return assemble_matrices(
        directory, {name: tensor for name, tensor in read_safetensors(directory).items() if name.startswith(names)}
    )


def check(stored: StoredTensor, name: str, expected: np.ndarray) -> QuantizedMatrix:
    """A matrix that stays packed, of exactly these values."""
    matrix = stored.read()
    assert isinstance(matrix, QuantizedMatrix)
    assert stored.format_name == matrix.format.name == name
    assert stored.shape == expected.shape
    np.testing.assert_array_equal(to_float32(matrix), expected.reshape(matrix.shape))
    return matrix
