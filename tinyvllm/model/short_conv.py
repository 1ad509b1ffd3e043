"""A gated short convolution (LFM2 Technical Report, 2025, sec. 2): out(c * conv(b * x)), b, c and x of the normed
input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import take_rows
from tinyvllm.config import ConvKind
from tinyvllm.model.loading import Loader
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import PANEL, Matrix
from tinyvllm.ops.short_conv import ConvLayer


@dataclass(frozen=True)
class ShortConv:
    conv: ConvLayer
    norm: Norm | None
    conv_in: Matrix  # rows of b, c and x
    conv_out: Matrix

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        return {"conv_in": (self.conv_in,), "conv_out": (self.conv_out,)}

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        (projected,) = ops.linear("conv_in", x, [self.conv_in], step.num_tokens, self.norm)  # (T * 3 * channels,)
        mixed = ops.convolve(projected, self.conv, step)  # (T * channels,)
        return ops.linear("conv_out", mixed, [self.conv_out], step.num_tokens, None, Epilogue(residual=x))[0]


def load_short_conv(load: Loader, index: int, kind: ConvKind, norm: str | None) -> ShortConv:
    """`norm`: the name of the norm before it; None: it has no such norm."""
    layer, ops, hidden, channels = f"model.layers.{index}", load.backend, load.config.hidden_size, kind.num_channels
    projection = load.take(f"{layer}.conv.in_proj.weight", 3 * channels, hidden)
    parts = [take_rows(projection, slice(i * channels, (i + 1) * channels)) for i in range(3)]
    conv_in = ops.stacked(parts, channels // PANEL)[0]  # one matrix, because they have one format
    taps = load.array(f"{layer}.conv.conv.weight", (channels, 1, kind.conv_width)).reshape(channels, kind.conv_width)
    return ShortConv(
        conv=ConvLayer(
            index=index,
            kind=kind,
            cols=conv_in.num_rows,
            taps=ops.device.upload(np.ascontiguousarray(taps.T).reshape(-1)),
        ),
        norm=load.optional_norm(layer, norm),
        conv_in=conv_in,
        conv_out=ops.matrix(load.take(f"{layer}.conv.out_proj.weight", hidden, channels)),
    )
