"""Settings as frozen dataclasses: what a model is, how the engine runs it, how a request is sampled.

They are parsed once, at the edge (command line, server, `LLM(...)`), and passed down as arguments. No tinygrad here.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from tinyvllm.errors import DeviceError, RequestError, TinyvllmError

MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs; the graph's output row has room for this many
MAX_STOP_IDS = 16  # ids that min_tokens can suppress, per request: a fixed-width row of the graph's input
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024  # ids in a request's logit_bias: vLLM's limit; a fixed-width row of the sampling state
MAX_BIAS = 100.0  # OpenAI's limit for the magnitude of a logit_bias
MAX_STOP_CHARS = 8192  # of all stop strings together
MAX_BAD_WORDS = 256
MAX_BAD_WORDS_CHARS = 16_384  # of all together, each of which is encoded twice: 30 ms
MAX_TIER_GIB = 1 << 20  # of KV blocks outside the pool
DEFAULT_KV_DISK_GIB = 16.0
MAX_CHOICES = 128  # upper limit of `n`
# The least positive setting: divided by a smaller one, logits overflow in float32, and below 1e-45 it would be 0 there.
MIN_POSITIVE = 1e-30

ACTIVATION_BITS = (16, 8)
DTYPES = ("float32", "float16", "bfloat16")
# other names of formats of the KV cache: vLLM's, and llama.cpp's
KV_ALIASES = {"fp8": "fp8_e4m3", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
WARM_UPS = ("background", "full", "idle")
CAPTURES = ("replay", "tinyjit")
MAX_SPECULATIVE_TOKENS = 32  # drafted tokens of a sequence in one step: as many counters of accepted ones per position

MODELS_DIR_VARIABLE = "TINYVLLM_MODELS"  # environment variable: the directory of pulled models
CACHE_DIR_VARIABLE = "TINYVLLM_CACHE"  # environment variable: the directory of compiled programs
_XDG_CACHE_VARIABLE = "XDG_CACHE_HOME"
CORES_VARIABLE = "TINYVLLM_CPU_CORES"  # environment variable: the maximum number of cores that a process uses
DEVICE_VARIABLE = "DEV"  # tinygrad's environment variable, which it reads once, on import
CAPTURE_VARIABLE = "TINYVLLM_CAPTURE"  # environment variable: the default of EngineConfig.capture


@dataclass(frozen=True)
class KVFormat:
    """How keys, or values, are stored in the pool. ops/kernel/kv_format.py has the bits of the quantized formats."""

    name: str
    bits: int  # of an element
    group: int = 0  # elements along a head that share a float16 scale; 0: there are no scales

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16

    def code_bytes(self, num_elements: int) -> int:
        """Bytes of the codes of whole heads, or of the elements of a dtype."""
        return num_elements * self.bits // 8

    def num_scales(self, num_elements: int) -> int:
        """Scales of whole heads."""
        return num_elements // self.group if self.group else 0

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of whole heads, their scales included."""
        return self.code_bytes(num_elements) + 2 * self.num_scales(num_elements)


KV_FORMATS = {
    one.name: one
    for one in (
        KVFormat("float32", 32),
        KVFormat("float16", 16),
        KVFormat("bfloat16", 16),
        KVFormat("fp8_e4m3", 8),  # without a scale; what exceeds 448 saturates
        KVFormat("q8_0", 8, 32),  # llama.cpp's formats, but for the order of codes and scales in memory
        KVFormat("q4_0", 4, 32),
    )
}
KV_TYPES = (*KV_FORMATS, *KV_ALIASES)  # what --kv-cache-dtype may be, besides "auto"


@dataclass(frozen=True)
class KVFormats:
    """The formats of keys and of values in the pool. Latents are stored as keys."""

    keys: KVFormat = KV_FORMATS["float16"]
    values: KVFormat = KV_FORMATS["float16"]

    @classmethod
    def of(cls, keys: str, values: str | None = None) -> KVFormats:
        """By name, or by an alias; values like keys unless they are named."""
        names = (keys, keys if values is None else values)
        return cls(*[KV_FORMATS[KV_ALIASES.get(name, name)] for name in names])

    @property
    def name(self) -> str:
        """In messages, metrics and reports: "q8_0", or "q8_0 keys, q4_0 values"."""
        if self.keys == self.values:
            return self.keys.name
        return f"{self.keys.name} keys, {self.values.name} values"

    @property
    def is_quantized(self) -> bool:
        """Whether keys, values or both are."""
        return self.keys.is_quantized or self.values.is_quantized

    @property
    def bytes_per_element(self) -> float:
        """The mean over keys and values, scales included."""
        return (self.keys.num_bytes(64) + self.values.num_bytes(64)) / 128

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of keys and values of whole heads of so many elements each."""
        return self.keys.num_bytes(num_elements) + self.values.num_bytes(num_elements)


FLOAT16_KV = KVFormats()


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; model/rope.py has the formula of each kind."""

    kind: str  # "linear", "llama3", "yarn", "longrope" or "proportional"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 8192  # llama3, yarn, longrope: tokens of the context that was stretched
    beta_fast: float = 32.0  # yarn: turns over the original context, from which on a frequency stays
    beta_slow: float = 1.0  # yarn: turns up to which it is divided by the factor
    truncate: bool = True  # yarn: the limits between them are whole dimensions
    # longrope: what each frequency is divided by, in contexts up to the original one and in longer ones
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    proportion: float = 1.0  # proportional: the share of a head's pairs that rotate


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021) in a layer's heads."""

    theta: float
    scaling: RopeScaling | None = None
    # llama.cpp stores llama3 scaling as a tensor of frequency divisors (rope_freqs.weight): (num_dims / 2,), or None
    divisors: tuple[float, ...] | None = None
    num_dims: int | None = None  # rotated dimensions of a head, starting with the first; None: all
    is_interleaved: bool = False  # pairs are (2i, 2i + 1) rather than (i, i + num_dims / 2)
    attention_factor: float = 1.0  # of cosines and sines (YaRN's and longrope's)


@dataclass(frozen=True)
class QueryScaling:
    """Queries grow with their position: 1 + beta * log(1 + position // span) (Llama 4, Ministral 3)."""

    beta: float
    span: int  # tokens


@dataclass(frozen=True)
class ExpertsKind:
    """A sparse feed-forward: a router chooses `top_k` of `num_experts` gated feed-forwards for each token, and their
    outputs are added up by weight.

    Weights: scores of all experts (softmax or sigmoid of the router's logits); the top_k by score, or by score plus a
    bias that serves the choice alone; divided by their sum if `renormalizes`; times `scale`. A softmax over the chosen
    logits alone (gpt-oss) is the same as one over all of them, renormalized.
    """

    num_experts: int  # E
    top_k: int
    ffn_size: int  # of one expert
    score: str = "softmax"  # or "sigmoid"
    renormalizes: bool = True
    scale: float = 1.0
    num_groups: int = 1  # of neighboring experts; only the best `top_groups` of them are chosen from (DeepSeek V3)
    top_groups: int = 1
    activation: str = "silu"  # of the gate: a name of ops/activation.py
    has_router_bias: bool = False  # of the router's logits
    has_choice_bias: bool = False  # of scores, for the choice alone
    has_expert_scale: bool = False  # a factor of each expert's weight (Gemma 4)
    has_biases: bool = False  # of the experts' gate, up and down
    shared_size: int = 0  # ffn size of the expert that every token passes through, with weight 1; 0: none
    has_shared_gate: bool = False  # its weight is the sigmoid of a product of its own
    is_beside_dense: bool = False  # the layer has its dense feed-forward too, whose output theirs is added to (Gemma 4)

    @property
    def num_shared(self) -> int:
        """1 if the shared expert is as large as the others, and so may be stacked with them as expert E."""
        return int(self.shared_size == self.ffn_size)


@dataclass(frozen=True)
class StateKind:
    """A recurrent layer, and so the state that a sequence keeps of it between steps, in float32.

    Gated DeltaNet (Yang et al. 2024): a causal depthwise convolution and SiLU over [q, k, v], then a matrix of
    (Dk, Dv) for each of the value heads. Value head h reads the queries and keys of head h // (Hv / Hk).
    """

    num_heads: int  # Hv, value heads
    num_key_heads: int  # Hk, of queries and of keys
    key_dim: int  # Dk
    value_dim: int  # Dv
    conv_width: int  # taps of the convolution
    norm_eps: float  # of the RMSNorm on each head's output, which silu(z) gates

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.num_heads * self.value_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: q, k, v."""
        return 2 * self.key_size + self.value_size

    @property
    def matrix_elements(self) -> int:
        """float32 elements of a sequence's matrices."""
        return self.num_heads * self.key_dim * self.value_dim

    @property
    def conv_elements(self) -> int:
        """float32 elements of the convolution's inputs that a sequence keeps: (conv_width, conv_size). The input at
        position p is in row p % conv_width, so that a step overwrites none that another thread still reads."""
        return self.conv_width * self.conv_size

    @property
    def num_bytes(self) -> int:
        """Of one sequence's state in this layer."""
        return 4 * (self.matrix_elements + self.conv_elements)


@dataclass(frozen=True)
class ConvKind(StateKind):
    """A gated short convolution (LFM2), which has no matrices: a product gives b, c and x of each token, and the output
    is c * conv(b * x). A sequence keeps the last inputs of the convolution."""

    num_channels: int = field(kw_only=True)

    @classmethod
    def of(cls, num_channels: int, conv_width: int) -> ConvKind:
        return cls(
            num_heads=0,
            num_key_heads=0,
            key_dim=0,
            value_dim=0,
            conv_width=conv_width,
            norm_eps=0.0,
            num_channels=num_channels,
        )

    @property
    def conv_size(self) -> int:
        return self.num_channels


@dataclass(frozen=True)
class LatentKind:
    """Multi-head latent attention (DeepSeek V2): the keys and values of all heads are products of one latent vector
    for each token, which is what the pool holds, beside one rotated key that all heads share."""

    rank: int  # elements of the latent
    rope_dim: int  # of the shared rotated key, and of the rotated part of a query's head
    nope_dim: int  # of the part of a head's query and key that does not rotate
    value_dim: int  # of a head's value
    query_rank: int | None = None  # of the queries' own latent; None: queries are products of the hidden state
    norm_eps: float = 1e-6  # of the RMSNorms of both latents

    @property
    def stored_dim(self) -> int:
        """Elements that the pool holds of a token."""
        return self.rank + self.rope_dim


@dataclass(frozen=True)
class LayerKind:
    """What attention computes in one layer. Layers with the same kind run the same kernels."""

    num_heads: int  # H, query heads
    num_kv_heads: int  # K
    head_dim: int  # D
    rope: Rope | None = None  # None: no position embeddings
    score_scale: float | None = None  # factor of q . k; None: D ** -0.5
    window: int | None = None  # a token attends to itself and the window - 1 tokens before it; None: to all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    has_sinks: bool = False  # the softmax includes a learned logit per head, which has no value
    head_norm_eps: float | None = None  # of the RMSNorm on each head of q and k, before rope; None: no such norm
    head_norm_is_whole: bool = False  # that norm is of all heads of q together, and of all of k
    query_scaling: QueryScaling | None = None  # of rotated queries; only in layers with a rope
    value_norm_eps: float | None = None  # of the weightless RMSNorm on each head of v; None: no such norm
    has_bias: bool = False  # q, k and v have biases
    has_v_from_k: bool = False  # v is k before its norm and rope: k_proj serves for both
    kv_layer: int | None = None  # the earlier layer whose keys and values it reads; None: its own
    state: StateKind | None = None  # a recurrent layer, which has no heads of attention and stores no keys
    latent: LatentKind | None = None  # keys and values come from a latent, which is what is stored
    has_output_gate: bool = False  # what attention returns is multiplied by the sigmoid of a product of its own

    @property
    def stores_kv(self) -> bool:
        """Whether the pool holds keys and values of this layer."""
        return self.kv_layer is None and self.state is None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def stored_elements(self) -> int:
        """Elements that the pool holds of one token in this layer: its keys and values, or its latent."""
        if not self.stores_kv:
            return 0
        return 2 * self.kv_size if self.latent is None else self.latent.stored_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale


@dataclass(frozen=True)
class LayerSizes:
    """What differs between the layers of a model (Gemma 4), besides windows."""

    num_kv_heads: int
    head_dim: int
    ffn_size: int
    has_v_from_k: bool = False  # as in LayerKind
    kv_layer: int | None = None  # as in LayerKind


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, as its own files state it. Letters as in docs/ARCHITECTURE.md: L, H, K, D, V."""

    architecture: str  # the registry's key: "llama", "qwen3"
    num_layers: int  # L
    hidden_size: int
    ffn_size: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # K
    head_dim: int  # D
    vocab_size: int  # V, rows of the embedding table
    max_position: int  # tokens: the context the model was trained for
    rope: Rope
    norm_eps: float
    tie_embeddings: bool
    dtype: str = "float16"  # of the checkpoint's unquantized matrices
    name: str = ""
    activation: str = "silu"  # of the feed-forward's gate: a name of ops/activation.py
    window: int | None = None  # tokens that a windowed layer attends to, including the current one; None: no windows
    windowed: tuple[bool, ...] = ()  # per layer, repeated as a pattern; (): all layers, if there is a window
    local_rope: Rope | None = None  # of windowed layers, if it differs
    score_scale: float | None = None  # as in LayerKind
    score_softcap: float | None = None
    ropeless: tuple[bool, ...] = ()  # per layer, repeated as a pattern: it has no rope; (): all layers have one
    query_scaling: QueryScaling | None = None  # as in LayerKind
    biases: tuple[str, ...] = ()  # products with a bias: "qkv", "out" (of attention), "ffn" (gate, up and down)
    embedding_scale: float = 1.0  # what the embedding's rows are multiplied by
    residual_scale: float = 1.0  # what attention and the feed-forward add to the residual is multiplied by
    logit_scale: float = 1.0  # what logits are multiplied by, before their softcap
    logit_softcap: float | None = None  # logits become softcap * tanh(logit / softcap)
    norm_offset: float = 0.0  # added to the stored weights of norms: 1 in Gemma's Hugging Face files
    overflows_float16: bool = False  # activations exceed float16's range, as Gemma 3's residual does
    has_head: bool = True  # False: it embeds texts, and generates nothing
    pooling: str | None = None  # of an embedding model: "last", "mean" or "cls"; None: not stated
    num_labels: int = 0  # rows of a classifier's head (score.weight), as a reranker has one; 0: no classifier
    layer_sizes: tuple[LayerSizes, ...] = ()  # of each layer; (): the sizes above in all of them
    per_layer_size: int = 0  # of the embedding that each layer has of its own for every token; 0: none
    experts: ExpertsKind | None = None  # of sparse feed-forwards
    with_experts: tuple[bool, ...] = ()  # per layer, repeated as a pattern; (): all layers, if there are experts
    state: StateKind | None = None  # of recurrent layers
    recurrent: tuple[bool, ...] = ()  # per layer, repeated as a pattern: it is recurrent; (): none
    latent: LatentKind | None = None  # of attention in all layers
    has_output_gate: bool = False  # as in LayerKind
    has_drafting: bool = False  # a layer that drafts tokens (model/drafting.py) is loaded, with the number num_layers
    # per layer, repeated as a pattern; set by the family (model/registry.py); (): derived from the fields above
    layer_kinds: tuple[LayerKind, ...] = ()

    @cached_property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        if self.layer_kinds:
            return tuple(self.layer_kinds[i % len(self.layer_kinds)] for i in range(self.num_layers))
        return tuple(self.kind_of(i) for i in range(self.num_layers))

    @property
    def usual_context(self) -> int:
        """Tokens of a context for which --max-model-len does not ask: longrope's original one, as in vLLM, because its
        factors for longer contexts would apply to short ones too."""
        scaling = self.rope.scaling
        if scaling is None or scaling.kind != "longrope":
            return self.max_position
        return min(self.max_position, scaling.original_max_position)

    def experts_of(self, layer: int) -> ExpertsKind | None:
        """The experts of a layer; None if its feed-forward is dense."""
        has = not self.with_experts or self.with_experts[layer % len(self.with_experts)]
        return self.experts if has else None

    @property
    def dense_sizes(self) -> list[int]:
        """The columns of each layer's dense feed-forward; 0: it has experts in its place."""
        kinds = [self.experts_of(layer) for layer in range(self.num_layers)]
        has_dense = [kind is None or kind.is_beside_dense for kind in kinds]
        return [size if has else 0 for size, has in zip(self.ffn_sizes, has_dense, strict=True)]

    @property
    def sparse_layers(self) -> list[int]:
        """The layers with experts."""
        return [layer for layer in range(self.num_layers) if self.experts_of(layer) is not None]

    def kind_of(self, layer: int) -> LayerKind:
        """A layer's attention according to the files; a family adds what its architecture implies."""
        if self.recurrent and self.recurrent[layer % len(self.recurrent)]:
            return LayerKind(num_heads=0, num_kv_heads=0, head_dim=0, state=self.state)
        is_ropeless = bool(self.ropeless) and self.ropeless[layer % len(self.ropeless)]
        is_windowed = self.window is not None and (not self.windowed or self.windowed[layer % len(self.windowed)])
        rope = self.local_rope if is_windowed and self.local_rope is not None else self.rope
        sizes = self.sizes_of(layer)
        return LayerKind(
            num_heads=self.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=None if is_ropeless else rope,
            score_scale=self.score_scale,
            window=self.window if is_windowed else None,
            softcap=self.score_softcap,
            has_v_from_k=sizes.has_v_from_k,
            kv_layer=sizes.kv_layer,
            query_scaling=None if is_ropeless else self.query_scaling,
            has_bias="qkv" in self.biases,
            latent=self.latent,
            has_output_gate=self.has_output_gate,
        )

    def sizes_of(self, layer: int) -> LayerSizes:
        return (
            self.layer_sizes[layer] if self.layer_sizes else LayerSizes(self.num_kv_heads, self.head_dim, self.ffn_size)
        )

    @property
    def ffn_sizes(self) -> list[int]:
        """Of each layer."""
        return [self.sizes_of(layer).ffn_size for layer in range(self.num_layers)]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: float) -> int:
        """Bytes that one token's keys and values, or its latents, take over all layers."""
        return round(itemsize * sum(kind.stored_elements for kind in self.layers))

    @property
    def states(self) -> dict[int, StateKind]:
        """The recurrent layers."""
        return {index: kind.state for index, kind in enumerate(self.layers) if kind.state is not None}

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in all recurrent layers; 0 without any."""
        return sum(state.num_bytes for state in self.states.values())

    def kv_window(self, layer: int) -> int | None:
        """As `stored_window`."""
        return stored_window(self.layers, layer)


def stored_window(layers: Sequence[LayerKind], layer: int) -> int | None:
    """The widest window of the layers that read the keys and values of `layer`; None if one of them reads them all."""
    if layer >= len(layers):  # a layer that drafts
        return None
    widest = 0
    for index, kind in enumerate(layers):
        if layer in (index, kind.kv_layer):
            if kind.window is None:
                return None
            widest = max(widest, kind.window)
    return widest


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json (or GGUF metadata) recommends. None: not stated."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    eos_ids: tuple[int, ...] = ()
    repetition_penalty: float | None = None
    typical_p: float | None = None


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding (docs/SPECULATION.md). Keys, meanings and the flag's name follow vLLM's."""

    method: str | None = None  # ngram, draft_model or mtp; None: draft_model if `model` is given, else ngram
    num_speculative_tokens: int | None = None  # drafted for a sequence and step, at most; None: DEFAULT_DRAFTS
    model: str | None = None  # the draft model, of the same vocabulary
    prompt_lookup_max: int | None = None  # tokens of the longest n-gram that is looked up
    prompt_lookup_min: int | None = None  # ... and of the shortest
    disable_by_batch_size: int | None = None  # no drafts while so many requests run, or more; None: measured times tell
    # drafts only as many tokens as pay, by measured acceptance and step times; off: always num_speculative_tokens
    adaptive: bool = True

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        """From the flag's JSON, or a mapping. Raises TinyvllmError, which names the key, its value and the remedy."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise TinyvllmError(
                    f"--speculative-config is not JSON ({error}): give an object such as "
                    '\'{"method": "ngram", "num_speculative_tokens": 8}\''
                ) from None
        if isinstance(value, SpeculativeConfig):
            return value
        if not isinstance(value, Mapping):
            raise TinyvllmError(f"--speculative-config is {value!r:.100}: give an object of keys and values")
        known = [one.name for one in fields(cls)]
        for key in value:
            if key not in known:
                raise TinyvllmError(f"--speculative-config has no key {key!r:.100}: it has {', '.join(known)}")
        return cls(**value)

    def __post_init__(self) -> None:
        self._check_types()
        method = self.method or ("ngram" if self.model in (None, "ngram", "[ngram]") else "draft_model")
        self._check(method in DEFAULT_DRAFTS, "method", f"choose one of {', '.join(DEFAULT_DRAFTS)}")
        if method == "ngram" and self.model in ("ngram", "[ngram]"):  # vLLM's other way to ask for it
            object.__setattr__(self, "model", None)
        object.__setattr__(self, "method", method)
        if self.num_speculative_tokens is None:
            object.__setattr__(self, "num_speculative_tokens", DEFAULT_DRAFTS[method])
        self._check(
            1 <= self.num_drafts <= MAX_SPECULATIVE_TOKENS,
            "num_speculative_tokens",
            f"give between 1 and {MAX_SPECULATIVE_TOKENS}",
        )
        if method == "draft_model":
            self._check(bool(self.model), "model", "method draft_model needs a draft model with the same vocabulary")
        else:
            self._check(self.model is None, "model", f"method {method} has no draft model: leave it out")
        self._check_lookup(method)
        if self.disable_by_batch_size is not None:
            self._check(self.disable_by_batch_size >= 2, "disable_by_batch_size", "give at least 2, or leave it out")

    @property
    def num_drafts(self) -> int:
        """`num_speculative_tokens`, resolved."""
        assert self.num_speculative_tokens is not None
        return self.num_speculative_tokens

    @property
    def lookup(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest n-gram. If one is given, the other is adapted to it."""
        shortest, longest = self.prompt_lookup_min, self.prompt_lookup_max
        if shortest is None:
            shortest = min(DEFAULT_LOOKUP[0], DEFAULT_LOOKUP[1] if longest is None else longest)
        return shortest, max(DEFAULT_LOOKUP[1], shortest) if longest is None else longest

    def _check_types(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "disable_by_batch_size"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool)
            self._check(value is None or is_count, name, "give a whole number")
        for name in ("method", "model"):
            value = getattr(self, name)
            self._check(value is None or isinstance(value, str), name, "give a string")
        self._check(isinstance(self.adaptive, bool), "adaptive", "give true or false")

    def _check_lookup(self, method: str) -> None:
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if value is not None:
                self._check(method == "ngram", name, f"only method ngram looks n-grams up, not {method}: leave it out")
                self._check(1 <= value <= MAX_LOOKUP, name, f"give between 1 and {MAX_LOOKUP} tokens")
        shortest, longest = self.lookup
        self._check(shortest <= longest, "prompt_lookup_min", f"give at most prompt_lookup_max ({longest})")

    def _check(self, ok: bool, key: str, remedy: str) -> None:
        if not ok:
            shown = reprlib.repr(getattr(self, key))
            raise TinyvllmError(f"--speculative-config has {key} {shown:.200}: {remedy}")


DEFAULT_DRAFTS = {"ngram": 8, "draft_model": 4, "mtp": 2}  # num_speculative_tokens of each method
DEFAULT_LOOKUP = (2, 4)  # tokens of the shortest and of the longest n-gram (Saxena 2023 has 3 at most)
MAX_LOOKUP = 16


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for prompts of `LLM`, as in vLLM: a name, which identifies it (`lora_int_id` has no meaning here), and
    the adapter's directory."""

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""


@dataclass(frozen=True)
class LoraModule:
    """An adapter of --lora-modules: the name that requests give as `model`, and its directory."""

    name: str
    path: str
    base_model: str = ""  # the model that it belongs to, where several are served; "": any

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | LoraModule) -> LoraModule:
        """From name=path, or vLLM's JSON object with the keys name and path. Raises TinyvllmError."""
        if isinstance(value, LoraModule):
            return value
        form = "give name=path, or an object with the keys name and path"
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise TinyvllmError(f"--lora-modules is not JSON ({error}): {form}") from None
        if isinstance(value, str):
            parts = value.partition("=")
            value = {"name": parts[0], "path": parts[2]}
        if not isinstance(value, Mapping):
            raise TinyvllmError(f"--lora-modules is {value!r:.100}: {form}")
        if unknown := sorted(set(value) - {"name", "path", "base_model_name"}):
            raise TinyvllmError(f"--lora-modules has the unknown key {unknown[0]!r:.100}: {form}")
        name, path, base = value.get("name"), value.get("path"), value.get("base_model_name") or ""
        if not all(isinstance(text, str) for text in (name, path, base)) or not name or not path:
            raise TinyvllmError(f"--lora-modules is {value!r:.100}: {form}")
        return cls(name, path, base)


def _refuse(flag: str, value: object, remedy: str) -> NoReturn:
    """Raises TinyvllmError for a value that an option cannot have."""
    raise TinyvllmError(f"--{flag} is {value!r}: {remedy}")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. Names follow vLLM's flags."""

    model: str  # catalog name, directory, .gguf file or hub id
    # of activations and unquantized matrices; auto: float32 on a CPU (rounded to `activation_bits` in products of
    # quantized matrices, unless this says float32), bfloat16 for an unquantized bfloat16 model and
    # for one that overflows float16, else float16
    dtype: str = "auto"
    # to which an x86 CPU rounds activations in products with quantized matrices: 16, or 8, which is faster and less
    # exact; None: 16
    activation_bits: int | None = None
    # auto: float16; on a GPU float32 if dtype is; on OpenCL as dtype; else a dtype, or a name of KV_TYPES
    kv_cache_dtype: str = "auto"
    kv_cache_dtype_k: str | None = None  # of keys alone; None: kv_cache_dtype
    kv_cache_dtype_v: str | None = None  # of values alone
    dequantize: bool = False  # unpack quantized weights at load
    unfused: bool = False  # general kernels where there are fused ones, to see what fusing gains
    cpu_cores: int | None = None  # for a CPU device; None: those of `default_cores`, as far as the model can use them
    block_size: int = 16  # tokens per KV block
    num_gpu_blocks_override: int | None = None  # blocks in the pool; None: as many as fit in memory
    # share of the memory free at the start that weights and KV cache may take; None: 0.9, but 0.8 on METAL and 0.5 on a
    # CPU and OpenCL
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None  # tokens of prompt plus output; None: the model's own limit, reduced to what fits
    max_num_seqs: int | None = None  # sequences per step; None: depends on the device (execution/limits.py)
    max_num_batched_tokens: int | None = None  # tokens per step; None: depends on the device
    decode_buckets: tuple[int, ...] = ()  # batch sizes of decode graphs; (): powers of two up to max_num_seqs
    # token counts of prefill and mixed graphs; (): powers of two from 16 up to max_num_batched_tokens
    token_buckets: tuple[int, ...] = ()
    # row counts of graphs that verify drafts; (): up to those of all sequences with all their drafts, but 64 at most
    verify_buckets: tuple[int, ...] = ()
    # full: capture all graphs before serving; background: serve as soon as some graphs can run any step, and capture
    # the others between steps; idle: as background, but only while no request runs
    warm_up: str = "full"
    enable_prefix_caching: bool = True
    # GiB of host memory for cached blocks that fall out of the pool; None: none
    kv_offloading_size: float | None = None
    kv_disk_cache: str | None = None  # a folder for cached blocks, which a restart finds; None: none
    kv_disk_size: float | None = None  # GiB of all files in it; None: DEFAULT_KV_DISK_GIB
    scheduling_policy: str = "fcfs"  # or "priority": lower numbers first
    # a step that decodes takes at most this many times as long as without prompts, whose chunks are chosen by measured
    # times; 0: no limit
    max_step_stretch: float = 0.0
    # drafts that steps verify (speculative decoding); None: none. A mapping or JSON is converted
    speculative_config: SpeculativeConfig | None = None
    enable_lora: bool = False  # low-rank adapters beside the model (docs/ADAPTERS.md)
    max_loras: int = 1  # different adapters in one step, which the device holds
    max_lora_rank: int = 16  # the largest rank of an adapter; device memory is reserved for it
    max_cpu_loras: int | None = None  # adapters in host memory; None: as many as max_loras
    lora_modules: tuple[LoraModule, ...] = ()  # adapters to load at the start
    # plan and enqueue a step while the previous one runs; None: on every device but a CPU, where it does not pay
    async_scheduling: bool | None = None
    # how a step is captured and run: replay: by our own code; tinyjit: by tinygrad's TinyJit (docs/CAPTURE.md)
    capture: str = field(default_factory=lambda: os.environ.get(CAPTURE_VARIABLE) or "replay")
    compile_cache: bool = True  # keep compiled programs on disk for the next start
    seed: int = 0  # seeds the generator of seeds for requests without one
    served_model_name: str | None = None
    chat_template: str | None = None  # a Jinja file that replaces the model's own
    tool_call_parser: str | None = None  # the model's format of tool calls; None: recognized by its chat template
    # the model's format of reasoning; None: recognized by its chat template; "none": reasoning is not split off
    reasoning_parser: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_modules", tuple(map(LoraModule.of, self.lora_modules)))
        self._check_adapters()
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", SpeculativeConfig.of(self.speculative_config))
        self._check_limits()
        self._check_tiers()
        for flag, choice, known in (
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("kv-cache-dtype", self.kv_cache_dtype, ("auto", *KV_TYPES)),
            ("kv-cache-dtype-k", self.kv_types[0], ("auto", *KV_TYPES)),
            ("kv-cache-dtype-v", self.kv_types[1], ("auto", *KV_TYPES)),
            ("scheduling-policy", self.scheduling_policy, ("fcfs", "priority")),
            ("warm-up", self.warm_up, WARM_UPS),
            ("capture", self.capture, CAPTURES),
        ):
            if choice not in known:
                _refuse(flag, choice, f"choose one of {', '.join(known)}")

    @property
    def kv_types(self) -> tuple[str, str]:
        """What the formats of keys and of values are to be: "auto", or names of KV_TYPES."""
        keys, values = (
            KV_ALIASES.get(name, name)
            for name in (self.kv_cache_dtype_k or self.kv_cache_dtype, self.kv_cache_dtype_v or self.kv_cache_dtype)
        )
        return keys, values

    @property
    def planned_kv(self) -> KVFormats:
        """The formats of keys and values as far as they are known without the device: of "auto", float16."""
        return KVFormats.of(*["float16" if name == "auto" else name for name in self.kv_types])

    def _check_adapters(self) -> None:
        names = [module.name for module in self.lora_modules]
        if names and not self.enable_lora:
            raise TinyvllmError(f"--lora-modules names {names[0]!r}, but adapters are off: give --enable-lora")
        for flag, value, default in (
            ("max-loras", self.max_loras, EngineConfig.max_loras),
            ("max-lora-rank", self.max_lora_rank, EngineConfig.max_lora_rank),
            ("max-cpu-loras", self.max_cpu_loras, EngineConfig.max_cpu_loras),
        ):
            if value != default and not self.enable_lora:
                raise TinyvllmError(f"--{flag} is {value}, but adapters are off: give --enable-lora")
        if comma := [name for name in names if "," in name]:
            raise TinyvllmError(f"--lora-modules names {comma[0]!r}, which has a comma: metrics join names with commas")
        if twice := [name for name in names if names.count(name) > 1]:
            raise TinyvllmError(f"--lora-modules names {twice[0]!r} twice: each adapter needs a name of its own")
        own = self.served_model_name
        if any(module.name == own and module.base_model in ("", own) for module in self.lora_modules):
            raise TinyvllmError(
                f"--lora-modules names {own!r}, which is the model's own name: requests could not choose the adapter"
            )
        if self.max_lora_rank not in LORA_RANKS:
            raise TinyvllmError(
                f"--max-lora-rank is {self.max_lora_rank}: choose one of {', '.join(map(str, LORA_RANKS))}"
            )
        if self.max_loras < 1:
            raise TinyvllmError(f"--max-loras is {self.max_loras}: give at least 1")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise TinyvllmError(
                f"--max-cpu-loras is {self.max_cpu_loras}: give at least --max-loras ({self.max_loras}), because what "
                "the device holds comes from host memory"
            )

    @property
    def has_kv_tiers(self) -> bool:
        """Whether blocks that fall out of the pool are kept elsewhere."""
        return bool(self.kv_offloading_size) or self.kv_disk_cache is not None

    @property
    def kv_disk_bytes(self) -> int:
        """Of all files in `kv_disk_cache`, at most."""
        return int((DEFAULT_KV_DISK_GIB if self.kv_disk_size is None else self.kv_disk_size) * (1 << 30))

    def _check_tiers(self) -> None:
        for flag, value in (("kv-offloading-size", self.kv_offloading_size), ("kv-disk-size", self.kv_disk_size)):
            if value is not None and not 0.0 <= value <= MAX_TIER_GIB:
                raise TinyvllmError(f"--{flag} is {value}: give between 0 and {MAX_TIER_GIB} GiB")
        if self.kv_disk_size is not None and self.kv_disk_cache is None:
            raise TinyvllmError(
                f"--kv-disk-size is {self.kv_disk_size:g}, but there is no folder that it limits: name one with "
                "--kv-disk-cache, or leave it out"
            )
        if self.has_kv_tiers and not self.enable_prefix_caching:
            flag = "--kv-offloading-size" if self.kv_offloading_size else "--kv-disk-cache"
            raise TinyvllmError(f"{flag} keeps cached prefixes: leave out --no-enable-prefix-caching")

    def _check_activation_bits(self) -> None:
        bits = self.activation_bits
        if bits is None:
            return
        if bits not in ACTIVATION_BITS:
            _refuse("activation-bits", bits, "choose 16 or 8")
        if self.dtype == "float32":
            _refuse("activation-bits", bits, "leave it out, or --dtype float32, which rounds nothing")
        if self.dequantize:
            remedy = "leave it out, or --dequantize, since only products with quantized weights round"
            _refuse("activation-bits", bits, remedy)

    def _check_limits(self) -> None:
        self._check_activation_bits()
        if self.block_size not in (8, 16, 32, 64):
            _refuse("block-size", self.block_size, "choose 8, 16, 32 or 64 tokens")
        if self.gpu_memory_utilization is not None and not 0.0 < self.gpu_memory_utilization <= 1.0:
            _refuse("gpu-memory-utilization", self.gpu_memory_utilization, "give a share above 0 and at most 1")
        for flag, value in (
            ("max-num-seqs", self.max_num_seqs),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
            ("cpu-cores", self.cpu_cores),
        ):
            if value is not None and value < 1:
                _refuse(flag, value, "give at least 1")
        if (self.max_num_batched_tokens or self.max_num_seqs or 0) < (self.max_num_seqs or 0):
            _refuse(
                "max-num-batched-tokens",
                self.max_num_batched_tokens,
                f"give at least --max-num-seqs ({self.max_num_seqs}): each sequence decodes one token a step",
            )
        if self.max_step_stretch and not self.max_step_stretch > 1.0:
            _refuse("max-step-stretch", self.max_step_stretch, "give a number above 1, or 0 for no limit")
        if self.max_model_len is not None and self.max_model_len < 2:
            _refuse("max-model-len", self.max_model_len, "give at least 2 tokens: one of prompt and one of output")
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            _refuse(
                "num-gpu-blocks-override",
                self.num_gpu_blocks_override,
                "give at least 2: block 0 is a dummy for padded rows",
            )


@dataclass(frozen=True)
class Limits:
    """The limits of one step: from EngineConfig, or defaults for the device."""

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class BlockGroup:
    """A group of layers with KV blocks of its own (`ops.backend.pool_groups`)."""

    num_blocks: int  # including block 0, the dummy
    window: int | None = None  # tokens that are needed, the newest included; None: all

    def max_chunk(self, block_size: int) -> int:
        """The most tokens that a step can compute of one sequence, however long, in blocks that nobody else holds: its
        window may begin at a block's last token. 0 or less if only sequences that need no more blocks fit."""
        usable = (self.num_blocks - 1) * block_size
        return 0 if self.window is None else usable - (self.window - 1) - (block_size - 1)


@dataclass(frozen=True)
class MemoryUse:
    """What device memory is used for, in bytes."""

    weights: int = 0  # and each sequence's row of what logits processing keeps
    scratch: int = 0  # at most, for a step's intermediate values
    kv_groups: tuple[int, ...] = ()  # keys and values, by group of layers
    state_slot: int = 0  # one of `num_state_slots`
    draft: int = 0  # a draft model, with its pool


@dataclass(frozen=True)
class Capacity:
    """The size of the KV pool and the limits that follow from it. `explanation` has the derivation, line by line."""

    num_blocks: int  # of the group that keeps the most tokens, including block 0, the dummy
    block_size: int  # tokens
    max_model_len: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    explanation: tuple[str, ...] = ()
    window: int | None = None  # of the same group: set if every layer has a window
    other_groups: tuple[BlockGroup, ...] = ()
    # slots of recurrent states (scheduling/state_pool.py), including slot 0, the dummy; 0: no recurrent layers
    num_state_slots: int = 0
    checkpoint_interval: int = 1  # blocks between the checkpoints of a long prompt's states
    # the most token rows of a step with drafts alone, each with logits of its own; 0: no step has drafts
    max_verify_rows: int = 0
    has_drafting: bool = False  # the model's steps note what its drafting layer (model/drafting.py) needs
    memory: MemoryUse = MemoryUse()
    kv_cache_dtype: str = FLOAT16_KV.name  # KVFormats.name of the pool

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """All groups, in the order of `ops.backend.pool_groups`."""
        return (BlockGroup(self.num_blocks, self.window), *self.other_groups)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence that the pool can hold. It is bounded by groups that keep all tokens, or have
        no room for their window; without such a group, only by `max_model_len`."""
        bounds = [
            (group.num_blocks - 1) * self.block_size for group in self.groups if group.max_chunk(self.block_size) < 1
        ]
        return min(bounds, default=self.max_model_len)

    @property
    def max_chunk(self) -> int:
        """The most tokens that a step may compute of one sequence."""
        longest = min(self.max_model_len, self.num_tokens)
        limits = [
            group.max_chunk(self.block_size)
            for group in self.groups
            if (group.num_blocks - 1) * self.block_size < longest
        ]
        return min([self.max_num_batched_tokens, *limits])

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of all groups, without the dummies."""
        return sum(group.num_blocks - 1 for group in self.groups)


# How an error begins if following the grammar takes more work than a step may: the request is to blame, not the server
GRAMMAR_TOO_COMPLEX = "the grammar is too complex to follow"
GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar", "lark")


@dataclass(frozen=True)
class GrammarSpec:
    """The grammar that an output must follow. Hashable, so that compiled grammars can be cached by it.

    text by kind: json_schema: the schema as JSON; regex: an expression that the whole output must match; choice: a JSON
    list of strings; grammar: GBNF or Lark, detected; lark: llguidance's Lark; json_object: unused.
    """

    kind: str
    text: str = ""
    # a Lark grammar for what comes first (reasoning, which no schema constrains), in which `@answer` is this grammar
    prefix: str = ""
    # the request field, for messages; not compared, because the same grammar may come from different fields
    param: str = field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            known = ", ".join(GRAMMAR_KINDS)
            raise RequestError(f"grammar kind {self.kind!r} is not known; known: {known}", param=self.param)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it stops. vLLM's names and defaults."""

    n: int = 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    typical_p: float = 1.0  # locally typical sampling; 1: off
    repetition_penalty: float = 1.0  # above 1: ids in the prompt and the output become less likely
    frequency_penalty: float = 0.0  # subtracted from an id's logit for each occurrence in the output
    presence_penalty: float = 0.0  # subtracted from an id's logit once it is in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    bad_words: tuple[str, ...] = ()  # texts that must not occur: a token that would complete one is not sampled
    allowed_token_ids: tuple[int, ...] | None = None  # the only ids that may be sampled; None: all may be
    seed: int | None = None
    max_tokens: int | None = 16  # None: as many as fit
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k most likely ones
    prompt_logprobs: int | None = None  # the same for every prompt token except the first
    skip_special_tokens: bool = True
    mark_special_tokens: bool = False  # for parsers of the output: see text/detokenizer.py
    grammar: GrammarSpec | None = None  # the grammar that the output must follow

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # the two spellings that OpenAI allows
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if 0.0 < self.temperature < MIN_POSITIVE:  # greedy, as everything below about 1e-5 is
            object.__setattr__(self, "temperature", 0.0)

        self._check_draw()
        self._check_logits_processing()
        self._check_output()

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    def _check(self, ok: bool, param: str, limit: str) -> None:
        if not ok:
            shown = reprlib.repr(getattr(self, param))
            raise RequestError(f"{param} is {shown:.200}: it must be {limit}", param=param)

    def _check_draw(self) -> None:
        check = self._check
        check(1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}")
        check(math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0 <= self.top_k < 2**31, "top_k", "0 (off), -1 (off) or a positive count")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(MIN_POSITIVE <= self.typical_p <= 1.0, "typical_p", f"at least {MIN_POSITIVE:g} and at most 1")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")

    def _check_logits_processing(self) -> None:
        check = self._check
        penalty = self.repetition_penalty
        check(MIN_POSITIVE <= penalty <= 100.0, "repetition_penalty", f"at least {MIN_POSITIVE:g} and at most 100")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"of at most {MAX_LOGIT_BIAS} ids")
        in_range = all(-MAX_BIAS <= value <= MAX_BIAS for value in self.logit_bias.values())
        check(in_range, "logit_bias", f"of values between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        check(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} strings")
        check(all(isinstance(s, str) and s for s in self.bad_words), "bad_words", "strings that are not empty")
        is_short = sum(map(len, self.bad_words)) <= MAX_BAD_WORDS_CHARS
        check(is_short, "bad_words", f"of at most {MAX_BAD_WORDS_CHARS} characters in all")
        check(self.allowed_token_ids != (), "allowed_token_ids", "at least one id, or omitted")

    def _check_output(self) -> None:
        check = self._check
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "0 or more")
        if self.max_tokens is not None:
            check(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        check(all(isinstance(s, str) and s for s in self.stop), "stop", "strings that are not empty")
        check(sum(map(len, self.stop)) <= MAX_STOP_CHARS, "stop", f"of at most {MAX_STOP_CHARS} characters in all")
        check(len(self.stop_token_ids) <= MAX_STOP_IDS - 8, "stop_token_ids", f"at most {MAX_STOP_IDS - 8} ids")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            check(count is None or 0 <= count <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `kind` is "gguf" (path is the file) or "hf" (path is the directory)."""

    kind: str
    path: Path
    name: str  # what users call it
    extra: dict[str, str] = field(default_factory=dict)


def cache_dir() -> Path:
    """$TINYVLLM_CACHE, else in the user's cache directory (XDG Base Directory Specification)."""
    if named := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(named)
    return Path(os.environ.get(_XDG_CACHE_VARIABLE) or home_dir() / ".cache") / "tinyvllm"


def cache_dir_variable() -> str:
    """The environment variable that names the cache directory; if none does, the one that can."""
    names_ours = os.environ.get(CACHE_DIR_VARIABLE) or not os.environ.get(_XDG_CACHE_VARIABLE)
    return CACHE_DIR_VARIABLE if names_ours else _XDG_CACHE_VARIABLE


def home_dir() -> Path:
    """The user's home directory; without one, as for a container's user who has no name, a path that cannot exist, so
    that what would be kept there is not."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull) / "this-user-has-no-home-directory"


def default_cores() -> int:
    """`usable_cores`, without those that share their arithmetic units with another one (hyper-threading)."""
    if not hasattr(os, "sched_getaffinity"):
        return usable_cores()
    return min(usable_cores(), count_physical(os.sched_getaffinity(0), Path("/sys/devices/system/cpu")))


def count_physical(cores: Iterable[int], system: Path) -> int:
    """The physical cores among logical ones. `system`: the kernel's folder of them; those without a file there count as
    one each."""

    def siblings(core: int) -> str:
        try:
            return (system / f"cpu{core}/topology/thread_siblings_list").read_text()
        except OSError:
            return str(core)

    return len({siblings(core) for core in cores})


def usable_cores() -> int:
    """Cores that this process may use: its affinity, limited by a container's CPU quota and by $TINYVLLM_CPU_CORES.

    Raises DeviceError if the variable is not a whole number of at least 1.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted := os.environ.get(CORES_VARIABLE):
        if not wanted.isdecimal() or int(wanted) < 1:
            raise DeviceError(f"{CORES_VARIABLE} is {wanted!r}: it must be a whole number of at least 1")
        count = min(count, int(wanted))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
