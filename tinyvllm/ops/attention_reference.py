"""Attention over paged keys and values in NumPy: it documents the kernels, and their tests compare against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinyvllm.config import KVFormat, LayerKind
from tinyvllm.ops.kv_reference import dequantize, quantize
from tinyvllm.ops.reference_forms import rms_norm, rotate, rotate_pairs, softcap, softmax, unit_norm


@dataclass(frozen=True)
class AttentionTables:
    """Those of an `AttentionLayer`, on the host."""

    rope: np.ndarray | None  # (positions, R), or a column more with query scaling
    head_norm: np.ndarray | None  # flat: the weight of queries, then that of keys
    bias: np.ndarray | None
    sinks: np.ndarray | None


@dataclass(frozen=True)
class StoredHeads:
    """A layer's keys or values (slots, K, D) on the host, in the pool's dtype; if they are quantized, their codes
    (slots, K, bytes), and scales (slots, K, groups) if the format has them."""

    form: KVFormat
    stored: np.ndarray
    scales: np.ndarray | None = None

    def write(self, slots: np.ndarray, heads: np.ndarray) -> None:
        """Overwrite slots (T,) with heads (T, K, D), rounded to the format."""
        if not self.form.is_quantized:
            self.stored[slots] = heads
            return
        self.stored[slots], scales = quantize(heads, self.form)
        if self.scales is not None:
            self.scales[slots] = scales

    def read(self, slots: np.ndarray) -> np.ndarray:
        """(..., K, D) float32 of slots (...)."""
        if not self.form.is_quantized:
            return self.stored[slots].astype(np.float32)
        return dequantize(self.stored[slots], None if self.scales is None else self.scales[slots], self.form)


def attend_reference(
    qkv: np.ndarray,
    kind: LayerKind,
    tables: AttentionTables,
    positions: np.ndarray,
    slots: np.ndarray,
    context: np.ndarray,
    keys: StoredHeads,
    values: StoredHeads,
) -> np.ndarray:
    """`Operations.attend` of qkv (T, columns): (T, H, D). Writes `slots` (T,) of keys and values, and reads the slots
    `context` (T, C), every position of a row's block table in order. Columns of zeros may follow in qkv."""
    stores = kind.kv_layer is None
    q, k, v = _heads(qkv, kind, tables, positions, stores=stores)
    if stores:
        keys.write(slots, k)
        values.write(slots, v)
    grouped = q.reshape(len(q), kind.num_kv_heads, -1, kind.head_dim)  # G query heads share a KV head
    near_keys, near_values = keys.read(context), values.read(context)  # (T, C, K, D)
    scores = np.einsum("tkgd,tckd->tkgc", grouped, near_keys, optimize=True) * np.float32(kind.scale)
    weights = attention_weights(scores, positions, kind, tables.sinks)
    return np.einsum("tkgc,tckd->tkgd", weights, near_values, optimize=True).reshape(q.shape)


def _heads(
    qkv: np.ndarray, kind: LayerKind, tables: AttentionTables, positions: np.ndarray, *, stores: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (T, H, D), and the keys and values (T, K, D) to store, which are empty if `stores` is false."""
    used = qkv[:, : kind.q_size + (2 * kind.kv_size if stores else 0)]
    if tables.bias is not None:
        used = used + tables.bias[: used.shape[1]]
    parts = np.split(used, [kind.q_size, kind.q_size + kind.kv_size], axis=1)
    if tables.head_norm is not None and kind.head_norm_eps is not None:
        weights = np.split(tables.head_norm, [kind.q_size if kind.head_norm_is_whole else kind.head_dim])
        for place, weight in enumerate(weights):  # of all heads together (OLMo 2, 2024, sec. 3.2), or of each
            rows = parts[place].reshape(len(qkv), -1, weight.size)
            parts[place] = rms_norm(rows, weight, kind.head_norm_eps).reshape(parts[place].shape)
    q, k, v = (part.reshape(len(qkv), -1, kind.head_dim) for part in parts)
    q, k = (_rotated(heads, kind, tables, positions) for heads in (q, k))
    if tables.rope is not None and kind.query_scaling is not None:
        q = q * tables.rope[positions, -1].reshape(-1, 1, 1)
    return q, k, v if kind.value_norm_eps is None else unit_norm(v, kind.value_norm_eps)


def _rotated(heads: np.ndarray, kind: LayerKind, tables: AttentionTables, positions: np.ndarray) -> np.ndarray:
    if tables.rope is None or kind.rope is None:
        return heads
    num_dims = kind.rope.num_dims or kind.head_dim
    rotation = rotate_pairs if kind.rope.is_interleaved else rotate
    turned = rotation(heads[..., :num_dims], tables.rope[positions, None, :num_dims])
    return np.concatenate([turned, heads[..., num_dims:]], axis=-1)


def attention_weights(
    scores: np.ndarray, positions: np.ndarray, kind: LayerKind, sinks: np.ndarray | None
) -> np.ndarray:
    """Softmax of scores (T, K, G, C) over the tokens that each row attends to, and over a sink, which has no value."""
    if kind.softcap is not None:
        scores = softcap(scores, kind.softcap)
    tokens, kv_heads, group, num_keys = scores.shape
    distance = positions[:, None] - np.arange(num_keys)  # (T, C): from a key to the row
    seen = (distance >= 0) & (distance < (kind.window or num_keys + 1))
    scores = np.where(seen[:, None, None], scores, np.float32(-np.inf))
    if sinks is None:
        return softmax(scores)
    column = np.broadcast_to(sinks.reshape(1, kv_heads, group, 1), (tokens, kv_heads, group, 1))
    return softmax(np.concatenate([scores, column], axis=-1))[..., :num_keys]


@dataclass(frozen=True)
class LatentTables:
    """Those of a `LatentLayer`, on the host."""

    key_up: np.ndarray  # (H, rank, nope)
    value_up: np.ndarray  # (H, value, rank)
    norm: np.ndarray  # (rank,)
    rope: np.ndarray  # (positions, rope_dim)


def attend_latent_reference(
    queries: np.ndarray,
    latents: np.ndarray,
    kind: LayerKind,
    tables: LatentTables,
    positions: np.ndarray,
    slots: np.ndarray,
    context: np.ndarray,
    stored: np.ndarray,
) -> np.ndarray:
    """`Operations.attend_latent` of queries (T, H * D) and latents (T, rank + rope): (T, H, value). Not absorbed: each
    head's keys and values are computed from the latents. Writes and reads slots of `stored` (slots, rank + rope)."""
    latent = kind.latent
    assert latent is not None and kind.rope is not None
    rotation = rotate_pairs if kind.rope.is_interleaved else rotate
    angles = tables.rope[positions, None]  # (T, 1, rope)
    stored[slots, : latent.rank] = rms_norm(latents[:, : latent.rank], tables.norm, latent.norm_eps)
    stored[slots, latent.rank :] = rotation(latents[:, None, latent.rank : latent.stored_dim], angles)[:, 0]
    near, shared = np.split(stored[context].astype(np.float32), [latent.rank], axis=-1)
    keys = np.einsum("tcr,hrn->tchn", near, tables.key_up, optimize=True)
    values = np.einsum("tcr,hvr->tchv", near, tables.value_up, optimize=True)
    q = queries.reshape(len(queries), kind.num_heads, kind.head_dim)
    own, turned = q[..., : latent.nope_dim], rotation(q[..., latent.nope_dim :], angles)
    scores = np.einsum("thn,tchn->thc", own, keys, optimize=True) + np.einsum("thd,tcd->thc", turned, shared)
    weights = attention_weights((scores * np.float32(kind.scale))[:, :, None], positions, kind, None)[:, :, 0]
    return np.einsum("thc,tchv->thv", weights, values, optimize=True)
