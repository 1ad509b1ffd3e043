"""Write data/rope.json: the frequencies that transformers' own functions make of config.json's rope settings.

Nothing of tinyvllm computes anything here. With the extra `oracle`: python -m tests.model.write_rope_references
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "rope.json"
HEAD_DIM = 24
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
SHORT, LONG = [1 + 0.1 * i for i in range(9)], [1.5 + 0.7 * i for i in range(9)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
NESTED = {"full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": {"rope_type": "default"}}

# By name: (the class of the config, its settings, tokens of the longest context, the type of layer)
CASES: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "nothing stated": ("LlamaConfig", {}, 64, None),
    "old place": ("LlamaConfig", {"rope_theta": 5e5}, 64, None),
    "new place": ("LlamaConfig", {"rope_parameters": {"rope_theta": 5e5}}, 64, None),
    "linear": ("LlamaConfig", {"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 3.0}}, 64, None),
    "both places": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        64,
        None,
    ),
    "llama3": (
        "LlamaConfig",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
        64,
        None,
    ),
    "yarn": ("LlamaConfig", {"rope_theta": 1e6, "rope_scaling": YARN}, 64, None),
    "yarn, its factor by the contexts": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"factor": None, "rope_theta": 150000.0}},
        64,
        None,
    ),
    "yarn, whole limits": ("LlamaConfig", {"rope_parameters": YARN | {"truncate": False}}, 64, None),
    "yarn, its betas": ("LlamaConfig", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}, 64, None),
    "yarn, its magnitude": ("LlamaConfig", {"rope_parameters": YARN | {"attention_factor": 0.8}}, 64, None),
    "yarn, DeepSeek's slopes": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        64,
        None,
    ),
    "yarn, partial": ("Glm4Config", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, 64, None),
    "yarn over a short context": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 8, "factor": 32.0}},
        64,
        None,
    ),
    "partial": ("Glm4Config", {"partial_rotary_factor": 0.75}, 64, None),
    "partial, its default": ("Glm4Config", {}, 64, None),
    "longrope, short": (
        "Phi3Config",
        {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512},
        512,
        None,
    ),
    "longrope, long": (
        "Phi3Config",
        {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512},
        513,
        None,
    ),
    "longrope, Phi-3's old name": (
        "Phi3Config",
        {
            "rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 4096},
            "partial_rotary_factor": 0.75,
        },
        64,
        None,
    ),
    "by layer, full": ("Olmo3Config", {"rope_parameters": NESTED}, 64, "full_attention"),
    "by layer, windowed": ("Olmo3Config", {"rope_parameters": NESTED}, 64, "sliding_attention"),
    "by layer, old place, full": ("Olmo3Config", {"rope_scaling": YARN}, 64, "full_attention"),
    "by layer, old place, windowed": ("Olmo3Config", {"rope_scaling": YARN}, 64, "sliding_attention"),
    # transformers 5 gives a theta outside rope_parameters to layers without a window only
    "by layer, old theta, full": ("Olmo3Config", {"rope_theta": 2e4, "rope_scaling": YARN}, 64, "full_attention"),
    "by layer, old theta, windowed": (
        "Olmo3Config",
        {"rope_theta": 2e4, "rope_scaling": YARN},
        64,
        "sliding_attention",
    ),
    "proportional": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        64,
        None,
    ),
}


def main() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = {}
    for name, (class_name, settings, num_positions, layer_type) in CASES.items():
        config = getattr(transformers, class_name)(**SIZES, head_dim=HEAD_DIM, **json.loads(json.dumps(settings)))
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"]) or embedding_of(class_name).compute_default_rope_parameters
        where = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, factor = compute(config, device="cpu", seq_len=num_positions, **where)
        found[name] = {"frequencies": frequencies.double().tolist(), "attention_factor": factor}
    about = f"Inverse frequencies by transformers {version('transformers')}"
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(case)}" for name, case in found.items())
    DATA.write_text(f'{{"about": {json.dumps(about)}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


def embedding_of(class_name: str) -> Any:
    """The class's module for rotary embeddings."""
    import importlib

    name = class_name.removesuffix("Config")
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    return getattr(module, f"{name}RotaryEmbedding")


if __name__ == "__main__":
    main()
