"""ModelConfig from a GGUF file's metadata, with the meaning that llama.cpp gives it."""

from __future__ import annotations

from tinyvllm.config import ModelConfig, Rope
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage import families
from tinyvllm.storage.families import SOFTCAPS, FamilyFiles
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.gguf_rope import read_gguf_rope
from tinyvllm.storage.hf_config import shortest_period
from tinyvllm.storage.hf_rope import MAX_THETA, MIN_THETA
from tinyvllm.storage.values import MAX_LAYERS, MAX_SIZE, Values

# What ModelConfig.biases calls the bias of a module, which no key mentions
BIASES = {
    "attn_q": "qkv",
    "attn_qkv": "qkv",
    "attn_output": "out",
    "ffn_gate": "ffn",
    "ffn_up": "ffn",
    "ffn_down": "ffn",
}
CLASSIFIER = "cls.output.weight"  # of a reranker: the head's rows of "yes" and "no", instead of the whole head
# {arch}.pooling_type of embedding models; 0: none
POOLINGS = {1: "mean", 2: "cls", 3: "last"}


def read_gguf_config(file: GGUFFile, name: str) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    architecture = _architecture(Values(file.path, file.metadata))
    family = families.KNOWN_ARCHITECTURES[architecture]
    prefix = f"{file.metadata['general.architecture']}."
    defaults = {prefix + key: value for key, value in family.gguf_defaults.items()}
    values = Values(file.path, defaults | dict(file.metadata), prefix)
    _refuse_variants(values, family)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight: it holds no complete language model")
    num_heads = _largest(values, family, "attention.head_count")
    num_kv_heads = _largest(values, family, "attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse("attention.head_count_kv", f"a divisor of attention.head_count ({num_heads})")
    head_dim = values.integer("rope.dimension_count") if family.has_latents else _head_dim(values, num_heads)
    num_layers, hidden_size = _num_layers(values), values.integer("embedding_length", at_most=MAX_SIZE)
    window, windowed = _windows(values, family, num_layers)
    if CLASSIFIER in file.tensors and file.tensors[CLASSIFIER].shape != (2, hidden_size):
        raise UnsupportedModelError(f"{file.path}: a classifier is supported with the labels yes and no only")
    rope = read_gguf_rope(
        values,
        file.tensors,
        head_dim,
        is_partial=family.has_partial_rope,
        is_interleaved=family.interleaves_rope,
    )
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=_largest(values, family, "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_position=values.integer("context_length"),
        rope=rope,
        norm_eps=values.positive("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        has_head=CLASSIFIER not in file.tensors,
        num_labels=1 if CLASSIFIER in file.tensors else 0,
        pooling=POOLINGS.get(values.optional_integer("pooling_type", at_least=0) or 0),
        dtype=_dtype(file),
        name=name,
        activation=family.activation,
        window=window,
        windowed=windowed,
        local_rope=_local_rope(values, family, rope) if window is not None else None,
        score_scale=(hidden_size // num_heads) ** -0.5 if num_layers in family.gguf_wide_scale_layers else None,
        score_softcap=values.optional_number("attn_logit_softcapping") or None,
        logit_softcap=values.optional_number("final_logit_softcapping") or None,
        overflows_float16=family.overflows_float16,
        biases=tuple(dict.fromkeys(part for name, part in BIASES.items() if f"blk.0.{name}.bias" in file.tensors)),
    )
    return family.gguf_refine(config, values, file.tensors)


def _architecture(values: Values) -> str:
    """The registry's key. Mixtral's files are called `llama`, as those of the dense models are."""
    name = values.get("general.architecture")
    found = {key: family for key, family in families.KNOWN_ARCHITECTURES.items() if name in family.gguf}
    if not found:
        known = ", ".join(name for names in families.KNOWN_ARCHITECTURES.values() for name in names.gguf)
        values.unsupported("general.architecture", known)
    own = Values(values.source, values.values, f"{name}.")
    has_experts = bool(own.optional_integer("expert_count", at_least=0))
    fitting = [key for key, family in found.items() if family.has_experts in (None, has_experts)]
    if not fitting:
        own.unsupported("expert_count", "0 (no experts)" if has_experts else "1 and more (experts)")
    return fitting[0]


def _refuse_variants(values: Values, family: FamilyFiles) -> None:
    """Refuse settings that would change the computation, where running on would give wrong tokens."""
    for key in SOFTCAPS:
        if key not in family.softcaps and values.optional_number(key):
            values.unsupported(key, "0 (none)")


def _num_layers(values: Values) -> int:
    """Without those that follow them to draft tokens (multi-token prediction)."""
    drafting = values.optional_integer("nextn_predict_layers", at_least=0) or 0
    stated = values.integer("block_count", at_most=MAX_LAYERS)
    count = stated - drafting
    if count < 1:
        values.refuse("nextn_predict_layers", f"less than block_count ({stated})")
    return count


def _largest(values: Values, family: FamilyFiles, key: str, default: int | None = None) -> int:
    """A number, or the largest of a list with one for each layer. Raises ModelError if they differ in a family whose
    layers are alike."""
    if not isinstance(values.get(key), list):
        return values.integer(key, default, at_most=MAX_SIZE)
    num_layers = values.integer("block_count", at_most=MAX_LAYERS)
    counts = values.integers(key, num_layers, at_least=0 if family.hf_recurrent else 1)
    counts = [count for count in counts if count]  # recurrent layers have no heads
    if not counts:
        values.refuse(key, "above 0 in one layer at least")
    if len(set(counts)) > 1 and not family.has_layer_sizes:
        values.unsupported(key, "the same number for every layer")
    return max(counts)


def _windows(values: Values, family: FamilyFiles, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """ModelConfig's `window` and `windowed`. A window that holds every position counts as none, unless windowed layers
    differ in their rope too."""
    key = "attention.sliding_window"
    window = values.optional_integer(key, at_least=0)
    is_narrow = window is not None and 0 < window < values.integer("context_length")
    if is_narrow and family.gguf_window_pattern is None:
        values.unsupported(key, "0 (full attention)")
    if not window or not (is_narrow or family.has_local_rope):
        return None, ()
    windowed = _windowed_layers(values, family.gguf_window_pattern or 0, num_layers)
    return (window, shortest_period(windowed)) if any(windowed) else (None, ())


def _windowed_layers(values: Values, pattern: int, num_layers: int) -> tuple[bool, ...]:
    """Of each layer, from a flag for each or a period (llama.cpp's set_swa_pattern)."""
    key = "attention.sliding_window_pattern"
    if isinstance(values.get(key), list):
        return values.flags(key, (num_layers,), f"a number, or one flag for each of {num_layers} layers")
    stated = values.optional_integer(key, at_least=0)
    period = pattern if stated is None else stated
    return tuple(period == 0 or layer % period < period - 1 for layer in range(num_layers))


def _local_rope(values: Values, family: FamilyFiles, rope: Rope) -> Rope | None:
    if not family.has_local_rope:
        return None
    theta = family.local_rope_theta or rope.theta
    return Rope(values.positive("rope.freq_base_swa", theta, MIN_THETA, MAX_THETA))


def _head_dim(values: Values, num_heads: int) -> int:
    hidden_size = values.integer("embedding_length", at_most=MAX_SIZE)
    key = "attention.key_length"
    if values.get(key) is None and hidden_size % num_heads != 0:
        values.refuse("embedding_length", f"a multiple of attention.head_count ({num_heads})")
    head_dim = values.integer(key, hidden_size // num_heads, at_most=MAX_SIZE)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: heads have {head_dim} values: rotary embeddings need an even number")
    if values.integer("attention.value_length", head_dim) != head_dim:
        values.unsupported("attention.value_length", f"{head_dim} (the length of a head's key)")
    return head_dim


def _dtype(file: GGUFFile) -> str:
    """The type of the unquantized matrices; float16 where all are quantized, which is that of the blocks' scales."""
    kinds = {tensor.ggml_type for tensor in file.tensors.values() if len(tensor.shape) == 2}
    if "BF16" in kinds:
        return "bfloat16"
    return "float32" if kinds == {"F32"} else "float16"
