"""Tensors of a GGUF file under Hugging Face's names and in Hugging Face's order of rows."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.config import ModelConfig
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose
from tinyvllm.model.weights.recurrent import from_gguf
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor, view_dense
from tinyvllm.storage import families
from tinyvllm.storage.gguf_config import CLASSIFIER
from tinyvllm.storage.gguf_file import GGUFFile, GGUFTensor
from tinyvllm.storage.gguf_header import printable
from tinyvllm.storage.gguf_rope import ROPE_TENSORS

logger = logging.getLogger(__name__)

MULTIPLIED_TYPE = "NVFP4"  # whose matrices have a scale as a tensor beside them
KNOWN_TYPES = (*DENSE_DTYPES, *QUANTIZED_KINDS)

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "token_embd_norm": "model.norm",  # LFM2's last norm
    "output": "lm_head",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp.scale": "mlp.gate.scale",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_down_exps.scale": "mlp.gate.per_expert_scale",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "attn_sinks.weight": "self_attn.sinks",
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "mtp.pre_fc_norm_embedding",
    "nextn.hnorm": "mtp.pre_fc_norm_hidden",
    "nextn.shared_head_norm": "mtp.norm",
}
LAYER_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>[\w.]+?)(?:\.(?P<suffix>weight|bias|scale))?")
EXPERT_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<module>gate|up|down)\.(?P<expert>\d+)\.weight")  # until 2024
SHARED_GATE = "mlp.shared_expert_gate.weight"
LAYER_NUMBER = re.compile(r"blk\.(?P<layer>\d+)\.")
TOP_TENSOR = re.compile(r"(?P<part>\w+)\.(?P<suffix>weight|bias)")

ROTARY_TENSORS = tuple(f"{part}.{suffix}" for part in ("attn_q", "attn_k") for suffix in ("weight", "bias"))


def read_gguf(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """All tensors of the file, by Hugging Face's names (a tensor that has none keeps its own).

    The rope's tensors are left out: they are in `config.rope`. Raises UnsupportedModelError for tensors of an unknown
    type, and what GGUFFile raises.
    """
    family = families.KNOWN_ARCHITECTURES[config.architecture]
    stored = read_as_written(path, config.head_dim if family.gguf_interleaves_pairs else None)
    kept = {name: tensor for name, tensor in stored.items() if name not in ROPE_TENSORS}
    kept = kept if config.has_drafting else _without_drafting(path, kept, config.num_layers)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in kept.items():
        ours = canonical_name(name, config.architecture)
        if ours in tensors:
            raise ModelError(f"{path}: two tensors are {ours}, one of them {printable(name)}: the file is damaged")
        tensors[ours] = tensor
    if config.state is not None:
        tensors = from_gguf(path, tensors, config.state, tiles_value_heads=family.gguf_tiles_value_heads)
    if CLASSIFIER in tensors:
        tensors["score.weight"] = _as_one_label(tensors.pop(CLASSIFIER))
    for name, tensor in tensors.items():
        if name.endswith(SHARED_GATE) and len(tensor.shape) == 1:
            tensors[name] = _as_row(tensor)
    return tensors


def _as_row(tensor: StoredTensor) -> StoredTensor:
    """A vector as a matrix of one row."""
    return replace(tensor, shape=(1, *tensor.shape), read=lambda: to_float32(tensor.read())[None])


def _without_drafting(path: Path, tensors: Mapping[str, StoredTensor], num_layers: int) -> dict[str, StoredTensor]:
    """Without the layers after the model's own, which draft tokens (multi-token prediction)."""
    found = {}
    for name, tensor in tensors.items():
        match = LAYER_NUMBER.match(name)
        if match is None or int(match["layer"]) < num_layers:
            found[name] = tensor
    if count := len(tensors) - len(found):
        logger.info("%s: %d tensors not loaded: method mtp of --speculative-config is off", path.name, count)
    return found


def _as_one_label(tensor: StoredTensor) -> StoredTensor:
    """A classifier of yes and no as one of yes: the sigmoid of the rows' difference is the softmax over both."""

    def read() -> HostMatrix:
        rows = to_float32(tensor.read())
        return rows[:1] - rows[1:]

    return replace(tensor, shape=(1, tensor.shape[1]), read=read, format_name="float32")


def read_as_written(path: Path, rotary_dim: int | None = None) -> dict[str, StoredTensor]:
    """All tensors of the file, by llama.cpp's names and in its order of rows. `rotary_dim`: of heads whose rows of q
    and k come in Hugging Face's order instead. Raises as `read_gguf`."""
    tensors, stored = {}, GGUFFile(path).tensors
    for tensor in stored.values():
        if _is_multiplier(tensor.name, stored):
            continue
        if tensor.ggml_type not in KNOWN_TYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {printable(tensor.name)} has type {tensor.ggml_type}, which is not supported; "
                f"known: {', '.join(KNOWN_TYPES)}"
            )
        dim = rotary_dim if tensor.name.endswith(ROTARY_TENSORS) else None
        if dim is not None and _num_rows(tensor) % dim:
            dim = None  # whoever takes the tensor refuses its shape
        read = partial(_read, tensor, dim, _multiplier(path, tensor, stored))
        format_name = DENSE_NAMES.get(tensor.ggml_type, tensor.ggml_type)
        tensors[tensor.name] = StoredTensor(tensor.shape, read, format_name, tensor.data.nbytes)
    return tensors


def canonical_name(gguf_name: str, architecture: str) -> str:
    """Hugging Face's name of llama.cpp's tensor, or the same name if there is none."""
    if match := LAYER_TENSOR.fullmatch(gguf_name):
        names = LAYER_NAMES | dict(families.KNOWN_ARCHITECTURES[architecture].gguf_layer_names)
        layer, part, suffix = match.groups()
        name = names.get(part) if suffix is None else names.get(f"{part}.{suffix}")
        if name is None and part in names and suffix != "scale":
            name = f"{names[part]}.{suffix}"
        if name is not None:
            return f"model.layers.{layer}.{name}"
    if match := EXPERT_TENSOR.fullmatch(gguf_name):
        return "model.layers.{layer}.mlp.experts.{expert}.{module}_proj.weight".format(**match.groupdict())
    if (match := TOP_TENSOR.fullmatch(gguf_name)) and match["part"] in TOP_NAMES:
        return f"{TOP_NAMES[match['part']]}.{match['suffix']}"
    return gguf_name


def _sibling(name: str, suffix: str) -> str:
    return f"{name.rpartition('.')[0]}.{suffix}"


def _is_multiplier(name: str, stored: Mapping[str, GGUFTensor]) -> bool:
    """Whether it is a scale of another tensor: of the whole matrix, which `_read` applies, or of the inputs
    of its product, which are not quantized here."""
    weight = stored.get(_sibling(name, "weight"))
    return name.endswith((".scale", ".input_scale")) and weight is not None and weight.ggml_type == MULTIPLIED_TYPE


def _multiplier(path: Path, weight: GGUFTensor, stored: Mapping[str, GGUFTensor]) -> np.ndarray | None:
    """The scale of a whole matrix, (1,), or of each expert's, (E,), if it has one."""
    tensor = stored.get(_sibling(weight.name, "scale")) if weight.ggml_type == MULTIPLIED_TYPE else None
    if tensor is None:
        return None
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    if tensor.ggml_type != "F32" or tensor.data.size != 4 * count:
        wanted = "one F32" if count == 1 else f"F32 of {count} experts"
        raise UnsupportedModelError(
            f"{path}: tensor {tensor.name} is {tensor.ggml_type} of shape {tensor.shape}; supported is {wanted}"
        )
    return tensor.data.view(np.float32)


def _read(tensor: GGUFTensor, rotary_dim: int | None, multiplier: np.ndarray | None) -> HostMatrix:
    """The values; of quantized experts, the rows of all. `rotary_dim`: of heads whose rows come in Hugging Face's
    order; whole rows of blocks are moved before they are split. `multiplier`: of all values, or of each expert's."""
    raw, num_rows = tensor.data, _num_rows(tensor)
    if len(tensor.shape) == 1 and tensor.ggml_type in QUANTIZED_KINDS:
        values = to_float32(decompose(tensor.ggml_type, raw, (1, num_rows)))[0]
        return values if rotary_dim is None else values[half_order(num_rows, rotary_dim)]
    if rotary_dim is not None:
        raw = raw.reshape(num_rows, -1)[half_order(num_rows, rotary_dim)].reshape(-1)
    if tensor.ggml_type not in QUANTIZED_KINDS:
        return view_dense(raw, tensor.ggml_type, tensor.shape)
    matrix = decompose(tensor.ggml_type, raw, (num_rows, tensor.shape[-1]))
    if multiplier is None:
        return matrix
    factors = np.repeat(multiplier, num_rows // len(multiplier))
    return replace(matrix, scale=replace(matrix.scale, multiplier=factors))


def _num_rows(tensor: GGUFTensor) -> int:
    """Of a matrix or a stack of them; the length of a vector."""
    return math.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.shape[0]


def half_order(num_rows: int, head_dim: int) -> np.ndarray:
    """For each row in Hugging Face's order, its place in llama.cpp's: (num_rows,) indices."""
    return np.arange(num_rows).reshape(num_rows // head_dim, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
