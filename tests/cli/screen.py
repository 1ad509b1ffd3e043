"""A terminal for tests: a program on a pseudo-terminal, and what its screen and scrollback show."""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType

from tests.forking import run_in_fork
from tests.patience import PATIENCE_S

# what rich, readline and a tty's echo write: text, CR, LF, BS, and CSI sequences
PIECE = re.compile(rb"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[=>]|\r|\n|\x08|\x07|[^\x1b\r\n\x08\x07]+")
UNFINISHED = re.compile(rb"\x1b(\[[0-9;?]*)?\Z")  # a sequence whose rest is in the next read


class Screen:
    """The lines that a terminal of `columns` would show, with its scrollback. Colors are ignored."""

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode  # reads may divide a letter
        self._held = b""

    def feed(self, data: bytes) -> None:
        data = self._held + data
        unfinished = UNFINISHED.search(data)
        self._held = b"" if unfinished is None else unfinished.group()
        for match in PIECE.finditer(data, 0, len(data) - len(self._held)):
            piece = match.group()
            if match.group(2):
                self._control(match.group(1).decode(), match.group(2).decode())
            elif piece == b"\r":
                self.column = 0
            elif piece == b"\n":
                self._down()
            elif piece == b"\x08":
                self.column = max(0, self.column - 1)
            elif not piece.startswith((b"\x1b", b"\x07")):
                for letter in self._decode(piece):
                    self._put(letter)

    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n") + "\n"

    def _control(self, argument: str, kind: str) -> None:
        count = int(argument) if argument.isdigit() else 1
        if kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "C":
            self.column += count
        elif kind == "D":
            self.column = max(0, self.column - count)
        elif kind == "K":
            line = self.lines[self.row]
            del line[0 if argument == "2" else self.column :]

    def _put(self, letter: str) -> None:
        if self.column >= self.columns:
            self.column = 0
            self._down()
        line = self.lines[self.row]
        line += [" "] * (self.column + 1 - len(line))
        line[self.column] = letter
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])


class Tty:
    """A program with a terminal of 24 by 80 for stdin, stderr and, by default, stdout. Killed at the end.

    `program` is code that this process runs in a fork, with the command line as its arguments; without it, the command
    runs."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], program: str = "") -> None:
        self.screen = Screen()
        faulthandler.cancel_dump_traceback_later()  # its lock would be held in the fork: tests/forking.py
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Python 3.12 on, of a fork beside threads
            self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            # as a shell on a terminal begins a program: one that runs the tests in the background has these ignored
            for number in (signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            inherited = {
                name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")
            }
            env = {**inherited, "TERM": "xterm-256color", **environment}
            if program:
                run_in_fork(program, command, env, prepare=_forget_consoles)
            os.execvpe(command[0], list(command), env)

    def __enter__(self) -> Tty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, is_there: str | Callable[[str], bool]) -> str:
        """The screen's text, once it contains a text or meets a condition."""
        meets = (lambda text: is_there in text) if isinstance(is_there, str) else is_there
        end_s = time.monotonic() + PATIENCE_S
        while not meets(text := self.screen.text()):
            assert time.monotonic() < end_s, f"not there: {is_there}\n{text}"
            if not self._read():
                text = self.screen.text()
                assert meets(text), f"it ended without {is_there}\n{text}"
                break
        return text

    def wait(self) -> int:
        """The exit code, after the last output was read."""
        end_s = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < end_s, self.screen.text()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        """Read what has come. False: the program has closed the terminal."""
        if select.select([self._fd], [], [], 0.05)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # Linux: no one has the terminal open any more
                return False
            self.screen.feed(data)
            return bool(data)
        return True


def _forget_consoles() -> None:
    """What the command line found out about its terminal when it was imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich" or name.startswith("tinyvllm.cli")]:
        del sys.modules[name]
