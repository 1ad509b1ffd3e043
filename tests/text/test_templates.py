"""The adapter and the templates of real models: `bash scripts/fetch_tokenizers.sh && pytest -m tokenizers`.

Expected: data/template_reference.json (prompts of transformers) and data/template_abilities.json.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.text.template_chats import CONTINUED, TEXT, TOOL, all_chats, date, said, texts_of, user
from tests.text.write_template_abilities import OUTPUT as ABILITIES
from tests.text.write_template_abilities import deviations, load_templates
from tests.text.write_template_reference import OUTPUT as REFERENCE
from tests.text.write_template_reference import digest
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.continuation import cut_at_mark, mark_end
from tinyvllm.text.template_adapter import adapt
from tinyvllm.text.tools import find_tool_format
from tinyvllm.text.tools.base import Tool

pytestmark = pytest.mark.tokenizers

RECORDED: dict[str, Any] = json.loads(ABILITIES.read_text(encoding="utf-8"))
PROMPTS: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))

# Templates of which no probe is rendered: it needs variables of its own.
UNKNOWN = {"fireworks-ai-llama-3-firefunction-v2"}
KNOWN = sorted(set(RECORDED) - UNKNOWN)


def template_of(name: str) -> ChatTemplate:
    if name not in load_templates():
        pytest.fail("there are no templates: run `bash scripts/fetch_tokenizers.sh`", pytrace=False)
    return load_templates()[name]


def prepared(template: ChatTemplate, chat: list[dict[str, Any]], has_tools: bool) -> list[Any]:
    """As server/conversation.py prepares messages."""
    function = TOOL["function"]
    tools = [Tool(function["name"], function["description"], function["parameters"])] if has_tools else []
    return find_tool_format(None, template.source).prepare(chat, tools, has_template=template.renders_tools())


def render(template: ChatTemplate, chat: list[Any], has_tools: bool = False) -> str:
    tools: Any = [TOOL] if has_tools else None
    format = find_tool_format(None, template.source)
    return template.render(chat, tools=tools, add_generation_prompt=False, tool_format=format, strftime_now=date)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_what_is_found_out_is_what_was_recorded(name: str) -> None:
    template = template_of(name)
    start = time.thread_time()
    for kind, found in RECORDED[name].items():
        assert deviations(template, has_tools=kind == "tools") == found
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("name", KNOWN)
def test_every_conversation_is_rendered_with_every_text_in_its_place(name: str) -> None:
    template = template_of(name)
    for chat_name, chat, has_tools in all_chats():
        abilities = template.abilities(has_tools=has_tools)
        text = render(template, prepared(template, chat, has_tools), has_tools)
        assert not has_tools or "get_weather" in text, chat_name
        found, wanted = TEXT.findall(text), list(texts_of(chat))
        lost = [one for one in wanted if one not in found]
        # templates leave out reasoning and text beside calls
        assert all(one.startswith("Tht") for one in lost) or (
            abilities.text_with_calls in ("no", "hides") and chat_name.startswith("text and call")
        ), f"{chat_name}: {lost} of {wanted}"
        assert len(found) == len(set(found)), f"{chat_name}: {found}"
        moves_systems = abilities.system == "last user" or any(one.startswith("Sys") for one in found[:2])
        kept = [one for one in wanted if one not in lost]
        if moves_systems:
            kept, found = ([one for one in texts if not one.startswith("Sys")] for texts in (kept, found))
        moves_results = not abilities.parallel_calls or name.startswith(("google-gemma-4", "Kimi-K3"))
        assert (sorted(found) == sorted(kept)) if moves_results else (found == kept), chat_name


@pytest.mark.parametrize("name", KNOWN)
def test_prompts_are_those_of_transformers_where_nothing_is_changed(name: str) -> None:
    template, prompts = template_of(name), PROMPTS[name]["prompts"]
    num_compared = 0
    for chat_name, chat, has_tools in all_chats():
        messages = prepared(template, chat, has_tools)
        if chat_name not in prompts or messages != chat:
            continue
        if "gpt-oss" in name and any(message["role"] == "tool" for message in chat):
            continue  # results are written as by OpenAI's own library: text/tools/harmony.py
        if not adapt(messages, template.abilities(has_tools=has_tools), dict)[1]:
            assert digest(render(template, messages, has_tools)) == prompts[chat_name], chat_name
            num_compared += 1
    assert num_compared >= 3


@pytest.mark.parametrize("name", KNOWN)
def test_continued_prompts_are_those_of_transformers(name: str) -> None:
    template, prompts = template_of(name), PROMPTS[name]["prompts"]
    for content in CONTINUED:
        chat = [user("Usr0"), said(content)]
        text = cut_at_mark(render(template, mark_end(chat)), chat)
        assert text.rstrip().endswith(content.strip())
        if f"continued: {content}" in prompts:
            assert digest(text) == prompts[f"continued: {content}"], content
