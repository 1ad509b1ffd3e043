"""stdout and stderr that never make a writer wait: a bounded queue, and a thread that writes.

A pipe that nobody reads, or a terminal that is paused by Ctrl-S, blocks its writers, which would freeze the event loop,
the engine and the shutdown. Lines that do not fit into the queue are dropped, and a line in their place says how many.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn, TextIO

MAX_LOG_CHARS = 1 << 20  # of stderr
MAX_OUTPUT_CHARS = 64 << 20  # of stdout: with DEBUG=2, tinygrad prints a line for each kernel
PIECE_BYTES = 1 << 16  # a write to a pipe waits until its reader has made room for all of it
FLUSH_S = 0.5  # how long the process's end waits for a reader that reads nothing
MAX_FLUSH_S = 2.0  # and for one that does read
STACKS_S = 0.1  # until the stacks of all threads are in the queue


class QueuedOutput(io.TextIOBase):
    """A text stream that replaces `target`; a thread writes to its descriptor. `write` may be called from any thread
    and from signal handlers."""

    def __init__(self, target: TextIO, max_chars: int) -> None:
        """Raises OSError (io.UnsupportedOperation) if the target has no descriptor."""
        super().__init__()
        self.num_lost = 0  # lines that were dropped since the last notice
        self._is_dropping = False  # until the thread takes what is queued
        self._target = target
        self._fd = target.fileno()
        self._max_chars = max_chars
        self._changed = threading.Condition()  # around a reentrant lock
        self._parts: list[str] = []
        self._num_chars = 0
        self._num_written = 0  # bytes, since the start
        self._is_writing = False
        target.flush()
        threading.Thread(target=self._run, name="tinyvllm-output", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            if self._is_dropping or self._num_chars + len(text) > self._max_chars:
                self._is_dropping = True
                self.num_lost += text.count("\n")
            else:
                self._parts.append(text)
                self._num_chars += len(text)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Does nothing: the thread writes as soon as it can. See `finish`."""

    def finish(self, quiet_s: float = FLUSH_S, max_s: float = MAX_FLUSH_S) -> bool:
        """Wait until everything is written, but at most `max_s`, and no longer than `quiet_s` without progress. Returns
        whether it was."""
        end_s = time.monotonic() + max_s
        with self._changed:
            while self._parts or self._is_writing:
                before = self._num_written
                self._changed.wait(min(quiet_s, max(0.0, end_s - time.monotonic())))
                if self._num_written == before or time.monotonic() >= end_s:
                    return False
        return True

    def isatty(self) -> bool:
        return self._target.isatty()

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The target's. TextIOBase has this attribute, so `__getattr__` is not called for it."""
        return self._target.encoding

    def __getattr__(self, name: str) -> Any:
        """The encoding, the mode and such are the target's."""
        return getattr(self._target, name)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                while not self._parts:
                    self._changed.wait()
                parts, self._parts = self._parts, []
                num_lost, self.num_lost = self.num_lost, 0
                self._num_chars = 0
                self._is_dropping = False
                self._is_writing = True
            if num_lost:
                line_end = "" if parts[-1].endswith("\n") else "\n"
                parts.append(f"{line_end}{num_lost} lines are missing here: nobody read the log\n")
            self._write_all("".join(parts).encode(self._target.encoding or "utf-8", "backslashreplace"))

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                size = os.write(self._fd, rest[:PIECE_BYTES])
            except BlockingIOError:  # another process has made the descriptor non-blocking
                time.sleep(0.05)
                continue
            except OSError:  # its reader is gone
                return
            rest = rest[size:]
            with self._changed:
                self._num_written += size
                self._changed.notify_all()


def queue_outputs() -> None:
    """Queue stdout and stderr of this process from now on. Must be called before logging is set up."""
    atexit.unregister(finish_outputs)
    for name, max_chars in (("stderr", MAX_LOG_CHARS), ("stdout", MAX_OUTPUT_CHARS)):
        stream = getattr(sys, name)
        if isinstance(stream, QueuedOutput):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no descriptor, or closed, as under pythonw
            setattr(sys, name, QueuedOutput(stream, max_chars))
    atexit.register(finish_outputs)


def finish_outputs() -> None:
    """Write what is queued, unless nobody reads it."""
    for stream in _queued():
        stream.finish()


def exit_now(code: int) -> NoReturn:
    """End the process without Python's clean-up, which may wait for threads, but write its last lines first."""
    finish_outputs()
    os._exit(code)


_stacks_pid = 0  # the process in which SIGUSR1 writes stacks: its forks inherit the handler, but not the thread


def show_stacks_now() -> None:
    """Write the stack of every thread to the log, if SIGUSR1 does."""
    if _stacks_pid == os.getpid():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(STACKS_S)


def is_queued() -> bool:
    """Whether this process called `queue_outputs`."""
    return bool(_queued())


def end_process(code: object) -> NoReturn:
    """End the process as sys.exit(code) does, but without waiting for its threads or finalizing its objects."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()  # tinygrad's and others'
    exit_now(code or 0)


def _queued() -> list[QueuedOutput]:
    return [stream for stream in (sys.stderr, sys.stdout) if isinstance(stream, QueuedOutput)]


def show_stacks_on_usr1() -> None:
    """On SIGUSR1, write the stack of every thread to the log. The handler is in C, so that it works while the
    interpreter is busy; it writes to a pipe, whose reader must not make it wait."""
    global _stacks_pid
    if _stacks_pid == os.getpid() or not hasattr(signal, "SIGUSR1"):
        return
    _stacks_pid = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    faulthandler.register(signal.SIGUSR1, file=writer, all_threads=True)

    def copy() -> None:
        while data := os.read(reader, PIECE_BYTES):
            sys.stderr.write(data.decode(errors="replace"))

    threading.Thread(target=copy, name="tinyvllm-stacks", daemon=True).start()
