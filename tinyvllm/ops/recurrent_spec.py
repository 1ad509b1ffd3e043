"""A recurrent layer on the device: what turns its projections and a sequence's state into its output."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import Tensor

from tinyvllm.config import StateKind


@dataclass(frozen=True)
class RecurrentLayer:
    """One Gated DeltaNet layer's tables. `cols`: columns of each part of its projections, which hold q, k, v, z, b and
    a one after another, and perhaps columns of zeros.

    For each token, with q, k, v = SiLU(conv(projections)): q and k of each head are normed to length 1, and q is
    multiplied by Dk ** -0.5. Then for each value head (Yang et al. 2024, eq. 10), with decay = exp(-exp(log_decay) *
    softplus(a + decay_bias)) and beta = sigmoid(b):

        S = decay * S;  S = S + k (beta * (v - k^T S))^T;  o = S^T q;  out = RMSNorm(o) * norm * SiLU(z)
    """

    index: int  # the layer's number, and its place in the pool
    kind: StateKind
    cols: tuple[int, ...]
    conv: Tensor  # (conv_width, conv_size) float32, flat: the oldest tap first
    log_decay: Tensor  # (Hv,) float32: A_log
    decay_bias: Tensor  # (Hv,) float32: dt_bias
    norm: Tensor  # (Dv,) float32
