"""Tensors of a Hugging Face directory's *.safetensors, as views of memory maps.

The safetensors library reads and checks a file's header. Values are views of a memory map of ours, because the library
copies each tensor: reading a file of 315 MB in bfloat16 took 0.17 s of CPU and 37 MB more memory, against 0.05 s.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import float8_e4m3fn, float8_e5m2, float8_e8m0fnu
from safetensors import SafetensorError, safe_open

from tinyvllm.arrays import HostMatrix
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor
from tinyvllm.storage.resolve import PICKLE_SUFFIXES
from tinyvllm.storage.values import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Beginnings of the names of files that lie beside a model's own, and what to do without those
OTHER_FORMATS = {
    "consolidated": "in Mistral's own format: download model*.safetensors of the same repository",
    "adapter_model": "an adapter without its base model: merge it into the base model and save that",
}
# Types of codes and of what belongs to them, which hf_formats assembles to matrices
RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(float8_e4m3fn),
    "F8_E5M2": np.dtype(float8_e5m2),
    "F8_E8M0": np.dtype(float8_e8m0fnu),
}


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the model in `directory`, by name, from the files that belong to it.

    Raises ModelError for files that are absent, cut short or damaged, WeightMismatchError for tensors that two files
    have, UnsupportedModelError for pickle files and unknown types. A tensor that the index lists and no file has is not
    missed here: the model may not need it, as a tied head.
    """
    weight_map = {} if (directory / SINGLE_NAME).is_file() else _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory, weight_map):
        for name, tensor in _read_file(path).items():
            if name not in tensors or weight_map.get(name) == path.relative_to(directory).as_posix():
                tensors[name] = tensor
            elif name not in weight_map:
                raise WeightMismatchError(f"{path} has tensor {name}, which another file of {directory} has too")
    return tensors


def _read_index(directory: Path) -> dict[str, str]:
    """File names by tensor name; empty if there is no index."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise ModelError(f"{path} has no weight_map from tensor names to file names")
    return weight_map


def _weight_files(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files to read: model.safetensors, which transformers prefers, too; else those of the index; else all there
    are but those in other formats."""
    if weight_map:
        listed = [directory / file_name for file_name in sorted(set(weight_map.values()))]
        if absent := [path.name for path in listed if not path.is_file()]:
            raise ModelError(
                f"{directory / INDEX_NAME} lists {', '.join(absent)}, which is not there: download it again"
            )
        return listed
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    present = sorted(directory.glob("*.safetensors"))
    files = [path for path in present if not path.name.startswith(tuple(OTHER_FORMATS))]
    if present and not files:
        remedy = next(text for beginning, text in OTHER_FORMATS.items() if present[0].name.startswith(beginning))
        raise UnsupportedModelError(f"{directory} has only {present[0].name}, {remedy}")
    if not files:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedModelError(
                f"{directory} has its weights as pickle files ({', '.join(pickles[:3])}), which can run code when they "
                "are read: convert them to safetensors"
            )
        raise ModelError(f"{directory} has no *.safetensors: download its weights in that format, or give a .gguf file")
    return files


def _read_file(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as opened:
        start = opened.read(8)
    if start == b"version ":
        raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
    try:
        with safe_open(path, "numpy") as file:
            found = [(name, file.get_slice(name)) for name in file.offset_keys()]
    except SafetensorError as error:
        raise ModelError(f"{path} is cut short or damaged ({error}); download it again") from error
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    tensors, begin = {}, 8 + int.from_bytes(start, "little")
    for name, tensor in found:  # in the order of their bytes, between which the library allows no gaps
        dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
        end = begin + math.prod(shape) * bits_of(dtype) // 8
        read = partial(_read, path, name, dtype, shape, data[begin:end])
        tensors[name] = StoredTensor(shape, read, DENSE_NAMES.get(dtype, dtype), end - begin)
        begin = end
    return tensors


def bits_of(dtype: str) -> int:
    """Bits of a value, from the name of its type: F8_E4M3, BF16, ..."""
    return 8 if dtype == "BOOL" else int(dtype.partition("_")[0].lstrip("BCFIU"))


def _read(path: Path, name: str, dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> HostMatrix:
    known = DENSE_DTYPES | RAW_DTYPES
    if dtype not in known:
        raise UnsupportedModelError(
            f"{path}: tensor {name} has type {dtype}, which is not supported; known: {', '.join(known)}"
        )
    return raw.view(known[dtype]).reshape(shape)
