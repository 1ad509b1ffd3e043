"""Tensors of a GGUF file under Hugging Face's names and in Hugging Face's order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tinyvllm.arrays import HostMatrix
from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor, view_dense
from tinyvllm.storage import families
from tinyvllm.storage.gguf_config import ROPE_FREQS
from tinyvllm.storage.gguf_file import GGUFFile, GGUFTensor

KNOWN_TYPES = (*DENSE_DTYPES, *QUANTIZED_KINDS)

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<suffix>weight|bias)")
TOP_TENSOR = re.compile(r"(?P<part>\w+)\.(?P<suffix>weight|bias)")

ROTARY_TENSORS = tuple(f"{part}.{suffix}" for part in ("attn_q", "attn_k") for suffix in ("weight", "bias"))


def read_gguf(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """All tensors of the file, by Hugging Face's names (a tensor that has none keeps its own).

    `rope_freqs.weight` is left out: it is in `config.rope_divisors`. Raises UnsupportedModelError for tensors of an
    unknown type, and what GGUFFile raises.
    """
    family = families.KNOWN_ARCHITECTURES[config.architecture]
    tensors = {}
    for tensor in GGUFFile(path).tensors.values():
        if tensor.name == ROPE_FREQS:
            continue
        if tensor.ggml_type not in KNOWN_TYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {tensor.name} has type {tensor.ggml_type}, which is not supported; "
                f"known: {', '.join(KNOWN_TYPES)}"
            )
        read: Callable[[], HostMatrix] = partial(_read, tensor)
        if family.gguf_interleaves_pairs and tensor.name.endswith(ROTARY_TENSORS):
            read = partial(_read_rotary, tensor, config.head_dim)
        format_name = DENSE_NAMES.get(tensor.ggml_type, tensor.ggml_type)
        stored = StoredTensor(tensor.shape, read, format_name, tensor.data.nbytes)
        tensors[canonical_name(tensor.name, config.architecture)] = stored
    return tensors


def canonical_name(gguf_name: str, architecture: str) -> str:
    """Hugging Face's name of llama.cpp's tensor, or the same name if there is none."""
    if match := LAYER_TENSOR.fullmatch(gguf_name):
        names = LAYER_NAMES | dict(families.KNOWN_ARCHITECTURES[architecture].gguf_layer_names)
        if match["part"] in names:
            return f"model.layers.{match['layer']}.{names[match['part']]}.{match['suffix']}"
    if (match := TOP_TENSOR.fullmatch(gguf_name)) and match["part"] in TOP_NAMES:
        return f"{TOP_NAMES[match['part']]}.{match['suffix']}"
    return gguf_name


def _read(tensor: GGUFTensor) -> HostMatrix:
    return _decode(tensor, tensor.data)


def _read_rotary(tensor: GGUFTensor, head_dim: int) -> HostMatrix:
    """Rows in Hugging Face's order. Whole rows of blocks are moved before they are split."""
    num_rows = tensor.shape[0]
    return _decode(tensor, tensor.data.reshape(num_rows, -1)[half_order(num_rows, head_dim)].reshape(-1))


def half_order(num_rows: int, head_dim: int) -> np.ndarray:
    """For each row in Hugging Face's order, its place in llama.cpp's: (num_rows,) indices."""
    return np.arange(num_rows).reshape(num_rows // head_dim, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _decode(tensor: GGUFTensor, raw: np.ndarray) -> HostMatrix:
    if tensor.ggml_type in QUANTIZED_KINDS:
        return decompose(tensor.ggml_type, raw, tensor.shape)
    return view_dense(raw, tensor.ggml_type, tensor.shape)
