"""Servers of several processes in tests, around a supervisor that runs on a thread's or a process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.forking import forked, forking_instead_of, started
from tests.patience import as_for_users, be_patient, wait_for
from tinyvllm.config import EngineConfig
from tinyvllm.server import run_directory, sockets, supervisor
from tinyvllm.server.engine_placement import Placement
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import TlsFiles
from tinyvllm.server.stop_clock import StopClock
from tinyvllm.server.supervisor import ServePlan, supervise

ROOT = Path(__file__).parents[2]


def plan_from(options: dict[str, Any]) -> ServePlan:
    """A plan with fake processes; `settings` and `config` are dicts."""
    options = dict(options)
    settings = ServerSettings(**{"stats_interval_s": None, **options.pop("settings", {})})
    config = EngineConfig(**{"model": "tiny", "served_model_name": "tiny", **options.pop("config", {})})
    fakes = {
        "front_end_module": "tests.server.fake_front_end",
        "engine_module": "tests.server.fake_engine_process",
        "num_front_ends": 2,
        "has_large_lane": False,
    }
    if "tls" in options:
        options["tls"] = TlsFiles(**options["tls"])
    engines = [Placement(config)] * options.pop("num_engines", 1)
    return ServePlan(engines=engines, settings=settings, **{**fakes, **options})


def main() -> None:
    """Serve by the plan in the first argument; prints a line of JSON for each event."""
    import logging

    from tinyvllm.errors import TinyvllmError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = json.loads(sys.argv[1])
    if options.pop("is_patient"):
        be_patient()
    else:
        as_for_users()

    def say(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)

    async def run() -> None:
        if options.pop("is_forked"):
            asyncio.create_subprocess_exec = forking_instead_of(asyncio.create_subprocess_exec)
        path = options.pop("uds", None)
        supervisor.UNSEEN_S = options.pop("unseen_s", supervisor.UNSEEN_S)
        supervisor.ENGINE_EXIT_S = options.pop("engine_exit_s", supervisor.ENGINE_EXIT_S)
        supervisor.HASTE_S = options.pop("haste_s", supervisor.HASTE_S)
        sock = sockets.bind("127.0.0.1", 0) if path is None else sockets.bind_unix(path)
        say("listening", address=sockets.address_of(sock, has_tls="tls" in options))
        recordings = await supervise(
            plan_from(options),
            sock,
            lambda stage, done, total: say("progress", stage=stage),
            lambda can_chat: say("ready", can_chat=can_chat),
            clock=StopClock(),
        )
        say("stopped", recordings=sorted(recordings))

    try:
        asyncio.run(run())
    except TinyvllmError as error:
        say("error", text=str(error))
        raise SystemExit(1) from None


@dataclass
class RunningServer:
    """A supervisor in a process of its own."""

    process: subprocess.Popen[str]
    address: str
    run_dir: Path
    model_dir: Path  # the fake engines look here for the file `go`
    log: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # after "listening"

    def pids(self) -> dict[str, int]:
        pids: dict[str, int] = json.loads((self.run_dir / "processes.json").read_text())
        return pids

    def __post_init__(self) -> None:
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_log, self._read_events)]
        for reader in self._readers:
            reader.start()

    def wait_until_ready(self) -> None:
        """Wait until every front-end and engine is ready."""
        self.wait_for(lambda: any(event["event"] == "ready" for event in self.events))

    def wait_for_status(self, path: str, status: int) -> None:
        self.wait_for(lambda: httpx.get(self.address + path, timeout=5).status_code == status)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until the condition is true, but not once the server has ended."""

        def is_met() -> bool:
            with contextlib.suppress(httpx.TransportError, FileNotFoundError):
                if condition():
                    return True
            assert self.process.poll() is None, f"the server has ended: {self.events[-1:]} {self.log[-20:]}"
            return False

        wait_for(is_met)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait()
        for reader in self._readers:
            reader.join()
        return code

    def stop(self) -> None:
        """Stop it cleanly."""
        self.signal()
        assert self.wait() == 0, self.log
        assert not self.run_dir.exists()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:  # one by one, so that the pipe never fills
            self.log.append(line)

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))


def own_run_dirs(pid: int) -> list[Path]:
    """The run directories that a process holds the lock of."""
    base = run_directory._base()
    found = []
    for path in base.glob(f"{run_directory.PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((path / "processes.json").read_text()).get("supervisor") == pid:
                found.append(path)
    return found


@contextlib.contextmanager
def running_server(is_forked: bool = True, is_patient: bool = True, **options: Any) -> Iterator[RunningServer]:
    """A server of several processes by `plan_from(options)`. Killed at the end, if it still runs.

    `is_forked`: they have this process's modules, instead of importing their own. `is_patient`: as tests are."""
    model_dir = tempfile.mkdtemp()
    options |= {"is_forked": is_forked, "is_patient": is_patient}
    options["config"] = {"model": model_dir, **options.get("config", {})}
    start = forked if is_forked else started
    with start(
        "tests.server.servers",
        [json.dumps(options)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["address"]
            wait_for(lambda: own_run_dirs(process.pid) or process.poll() is not None)
            (run_dir,) = own_run_dirs(process.pid)
            server = RunningServer(process, address, run_dir, Path(model_dir))
            yield server
            if process.poll() is None:
                server.signal(signal.SIGKILL)
            server.wait()
        finally:
            process.kill()


if __name__ == "__main__":
    main()
