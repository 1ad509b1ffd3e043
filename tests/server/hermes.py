"""Models of the Hermes family in tests: a template that marks them, and what they write to call a tool."""

from __future__ import annotations

from typing import Any

from tests.server.fake_engine import FakeEngine, TagTemplate

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THINKING = "{{ '<think>' }} {{ '</think>' }} {{ tools }} <tool_call>"  # a template of a model that reasons


def hermes(reply: str, **settings: Any) -> FakeEngine:
    """An engine whose template has the marks of Hermes's tool calls."""
    return FakeEngine(reply=reply, chat_template=TagTemplate("{{ tools }} <tool_call>"), **settings)
