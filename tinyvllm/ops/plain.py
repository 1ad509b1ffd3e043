"""Norms, epilogues and routing in plain Tensor arithmetic, for the general forms of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import Tensor, dtypes

from tinyvllm.ops.activation import gated_plain
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.experts_spec import ExpertLayer, Routing


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


LEAST_SUM = 1e-20  # added to the sum that weights are divided by: all scores of a sigmoid may be 0


def plain_routing(logits: Tensor, layer: ExpertLayer) -> Routing:
    """The routing of tokens by the products (T, rows) of the router: see `ExpertsKind`. It is chosen by rank, so that
    equal scores have an order. Scores and ranks are written before they are compared: kernels would compute them again
    for every pair of experts."""
    kind, tokens = layer.kind, logits.shape[0]
    experts = logits[:, : kind.num_experts].float()
    if layer.router_bias is not None:
        experts = experts + layer.router_bias
    scores = (experts.softmax(-1) if kind.score == "softmax" else experts.sigmoid()).contiguous()
    choice = scores if layer.choice_bias is None else (scores + layer.choice_bias).contiguous()
    if kind.num_groups > 1:
        choice = _of_top_groups(choice, kind.num_groups, kind.top_groups)
    is_chosen = _ranks(choice).unsqueeze(1) == Tensor.arange(kind.top_k).reshape(1, -1, 1)  # (T, k, E)
    ids = is_chosen.where(Tensor.arange(kind.num_experts), 0).sum(-1).clip(0, kind.num_experts - 1)
    weights = is_chosen.where(scores.unsqueeze(1), 0.0).sum(-1)
    if kind.renormalizes:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    weights = weights * kind.scale
    if layer.expert_scale is not None:
        weights = weights * is_chosen.where(layer.expert_scale, 0.0).sum(-1)
    shared = logits[:, kind.num_experts].float().sigmoid() if kind.has_shared_gate else None
    if layer.stacks_shared:
        weight = Tensor.ones(tokens, 1, device=logits.device) if shared is None else shared.reshape(tokens, 1)
        ids = ids.cat(ids[:, :1] * 0 + kind.num_experts, dim=1)
        weights, shared = weights.cat(weight, dim=1), None
    return Routing(ids.cast(dtypes.int).reshape(-1), weights.reshape(-1), shared)


def _ranks(scores: Tensor) -> Tensor:
    """(T, E): how many of a row's scores are higher, or equal and before it."""
    index, mine, other = Tensor.arange(scores.shape[1]), scores.unsqueeze(2), scores.unsqueeze(1)
    is_before = index.unsqueeze(0) < index.unsqueeze(1)
    return ((other > mine) | ((other == mine) & is_before)).sum(-1).contiguous()


def _of_top_groups(choice: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The scores (T, E) of experts in the best groups, -inf elsewhere. A group's score is the sum of its two highest
    (DeepSeek V3, 2024, sec. 2.1.2)."""
    groups = choice.reshape(choice.shape[0], num_groups, -1)
    size = groups.shape[-1]
    ranks = _ranks(groups.reshape(-1, size)).reshape(groups.shape)
    is_top = _ranks((ranks < 2).where(groups, 0.0).sum(-1).contiguous()) < top_groups  # (T, groups)
    return is_top.unsqueeze(-1).where(groups, -float("inf")).reshape(choice.shape).contiguous()
