"""How files name the models of a family, and which of their settings the family's class understands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.config import ModelConfig
from tinyvllm.storage.values import Values

SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

# Completes a config with what only this family's files say
Refine = Callable[[ModelConfig, Values], ModelConfig]
GGUFRefine = Callable[[ModelConfig, Values, Collection[str]], ModelConfig]  # with the names of the file's tensors


def as_read(config: ModelConfig, values: Values, tensors: Collection[str] = ()) -> ModelConfig:
    """The config as the readers for all families make it."""
    return config


@dataclass(frozen=True)
class FamilyFiles:
    """What the formats call the models of one family, and how their settings are read.

    A setting that the family does not understand is refused by name: running without it would give wrong tokens.
    """

    hf_classes: tuple[str, ...]  # config.json's `architectures`
    hf_types: tuple[str, ...]  # config.json's `model_type`, used if there is no class
    gguf: tuple[str, ...]  # general.architecture
    # `architectures` of models of several parts, whose text_config has one of `hf_types`, or none
    hf_wrappers: tuple[str, ...] = ()
    activation: str = "silu"  # of the feed-forward's gate
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' defaults for missing keys
    # Which layers attend to config.json's sliding_window. None: windows are not understood. "all": every layer.
    # "by layer": those that layer_types names; without it, those from max_window_layers on (Qwen), or all but every
    # sliding_window_pattern-th (Gemma)
    hf_windows: str | None = None
    hf_recurrent: str | None = (
        None  # what layer_types calls recurrent layers, which hf_refine reads; None: there are none
    )
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # llama.cpp's for missing keys under {arch}
    # The period of {arch}.attention.sliding_window if the file has no sliding_window_pattern: every layer but each
    # n-th attends to the window, with 0 every layer. None: windows are not understood
    gguf_window_pattern: int | None = None
    # What config.json's flags attention_bias and mlp_bias give a bias to: ModelConfig.biases. The others are refused
    hf_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    softcaps: tuple[str, ...] = ()  # keys, which both formats call by the same name
    has_local_rope: bool = False  # windowed layers have a rope of their own
    local_rope_theta: float | None = None  # its theta, if the file says nothing; None: as in other layers
    has_partial_rope: bool = False  # a part of each head may rotate: partial_rotary_factor, rope.dimension_count
    interleaves_rope: bool = False  # Rope.is_interleaved
    rope_aliases: Mapping[str, str] = field(default_factory=dict)  # names of kinds of ropes, and transformers'
    norm_offset: float = 0.0  # to be added to norms' weights in Hugging Face's format; GGUF has it in the weights
    overflows_float16: bool = False  # as in ModelConfig
    # Heads are expanded from latents, which the refine functions read. Until then, head_dim is that of a head's rotated
    # part
    has_latents: bool = False
    has_layer_sizes: bool = False  # GGUF may have a list of numbers, one for each layer, which gguf_refine reads
    # Numbers of layers with which GGUF, which has no key for it, means a score scale of (hidden / heads) ** -0.5
    gguf_wide_scale_layers: tuple[int, ...] = ()
    hf_renamed: Mapping[str, str] = field(default_factory=dict)  # beginnings of tensors' names, and ours
    hf_layer_names: Mapping[str, str] = field(default_factory=dict)  # names of a layer's modules, and ours
    hf_unread: tuple[str, ...] = ()  # beginnings of the names of tensors outside the language model
    # llama.cpp's names of a layer's modules, or of single tensors ("x.weight"), where they mean others than llama's
    gguf_layer_names: Mapping[str, str] = field(default_factory=dict)
    # llama.cpp's converter reorders the rows of q and k (and their biases): there a rotated pair lies in neighboring
    # rows, here in the two halves of a head
    gguf_interleaves_pairs: bool = False
    # llama.cpp's converter reorders the value heads of recurrent layers: there head h reads the queries and keys of
    # head h % Hk, here those of head h // (Hv / Hk)
    gguf_tiles_value_heads: bool = False
    # Modules that are stored as one under another name, their rows one after another: {"self_attn.qkv_proj":
    # ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}; in both formats
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Whether models have sparse feed-forwards, which the refine functions read; None: some have
    has_experts: bool | None = False
    # Where the experts' gate and up projection are one tensor, their rows alternate, and unquantized matrices have a
    # row for each input (gpt-oss)
    alternates_experts: bool = False
    # Applied last, to config.json's values for the text model with the family's defaults
    hf_refine: Refine = as_read
    # Applied last, to the metadata under {arch}, without this prefix
    gguf_refine: GGUFRefine = as_read
