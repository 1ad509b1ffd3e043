"""The expansion of latents, which files hold in several forms, as one matrix of keys and one of values.

Ours, by head: self_attn.k_b_proj (H * rank, nope), which is transposed so that queries can be multiplied by it, and
self_attn.v_b_proj (H * value, rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from tinyvllm.arrays import HostMatrix, QuantizedMatrix, take_rows, to_float16
from tinyvllm.config import LatentKind, ModelConfig
from tinyvllm.model.weights.stored import DENSE_NAMES, StoredTensor

FUSED = "kv_b_proj.weight"  # (H * (nope + value), rank): Hugging Face's, and that of older GGUF files
KEYS, VALUES = "k_b_proj.weight", "v_b_proj.weight"
RENAMED = {"embed_q.weight": KEYS, "unembed_out.weight": VALUES}  # mlx-lm's


def split_latents(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors with ours in place of the other forms; unchanged for a model without latents."""
    if config.latent is None:
        return dict(tensors)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition("self_attn.")
        if not module:
            found[name] = tensor
        elif own == FUSED and _is_fused(tensor, config):
            keys, values = _split(tensor, config.latent, config.num_heads)
            found |= {f"{module}self_attn.{KEYS}": keys, f"{module}self_attn.{VALUES}": values}
        else:
            found[f"{module}self_attn.{RENAMED.get(own, own)}"] = _flat(tensor) if len(tensor.shape) == 3 else tensor
    return found


def _is_fused(tensor: StoredTensor, config: ModelConfig) -> bool:
    """A tensor of another shape is refused later, by name."""
    latent = config.latent
    assert latent is not None
    return tensor.shape == (config.num_heads * (latent.nope_dim + latent.value_dim), latent.rank)


def _flat(tensor: StoredTensor) -> StoredTensor:
    """A tensor (H, rows, columns) as a matrix of all heads' rows."""
    shape = (tensor.shape[0] * tensor.shape[1], tensor.shape[2])

    def read() -> HostMatrix:
        values = tensor.read()
        return values if isinstance(values, QuantizedMatrix) else values.reshape(shape)

    return replace(tensor, shape=shape, read=read)


def _split(tensor: StoredTensor, latent: LatentKind, heads: int) -> tuple[StoredTensor, StoredTensor]:
    """Its keys' rows, transposed within each head, and its values' rows. Keys that are quantized along the latents
    become float16, because their groups would not lie along the columns of the transposed matrix."""
    nope, value, rank = latent.nope_dim, latent.value_dim, latent.rank
    rows = np.arange(heads * (nope + value)).reshape(heads, nope + value)

    def keys() -> HostMatrix:
        taken = take_rows(tensor.read(), rows[:, :nope].reshape(-1))
        dense = to_float16(taken) if isinstance(taken, QuantizedMatrix) else taken
        return np.ascontiguousarray(dense.reshape(heads, nope, rank).swapaxes(1, 2)).reshape(heads * rank, nope)

    def part(shape: tuple[int, int], read: Callable[[], HostMatrix]) -> StoredTensor:
        share = math.prod(shape) / max(1, math.prod(tensor.shape))
        return replace(tensor, shape=shape, read=read, num_bytes=round(tensor.num_bytes * share))

    values = part((heads * value, rank), lambda: take_rows(tensor.read(), rows[:, nope:].reshape(-1)))
    is_converted = tensor.format_name not in DENSE_NAMES.values()
    return replace(part((heads * rank, nope), keys), is_converted=is_converted), values
