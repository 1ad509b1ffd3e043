"""A model's own layer that drafts tokens: multi-token prediction, as in Qwen3.5 (MTP; DeepSeek V3, 2024, sec. 2.2).

The layer is one of attention and a feed-forward, and shares the model's embedding and head. Its row p takes two things:
the token after position p, and the model's last hidden state h at p, after the final norm:

    x = fc [norm_e(embedding(token[p + 1])); norm_h(h[p])]
    y = layer(x), which attends to the rows before p
    logits of token p + 2 = head(norm(y))

To draft further, the next row's h is norm(y). That h comes after the final norm, although norm_h follows, is what vLLM
does (qwen3_next_mtp.py), and raises acceptance (llama.cpp #24025).

Every step of the model *notes* what the layer will need (`HiddenRows.note`): after sampling, when the token after each
row is known, it writes the layer's keys and values, which are one more layer of the pool; and it keeps the hidden
states of its rows until the next step. Drafting is then a decode step of the layer alone (model/drafting_model.py),
which begins with the hidden state of a sequence's last accepted row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from tinygrad import Tensor

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.device.recording import head_of_tensor
from tinyvllm.model.attention import Attention
from tinyvllm.model.layer import Layer
from tinyvllm.model.loading import Loader
from tinyvllm.ops.backend import PLAIN, Backend, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix

DRAFTING_ARCHITECTURES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")


def drafting_kind(config: ModelConfig) -> LayerKind:
    """Its attention: that of the model's last layer that has any."""
    return next(kind for kind in reversed(config.layers) if kind.state is None)


class DraftingHead(Protocol):
    """What drafts from a model's hidden states, one row for each token: `DraftingLayer`, or another method in a file of
    its own (docs/SPECULATION.md)."""

    @property
    def layer(self) -> Layer:
        """Its attention is one more layer of the model's pool."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers of the model whose outputs it reads."""

    @property
    def matrices(self) -> list[Matrix]: ...

    def keep(self, ops: Operations, outputs: Sequence[Tensor], norm: Norm, num_tokens: int, kept: HiddenRows) -> None:
        """Store the hidden state of each of a model's rows. outputs: of `taps`, (T * hidden,) each; norm: the model's
        final one."""

    def enter(self, ops: Operations, embedded: Tensor, hidden: Tensor, num_tokens: int, both: Tensor) -> Tensor:
        """(T * hidden,): the layer's input, of the next tokens' embeddings and the stored hidden states. both: memory
        for (T, 2 * hidden)."""

    def write(self, ops: Operations, x: Tensor, step: Step) -> None:
        """Write the keys and values of the layer's input x."""

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        """(T * hidden,): the layer's output."""

    def logits(self, ops: Operations, y: Tensor, head: Matrix, num_tokens: int) -> Tensor:
        """(T * head.num_rows,) float32, of the layer's output. head: the model's."""

    def keep_own(self, ops: Operations, y: Tensor, num_tokens: int, kept: HiddenRows) -> None:
        """Store the hidden states that the next drafts continue, in the rows for the layer's own."""


@dataclass(frozen=True)
class DraftingLayer:
    """Qwen3.5's. Owns the layer's weights. `layer.mixer` is an `Attention`."""

    layer: Layer
    taps: tuple[int, ...]  # the model's last layer
    fc: Matrix  # (hidden, 2 * hidden)
    embedding_norm: Norm
    hidden_norm: Norm
    norm: Norm  # of the output, before the head

    @property
    def matrices(self) -> list[Matrix]:
        return [self.fc, *(matrix for role in self.layer.matrices.values() for matrix in role)]

    def keep(self, ops: Operations, outputs: Sequence[Tensor], norm: Norm, num_tokens: int, kept: HiddenRows) -> None:
        kept.store(ops, outputs[0], norm, num_tokens)

    def enter(self, ops: Operations, embedded: Tensor, hidden: Tensor, num_tokens: int, both: Tensor) -> Tensor:
        size = self.fc.num_cols // 2
        both = ops.store_normed(embedded, self.embedding_norm, num_tokens, both, 0, 2 * size)
        both = ops.store_normed(hidden, self.hidden_norm, num_tokens, both, size, 2 * size)
        (x,) = ops.linear("drafting_fc", both, [self.fc], num_tokens)
        return ops.finish(x, num_tokens, PLAIN)

    def write(self, ops: Operations, x: Tensor, step: Step) -> None:
        attention = cast(Attention, self.layer.mixer)
        qkv = ops.linear("qkv", x, attention.qkv, step.num_tokens, attention.attention_norm)
        ops.attend(qkv, attention.attention, step)

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        return self.layer.feed_forward.run(ops, self.layer.mixer.run(ops, x, step), step)

    def logits(self, ops: Operations, y: Tensor, head: Matrix, num_tokens: int) -> Tensor:
        return ops.linear("lm_head", y, [head], num_tokens, self.norm)[0]

    def keep_own(self, ops: Operations, y: Tensor, num_tokens: int, kept: HiddenRows) -> None:
        kept.store(ops, y, self.norm, num_tokens, kept.num_tokens)


def load_drafting(load: Loader, index: int, layer: Layer) -> DraftingLayer:
    """`layer`: the attention and the feed-forward, which are named as those of layer `index`."""
    prefix, hidden = f"model.layers.{index}.mtp", load.config.hidden_size
    return DraftingLayer(
        layer=layer,
        taps=(index - 1,),
        fc=load.backend.matrix(load.take(f"{prefix}.fc.weight", hidden, 2 * hidden)),
        embedding_norm=load.norm(f"{prefix}.pre_fc_norm_embedding.weight"),
        hidden_norm=load.norm(f"{prefix}.pre_fc_norm_hidden.weight"),
        norm=load.norm(f"{prefix}.norm.weight"),
    )


class HiddenRows:
    """Owns the memory of hidden states that outlives a step: those of the model's latest step in the first `num_tokens`
    rows, those of the drafting layer's latest step in the `num_seqs` rows after them; and room for its input."""

    def __init__(self, backend: Backend, hidden_size: int, num_tokens: int, num_seqs: int) -> None:
        self.hidden_size, self.num_tokens, self.num_rows = hidden_size, num_tokens, num_tokens + num_seqs
        self.rows = backend.make_rows(self.num_rows * hidden_size)
        self.both = backend.make_rows(2 * max(num_tokens, num_seqs) * hidden_size)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes() + self.both.nbytes()

    def room_for_input(self, num_tokens: int) -> Tensor:
        return head_of_tensor(self.both, 2 * num_tokens * self.hidden_size)

    def store(self, ops: Operations, x: Tensor, norm: Norm, num_tokens: int, first: int = 0) -> None:
        """Keep norm(x) in the rows from `first` on."""
        size = self.hidden_size
        ops.store_normed(x, norm, num_tokens, self.rows, first * size, size)

    def note(self, ops: Operations, layer: DraftingHead, embedded: Tensor, step: Step) -> None:
        """Write the drafting layer's keys and values of a step's rows, whose hidden states are stored. embedded: the
        embedding of the token after each row."""
        tokens = step.num_tokens
        hidden = head_of_tensor(self.rows, tokens * self.hidden_size)
        layer.write(ops, layer.enter(ops, embedded, hidden, tokens, self.room_for_input(tokens)), step)
