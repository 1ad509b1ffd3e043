"""gpt-oss: sinks, a window in every second layer, YaRN, biases everywhere, 2 of 6 experts with a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.recipe import Recipe, Shapes, sizes

BIASES = tuple(f"self_attn.{name}_proj" for name in "qkvo")
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 40,
}


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    """Unquantized, the experts' matrices have a row for each input, and gate and up projection alternate."""
    count, hidden, ffn = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    return {
        "self_attn.sinks": (config["num_attention_heads"],),
        "mlp.router.weight": (count, hidden),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, hidden, 2 * ffn),
        "mlp.experts.gate_up_proj_bias": (count, 2 * ffn),
        "mlp.experts.down_proj": (count, ffn, hidden),
        "mlp.experts.down_proj_bias": (count, hidden),
    } | {f"mlp.{name}_proj.weight": () for name in ("gate", "up", "down")}


def split(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts' matrices with a row for each output, gate and up projection apart, as in GGUF and MLX."""
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            found[name] = weight
            continue
        is_bias = name.endswith("_bias")
        rows = weight if is_bias else weight.swapaxes(1, 2)
        module, suffix = name.removesuffix("_bias"), "bias" if is_bias else "weight"
        if not module.endswith("gate_up_proj"):
            found[f"{module}.{suffix}"] = np.ascontiguousarray(rows)
            continue
        for part, first in (("gate_proj", 0), ("up_proj", 1)):
            found[f"{module.replace('gate_up_proj', part)}.{suffix}"] = np.ascontiguousarray(rows[:, first::2])
    return found


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """llama.cpp's conversion/gpt_oss.py."""
    return {
        gguf_name(name.replace("sinks", "sinks.weight"), "gpt_oss"): weight for name, weight in split(weights).items()
    }


RECIPES = {
    "gpt_oss": Recipe(
        "GptOssForCausalLM",
        "gpt-oss",
        sizes(2, 64, 4, 2, 32, 96)
        | {
            "model_type": "gpt_oss",
            "rope_parameters": YARN,
            "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "attention_bias": True,
        },
        seed=5,
        biases=BIASES,
        more_shapes=layer_shapes,
        gguf_tensors=gguf_tensors,
        mlx_tensors=split,
        gguf_keys={
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 96,
            "attention.sliding_window": 13,
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 40,
        },
    ),
}
