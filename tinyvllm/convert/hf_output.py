"""Write a model as a directory: MLX's affine quantization, or FP8 that transformers and vLLM read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.arrays import HostMatrix
from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.convert.affine import encode_affine
from tinyvllm.convert.dense import encode_dense
from tinyvllm.convert.float8 import BLOCK, encode_by_block, encode_by_channel
from tinyvllm.convert.hf_files import copy_directory, make_directory
from tinyvllm.convert.mlx_rope import with_older_keys
from tinyvllm.convert.pieces import Encode, Piece, Plane
from tinyvllm.convert.safetensors_header import ITEM_BYTES, write_headers
from tinyvllm.convert.stream import Place
from tinyvllm.convert.targets import Target
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.checkpoint import IGNORED_SUFFIXES, language_model_tensors
from tinyvllm.model.weights.gguf import read_gguf
from tinyvllm.model.weights.hf_formats import assemble_matrices
from tinyvllm.model.weights.names import HEAD_NAME, tied, unwrapped, with_model
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import DENSE_DTYPES, StoredTensor
from tinyvllm.storage import families

EMBEDDING = re.compile(r"(.*\.)?embed_tokens(_per_layer)?\.weight")
TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Read = Callable[[], HostMatrix]


class DirectoryOutput:
    """A directory to be written: its pieces, its headers and its other files."""

    def __init__(self, source: ModelFiles, config: ModelConfig, target: Target) -> None:
        """Raises ModelError for a source that cannot be read or written so."""
        if config.experts is not None:
            raise UnsupportedModelError(
                f"{source.path} has experts, which are not written as {target.name}: take the model's own MLX or FP8 "
                "files, or a GGUF file, which can be quantized to other types of GGUF"
            )
        self._source, self._config, self._target = source, config, target
        self._dtype = TYPE_NAMES[config.dtype]
        self.unquantized: list[str] = []  # matrices that do not fit the target's groups
        self.pieces = [self._piece(name, tensor) for name, tensor in _tensors(source, config).items()]

    def start(self, path: Path) -> dict[str, Place]:
        """Create the directory with everything but values. Returns where each array begins."""
        path.mkdir()
        if self._source.kind == "gguf":
            make_directory(self._source, self._config, path, self._quantization())
        else:
            copy_directory(self._source.path, path, self._edited)
        planes = [plane for piece in self.pieces for plane in piece.planes]
        return write_headers(path, planes, "mlx" if self._target.kind == "mlx" else "pt")

    def _edited(self, config: dict[str, Any]) -> dict[str, Any]:
        """The source's config.json with what the target's readers need."""
        is_mlx = self._target.kind == "mlx"
        readable = with_older_keys(config, self._config.architecture) if is_mlx else config
        return readable | self._quantization()

    def _quantization(self) -> dict[str, Any]:
        """Keys of config.json. MLX's are under two names, as mlx-lm writes them."""
        if self._target.kind == "fp8":
            return {"quantization_config": fp8_config(self._target.scales, self.unquantized)}
        settings = {"group_size": self._target.group, "bits": self._target.bits, "mode": "affine"}
        return {"quantization": settings, "quantization_config": settings}

    def _piece(self, name: str, tensor: StoredTensor) -> Piece:
        # GGUF's norms have the offset in them, Hugging Face's have not
        family = families.KNOWN_ARCHITECTURES[self._config.architecture]
        offset = family.norm_offset - self._config.norm_offset if name.endswith("norm.weight") else 0.0
        module = name.removesuffix(".weight")
        if len(tensor.shape) == 2 and name.endswith(".weight") and self._is_quantized(name, tensor.shape):
            return make_piece(module, tensor.shape, tensor.read, self._target, self._dtype)
        if len(tensor.shape) == 2 and name.endswith(".weight"):
            self.unquantized.append(module)
        return dense_piece(name, tensor.shape, tensor.read, self._dtype, offset)

    def _is_quantized(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._target.kind == "mlx":
            return shape[1] % self._target.group == 0
        # FP8 is for products: the embeddings are looked up, and the head decides the tokens
        return EMBEDDING.fullmatch(name) is None and not name.endswith(HEAD_NAME)


def _tensors(source: ModelFiles, config: ModelConfig) -> Mapping[str, StoredTensor]:
    """The language model's tensors by the names in Hugging Face's files."""
    if source.kind == "gguf":
        return read_gguf(source.path, config)
    read = as_stored(source.path, config)
    dropped = IGNORED_SUFFIXES if HEAD_NAME in language_model(source.path, config) else (*IGNORED_SUFFIXES, HEAD_NAME)
    return {name: tensor for name, tensor in read.items() if not name.endswith(dropped)}


def as_stored(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """A directory's tensors without those of other parts, quantized ones assembled, by the directory's own names."""
    unread = families.KNOWN_ARCHITECTURES[config.architecture].hf_unread
    stored = unwrapped(read_safetensors(directory))
    return assemble_matrices(directory, {name: one for name, one in stored.items() if not name.startswith(unread)})


def language_model(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The same by the names that the text model alone would have, and without a head that repeats the embeddings."""
    read = with_model(language_model_tensors(as_stored(directory, config), config.architecture))
    if config.tie_embeddings:
        read = tied(directory, read)
    return {name: tensor for name, tensor in read.items() if not name.endswith(IGNORED_SUFFIXES)}


def make_piece(module: str, shape: tuple[int, ...], read: Read, target: Target, dtype: str) -> Piece:
    """A matrix in the target's format."""
    rows, columns = shape
    unit = 1
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    encode: Encode
    if target.kind == "mlx":
        packed = columns * target.bits // 32
        shapes = {"weight": ("U32", (rows, packed)), "scales": (dtype, (rows, columns // target.group))}
        shapes["biases"] = shapes["scales"]
        encode = partial(encode_affine, bits=target.bits, group=target.group, dtype=DENSE_DTYPES[dtype])
    elif target.scales == "channel":
        shapes = {"weight": ("F8_E4M3", shape), "weight_scale": (dtype, (rows, 1))}
        encode = partial(encode_by_channel, dtype=DENSE_DTYPES[dtype])
    else:
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        shapes = {"weight": ("F8_E4M3", shape), "weight_scale_inv": ("F32", blocks)}
        encode, unit = encode_by_block, BLOCK
    planes = [Plane(f"{module}.{part}", kind, size, _num_bytes(kind, size)) for part, (kind, size) in shapes.items()]
    return Piece(module, shape, read, tuple(planes), encode, row_unit=unit)


def dense_piece(name: str, shape: tuple[int, ...], read: Read, dtype: str, offset: float) -> Piece:
    """A tensor that stays unquantized. `offset` is subtracted."""
    plane = Plane(name, dtype, shape, _num_bytes(dtype, shape))

    def encode(values: np.ndarray) -> tuple[np.ndarray]:
        return (encode_dense(values - np.float32(offset), dtype, name),)

    return Piece(name, shape, read, (plane,), encode)


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]


def fp8_config(scales: str, unquantized: list[str]) -> dict[str, Any]:
    """config.json's quantization_config: compressed-tensors' for a scale per row, else that of DeepSeek's and Qwen's
    FP8 files. Activations are quantized as they come, one scale a token (or block of 128 values)."""
    kept = [name for name in unquantized if not name.endswith("embed_tokens")] or ["lm_head"]
    if scales == "block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": common | {"strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
    }
