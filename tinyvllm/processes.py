"""How our processes handle signals, the death of the process that started them, garbage, and limits of the system."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import sys

from tinyvllm.errors import TinyvllmError

MIN_ADDRESS_BYTES = 1 << 30  # of the server without a model; its libraries map much more than they use
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# New containers before a collection of the youngest, of those before one of the middle generation, and so on. With
# Python's defaults (700, 10, 10) a start collects 590 times: 11 % of its processor time, which frees next to nothing.
START_THRESHOLDS = (400_000, 20, 1000)


def _existing(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


# Each stops a server: the first starts the drain, a second one ends it at once. SIGHUP comes from a terminal that
# closes, and SIGQUIT from Ctrl-\.
STOP_SIGNALS = _existing("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
# These end a process by default, but have no meaning here.
MEANINGLESS_SIGNALS = _existing(
    "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGPIPE", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGXFSZ"
)


def hears_stop(number: signal.Signals) -> bool:
    """Whether this signal should stop the server. `nohup` and background jobs of shells start processes that ignore
    some of the signals."""
    return number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN


def ignore_meaningless_signals() -> None:
    """By a handler, not by SIG_IGN, which would pass to programs that this process starts."""
    for number in MEANINGLESS_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: None)


def ignore_all_signals() -> None:
    """For a process that only its parent ends, with SIGKILL. Service managers send the signal that stops the server to
    every process."""
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


def adopt_orphans() -> None:
    """Have Linux make this process the parent of what its children leave behind, rather than process 1, which in a
    container may be a server that collects none of them. Does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_group(pid: int) -> None:
    """Kill and collect a child and its group, as far as this process has adopted that. Nothing happens if it is no
    child of this process: its id may be another's now. Linux only."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # then its children are orphans
        with contextlib.suppress(ProcessLookupError):  # it ended before it had a group
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while True:
            os.waitpid(-pid, 0)


def collect_rarely() -> None:
    """Called first in a process that imports, loads or traces: hardly anything that it makes is garbage. Servers set
    other thresholds once they are ready (`engine/heap.py`)."""
    gc.set_threshold(*START_THRESHOLDS)


def require_memory_limit() -> None:
    """Raise TinyvllmError if this process may not map the memory that the server's libraries need: they would abort."""
    try:
        import resource  # here: not every system has it
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_BYTES:
        raise TinyvllmError(
            f"this process may map {limit >> 20} MiB of memory, but needs {MIN_ADDRESS_BYTES >> 20} MiB besides the "
            "model: raise the limit (ulimit -v)"
        )


def explain_limit(error: BaseException) -> str | None:
    """The remedy for an error that means that this process has reached a limit of the system; None for other errors."""
    text = (str(error).strip().splitlines() or [""])[-1]  # NumPy's has forty, and the last one is the cause
    number = error.errno if isinstance(error, OSError) else None
    is_unmapped = isinstance(error, ImportError) and ("failed to map" in text or "cannot allocate" in text.lower())
    if isinstance(error, MemoryError) or number == errno.ENOMEM or is_unmapped:
        lack, remedy = "gets no more memory", "free some, or raise the limit (ulimit -v, or a container's)"
    elif number == errno.EAGAIN or (isinstance(error, RuntimeError) and "start new thread" in text):
        lack, remedy = "may start no more threads or processes", "end some, or raise the limits (ulimit -u, ulimit -v)"
    elif number in (errno.EMFILE, errno.ENFILE):
        lack, remedy = "may open no more files", "raise the limit (ulimit -n)"
    else:
        return None
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"this process {lack} ({what}): {remedy}"
