"""What a streamed token costs the HTTP front-end: `python -m tests.server.measure_stream`.

A server process runs the app around an engine without a device: the engine's client gets a batch of one token for each
open request, as often as the event loop can take them, or at a given rate. Another process reads the streams from real
sockets. Measured is the server's own CPU time, from the first token to the last, per token; so the reader, and other
programs on the machine, do not count. The cost of a request is measured apart, with one token each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from tests.engine.fakes import FakeModelRunner, make_loaded
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.client import Client
from tinyvllm.engine.messages import Abort, Batch, NewRequest, Output, Submit, ToEngine
from tinyvllm.scheduling.plan import StepStats
from tinyvllm.server import event_loop
from tinyvllm.server.app import make_app
from tinyvllm.server.sockets import bind

NUM_WARM_UP = 20  # requests
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "ollama": "/api/chat",
}


class TokenSource:
    """A host whose engine emits a token for each open request in every step. Waits for `num_streams` to begin."""

    num_engines = 1
    is_remote = False
    error = None
    is_ready = True

    def __init__(self, num_streams: int, rate: float) -> None:
        """rate: tokens a second of all requests together; 0: as many as the event loop takes."""
        runner = FakeModelRunner(
            num_blocks=100_000, max_num_seqs=1024, max_num_batched_tokens=2048, max_model_len=100_000
        )
        self.loaded = make_loaded(runner)
        self.cpu_s = self.wall_s = 0.0
        self.num_tokens = self.num_calls = 0
        self.warm_cpu_s = 0.0  # process_time() at the last call of the warm-up
        self._num_streams, self._rate = num_streams, rate
        self._open: dict[int, NewRequest] = {}
        self._done: dict[int, int] = {}
        self._client: Client | None = None
        self._start = (0.0, 0.0)
        self._is_running = False

    def client(self, loop: asyncio.AbstractEventLoop) -> Client:
        if self._client is None:
            self._client = Client([self], self.loaded.tokenizer)
        return self._client

    async def wait_ready(self) -> None:
        pass

    def engine_stats(self) -> list[StepStats]:
        return [StepStats(num_running=len(self._open))]

    async def shutdown(self, drain_s: float) -> None:
        pass

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Abort):
            for number in message.numbers:
                self._open.pop(number, None)
            return
        assert isinstance(message, Submit)
        self.num_calls += 1
        if self.num_calls == NUM_WARM_UP:
            self.warm_cpu_s = time.process_time()
        for request in message.requests:
            self._open[request.number], self._done[request.number] = request, 0
        if len(self._open) >= self._num_streams and not self._is_running:
            self._is_running = True
            asyncio.get_running_loop().call_later(0.0 if self._num_streams == 1 else 0.3, self._begin)

    def _begin(self) -> None:
        if self._num_streams > 1:  # reading the clock of the process is a slow call of the system
            self._start = time.process_time(), time.perf_counter()
        self._next_s = asyncio.get_running_loop().time()
        self._step()

    def _step(self) -> None:
        loop, client, done = asyncio.get_running_loop(), self._client, self._done
        assert client is not None
        now_s = time.monotonic()
        batch = Batch(now_s, [], [], [])
        for number, request in list(self._open.items()):
            position = done[number] = done[number] + 1
            token_id = 97 + position % 26
            self.num_tokens += 1
            if position == request.max_tokens:
                batch.outputs.append(Output(number, token_id, "length"))
                del self._open[number], done[number]
            elif position == 1:
                batch.outputs.append(Output(number, token_id))
            else:
                batch.numbers.append(number)
                batch.token_ids.append(token_id)
        client.receive(batch)
        if not self._open:
            self._is_running = False
            if self._num_streams > 1:
                loop.call_soon(self._stop)
        elif self._rate:
            self._next_s += (len(batch.numbers) + len(batch.outputs)) / self._rate
            loop.call_at(max(self._next_s, loop.time()), self._step)
        else:
            loop.call_soon(self._step)

    def _stop(self) -> None:
        self.cpu_s += time.process_time() - self._start[0]
        self.wall_s += time.perf_counter() - self._start[1]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM, without raising it again."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.handle_exit, signal.SIGTERM, None)
        yield


async def run_server(source: TokenSource, *, is_plain: bool) -> None:
    app = make_app(AsyncEngine(EngineConfig("tiny", served_model_name="tiny"), source))  # type: ignore[arg-type]
    sock = bind("127.0.0.1", 0)
    http: Any = "h11" if is_plain else event_loop.http_protocol()
    server = _Server(uvicorn.Config(app, http=http, loop="none", log_config=None, access_log=False))
    print(sock.getsockname()[1], flush=True)
    await server.serve(sockets=[sock])
    call_us = 1e6 * (time.process_time() - source.warm_cpu_s) / max(1, source.num_calls - NUM_WARM_UP)
    found = {"cpu_s": source.cpu_s, "wall_s": source.wall_s, "tokens": source.num_tokens, "call_us": call_us}
    print(json.dumps(found), flush=True)


def request_of(path: str, num_tokens: int, *, stream: bool = True) -> bytes:
    body: dict[str, Any] = {"model": "tiny", "stream": stream}
    if path != PATHS["ollama"]:
        body["ignore_eos"] = True
    if path == PATHS["completions"]:
        body |= {"prompt": [97 + n % 26 for n in range(128)], "max_tokens": num_tokens}
    elif path == PATHS["chat"]:
        body |= {"messages": [{"role": "user", "content": "hello " * 20}], "max_tokens": num_tokens}
    elif path == PATHS["ollama"]:
        messages = [{"role": "user", "content": "hello " * 20}]
        body |= {"messages": messages, "options": {"num_predict": num_tokens, "temperature": 1}}
    else:
        body |= {"input": "hello " * 20, "max_output_tokens": num_tokens, "store": False}
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read_streams(port: int, num_streams: int, request: bytes) -> int:
    """Open the streams and read them to their ends. Returns the number of events."""
    selector = selectors.DefaultSelector()
    for _ in range(num_streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request)
        selector.register(sock, selectors.EVENT_READ)
    num_events = 0
    while selector.get_map():
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            num_events += data.count(b"data: ") + data.count(b'"done":')
            if not data or data.endswith(b"0\r\n\r\n"):
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    return num_events


def send_requests(port: int, num_requests: int, request: bytes) -> None:
    """Send requests one after another on one connection."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(num_requests):
            sock.sendall(request)
            data = b""
            while not data.endswith((b"0\r\n\r\n", b"}")):
                data += sock.recv(1 << 16)
            assert data.startswith(b"HTTP/1.1 200"), data[:300]


def measure(arguments: argparse.Namespace, api: str, num_streams: int) -> str:
    command = [sys.executable, "-m", "tests.server.measure_stream", "--serve", str(num_streams)]
    command += ["--rate", str(arguments.rate)] + ["--plain"] * arguments.plain
    if arguments.profile:
        command += ["--profile", arguments.profile]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    num_tokens = arguments.tokens // num_streams
    is_requests = num_streams == 1
    if is_requests:
        send_requests(port, NUM_WARM_UP + arguments.requests, request_of(PATHS[api], 1))
        num_events = 0
    else:
        num_events = read_streams(port, num_streams, request_of(PATHS[api], num_tokens))
    server.terminate()
    found = json.loads(server.stdout.read().splitlines()[-1])
    server.wait()
    if is_requests:
        return f"{api:12} {found['call_us']:8.0f} us a request"
    return (
        f"{api:12} {num_streams:4} streams {1e6 * found['cpu_s'] / found['tokens']:7.1f} us a token "
        f"{found['tokens'] / found['wall_s']:9.0f} tokens/s {num_events / found['tokens']:6.2f} events a token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, help="be the server, of so many streams")
    parser.add_argument("--apis", nargs="+", default=["completions", "chat"], choices=PATHS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64, 256], help="1: measures requests instead")
    parser.add_argument("--tokens", type=int, default=64_000, help="of all streams together")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.0, help="tokens a second of all streams together; 0: no limit")
    parser.add_argument("--plain", action="store_true", help="asyncio and h11 instead of uvloop and httptools")
    parser.add_argument("--profile", help="write the server's cProfile to this file")
    arguments = parser.parse_args()
    if arguments.serve is None:
        for api in arguments.apis:
            for num_streams in arguments.streams:
                print(measure(arguments, api, num_streams), flush=True)
        return
    server = run_server(TokenSource(arguments.serve, arguments.rate), is_plain=arguments.plain)
    start = asyncio.run if arguments.plain else event_loop.run
    if arguments.profile:
        import cProfile

        with cProfile.Profile() as profile:
            start(server)
        profile.dump_stats(arguments.profile)
    else:
        start(server)


if __name__ == "__main__":
    main()
