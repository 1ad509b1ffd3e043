"""Processes that trace steps and compile kernels, each with a pipe of its own, so that the death of one affects its own
job only.

multiprocessing.Pool shares a lock between its processes: one that dies while it holds the lock blocks all others, and
the pool waits forever for the job of a dead process. Here a dead process closes its pipe, which ends its job at once.

On Linux several of them are forked by a template, a process that has imported what they need. Else each would import it
for itself, which takes two seconds of processor time. (macOS allows no fork after its frameworks are loaded.)

The processes never outlive this one. Linux kills them when the thread that started them ends, whatever ended it;
elsewhere they end when their pipe closes. They ignore the signals that stop a server, because service managers send
these to every process, and a server still compiles while it drains.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from multiprocessing.connection import Connection
from typing import Any, Protocol

from tinyvllm.processes import die_with_parent, ignore_all_signals

# Runs in the new process, whose modules are found where this one's are.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from tinyvllm.device.compile_workers import MAIN
MAIN(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4])
"""
_MESSAGE_BYTES = 1 << 16  # at most, of a message to the template
BEGIN_WORKER = "tinyvllm.device.compiling:begin_worker"  # here, because whoever begins early has not imported tinygrad
HAS_TEMPLATES = sys.platform == "linux"
_END_S = 1.0  # for a killed process to be gone, which takes milliseconds


class LostJobError(Exception):
    """The process that ran the job has died, or could not be started."""


def prepare_early(initialize: str, function: str, argument: Any) -> None:
    """`CompileWorkers.prepare` for the next one with this `initialize`, before it exists."""
    if HAS_TEMPLATES and initialize not in _early:
        _early[initialize] = _Template(initialize)
        _early[initialize].prepare(function, argument)


class Job:
    """A call in another process."""

    def __init__(self, function: Callable[[Any], Any], argument: Any) -> None:
        self.function = function
        self.argument = argument
        self.answer: Future[bytes] = Future()  # pickled: (has_failed, value); LostJobError if there is none

    def is_done(self) -> bool:
        return self.answer.done()

    def withdraw(self) -> bool:
        """Keep it from being run. False if a process has begun it."""
        return self.answer.cancel()

    def result(self, timeout_s: float | None = None) -> Any:
        """The call's value, unpickled on the caller's thread, because tinygrad's caches are not thread-safe.

        Raises what the call raised, LostJobError, and TimeoutError."""
        has_failed, value = pickle.loads(self.answer.result(timeout_s))
        if has_failed:
            raise value
        return value


class CompileWorkers:
    """Owns up to `size` processes, which are started on demand. May be used again after `terminate`."""

    def __init__(self, size: int, initialize: str) -> None:
        """initialize: "module:function", which each process calls first."""
        self.size = size
        self._initialize = initialize
        self._lock = threading.Lock()
        self._jobs = _Jobs()
        self._workers: list[_Worker] = []
        self._template = _early.pop(initialize, None) or _Template(initialize) if size > 1 and HAS_TEMPLATES else None

    def prepare(self, function: str, argument: Any) -> None:
        """Start to get ready for jobs: `function` ("module:function") of the argument imports what they need. Returns
        at once; errors are ignored, because what a job needs is imported then anyway."""
        if self._template is not None:
            self._template.prepare(function, argument)
            return
        for _ in range(self.size):
            self.submit(_call, (function, argument), -1)

    def submit(self, function: Callable[[Any], Any], argument: Any, urgency: int = 0) -> Job:
        """Run `function(argument)` in one of the processes. Of the jobs that wait, the one of the lowest `urgency`, and
        among those the oldest, is next."""
        job = Job(function, argument)
        with self._lock:
            if len(self._workers) < self.size:
                with contextlib.suppress(RuntimeError):  # no more threads: those that run do the work
                    self._workers.append(_Worker(self._jobs, self._initialize, self._template))
            if self._workers:
                self._jobs.put(job, urgency)
            else:
                job.answer.set_exception(LostJobError("this process may not start another thread"))
        return job

    def imap_unordered(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        """Each call's value, in the order in which they are ready; a lost one is repeated in this process.

        Has the name of multiprocessing.Pool's method, for tinygrad, which uses this object as its pool."""
        pending = {job.answer: job for job in [self.submit(function, argument) for argument in arguments]}
        while pending:
            for answer in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(answer)
                try:
                    value = job.result()
                except LostJobError:
                    value = function(job.argument)
                yield value

    def terminate(self) -> None:
        """Kill the processes. Unfinished jobs are lost."""
        with self._lock:
            workers, self._workers = self._workers, []
            jobs, self._jobs = self._jobs, _Jobs()
        for worker in workers:
            worker.end()
            jobs.put(None, 0)
        for worker in workers:
            worker.thread.join(_END_S)
        if self._template is not None:
            self._template.end()
        with contextlib.suppress(queue.Empty):
            while True:
                job = jobs.get(block=False)
                if job is not None:
                    _fail(job, LostJobError("the compiling processes were ended"))

    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [worker.pid for worker in list(self._workers) if worker.pid is not None]


class _Jobs:
    """Jobs that wait. None ends the thread that gets it."""

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def put(self, job: Job | None, urgency: int) -> None:
        self._queue.put((urgency, next(self._numbers), job))

    def get(self, *, block: bool = True) -> Job | None:
        """Raises queue.Empty."""
        return self._queue.get(block)[2]


class _Worker:
    """A process, started at its first job, and started again after its death; and the thread that waits for it."""

    def __init__(self, jobs: _Jobs, initialize: str, template: _Template | None) -> None:
        """Raises RuntimeError if the system starts no more threads."""
        self._jobs = jobs
        self._initialize = initialize
        self._template = template
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._connection: Connection | None = None
        self._has_ended = False
        # a daemon: it may wait for a compiler when this process ends, which kills the compiler
        self.thread = threading.Thread(target=self._run, name="tinyvllm-compile", daemon=True)
        self.thread.start()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def end(self) -> None:
        """Kill the process. From any thread."""
        with self._lock:
            self._has_ended = True
            if self._process is not None:
                self._process.kill()

    def _run(self) -> None:
        while not self._has_ended and (job := self._jobs.get()) is not None:
            try:
                self._do(job)
            except BaseException as error:  # whatever it is, the caller must not wait for this job
                self._discard()
                _fail(job, error)
        self._discard()

    def _do(self, job: Job) -> None:
        """Get the process's answer. Raises LostJobError, and what pickling raises."""
        message = pickle.dumps((job.function, job.argument), protocol=5)
        try:
            connection = self._connection or self._start()
            if job.answer.set_running_or_notify_cancel():  # it may be withdrawn until now: a start takes a second
                connection.send_bytes(message)
                job.answer.set_result(connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise LostJobError(f"a compiling process is gone: {error or 'it has closed its pipe'}") from error

    def _start(self) -> Connection:
        """Start a process, and wait until it takes jobs. Raises OSError if the system starts no more, and EOFError if
        the process ends at once."""
        here, there = socket.socketpair()
        with there:
            try:
                forked = None if self._template is None else self._template.fork(there.fileno())
                with self._lock:
                    self._process = forked or _start_process("main", there.fileno(), self._initialize)
                    if self._has_ended:
                        self._process.kill()
                        raise LostJobError("the compiling processes were ended")
            except BaseException:
                here.close()
                raise
        self._connection = Connection(here.detach())
        self._connection.recv_bytes()
        return self._connection

    def _discard(self) -> None:
        """Close the pipe, and collect the process."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class _Process(Protocol):
    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


_FORK, _REAP = "fork", "reap"  # messages to a template; others are functions to call


class _Template:
    """A process that imports what the others need, and forks them. Started on demand, and again after its death."""

    def __init__(self, initialize: str) -> None:
        self._initialize = initialize
        self._lock = threading.Lock()
        self._prepared: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # to the process

    def prepare(self, function: str, argument: Any) -> None:
        """Have it call a function once, before it forks."""
        with self._lock, contextlib.suppress(OSError):
            if function not in self._prepared:
                self._started().send(pickle.dumps((function, argument), protocol=5))
                self._prepared.add(function)

    def fork(self, fd: int) -> _Forked:
        """A process like one that `_start_process` starts. Raises OSError if there is none."""
        with self._lock:
            return _Forked(self._ask((_FORK, None), fd), self)

    def reap(self, pid: int) -> int:
        """Collect a process that was killed. Until then, no other process gets its id."""
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None and self._process.poll() is None:
                return self._ask((_REAP, pid))
        return 0  # with the template gone, the system collects it

    def end(self) -> None:
        """Kill it. From any thread: one that waits for an answer gets an error."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            with self._lock:
                if self._socket is not None and self._process is process:
                    self._socket.close()

    def _ask(self, message: tuple[str, Any], *fds: int) -> int:
        server = self._started()
        socket.send_fds(server, [pickle.dumps(message, protocol=5)], fds)
        answer = server.recv(_MESSAGE_BYTES)
        if not answer:
            raise OSError("the template of the compiling processes is gone")
        result: int | OSError = pickle.loads(answer)
        if isinstance(result, OSError):
            raise result
        return result

    def _started(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        if self._socket is not None:
            self._socket.close()
        self._prepared.clear()
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = _start_process("fork_on_demand", there.fileno(), self._initialize)
        return self._socket


_early: dict[str, _Template] = {}  # by what initializes their processes: those that no CompileWorkers has yet


class _Forked:
    """A process that the template has forked."""

    def __init__(self, pid: int, template: _Template) -> None:
        self.pid = pid
        self._template = template

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return self._template.reap(self.pid)


def _fail(job: Job, error: BaseException) -> None:
    """Nothing happens if the job was withdrawn or has its answer: other threads may be faster at any time."""
    with contextlib.suppress(InvalidStateError):
        job.answer.set_exception(error)


def _start_process(main: str, fd: int, initialize: str) -> subprocess.Popen[bytes]:
    """A process that runs `main` of this module."""
    program = _PROGRAM.replace("MAIN", main)
    command = [sys.executable, "-c", program, str(fd), str(os.getpid()), json.dumps(sys.path), initialize]
    return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)


# ---- In the process ----


def fork_on_demand(fd: int, parent: int, initialize: str) -> None:
    """Answer the template's messages until its socket closes."""
    ignore_all_signals()
    die_with_parent(parent)
    __import__(initialize.partition(":")[0])
    server, own = socket.socket(fileno=fd), os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(server, _MESSAGE_BYTES, 1)
        if not message:
            os._exit(0)
        what, argument = pickle.loads(message)
        if what == _REAP:
            with contextlib.suppress(ChildProcessError):  # of a template before this one
                os.waitpid(argument, 0)
            server.send(pickle.dumps(0))
        elif what != _FORK:
            with contextlib.suppress(Exception):
                _call((what, argument))
        else:
            gc.freeze()  # what is there now is shared, and never searched for cycles
            try:
                answer: int | OSError = os.fork()
            except OSError as error:
                answer = error
            if answer == 0:
                server.close()
                main(fds[0], own, initialize)
            os.close(fds[0])
            server.send(pickle.dumps(answer))


def main(fd: int, parent: int, initialize: str) -> None:
    """Answer jobs until the pipe closes."""
    ignore_all_signals()
    die_with_parent(parent)
    _find(initialize)()
    connection = Connection(fd)
    try:
        connection.send_bytes(b"ready")
    except OSError:
        os._exit(0)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        answer = _answer(jobs.get())
        try:
            connection.send_bytes(answer)
        except OSError:
            os._exit(0)


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(__import__(module, fromlist=[function]), function)
    return found


def _call(task: tuple[str, Any]) -> None:
    function, argument = task
    _find(function)(argument)


def _receive(connection: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    """On a thread of its own, so that the process ends with its parent even while it compiles."""
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (OSError, EOFError):
        os._exit(0)


def _answer(message: bytes) -> bytes:
    try:
        function, argument = pickle.loads(message)
        return pickle.dumps((False, function(argument)), protocol=5)
    except Exception as error:
        error.add_note(f"in a compiling process:\n{traceback.format_exc()}")
        try:
            pickle.loads(answer := pickle.dumps((True, error), protocol=5))
        except Exception:  # an error that cannot be pickled
            answer = pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")), protocol=5)
        return answer
