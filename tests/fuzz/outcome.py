"""Run a loader on damaged files, in a process of its own, under limits of time and memory.

A file may end the process (an abort inside a library), hang it or fill its memory; a fuzzer has to survive that and say
which file it was. `Runner` starts the child again after each death.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from tinyvllm.errors import TinyvllmError

Kind = Literal["ok", "refused", "uncaught", "slow", "died", "memory"]
FAULTS: tuple[Kind, ...] = ("uncaught", "slow", "died", "memory")
Loader = Callable[[Path], object]

CPU_S = 2.0  # of one case; the processor's time, since the machine may be busy with other work
START_S = 300.0  # imports take minutes on a machine that does much else
WALL_S = 120.0  # for a case that waits instead: a pipe, a lock
MEMORY_BYTES = 256 << 20  # of address space for a case beside `MEMORY_PER_BYTE` of its files
MEMORY_PER_BYTE = 40  # a uint16 of an array becomes an int (28 bytes) and a pointer to it (8)


@dataclass(frozen=True)
class Outcome:
    """How a loader ended on one case. `detail`: the error's message, or where an uncaught one came from."""

    kind: Kind
    detail: str = ""
    cpu_s: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS


class Runner:
    """Owns a child process that runs `load`, a function of a module, on one path after another.

    `load` may raise TinyvllmError, which is a refusal; every other exception is a fault.
    """

    def __init__(self, load: Loader, *, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._load = load
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._child: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection
        self._stderr = TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by `close`

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, path: Path) -> Outcome:
        """Load one file or directory. Names must not repeat: readers may remember a file by its path and size."""
        child = self._start()
        self._connection.send((path, self._memory_bytes + MEMORY_PER_BYTE * _num_bytes(path)))
        if not self._connection.poll(WALL_S):
            os.kill(child.pid or 0, signal.SIGABRT)  # faulthandler writes where it waits
            self._ended()
            return Outcome("slow", f"waited for {WALL_S:g} s: {self._last_words()}")
        try:
            outcome: Outcome = self._connection.recv()
        except EOFError:
            code = self._ended()
            kind: Kind = "slow" if code == -signal.SIGPROF else "died"
            return Outcome(kind, f"exit status {code}: {self._last_words()}", self._cpu_s)
        return outcome

    def close(self) -> None:
        if self._child is not None:
            self._connection.close()  # the child's loop ends
            self._child.join(10)
            self._child.kill()
        self._stderr.close()

    def _start(self) -> multiprocessing.process.BaseProcess:
        if self._child is None:
            self._stderr.truncate(0)
            context = multiprocessing.get_context("spawn")  # a fork would share threads' locks and tinygrad's state
            self._connection, its_end = context.Pipe()
            with _redirected_stderr(self._stderr.fileno()):
                self._child = context.Process(target=_serve, args=(its_end, self._load, self._cpu_s), daemon=True)
                self._child.start()
            its_end.close()
            assert self._connection.poll(START_S), f"the child has not started within {START_S:g} s"
            self._connection.recv()  # it has imported what it needs, which counts for no case
        return self._child

    def _ended(self) -> int:
        assert self._child is not None, "there is no child"
        self._child.join(10)
        self._child.kill()
        self._child.join()
        code = self._child.exitcode or 0
        self._child = None
        self._connection.close()
        return code

    def _last_words(self) -> str:
        """What the child wrote before it ended: a panic's message, or faulthandler's traceback."""
        self._stderr.seek(0)
        return self._stderr.read()[-2000:].decode(errors="replace")


@contextlib.contextmanager
def _redirected_stderr(descriptor: int) -> Iterator[None]:
    """Children that start here inherit `descriptor` as their stderr."""
    own = os.dup(2)
    try:
        os.dup2(descriptor, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _num_bytes(path: Path) -> int:
    """Of a file, or of all files in a directory; a pipe or a device has none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# --- In the child ------------------------------------------------------------------------------------------------


def _serve(connection: Connection, load: Loader, cpu_s: float) -> None:
    faulthandler.enable()
    # after the traceback, the signal's default action: it ends the process in whatever library it is
    faulthandler.register(signal.SIGPROF, all_threads=False, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        try:
            path, memory_bytes = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(load, path, cpu_s, memory_bytes))


def _attempt(load: Loader, path: Path, limit_s: float, memory_bytes: int) -> Outcome:
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory_bytes, hard_limit))
    signal.setitimer(signal.ITIMER_PROF, 2 * limit_s)
    begin = time.process_time()
    try:
        load(path)
        kind, detail = "ok", ""
    except TinyvllmError as error:
        kind, detail = "refused", str(error)
    except MemoryError:
        kind, detail = "memory", _where()
    except BaseException:  # panics of Rust libraries are no Exception
        kind, detail = "uncaught", _where()
    cpu_s = time.process_time() - begin
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (hard_limit, hard_limit))
    if cpu_s > limit_s and kind in ("ok", "refused"):
        kind, detail = "slow", f"{cpu_s:.1f} s, then {kind} {detail}"
    return Outcome(kind, detail, cpu_s)  # type: ignore[arg-type]


def _address_space() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _where() -> str:
    """The exception that is being handled: its last line, and the frames in our own package."""
    kind, error, trace = sys.exc_info()
    frames = [frame for frame in traceback.extract_tb(trace) if "tinyvllm" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-4:]]
    return f"{kind.__name__ if kind else ''}: {str(error)[:300]} at {' > '.join(places)}"


# --- Reports -----------------------------------------------------------------------------------------------------


def run_cases(load: Loader, cases: Iterable[tuple[str, Path]], *, shown: int = 20) -> Counter[str]:
    """Run all cases, (name, path); returns how many ended in each way. Fails with the first `shown` faults' names."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with Runner(load) as runner:
        for name, path in cases:
            outcome = runner.run(path)
            counts[outcome.kind] += 1
            if outcome.is_fault:
                faults.append(f"{name}: {outcome.kind}: {outcome.detail}")
    assert not faults, f"{len(faults)} faults of {counts.total()} cases {dict(counts)}:\n" + "\n".join(faults[:shown])
    return counts
