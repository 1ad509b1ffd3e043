"""A terminal in which an agent runs as it does for a person: keys go in, and what it draws comes out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

from tests.agents.running import Agent

TIMEOUT_S = 30.0
PAUSE_S = 1.0  # programs ignore a key that comes sooner than a person could have read what it answers
CONTROL = re.compile(rb"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>78c()].?")


class Terminal:
    """What the program drew is one text without spaces, as programs move the cursor instead of writing them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._drawn = b""

    def enter(self, line: str) -> None:
        """Type a line, and the key that ends it once the line is drawn: keys that arrive together count as pasted."""
        if line:
            os.write(self._descriptor, line.encode())
            self.wait_for(line)
        time.sleep(PAUSE_S)
        os.write(self._descriptor, b"\r")

    def wait_for(self, text: str) -> None:
        """Wait until the program has drawn `text` since the last call."""
        wanted, deadline = re.sub(r"\s", "", text), time.monotonic() + TIMEOUT_S
        while wanted not in self.text():
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} is not on the screen: {self.text()[-2000:]}")
            self._read()
        self._drawn = b""

    def text(self) -> str:
        return re.sub(r"\s", "", CONTROL.sub(b"", self._drawn).decode(errors="replace"))

    def _read(self) -> None:
        ready, _, _ = select.select([self._descriptor], [], [], 0.2)
        if ready:
            with contextlib.suppress(OSError):  # the program has ended
                self._drawn += os.read(self._descriptor, 65536)


@contextlib.contextmanager
def terminal_of(agent: Agent, *arguments: str, proxy: str) -> Iterator[Terminal]:
    """A terminal of 120 columns and 40 rows in which the agent runs, and is ended at the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**agent.variables(proxy), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [str(agent.program), *arguments],
        cwd=agent.project,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
