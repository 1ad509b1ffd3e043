"""Tiny seeded models of each family, with every feature of it. A new family is one file here, and one line."""

from __future__ import annotations

from tests.families.recipe import Recipe
from tests.families.recipes import gemma2, gemma3, gemma4, mistral, qwen2

RECIPES: dict[str, Recipe] = {
    name: recipe for family in (qwen2, gemma2, gemma3, gemma4, mistral) for name, recipe in family.RECIPES.items()
}
