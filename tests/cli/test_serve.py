"""`tinyvllm serve` as a process: health while it warms up, the line to paste, and a clean stop."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

# Serves an engine that hangs in the middle of an answer and is ready as soon as the test has seen that it was not.
PROGRAM = """
import asyncio, sys
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
                await self.released.wait()
                yield type(delta)(**{**vars(delta), "finish_reason": "abort"})
                return
            yield delta

def start_engine(config, progress):
    engine = SlowEngine(served_model_name=config.served_model_name)
    engine.released = asyncio.Event()
    progress("load", 1, 2)
    return engine

engines.start_engine = start_engine
main()
"""


@contextlib.contextmanager
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, read from the log while the engine is not ready yet."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    arguments = ["serve", str(model), "--port", "0", "--log-level", "info"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "http://" in line)
            reader = threading.Thread(target=process.stderr.read, daemon=True)  # so that the pipe never fills
            reader.start()
            yield process, "http://" + line.split("http://")[1].split()[0].rstrip(",")
            reader.join()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_warms_up_answers_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as (process, address):
        assert process.stdin is not None and process.stdout is not None
        assert httpx.get(address + "/health").status_code == 503
        process.stdin.write("ready\n")
        process.stdin.flush()
        assert address in process.stdout.readline()
        curl = shlex.split(process.stdout.readline())
        assert curl[0] == "curl" and curl[1] == address + "/v1/chat/completions"
        assert json.loads(curl[-1])["model"] == "tiny"
        assert httpx.get(address + "/health").status_code == 200

        with httpx.stream("POST", curl[1], json={**json.loads(curl[-1]), "stream": True}, timeout=20) as response:
            lines = response.iter_lines()
            while '"content":"o"' not in next(lines):  # the last letter before the engine hangs
                pass
            process.send_signal(number)
            rest = "\n".join(lines)
        assert "aborted" in rest and rest.rstrip().endswith("data: [DONE]")
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == "shut down\n"


def test_server_that_still_warms_up_stops_cleanly_too(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, address):
        assert process.stdin is not None and process.stdout is not None
        assert httpx.get(address + "/health").status_code == 503
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            while httpx.get(address + "/health").status_code == 503:
                pass
        process.stdin.close()  # what the engine's thread waits for
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == ""
