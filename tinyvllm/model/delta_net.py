"""A Gated DeltaNet layer (Yang et al. 2024): its weights, and its equations. The recurrence is `Operations.recur`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, stack_rows, to_float32
from tinyvllm.config import StateKind
from tinyvllm.model.loading import Loader
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.recurrent_spec import RecurrentLayer


@dataclass(frozen=True)
class DeltaNet:
    """`recurrent_in` is one matrix, or several where their formats differ: the rows of q, k and v, then z, b and a."""

    recurrent: RecurrentLayer
    norm: Norm | None
    recurrent_in: tuple[Matrix, ...]
    recurrent_out: Matrix
    residual_scale: float

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        return {"recurrent_in": self.recurrent_in, "recurrent_out": (self.recurrent_out,)}

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        tokens = step.num_tokens
        projections = ops.linear("recurrent_in", x, self.recurrent_in, tokens, self.norm)
        heads = ops.recur(projections, self.recurrent, step)  # (T * Hv * Dv,)
        epilogue = Epilogue(scale=self.residual_scale, residual=x)
        return ops.linear("recurrent_out", heads, [self.recurrent_out], tokens, None, epilogue)[0]


def load_delta_net(load: Loader, index: int, kind: StateKind, norm: str | None) -> DeltaNet:
    """`norm`: the name of the norm before it; None: it has no such norm."""
    layer, ops, hidden = f"model.layers.{index}", load.backend, load.config.hidden_size
    prefix = f"{layer}.linear_attn"
    sizes = {"qkv": kind.conv_size, "z": kind.value_size, "b": kind.num_heads, "a": kind.num_heads}
    qkv, z, b, a = (load.take(f"{prefix}.in_proj_{name}.weight", rows, hidden) for name, rows in sizes.items())
    matrices = ops.stacked([qkv, z, _b_over_a(b, a)])
    conv = load.array(f"{prefix}.conv1d.weight", (kind.conv_size, 1, kind.conv_width))
    return DeltaNet(
        recurrent=RecurrentLayer(
            index=index,
            kind=kind,
            cols=tuple(matrix.num_rows for matrix in matrices),
            conv=ops.device.upload(np.ascontiguousarray(conv.reshape(kind.conv_size, kind.conv_width).T).reshape(-1)),
            log_decay=load.vectors({f"{prefix}.A_log": kind.num_heads}),
            decay_bias=load.vectors({f"{prefix}.dt_bias": kind.num_heads}),
            norm=load.vectors({f"{prefix}.norm.weight": kind.value_dim}),
        ),
        norm=load.optional_norm(layer, norm),
        recurrent_in=matrices,
        recurrent_out=ops.matrix(load.take(f"{prefix}.out_proj.weight", hidden, kind.value_size)),
        residual_scale=load.config.residual_scale,
    )


def _b_over_a(b: HostMatrix, a: HostMatrix) -> HostMatrix:
    """Both as one matrix: in float32 if their formats differ, which costs little for so few rows."""
    stacked = stack_rows([b, a])
    return stacked[0] if len(stacked) == 1 else np.concatenate([to_float32(b), to_float32(a)])
