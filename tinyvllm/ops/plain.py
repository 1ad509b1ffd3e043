"""Norms and epilogues in plain Tensor arithmetic, for the reference and for general products on GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import Tensor

from tinyvllm.ops.activation import gated_plain
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import Epilogue, Norm


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., K) / sqrt(mean of a row's squares + eps) (Zhang & Sennrich 2019)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """`unit_norm` times a weight (K,)."""
    return unit_norm(x, norm.eps) * norm.weight


def norm_whole_sections(qkv: Sequence[Tensor], layer: AttentionLayer, num_tokens: int) -> Tensor:
    """(T * columns,): qkv with its biases, and the RMSNorm of all heads' queries together, and of all keys (OLMo 2,
    2024, sec. 3.2)."""
    kind = layer.kind
    values = Tensor.cat(*[part.reshape(num_tokens, -1).float() for part in qkv], dim=1)
    values = values[:, : kind.q_size + 2 * kind.kv_size]  # zeros may follow
    if layer.bias is not None:
        values = values + layer.bias
    assert kind.head_norm_eps is not None and layer.head_norm is not None
    q, k, v = values.split([kind.q_size, kind.kv_size, kind.kv_size], dim=1)
    weights = layer.head_norm.split([kind.q_size, kind.kv_size])
    q, k = (rms_norm(x, Norm(w, kind.head_norm_eps)) for x, w in zip((q, k), weights, strict=True))
    return Tensor.cat(q, k, v, dim=1).reshape(-1)


def plain_epilogue(product: Tensor, epilogue: Epilogue) -> Tensor:
    """`Epilogue` of a product (T, N), in its order: (T, N), or (T, N / 2) with an activation."""
    y = product if epilogue.bias is None else product + epilogue.bias
    if epilogue.activation is not None:
        y = gated_plain(epilogue.activation, *y.chunk(2, dim=1))
    if epilogue.post_norm is not None:
        y = rms_norm(y, epilogue.post_norm)
    if epilogue.scale != 1.0:
        y = y * epilogue.scale
    if epilogue.residual is not None:
        # in this order: a lazy residual (gpu/fused.py) on the left would make the sum lazy, without a description
        y = y + epilogue.residual.reshape(y.shape)
    if epilogue.out_scale is not None:
        y = y * epilogue.out_scale
    return y if epilogue.softcap is None else softcap(y, epilogue.softcap)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) (Gemma 2, 2024, sec. 2)."""
    return (x * (1.0 / cap)).tanh() * cap
