"""What all families of decoders share: token ids through layers of attention and a gated feed-forward to logits.

A family is a subclass that says how it differs: the kinds of its layers, the names of its norms, a scale. It reads as
the paper's equations; loading, and calling the backend, happen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from tinygrad import Tensor

from tinyvllm.arrays import to_float32
from tinyvllm.config import ConvKind, LayerKind, ModelConfig, QueryScaling, Rope
from tinyvllm.device.recording import keep
from tinyvllm.model.attention import Placed, load_attention
from tinyvllm.model.delta_net import load_delta_net
from tinyvllm.model.drafting import DraftingHead, HiddenRows, drafting_kind, load_drafting
from tinyvllm.model.experts import load_sparse
from tinyvllm.model.feed_forward import load_dense
from tinyvllm.model.latent_attention import load_latent_attention
from tinyvllm.model.layer import FeedForward, Layer, Mixer
from tinyvllm.model.loading import Loader
from tinyvllm.model.rope import rope_table
from tinyvllm.model.short_conv import load_short_conv
from tinyvllm.ops.backend import Backend, Epilogue, Step, group_of, pool_groups
from tinyvllm.ops.formats.matrix import Matrix

if TYPE_CHECKING:
    from tinyvllm.model.weights.checkpoint import WeightSource


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
        self.config, self.backend = config, backend
        self.load = Loader(config, checkpoint, backend)
        self.num_positions = num_positions
        stored = (*config.layers, drafting_kind(config)) if config.has_drafting else config.layers
        self.pool_groups = pool_groups(stored, num_positions)
        self.ropes = self._load_ropes(num_positions)
        total = config.num_layers + 1
        self.layers: list[Layer] = []
        for index, kind in enumerate(config.layers):
            self.layers.append(self._load_layer(index, kind))
            progress(index + 1, total)
        table = self.load.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embedding = backend.matrix(table)
        self._load_more()
        self.drafting: DraftingHead | None = self._load_drafting() if config.has_drafting else None
        self.hidden: HiddenRows | None = None  # what `drafting` reads, once `keep_hidden` was called
        self.norm = self.load.norm("model.norm.weight")
        self.head = self.embedding
        if not config.tie_embeddings:
            self.head = backend.matrix(self.load.take("lm_head.weight", config.vocab_size, config.hidden_size))
        # (labels, hidden) float32: a classifier's head, which is computed on the host
        self.score = None
        if config.num_labels:
            self.score = to_float32(self.load.take("score.weight", config.num_labels, config.hidden_size))
        checkpoint.finish()
        del self.load  # the checkpoint's file need not stay open
        progress(total, total)

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix on the device, once; a tied head is the embedding."""
        matrices = [matrix for layer in self.layers for role in layer.matrices.values() for matrix in role]
        matrices += [] if self.drafting is None else self.drafting.matrices
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

    def keep_hidden(self, num_tokens: int, num_seqs: int) -> None:
        """Allocate memory for the hidden states of steps of at most so many rows and sequences, if a layer drafts."""
        if self.drafting is not None:
            self.hidden = HiddenRows(self.backend, self.config.hidden_size, num_tokens, num_seqs)

    def note_for_drafts(self, step: Step) -> None:
        """After sampling: keep what the drafting layer needs of the step. `step`: with its own output as the one before
        it."""
        if self.hidden is not None and self.drafting is not None:
            embedded = self.backend.embed(self.embedding, step, self.embedding_scale(self.config), "next_ids")
            self.hidden.note(self.backend, self.drafting, embedded, step)

    def _run_layers(self, x: Tensor, step: Step) -> Tensor:
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer.mixer.run(self.backend, x, step)
            x = layer.feed_forward.run(self.backend, x, step)
            if self.drafting is not None and index in self.drafting.taps:
                outputs.append(x)
        if self.drafting is not None and self.hidden is not None:
            self.drafting.keep(self.backend, outputs, self.norm, step.num_tokens, self.hidden)
        return x

    def attention_of(self, layer: int) -> tuple[LayerKind, Mixer]:
        """The kind of a layer of the pool, and its mixer; the one after the model's layers is that which drafts."""
        if layer < self.config.num_layers:
            return self.config.layers[layer], self.layers[layer].mixer
        assert self.drafting is not None, f"layer {layer} of {self.config.num_layers}"
        return drafting_kind(self.config), self.drafting.layer.mixer

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

    def _load_drafting(self) -> DraftingHead:
        """The layer after the last one."""
        index = self.config.num_layers
        return load_drafting(self.load, index, self._load_layer(index, drafting_kind(self.config)))

    def _load_layer(self, index: int, kind: LayerKind) -> Layer:
        return Layer(self._load_mixer(index, kind), self._load_feed_forward(index))

    def _load_mixer(self, index: int, kind: LayerKind) -> Mixer:
        if isinstance(kind.state, ConvKind):
            return load_short_conv(self.load, index, kind.state, self.ATTENTION_NORM)
        if kind.state is not None:
            return load_delta_net(self.load, index, kind.state, self.ATTENTION_NORM)
        rope = None
        if kind.rope is not None:
            rope = self.ropes[self.rope_list.index((kind.rope, kind.head_dim, kind.query_scaling))]
        group = group_of(self.pool_groups, index if kind.kv_layer is None else kind.kv_layer)
        placed = Placed(index, rope, group)
        if kind.latent is not None:
            return load_latent_attention(self.load, kind, placed, self.ATTENTION_NORM)
        return load_attention(self.load, kind, placed, self.ATTENTION_NORM, self.ATTENTION_POST_NORM)

    def _load_feed_forward(self, index: int) -> FeedForward:
        kind = self.config.experts_of(index)
        if kind is not None:
            return load_sparse(self.load, index, kind, self.FFN_NORM, self.FFN_POST_NORM)
        return load_dense(self.load, index, self.FFN_NORM, self.FFN_POST_NORM)
