"""What processes of ours do about signals, and about the death of the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _existing(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


# Each stops a server: the first starts the drain, a second one ends it at once. SIGHUP comes from a terminal that
# closes, and SIGQUIT from Ctrl-\.
STOP_SIGNALS = _existing("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
# By default they end a process, and to us they mean nothing.
MEANINGLESS_SIGNALS = _existing(
    "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGPIPE", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGXFSZ"
)


def hears_stop(number: signal.Signals) -> bool:
    """Whether this signal is to stop the server. `nohup` and shells' background jobs start a process that ignores some
    of them."""
    return number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN


def ignore_meaningless_signals() -> None:
    """By a handler, not by SIG_IGN, which would pass to programs that this process starts."""
    for number in MEANINGLESS_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: None)


def ignore_all_signals() -> None:
    """For a process whose parent alone decides when it ends, by SIGKILL. Service managers send to every process the
    signal that stops the server."""
    for number in (*STOP_SIGNALS, *MEANINGLESS_SIGNALS, *_existing("SIGUSR1")):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when the thread that started it ends, even while a long call in C holds the
    interpreter. Does nothing on other systems, which have no such call. parent: the id of the process that started it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended a moment ago
            os._exit(1)
