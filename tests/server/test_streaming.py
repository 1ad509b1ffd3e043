"""A streamed token's path: the bytes of its event, what it costs in objects, and readers that are late."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.types import Message

from tests.patience import jump_over_waits
from tests.server.client import CHAT
from tests.server.fake_engine import TIMING, FakeEngine
from tinyvllm.config import SamplingParams
from tinyvllm.engine.output import Delta
from tinyvllm.server.app import make_app
from tinyvllm.server.events import frame, json_string
from tinyvllm.server.generation import Item
from tinyvllm.server.intake import Heading
from tinyvllm.server.message import OutputFormat
from tinyvllm.server.openai import response_events
from tinyvllm.server.openai.chat_answers import ChatEvents
from tinyvllm.server.openai.completion_answers import CompletionEvents, CompletionForm, Echo
from tinyvllm.server.openai.protocol.chat import ChatChunk, ChatChunkChoice, ChatDelta
from tinyvllm.server.openai.protocol.completions import Completion, CompletionChoice
from tinyvllm.server.openai.protocol.responses import ReasoningSettings, ResponseAnswer, TextSettings
from tinyvllm.server.openai.response_events import ResponseWriter, frame_event
from tinyvllm.server.settings import ServerSettings

HEADING = Heading(id="cmpl-1", created=1_700_000_000, model='a "model" — %s {}')
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def make_delta(text: str, index: int = 0, num_tokens: int = 1, finish_reason: str | None = None) -> Delta:
    return Delta(
        index=index,
        text=text,
        token_ids=(1,),
        finish_reason=finish_reason,
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=num_tokens,
        timing=None if finish_reason is None else TIMING,
    )


# ---- Bytes ----


def test_a_string_is_the_same_bytes_as_pydantics_for_every_character() -> None:
    class Model(BaseModel):
        text: str

    text = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert Model(text=text).model_dump_json().encode() == b'{"text":' + json_string(text) + b"}"
    assert json.loads(json_string(text)) == text
    for encode in (json_string, lambda text: Model(text=text).model_dump_json()):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            encode("a\ud800")


@given(text=TEXTS, include_usage=st.booleans(), choice=st.integers(0, 2))
def test_a_texts_event_in_a_chat_is_what_the_model_writes(text: str, include_usage: bool, choice: int) -> None:
    events = ChatEvents(HEADING, OutputFormat(), n=3, include_usage=include_usage)
    choices = [ChatChunkChoice(index=choice, delta=ChatDelta(content=text))]
    chunk = ChatChunk(id=HEADING.id, created=HEADING.created, model=HEADING.model, choices=choices)
    expected = frame(chunk, omit=None if include_usage else {"usage"})
    item = Item(0, choice, make_delta(text, choice))
    assert [events.take(item), events.take(item)] == [expected] * 2  # the first is the model's


@given(text=TEXTS, include_usage=st.booleans(), choice=st.integers(0, 2))
def test_a_texts_event_in_a_completion_is_what_the_model_writes(text: str, include_usage: bool, choice: int) -> None:
    events = CompletionEvents(HEADING, CompletionForm(n=3, echoes=[Echo()]), include_usage=include_usage)
    choices = [CompletionChoice(index=choice, text=text)]
    chunk = Completion(id=HEADING.id, created=HEADING.created, model=HEADING.model, choices=choices)
    expected = frame(chunk, omit=None if include_usage else {"usage"})
    item = Item(0, choice, make_delta(text, choice))
    assert [events.take(item), events.take(item)] == [expected] * 2


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_a_texts_event_in_a_response_is_what_the_writer_makes(texts: list[str]) -> None:
    writer = ResponseWriter(make_response(), OutputFormat())
    assert writer.frame_text(make_delta("a")) is None  # no message is open yet
    list(writer.push(make_delta("a")))
    other = copy.deepcopy(writer)
    for text in texts:
        (event,) = other.push(make_delta(text))
        assert writer.frame_text(make_delta(text)) == frame_event(event)
    last = make_delta("z", finish_reason="stop")
    assert writer.frame_text(last) is None
    with mock.patch.object(response_events, "time", mock.Mock(time=lambda: 2.0)):  # the last event has the second
        assert [*map(frame_event, writer.push(last))] == [*map(frame_event, other.push(last))]
    assert writer.answer.output[0].content[0].text == "".join(["a", *texts, "z"])  # type: ignore[union-attr]


def make_response() -> ResponseAnswer:
    return ResponseAnswer(
        id="resp_1", created_at=1, status="in_progress", instructions=None, max_output_tokens=None, model="tiny",
        output=[], parallel_tool_calls=True, previous_response_id=None, reasoning=ReasoningSettings(), store=False,
        temperature=1.0, text=TextSettings(), tool_choice="auto", tools=[], top_logprobs=0, top_p=1.0, metadata={},
    )  # fmt: skip


# ---- A request to the app, whose deltas and reader the test drives ----


class HandEngine(FakeEngine):
    """An engine whose only call gets its deltas from the test."""

    receiver: Any = None
    num_closed = 0

    async def submit(self, prompt_ids: list[int], params: SamplingParams, receiver: Any, **options: Any) -> Any:
        self.receiver = receiver
        return self

    def close(self) -> None:
        self.num_closed += 1


class Exchange:
    """One POST request to the app. The client reads as long as `may_read` is set."""

    def __init__(self, engine: HandEngine, path: str, body: dict[str, Any], **settings: Any) -> None:
        self.engine = engine
        self.sent: list[bytes] = []
        self.may_read, self.has_left = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        self._body: bytes | None = json.dumps({**body, "stream": True}).encode()
        app = make_app(engine, ServerSettings(**settings))  # type: ignore[arg-type]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": None,
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self.may_read.is_set():
            await self.may_read.wait()
        self.sent.append(message.get("body", b""))

    async def begin(self, *deltas: Delta) -> None:
        """Wait for the call and send its first deltas; then wait until they have been written."""
        while self.engine.receiver is None:
            await asyncio.sleep(0.001)
        for delta in deltas:
            self.engine.receiver.take(delta)
        while len(self.sent) < 2:  # the status, and the first events
            await asyncio.sleep(0.001)
        await turns(3)

    def texts(self, start: int = 0) -> list[tuple[int, str]]:
        """The events of the bodies from `start` on: choice and text."""
        found = []
        for event in b"".join(self.sent[start:]).split(b"\n\n"):
            if event.startswith(b"data: {"):
                for choice in json.loads(event[6:]).get("choices", ()):
                    text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                    found.append((choice["index"], text))
        return found


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


BODIES: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": CHAT}
BODIES["/v1/responses"] = {"input": "hi"}


@pytest.mark.parametrize("path", BODIES)
async def test_a_token_is_one_send_without_a_task_a_future_or_a_model(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Exchange(HandEngine(), path, BODIES[path], request_timeout_s=60)
    await exchange.begin(make_delta("a"))
    loop, made = asyncio.get_running_loop(), []

    def counting(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return original(*arguments, **options)

        return call

    for name in ("create_task", "create_future", "call_soon", "call_at", "call_later"):
        monkeypatch.setattr(loop, name, counting(name, getattr(loop, name)))
    for name in ("model_dump_json", "model_dump", "__init__"):
        monkeypatch.setattr(BaseModel, name, counting(name, getattr(BaseModel, name)))
    num_sent = len(exchange.sent)
    for number in range(200):
        exchange.engine.receiver.take(make_delta("b", num_tokens=number + 2))
        assert len(exchange.sent) == num_sent + number + 1  # already written
    monkeypatch.undo()
    assert not made
    exchange.engine.receiver.take(make_delta("c", num_tokens=202, finish_reason="stop"))
    await exchange.task
    if path != "/v1/responses":
        assert "".join(text for _, text in exchange.texts()) == "a" + 200 * "b" + "c"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_a_late_reader_has_not_read_is_merged_to_one_event_per_choice(path: str) -> None:
    exchange = Exchange(HandEngine(), path, {**BODIES[path], "n": 2})
    take = lambda text, index, count: exchange.engine.receiver.take(make_delta(text, index, count))  # noqa: E731
    await exchange.begin(make_delta("a", 0), make_delta("A", 1))
    exchange.may_read.clear()
    num_sent = len(exchange.sent)
    for count, text in enumerate("bcde", 2):
        take(text, 0, count)
        take(text.upper(), 1, count)
        await turns(1)
    assert len(exchange.sent) == num_sent
    exchange.may_read.set()
    await turns(5)
    # the first event had been handed to `send` when it turned out that the reader is late
    assert exchange.texts(num_sent) == [(0, "b"), (1, "BCDE"), (0, "cde")]
    num_sent = len(exchange.sent)
    for count, text in enumerate("fg", 6):  # it keeps up again
        take(text, 0, count)
    assert exchange.texts(num_sent) == [(0, "f"), (0, "g")] and len(exchange.sent) == num_sent + 2
    exchange.may_read.clear()
    for index, text in ((0, "h"), (1, "H"), (0, "i")):
        exchange.engine.receiver.take(make_delta(text, index, 9, "stop" if text in "Hi" else None))
    await turns(5)
    exchange.may_read.set()
    await exchange.task
    for index, text in ((0, "abcdefghi"), (1, "ABCDEH")):
        assert "".join(text for choice, text in exchange.texts() if choice == index) == text
    assert exchange.sent[-1].endswith(b"data: [DONE]\n\n") and exchange.engine.num_closed == 1


async def test_a_reader_that_stays_late_loses_its_request() -> None:
    jump_over_waits()
    exchange = Exchange(HandEngine(), "/v1/completions", BODIES["/v1/completions"], idle_timeout_s=50)
    await exchange.begin(make_delta("a"))
    exchange.may_read.clear()
    exchange.engine.receiver.take(make_delta("b", num_tokens=2))
    exchange.engine.receiver.take(make_delta("c", num_tokens=3))
    await exchange.task
    assert exchange.engine.num_closed == 1 and exchange.texts() == [(0, "a")]


async def test_a_late_reader_gets_no_comments() -> None:
    jump_over_waits()
    exchange = Exchange(HandEngine(), "/v1/completions", BODIES["/v1/completions"], keepalive_s=5)
    await exchange.begin(make_delta("a"))
    exchange.may_read.clear()
    exchange.engine.receiver.take(make_delta("b", num_tokens=2))
    num_sent = len(exchange.sent)
    await asyncio.sleep(18)
    assert len(exchange.sent) == num_sent
    exchange.may_read.set()
    await asyncio.sleep(18)
    assert exchange.sent[num_sent + 1].startswith(b": keep-alive")
    exchange.engine.receiver.take(make_delta("c", num_tokens=3, finish_reason="stop"))
    await exchange.task


@pytest.mark.parametrize("is_late", [False, True])
async def test_the_call_is_closed_as_soon_as_the_client_has_left(is_late: bool) -> None:
    exchange = Exchange(HandEngine(), "/v1/completions", BODIES["/v1/completions"])
    await exchange.begin(make_delta("a"))
    if is_late:
        exchange.may_read.clear()
        exchange.engine.receiver.take(make_delta("b", num_tokens=2))
        await turns(3)
    exchange.has_left.set()
    await turns(4)
    assert exchange.engine.num_closed == 1
    await exchange.task


async def test_a_bug_in_formatting_ends_the_stream_with_an_error() -> None:
    exchange = Exchange(HandEngine(), "/v1/chat/completions", CHAT)
    await exchange.begin(make_delta("a"))
    exchange.engine.receiver.take(make_delta("\ud800", num_tokens=2))
    exchange.engine.receiver.take(make_delta("c", num_tokens=3))
    await exchange.task
    assert exchange.engine.num_closed == 1
    assert b"internal error" in exchange.sent[-1] and exchange.sent[-1].endswith(b"data: [DONE]\n\n")
    assert exchange.texts() == [(0, ""), (0, "a")]


async def test_output_that_precedes_the_response_is_not_merged() -> None:
    exchange = Exchange(HandEngine(), "/v1/completions", BODIES["/v1/completions"])
    await exchange.begin(*[make_delta(text, num_tokens=count) for count, text in enumerate("abc", 1)])
    assert exchange.texts() == [(0, "a"), (0, "b"), (0, "c")]
    exchange.engine.receiver.take(make_delta("d", num_tokens=4, finish_reason="stop"))
    await exchange.task
