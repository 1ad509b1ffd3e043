"""Norms, epilogues, rotations and routing in NumPy, for the plain reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from tinyvllm.config import ExpertsKind
from tinyvllm.ops.activation import exact_sigmoid, gated_exact
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.experts_spec import ExpertLayer
from tinyvllm.ops.plain import LEAST_SUM


def to_host(tensor: Tensor, *shape: int) -> np.ndarray:
    """A tensor's values as float32; flat if no shape is given."""
    values: np.ndarray = tensor.numpy().astype(np.float32, copy=False)
    return values.reshape(shape or -1)


def unit_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """x (..., K) / sqrt(mean of a row's squares + eps) (Zhang & Sennrich 2019)."""
    scaled: np.ndarray = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    return scaled


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`unit_norm` times a weight (K,)."""
    return unit_norm(x, eps) * weight


def apply_norm(x: np.ndarray, norm: Norm | None) -> np.ndarray:
    return x if norm is None else rms_norm(x, to_host(norm.weight), norm.eps)


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap) (Gemma 2, 2024, sec. 2)."""
    capped: np.ndarray = np.tanh(x / np.float32(cap)) * np.float32(cap)
    return capped


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, of which at least one value is finite."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE with half-split pairs: elements i and i + R/2 of x (T, heads, R) rotate together (Su et al. 2021). `angles`:
    R/2 cosines, then their sines."""
    (low, high), (cos, sin) = np.split(x, 2, axis=-1), np.split(angles, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rotate_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE with interleaved pairs: elements 2i and 2i + 1 rotate together."""
    (low, high), (cos, sin) = (x[..., ::2], x[..., 1::2]), np.split(angles, 2, axis=-1)
    return np.stack([low * cos - high * sin, high * cos + low * sin], axis=-1).reshape(x.shape)


def apply_epilogue(product: np.ndarray, epilogue: Epilogue) -> np.ndarray:
    """`Epilogue` of a product (T, N), in its order: (T, N), or (T, N / 2) with an activation."""
    y = product if epilogue.bias is None else product + to_host(epilogue.bias)
    if epilogue.activation is not None:
        y = gated_exact(epilogue.activation, *np.split(y, 2, axis=1))
    y = apply_norm(y, epilogue.post_norm) * np.float32(epilogue.scale)
    if epilogue.residual is not None:
        y = y + to_host(epilogue.residual, *y.shape)
    if epilogue.out_scale is not None:
        y = y * to_host(epilogue.out_scale)
    return y if epilogue.softcap is None else softcap(y, epilogue.softcap)


@dataclass(frozen=True)
class HostRouting:
    """A `Routing` on the host."""

    ids: np.ndarray  # (T, k) int32
    weights: np.ndarray  # (T, k) float32
    shared: np.ndarray | None  # (T,) float32


def choose_experts(logits: np.ndarray, layer: ExpertLayer) -> HostRouting:
    """The routing of tokens by the products (T, rows) of the router: see `ExpertsKind`. Of equal scores the first
    expert's counts more."""
    kind, count = layer.kind, layer.kind.num_experts
    values = logits[:, :count] + (0.0 if layer.router_bias is None else to_host(layer.router_bias))
    scores = softmax(values) if kind.score == "softmax" else exact_sigmoid(values)
    choice = scores + (0.0 if layer.choice_bias is None else to_host(layer.choice_bias))
    if kind.num_groups > 1:
        choice = _of_top_groups(choice, kind)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : kind.top_k].astype(np.int32)
    weights = np.take_along_axis(scores, ids, axis=1)
    if kind.renormalizes:
        weights = weights / (weights.sum(axis=1, keepdims=True) + LEAST_SUM)
    weights = weights * np.float32(kind.scale)
    if layer.expert_scale is not None:
        weights = weights * to_host(layer.expert_scale)[ids]
    shared = exact_sigmoid(logits[:, count]) if kind.has_shared_gate else None
    if layer.stacks_shared:
        weight = np.ones(len(ids), np.float32) if shared is None else shared
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=count)
        weights, shared = np.column_stack([weights, weight]), None
    return HostRouting(ids, weights.astype(np.float32), shared)


def _of_top_groups(choice: np.ndarray, kind: ExpertsKind) -> np.ndarray:
    """The scores (T, E) of experts in the best groups, -inf elsewhere. A group's score is the sum of its two highest
    (DeepSeek V3, 2024, sec. 2.1.2)."""
    groups = choice.reshape(len(choice), kind.num_groups, -1)
    best = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, : kind.top_groups]
    is_kept = np.zeros(best.shape, bool)
    np.put_along_axis(is_kept, kept, True, axis=1)
    return np.where(is_kept[:, :, None], groups, np.float32(-np.inf)).reshape(choice.shape)
