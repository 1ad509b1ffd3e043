"""A model's drafting layer as a model of its own, which `ModelRunner` runs in decode steps."""

from __future__ import annotations

from tinygrad import Tensor

from tinyvllm.config import LayerKind
from tinyvllm.model.decoder import Decoder
from tinyvllm.model.drafting import DraftingHead, HiddenRows, drafting_kind
from tinyvllm.model.layer import Mixer
from tinyvllm.ops.backend import Step
from tinyvllm.ops.formats.matrix import Matrix


class DraftingModel(Decoder):
    """The drafting layer of a model, with that model's embedding and head. Each sequence's one token continues from the
    hidden state in the row that its logit row names."""

    def __init__(self, model: Decoder, layer: DraftingHead, hidden: HiddenRows) -> None:
        self.config, self.backend, self.num_positions = model.config, model.backend, model.num_positions
        self.embedding, self.head, self.ropes, self.norm = model.embedding, model.head, model.ropes, model.norm
        self.pool_groups, self.score, self.drafting, self.hidden = model.pool_groups, None, None, None
        self.layers, self._layer, self._kept = [layer.layer], layer, hidden
        self._scale = model.embedding_scale(model.config)

    @property
    def matrices(self) -> list[Matrix]:
        """Those that a step reads."""
        return [*self._layer.matrices, self.embedding] + ([] if self.head is self.embedding else [self.head])

    def attention_of(self, layer: int) -> tuple[LayerKind, Mixer]:
        return drafting_kind(self.config), self._layer.layer.mixer

    def __call__(self, step: Step) -> Tensor:
        """(R * logit_stride,) float32 logits; the step keeps its hidden states for the next one."""
        ops, layer, kept, tokens = self.backend, self._layer, self._kept, step.num_tokens
        embedded = ops.embed(self.embedding, step, self._scale)
        hidden = ops.take_rows(kept.rows, step, kept.hidden_size, kept.num_rows)
        y = layer.run(ops, layer.enter(ops, embedded, hidden, tokens, kept.room_for_input(tokens)), step)
        logits = layer.logits(ops, y, self.head, tokens)
        layer.keep_own(ops, y, tokens, kept)
        return ops.join(logits, self.logit_stride, step.layout)
