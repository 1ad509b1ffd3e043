"""The whole command under floods, signals and deaths: it goes on, or it ends in time and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests import patience
from tests.builders import write_byte_tokenizer
from tests.forking import forked
from tests.server.test_control import wait_until_gone
from tests.sweeps import swept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets the size of a pipe")

ROOT = Path(__file__).parents[2]
ALONE, SEVERAL = "0", "1"  # --api-server-count
DOOR_FLAGS = ("--keep-alive", "5m")  # a door, which loads the model at the first request

# The command line, whose engine has a fake device. In processes of their own, its module is loaded by name. They are
# forked, unless told otherwise, and patient, unless their own limits are what is tested.
PROGRAM = """
import functools, sys
from tests.forking import fork_children
from tests.patience import as_for_users
from tests.server import fake_load
from tinyvllm.cli import engine as engines, main
from tinyvllm.door import fleet
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.server import output_queue, supervisor

if sys.argv.pop(1) == "fork":
    fork_children()
if sys.argv.pop(1) == "as for users":
    as_for_users()
load, max_log_chars = sys.argv.pop(1), int(sys.argv.pop(1))
output_queue.MAX_LOG_CHARS = max_log_chars
load_here = getattr(fake_load, load)
engines.start_engine = lambda config, progress: AsyncEngine.start(config, progress, load_here)
load = f"tests.server.fake_load:{load}"
supervisor.ServePlan = functools.partial(supervisor.ServePlan, load=load)
fleet.Plan = functools.partial(fleet.Plan, examine="tests.door.fake_models:examine", load=load)
main()
"""


class Server:
    """A server in a process group of its own, with what it starts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = b""
        self.address = ""
        self.is_read = threading.Event()
        self.is_read.set()

    def read_log(self) -> None:
        """While `is_read`."""
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            self.log += data
            self.is_read.wait()

    def has_logged(self, text: bytes) -> bool:
        return text in self.log

    def wait_for_address(self) -> None:
        def find() -> object:
            found = re.search(r"(?:HTTP is up on|served on) (http://[0-9.:]+)", self.log.decode())
            self.address = "" if found is None else found[1]
            return found

        wait_for(find)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it to the whole group, as service managers and terminals do."""
        os.killpg(self.process.pid, number)

    def get(self, path: str) -> int:
        return httpx.get(self.address + path, timeout=5).status_code

    def descendants(self) -> list[int]:
        found, new = [], [self.process.pid]
        while new:
            paths = Path(f"/proc/{new.pop()}/task").glob("*/children")
            children = [int(pid) for path in paths for pid in path.read_text().split()]
            found += children
            new += children
        return found


def wait_for(condition: Callable[[], object]) -> None:
    patience.wait_for(condition, httpx.TransportError, OSError)


@contextlib.contextmanager
def serving(
    directory: Path,
    load: str,
    count: str,
    *flags: str,
    max_log_chars: int = 1 << 20,
    forks: bool = True,
    is_patient: bool = True,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """A server that listens, with its log in a small pipe. forks: its own processes. is_patient: as tests are. prepare:
    runs in it first."""
    write_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    arguments = ["fork" if forks else "start", "patient" if is_patient else "as for users", load, str(max_log_chars)]
    arguments += ["serve", str(directory), "--port", "0", "--api-server-count", count, *flags]
    with forked(
        PROGRAM,
        arguments,
        {**os.environ, "PYTHONPATH": str(ROOT)},
        prepare=prepare,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        server = Server(process)
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        reader = threading.Thread(target=server.read_log, daemon=True)
        reader.start()
        try:
            server.wait_for_address()
            yield server
        finally:
            pids = server.descendants()
            process.kill()
            server.is_read.set()
            reader.join()
            wait_until_gone(pids)


@contextlib.contextmanager
def streaming(server: Server) -> Iterator[Iterator[str]]:
    """A stream that has begun."""
    body = {"prompt": "x", "max_tokens": 40, "stream": True}
    with httpx.stream("POST", server.address + "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert response.status_code == 200 and "data" in next(lines)
        yield lines


# ---- What it survives ----


@pytest.mark.parametrize("count", swept((ALONE, SEVERAL), [ALONE]))
def test_the_server_survives_idle_connections_signals_and_an_unread_log(tmp_path: Path, count: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))  # for this end of the connections
    with contextlib.ExitStack() as stack:
        flags = ("--max-connections", "3000")
        server = stack.enter_context(
            serving(tmp_path, "slow", count, *flags, max_log_chars=20_000, forks=False, prepare=limit_files)
        )
        wait_for(lambda: server.get("/ready") == 200)
        with streaming(server) as lines:
            url = urlsplit(server.address)
            for num_idle in (1200, 3800):
                for _ in range(num_idle):
                    sock = socket.socket()
                    stack.enter_context(sock)
                    sock.connect((url.hostname, url.port))
                assert server.get("/health") == 200
            assert httpx.get(server.address + "/v1/models?api_key=sk-secret&x=1").status_code == 200
            for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO):
                server.signal(number)
            server.signal(signal.SIGUSR1)
            wait_for(lambda: b"most recent call first" in server.log)
            assert server.get("/health") == 200
            next(lines)
        if count == ALONE:
            write_unread_log(server, num_lines=400)
            server.is_read.set()
            wait_for(lambda: b" lines are missing here: nobody read the log" in server.log)
        with streaming(server) as lines:
            write_unread_log(server, num_lines=60)
            server.signal(signal.SIGHUP if count == ALONE else signal.SIGQUIT)
            wait_for(lambda: server.get("/ready") == 503)
            assert list(lines)[-2] == "data: [DONE]", "it drains"
        assert server.process.wait() == 0, "with a full pipe, too"
        log = server.log.decode()
        assert '"GET /v1/models HTTP/1.1" 200' in log and "sk-secret" not in log
        assert log.count("idle connections make room") == 1 and len(log) < 100_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_unread_log(server: Server, num_lines: int) -> None:
    """More than the pipe holds."""
    server.is_read.clear()
    with httpx.Client(base_url=server.address) as client:
        for _ in range(num_lines):  # each has a hundred characters
            assert client.get("/version").status_code == 200


def limit_files() -> None:
    """The soft limit of many systems, and the signals of a terminal, which `nohup` and background jobs ignore."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


# ---- How it ends ----


@pytest.mark.parametrize(
    ("load", "count", "is_door"),
    swept(
        [("compiling_alone", ALONE, False), ("compiling", ALONE, False), ("compiling", SEVERAL, True)],
        [("compiling", SEVERAL, True)],
    ),
)
def test_a_stop_during_a_load_that_compiles_is_clean_and_leaves_nothing(
    tmp_path: Path, load: str, count: str, is_door: bool
) -> None:
    with serving(tmp_path, load, count, *(DOOR_FLAGS if is_door else ())) as server:
        if is_door:
            threading.Thread(target=ask, args=(server,), daemon=True).start()
        wait_for(lambda: len(worker_pids(server)) == (1 if load == "compiling_alone" else 2))
        pids = server.descendants()
        server.signal()
        assert server.process.wait() == 0, server.log.decode()
        wait_until_gone(pids)


def worker_pids(server: Server) -> list[int]:
    """Of the compilers and their template, which has the same command line."""
    found = []
    for pid in server.descendants():
        with contextlib.suppress(OSError):
            if b"compile_workers import" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize(("count", "num_signals"), swept([(ALONE, 1), (SEVERAL, 2), (ALONE, 3)], [(ALONE, 3)]))
def test_a_step_that_never_ends_does_not_hold_up_a_stop(tmp_path: Path, count: str, num_signals: int) -> None:
    """The server's own limits end it, or the third signal does. The step would take a thousand seconds."""
    with serving(tmp_path, "stuck", count, "--shutdown-timeout", "1", is_patient=num_signals == 3) as server:
        wait_for(lambda: server.get("/ready") == 200)
        thread = threading.Thread(target=ask, args=(server,), daemon=True)
        thread.start()
        wait_for(lambda: len(worker_pids(server)) == 2)
        pids = server.descendants()
        server.signal()
        for heard in (b" requests may continue", b": aborting ")[: num_signals - 1]:
            wait_for(functools.partial(server.has_logged, heard))  # else the system makes one of both
            server.signal()
        server.process.wait()
        wait_until_gone(pids)


def ask(server: Server) -> None:
    with contextlib.suppress(httpx.TransportError):
        httpx.post(server.address + "/v1/completions", json={"prompt": "x"})


def test_nothing_outlives_a_killed_door(tmp_path: Path) -> None:
    """Neither its model's supervisor, nor that one's front-end and engine, nor the compiler and its template."""
    with serving(tmp_path, "compiling", SEVERAL, *DOOR_FLAGS) as server:
        threading.Thread(target=ask, args=(server,), daemon=True).start()
        wait_for(lambda: len(worker_pids(server)) == 2)
        pids = server.descendants()
        assert len(pids) >= 4
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until_gone(pids)
