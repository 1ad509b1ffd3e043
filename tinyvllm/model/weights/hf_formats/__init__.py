"""Formats of Hugging Face and MLX directories: which one a directory has, and its matrices made of their tensors.

A format is a file here: which tensors a matrix has, by the ends of their names, and how they become a QuantizedMatrix.
config.json names the method, and METHODS the formats that it may use. What is quantized, the tensors tell: a module
that was left out (`ignore`, `modules_to_not_convert`) has a plain `weight`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.hf_formats import awq, bitsandbytes, compressed, gptq, mlx, modelopt, mxfp4, scaled
from tinyvllm.model.weights.hf_formats.matrices import HFFormat, weight_groups
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.regular_file import is_present
from tinyvllm.storage.strict_json import read_json_if_present
from tinyvllm.storage.values import Values

logger = logging.getLogger(__name__)

# By config.json's `quant_method`; MLX's files have none
METHODS: dict[str, tuple[HFFormat, ...]] = {
    "mlx": (mlx.FORMAT,),
    "fp8": (scaled.INVERSE, scaled.EXPERTS, scaled.SCALED),
    "fbgemm_fp8": (scaled.SCALED,),
    "compressed-tensors": (compressed.PACKED, scaled.SCALED),
    "modelopt": (modelopt.NVFP4, scaled.SCALED),
    "awq": (awq.FORMAT,),
    "gptq": (gptq.FORMAT,),
    "mxfp4": (mxfp4.FORMAT,),
    "bitsandbytes": (bitsandbytes.FORMAT, bitsandbytes.INT8),
}
# Files of early quantizers, whose config.json says nothing, and their methods
OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Scales that were calibrated for activations and for the KV cache
UNUSED = (
    ".input_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".prob_scale",
)


def assemble_matrices(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names, with quantized matrices in place of the tensors that they are made of. Raises
    UnsupportedModelError for unknown methods, WeightMismatchError for tensors that do not fit."""
    settings = read_settings(directory)
    if settings is None:
        return dict(tensors)
    _refuse_variants(settings, tensors)
    assembled = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    num_unused = len(tensors) - len(assembled)
    if num_unused or _quantizes_activations(settings):
        logger.info("%s: activations keep their precision; %d scales of them are not used", directory, num_unused)
    for form in METHODS[_method(settings)]:
        assembled = form.assemble(assembled, settings)
    return assembled


def _quantizes_activations(settings: Values) -> bool:
    """Whether the model was meant to run with activations of 8 or 4 bits."""
    groups = weight_groups(settings)
    return settings.get("activation_scheme") is not None or any(group.get("input_activations") for group in groups)


def _refuse_variants(settings: Values, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse what would be computed wrongly. Raises UnsupportedModelError."""
    sparsity = settings.inner("sparsity_config")
    if sparsity is not None and sparsity.get("format") not in (None, "dense"):
        sparsity.unsupported("format", "dense: take the model's file without sparsity")
    if settings.get("transform_config"):
        settings.unsupported("transform_config", "null (no rotations of activations)")
    for name, tensor in tensors.items():
        if name.endswith(".pre_quant_scale"):
            raise UnsupportedModelError(
                f"{settings.source.parent}: tensor {name}, {tensor.shape}, scales the inputs of a matrix (ModelOpt's "
                "AWQ), which is not supported: take the model's FP8, NVFP4 or AWQ files"
            )


def read_settings(directory: Path) -> Values | None:
    """What the model's files say about its quantization, if it is quantized."""
    config = _read(directory / "config.json")
    text = config.inner("text_config")
    for values in (config, *([text] if text is not None else [])):
        for key in ("quantization", "quantization_config"):  # MLX's, which repeats it under the other name; all others'
            if (found := values.inner(key)) is not None:
                return found
    for name, method in OTHER_FILES.items():
        if is_present(directory / name):
            values = _read(directory / name)
            inner = values.inner("quantization") or values
            return Values(values.source, {"quant_method": method} | dict(inner.values))
    return None


def _read(path: Path) -> Values:
    return Values(path, read_json_if_present(path))


def _method(settings: Values) -> str:
    """The key of METHODS. Raises UnsupportedModelError."""
    method = settings.optional_text("quant_method") or "mlx"
    if method == "auto-round":  # which writes the files of others
        packing = settings.optional_text("packing_format") or "auto_round:auto_gptq"
        method = next((kind for kind in ("gptq", "awq") if kind in packing), method)
    if method not in METHODS:
        settings.unsupported("quant_method", f"{', '.join(METHODS)}; or take the model's unquantized or GGUF file")
    return method
