"""What others' requests do to a stream: the time between its tokens, alone and beside a disturbance.

    python -m tests.server.measure_interference http://127.0.0.1:8000 --streams 16 --seconds 5

Start the server with --chat-template tests/server/slow_template.jinja. Each disturbance comes from its own process,
so it costs the reader of the streams nothing but cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

Address = tuple[str, int]


async def post(address: Address, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return reader, writer


async def read_stream(address: Address, body: bytes, until_s: float, gaps: list[tuple[float, float]]) -> None:
    """Requests one after the other until `until_s`; notes when each event came, and how long after the one before."""
    while time.monotonic() < until_s:
        reader, writer = await post(address, "/v1/completions", body)
        last_s = 0.0
        while data := await reader.read(1 << 16):
            now_s = time.monotonic()
            if b'"text"' in data:
                if last_s:
                    gaps.append((now_s, now_s - last_s))
                last_s = now_s
        writer.close()


async def read_all(address: Address, body: bytes, count: int, seconds: float) -> list[float]:
    """The gaps of `count` streams, without those of the first second."""
    start_s, gaps = time.monotonic(), list[tuple[float, float]]()
    await asyncio.gather(*(read_stream(address, body, start_s + seconds, gaps) for _ in range(count)))
    return sorted(gap for at_s, gap in gaps if at_s > start_s + 1.0)


# ---- Disturbances, each in a process of its own ----


async def repeat(address: Address, path: str, body: bytes) -> None:
    """The same request again and again, whatever the answer."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await post(address, path, body)
            await reader.read()
            writer.close()


async def idle_connections(address: Address, count: int) -> None:
    streams = [await asyncio.open_connection(*address) for _ in range(count)]
    await asyncio.sleep(3600)
    assert streams


def schema_body(num_fields: int) -> bytes:
    fields = {f"field_{index}": {"type": "string", "enum": [f"a{index}", f"b{index}"]} for index in range(num_fields)}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps({"prompt": "x", "max_tokens": 1, "response_format": form}).encode()


def disturb(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(make())


class Disturbance:
    """A picklable coroutine call."""

    def __init__(self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self) -> Coroutine[Any, Any, None]:
        return self._function(*self._arguments)


def disturbances(address: Address) -> dict[str, Disturbance | None]:
    chat = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    text = json.dumps({"prompt": "one two three " * (16 * 2**20 // 14 - 20), "max_tokens": 1}).encode()
    ids = json.dumps({"prompt": [1234] * 399_000, "max_tokens": 1}).encode()
    return {
        "nothing": None,
        "a prompt of 16 MiB": Disturbance(repeat, address, "/v1/completions", text),
        "399,000 token ids": Disturbance(repeat, address, "/v1/completions", ids),
        "a schema of 200 KiB": Disturbance(repeat, address, "/v1/completions", schema_body(3000)),
        "a chat template of 60 ms": Disturbance(repeat, address, "/v1/chat/completions", chat),
        "2,000 idle connections": Disturbance(idle_connections, address, 2000),
        "nothing, again": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    parts = urlsplit(arguments.url)
    address = parts.hostname or "127.0.0.1", parts.port or 80
    body = json.dumps(
        {"prompt": "Tell", "max_tokens": arguments.tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    )
    alone: float | None = None
    print(f"{arguments.streams} streams beside | tokens | mean ms | p50 ms | p99 ms | max ms | mean against alone")
    for name, disturbance in disturbances(address).items():
        process = None
        if disturbance is not None:
            process = multiprocessing.get_context("spawn").Process(target=disturb, args=(disturbance,), daemon=True)
            process.start()
            time.sleep(2.5)  # its start is not what is measured
        gaps = asyncio.run(read_all(address, body.encode(), arguments.streams, arguments.seconds))
        if process is not None:
            process.kill()
            process.join()
        mean = sum(gaps) / len(gaps)
        alone = alone or mean
        at = [1e3 * gaps[min(len(gaps) - 1, int(share * len(gaps)))] for share in (0.5, 0.99, 1.0)]
        print(
            f"{name} | {len(gaps)} | {1e3 * mean:.3f} | {at[0]:.3f} | {at[1]:.3f} | {at[2]:.1f} | "
            f"{mean / alone - 1:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
