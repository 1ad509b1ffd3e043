"""Tensors of a Hugging Face directory's *.safetensors, as views of memory maps.

The header is read here (a length, then JSON) because the safetensors library has no bfloat16 for NumPy.
Format: https://github.com/huggingface/safetensors/blob/ead9d7baeb72df3b1f9d3c049ab3e513b422b0a8/README.md
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.arrays import HostMatrix
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.stored import DENSE_DTYPES, StoredTensor, view_dense
from tinyvllm.storage.model_config import read_json
from tinyvllm.storage.resolve import PICKLE_SUFFIXES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the model in `directory`, by name, from the files that belong to it.

    Raises ModelError for files that are absent, cut short or damaged, WeightMismatchError for tensors that the index
    places in a file that lacks them, UnsupportedModelError for pickle files and unknown types.
    """
    weight_map = _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory, weight_map):
        found = _read_file(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise WeightMismatchError(f"{path} has tensor {twice[0]}, which another file of {directory} has too")
        tensors |= found
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise WeightMismatchError(f"{directory / INDEX_NAME} places tensor {name} in {file_name}, which lacks it")
    return tensors


def _read_index(directory: Path) -> dict[str, str]:
    """File names by tensor name; nothing where there is no index."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise ModelError(f"{path} has no weight_map from tensor names to file names")
    return weight_map


def _weight_files(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files to read: those of the index, else model.safetensors, else all there are."""
    if weight_map:
        listed = [directory / file_name for file_name in sorted(set(weight_map.values()))]
        if absent := [path.name for path in listed if not path.is_file()]:
            raise ModelError(
                f"{directory / INDEX_NAME} lists {', '.join(absent)}, which is not there: download it again"
            )
        return listed
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedModelError(
                f"{directory} has its weights as pickle files ({', '.join(pickles[:3])}), which can run code when they "
                "are read: convert them to safetensors"
            )
        raise ModelError(f"{directory} has no *.safetensors")
    return files


def _read_file(path: Path) -> dict[str, StoredTensor]:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
        if len(start) < 8 or header_bytes > min(num_bytes - 8, MAX_HEADER_BYTES):
            raise ModelError(
                f"{path} is cut short or damaged: {num_bytes} bytes, header of {header_bytes}; download it again"
            )
        header = file.read(header_bytes)
    data = np.asarray(np.memmap(path, np.uint8, "r"))[8 + header_bytes :]
    try:
        infos = json.loads(header)
        return {name: _tensor(path, name, info, data) for name, info in infos.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: its header makes no sense ({error!r}); download it again") from error


def _tensor(path: Path, name: str, info: dict[str, Any], data: np.ndarray) -> StoredTensor:
    """Check where a tensor lies; its values are read later."""
    dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    if end > data.size:
        raise ModelError(
            f"{path} is cut short: tensor {name} ends {end - data.size} bytes after the file's end; download it again"
        )
    if dtype in DENSE_DTYPES and end - begin != math.prod(shape) * DENSE_DTYPES[dtype].itemsize:
        raise ModelError(f"{path} is damaged: tensor {name} is {dtype} of shape {shape} in {end - begin} bytes")
    return StoredTensor(shape, partial(_read, path, name, dtype, shape, data[begin:end]))


def _read(path: Path, name: str, dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> HostMatrix:
    if dtype not in DENSE_DTYPES:
        raise UnsupportedModelError(f"{path}: tensor {name} has type {dtype}; known: {', '.join(DENSE_DTYPES)}")
    return view_dense(raw, dtype, shape)
