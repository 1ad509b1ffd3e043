"""Who holds the interpreter lock when a probe has to wait for it.

CPython does not report it. But the thread that held the lock used the processor while the probe waited, and its Python
code advanced: so of the threads that used the processor, the one whose Python code advanced is the holder. A thread
that stayed within one C call used the processor with the lock (a regular expression) or without it (hashing, a kernel
on the CPU); it counts only if no thread's Python code advanced. py-spy decides by the same signs, from outside.
"""

from __future__ import annotations

import dis
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import CodeType

MIN_USE_SHARE = 0.05  # of the wait: a holder uses the processor, unless it waits for a core itself
MAX_SHOWN = 5
_IN_CALL = frozenset(code for name, code in dis.opmap.items() if name.startswith("CALL"))


@dataclass(frozen=True)
class Holder:
    """A function of a thread that held the lock while probes waited."""

    thread: str
    where: str  # function (file:line)
    num_probes: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where one thread was at a moment."""

    name: str
    code: CodeType
    last_instruction: int
    line: int
    cpu_ns: int | None  # None where a thread's clock cannot be read by another

    @property
    def where(self) -> str:
        return f"{self.code.co_qualname} ({PurePath(self.code.co_filename).name}:{self.line})"

    @property
    def is_in_call(self) -> bool:
        """Whether the thread is inside a C function: a Python function would have a frame of its own."""
        return self.code.co_code[self.last_instruction] in _IN_CALL

    def has_moved(self, before: Sighting) -> bool:
        return (
            (self.code, self.last_instruction) != (before.code, before.last_instruction)
            or not self.is_in_call  # in a loop, which has come around
        )


def sight_threads() -> dict[int, Sighting]:
    """Where the other Python threads are now, by the system's thread id. The caller must hold the lock, as Python code
    always does."""
    own, frames, sightings = threading.get_ident(), sys._current_frames(), {}
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.native_id is None or thread.ident == own:
            continue
        cpu_ns = _cpu_ns(thread.native_id)
        sightings[thread.native_id] = Sighting(thread.name, frame.f_code, frame.f_lasti, frame.f_lineno, cpu_ns)
    return sightings


def find_holder(before: dict[int, Sighting], after: dict[int, Sighting], waited_ns: int) -> Sighting | None:
    """The likeliest holder while a probe waited, from the threads before it slept and after it got the lock."""
    best, best_rank = None, (False, 0)
    for thread_id, now in after.items():
        earlier = before.get(thread_id)
        if earlier is None:  # it has just started
            continue
        used_ns = waited_ns if now.cpu_ns is None or earlier.cpu_ns is None else now.cpu_ns - earlier.cpu_ns
        has_moved = now.has_moved(earlier)
        if used_ns < MIN_USE_SHARE * waited_ns or (now.cpu_ns is None and not has_moved):
            continue
        if best is None or (has_moved, used_ns) > best_rank:
            best, best_rank = now, (has_moved, used_ns)
    return best


def count_holders(found: Iterable[Sighting | None]) -> tuple[Holder, ...]:
    """The functions that were found most often, at most MAX_SHOWN; each with the line that was found last."""
    counts: Counter[tuple[str, CodeType]] = Counter()
    latest: dict[tuple[str, CodeType], Sighting] = {}
    for sighting in found:
        if sighting is not None:
            key = (sighting.name, sighting.code)
            counts[key] += 1
            latest[key] = sighting
    return tuple(Holder(key[0], latest[key].where, count) for key, count in counts.most_common(MAX_SHOWN))


def holders_by_thread(holders: Sequence[Holder]) -> list[tuple[str, int]]:
    """Threads, and the number of probes in which each held the lock, the highest first."""
    counts: Counter[str] = Counter()
    for holder in holders:
        counts[holder.thread] += holder.num_probes
    return counts.most_common()


def _cpu_ns(thread_id: int) -> int | None:
    """A thread's processor time. Linux makes the clock's number of the thread's (`clock_getcpuclockid(3)`), so that one
    that has just ended is an error; `pthread_getcpuclockid` would read its memory."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime_ns((~thread_id << 3) | 6)
    except OSError:
        return None
