"""`tinyvllm serve` as a process: health during warm-up, the line to paste, and shutdowns that lose no answer.

Nothing here waits with a limit of its own: how soon a process gets a core depends on what else runs, and each test has
a limit."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest

from tests.forking import forked
from tests.patience import wait_for
from tests.sweeps import swept

# Serves an engine that hangs in the middle of an answer, and is ready once the test has seen that it was not.
PROGRAM = """
import asyncio, sys, threading
from msgspec import structs
from tests.server.fake_engine import FakeEngine
from tinyvllm.cli import engine as engines, main

class SlowEngine(FakeEngine):
    async def wait_ready(self):
        self.is_ready = False
        await asyncio.to_thread(sys.stdin.readline)
        self.is_ready = True

    async def shutdown(self):
        print("shut down", flush=True)
        self.abort_after = 0
        self.released.set()

    async def generate(self, *arguments, **options):
        async for delta in super().generate(*arguments, **options):
            if delta.num_output_tokens == 6:
                # when the test says so; a daemon thread, since the exit must not wait for it
                loop = asyncio.get_running_loop()
                threading.Thread(target=self.go_on, args=(loop,), daemon=True).start()
                await self.released.wait()
                if self.abort_after == 0:
                    yield structs.replace(delta, finish_reason="abort")
                    return
            yield delta

    def go_on(self, loop):
        if sys.stdin.readline():
            loop.call_soon_threadsafe(self.released.set)

def start_engine(config, progress):
    engine = SlowEngine(served_model_name=config.served_model_name)
    engine.released = asyncio.Event()
    progress("load", 1, 2)
    return engine

engines.start_engine = start_engine
main()
"""


lines: list[str] = []  # of the log, after the first with the address


def keep_lines(log: IO[str]) -> None:
    for line in log:
        lines.append(line)  # not extend, which shows them only at the end


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


@contextlib.contextmanager
def serving(tmp_path: Path, *flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, read from the log while the engine is not ready yet."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    arguments = ["serve", str(model), "--port", "0", "--log-level", "info", *flags]
    with forked(
        PROGRAM,
        arguments,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "HTTP is up on " in line)
            lines.clear()
            reader = threading.Thread(target=keep_lines, args=(process.stderr,), daemon=True)
            reader.start()  # so that the pipe never fills
            yield process, line.split("HTTP is up on ")[1].split(", where ")[0]
            reader.join()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_server_listens_is_a_clean_end(number: signal.Signals) -> None:
    """Without a traceback. The command stops itself where it looks for memory limits, which is early."""
    code = f"""
import os, time
from tinyvllm.cli import main, serve

def stop():
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)

serve.require_memory_limit = stop
main()
"""
    with forked(code, ["serve"], env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.communicate() == ("", "") and process.returncode == 0


@pytest.mark.parametrize("number", swept((signal.SIGINT, signal.SIGTERM), [signal.SIGTERM]))
def test_server_warms_up_answers_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--shutdown-timeout", "0") as (process, address):
        assert process.stdout is not None
        assert httpx.get(address + "/health").status_code == 503
        say(process, "ready")
        assert address in process.stdout.readline()
        curl = shlex.split(process.stdout.readline())
        assert curl[0] == "curl" and curl[1] == address + "/v1/chat/completions"
        assert json.loads(curl[-1])["model"] == "tiny"
        assert httpx.get(address + "/health").status_code == 200

        with httpx.stream("POST", curl[1], json={**json.loads(curl[-1]), "stream": True}) as response:
            events = response.iter_lines()
            while '"content":"o"' not in next(events):  # the last letter before the engine hangs
                pass
            process.send_signal(number)
            rest = "\n".join(events)
        assert "aborted" in rest and rest.rstrip().endswith("data: [DONE]")
        assert process.wait() == 0
        assert process.stdout.read().endswith("docs/CLIENTS.md\nshut down\n")
    assert "event loop: uvloop; HTTP parser: httptools" in "".join(lines)


def test_server_that_still_warms_up_stops_cleanly_too(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, address):
        assert process.stdin is not None and process.stdout is not None
        assert httpx.get(address + "/health").status_code == 503
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            while httpx.get(address + "/health").status_code == 503:
                pass
        process.stdin.close()  # what the engine's thread waits for
        assert process.wait() == 0
        assert process.stdout.read() == ""


@contextlib.contextmanager
def hanging_stream(address: str) -> Iterator[Iterator[str]]:
    """A stream that has sent "Hello," and continues when the test says so."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.stream("POST", address + "/v1/chat/completions", json=body) as response:
        chunks = response.iter_lines()
        while '"content":"o"' not in next(chunks):
            pass
        yield chunks


def refusal(address: str) -> httpx.Response:
    return httpx.post(address + "/v1/completions", json={"prompt": "x"})


def wait_until(address: str, path: str, status: int) -> None:
    wait_for(lambda: httpx.get(address + path).status_code == status)


def test_a_signal_turns_new_work_away_and_lets_what_runs_finish(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, address):
        say(process, "ready")
        wait_until(address, "/ready", 200)
        with hanging_stream(address) as chunks:
            process.send_signal(signal.SIGTERM)
            wait_until(address, "/ready", 503)
            assert httpx.get(address + "/health").status_code == 200
            assert httpx.get(address + "/engine/state").json()["status"] == "draining"
            refused = refusal(address)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_draining"
            assert refused.headers["retry-after"] == "5" and refused.headers["connection"] == "close"
            wait_for(lambda: any("1 requests may continue" in line for line in lines))
            say(process, "go on")
            rest = "\n".join(chunks)
        assert '"finish_reason":"stop"' in rest and rest.rstrip().endswith("data: [DONE]")
        assert process.wait() == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(address + "/health")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--shutdown-timeout", "1000") as (process, address):
        say(process, "ready")
        wait_until(address, "/ready", 200)
        with hanging_stream(address) as chunks:
            process.send_signal(signal.SIGTERM)
            wait_until(address, "/ready", 503)
            process.send_signal(signal.SIGTERM)
            rest = "\n".join(chunks)
        assert "aborted" in rest and rest.rstrip().endswith("data: [DONE]")
        assert process.wait() == 0


@pytest.mark.sweep  # a time of 0 is among the tests above
def test_what_still_runs_after_the_time_is_aborted(tmp_path: Path) -> None:
    with serving(tmp_path, "--shutdown-timeout", "0.3") as (process, address):
        say(process, "ready")
        wait_until(address, "/ready", 200)
        with hanging_stream(address) as chunks:
            process.send_signal(signal.SIGTERM)
            rest = "\n".join(chunks)
        assert "aborted" in rest
        assert process.wait() == 0


def test_keys_of_all_sources_are_asked_for_and_shown_nowhere(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfile-key-1\n\nfile-key-2\n")
    flags = ("--api-key", "flag-key-1", "--api-key-file", str(keys))
    with serving(tmp_path, *flags, TINYVLLM_API_KEY="env-key-1 env-key-2") as (process, address):
        assert process.stdout is not None
        say(process, "ready")
        wait_until(address, "/ready", 200)
        assert refusal(address).status_code == 401
        for key in ("flag-key-1", "file-key-1", "file-key-2", "env-key-1", "env-key-2"):
            answer = httpx.get(address + "/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        httpx.get(address + "/v1/models", headers={"authorization": "Bearer wrong-key-1"})
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        said = process.stdout.read()
    assert "Bearer KEY" in said
    assert "-key-" not in said + "".join(lines)


@pytest.mark.parametrize(
    ("flags", "shows_content"),
    [((), False), pytest.param(("--log-requests", "--host", "0.0.0.0"), True, marks=pytest.mark.sweep)],
)
def test_log_lines_carry_the_requests_id_and_no_content(
    tmp_path: Path, flags: tuple[str, ...], shows_content: bool
) -> None:
    with serving(tmp_path, "--log-stats-interval", "0.05", *flags) as (process, address):
        say(process, "ready")
        wait_until(address, "/ready", 200)
        body = {"prompt": "a very secret prompt", "max_tokens": 3}
        httpx.post(address + "/v1/completions", json=body, headers={"x-request-id": "order-66"})
        wait_for(lambda: any("Engine 000: Avg prompt throughput: " in line for line in lines))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    log = "".join(lines)
    assert "[order-66]" in log and "POST /v1/completions" in log
    assert "/ready" not in log.replace('/ready HTTP/1.1" 503', "")  # successful probes are not logged
    assert ("secret" in log) is shows_content
    assert ("is open to everyone who can reach it" in log) is ("0.0.0.0" in flags)
    assert ("cmpl-order-66-" in log) is shows_content


def test_a_unix_socket_serves_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(tmp_path, "--uds", str(path)) as (process, address):
        assert address == f"unix:{path}" and process.stdout is not None
        say(process, "ready")
        assert str(path) in process.stdout.readline()
        assert f"--unix-socket {shlex.quote(str(path))} http://localhost/v1/" in process.stdout.readline()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not path.exists()
