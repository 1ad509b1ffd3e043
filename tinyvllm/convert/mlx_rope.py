"""The rope's keys of a config.json under the names that mlx-lm reads.

transformers 5 has them in `rope_parameters`. Most of mlx-lm's families read only the older `rope_theta`, `rope_scaling`
and `partial_rotary_factor`, and take defaults for what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyvllm.storage.hf_rope import FULL, WINDOWED

MOVED = ("rope_theta", "partial_rotary_factor")


def with_older_keys(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """`config` with the older keys beside `rope_parameters`, which stays; in `text_config` if the model has one."""
    found = dict(config)
    if isinstance(inner := found.get("text_config"), Mapping):
        return found | {"text_config": dict(inner) | _older_keys(inner, architecture)}
    return found | _older_keys(found, architecture)


def _older_keys(text: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = text.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    if FULL in rope or WINDOWED in rope:
        return _of_two_ropes(text, rope, architecture)
    return _of_one_rope(text, rope, text.get("rope_scaling") or rope)


def _of_one_rope(text: Mapping[str, Any], rope: Mapping[str, Any], effective: Mapping[str, Any]) -> dict[str, Any]:
    """`effective`: what decides where the file has both, as in storage/hf_rope.py and transformers."""
    found = {key: effective[key] for key in MOVED if effective.get(key) is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not text.get("rope_scaling") and kind != "default":
        found["rope_scaling"] = dict(rope) | {"rope_type": kind, "type": kind}  # mlx-lm's Phi-3 reads `type`
        if kind == "longrope" and (original := rope.get("original_max_position_embeddings")) is not None:
            found["original_max_position_embeddings"] = original
    return found


def _of_two_ropes(text: Mapping[str, Any], rope: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Gemma 3's, and OLMo 3's if both have the same theta: mlx-lm has no other there. Nothing for others."""
    full, windowed = (rope.get(kind) or {} for kind in (FULL, WINDOWED))
    found = _of_one_rope(text, full, full | (text.get("rope_scaling") or {}))
    if architecture == "gemma3":
        return found | ({"rope_local_base_freq": windowed["rope_theta"]} if "rope_theta" in windowed else {})
    is_sayable = architecture == "olmo3" and full.get("rope_theta") == windowed.get("rope_theta")
    return found if is_sayable else {}
