"""A dense gated feed-forward: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import Tensor

from tinyvllm.model.adapted import adapted_product
from tinyvllm.model.loading import Loader
from tinyvllm.ops.adapter_spec import AdapterSite
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix


@dataclass(frozen=True)
class DenseFeedForward:
    ffn_norm: Norm | None
    gate_up: Matrix
    gate_up_bias: Tensor | None
    activation: str
    down: Matrix
    down_bias: Tensor | None
    ffn_post_norm: Norm | None  # of the output, before it is added to the residual
    residual_scale: float
    gate_up_adapters: AdapterSite | None = None
    down_adapters: AdapterSite | None = None

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        return {"gate_up": (self.gate_up,), "down": (self.down,)}

    def run(self, ops: Operations, x: Tensor, step: Step, out_scale: Tensor | None = None) -> Tensor:
        return self.compute(ops, x, step, residual=x, out_scale=out_scale)

    def compute(
        self, ops: Operations, x: Tensor, step: Step, residual: Tensor | None, out_scale: Tensor | None = None
    ) -> Tensor:
        """(T * hidden,): `residual` plus the output for x."""
        hidden = self._gate(ops, x, step)
        epilogue = Epilogue(
            bias=self.down_bias,
            post_norm=self.ffn_post_norm,
            scale=self.residual_scale,
            residual=residual,
            out_scale=out_scale,
        )
        return adapted_product(ops, "down", hidden, self.down, self.down_adapters, step, epilogue)

    def _gate(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        """(T * ffn,): activation(gate) * up. What adapters add to both comes before the activation, which is then not
        part of the product's kernel."""
        tokens, norm = step.num_tokens, self.ffn_norm
        if self.gate_up_adapters is None or not step.layout.has_adapters:
            gate = Epilogue(bias=self.gate_up_bias, activation=self.activation)
            return ops.linear("gate_up", x, [self.gate_up], tokens, norm, gate)[0]
        (both,) = ops.linear("gate_up", x, [self.gate_up], tokens, norm)
        return ops.adapt_gated(x, both, self.gate_up_adapters, step, norm, self.activation, self.gate_up_bias)


def load_dense(load: Loader, index: int, norm: str | None, post_norm: str | None) -> DenseFeedForward:
    """`norm`, `post_norm`: the names of the norms before and after it; None: it has no such norm."""
    prefix, config, ops = f"model.layers.{index}", load.config, load.backend
    hidden, ffn, has_bias = config.hidden_size, config.sizes_of(index).ffn_size, "ffn" in config.biases
    gate = load.take(f"{prefix}.mlp.gate_proj.weight", ffn, hidden)
    up = load.take(f"{prefix}.mlp.up_proj.weight", ffn, hidden)
    gate_up_biases = {f"{prefix}.mlp.{name}_proj.bias": ffn for name in ("gate", "up")}
    return DenseFeedForward(
        ffn_norm=load.optional_norm(prefix, norm),
        gate_up=ops.gate_up(gate, up),
        gate_up_bias=load.vectors(gate_up_biases) if has_bias else None,
        activation=config.activation,
        down=ops.matrix(load.take(f"{prefix}.mlp.down_proj.weight", hidden, ffn)),
        down_bias=load.vectors({f"{prefix}.mlp.down_proj.bias": hidden}) if has_bias else None,
        ffn_post_norm=load.optional_norm(prefix, post_norm),
        residual_scale=config.residual_scale,
    )
