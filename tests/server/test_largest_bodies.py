"""The largest body that each route takes, or refuses only once it has been read, beside a stream.

By default, what is counted is what could hold the stream up: processor time of the event loop's thread between two of
its turns, and texts encoded in this process. The time between a stream's events, which needs a quiet machine:

    pytest -m slow tests/server/test_largest_bodies.py
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.builders import write_byte_tokenizer
from tests.patience import PATIENCE_S
from tests.server.fake_engine import FakeEngine, serving_app
from tests.server.measure_interference import Disturbance, disturb, read_all, repeat
from tinyvllm.config import ModelFiles
from tinyvllm.engine.heap import settle_heap
from tinyvllm.server.app import make_app
from tinyvllm.server.body_shape import MAX_CONTAINERS, MAX_VALUES, count_values
from tinyvllm.server.settings import ServerSettings
from tinyvllm.text import tokenizer as tokenizers
from tinyvllm.text.long_texts import LONG_CHARS

MAX_BYTES = ServerSettings().max_body_bytes
# Of processor time: 0.05 for 400,000 ids, 0.05 for 16 MiB of text, but 0.11 while another worker has the other
# half of the core. Before bodies were bounded, it was seconds.
LONGEST_TURN_S = 0.2
TRIES = 3  # what else runs on the cores makes processor time longer, too


def text_of(size: int) -> str:
    return "one two three " * (size // 14)


def bodies() -> dict[str, tuple[str, Any]]:
    """(path, body) by name. The text in most is as long as --max-body-bytes allows."""
    text = text_of(MAX_BYTES - 500)
    user: dict[str, Any] = {"role": "user", "content": text}
    short = {"role": "user", "content": "x"}
    chat: dict[str, Any] = {"max_tokens": 1, "messages": [user]}
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 6660
    return {
        "completion": ("/v1/completions", {"prompt": text}),
        "completion, cut": ("/v1/completions", {"prompt": text, "truncate_prompt_tokens": 10}),
        "chat": ("/v1/chat/completions", chat),
        "response": ("/v1/responses", {"input": text}),
        "response, cut": ("/v1/responses", {"input": text, "truncation": "auto"}),
        "message": ("/v1/messages", chat),
        "tokens of a message": ("/v1/messages/count_tokens", {"messages": [user]}),
        "embedding": ("/v1/embeddings", {"input": text}),
        "rerank": ("/v1/rerank", {"query": "x", "documents": [text]}),
        "Ollama's chat, cut": ("/api/chat", {"model": "tiny", "messages": [user], "stream": False}),
        "Ollama's prompt, cut": ("/api/generate", {"model": "tiny", "prompt": text, "stream": False}),
        "Ollama's embedding, cut": ("/api/embed", {"model": "tiny", "input": text}),
        "tokens of a text": ("/tokenize", {"prompt": text_of(LONG_CHARS + 1000)}),
        "tokens of a text that is too long": ("/tokenize", {"prompt": text}),
        "text of ids": ("/detokenize", {"tokens": [97] * (MAX_VALUES - 10)}),
        "ids": ("/v1/completions", {"prompt": [97] * (MAX_VALUES - 10)}),
        "texts": ("/v1/completions", {"prompt": ["x"] * (MAX_VALUES - 10)}),
        "messages": ("/v1/chat/completions", {"max_tokens": 1, "messages": [short] * 4096}),
        "calls": ("/v1/chat/completions", {"messages": [short, {"role": "assistant", "tool_calls": calls}]}),
        "objects": ("/v1/completions", {"prompt": "x", "x": [{}] * (MAX_CONTAINERS - 10)}),
        "too many objects": ("/v1/completions", {"prompt": "x", "x": [{}] * (MAX_BYTES // 4 - 100)}),
        "stop strings": ("/v1/completions", {"prompt": "x", "stop": [text[:1_000_000]] * 15}),
        "bad words": ("/v1/completions", {"prompt": "x", "bad_words": [text[:1_000_000]] * 15}),
    }


# Of the same kind as others: by default these are left out.
REPEATED = {
    *("completion, cut", "response, cut", "Ollama's prompt, cut", "tokens of a text that is too long"),
    *("texts", "too many objects", "bad words"),
}


@dataclass
class Turns:
    """An app that watches its event loop: the most processor time of its thread from one turn to the next."""

    app: ASGIApp
    longest_s: float = 0.0
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = self._task or asyncio.create_task(self._watch())
        await self.app(scope, receive, send)

    async def _watch(self) -> None:
        last_s = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now_s = time.thread_time()
            self.longest_s, last_s = max(self.longest_s, now_s - last_s), now_s


@contextlib.contextmanager
def server(directory: Any) -> Iterator[tuple[str, Turns, FakeEngine]]:
    """A server with a tokenizer from files, as a server's is."""
    write_byte_tokenizer(directory)
    engine = FakeEngine(reply="a" * 200)
    tokenizer: Any = tokenizers.load_tokenizer(ModelFiles("hf", directory, "tiny"))
    tokenizer.encode_long_texts_elsewhere()
    engine.tokenizer = tokenizer
    engine.model_config.vocab_size = tokenizer.vocab_size
    turns = Turns(make_app(engine))  # type: ignore[arg-type]
    thresholds = gc.get_threshold()
    settle_heap()  # as a server does: the collector would visit all that the tests have imported
    with serving_app(turns) as url:
        try:
            yield url, turns, engine
        finally:
            tokenizer.close()
            gc.unfreeze()
            gc.set_threshold(*thresholds)


@pytest.mark.parametrize(
    "names",
    [bodies().keys() - REPEATED, pytest.param(REPEATED, marks=pytest.mark.sweep)],
    ids=["one of each kind", "others"],
)
def test_no_body_holds_the_event_loop(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, names: set[str]) -> None:
    lengths: list[int] = []
    encode_here = tokenizers.Tokenizer._encode_here

    def counted(self: Any, text: str, parse_special: bool) -> list[int]:
        lengths.append(len(text))
        return encode_here(self, text, parse_special)

    monkeypatch.setattr(tokenizers.Tokenizer, "_encode_here", counted)
    slow = {}
    with server(tmp_path) as (url, turns, engine), httpx.Client(base_url=url) as client:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        for name, (path, body) in bodies().items():
            if name not in names:
                continue
            engine.model_config.pooling = "mean" if "embed" in path or "rerank" in path else None
            content = json.dumps(body).encode()
            assert len(content) <= MAX_BYTES, name
            for _ in range(TRIES):
                turns.longest_s = 0.0
                answer = client.post(path, content=content, headers={"content-type": "application/json"})
                assert answer.status_code in (200, 400, 413), (name, answer.text[:300])
                if turns.longest_s <= LONGEST_TURN_S:
                    break
            else:
                slow[name] = turns.longest_s
    assert not slow, slow
    assert max(lengths) <= LONG_CHARS


def test_what_can_never_fit_is_refused_before_it_is_encoded(tmp_path: Any) -> None:
    user = {"role": "user", "content": text_of(100_000)}
    with server(tmp_path) as (url, _, engine), httpx.Client(base_url=url) as client:
        engine.tokenizer.encode = None  # type: ignore[assignment, method-assign]
        engine.tokenizer.encode_chat = None  # type: ignore[assignment, method-assign]
        for path, body in (
            ("/v1/completions", {"prompt": user["content"]}),
            ("/v1/chat/completions", {"messages": [user]}),
            ("/v1/responses", {"input": [user]}),
            ("/v1/messages", {"messages": [user], "max_tokens": 5}),
            ("/api/chat", {"model": "tiny", "messages": [user], "truncate": False}),
            ("/api/embed", {"model": "tiny", "input": user["content"], "truncate": False}),
            ("/v1/embeddings", {"input": user["content"]}),
        ):
            engine.model_config.pooling = "mean" if "embed" in path else None
            answer = client.post(path, json=body)
            assert answer.status_code == 400 and "tokens" in answer.text, (path, answer.text)


def test_values_of_a_body_are_counted_outside_of_strings() -> None:
    rng = random.Random(1)
    for _ in range(50):
        words = ["a", 'q"', "\\", ",", "{[", '\\"', 1, None]
        values = [rng.choice(words) for _ in range(rng.randrange(1, 40))]
        num_commas = (len(values) - 1) + 1 + 1
        assert count_values(json.dumps({"a,b": values, '"': [{}, []]}).encode()) == (num_commas + 5, 5)


def test_values_are_counted_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([{"a": 'x,{["', "b": ["\\", ","]}] * 50).encode()
    whole = count_values(text)
    for size in range(1, 40):
        monkeypatch.setattr("tinyvllm.server.body_shape._PIECE_BYTES", size)
        assert count_values(text) == whole, size


def test_seven_large_requests_leave_threads_for_others(tmp_path: Any) -> None:
    """They wait for each other, and a small request is read meanwhile."""
    with server(tmp_path) as (url, _, engine), httpx.Client(base_url=url) as client:
        release, tokenizer = multiprocessing.Event(), engine.tokenizer
        encode: Callable[..., list[int]] = tokenizer.encode

        def wait_if_long(text: str, **settings: Any) -> list[int]:
            if len(text) > LONG_CHARS:
                release.wait(PATIENCE_S)
            return encode(text, **settings)

        tokenizer.encode = wait_if_long  # type: ignore[method-assign]
        content = json.dumps({"prompt": text_of(LONG_CHARS + 1000)}).encode()
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(7))
            post = functools.partial(client.post, "/tokenize", headers={"content-type": "application/json"})
            waiting = [pool.submit(post, content=content) for _ in range(7)]
            time.sleep(0.3)
            small = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert small.status_code == 200
            assert not any(future.done() for future in waiting)
            release.set()
            assert all(future.result().status_code == 200 for future in waiting)


# ---- On a quiet machine ----


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stream_has_no_gap_beside_the_largest_body_of_each_route(tmp_path: Any) -> None:
    """None over 100 ms more than the longest without."""
    with server(tmp_path) as (url, _, engine):
        parts = urlsplit(url)
        address = parts.hostname or "", parts.port or 0
        stream = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode()
        gaps: dict[str, float] = {"nothing": asyncio.run(read_all(address, stream, 4, 5.0))[-1]}
        for name, (path, body) in bodies().items():
            engine.model_config.pooling = "mean" if "embed" in path or "rerank" in path else None
            other = Disturbance(repeat, address, path, json.dumps(body).encode())
            process = multiprocessing.get_context("spawn").Process(target=disturb, args=(other,), daemon=True)
            process.start()
            time.sleep(2.5)  # its start is not what is measured
            try:
                gaps[name] = asyncio.run(read_all(address, stream, 4, 5.0))[-1]
            finally:
                process.kill()
                process.join()
    for name, gap_s in gaps.items():
        print(f"{name:40} {1e3 * gap_s:7.1f} ms")
    worst = {name: gap_s for name, gap_s in gaps.items() if gap_s > gaps["nothing"] + 0.1}
    assert not worst, worst
