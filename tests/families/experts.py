"""Experts of the recipes' models: a tensor for each, as Hugging Face's files have them, or one for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

EACH = re.compile(r"(model\.layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
LLAMA_CPP = "{layer}mlp.experts.{module}.weight"
MLX = "{layer}{block}.switch_mlp.{module}.weight"
MODULES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names


def expert_shapes(config: Mapping[str, Any], ffn: int, block: str = "mlp") -> dict[str, tuple[int, ...]]:
    """`more_shapes` of a layer with num_experts (or num_local_experts), and without the dense feed-forward."""
    hidden, count = config["hidden_size"], config.get("num_experts") or config["num_local_experts"]
    up, gate, down = ("w3", "w1", "w2") if block == "block_sparse_moe" else ("up_proj", "gate_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (count, hidden)}
    for i in range(count):
        shapes |= {f"{block}.experts.{i}.{name}.weight": (ffn, hidden) for name in (gate, up)}
        shapes[f"{block}.experts.{i}.{down}.weight"] = (hidden, ffn)
    return shapes | {f"mlp.{name}_proj.weight": () for name in ("gate", "up", "down")}


def stacked(weights: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The same with one tensor (E, rows, columns) for all experts of a layer, by a name as LLAMA_CPP or MLX."""
    found: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for key, weight in weights.items():
        match = EACH.fullmatch(key)
        if match is None:
            found[key] = weight
            continue
        layer, block, _, module = match.groups()  # the experts come in order
        parts.setdefault(name.format(layer=layer, block=block, module=MODULES.get(module, module)), []).append(weight)
    return found | {key: np.stack(experts) for key, experts in parts.items()}
