"""How files name the models of each family, and which of their settings the family's class understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FamilyFiles:
    """What the formats call the models of one family, and how their settings are read.

    A setting that the family does not understand is refused by name: running without it would give wrong tokens.
    """

    hf_classes: tuple[str, ...]  # config.json's `architectures`
    hf_types: tuple[str, ...]  # config.json's `model_type`, used if there is no class
    gguf: tuple[str, ...]  # general.architecture
    activation: str = "silu"  # of the feed-forward's gate
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' defaults for missing keys
    # Which layers attend to config.json's sliding_window. None: windows are not understood. "all": every layer.
    # "by layer": those that layer_types names; without it, those from max_window_layers on (Qwen), or all but every
    # sliding_window_pattern-th (Gemma)
    hf_windows: str | None = None
    # The period of {arch}.attention.sliding_window if the file has no sliding_window_pattern: every layer but each
    # n-th attends to the window, with 0 every layer. None: windows are not understood
    gguf_window_pattern: int | None = None
    softcaps: tuple[str, ...] = ()  # keys, which both formats call by the same name
    local_rope_theta: float | None = None  # of windowed layers, if the file says nothing; None: as in other layers
    norm_offset: float = 0.0  # to be added to norms' weights in Hugging Face's format; GGUF has it in the weights
    overflows_float16: bool = False  # as in ModelConfig
    # Numbers of layers with which GGUF, which has no key for it, means a score scale of (hidden / heads) ** -0.5
    gguf_wide_scale_layers: tuple[int, ...] = ()
    hf_renamed: Mapping[str, str] = field(default_factory=dict)  # beginnings of tensors' names, and ours
    hf_unread: tuple[str, ...] = ()  # beginnings of the names of tensors outside the language model


SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

# By the registry's key; a new family is an entry here.
KNOWN_ARCHITECTURES: dict[str, FamilyFiles] = {
    # Mistral's GGUF files are llama's, with a window where they have one
    "llama": FamilyFiles(("LlamaForCausalLM",), ("llama",), ("llama",), gguf_window_pattern=0),
    "mistral": FamilyFiles(
        ("MistralForCausalLM",),
        ("mistral",),
        (),
        hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        hf_windows="all",
    ),
    "qwen2": FamilyFiles(
        ("Qwen2ForCausalLM",), ("qwen2",), ("qwen2",), hf_defaults=QWEN_DEFAULTS, hf_windows="by layer"
    ),
    "qwen3": FamilyFiles(
        ("Qwen3ForCausalLM",),
        ("qwen3",),
        ("qwen3",),
        hf_defaults=QWEN_DEFAULTS | {"head_dim": 128},
        hf_windows="by layer",
    ),
    "gemma3": FamilyFiles(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        ("gemma3",),
        activation="gelu_tanh",
        # config.json of 4B and above leaves most of them out
        hf_defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        hf_windows="by layer",
        gguf_window_pattern=6,
        softcaps=("final_logit_softcapping",),  # its class reads attn_logit_softcapping and makes no use of it
        local_rope_theta=10000.0,
        norm_offset=1.0,
        overflows_float16=True,  # 103,795 in 270M; more in larger ones
        gguf_wide_scale_layers=(62,),  # 27B
        hf_renamed={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        hf_unread=("model.vision_tower.", "vision_tower.", "model.multi_modal_projector.", "multi_modal_projector."),
    ),
}
