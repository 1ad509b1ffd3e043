"""The names by which requests may call a model."""

from __future__ import annotations

from collections.abc import Collection


def is_name_of(name: str, known: Collection[str]) -> bool:
    """Whether `name` is a known one, or one with the tag that Ollama's clients add to names without a tag."""
    return name in known or name.removesuffix(":latest") in known
