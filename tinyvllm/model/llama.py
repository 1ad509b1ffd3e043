"""Llama 2, 3, 3.x and kin (SmolLM2, Mistral without a window): RMSNorm, grouped-query attention with RoPE, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.config import ModelConfig
from tinyvllm.device.recording import keep
from tinyvllm.model.rope import rope_table
from tinyvllm.ops.backend import AttentionShape, Backend, KVPool, Norm
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.step_inputs import StepLayout

if TYPE_CHECKING:
    from tinyvllm.model.weights.checkpoint import WeightSource


@dataclass(frozen=True)
class Layer:
    """One block's weights. `qkv` is one matrix, or several where their formats differ (Q4_K_M keeps V in Q6_K)."""

    attention_norm: Norm
    qkv: tuple[Matrix, ...]
    head_norm: Norm | None  # of every head of queries and keys, in families that have it
    attention_out: Matrix
    ffn_norm: Norm
    gate_up: Matrix
    down: Matrix


class Llama:
    """Owns the weights on the device; `__call__` emits one step's operations."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: WeightSource,
        backend: Backend,
        num_positions: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load every tensor. `num_positions`: rows of the rope table (max_model_len). Raises WeightMismatchError."""
        self.config, self.backend, self.checkpoint = config, backend, checkpoint
        self.shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self.rope = backend.device.upload(rope_table(config, num_positions))
        total = config.num_layers + 1
        self.layers = []
        for index in range(config.num_layers):
            self.layers.append(self._load_layer(f"model.layers.{index}"))
            progress(index + 1, total)
        table = self._take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embedding = backend.matrix(table)
        self.norm = self._norm("model.norm.weight")
        self.head = self.embedding
        if not config.tie_embeddings:
            self.head = backend.matrix(self._take("lm_head.weight", config.vocab_size, config.hidden_size))
        checkpoint.finish()
        del self.checkpoint  # its file need not stay open
        progress(total, total)

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix on the device, once; a tied head is the embedding."""
        matrices = [m for layer in self.layers for m in (*layer.qkv, layer.attention_out, layer.gate_up, layer.down)]
        return [*matrices, self.embedding] + ([] if self.head is self.embedding else [self.head])

    @property
    def logit_stride(self) -> int:
        """Columns of a row of logits: the vocabulary, padded."""
        return self.head.num_rows

    def __call__(
        self, layout: StepLayout, inputs: Tensor, pool: KVPool, *, is_decode: bool, newest: Tensor | None = None
    ) -> Tensor:
        """One step: (R * logit_stride,) float32 logits. `is_decode`: T = R and row i samples for sequence i. `newest`:
        the output of the step before, for tokens that the host does not know yet."""
        ops, tokens = self.backend, layout.num_tokens
        x = ops.embed(self.embedding, inputs, layout, newest)  # (T * hidden,)
        for index, layer in enumerate(self.layers):
            x = self._layer(layer, index, x, layout, inputs, pool, is_decode)
        if not is_decode:
            keep(*ops.parts_of(x))  # which are asked for where a text is embedded
            x = ops.take_rows(x, inputs, layout, self.config.hidden_size)
            tokens = layout.num_seqs
        (logits,) = ops.norm_linear("lm_head", x, self.norm, [self.head], tokens)
        return ops.join(logits, self.logit_stride, layout)

    def _layer(
        self, layer: Layer, index: int, x: Tensor, layout: StepLayout, inputs: Tensor, pool: KVPool, is_decode: bool
    ) -> Tensor:
        ops, tokens = self.backend, layout.num_tokens
        qkv = ops.norm_linear("qkv", x, layer.attention_norm, layer.qkv, tokens)  # (T * (H + 2K) * D,) in all
        widths = [matrix.num_rows for matrix in layer.qkv]
        heads = ops.attend(
            qkv,
            widths,
            self.shape,
            pool,
            index,
            inputs,
            self.rope,
            layout,
            is_decode=is_decode,
            head_norm=layer.head_norm,
        )
        x = ops.linear_add("attention_out", heads, layer.attention_out, x, tokens)
        hidden = ops.norm_gated("gate_up", x, layer.ffn_norm, layer.gate_up, tokens)  # (T * ffn,)
        return ops.linear_add("down", hidden, layer.down, x, tokens)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load_layer(self, prefix: str) -> Layer:
        config, ops = self.config, self.backend
        hidden, ffn = config.hidden_size, config.ffn_size
        q = self._take(f"{prefix}.self_attn.q_proj.weight", config.q_size, hidden)
        k = self._take(f"{prefix}.self_attn.k_proj.weight", config.kv_size, hidden)
        v = self._take(f"{prefix}.self_attn.v_proj.weight", config.kv_size, hidden)
        gate = self._take(f"{prefix}.mlp.gate_proj.weight", ffn, hidden)
        up = self._take(f"{prefix}.mlp.up_proj.weight", ffn, hidden)
        return Layer(
            attention_norm=self._norm(f"{prefix}.input_layernorm.weight"),
            qkv=ops.stacked([q, k, v]),
            head_norm=self._head_norm(f"{prefix}.self_attn"),
            attention_out=ops.stacked([self._take(f"{prefix}.self_attn.o_proj.weight", hidden, config.q_size)])[0],
            ffn_norm=self._norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=ops.gate_up(gate, up),
            down=ops.stacked([self._take(f"{prefix}.mlp.down_proj.weight", hidden, ffn)])[0],
        )

    def _take(self, name: str, rows: int, cols: int) -> HostMatrix:
        return self.checkpoint.take(name, (rows, cols))

    def _head_norm(self, prefix: str) -> Norm | None:
        """What `Backend.attend` norms heads with; a family that does so has this method its own way."""
        return None

    def _norm(self, *names: str, size: int | None = None) -> Norm:
        """The norms of these names, side by side, each of `size` weights, or of hidden_size."""
        shape = (size or self.config.hidden_size,)
        weight = np.concatenate([to_float32(self.checkpoint.take(name, shape)) for name in names])
        return Norm(self.backend.device.upload(weight.astype(np.float32)), self.config.norm_eps)
