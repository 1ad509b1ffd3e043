"""A streamed answer that a second run continues is the one that the first would have given."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.fake_engine import FakeEngine, serving
from tests.sweeps import examples
from tinyvllm.server.resume import ResumeError, Resumption

TEXT = "Grüße, 世界! A longer answer."


def event(index: int = 0, stamp: str = "one", finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": stamp, "created": len(stamp), "choices": [choice]}).encode() + b"\n\n"


def stream(rng: random.Random, stamp: str) -> list[bytes]:
    """One answer of two choices, divided at random."""
    parts = [event(index, stamp, role="assistant", content="") for index in (0, 1)]
    left = [TEXT, TEXT[::-1]]
    while any(left):
        index = rng.choice([index for index in (0, 1) if left[index]])
        size = rng.randint(1, 6)
        parts.append(event(index, stamp, content=left[index][:size]))
        left[index] = left[index][size:]
        if rng.random() < 0.1:
            parts.append(b": keep-alive\n\n")
    parts += [event(index, stamp, finish="stop") for index in (0, 1)]
    return [*parts, b"data: [DONE]\n\n"]


def read(body: bytes) -> tuple[list[str], list[Any], set[str], int]:
    """Texts and reasons to finish by choice, ids, and the number of ends."""
    texts, reasons, ids, num_ends = ["", ""], [], set(), 0
    for block in body.decode().split("\n\n"):
        if block == "data: [DONE]":
            num_ends += 1
        elif block.startswith("data: "):
            found = json.loads(block[6:])
            ids.add(found["id"])
            for choice in found["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
                reasons += [choice["index"]] if choice["finish_reason"] else []
    return texts, sorted(reasons), ids, num_ends


@examples(30, 100)
@given(st.randoms(use_true_random=False))
def test_text_is_neither_lost_nor_repeated(rng: random.Random) -> None:
    first, second = stream(rng, "one"), stream(rng, "second")
    sent = b"".join(first[: rng.randint(1, len(first) - 1)])
    resumption = Resumption(sent)
    body = sent + b"".join(resumption.cut(part) for part in second)
    assert read(body) == ([TEXT, TEXT[::-1]], [0, 1], {"one"}, 1)


def test_a_second_death_is_survived_too() -> None:
    rng = random.Random(0)
    sent = b"".join(stream(rng, "one")[:6])
    again = Resumption(sent)
    for part in stream(rng, "two")[:20]:
        sent += again.cut(part)
    last = Resumption(sent)
    sent += b"".join(last.cut(part) for part in stream(rng, "three"))
    assert read(sent) == ([TEXT, TEXT[::-1]], [0, 1], {"one"}, 1)


def test_another_text_is_an_error() -> None:
    with pytest.raises(ResumeError, match="another answer"):
        Resumption(event(content="Hello")).cut(event(content="Help"))


def test_a_whole_answer_continues_by_bytes() -> None:
    resumption = Resumption(b'{"a": ')
    assert resumption.cut(b'{"') == b""
    assert resumption.cut(b'a": 1}') == b"1}"
    with pytest.raises(ResumeError):
        Resumption(b'{"b": ').cut(b'{"a": 1}')


@pytest.mark.parametrize(
    "part",
    [
        event(tool_calls=[{"index": 0}]),
        b'event: response.created\ndata: {"type": "response.created"}\n\n',
        b'data: {"error": {"message": "no"}}\n\n',
    ],
)
def test_what_cannot_be_cut_is_an_error(part: bytes) -> None:
    with pytest.raises(ResumeError):
        Resumption(event(content="x")).cut(part)


def test_real_streams_are_understood() -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        with serving(FakeEngine("Hello, wörld!")) as url:
            first, second = (httpx.post(url + path, json={**body, "stream": True}).content for _ in range(2))
        blocks = first.split(b"\n\n")
        sent = b"\n\n".join(blocks[:6]) + b"\n\n"
        body_of_both = sent + Resumption(sent).cut(second)
        texts = [json.loads(block[6:])["choices"][0] for block in body_of_both.split(b"\n\n")[:-2]]
        assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in texts) == (
            "Hello, wörld!"
        )
