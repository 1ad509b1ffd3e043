"""Which tensor of a GGUF file gets which type: the rules of llama.cpp's llama-quantize without an importance matrix.

https://github.com/ggml-org/llama.cpp/blob/007dbbf3fd17eefe9b47fee45f48f7ba5e62b714/src/llama-quant.cpp
(llama_tensor_get_type_impl, tensor_allows_quantization, tensor_type_fallback)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

# For rows that are not whole blocks; then float16
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
KEPT_PARTS = ("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj")
CONVOLUTIONS = ("ssm_conv1d.weight", "shortconv.conv.weight")  # which ggml reads in float32 only
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
LAYERS_OF_70B = 80  # of llama: its attn_v are small beside the rest


@dataclass(frozen=True)
class Mixture:
    """A file type of llama.cpp: the type of most matrices, and rules for others. `size` is S or M, or empty."""

    base: str
    file_type: LlamaFileType
    size: str = ""

    @property
    def is_dense(self) -> bool:
        return self.base in ("F32", "F16", "BF16")


MIXTURES = {
    "f32": Mixture("F32", LlamaFileType.ALL_F32),
    "f16": Mixture("F16", LlamaFileType.MOSTLY_F16),
    "bf16": Mixture("BF16", LlamaFileType.MOSTLY_BF16),
    "q4_0": Mixture("Q4_0", LlamaFileType.MOSTLY_Q4_0),
    "q4_1": Mixture("Q4_1", LlamaFileType.MOSTLY_Q4_1),
    "q5_0": Mixture("Q5_0", LlamaFileType.MOSTLY_Q5_0),
    "q5_1": Mixture("Q5_1", LlamaFileType.MOSTLY_Q5_1),
    "q8_0": Mixture("Q8_0", LlamaFileType.MOSTLY_Q8_0),
    "iq4_nl": Mixture("IQ4_NL", LlamaFileType.MOSTLY_IQ4_NL),
    "q4_k": Mixture("Q4_K", LlamaFileType.MOSTLY_Q4_K_S),
    "q4_k_s": Mixture("Q4_K", LlamaFileType.MOSTLY_Q4_K_S, "S"),
    "q4_k_m": Mixture("Q4_K", LlamaFileType.MOSTLY_Q4_K_M, "M"),
    "q5_k": Mixture("Q5_K", LlamaFileType.MOSTLY_Q5_K_S),
    "q5_k_s": Mixture("Q5_K", LlamaFileType.MOSTLY_Q5_K_S, "S"),
    "q5_k_m": Mixture("Q5_K", LlamaFileType.MOSTLY_Q5_K_M, "M"),
    "q6_k": Mixture("Q6_K", LlamaFileType.MOSTLY_Q6_K),
}


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model."""

    architecture: str  # general.architecture
    num_layers: int
    num_heads: int
    num_kv_heads: int
    has_head: bool  # output.weight; else the embeddings are the head, too

    @property
    def queries_per_key(self) -> int:
        return self.num_heads // self.num_kv_heads


def choose_type(name: str, shape: tuple[int, ...], mixture: Mixture, facts: ModelFacts, dense: str) -> str:
    """The ggml type of a tensor of that name and shape, rows first. `dense`: of matrices that llama-quantize leaves as
    they are."""
    if len(shape) < 2 or name.endswith(CONVOLUTIONS):
        return "F32"
    if not is_quantizable(name):
        return mixture.base if mixture.is_dense else dense
    if mixture.is_dense:
        return mixture.base
    return _fitting(_wanted(name, mixture, facts), shape[-1])


def is_quantizable(name: str) -> bool:
    """Whether llama-quantize touches a matrix of that name."""
    return name.endswith("weight") and not any(part in name for part in KEPT_PARTS)


def _fitting(ggml_type: str, columns: int) -> str:
    """The type, or what takes its place where the columns are not whole blocks."""
    for candidate in (ggml_type, FALLBACKS.get(ggml_type, ggml_type)):
        if columns % GGML_QUANT_SIZES[GGMLQuantizationType[candidate]][0] == 0:
            return candidate
    return "F16"


def _wanted(name: str, mixture: Mixture, facts: ModelFacts) -> str:
    base = mixture.base
    if name == "output.weight" or (name == "token_embd.weight" and not facts.has_head):
        return "Q8_0" if base == "Q8_0" else "Q6_K"
    found = LAYER.fullmatch(name)
    if found is None:
        return base
    layer, part = int(found[1]), found[2]
    if part == "attn_v":
        return _of_attn_v(layer, mixture, facts)
    if part in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        return _of_ffn_down(layer, mixture, facts)
    if part == "attn_qkv" and mixture.size == "M":
        return "Q5_K" if base == "Q4_K" else "Q6_K"
    return base


def _of_attn_v(layer: int, mixture: Mixture, facts: ModelFacts) -> str:
    chosen = mixture.base
    if mixture.base == "IQ4_NL" and facts.queries_per_key >= 4:
        chosen = "Q5_K"
    elif mixture.size == "M" and _gets_more_bits(layer, facts.num_layers):
        chosen = "Q6_K"
    elif mixture.size == "S" and mixture.base == "Q4_K" and layer < 4:
        chosen = "Q5_K"
    if facts.architecture == "llama" and facts.num_layers == LAYERS_OF_70B and chosen == "Q4_K":
        return "Q5_K"
    return chosen


def _of_ffn_down(layer: int, mixture: Mixture, facts: ModelFacts) -> str:
    is_early = layer < facts.num_layers // 8
    if mixture.size == "M" and _gets_more_bits(layer, facts.num_layers):
        return "Q6_K"
    if is_early and (mixture.base == "IQ4_NL" or (mixture.size == "S" and mixture.base == "Q4_K")):
        return "Q5_K"
    return mixture.base


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third of the others (use_more_bits)."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
