"""Writers of tiny seeded model files, for every room's tests: a llama (or a relative, by its family) of a few thousand
weights and a byte tokenizer.

Both formats hold the same weights for the same seed. A token's id is its byte (`list("hi".encode())`), the specials
follow: 256 `<|endoftext|>`, 257 `<|im_start|>`, 258 `<|im_end|>`; 259 is the one merge, of two NUL bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from tinyvllm.config import ModelFiles
from tinyvllm.storage.gguf_types import BLOCK_SIZES

ENDOFTEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_TOKENS = 260  # bytes, specials and the merge; rows beyond are reserved special tokens

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
K_KINDS = ("Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class TinyLlama:
    """The numbers of a tiny llama. Quantized kinds need columns in whole blocks: 32, or 256 for K kinds (`wide()`)."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = NUM_TOKENS
    tie: bool = True
    max_position: int = 512
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # as in config.json: {"rope_type": "linear", "factor": 2.0}
    norm_eps: float = 1e-5
    seed: int = 0
    family: str = "llama"  # or "qwen3", whose heads are normed

    @property
    def norms_heads(self) -> bool:
        return self.family == "qwen3"


WIDE = {"hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 512}  # **WIDE: room for the K kinds' blocks


def make_weights(model: TinyLlama) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face's names, rows are outputs."""
    rng = np.random.default_rng(model.seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    def norm(size: int = model.hidden) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = {"model.embed_tokens.weight": matrix(model.vocab, model.hidden)}
    for index in range(model.layers):
        layer = f"model.layers.{index}."
        weights[layer + "input_layernorm.weight"] = norm()
        weights[layer + "self_attn.q_proj.weight"] = matrix(q_size, model.hidden)
        weights[layer + "self_attn.k_proj.weight"] = matrix(kv_size, model.hidden)
        weights[layer + "self_attn.v_proj.weight"] = matrix(kv_size, model.hidden)
        weights[layer + "self_attn.o_proj.weight"] = matrix(model.hidden, q_size)
        if model.norms_heads:
            weights[layer + "self_attn.q_norm.weight"] = norm(model.head_dim)
            weights[layer + "self_attn.k_norm.weight"] = norm(model.head_dim)
        weights[layer + "post_attention_layernorm.weight"] = norm()
        weights[layer + "mlp.gate_proj.weight"] = matrix(model.ffn, model.hidden)
        weights[layer + "mlp.up_proj.weight"] = matrix(model.ffn, model.hidden)
        weights[layer + "mlp.down_proj.weight"] = matrix(model.hidden, model.ffn)
    weights["model.norm.weight"] = norm()
    if not model.tie:
        weights["lm_head.weight"] = matrix(model.vocab, model.hidden)
    return weights


# --- Hugging Face's format --------------------------------------------------------------------------------


def write_tiny_hf_llama(directory: Path, *, dtype: str = "float32", shards: int = 1, **numbers: Any) -> ModelFiles:
    """Write a model directory as transformers would (`shards` > 1: with an index); `numbers` are TinyLlama's fields."""
    model = TinyLlama(**numbers)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", hf_config(model, dtype))
    write_json(directory / "generation_config.json", {"eos_token_id": [IM_END_ID, ENDOFTEXT_ID]})
    weights = make_weights(model)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", weights, dtype)
    else:
        names = list(weights)
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: weights[name] for name in names[shard::shards]}
            write_safetensors(directory / file_name, part, dtype)
            weight_map |= dict.fromkeys(part, file_name)
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_byte_tokenizer(directory, model.vocab)
    return ModelFiles("hf", directory, directory.name)


def hf_config(model: TinyLlama, dtype: str = "float32") -> dict[str, Any]:
    """What config.json says, with rope_theta in its old place."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[model.family]],
        "model_type": model.family,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_position,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else dict(model.rope_scaling),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": IM_START_ID,
        "eos_token_id": IM_END_ID,
        "torch_dtype": dtype,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """A file of tensors in `dtype`, as transformers writes it."""
    tensors = {name: np.ascontiguousarray(encode_floats(weight, dtype)) for name, weight in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def encode_floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as `dtype`, rounded to nearest even."""
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


def byte_vocabulary(size: int = NUM_TOKENS) -> list[str]:
    """Tokens in the order of their ids."""
    assert size >= NUM_TOKENS, f"the byte tokenizer needs {NUM_TOKENS} tokens, not {size}"
    alphabet = byte_alphabet()
    reserved = [f"<|reserved_{index}|>" for index in range(size - NUM_TOKENS)]
    return [*alphabet, *SPECIALS, alphabet[0] * 2, *reserved]


def is_special(token_id: int) -> bool:
    return token_id in (ENDOFTEXT_ID, IM_START_ID, IM_END_ID) or token_id >= NUM_TOKENS


def make_byte_tokenizer(size: int = NUM_TOKENS) -> tokenizers.Tokenizer:
    """Byte-level BPE in which every byte is its own token."""
    tokens = byte_vocabulary(size)
    nul = tokens[0]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[(nul, nul)]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = [token for index, token in enumerate(tokens) if is_special(index)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


def write_byte_tokenizer(directory: Path, size: int = NUM_TOKENS) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template in the latter."""
    make_byte_tokenizer(size).save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "add_bos_token": False,
            "chat_template": CHATML,
        },
    )


# --- GGUF ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GGUFTweaks:
    """What a test may change in a GGUF file."""

    quant_of: Mapping[str, str] = field(default_factory=dict)  # kind by part of a tensor's name: {"ffn_down": "Q6_K"}
    metadata: Mapping[str, Any] = field(default_factory=dict)  # further keys, str, int, float, bool or list
    drop: tuple[str, ...] = ()  # tensors to leave out, by their GGUF names
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)  # tensors to add: float16, bfloat16, or as float32


def write_tiny_gguf(
    path: Path, *, quant: str = "Q4_1", tweaks: GGUFTweaks = GGUFTweaks(), **numbers: Any
) -> ModelFiles:
    """Write a .gguf file as llama.cpp's converter would; `numbers` are TinyLlama's fields.

    Matrices have the kind `quant`. The weights are write_tiny_hf_llama's, quantized, except in the K kinds, for which
    gguf has no quantizer: there the blocks are random ones of a like spread.
    """
    model = TinyLlama(**numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, model.family)
    add_model_metadata(writer, model)
    add_tokenizer_metadata(writer, model.vocab)
    for key, value in tweaks.metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    rng = np.random.default_rng(model.seed)
    for hf_name, weight in make_weights(model).items():
        name = gguf_name(hf_name, model.family)
        if name in tweaks.drop:
            continue
        if name.endswith(("attn_q.weight", "attn_k.weight")) and model.family == "llama":
            weight = interleave_rotary_rows(weight, model.head_dim)
        kind = next((kind for part, kind in tweaks.quant_of.items() if part in name), quant)
        add_tensor(writer, name, weight, kind if weight.ndim == 2 else "F32", rng)
    if model.rope_scaling is not None and model.rope_scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(model))
    for name, weight in tweaks.extra.items():
        if weight.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, weight.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weight if weight.dtype == np.float16 else weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles("gguf", path, path.stem)


def add_model_metadata(writer: gguf.GGUFWriter, model: TinyLlama) -> None:
    writer.add_name("Tiny Llama")
    writer.add_block_count(model.layers)
    writer.add_context_length(model.max_position)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    if model.head_dim * model.heads != model.hidden:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(model.vocab)
    if model.rope_scaling is not None and model.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling["factor"])


def add_tokenizer_metadata(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = byte_vocabulary(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if is_special(index) else normal for index in range(size)])
    writer.add_token_merges([f"{tokens[0]} {tokens[0]}"])
    writer.add_bos_token_id(IM_START_ID)
    writer.add_eos_token_id(IM_END_ID)
    writer.add_unk_token_id(ENDOFTEXT_ID)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str, rng: np.random.Generator) -> None:
    if kind == "F32":
        writer.add_tensor(name, weight)
        return
    quantization = gguf.GGMLQuantizationType[kind]
    try:
        rows = gguf.quants.quantize(weight, quantization)
    except NotImplementedError:
        draw = random_k_rows if kind in K_KINDS else random_rows
        rows = draw(rng, kind, *weight.shape)
    writer.add_tensor(name, rows, raw_dtype=quantization)


# Where blocks have half-precision numbers: if not listed, at byte 0
FLOAT16_FIELDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("MXFP4", "NVFP4", "IQ1_M"), ()),
}


def random_rows(rng: np.random.Generator, kind: str, rows: int, columns: int, scale: float = 1e-3) -> np.ndarray:
    """Random blocks of any kind, (rows, bytes) uint8, with `scale` as each half-precision number."""
    block_size, block_bytes = BLOCK_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), np.uint8)
    for begin in FLOAT16_FIELDS.get(kind, (0,)):
        blocks[:, begin : begin + 2] = np.array([scale], np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = np.minimum(blocks[:, 0], 250)  # finite products; 255 is not a number
    if kind == "NVFP4":
        blocks[:, :4] &= 0x7F  # scales have no sign
    if kind == "IQ1_M":  # a half-precision number in four pieces
        words = blocks[:, 48:].view(np.uint16)
        words[:] = words & 0x0FFF | np.array([scale], np.float16).view(np.uint16) << [12, 8, 4, 0] & 0xF000
    return blocks.reshape(rows, -1)


def random_k_rows(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks of a K kind, (rows, bytes) uint8, whose values spread by about 1 / sqrt(columns) around zero."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert columns % block_size == 0, f"{kind} needs columns in blocks of {block_size}, not {columns}"
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), np.uint8)
    spread = 1 / math.sqrt(columns)
    if kind == "Q6_K":  # d * int8 scale * (code - 32), scale and code uniform
        blocks[:, -2:] = np.float16(spread / (128 / math.sqrt(3) * 64 / math.sqrt(12))).reshape(1).view(np.uint8)
    else:  # d * scale * code - dmin * minimum, 6-bit scale and minimum
        top = 15 if kind == "Q4_K" else 31
        base = np.float16(spread / (36 * top / 2))
        blocks[:, :4] = np.array([base, base * np.float16(top / 2)], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@cache
def names_of(family: str) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 32)


def gguf_name(hf_name: str, family: str = "llama") -> str:
    """llama.cpp's name of a Hugging Face tensor, from the gguf package's own map of the family, or of llama."""
    found = (names_of(one).get_name(hf_name, try_suffixes=(".weight", ".bias")) for one in (family, "llama"))
    name = next(filter(None, found), None)
    assert name is not None, hf_name
    return name


def interleave_rotary_rows(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Hugging Face's rows (a head's first halves of pairs, then the second) in llama.cpp's order, pair by pair."""
    rows, columns = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_divisors(model: TinyLlama) -> np.ndarray:
    """Llama 3.1's frequency scaling as the divisors that llama.cpp's converter writes, (head_dim / 2,) float32."""
    assert model.rope_scaling is not None
    factor, low, high, original = (
        float(model.rope_scaling[key])
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi * model.rope_theta ** (np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@contextlib.contextmanager
def without_logits_processing() -> Iterator[None]:
    """Engines that are made inside compile nothing for logits processing, which their requests must not ask for. Their
    steps must not be kept for others: half of a small engine's kernels are spared."""
    from tinyvllm.execution.step_code import StepCode

    sample = StepCode.sample
    with mock.patch.object(StepCode, "sample", lambda code, logits, state=None: sample(code, logits)):
        yield
