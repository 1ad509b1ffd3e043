"""`think`: whether a model that reasons does so, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError
from tinyvllm.server.conversation import Formats
from tinyvllm.server.openai.protocol.common import effort_arguments

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine


def template_arguments(engine: AsyncEngine, think: bool | str | None, model: str) -> dict[str, Any]:
    """The template's variables. As in Ollama, a model that can reason does, unless the request says otherwise.

    Raises RequestError if the request wants reasoning and the model has none."""
    can_think = engine.chat_template is not None and (
        Formats.find(engine.config, engine.chat_template.source).reasoning is not None
    )
    if not can_think:
        if think:
            raise RequestError(f'"{model}" does not support thinking: leave think out, or send false', param="think")
        return {}
    if think is False:
        return effort_arguments("none") | {"thinking": False}
    effort = "high" if think == "max" else think if isinstance(think, str) else None
    return effort_arguments(effort) | {"enable_thinking": True, "thinking": True}
