"""Compressed bodies of requests."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import Message

from tests.server.client import client_of, error_of
from tests.server.fake_engine import FakeEngine
from tinyvllm.server.content_encoding import MAX_ENCODINGS, PIECE_BYTES, _Decompressed

BODY = json.dumps({"prompt": "ab" * 100, "max_tokens": 1}).encode()
LIMIT = 64 * 2**10


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # gzip's header has the time of day, and a parameter names its test


def deflated(data: bytes, wbits: int) -> bytes:
    stream = zlib.compressobj(wbits=wbits)
    return stream.compress(data) + stream.flush()


async def send(body: bytes | AsyncIterator[bytes], encoding: str, path: str = "/v1/completions") -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    async with client_of(FakeEngine(), max_body_bytes=LIMIT) as client:
        return await client.post(path, content=body, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzipped(BODY)),
        ("GZIP", gzipped(BODY[:9]) + gzipped(b"") + gzipped(BODY[9:]) + b"\0" * 8),
        ("x-gzip", gzipped(BODY)),
        ("deflate", deflated(BODY, 15)),
        ("deflate", deflated(BODY, -15)),
        ("deflate, gzip", gzipped(deflated(BODY, 15))),
        ("gzip, identity", gzipped(BODY)),
        ("identity", BODY),
        ("gzip", b""),
    ],
)
async def test_a_compressed_body_is_read_as_a_plain_one(encoding: str, body: bytes) -> None:
    answer = await send(body, encoding)
    if not body:
        assert answer.status_code == 400 and "body is missing" in answer.text
        return
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == 200


async def test_a_compressed_body_may_come_in_small_chunks() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in gzipped(deflated(BODY, -15)):
            yield bytes([byte])

    assert (await send(chunks(), "deflate, gzip")).status_code == 200


@pytest.mark.parametrize(
    ("encoding", "body", "reason"),
    [
        ("gzip", BODY, "incorrect header check"),
        ("gzip", gzipped(BODY)[:-4], "ends too early"),
        ("gzip", gzipped(BODY)[:-8] + b"\0" * 8, "incorrect data check"),
        ("gzip", gzipped(BODY) + b"rubbish", "incorrect header check"),
        ("deflate", b"x", "ends too early"),
        ("deflate", deflated(BODY, 15) + b"rubbish", "data follows its end"),
        ("gzip, gzip", gzipped(BODY), "incorrect header check"),
    ],
)
async def test_a_damaged_body_is_refused(encoding: str, body: bytes, reason: str) -> None:
    answer = await send(body, encoding)
    assert answer.status_code == 400 and reason in error_of(answer)["message"]


@pytest.mark.parametrize("encoding", ["br", "gzip, zstd", ", ".join(["gzip"] * (MAX_ENCODINGS + 1))])
async def test_an_unknown_encoding_is_refused_with_the_known_ones(encoding: str) -> None:
    answer = await send(BODY, encoding)
    assert answer.status_code == 415 and answer.headers["accept-encoding"] == "gzip, deflate"
    assert error_of(answer)["param"] == "Content-Encoding"
    assert "error" in (await send(BODY, encoding, "/v1/messages")).json()


@pytest.mark.parametrize("layers", [1, 2])
async def test_a_bomb_is_given_up_before_it_takes_memory(layers: int) -> None:
    bomb = bytes(64 * 2**20)
    for _ in range(layers):
        bomb = gzipped(bomb)
    messages: list[Message] = [
        {"type": "http.request", "body": bomb, "more_body": True},
        {"type": "http.request", "body": b"the rest, which is discarded", "more_body": False},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    body = _Decompressed(receive, ["gzip"] * layers, LIMIT)
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match=f"larger than {LIMIT} bytes") as caught:
            await body.receive()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status_code == 413  # type: ignore[attr-defined]
    assert messages == [] and peak < 2 * LIMIT + 8 * PIECE_BYTES, peak


async def test_what_is_just_small_enough_is_read() -> None:
    body = json.dumps({"prompt": "x", "user": "u"}).encode()
    assert (await send(gzipped(body + b" " * (LIMIT - len(body))), "gzip")).status_code == 200
    assert (await send(gzipped(body + b" " * (LIMIT - len(body) + 1)), "gzip")).status_code == 413
