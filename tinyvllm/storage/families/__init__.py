"""What the files of each family's models say: a new family is one file here, and one line in the table."""

from __future__ import annotations

from tinyvllm.storage.families import (
    deepseek,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    glm4_moe_lite,
    gpt_oss,
    granite,
    lfm2,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    smollm3,
)
from tinyvllm.storage.families.family import SOFTCAPS, FamilyFiles

# By the registry's key (model/registry.py)
KNOWN_ARCHITECTURES: dict[str, FamilyFiles] = {
    "llama": llama.FILES,
    "mistral": mistral.FILES,
    "ministral": ministral.FILES,
    "ministral3": ministral3.FILES,
    "qwen2": qwen2.FILES,
    "qwen3": qwen3.FILES,
    "lfm2": lfm2.FILES,
    "qwen3_5": qwen3_5.FILES,
    "qwen3_5_moe": qwen3_5_moe.FILES,
    "qwen3_next": qwen3_next.FILES,
    "gemma2": gemma2.FILES,
    "gemma3": gemma3.FILES,
    "gemma4": gemma4.FILES,
    "gemma4_unified": gemma4.UNIFIED_FILES,
    "phi3": phi3.FILES,
    "smollm3": smollm3.FILES,
    "olmo2": olmo2.FILES,
    "olmo3": olmo3.FILES,
    "granite": granite.FILES,
    "glm": glm.FILES,
    "glm4": glm4.FILES,
    "glm4_moe_lite": glm4_moe_lite.FILES,
    "deepseek_v2": deepseek.V2_FILES,
    "deepseek_v3": deepseek.V3_FILES,
    "qwen3_moe": qwen3_moe.FILES,
    "mixtral": mixtral.FILES,
    "olmoe": olmoe.FILES,
    "gpt_oss": gpt_oss.FILES,
}

__all__ = ["KNOWN_ARCHITECTURES", "SOFTCAPS", "FamilyFiles"]
