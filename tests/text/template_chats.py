"""Conversations as clients send them, each text of which can be found in a prompt. Without imports of the package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]

TEXT = re.compile(r"(?:Sys|Usr|Ans|Cty|Res|Tht)\d")  # a kind and its place in the conversation
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS},
}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str, *calls: Message, **others: Any) -> Message:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **others}


def call(index: int, arguments: Any) -> Message:
    function = {"name": "get_weather", "arguments": {"city": arguments} if isinstance(arguments, str) else arguments}
    return {"id": f"call_abcdefghijklmnopqr{index}", "type": "function", "function": function}


def malformed(index: int, text: str) -> Message:
    return {**call(index, {}), "function": {"name": "get_weather", "arguments": text}}


def result(index: int, text: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call_abcdefghijklmnopqr{index}", "content": text}


CHATS: dict[str, list[Message]] = {
    "plain": [system("Sys0"), user("Usr1"), said("Ans2"), user("Usr3")],
    "system later": [user("Usr0"), said("Ans1"), system("Sys2"), user("Usr3")],
    "system last": [system("Sys0"), user("Usr1"), system("Sys2")],
    "two systems": [system("Sys0"), system("Sys1"), user("Usr2")],
    "system alone": [system("Sys0")],
    "consecutive": [user("Usr0"), user("Usr1"), said("Ans2"), said("Ans3"), user("Usr4")],
    "assistant first": [said("Ans0"), user("Usr1")],
    "system, assistant first": [system("Sys0"), said("Ans1"), user("Usr2")],
    "assistant last": [user("Usr0"), said("Ans1")],
    "empty answer": [user("Usr0"), said(""), user("Usr2")],
    "empty question": [user("Usr0"), said("Ans1"), user("")],
    "reasoning": [user("Usr0"), said("Ans2", reasoning_content="Tht1"), user("Usr3")],
}
LOOPS: dict[str, list[Message]] = {
    "ended": [
        system("Sys0"), user("Usr1"), said("", call(0, "Cty2"), call(1, "Cty3")), result(0, "Res4"), result(1, "Res5"),
        said("Ans6"), user("Usr7"),
    ],
    "open": [system("Sys0"), user("Usr1"), said("", call(0, "Cty2")), result(0, "Res3")],
    "twice": [
        user("Usr0"), said("", call(0, "Cty1")), result(0, "Res2"), said("", call(1, "Cty3")), result(1, "Res4"),
        said("Ans5"), user("Usr6"),
    ],
    "user after result": [
        system("Sys0"), user("Usr1"), said("", call(0, "Cty2")), result(0, "Res3"), user("Usr4"), said("Ans5"),
        user("Usr6"),
    ],
    "system after result": [system("Sys0"), user("Usr1"), said("", call(0, "Cty2")), result(0, "Res3"), system("Sys4")],
    "text and call": [user("Usr0"), said("Ans1", call(0, "Cty2")), result(0, "Res3")],
    "reasoning and call": [user("Usr0"), said("", call(0, "Cty2"), reasoning_content="Tht1"), result(0, "Res3")],
    "malformed arguments": [user("Usr0"), said("", malformed(0, "Cty1{")), result(0, "Res2")],
    "no arguments": [user("Usr0"), said("", call(0, {})), result(0, "Res1")],
    "empty result": [user("Usr0"), said("", call(0, "Cty1")), result(0, ""), said("Ans2"), user("Usr3")],
    "call without result": [user("Usr0"), said("", call(0, "Cty1")), user("Usr2")],
    "result without call": [user("Usr0"), result(0, "Res1"), said("Ans2"), user("Usr3")],
    "consecutive calls": [
        user("Usr0"), said("", call(0, "Cty1")), said("", call(1, "Cty2")), result(0, "Res3"), result(1, "Res4"),
    ],
    "results out of order": [
        user("Usr0"), said("", call(0, "Cty1"), call(1, "Cty2")), result(1, "Res3"), result(0, "Res4"), user("Usr5"),
    ],
    "JSON result": [user("Usr0"), said("", call(0, "Cty1")), result(0, '{"t": "Res2"}')],
}  # fmt: skip
# the last message's content, after which the prompt must end
CONTINUED = ("i", "<", "end", "|", "assistant", " a b ")


def texts_of(chat: list[Message]) -> Iterator[str]:
    """The texts in their order: reasoning, content, arguments."""
    for message in chat:
        yield from TEXT.findall(message.get("reasoning_content") or "")
        yield from TEXT.findall(message["content"] or "")
        for one in message.get("tool_calls", ()):
            yield from TEXT.findall(str(one["function"]["arguments"]))


def all_chats() -> Iterator[tuple[str, list[Message], bool]]:
    """(name, messages, has_tools)"""
    for name, chat in (CHATS | LOOPS).items():
        for has_tools in (False, True):
            yield f"{name}{', with tools' if has_tools else ''}", chat, has_tools


def read_sources(models: Path) -> dict[str, str]:
    """The templates that scripts/fetch_tokenizers.sh has put into this directory, by model."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (models / "templates").glob("*.jinja")}
    for path in (models / "tokenizers").glob("*/tokenizer_config.json"):
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            sources[path.parent.name] = template
    return dict(sorted(sources.items()))


def date(date_format: str) -> str:
    """Replaces `strftime_now` of templates."""
    return "01 Jan 2026" if "%b" in date_format else "2026-01-01"
