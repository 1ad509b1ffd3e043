"""Where a model's products take adapters: the sites of its layers, and how an adapter is written into a slot of each.

Attention (q, k and v together; its output) and dense feed-forwards (gate and up together; down) have sites. Recurrent
layers, latent attention and experts have none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.attention import Attention
from tinyvllm.model.feed_forward import DenseFeedForward
from tinyvllm.model.registry import Model
from tinyvllm.model.weights.adapters import AdapterWeights, Module
from tinyvllm.ops.adapter_spec import AdapterSite, Block, SiteShape, SiteValues, SiteWriter
from tinyvllm.ops.backend import Backend


@dataclass(frozen=True)
class PlacedSite:
    """A site, and the modules of its sections, by the names that the checkpoint gives them."""

    site: AdapterSite
    modules: tuple[Module, ...]
    gated_heads: int = 0  # heads whose queries and gates take turns in the first module's rows; 0: there are no gates


class ModelAdapters:
    """Owns the slots of all of a model's sites."""

    def __init__(self, sites: list[PlacedSite]) -> None:
        self.sites = sites
        self._writers = [SiteWriter(placed.site) for placed in sites]

    @property
    def modules(self) -> dict[str, Module]:
        """The modules that an adapter may change, by name."""
        return {module.name: module for placed in self.sites for module in placed.modules}

    @property
    def num_slots(self) -> int:
        return self.sites[0].site.shape.num_slots if self.sites else 0

    @property
    def nbytes(self) -> int:
        return sum(placed.site.nbytes for placed in self.sites)

    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot (from 1). No step in flight may use it."""
        for placed, writer in zip(self.sites, self._writers, strict=True):
            writer.write(slot, _values_of(weights, placed))


def _values_of(weights: AdapterWeights, placed: PlacedSite) -> SiteValues | None:
    """An adapter's matrices for a site. None if it changes none of its modules."""
    found = [weights.modules.get(module.name) for module in placed.modules]
    if all(part is None for part in found):
        return None
    by_block: list[np.ndarray | None] = []
    for index, block in enumerate(placed.site.shape.blocks):
        part = found[block.section]
        b = None if part is None else part.b
        if b is not None and placed.gated_heads and block.section == 0:
            by_head = b.reshape(placed.gated_heads, 2, -1, b.shape[1])
            b = by_head[:, int(index > 0)].reshape(block.num_rows, -1)
        by_block.append(b)
    return SiteValues(tuple(None if part is None else part.a for part in found), tuple(by_block))


def attach_adapters(model: Model, backend: Backend, num_slots: int, max_rank: int) -> ModelAdapters:
    """Give the model's layers empty slots for adapters of at most `max_rank`. Allocates device memory."""
    sites: list[PlacedSite] = []
    for index, layer in enumerate(model.layers):
        shapes = _Shapes(model.config, index, num_slots, max_rank)
        mixer, feed_forward = layer.mixer, layer.feed_forward
        if isinstance(mixer, Attention):
            qkv, out = shapes.of_qkv(mixer.attention.kind), shapes.of_output(mixer.attention.kind)
            mixer = replace(mixer, qkv_adapters=backend.adapter_site(qkv), out_adapters=backend.adapter_site(out))
            sites += _sites_of_attention(index, mixer)
        if isinstance(feed_forward, DenseFeedForward):
            gate_up, down = shapes.of_gate_up(), shapes.of_down()
            feed_forward = replace(
                feed_forward,
                gate_up_adapters=backend.adapter_site(gate_up),
                down_adapters=backend.adapter_site(down),
            )
            sites += _sites_of_feed_forward(index, feed_forward)
        model.layers[index] = replace(layer, mixer=mixer, feed_forward=feed_forward)
    return ModelAdapters(sites)


def adapter_bytes(config: ModelConfig, num_slots: int, max_rank: int, itemsize: int) -> int:
    """What `attach_adapters` allocates at most."""
    total = 0
    for index, kind in enumerate(config.layers):
        shapes = _Shapes(config, index, num_slots, max_rank)
        if kind.state is None and kind.latent is None:
            total += shapes.of_qkv(kind).num_elements() + shapes.of_output(kind).num_elements()
        if config.experts_of(index) is None:
            total += shapes.of_gate_up().num_elements() + shapes.of_down().num_elements()
    return total * itemsize


@dataclass(frozen=True)
class _Shapes:
    """The sites of one layer."""

    config: ModelConfig
    index: int
    num_slots: int
    max_rank: int

    def of_qkv(self, kind: LayerKind) -> SiteShape:
        blocks = [Block(0, kind.q_size)]
        if kind.kv_layer is None:
            blocks += [Block(1, kind.kv_size), Block(1 if kind.has_v_from_k else 2, kind.kv_size)]
        if kind.has_output_gate:
            blocks.append(Block(0, kind.q_size))
        shape = self._shape(self.config.hidden_size, *blocks)
        return replace(shape, num_kv_heads=kind.num_kv_heads)

    def of_output(self, kind: LayerKind) -> SiteShape:
        return self._shape(kind.q_size, Block(0, self.config.hidden_size))

    def of_gate_up(self) -> SiteShape:
        size = self.config.sizes_of(self.index).ffn_size
        return self._shape(self.config.hidden_size, Block(0, size), Block(1, size))

    def of_down(self) -> SiteShape:
        return self._shape(self.config.sizes_of(self.index).ffn_size, Block(0, self.config.hidden_size))

    def _shape(self, num_cols: int, *blocks: Block) -> SiteShape:
        return SiteShape(num_cols=num_cols, blocks=blocks, max_rank=self.max_rank, num_slots=self.num_slots)


def _sites_of_attention(index: int, mixer: Attention) -> list[PlacedSite]:
    assert mixer.qkv_adapters is not None and mixer.out_adapters is not None
    prefix, shape = f"model.layers.{index}.self_attn", mixer.qkv_adapters.shape
    sizes: dict[int, int] = {}  # rows of each section's module
    gated = mixer.attention.kind.has_output_gate
    for block in shape.blocks[: -1 if gated else None]:
        sizes[block.section] = block.num_rows * (2 if gated and block.section == 0 else 1)
    names = [f"{prefix}.{letter}_proj" for letter in "qkv"]
    modules = tuple(Module(names[section], rows, shape.num_cols) for section, rows in sizes.items())
    return [
        PlacedSite(mixer.qkv_adapters, modules, gated_heads=mixer.attention.kind.num_heads if gated else 0),
        _single(mixer.out_adapters, f"{prefix}.o_proj"),
    ]


def _sites_of_feed_forward(index: int, feed_forward: DenseFeedForward) -> list[PlacedSite]:
    assert feed_forward.gate_up_adapters is not None and feed_forward.down_adapters is not None
    prefix, shape = f"model.layers.{index}.mlp", feed_forward.gate_up_adapters.shape
    modules = [
        Module(f"{prefix}.{name}_proj", block.num_rows, shape.num_cols)
        for name, block in zip(("gate", "up"), shape.blocks, strict=True)
    ]
    return [
        PlacedSite(feed_forward.gate_up_adapters, tuple(modules)),
        _single(feed_forward.down_adapters, f"{prefix}.down_proj"),
    ]


def _single(site: AdapterSite, name: str) -> PlacedSite:
    return PlacedSite(site, (Module(name, site.shape.num_rows, site.shape.num_cols),))
