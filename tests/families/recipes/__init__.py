"""Tiny seeded models of each family, with every feature of it. A new family is one file here, and one line."""

from __future__ import annotations

from tests.families.recipe import Recipe
from tests.families.recipes import (
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe_lite,
    gpt_oss,
    granite,
    lfm2,
    mistral,
    mixtral,
    olmo,
    olmoe,
    phi3,
    qwen2,
    qwen3_5,
    qwen3_moe,
    smollm3,
)

DENSE = (qwen2, gemma2, gemma3, gemma4, mistral, phi3, smollm3, olmo, granite, glm4)
SPARSE = (qwen3_moe, mixtral, olmoe, gpt_oss, glm4_moe_lite)
HYBRID = (qwen3_5, lfm2)
MODULES = (*DENSE, *SPARSE, *HYBRID)

RECIPES: dict[str, Recipe] = {name: recipe for family in MODULES for name, recipe in family.RECIPES.items()}
