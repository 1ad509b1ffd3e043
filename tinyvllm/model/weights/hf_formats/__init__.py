"""Formats of Hugging Face and MLX directories: which one a directory has, and its matrices made of their tensors.

A format is a file here: which tensors a matrix has, by the ends of their names, and how they become a QuantizedMatrix.
config.json names the method, and METHODS the formats that it may use. What is quantized, the tensors tell: a module
that was left out (`ignore`, `modules_to_not_convert`) has a plain `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinyvllm.model.weights.hf_formats import mlx
from tinyvllm.model.weights.hf_formats.matrices import HFFormat
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.values import Values, read_json

METHODS: dict[str, tuple[HFFormat, ...]] = {
    "mlx": (mlx.FORMAT,),
}


def assemble_matrices(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names, with quantized matrices in place of the tensors that they are made of. Raises
    UnsupportedModelError for unknown methods, WeightMismatchError for tensors that do not fit."""
    assembled = dict(tensors)
    settings = read_settings(directory)
    if settings is None:
        return assembled
    method = settings.get("quant_method") or "mlx"
    if method not in METHODS:
        settings.unsupported("quant_method", f"{', '.join(METHODS)}, GGUF files, and unquantized weights")
    for form in METHODS[method]:
        assembled = form.assemble(assembled, settings)
    return assembled


def read_settings(directory: Path) -> Values | None:
    """What the model's files say about its quantization, if it is quantized."""
    path = directory / "config.json"
    config = Values(path, read_json(path) if path.is_file() else {})
    text = config.inner("text_config")
    for values in (config, *([text] if text is not None else [])):
        for key in ("quantization", "quantization_config"):  # MLX's, which repeats it under the other name; all others'
            if (found := values.inner(key)) is not None:
                return found
    return None
