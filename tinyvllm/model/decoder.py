"""What all families of decoders share: token ids through layers of attention and a gated feed-forward to logits.

A family is a subclass that says how it differs: the kinds of its layers, the names of its norms, a scale. It reads as
the paper's equations; loading, and calling the backend, happen here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.config import LayerKind, ModelConfig, QueryScaling, Rope
from tinyvllm.device.recording import keep
from tinyvllm.model.rope import rope_table
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import Backend, Epilogue, Norm, Step, group_of, pool_groups
from tinyvllm.ops.formats.matrix import Matrix

if TYPE_CHECKING:
    from tinyvllm.model.weights.checkpoint import WeightSource


@dataclass(frozen=True)
class Layer:
    """One block's weights. `qkv` is one matrix, or several where their formats differ (Q4_K_M keeps V in Q6_K)."""

    attention: AttentionLayer
    attention_norm: Norm | None
    qkv: tuple[Matrix, ...]
    attention_out: Matrix
    attention_post_norm: Norm | None  # of the attention's output, before it is added to the residual
    ffn_norm: Norm | None
    gate_up: Matrix
    down: Matrix
    ffn_post_norm: Norm | None
    out_bias: Tensor | None  # of attention_out
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (*self.qkv, self.attention_out, self.gate_up, self.down)


class Decoder:
    """Owns the weights on the device; `__call__` emits one step's operations.

    By default: RMSNorm, grouped-query attention with RoPE, a gated feed-forward (Touvron et al. 2023). A family
    overrides the attributes and methods before `__init__`.
    """

    ATTENTION_NORM: ClassVar[str | None] = "input_layernorm"
    ATTENTION_POST_NORM: ClassVar[str | None] = None
    FFN_NORM: ClassVar[str | None] = "post_attention_layernorm"
    FFN_POST_NORM: ClassVar[str | None] = None

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        """What attention computes in each layer: what the files say, and what the architecture implies."""
        return tuple(config.kind_of(index) for index in range(config.num_layers))

    @classmethod
    def embedding_scale(cls, config: ModelConfig) -> float:
        """What the embedding's rows are multiplied by."""
        return config.embedding_scale

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: WeightSource,
        backend: Backend,
        num_positions: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load every tensor. `num_positions`: rows of the rope tables (max_model_len). Raises WeightMismatchError."""
        config = replace(config, layer_kinds=self.layer_kinds(replace(config, layer_kinds=())))
        self.config, self.backend, self.checkpoint = config, backend, checkpoint
        self.num_positions = num_positions
        self.pool_groups = pool_groups(config.layers, num_positions)
        self.ropes = self._load_ropes(num_positions)
        total = config.num_layers + 1
        self.layers = []
        for index, kind in enumerate(config.layers):
            self.layers.append(self._load_layer(index, kind))
            progress(index + 1, total)
        table = self._take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embedding = backend.matrix(table)
        self._load_more()
        self.norm = self._norm("model.norm.weight")
        self.head = self.embedding
        if not config.tie_embeddings:
            self.head = backend.matrix(self._take("lm_head.weight", config.vocab_size, config.hidden_size))
        # (labels, hidden) float32: a classifier's head, which is computed on the host
        self.score = None
        if config.num_labels:
            self.score = to_float32(self._take("score.weight", config.num_labels, config.hidden_size))
        checkpoint.finish()
        del self.checkpoint  # its file need not stay open
        progress(total, total)

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix on the device, once; a tied head is the embedding."""
        matrices = [matrix for layer in self.layers for matrix in layer.matrices]
        return [*matrices, self.embedding] + ([] if self.head is self.embedding else [self.head])

    @property
    def logit_stride(self) -> int:
        """Columns of a row of logits: the vocabulary, padded."""
        return self.head.num_rows

    def __call__(self, step: Step) -> Tensor:
        """One step: (R * logit_stride,) float32 logits. In a decode step T = R and row i samples for sequence i."""
        ops, config, num_rows = self.backend, self.config, step.num_tokens
        x = ops.embed(self.embedding, step, self.embedding_scale(config))  # (T * hidden,)
        x = self._run_layers(x, step)
        if not step.is_decode:
            keep(*ops.parts_of(x))  # embedding requests read them
            x = ops.take_rows(x, step, config.hidden_size)
            num_rows = step.layout.num_seqs
        epilogue = Epilogue(scale=config.logit_scale, softcap=config.logit_softcap)
        (logits,) = ops.linear("lm_head", x, [self.head], num_rows, self.norm, epilogue)
        return ops.join(logits, self.logit_stride, step.layout)

    def _run_layers(self, x: Tensor, step: Step) -> Tensor:
        for layer in self.layers:
            x = self._feed_forward(layer, self._attention(layer, x, step), step)
        return x

    def _attention(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        ops, tokens = self.backend, step.num_tokens
        qkv = ops.linear("qkv", x, layer.qkv, tokens, layer.attention_norm)  # (T * (H + 2K) * D,) in all
        heads = ops.attend(qkv, layer.attention, step)  # (T * H * D,)
        epilogue = self._added(layer.out_bias, layer.attention_post_norm, x)
        return ops.linear("attention_out", heads, [layer.attention_out], tokens, None, epilogue)[0]

    def _feed_forward(self, layer: Layer, x: Tensor, step: Step, out_scale: Tensor | None = None) -> Tensor:
        """`out_scale`: (1,) float32, of the sum with the residual."""
        ops, tokens = self.backend, step.num_tokens
        gate = Epilogue(bias=layer.gate_up_bias, activation=self.config.activation)
        (hidden,) = ops.linear("gate_up", x, [layer.gate_up], tokens, layer.ffn_norm, gate)  # (T * ffn,)
        epilogue = replace(self._added(layer.down_bias, layer.ffn_post_norm, x), out_scale=out_scale)
        return ops.linear("down", hidden, [layer.down], tokens, None, epilogue)[0]

    def _added(self, bias: Tensor | None, post_norm: Norm | None, residual: Tensor) -> Epilogue:
        """What follows a product that is added to the residual."""
        return Epilogue(bias=bias, post_norm=post_norm, scale=self.config.residual_scale, residual=residual)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load_more(self) -> None:
        """Load the tensors of a family that are in no layer, besides the embedding, the last norm and the head."""

    def _load_ropes(self, num_positions: int) -> list[Tensor]:
        """The table of each rope in `rope_list`."""
        tables = [rope_table(rope, dim, num_positions, scaling) for rope, dim, scaling in self.rope_list]
        return [self.backend.device.upload(table) for table in tables]

    @property
    def rope_list(self) -> list[tuple[Rope, int, QueryScaling | None]]:
        """The different ropes of the layers, with the dimension of the heads that they rotate, and what a query is
        multiplied by besides."""
        kinds = self.config.layers
        found = ((kind.rope, kind.head_dim, kind.query_scaling) for kind in kinds if kind.rope is not None)
        return list(dict.fromkeys(found))

    def _load_layer(self, index: int, kind: LayerKind) -> Layer:
        prefix, config, ops = f"model.layers.{index}", self.config, self.backend
        hidden, ffn = config.hidden_size, config.sizes_of(index).ffn_size
        qkv = ops.stacked(self._load_qkv(f"{prefix}.self_attn", kind), kind.num_kv_heads)
        gate = self._take(f"{prefix}.mlp.gate_proj.weight", ffn, hidden)
        up = self._take(f"{prefix}.mlp.up_proj.weight", ffn, hidden)
        has_out_bias, has_ffn_bias = "out" in config.biases, "ffn" in config.biases
        gate_up_biases = {f"{prefix}.mlp.{name}_proj.bias": ffn for name in ("gate", "up")}
        return Layer(
            attention=self._load_attention(index, kind, tuple(matrix.num_rows for matrix in qkv)),
            attention_norm=self._optional_norm(prefix, self.ATTENTION_NORM),
            qkv=qkv,
            attention_out=ops.matrix(self._take(f"{prefix}.self_attn.o_proj.weight", hidden, kind.q_size)),
            attention_post_norm=self._optional_norm(prefix, self.ATTENTION_POST_NORM),
            ffn_norm=self._optional_norm(prefix, self.FFN_NORM),
            gate_up=ops.gate_up(gate, up),
            down=ops.matrix(self._take(f"{prefix}.mlp.down_proj.weight", hidden, ffn)),
            ffn_post_norm=self._optional_norm(prefix, self.FFN_POST_NORM),
            out_bias=self._vectors({f"{prefix}.self_attn.o_proj.bias": hidden}) if has_out_bias else None,
            gate_up_bias=self._vectors(gate_up_biases) if has_ffn_bias else None,
            down_bias=self._vectors({f"{prefix}.mlp.down_proj.bias": hidden}) if has_ffn_bias else None,
        )

    def _load_qkv(self, prefix: str, kind: LayerKind) -> list[HostMatrix]:
        hidden, rows = self.config.hidden_size, _qkv_rows(kind)
        matrices = [self._take(f"{prefix}.{name}_proj.weight", count, hidden) for name, count in rows.items()]
        return [*matrices, matrices[1]] if kind.has_v_from_k else matrices  # the rows of k a second time

    def _load_attention(self, index: int, kind: LayerKind, qkv_cols: tuple[int, ...]) -> AttentionLayer:
        prefix = f"model.layers.{index}.self_attn"
        bias = rope = None
        if kind.rope is not None:
            rope = self.ropes[self.rope_list.index((kind.rope, kind.head_dim, kind.query_scaling))]
        if kind.has_bias:
            bias = self._vectors({f"{prefix}.{name}_proj.bias": size for name, size in _qkv_rows(kind).items()})
        return AttentionLayer(
            index=index,
            kind=kind,
            qkv_cols=qkv_cols,
            pool_group=group_of(self.pool_groups, index if kind.kv_layer is None else kind.kv_layer),
            rope=rope,
            head_norm=None if kind.head_norm_eps is None else self._load_head_norm(prefix, kind),
            bias=bias,
            sinks=self._vectors({f"{prefix}.sinks": kind.num_heads}) if kind.has_sinks else None,
        )

    def _load_head_norm(self, prefix: str, kind: LayerKind) -> Tensor:
        """The weights of the norm of queries, and of keys."""
        key_norm = "k_norm" if kind.kv_layer is None else "q_norm"  # read only with keys of its own
        names = [f"{prefix}.q_norm.weight", f"{prefix}.{key_norm}.weight"]
        if not kind.head_norm_is_whole:
            return self._norm(*names, size=kind.head_dim).weight
        return self._vectors(dict(zip(names, (kind.q_size, kind.kv_size), strict=True)))

    def _take(self, name: str, rows: int, cols: int) -> HostMatrix:
        return self.checkpoint.take(name, (rows, cols))

    def _vectors(self, sizes: Mapping[str, int]) -> Tensor:
        """The vectors of these names and sizes, side by side, float32."""
        taken = [to_float32(self.checkpoint.take(name, (size,))) for name, size in sizes.items()]
        return self.backend.device.upload(np.concatenate(taken).astype(np.float32))

    def _optional_norm(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{prefix}.{name}.weight")

    def _norm(self, *names: str, size: int | None = None, factor: float = 1.0) -> Norm:
        """The norms of these names, side by side, each of `size` weights, or of hidden_size, times `factor`."""
        shape = (size or self.config.hidden_size,)
        weight = np.concatenate([to_float32(self.checkpoint.take(name, shape)) for name in names])
        weight = (weight.astype(np.float32) + np.float32(self.config.norm_offset)) * np.float32(factor)
        return Norm(self.backend.device.upload(weight), self.config.norm_eps)


def _qkv_rows(kind: LayerKind) -> dict[str, int]:
    """The rows of q, then of k and v; without v where k serves for both, and of q alone where another layer's keys and
    values are read."""
    if kind.kv_layer is not None:
        return {"q": kind.q_size}
    if kind.has_v_from_k:
        return {"q": kind.q_size, "k": kind.kv_size}
    return {"q": kind.q_size, "k": kind.kv_size, "v": kind.kv_size}
