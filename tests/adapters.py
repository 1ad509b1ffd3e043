"""Writers of tiny seeded adapters, as peft and mlx-lm save them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.builders import TinyLlama, write_json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_MODULES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def module_sizes(model: TinyLlama) -> dict[str, tuple[int, int]]:
    """(rows, columns) of a layer's linear modules."""
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "q_proj": (q_size, model.hidden),
        "k_proj": (kv_size, model.hidden),
        "v_proj": (kv_size, model.hidden),
        "o_proj": (model.hidden, q_size),
        "gate_proj": (model.ffn, model.hidden),
        "up_proj": (model.ffn, model.hidden),
        "down_proj": (model.hidden, model.ffn),
    }


def module_path(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}"


def adapter_weights(
    model: TinyLlama, modules: Sequence[str], rank: int, seed: int, ranks: Mapping[str, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by the module's path. `ranks`: of modules with another rank."""
    rng, found = np.random.default_rng(seed), {}
    for layer in range(model.layers):
        for module in modules:
            rows, cols = module_sizes(model)[module]
            own = ranks.get(module, rank)
            a, b = rng.standard_normal((own, cols)) / cols**0.5, rng.standard_normal((rows, own)) / own**0.5
            found[module_path(layer, module)] = a.astype(np.float32), b.astype(np.float32)
    return found


def write_adapter(
    directory: Path,
    model: TinyLlama,
    modules: Sequence[str] = ALL_MODULES,
    rank: int = 8,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    **settings: Any,
) -> Path:
    """An adapter in peft's format. `settings`: of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), "bias": "none"}
    if ranks:
        config["rank_pattern"] = dict(ranks)
    write_json(directory / "adapter_config.json", config | {"task_type": "CAUSAL_LM"} | settings)
    tensors = {}
    for path, (a, b) in adapter_weights(model, modules, rank, seed, ranks or {}).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def write_mlx_adapter(
    directory: Path, model: TinyLlama, modules: Sequence[str], rank: int, scale: float, seed: int
) -> Path:
    """The same in mlx-lm's format, whose matrices are transposed."""
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    write_json(
        directory / "adapter_config.json",
        {"fine_tune_type": "lora", "num_layers": model.layers, "lora_parameters": parameters},
    )
    tensors = {}
    for path, (a, b) in adapter_weights(model, modules, rank, seed, {}).items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    save_file(tensors, directory / "adapters.safetensors")
    return directory
