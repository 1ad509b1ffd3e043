"""Tensors of a Hugging Face directory's *.safetensors, as views of memory maps.

Not by the safetensors library, which copies each tensor: reading a file of 315 MB in bfloat16 took 0.17 s of CPU and
37 MB more memory, against 0.05 s.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import float8_e4m3fn, float8_e5m2, float8_e8m0fnu

from tinyvllm.arrays import HostMatrix
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor
from tinyvllm.storage.regular_file import check_inside, file_inside, is_present, is_regular, shortened
from tinyvllm.storage.resolve import PICKLE_SUFFIXES
from tinyvllm.storage.safetensors_header import read_header
from tinyvllm.storage.strict_json import MAX_INDEX_BYTES, read_json
from tinyvllm.storage.values import Values

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Beginnings of the names of files that lie beside a model's own, and what to do without those
OTHER_FORMATS = {
    "consolidated": "in Mistral's own format: download model*.safetensors of the same repository",
    "adapter_model": "an adapter without its base model: serve that with --enable-lora --lora-modules NAME=DIRECTORY",
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
    weight_map = {} if is_present(directory / SINGLE_NAME) else _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory, weight_map):
        for name, tensor in read_file(directory, path).items():
            if name not in tensors or weight_map.get(name) == path.relative_to(directory).as_posix():
                tensors[name] = tensor
            elif name not in weight_map:
                raise WeightMismatchError(f"{path} has tensor {name}, which another file of {directory} has too")
    return tensors


def _read_index(directory: Path) -> dict[str, str]:
    """File names by tensor name; empty if there is no index."""
    path = directory / INDEX_NAME
    if not is_present(path):
        return {}
    weight_map = Values(path, read_json(path, MAX_INDEX_BYTES)).inner("weight_map")
    if weight_map is None:
        raise ModelError(f"{path} has no weight_map from tensor names to file names")
    return {name: weight_map.text(name) for name in weight_map.values}


def _weight_files(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files to read: model.safetensors, which transformers prefers, too; else those of the index; else all there
    are but those in other formats."""
    if weight_map:
        index = directory / INDEX_NAME
        listed = [file_inside(directory, file_name, index) for file_name in sorted(set(weight_map.values()))]
        if absent := [shortened(path.name) for path in listed if not is_present(path)]:
            shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise ModelError(f"{index} lists {shown}, which is not there: download it again")
        return listed
    if is_present(directory / SINGLE_NAME):
        return [directory / SINGLE_NAME]
    present = sorted(path for path in directory.glob("*.safetensors") if is_regular(path))
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


def read_file(directory: Path, path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file in `directory`, by name. Raises ModelError for a damaged file or a link that leads out of
    the directory; reading a tensor raises UnsupportedModelError if its type is unknown."""
    check_inside(directory, path)
    header = read_header(path)
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    tensors = {}
    for name, entry in header.items():
        read = partial(_read, path, name, entry.dtype, entry.shape, data[entry.begin : entry.end])
        format_name = DENSE_NAMES.get(entry.dtype, entry.dtype)
        tensors[name] = StoredTensor(entry.shape, read, format_name, entry.end - entry.begin)
    return tensors


def _read(path: Path, name: str, dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> HostMatrix:
    known = DENSE_DTYPES | RAW_DTYPES
    if dtype not in known:
        raise UnsupportedModelError(
            f"{path}: tensor {name} has type {dtype}, which is not supported; known: {', '.join(known)}"
        )
    return raw.view(known[dtype]).reshape(shape)
