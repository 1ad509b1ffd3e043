"""A process of the server, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tinyvllm.errors import TinyvllmError
from tinyvllm.faults import reach
from tinyvllm.server.control import Message, ParentLink
from tinyvllm.server.settings import API_KEY_VARIABLE
from tinyvllm.server.specs import Spec

log = logging.getLogger(__name__)

EXIT_CODE_S = 0.5  # how long the exit code may take after the link has closed; freeing a device may take seconds
LAST_WORDS_S = 0.1  # after a process has ended: until the event loop has read all that it has sent
GROUP_CHECK_S, NUM_GROUP_CHECKS = 0.02, 50  # while what an ended process started still runs
QUICK_DEATH_S = 10.0  # after it was ready; a process that dies earlier is restarted later each time
MAX_QUICK_DEATHS = 5  # in a row
BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0  # before the second restart in a row, and at most


class Process:
    """A child with a control link, and the leader of a process group of its own."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, link: ParentLink) -> None:
        self.name = name
        self.pid = process.pid
        self.ready_s: float | None = None  # monotonic clock: since when it serves
        self._link = link
        loop = asyncio.get_running_loop()
        self._exit = loop.create_task(self._wait_for_exit(process))
        self._end = loop.create_task(self._collect())

    def send(self, kind: str, **facts: object) -> None:
        """Send a message. Does nothing if the process is gone. If sending fails, it is killed: it would wait."""
        try:
            self._link.send(kind, **facts)
        except Exception:
            log.exception("cannot send %r to %s: it is killed", kind, self.name)
            self.kill()

    async def messages(self) -> AsyncIterator[Message]:
        """Its messages, until it is gone. If one cannot be read, the process is killed, because the message is lost."""
        try:
            async for message in self._link.messages():
                yield message
        except Exception:
            log.exception("cannot read a message of %s: it is killed", self.name)
            self.kill()

    async def how_it_ended(self) -> str:
        """For messages, once there are no more `messages`. It may still be ending, and so may what it started."""
        await asyncio.wait((self._exit,), timeout=EXIT_CODE_S)
        return self._exit.result() if self._exit.done() else "has closed its control link"

    async def wait(self) -> None:
        """Wait until it and all that it started have ended."""
        await self._end

    async def _wait_for_exit(self, process: asyncio.subprocess.Process) -> str:
        code = await process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def _collect(self) -> None:
        """Wait for its end, and then end what it started, which may hold the other end of the link.

        First by SIGTERM, which multiprocessing's resource tracker ignores: it removes semaphores after the others."""
        await self._exit
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._link.end)
        self.kill(signal.SIGTERM)
        for _ in range(NUM_GROUP_CHECKS):
            if not self._has_group():
                break
            await asyncio.sleep(GROUP_CHECK_S)
        self.kill()

    def close(self) -> None:
        self._link.close()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to it and to what it started, which is all in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS reports a zombie's group so
            os.killpg(self.pid, number)

    def _has_group(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return has_live_member(self.pid)


class Restarts:
    """Spaces out the restarts of a process that dies again and again, and gives up in the end."""

    def __init__(self, name: str, stopping: asyncio.Event) -> None:
        self._name = name
        self._stopping = stopping
        self._num_quick = 0  # deaths in a row soon after the start

    async def wait(self, process: Process | None) -> None:
        """Wait before the next start, or until the server stops. process: None if it could not be started.

        Raises TinyvllmError if there should not be another start."""
        ready_s = None if process is None else process.ready_s
        lived_s = 0.0 if ready_s is None else time.monotonic() - ready_s
        self._num_quick = self._num_quick + 1 if lived_s < QUICK_DEATH_S else 0
        if self._num_quick >= MAX_QUICK_DEATHS:
            raise TinyvllmError(
                f"{self._name} has died {self._num_quick} times in a row, each less than {QUICK_DEATH_S:g} s after it "
                "was ready: the log says how"
            )
        if self._num_quick > 1:
            delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._num_quick - 2))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)


async def start_process(
    module: str,
    spec: Spec,
    *,
    fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start `python -m module` and send it its spec. `fds`: descriptors that it inherits besides its control link.

    environment: variables in addition to this process's. Keys of the API are in the spec only.
    Raises TinyvllmError if the system starts no more processes."""
    here, there = socket.socketpair()
    with there:
        try:
            reach("process.start")
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *path_flags(),
                "-m",
                module,
                str(there.fileno()),
                pass_fds=(there.fileno(), *fds),
                # with a process group of its own: a Ctrl-C in a terminal reaches this process alone, which forwards it
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **(environment or {}), API_KEY_VARIABLE: "", **quiet_tracker()},
            )
        except (OSError, MemoryError) as error:
            here.close()
            raise TinyvllmError(f"{spec.name} cannot be started: {error}") from error
    link = await ParentLink.open(here)
    link.send("spec", spec=spec)
    return Process(spec.name, process, link)


def quiet_tracker() -> dict[str, str]:
    """These processes end without Python's clean-up, which may take long. multiprocessing's resource tracker removes
    the semaphores of their compiling processes then, and would print a warning each time."""
    rule = "ignore::UserWarning:multiprocessing.resource_tracker"
    return {"PYTHONWARNINGS": ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), rule)))}


def path_flags() -> list[str]:
    """-P, unless this process itself imports modules from its current directory, as `python -m` does without it."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]


def has_live_member(group: int) -> bool:
    """Whether one of a process group's members still runs, by Linux's /proc; True without it.

    A group also exists while its only members are zombies, which wait for an init process that may never collect them.
    """
    if not Path("/proc/self/stat").exists():
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, _, number = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                return True
    return False
