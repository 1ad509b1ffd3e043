"""Gemma 4, text: Gemma 3's layers with normed values; in E2B and E4B also an embedding of each layer's own, in 26B-A4B
experts beside the dense feed-forward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from tinygrad import Tensor

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.experts import SparseFeedForward, load_sparse
from tinyvllm.model.feed_forward import DenseFeedForward, load_dense
from tinyvllm.model.gemma3 import Gemma3
from tinyvllm.model.layer import FeedForward, Layer
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix


@dataclass(frozen=True)
class LayerEmbedding:
    """How a layer adds its own embedding of each token: post_norm(projection(GELU(gate(x)) * embedding))."""

    start: Tensor  # (1,) int32: its first column among those of all layers
    gate: Matrix
    projection: Matrix
    post_norm: Norm


@dataclass(frozen=True)
class Gemma4Layer(Layer):
    scale: Tensor  # (1,) float32, of the layer's output
    embedding: LayerEmbedding | None

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        own = self.embedding
        more = {} if own is None else {"layer_gate": (own.gate,), "layer_projection": (own.projection,)}
        return super().matrices | more


@dataclass(frozen=True)
class EmbeddingInputs:
    """All layers' own embeddings of a token: its row of a table, and a projection of its embedding, added up."""

    table: Matrix  # (V, L * size)
    projection: Matrix  # (L * size, hidden)
    norm: Norm  # of each layer's part of the projection


@dataclass(frozen=True)
class Gemma4Experts:
    """Experts beside the dense feed-forward, which both read the same residual stream, through norms of their own."""

    dense: DenseFeedForward
    experts: SparseFeedForward
    post_norm: Norm  # of their sum

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        return self.dense.matrices | self.experts.matrices

    def run(self, ops: Operations, x: Tensor, step: Step, out_scale: Tensor | None = None) -> Tensor:
        total = self.dense.compute(ops, x, step, residual=None)
        total = self.experts.compute(ops, x, step, residual=total)
        return ops.finish(total, step.num_tokens, Epilogue(post_norm=self.post_norm, residual=x, out_scale=out_scale))


class Gemma4(Gemma3):
    """transformers' Gemma4TextModel. Which layers see every token, their sizes, and whose keys they read are in the
    config. Where k_proj serves for keys and values, its rows are stored twice, so that all kernels apply."""

    layers: list[Gemma4Layer]  # type: ignore[assignment]

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        kinds = super().layer_kinds(config)
        return tuple(replace(kind, value_norm_eps=config.norm_eps if kind.kv_layer is None else None) for kind in kinds)

    @property
    def matrices(self) -> list[Matrix]:
        more = [] if self.inputs is None else [self.inputs.table, self.inputs.projection]
        return [*super().matrices, *more]

    def _run_layers(self, x: Tensor, step: Step) -> Tensor:
        embedded = None if self.inputs is None else self._embed_layers(self.inputs, x, step)
        for layer in self.layers:
            x = layer.mixer.run(self.backend, x, step)
            if layer.embedding is None or embedded is None:
                x = layer.feed_forward.run(self.backend, x, step, layer.scale)
            else:
                x = layer.feed_forward.run(self.backend, x, step)
                x = self._add_embedding(layer, layer.embedding, x, embedded, step)
        return x

    def _embed_layers(self, inputs: EmbeddingInputs, x: Tensor, step: Step) -> Tensor:
        """(T * L * size,): (norm(x @ projection.T / sqrt(hidden)) + row of the table * sqrt(size)) / sqrt(2)."""
        ops, tokens = self.backend, step.num_tokens
        rows = ops.embed(inputs.table, step, math.sqrt(self.config.per_layer_size / 2))
        (projected,) = ops.linear("layer_embeddings", x, [inputs.projection], tokens)
        return ops.norm_groups(projected, inputs.norm, tokens, rows)

    def _add_embedding(
        self, layer: Gemma4Layer, own: LayerEmbedding, x: Tensor, embedded: Tensor, step: Step
    ) -> Tensor:
        ops, tokens = self.backend, step.num_tokens
        (gate,) = ops.linear("layer_gate", x, [own.gate], tokens)
        gated = ops.gate_columns(gate, embedded, own.start, tokens, self.config.activation)
        epilogue = Epilogue(post_norm=own.post_norm, residual=x, out_scale=layer.scale)
        return ops.linear("layer_projection", gated, [own.projection], tokens, None, epilogue)[0]

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load_more(self) -> None:
        config, ops = self.config, self.backend
        self.inputs: EmbeddingInputs | None = None
        if not config.per_layer_size:
            return
        columns, hidden = config.num_layers * config.per_layer_size, config.hidden_size
        norm = self.load.norm("model.per_layer_projection_norm.weight", size=config.per_layer_size, factor=0.5**0.5)
        self.inputs = EmbeddingInputs(
            table=ops.matrix(self.load.take("model.embed_tokens_per_layer.weight", config.vocab_size, columns)),
            projection=ops.matrix(self.load.take("model.per_layer_model_projection.weight", columns, hidden)),
            norm=Norm(norm.weight, norm.eps * hidden),  # the product is not divided by sqrt(hidden)
        )

    def _load_layer(self, index: int, kind: LayerKind) -> Gemma4Layer:
        layer = super()._load_layer(index, kind)
        scale = self.load.vectors({f"model.layers.{index}.layer_scalar": 1})
        own = self._load_embedding(index) if self.config.per_layer_size else None
        return Gemma4Layer(layer.mixer, layer.feed_forward, scale=scale, embedding=own)

    def _load_feed_forward(self, index: int) -> FeedForward:
        kind = self.config.experts_of(index)
        if kind is None:
            return super()._load_feed_forward(index)
        prefix, load = f"model.layers.{index}", self.load
        first, second = (f"post_feedforward_layernorm_{i}" for i in (1, 2))
        experts = load_sparse(load, index, kind, "pre_feedforward_layernorm_2", second)
        router_norm = load.norm(f"{prefix}.mlp.gate.scale", factor=self.config.hidden_size**-0.5)
        return Gemma4Experts(
            dense=load_dense(load, index, self.FFN_NORM, first),
            experts=replace(experts, router_norm=router_norm),
            post_norm=load.norm(f"{prefix}.{self.FFN_POST_NORM}.weight"),
        )

    def _load_embedding(self, index: int) -> LayerEmbedding:
        prefix, ops = f"model.layers.{index}", self.backend
        hidden, size = self.config.hidden_size, self.config.per_layer_size
        return LayerEmbedding(
            start=ops.device.upload(np.array([index * size], np.int32)),
            gate=ops.matrix(self.load.take(f"{prefix}.per_layer_input_gate.weight", size, hidden)),
            projection=ops.matrix(self.load.take(f"{prefix}.per_layer_projection.weight", hidden, size)),
            post_norm=self.load.norm(f"{prefix}.post_per_layer_input_norm.weight"),
        )
