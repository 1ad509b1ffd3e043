"""The control link: messages both ways, and no child outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyvllm.config import EngineConfig
from tinyvllm.server import process
from tinyvllm.server.control import EXIT_ORPHANED, ChildLink, ParentLink

# A child that computes in C without end, with a child of its own that sleeps.
BUSY = """
import hashlib, signal, subprocess, sys
from tinyvllm.server.control import ChildLink

signal.signal(signal.SIGTERM, lambda number, frame: None)
link = ChildLink(int(sys.argv[1]))
assert link.receive() == {"kind": "spec", "name": "engine 0"}
link.watch(lambda message: link.send("echo", message=message))
helper = subprocess.Popen(["sleep", "1000"])
link.send("started", helper=helper.pid)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


@contextlib.contextmanager
def busy_child(sock: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(sock.fileno())], pass_fds=(sock.fileno(),), process_group=0
    )
    sock.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended. An ended one whose parent is gone waits for init to collect it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return not stat.parent.parent.joinpath("self").exists()


def wait_until_gone(pids: list[int]) -> None:
    """Within the test's own time limit: how soon they get a core depends on what else runs."""
    while any(map(is_running, pids)):
        time.sleep(0.02)


async def test_messages_pass_both_ways_while_the_child_computes_and_it_ends_with_its_parent() -> None:
    here, there = socket.socketpair()
    with busy_child(there) as process:
        link = await ParentLink.open(here)
        link.send("spec", name="engine 0")
        messages = link.messages()
        started = await anext(messages)
        link.send("hello", config=EngineConfig("tiny"), text="line\nbreaks")
        echo = (await anext(messages))["message"]
        assert echo["text"] == "line\nbreaks" and EngineConfig(**{**echo["config"], "decode_buckets": ()}).seed == 0
        link.close()
        assert [message async for message in messages] == []
        assert process.wait() == EXIT_ORPHANED
        wait_until_gone([started["helper"]])


async def test_the_parent_hears_of_a_killed_child() -> None:
    here, there = socket.socketpair()
    with busy_child(there) as process:
        link = await ParentLink.open(here)
        link.send("spec", name="engine 0")
        messages = link.messages()
        helper = (await anext(messages))["helper"]
        os.killpg(process.pid, signal.SIGKILL)
        assert [message async for message in messages] == []
        for _ in range(10):
            link.send("ignored")
        link.close()
        wait_until_gone([helper])


async def test_many_threads_may_send() -> None:
    here, there = socket.socketpair()
    child = ChildLink(there.detach())
    link = await ParentLink.open(here)

    def send_many(number: int) -> None:
        for _ in range(50):
            child.send("number", n=number, text="x" * 3000)

    threads = [threading.Thread(target=send_many, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    received = []
    async for message in link.messages():
        received.append(message["n"])
        if len(received) == 200:
            break
    assert sorted(received) == sorted([0, 1, 2, 3] * 50)
    link.close()
    child.close()


@pytest.mark.parametrize("size", [0, 1 << 20])
async def test_long_messages_are_whole(size: int) -> None:
    here, there = socket.socketpair()
    child = ChildLink(there.detach())
    link = await ParentLink.open(here)
    threading.Thread(target=lambda: child.send("long", text="é" * size)).start()
    message = await anext(link.messages())
    assert message == {"kind": "long", "text": "é" * size}
    link.close()
    child.close()


@pytest.mark.parametrize("is_quiet", [True, False])
def test_an_exit_without_cleaning_up_prints_nothing(is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiling processes leave them: semaphores that the resource tracker removes."""
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    code = "import multiprocessing as m, os; lock = m.get_context('spawn').Lock(); os._exit(0)"
    environment = {**os.environ, **(process.quiet_tracker() if is_quiet else {})}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("leaked semaphore" in ended.stderr) == (not is_quiet)
