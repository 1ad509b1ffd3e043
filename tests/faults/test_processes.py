"""A server of several processes, in each of which points fail: messages between them, control links, steps, writes.

One server has all of the failures of a list, one after another, while clients send requests of several kinds: each is
answered, or ends with an error that says why, or, where its front-end was killed, with its connection; none hangs. The
server is whole again afterwards, and stops cleanly. Failures that end processes, and pairs at random:

    pytest -m slow tests/faults/test_processes.py
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.server.servers import RunningServer
from tests.server.test_processes import serving
from tinyvllm.faults import VARIABLE, Fault, Plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which process did what")

# Occurrences are counted in each process, and a failure happens once in all of them.
FAULTS = (
    Fault("control.handle", "memory"),
    Fault("disk.pids", "os", at=2),
    Fault("disk.recording", "os"),
    Fault("engine.launch", "device", at=5),
    Fault("hop.take", "os"),  # the first Hello
    Fault("hop.reply", "memory"),  # the first Welcome
    Fault("hop.read", "device"),
    Fault("hop.take", "memory", at=6),
    Fault("hop.reply", "os", at=20),
    Fault("hop.read", "memory", at=30),
    Fault("hop.arrive", "memory", at=40),
    Fault("hop.submit", "os", at=8),
    Fault("text.encode", "memory", at=4),
    Fault("text.render", "memory", at=3),
    Fault("grammar.compile", "memory"),
    Fault("engine.deliver", "memory", at=60),
    Fault("engine.commit", "delay", at=70, delay_s=0.3),
)
DEATHS = (  # of processes, which are then started again
    Fault("hop.read", "exit", at=90),
    Fault("process.start", "os", at=5, times=2),
    Fault("engine.collect", "exit", at=130),
    Fault("control.tell", "memory", at=25),
    Fault("control.hear", "memory", at=45),
    Fault("control.send", "os", at=8),
)
BODIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("/v1/completions", {"prompt": "One text", "max_tokens": 20}),
    ("/v1/completions", {"prompt": "Two texts", "max_tokens": 20, "n": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "logprobs": True}),
    ("/v1/completions", {"prompt": "One of two", "structured_outputs": {"choice": ["Grüße, 世界! 👋"]}}),
)


def ask(server: RunningServer, path: str, body: dict[str, object]) -> str:
    """How one request ended. Raises httpx.TimeoutException if it hangs."""
    try:
        with httpx.stream("POST", server.address + path, json=body) as response:
            text = response.read().decode()
    except httpx.TimeoutException:
        raise
    except httpx.TransportError:
        return "disconnected"
    if response.status_code != 200:
        # the grammar library panics where a crowded machine gives it no thread, which looks like a bad grammar
        assert response.status_code in (500, 503) or "panic" in text, text
        assert response.json()["error"]["message"], text
        return str(response.status_code)
    if "stream" not in body:
        assert response.json()["choices"]
        return "ok"
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    if "error" in (last := json.loads(events[-2])):
        assert last["error"]["message"]
        return "error event"
    return "ok"


def is_answered(server: RunningServer, path: str, body: dict[str, object]) -> bool:
    return ask(server, path, body) == "ok"


class Clients:
    """Send requests from several threads until they are told to stop."""

    def __init__(self, server: RunningServer, num_threads: int = 3) -> None:
        self.outcomes: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(num_threads)]
        self._threads.append(threading.Thread(target=self._profile))
        for thread in self._threads:
            thread.start()

    def _profile(self) -> None:
        """Have the processes record, which makes them talk to each other over the supervisor."""
        while not self._stop.is_set():
            for path in ("/start_profile", "/stop_profile"):
                with contextlib.suppress(httpx.TransportError):
                    httpx.post(self._server.address + path)
                time.sleep(0.2)

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        try:
            while not self._stop.is_set():
                self.outcomes[ask(self._server, *rng.choice(BODIES))] += 1
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def is_idle(server: RunningServer) -> bool:
    metrics = httpx.get(server.address + "/metrics").text
    busy = [line for line in metrics.splitlines() if "requests_running{" in line or "requests_waiting{" in line]
    return bool(busy) and all(float(line.rpartition(" ")[2]) == 0 for line in busy)


def missing(faults: Sequence[Fault], marks: Path) -> set[str]:
    """The failures that have not happened."""
    names = {f"{fault.point} {fault.how}" for fault in faults}
    return names - {path.name.rpartition(" ")[0] for path in marks.iterdir()}


def survive(
    directory: Path,
    faults: Sequence[Fault],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float = PATIENCE_S,
    is_random: bool = False,
) -> Counter[str]:
    """Serve with these failures until all have happened, but no longer than `seconds`; then check what is left.

    is_random: not all need happen."""
    marks = directory / "marks"
    (directory / "model").mkdir()
    marks.mkdir()
    monkeypatch.setenv(VARIABLE, Plan(faults, str(marks)).encode())
    settings = {"enable_profiling": True}
    with serving(directory / "model", "answering", restart_engine=True, settings=settings) as server:
        clients = Clients(server)
        end_s = time.monotonic() + seconds
        while missing(faults, marks) and time.monotonic() < end_s and not clients.errors:
            time.sleep(0.1)
        clients.end()
        assert not clients.errors, (clients.errors, server.log[-40:])
        assert server.process.poll() is None, server.log[-40:]
        # whole again: both front-ends answer every kind, and nothing runs or waits
        server.wait_for_status("/ready", 200)
        for path, body in BODIES * 2:
            server.wait_for(functools.partial(is_answered, server, path, body))
        server.wait_for(lambda: is_idle(server))
        server.stop()
    assert is_random or not missing(faults, marks), (missing(faults, marks), clients.outcomes)
    return clients.outcomes


@pytest.mark.parametrize("deaths", [(), pytest.param(DEATHS, marks=pytest.mark.slow)], ids=["failures", "deaths"])
def test_a_server_survives_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: tuple[Fault, ...]) -> None:
    outcomes = survive(tmp_path, [*FAULTS, *deaths], monkeypatch)
    print(dict(outcomes))
    assert outcomes["ok"] and outcomes["500"] + outcomes["error event"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_server_survives_failures_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    points = rng.sample([fault.point for fault in (*FAULTS, *DEATHS) if fault.point != "process.start"], 2)
    faults = [Fault(point, rng.choice(("os", "memory", "device", "exit")), at=rng.randint(4, 60)) for point in points]
    survive(tmp_path, faults, monkeypatch, 15, is_random=True)
