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
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from multiprocessing.connection import Connection
from typing import Any, Protocol

from tinyvllm.late_methods import make_methods_late
from tinyvllm.processes import adopt_orphans, die_with_parent, end_group, ignore_all_signals

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
_COLLECT_S = 0.1  # for a template, which may be busy, to collect a process that it has just forked


class LostJobError(Exception):
    """The process that ran the job has died, or could not be started."""


def prepare_early(initialize: str, function: str, argument: Any) -> None:
    """`CompileWorkers.prepare` for the one with this `initialize`, which may not exist yet."""
    if (pool := _pools.get(initialize)) is not None:
        pool.prepare(function, argument)
    elif HAS_TEMPLATES:
        _early.setdefault(initialize, _Template(initialize)).prepare(function, argument)


def end_unused(initialize: str) -> None:
    """End what `prepare_early` has started, unless jobs have come since."""
    if (template := _early.pop(initialize, None)) is not None:
        template.end()
    if (pool := _pools.get(initialize)) is not None and pool.is_idle:
        pool.terminate()


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
        self._template = _Template(initialize) if size > 1 and HAS_TEMPLATES else None
        if (early := _early.pop(initialize, None)) is not None:
            if self._template is None:
                early.end()
            else:
                self._template = early
        _pools[initialize] = self

    @property
    def is_idle(self) -> bool:
        """Whether there was no job since it was made or terminated."""
        return not self._workers

    def prepare(self, function: str, argument: Any) -> None:
        """Start to get ready for jobs: `function` ("module:function") of the argument imports what they need. Returns
        at once; errors are ignored, because what a job needs is imported then anyway."""
        if self._template is not None:
            self._template.prepare(function, argument)
            return
        for _ in range(self.size):
            self.submit(_call, (function, argument), -1)

    def submit(self, function: Callable[[Any], Any], argument: Any, urgency: int = 0, cost: int = 0) -> Job:
        """Run `function(argument)` in one of the processes. Of the jobs that wait, the one of the lowest `urgency` is
        next; among those the one of the highest `cost`, in any unit, and then the oldest."""
        job = Job(function, argument)
        with self._lock:
            if len(self._workers) < self.size:
                with contextlib.suppress(RuntimeError):  # no more threads: those that run do the work
                    self._workers.append(_Worker(self._jobs, self._initialize, self._template))
            if self._workers:
                self._jobs.put(job, urgency, cost)
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
            template = self._template
            if template is not None:  # for what comes after; no worker of before starts the old one again
                self._template = _Template(self._initialize)
        running = [worker for worker in workers if worker.pid is not None]
        for worker in workers:
            worker.end()
            jobs.put(None)
        if template is not None:
            _join(running, _END_S)
            _join(workers, _COLLECT_S)
            template.end()
        _join(workers, _END_S)
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
        self._queue: queue.PriorityQueue[tuple[int, int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def put(self, job: Job | None, urgency: int = 0, cost: int = 0) -> None:
        self._queue.put((urgency, -cost, next(self._numbers), job))

    def get(self, *, block: bool = True) -> Job | None:
        """Raises queue.Empty."""
        return self._queue.get(block)[-1]


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
            if HAS_TEMPLATES and isinstance(process, subprocess.Popen):
                end_group(process.pid)  # all of it if this is process 1
            process.kill()
            process.wait()


class _Process(Protocol):
    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


_FORK, _REAP = "fork", "reap"  # messages to a template; others are functions to call


class _Template:
    """A process that imports what the others need, and forks them. Started on demand, and again after its death, but
    not after `end`."""

    def __init__(self, initialize: str) -> None:
        self._initialize = initialize
        self._lock = threading.Lock()  # held from a message to its answer
        self._prepared: dict[str, Any] = {}  # the functions that each process calls first, with their arguments
        self._socket: socket.socket | None = None  # to the process
        self._start_lock = threading.Lock()  # never held for long
        self._has_ended = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def is_running(self) -> bool:
        process = self._process
        return process is not None and process.poll() is None

    def prepare(self, function: str, argument: Any) -> None:
        """Have it call a function once, before it forks; and one that follows after its death, too."""
        with self._lock, contextlib.suppress(OSError):
            server = self._started()
            if function not in self._prepared:
                self._prepared[function] = argument
                server.send(pickle.dumps((function, argument), protocol=5))

    def fork(self, fd: int) -> _Forked:
        """A process like one that `_start_process` starts. Raises OSError if there is none."""
        with self._lock:
            return _Forked(self._ask(self._started(), (_FORK, None), fd), self)

    def reap(self, pid: int) -> int:
        """Collect a process that was killed. Until then, no other process gets its id."""
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None and self.is_running():
                return self._ask(self._socket, (_REAP, pid))
        return 0  # with the template gone, the system collects it

    def end(self) -> None:
        """Kill it for good. From any thread: one that waits for an answer gets an error."""
        with self._start_lock:
            self._has_ended = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        with self._lock:
            self._close()

    def _ask(self, server: socket.socket, message: tuple[str, Any], *fds: int) -> int:
        socket.send_fds(server, [pickle.dumps(message, protocol=5)], fds)
        answer = server.recv(_MESSAGE_BYTES)
        if not answer:
            raise OSError("the template of the compiling processes is gone")
        result: int | OSError = pickle.loads(answer)
        if isinstance(result, OSError):
            raise result
        return result

    def _started(self) -> socket.socket:
        """Raises OSError if the system starts no more processes, and after `end`."""
        if self._socket is not None and self.is_running():
            return self._socket
        self._close()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            try:
                self._start(there.fileno())
            except BaseException:
                here.close()
                raise
        self._socket = here
        for task in self._prepared.items():
            here.send(pickle.dumps(task, protocol=5))
        return here

    def _start(self, fd: int) -> None:
        with self._start_lock:
            if self._has_ended:
                raise OSError("the compiling processes were ended")
            self._process = _start_on_own_thread("fork_on_demand", fd, self._initialize)

    def _close(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


# By what initializes their processes: templates that no CompileWorkers has yet, and the youngest CompileWorkers.
_early: dict[str, _Template] = {}
_pools: weakref.WeakValueDictionary[str, CompileWorkers] = weakref.WeakValueDictionary()


class _Forked:
    """A process that the template has forked."""

    def __init__(self, pid: int, template: _Template) -> None:
        """Raises OSError if it is gone."""
        self.pid = pid
        self._template = template
        self._pidfd = _open_pidfd(pid)

    def kill(self) -> None:
        """By its id only while the template keeps other processes from getting that."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif self._template.is_running():
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Once, after which it may not be killed."""
        if self._pidfd is not None:
            os.close(self._pidfd)
        return self._template.reap(self.pid)


def _open_pidfd(pid: int) -> int | None:
    """None where the system has none. Raises ProcessLookupError."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # an old kernel, a sandbox, or no more files
        return None


def _join(workers: Iterable[_Worker], timeout_s: float) -> None:
    """Wait for their threads, for this long in all."""
    end_s = time.monotonic() + timeout_s
    for worker in workers:
        worker.thread.join(max(0.0, end_s - time.monotonic()))


def _fail(job: Job, error: BaseException) -> None:
    """Nothing happens if the job was withdrawn or has its answer: other threads may be faster at any time."""
    with contextlib.suppress(InvalidStateError):
        job.answer.set_exception(error)


def _start_process(main: str, fd: int, initialize: str) -> subprocess.Popen[bytes]:
    """A process that runs `main` of this module."""
    program = _PROGRAM.replace("MAIN", main)
    command = [sys.executable, "-c", program, str(fd), str(os.getpid()), json.dumps(sys.path), initialize]
    return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)


def _start_on_own_thread(main: str, fd: int, initialize: str) -> subprocess.Popen[bytes]:
    """`_start_process` on a thread that lives as long as the process, because Linux kills the process when the thread
    ends that started it. Raises OSError."""
    started: Future[subprocess.Popen[bytes]] = Future()

    def start_and_stay() -> None:
        try:
            process = _start_process(main, fd, initialize)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        with contextlib.suppress(ChildProcessError):  # collected already
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    try:
        threading.Thread(target=start_and_stay, name="tinyvllm-template", daemon=True).start()
    except RuntimeError as error:
        raise OSError("this process may not start another thread") from error
    return started.result()


# ---- In the process ----


def fork_on_demand(fd: int, parent: int, initialize: str) -> None:
    """Answer the template's messages until its socket closes."""
    ignore_all_signals()
    die_with_parent(parent)
    adopt_orphans()
    make_methods_late()
    __import__(initialize.partition(":")[0])
    server, own = socket.socket(fileno=fd), os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(server, _MESSAGE_BYTES, 1)
        if not message:
            os._exit(0)
        what, argument = pickle.loads(message)
        if what == _REAP:
            end_group(argument)  # perhaps of a template before this one
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
    os.setpgid(0, 0)  # with the compilers that it starts, which are ended with it
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # another group than the terminal's may still write messages there
    die_with_parent(parent)
    make_methods_late()
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
