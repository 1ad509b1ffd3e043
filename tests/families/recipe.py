"""What a tiny seeded model of a family is, and how it is written in both formats. No oracle, no tinyvllm.

The weights follow from the seed by NumPy alone, so that the tests make the same ones that the references were made of.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from safetensors.numpy import save_file

from tests.builders import (
    add_tokenizer_metadata,
    gguf_name,
    interleave_rotary_rows,
    write_byte_tokenizer,
    write_json,
    write_safetensors,
)
from tests.families.experts import LLAMA_CPP, MLX, stacked
from tinyvllm.config import ModelFiles

# Means of norms' weights. The last one's makes logits sharp, so that no two tokens are nearly as likely. Those after
# attention and the feed-forward outweigh the embedding in the residual: a tied head would repeat the last token.
LAST_NORM, POST_NORM = 4.0, 3.0
BIAS_SPREAD = 0.3
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite")  # whose converter reorders the rows of q and k
NUM_TOKENS = 263  # bytes, specials, and an odd number of rows


ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """A model of transformers' class `hf_class`, by its config.json, and the tensors that its layers have."""

    hf_class: str
    gguf_arch: str | None  # None: GGUF cannot say all of this config
    config: Mapping[str, Any]
    seed: int
    gguf_keys: Mapping[str, Any] = field(default_factory=dict)  # besides those of every family
    layer_norms: tuple[str, ...] = (ATTENTION_NORM, FFN_NORM)  # of hidden_size weights
    post_norms: tuple[str, ...] = ()  # those of `layer_norms` that come after attention or the feed-forward
    biases: tuple[str, ...] = ()  # modules of a layer that have one: "self_attn.q_proj"
    # a layer's tensors, by our names; they replace those that every family has. (): a tensor that it does not have
    more_shapes: Callable[[Mapping[str, Any], int], Shapes] = lambda config, layer: {}
    # of tensors outside the layers, besides every family's. (): one that it does not have
    top_shapes: Shapes = field(default_factory=dict)
    norm_offset: float = 0.0  # what the class adds to norms' weights, and GGUF's converter too
    # other vectors, by the ends of their names: mean and spread
    vectors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # modules stored as one, by its name
    gguf_more: Mapping[str, np.ndarray] = field(default_factory=dict)  # tensors that only GGUF has
    # What GGUF stores under other names or in another form: the tensors of this model by llama.cpp's names
    gguf_tensors: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    # The same for mlx-lm, before anything is quantized; None: experts are stacked
    mlx_tensors: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None


def sizes(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": NUM_TOKENS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "tie_word_embeddings": False,
    }


def head_norms(config: Mapping[str, Any], layer: int) -> Shapes:
    """`more_shapes` of a family that norms each head of queries and keys."""
    return {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}


def layer_shapes(recipe: Recipe, layer: int) -> Shapes:
    """Shapes of a layer's tensors by Hugging Face's names, after "model.layers.N."."""
    c = recipe.config
    hidden, ffn, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    rows = {f"self_attn.{name}_proj": c["num_key_value_heads"] * head_dim for name in "kv"}
    rows = {"self_attn.q_proj": c["num_attention_heads"] * head_dim} | rows
    matrices = {name: (count, hidden) for name, count in rows.items()}
    matrices["self_attn.o_proj"] = (hidden, rows["self_attn.q_proj"])
    matrices |= {f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
    matrices["mlp.down_proj"] = (hidden, ffn)
    shapes: Shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": matrices[name][:1] for name in recipe.biases}
    shapes |= {f"{name}.weight": (hidden,) for name in recipe.layer_norms}
    shapes |= recipe.more_shapes(c, layer)
    return {name: shape for name, shape in shapes.items() if shape}


def tensor_shapes(recipe: Recipe) -> Shapes:
    """Shapes by Hugging Face's names, before any are fused."""
    c = recipe.config
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    for index in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer_shapes(recipe, index).items()}
    shapes |= {"model.norm.weight": (c["hidden_size"],)} | recipe.top_shapes
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    return {name: shape for name, shape in shapes.items() if shape}


def make_weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """Float32 weights as Hugging Face stores them: Gemma's norms less 1, Phi's fused."""
    weights = {name: _draw(recipe, name, shape) for name, shape in tensor_shapes(recipe).items()}
    return _fuse(weights, recipe.fused)


def _fuse(weights: dict[str, np.ndarray], fused: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The same with the modules of each name in `fused` as one, their rows one after another."""
    whole: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        module, suffix = name.rpartition(".")[::2]
        found = next((key for key, parts in fused.items() if module.endswith(parts)), None)
        if found is None:
            whole[name] = weight
            continue
        part = next(part for part in fused[found] if module.endswith(part))
        target = f"{module.removesuffix(part)}{found}.{suffix}"
        whole[target] = np.concatenate([whole[target], weight]) if target in whole else weight
    return whole


def _draw(recipe: Recipe, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng([recipe.seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) > 1:
        return (values / math.sqrt(shape[-1])).astype(np.float32)
    own = next((own for end, own in recipe.vectors.items() if name.endswith(end)), None)
    if own is not None:
        return (own[0] + own[1] * values).astype(np.float32)
    if name.endswith(".bias"):
        return (BIAS_SPREAD * values).astype(np.float32)
    middle = LAST_NORM if name == "model.norm.weight" else 1.0
    if recipe.post_norms and name.removesuffix(".weight").endswith(recipe.post_norms):
        middle = POST_NORM
    return (middle + 0.2 * values - recipe.norm_offset).astype(np.float32)


def write_hf(
    directory: Path,
    recipe: Recipe,
    dtype: str = "float32",
    transform: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    more_config: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """A directory in Hugging Face's format, with the byte tokenizer.

    `transform` replaces the tensors, which are then stored as they are (a quantized format's); `more_config`: what
    config.json then says besides.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(recipe.config) | {"architectures": [recipe.hf_class], "dtype": dtype} | dict(more_config or {})
    write_json(directory / "config.json", config)
    weights = make_weights(recipe)
    if transform is None:
        write_safetensors(directory / "model.safetensors", weights, dtype)
    else:
        save_file(transform(weights), directory / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(directory, NUM_TOKENS)
    return ModelFiles("hf", directory, directory.name)


def write_gguf(path: Path, recipe: Recipe, dtype: str = "float32") -> ModelFiles:
    """A file as llama.cpp's converter writes it, with matrices of `dtype`."""
    arch, c = recipe.gguf_arch, recipe.config
    assert arch is not None
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    if "rope_theta" in c:
        writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    for key, value in recipe.gguf_keys.items():
        kind = gguf.GGUFValueType.get_type(value)
        unsigned = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(f"{arch}.{key}", value, unsigned)
    add_tokenizer_metadata(writer, NUM_TOKENS)
    for name, weight in (gguf_weights(recipe) | dict(recipe.gguf_more)).items():
        writer.add_tensor(name, weight.astype(dtype) if weight.ndim > 1 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles("gguf", path, path.stem)


def gguf_weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """The tensors by llama.cpp's names and in its order of rows."""
    arch, found = recipe.gguf_arch, {}
    assert arch is not None
    weights = make_weights(recipe)
    if recipe.gguf_tensors is not None:
        return recipe.gguf_tensors(weights)
    weights = stacked(weights, LLAMA_CPP)
    for name, weight in weights.items():
        if weight.ndim == 1 and not name.endswith(".bias"):
            weight = weight + np.float32(recipe.norm_offset)
        if arch in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            rows = interleave_rotary_rows(weight.reshape(len(weight), -1), recipe.config["head_dim"])
            weight = rows.reshape(weight.shape)
        found[gguf_name(name, arch.replace("-", "_"))] = weight
    return found


def mlx_weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """The tensors as mlx-lm names and stacks them, before any are quantized."""
    weights = make_weights(recipe)
    return stacked(weights, MLX) if recipe.mlx_tensors is None else recipe.mlx_tensors(weights)
