"""What agents and clients sent, sent again: each recorded request gets 200 and a whole, well-formed stream.

The tests of an agent write its file in data/, with TINYVLLM_RECORD_AGENTS=1: see recordings.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agents.recordings import DATA, load
from tests.agents.scripted_engine import call, make_scripted_engine
from tests.server.client import client_of

Event = tuple[str | None, Any]  # its name and its data
FILES = sorted(DATA.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_recorded_requests_are_answered(file: Path) -> None:
    for number, request in enumerate(load(file).requests):
        body = request.body or {}
        for reply, kinds in replies_to(body):
            engine = make_scripted_engine(reply)
            async with client_of(engine, model_aliases=(body.get("model", "tiny"),)) as client:
                headers = {name: value for name, value in request.headers.items() if name != "content-encoding"}
                response = await client.request(
                    request.method, request.path, headers=headers, content=json.dumps(request.body)
                )
            where = f"{file.name}, request {number}"
            assert response.status_code == 200, f"{where}: {response.text}"
            if body.get("stream"):
                path = request.path.partition("?")[0]
                is_ollama = path.startswith("/api/")
                media_type = "application/x-ndjson" if is_ollama else "text/event-stream"
                assert response.headers["content-type"].startswith(media_type), where
                CHECKS[path](list((read_lines if is_ollama else read_events)(response.text)), kinds)
                assert len(engine.prompts) == (path != "/api/pull")
            elif body:
                response.json()


def replies_to(body: Any) -> Iterator[tuple[str, list[str]]]:
    """Replies, and the kinds of what they have: a text, and after a text a call of each kind of tool in the request."""
    yield "All right.", ["text"]
    tools = {tool.get("type", "function"): tool for tool in reversed(body.get("tools") or [])}
    for kind in ("function", "custom"):
        if kind in tools:
            name = tools[kind].get("name") or tools[kind]["function"]["name"]
            yield f"Wait.\n{call(name, input='a')}", ["text", kind]


def read_events(text: str) -> Iterator[Event]:
    """The name and the data of each server-sent event; comments are left out."""
    assert text.endswith("\n\n")
    for frame in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
        if not fields:
            continue
        assert fields.keys() <= {"event", "data"}, frame
        data = fields["data"]
        yield fields.get("event"), data if data == "[DONE]" else json.loads(data)


def read_lines(text: str) -> Iterator[Event]:
    """Each line of an NDJSON stream, as an event without a name."""
    for line in text.splitlines():
        yield None, json.loads(line)


def check_ollama(events: list[Event], kinds: list[str]) -> None:
    assert [event["done"] for _, event in events] == [False] * (len(events) - 1) + [True]
    text = "".join(event["message"]["content"] for _, event in events)
    assert text.strip() == ("All right." if kinds == ["text"] else "Wait.")
    calls = [call for _, event in events for call in event["message"].get("tool_calls", ())]
    assert len(calls) == len(kinds) - 1


def check_chat(events: list[Event], kinds: list[str]) -> None:
    assert events[-1] == (None, "[DONE]")
    choices = [choice for _, event in events[:-1] for choice in event["choices"]]
    finish = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
    assert finish == ["stop" if kinds == ["text"] else "tool_calls"]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text.strip() == ("All right." if kinds == ["text"] else "Wait.")


def check_responses(events: list[Event], kinds: list[str]) -> None:
    """Codex reads the events of items; their numbers are without a gap."""
    for number, (name, event) in enumerate(events):
        assert (name, number) == (event["type"], event["sequence_number"])
    assert events[0][0] == "response.created" and events[-1][0] == "response.completed"
    added = [event["item"]["type"] for name, event in events if name == "response.output_item.added"]
    done = [event["item"]["type"] for name, event in events if name == "response.output_item.done"]
    assert added == done == [item["type"] for item in events[-1][1]["response"]["output"]]
    names = {"text": "message", "function": "function_call", "custom": "custom_tool_call"}
    assert done == [names[kind] for kind in kinds]


def check_messages(events: list[Event], kinds: list[str]) -> None:
    """Blocks open and close one after the other, and the stop reason says whether there is a call."""
    assert all(name == event["type"] for name, event in events)
    names = [str(name) for name, _ in events if name != "ping"]
    order = re.sub(r"(content_block_delta )+", "deltas ", " ".join(names) + " ")
    block = "content_block_start (deltas )?content_block_stop "
    assert re.fullmatch(f"message_start ({block})+message_delta message_stop ", order), order
    [end] = [event for name, event in events if name == "message_delta"]
    assert end["delta"]["stop_reason"] == ("end_turn" if kinds == ["text"] else "tool_use")
    opened = [event["content_block"]["type"] for name, event in events if name == "content_block_start"]
    assert opened == [{"text": "text", "function": "tool_use"}[kind] for kind in kinds]


def check_pull(events: list[Event], kinds: list[str]) -> None:
    assert events[-1][1] == {"status": "success"}


CHECKS: dict[str, Callable[[list[Event], list[str]], None]] = {
    "/api/chat": check_ollama,
    "/v1/chat/completions": check_chat,
    "/v1/responses": check_responses,
    "/v1/messages": check_messages,
    "/api/pull": check_pull,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recordings_name_no_machine_and_no_moment(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert not re.search(r"/(home/(?!user)|root|Users|tmp|var)/", text)
    assert not re.search(r"(?i)api[-_]key|authorization|bearer", text)
    bodies = json.dumps([request["body"] for request in json.loads(text)["requests"]])
    assert set(re.findall(r"20\d\d-\d\d-\d\d", bodies)) <= {"2026-01-01"}
