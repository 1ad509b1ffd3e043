"""Fake models whose template and tool calls are in the Hermes format."""

from __future__ import annotations

from typing import Any

from tests.server.fake_engine import FakeEngine, TagTemplate

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THINKING = "{{ '<think>' }} {{ '</think>' }} {{ tools }} <tool_call>"  # the template of a reasoning model


def hermes(reply: str, **settings: Any) -> FakeEngine:
    """An engine that replies `reply` and whose template is recognized as Hermes's."""
    return FakeEngine(reply=reply, chat_template=TagTemplate("{{ tools }} <tool_call>"), **settings)
