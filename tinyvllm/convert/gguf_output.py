"""Write a model as a GGUF file with llama.cpp's names, order of rows, metadata and choice of types."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tinyvllm.arrays import HostMatrix
from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.convert.dense import encode_dense
from tinyvllm.convert.ggml_blocks import encode
from tinyvllm.convert.ggml_types import MIXTURES, Mixture, ModelFacts, choose_type
from tinyvllm.convert.gguf_header import pack_value, write_header
from tinyvllm.convert.gguf_metadata import ARCHITECTURES, architecture_of, rope_tensors, settings_metadata
from tinyvllm.convert.gguf_vocabulary import vocabulary_metadata
from tinyvllm.convert.hf_output import TYPE_NAMES, language_model
from tinyvllm.convert.pieces import Piece, Plane
from tinyvllm.convert.stream import Place
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.gguf import ROTARY_TENSORS, read_as_written
from tinyvllm.model.weights.names import HEAD_NAME
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage import families
from tinyvllm.storage.gguf_file import GGUFFile, read_metadata_bytes

Shape = tuple[int, ...]
QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
ALL_BIASES = (*QKV_BIASES, "attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
# The biases that llama.cpp loads. A file with others is not loaded at all ("wrong number of tensors")
READ_BIASES = {"llama": ALL_BIASES, "granite": ALL_BIASES, "qwen2": QKV_BIASES, "glm4": QKV_BIASES}


class GGUFOutput:
    """A GGUF file to be written: its pieces, and its header."""

    def __init__(self, source: ModelFiles, config: ModelConfig, mixture_name: str) -> None:
        """Raises ModelError for a source that cannot be read or written as GGUF."""
        mixture = MIXTURES[mixture_name]
        self.metadata, self.pieces = (
            _from_gguf(source, mixture) if source.kind == "gguf" else _from_hf(source, config, mixture)
        )
        self.metadata["general.file_type"] = pack_value(int(mixture.file_type))

    def start(self, path: Path) -> dict[str, Place]:
        """Create the file. Returns where each tensor begins."""
        return write_header(path, self.metadata, [plane for piece in self.pieces for plane in piece.planes])


# --- From a GGUF file ----------------------------------------------------------------------------------------------


def _from_gguf(source: ModelFiles, mixture: Mixture) -> tuple[dict[str, bytes], list[Piece]]:
    """The same names, rows and metadata; other types."""
    file = GGUFFile(source.path)
    dropped = ("split.", "general.alignment")  # of the source's files
    metadata = {key: value for key, value in read_metadata_bytes(file.path).items() if not key.startswith(dropped)}
    prefix = f"{file.metadata['general.architecture']}."
    heads = file.metadata.get(f"{prefix}attention.head_count")
    kv_heads = file.metadata.get(f"{prefix}attention.head_count_kv", heads)
    facts = ModelFacts(
        architecture=file.metadata["general.architecture"],
        num_layers=file.metadata[f"{prefix}block_count"],
        num_heads=_first(heads),
        num_kv_heads=_first(kv_heads),
        has_head="output.weight" in file.tensors,
    )
    pieces = [
        make_piece(name, tensor.shape, tensor.read, choose_type(name, tensor.shape, mixture, facts, dense_type(tensor)))
        for name, tensor in read_as_written(source.path).items()
    ]
    return metadata, pieces


def _first(count: Any) -> int:
    """A count, or the largest of those of the layers."""
    return max(1, *count) if isinstance(count, list) else int(count or 1)


# --- From a Hugging Face directory ---------------------------------------------------------------------------------


def _from_hf(source: ModelFiles, config: ModelConfig, mixture: Mixture) -> tuple[dict[str, bytes], list[Piece]]:
    architecture = architecture_of(config)
    metadata = settings_metadata(config) | vocabulary_metadata(source.path, config.vocab_size)
    tensors = language_model(source.path, config)
    facts = ModelFacts(architecture, config.num_layers, config.num_heads, config.num_kv_heads, HEAD_NAME in tensors)
    pieces = []
    for hf_name, tensor in tensors.items():
        name = gguf_name(hf_name, architecture, config.num_layers)
        ggml_type = choose_type(name, tensor.shape, mixture, facts, dense_type(tensor))
        order = _row_order(name, tensor.shape, config)
        added = config.norm_offset if name.endswith("norm.weight") else 0.0
        pieces.append(make_piece(name, tensor.shape, tensor.read, ggml_type, order, added))
    for name, values in rope_tensors(config).items():
        pieces.append(make_piece(name, values.shape, partial(np.asarray, values), "F32"))
    pieces.sort(key=_place_in_file)
    return {key: pack_value(value) for key, value in metadata.items()}, pieces


def gguf_name(hf_name: str, architecture: str, num_layers: int) -> str:
    """llama.cpp's name. Raises UnsupportedModelError for a tensor that has none, or that llama.cpp does not load."""
    name = _names(architecture, num_layers).get_name(hf_name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UnsupportedModelError(f"tensor {hf_name} has no name in a GGUF file of a {architecture} model")
    if name.endswith(".bias") and not name.endswith(READ_BIASES.get(architecture, ())):
        raise UnsupportedModelError(
            f"tensor {hf_name} would be {name} in GGUF, which llama.cpp does not load in a {architecture} model: use "
            "--to mlx-4 or fp8"
        )
    return name


@cache
def _names(architecture: str, num_layers: int) -> gguf.TensorNameMap:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, num_layers)


def dense_type(tensor: StoredTensor) -> str:
    """ggml's name of an unquantized tensor's type; float16 for others."""
    return TYPE_NAMES.get(tensor.format_name, "F16")


def _row_order(name: str, shape: Shape, config: ModelConfig) -> np.ndarray | None:
    """For each row in llama.cpp's order, its place in Hugging Face's: there the two halves of a head are apart, in a
    llama file rotated pairs are neighbors."""
    written_as = next(
        family for family in families.KNOWN_ARCHITECTURES.values() if ARCHITECTURES[config.architecture] in family.gguf
    )
    if not written_as.gguf_interleaves_pairs or not name.endswith(ROTARY_TENSORS):
        return None
    half = config.head_dim // 2
    return np.arange(shape[0]).reshape(-1, 2, half).swapaxes(1, 2).reshape(-1)


def _place_in_file(piece: Piece) -> tuple[int, int]:
    """Embeddings first, then the layers in order, as llama.cpp has it."""
    parts = piece.name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1])
    return (2, 0) if parts[0].startswith("output") else (0, 0)


# --- Pieces --------------------------------------------------------------------------------------------------------


def make_piece(
    name: str,
    shape: Shape,
    read: Callable[[], HostMatrix],
    ggml_type: str,
    order: np.ndarray | None = None,
    added: float = 0.0,
) -> Piece:
    """A tensor in one of ggml's types; the rows of experts follow one another. `added`: to every value."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    num_bytes = int(np.prod(shape, dtype=np.int64)) // block_size * block_bytes
    encode_rows = partial(encode_dense, dtype=ggml_type, what=name)
    if ggml_type not in ("F32", "F16", "BF16"):
        encode_rows = partial(encode, ggml_type)
    plane = Plane(name, ggml_type, shape, num_bytes)
    if len(shape) > 2:
        shape, read = (math.prod(shape[:-1]), shape[-1]), partial(_rows_of_all, read)
    return Piece(name, shape, read, (plane,), lambda values: (encode_rows(values + np.float32(added)),), order)


def _rows_of_all(read: Callable[[], HostMatrix]) -> HostMatrix:
    """The rows of all experts, which quantized tensors have already."""
    values = read()
    return values.reshape(-1, values.shape[-1]) if isinstance(values, np.ndarray) else values
