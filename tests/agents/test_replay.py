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

from tests.agents.recorder import Request
from tests.agents.recordings import DATA, load
from tests.agents.scripted_engine import ScriptedEngine, call, make_scripted_engine
from tests.server.client import client_of

Event = dict[str, Any]
FILES = sorted(DATA.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_recorded_requests_are_answered(file: Path) -> None:
    for number, request in enumerate(load(file).requests):
        for reply in replies_to(request):
            engine = make_scripted_engine(reply)
            async with client_of(engine) as client:
                headers = {name: value for name, value in request.headers.items() if name != "content-encoding"}
                response = await client.request(
                    request.method, request.path, headers=headers, content=json.dumps(request.body)
                )
            where = f"{file.name}, request {number}"
            assert response.status_code == 200, f"{where}: {response.text}"
            if request.body is not None and request.body.get("stream"):
                assert response.headers["content-type"].startswith("text/event-stream"), where
                check_stream(request.path, list(read_events(response.text)), engine, reply)
            elif request.body is not None:
                response.json()


def replies_to(request: Request) -> list[str]:
    """An answer in text, and a call of each kind of tool that the request has."""
    replies = ["All right."]
    names = [name for name in tool_names(request.body) if name is not None]
    return replies + [f"Wait.\n{call(names[0], path='a.txt')}" for _ in names[:1]]


def tool_names(body: Any) -> list[str | None]:
    tools = (body or {}).get("tools") or []
    return [tool.get("name") or tool.get("function", {}).get("name") for tool in tools]


def read_events(text: str) -> Iterator[tuple[str | None, Any]]:
    """The name and the data of each server-sent event; comments are left out."""
    assert text.endswith("\n\n")
    for frame in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
        if not fields:
            continue
        assert fields.keys() <= {"event", "data"}, frame
        data = fields["data"]
        yield fields.get("event"), data if data == "[DONE]" else json.loads(data)


def check_stream(path: str, events: list[tuple[str | None, Any]], engine: ScriptedEngine, reply: str) -> None:
    route = path.partition("?")[0]
    CHECKS[route](events, "<tool_call>" in reply)
    assert len(engine.prompts) == 1


def check_chat(events: list[tuple[str | None, Any]], is_call: bool) -> None:
    assert events[-1] == (None, "[DONE]")
    choices = [choice for _, event in events[:-1] for choice in event["choices"]]
    finish = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
    assert finish == ["tool_calls" if is_call else "stop"]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text.strip() == ("Wait." if is_call else "All right.")


def check_responses(events: list[tuple[str | None, Any]], is_call: bool) -> None:
    """Codex reads the events of items; their numbers are without a gap."""
    for number, (name, event) in enumerate(events):
        assert (name, number) == (event["type"], event["sequence_number"])
    assert events[0][0] == "response.created" and events[-1][0] == "response.completed"
    added = [event["item"]["type"] for name, event in events if name == "response.output_item.added"]
    done = [event["item"]["type"] for name, event in events if name == "response.output_item.done"]
    assert added == done == [item["type"] for item in events[-1][1]["response"]["output"]]
    assert done == (["message", "function_call"] if is_call else ["message"])


def check_messages(events: list[tuple[str | None, Any]], is_call: bool) -> None:
    """Blocks open and close one after the other, and the stop reason says whether there is a call."""
    assert all(name == event["type"] for name, event in events)
    names = [str(name) for name, _ in events if name != "ping"]
    order = re.sub(r"(content_block_delta )+", "deltas ", " ".join(names) + " ")
    block = "content_block_start (deltas )?content_block_stop "
    assert re.fullmatch(f"message_start ({block})+message_delta message_stop ", order), order
    [end] = [event for name, event in events if name == "message_delta"]
    assert end["delta"]["stop_reason"] == ("tool_use" if is_call else "end_turn")
    kinds = [event["content_block"]["type"] for name, event in events if name == "content_block_start"]
    assert kinds == (["text", "tool_use"] if is_call else ["text"])


CHECKS: dict[str, Callable[[list[tuple[str | None, Any]], bool], None]] = {
    "/v1/chat/completions": check_chat,
    "/v1/responses": check_responses,
    "/v1/messages": check_messages,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recordings_name_no_machine_and_no_moment(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert not re.search(r"/(home/(?!user)|root|Users|tmp|var)/", text)
    assert not re.search(r"(?i)api[-_]key|authorization|bearer", text)
    bodies = json.dumps([request["body"] for request in json.loads(text)["requests"]])
    assert set(re.findall(r"20\d\d-\d\d-\d\d", bodies)) <= {"2026-01-01"}
