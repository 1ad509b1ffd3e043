"""Fault injection: named points at which a plan makes something fail, so that tests can check what is left afterwards.

A point is one line, `reach("engine.launch")`, at a place where real machines fail: memory is exhausted, a disk is full,
a device or a process dies. Without a plan the line costs a call and a comparison, about 0.1 us. A plan says which point
fails, at which occurrence, and how. A test sets it in its own process (`planned`); other processes inherit it in an
environment variable (`environment`), and read it when they import this module.

POINTS is the list of all points: `reach` refuses a name that is not in it while a plan is set. A point's `ends` says
what a failure there may end, and tests/faults checks that it ends nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "TINYVLLM_FAULTS"  # a plan as JSON, for child processes

# What a failure at a point ends, from nothing to everything. Whatever ends gets a reason.
NOTHING, REQUEST, STEP, CLIENT, PROCESS, ENGINE, START = (
    "nothing",  # the work can be left out or done in another way: the log has a line
    "request",  # the one request that it concerns
    "step",  # the requests of the steps in flight; the next step may succeed
    "client",  # the requests of one front-end, whose messages were lost
    "process",  # that process and its requests; the supervisor starts it again
    "engine",  # all requests: the engine is declared dead, and readiness fails
    "start",  # the start, with an error message
)


@dataclass(frozen=True)
class Point:
    """stands_for: the operation that fails there. ends: the most that a failure there may end."""

    stands_for: str
    ends: str


POINTS: dict[str, Point] = {
    # -- the step loop --
    "engine.receive": Point("a client's message is handled", REQUEST),
    "engine.schedule": Point("the next step is planned", STEP),
    "engine.launch": Point("a planned step is handed to the runner", STEP),
    "engine.sample": Point("deferred sampling is enqueued", STEP),
    "engine.collect": Point("a step's tokens are awaited", STEP),
    "engine.commit": Point("a step's tokens are appended to their requests", STEP),
    "engine.deliver": Point("a client is sent its part of a step", CLIENT),
    "hop.submit": Point("a front-end sends a call to an engine", REQUEST),
    "hop.abort": Point("a front-end tells an engine of an aborted call", NOTHING),
    "hop.take": Point("an engine process reads a front-end's message", CLIENT),
    "hop.reply": Point("an engine process writes a message to a front-end", CLIENT),
    "hop.read": Point("a front-end process reads an engine's message", CLIENT),
    "hop.arrive": Point("a client of the engine handles its message", CLIENT),
    # -- the pool --
    "pool.match": Point("a prompt's prefix is looked up in the cache", STEP),
    "pool.grow": Point("a block is allocated", STEP),
    "pool.seal": Point("a full block is made findable", STEP),
    "pool.free": Point("an ended request's blocks are freed", ENGINE),
    "state.move": Point("a sequence moves to another slot of recurrent state", STEP),
    "state.seal": Point("a checkpoint of a recurrent state is made findable", STEP),
    # -- the device --
    "device.allocate": Point("memory of the device is allocated, for weights, the pool or a graph", START),
    "device.copy_in": Point("bytes are copied to the device: weights, a step's inputs, sampling state", STEP),
    "device.run": Point("a captured graph is enqueued", STEP),
    "device.copy_out": Point("a step's output is read back", STEP),
    "device.logits": Point("the logits of a sequence are not finite", REQUEST),
    "device.pool": Point("the hidden states of a prompt are read back and pooled", STEP),
    "adapter.write": Point("an adapter is written to a slot of the device", STEP),
    "runner.pack": Point("a plan is packed into a graph's inputs", STEP),
    "runner.capture": Point("a graph is captured while the engine serves", NOTHING),
    "trace.worker": Point("a step is traced in another process", NOTHING),
    "compile.begin": Point("a kernel, or a step to trace, is handed to a compiling process", NOTHING),
    "compile.worker": Point("a kernel is compiled in another process", NOTHING),
    "compile.here": Point("a kernel is compiled in this process", START),
    "cache.open": Point("the folder of compiled programs is opened", NOTHING),
    "cache.read": Point("a compiled program or a recorded step is read from disk", NOTHING),
    "cache.write": Point("a compiled program or a recorded step is written to disk", NOTHING),
    # -- the tiers below the pool --
    "tier.allocate": Point("host memory for copies of blocks is allocated", NOTHING),
    "tier.copy_out": Point("blocks are copied from the device to host memory", NOTHING),
    "tier.copy_in": Point("blocks are copied from host memory to the device", STEP),
    "tier.open": Point("the folder of blocks on disk is opened", NOTHING),
    "tier.read": Point("a block is read from disk", NOTHING),
    "tier.write": Point("a block is written to disk", NOTHING),
    # -- processes and files --
    "process.start": Point("a process of the server is started: at first, or again after its death", START),
    "control.tell": Point("the supervisor writes to a process", PROCESS),
    "control.hear": Point("the supervisor reads what a process has written", PROCESS),
    "control.send": Point("a process writes to the supervisor", PROCESS),
    "control.handle": Point("a process does what the supervisor says", NOTHING),
    "disk.pids": Point("the list of the server's processes is written", NOTHING),
    "disk.recording": Point("a process writes its recording for another to read", NOTHING),
    "disk.batch": Point("an answer of run-batch is written", START),
    # -- text --
    "text.encode": Point("a text is tokenized", REQUEST),
    "text.render": Point("a conversation is rendered by the chat template", REQUEST),
    "text.detokenize": Point("a token becomes text", REQUEST),
    "grammar.compile": Point("a grammar is compiled", REQUEST),
    "grammar.mask": Point("the tokens that a grammar allows are computed", REQUEST),
    "grammar.accept": Point("a grammar is advanced by a token", REQUEST),
    "beam.round": Point("beams are extended by a token", REQUEST),
}


@dataclass(frozen=True)
class Fault:
    """A failure at `point`, at its occurrences `at`, `at` + 1, ... `at` + `times` - 1, counted from 1 in each process.

    how: `os` (OSError, as for a full disk), `memory` (MemoryError), `device` (RuntimeError, as tinygrad raises it),
    `exit` (the process is killed), `delay` (it takes `delay_s` seconds), `nan` (the numbers are not finite).
    """

    point: str
    how: str = "device"
    at: int = 1
    times: int = 1
    delay_s: float = 0.0


HOWS = ("os", "memory", "device", "exit", "delay", "nan")


class Plan:
    """Owns the counts of the points that were reached. May be used from any thread.

    marks: a folder in which each fault leaves an empty file when it happens. With it a fault happens `times` times in
    all processes together, so that a restarted process does not fail again."""

    def __init__(self, faults: Sequence[Fault] = (), marks: str | None = None) -> None:
        for fault in faults:
            if fault.point not in POINTS or fault.how not in HOWS:
                raise ValueError(f"{fault} names no point or no way to fail: known are {', '.join(POINTS)}; {HOWS}")
        self.faults, self.marks = tuple(faults), marks
        self.reached: Counter[str] = Counter()
        self.happened: list[Fault] = []
        self._by_point: dict[str, list[Fault]] = {}
        for fault in self.faults:
            self._by_point.setdefault(fault.point, []).append(fault)
        self._lock = threading.Lock()

    def due(self, point: str) -> Fault | None:
        """Count an occurrence of `point`; the fault that happens at it, if any."""
        if point not in POINTS:
            raise ValueError(f"faults.POINTS has no point {point!r}")
        with self._lock:
            self.reached[point] += 1
            number = self.reached[point]
            for fault in self._by_point.get(point, ()):
                if fault.at <= number < fault.at + fault.times and self._is_first(fault, number):
                    self.happened.append(fault)
                    return fault
        return None

    def _is_first(self, fault: Fault, number: int) -> bool:
        """Leave a mark. Returns False if another process already left it."""
        if self.marks is None:
            return True
        name = f"{fault.point} {fault.how} {number}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(os.path.join(self.marks, name), os.O_CREAT | os.O_EXCL, 0o600))
            return True
        return False

    def encode(self) -> str:
        return json.dumps({"faults": [asdict(fault) for fault in self.faults], "marks": self.marks})

    @classmethod
    def decode(cls, text: str) -> Plan:
        fields = json.loads(text)
        return cls([Fault(**fault) for fault in fields["faults"]], fields["marks"])


def _inherited() -> Plan | None:
    text = os.environ.get(VARIABLE)
    return Plan.decode(text) if text else None


_plan: Plan | None = _inherited()


def reach(point: str) -> None:
    """Fail here if the plan says so: raises OSError, MemoryError or RuntimeError, waits, or ends the process."""
    if _plan is not None:
        fault = _plan.due(point)
        if fault is not None:
            _happen(fault)


def is_poisoned(point: str) -> bool:
    """As `reach`. Returns whether the plan makes the numbers here non-finite."""
    if _plan is None:
        return False
    fault = _plan.due(point)
    if fault is not None:
        _happen(fault)
    return fault is not None and fault.how == "nan"


def _happen(fault: Fault) -> None:
    match fault.how:
        case "os":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (planned at {fault.point})")
        case "memory":
            raise MemoryError(f"planned at {fault.point}")
        case "device":
            raise RuntimeError(f"planned at {fault.point}")
        case "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        case "delay":
            time.sleep(fault.delay_s)


@contextlib.contextmanager
def planned(*faults: Fault) -> Iterator[Plan]:
    """Set a plan in this process, for the block only. Without faults it counts the points that are reached."""
    global _plan
    earlier, _plan = _plan, Plan(faults)
    try:
        yield _plan
    finally:
        _plan = earlier


def environment(marks: Path, *faults: Fault) -> dict[str, str]:
    """The environment variable that sets a plan in child processes. marks: an existing folder; see `Plan`."""
    return {VARIABLE: Plan(faults, str(marks)).encode()}
