"""Reading what the user types in `tinyvllm chat`: several lines, pastes, and a history."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path

from tinyvllm.config import cache_dir

QUOTES = '"""'
HISTORY_NAME, HISTORY_LINES = "chat_history", 1000
PASTE_S = 0.02  # lines that come faster than this were not typed


class LineInput:
    """Reads messages from stdin. Owns the history file; `close` writes it."""

    def __init__(self, *, keeps_history: bool) -> None:
        self._is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = cache_dir() / HISTORY_NAME if keeps_history and self._is_typed else None
        if self._is_typed:
            _set_up_editing(self._history)

    def read(self) -> str:
        """The next message, stripped. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C.

        A message continues after a line that ends with a backslash, between triple quotes, and as long as pasted lines
        follow. A command is one line."""
        first = self._line("> ").strip()
        if first.startswith(QUOTES):
            return self._quoted(first.removeprefix(QUOTES))
        lines = [first]
        if first.startswith("/"):
            return first
        while lines[-1].endswith("\\") or self._is_pasting():
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line("… ").rstrip())
        return "\n".join(lines).strip()

    def close(self) -> None:
        if self._history is not None:
            _write_history(self._history)

    def _quoted(self, rest: str) -> str:
        lines = [rest]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._line("… "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip()

    def _line(self, prompt: str) -> str:
        return input(prompt if self._is_typed else "")

    def _is_pasting(self) -> bool:
        return self._is_typed and bool(select.select([sys.stdin], [], [], PASTE_S)[0])


def _set_up_editing(history: Path | None) -> None:
    """Give input() line editing, and the history of earlier chats, if Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline

        # Python turns it off; with it, a terminal's paste is edited as a whole and sent by the next Enter
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(HISTORY_LINES)
        if history is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(history)


def _write_history(path: Path) -> None:
    """Write the history to a file that only this user can read."""
    with contextlib.suppress(ImportError, OSError):  # a chat must not fail because of its history
        import readline

        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        readline.write_history_file(path)
