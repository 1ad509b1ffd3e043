"""Tracing steps and compiling kernels to programs in other processes, while this one continues."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygrad import Device, UOp
from tinygrad.codegen import do_to_program, to_program_cache, to_program_context, to_program_key
from tinygrad.device import Compiler as TinygradCompiler
from tinygrad.engine import worker
from tinygrad.engine.realize import _compile_kernel, pm_optimize_local_size
from tinygrad.helpers import BEAM, PARALLEL, Context, Target, getenv
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import CallInfo, Ops, graph_rewrite

from tinyvllm.device.clang_flags import use_fewer_copies
from tinyvllm.device.clang_server import use_servers
from tinyvllm.device.compile_workers import BEGIN_WORKER, CompileWorkers, Job, LostJobError, end_unused
from tinyvllm.device.disk_cache import share_disk_cache
from tinyvllm.device.program_store import ProgramStore, slim
from tinyvllm.device.rewriting import rewrite_faster
from tinyvllm.faults import reach
from tinyvllm.processes import collect_rarely

WORKER_NICENESS = 5
LOST_S = 300.0  # what takes longer is done in this process: the other may have been stopped
MOST_WORKERS = 16  # each takes 150 to 250 MB; a model's kernels keep no more of them busy

logger = logging.getLogger(__name__)
Kernel = tuple[UOp, str]  # a SINK, and the device that it is for
Task = tuple[int, tuple[UOp, Any], dict[str, Any]]  # tinygrad's argument of _compile_kernel
Key = tuple[Any, ...]  # tinygrad's key of a kernel and of all settings that affect its program


class Pending:
    """What another process is doing. `what`: what to call it in messages."""

    def __init__(self, job: Job, what: str) -> None:
        self._job = job
        self._what = what
        self._begun_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._job.is_done() or self._left_s <= 0

    @property
    def _left_s(self) -> float:
        return self._begun_s + LOST_S - time.monotonic()

    def withdraw(self) -> bool:
        """Keep it from being done. False if a process has begun it."""
        return self._job.withdraw()

    def wait(self) -> Any:
        """The result, or None if it was lost, as when its process was killed (by the OOM killer, say), or failed: what
        is not that process's own trouble fails again where it is done next."""
        try:
            return self._job.result(max(0.0, self._left_s))
        except Exception as error:
            if not isinstance(error, (LostJobError, TimeoutError)):
                logger.warning("a compiling process failed: %s: %s", type(error).__name__, error)
            logger.warning("a compiling process lost %s, which is done here", self._what)
            return None


@dataclass(frozen=True)
class PackedKernel:
    """A kernel that another process traced: a pickled SINK, which is read where it is compiled."""

    name: str
    device: str
    sink: bytes

    @classmethod
    def of(cls, kernel: Kernel) -> PackedKernel:
        sink, device = kernel
        return cls(sink.arg.name, device, pickle.dumps(sink, protocol=5))

    def unpack(self) -> Kernel:
        return pickle.loads(self.sink), self.device


@dataclass(frozen=True)
class _Begun:
    """A kernel that is being compiled. pending: None if it is compiled here on request."""

    pending: Pending | None
    kernel: Kernel | PackedKernel


class Compiler:
    """Gets programs from tinygrad's cache, from `store`, or from compilers in other processes.

    Owns the compilations in progress. A kernel that two steps share is compiled once. For one thread.
    """

    def __init__(self, store: ProgramStore | None = None) -> None:
        self.store = store
        self.num_compiled = 0
        self._begun: dict[Key, _Begun] = {}

    def begin(self, kernels: Iterable[Kernel]) -> list[Pending]:
        """Start compiling these kernels. Returns at once, with those that are being compiled."""
        kernels = set(kernels)
        missing = {key: kernel for kernel in kernels if not self._is_known(key := key_of(kernel))}
        # not for one kernel: starting a process takes longer than compiling it
        pool = _get_pool() if len(missing) + len(self._begun) > 1 else None
        for key, (sink, device) in missing.items():
            pending = None
            if pool is not None and not sink.arg.beam:  # a search times its candidates on the device, open here
                task = (0, (sink, Device[device].renderer), settings())
                pending = _begin_there(pool, _compile_there, task, f"kernel {sink.arg.name}")
            self._begun[key] = _Begun(pending, (sink, device))
        return self._pending(map(key_of, kernels))

    def begin_packed(self, kernels: Mapping[Key, PackedKernel], urgency: int) -> list[Pending]:
        """The same for kernels that another process traced. urgency: `CompileWorkers.submit`'s."""
        pool = _get_pool()
        # the largest first: the last to be compiled should be a small one
        for key, kernel in sorted(kernels.items(), key=lambda item: -len(item[1].sink)):
            if not self._is_known(key):
                task = (kernel.sink, Device[kernel.device].renderer, settings())
                what, cost = f"kernel {kernel.name}", len(kernel.sink)
                pending = _begin_there(pool, _compile_packed, task, what, urgency, cost)
                self._begun[key] = _Begun(pending, kernel)
        return self._pending(kernels)

    def programs(self, kernels: Iterable[Kernel]) -> dict[Kernel, UOp]:
        """The kernels' programs, ready to be launched. Waits for those in progress. Raises the compiler's error."""
        distinct = set(kernels)
        self.begin(distinct)
        return {kernel: _with_local_size(self._take(key_of(kernel))) for kernel in distinct}

    def programs_of(self, keys: Iterable[Key]) -> list[UOp]:
        """The programs of kernels that `begin_packed` began, in this order, as `programs` has them."""
        return [_with_local_size(self._take(key)) for key in keys]

    def close(self) -> None:
        """End the compiling processes, to free their memory. New ones are started on demand."""
        self._begun.clear()
        _end_pool()

    def _pending(self, keys: Iterable[Key]) -> list[Pending]:
        begun = [self._begun.get(key) for key in keys]
        return [one.pending for one in begun if one is not None and one.pending is not None]

    def _is_known(self, key: Key) -> bool:
        """Whether the program exists or is being compiled. Reads it from the store if it is there."""
        if key in to_program_cache or key in self._begun:
            return True
        program = self.store.read_program(key) if self.store is not None else None
        if program is None:
            return False
        to_program_cache[key] = program
        return True

    def _take(self, key: Key) -> UOp:
        if key in self._begun:
            begun = self._begun.pop(key)
            if key not in to_program_cache:  # an eager operation may have compiled the same kernel
                program = begun.pending.wait() if begun.pending is not None else None
                to_program_cache[key] = _compile_here(begun.kernel) if program is None else program
            self.num_compiled += 1
            if self.store is not None:
                self.store.write_program(key, to_program_cache[key])
        # the same one for all, wherever it comes from: a program is loaded once, by its nodes
        program = to_program_cache[key] = slim(to_program_cache[key])
        return program


def key_of(kernel: Kernel) -> Key:
    """tinygrad's key of the kernel's program; equal in all processes with these settings."""
    sink, device = kernel
    return to_program_key(sink, Device[device].renderer)


def begin_elsewhere(function: Callable[[Any], Any], argument: Any, what: str, urgency: int) -> Pending | None:
    """Start `function(argument)` in a compiling process; urgency: `CompileWorkers.submit`'s. None if there are none, or
    none takes it. `what`: what to call it in messages."""
    return _begin_there(_get_pool(), function, argument, what, urgency)


def prepare_elsewhere(function: str, argument: Any) -> None:
    """Start the compiling processes. function: `CompileWorkers.prepare`'s."""
    if (pool := _get_pool()) is not None:
        pool.prepare(function, argument)


def can_trace_elsewhere() -> bool:
    """Whether there are compiling processes, and no search (BEAM), which needs the device."""
    return _get_pool() is not None and not getenv("JITBEAM", BEAM.value)


def num_workers() -> int:
    """The most jobs that compiling processes do at once."""
    pool = _get_pool()
    return 0 if pool is None else pool.size


def settings() -> dict[str, Any]:
    """tinygrad's settings that affect programs."""
    return {variable.key: variable.value for variable in to_program_context}


def _begin_there(
    pool: CompileWorkers | None,
    function: Callable[[Any], Any],
    argument: Any,
    what: str,
    urgency: int = 0,
    cost: int = 0,
) -> Pending | None:
    """None if no process takes it, for example for lack of memory."""
    if pool is None:
        return None
    try:
        reach("compile.begin")
        return Pending(pool.submit(function, argument, urgency, cost), what)
    except (OSError, MemoryError, RuntimeError) as error:
        logger.warning("%s is done here, because no process takes it: %s: %s", what, type(error).__name__, error)
        return None


def _compile_there(task: Task) -> UOp:
    """Runs in a compiling process. Its answer has a tenth of the nodes that compiling made, which take the waiting
    process as much less time to read."""
    reach("compile.worker")
    return slim(_compile_kernel(task)[1])


def _compile_packed(task: tuple[bytes, Renderer, dict[str, Any]]) -> UOp:
    """The same for a packed kernel."""
    reach("compile.worker")
    sink, renderer, settings = task
    return slim(_compile_kernel((0, (pickle.loads(sink), renderer), settings))[1])


def _compile_here(kernel: Kernel | PackedKernel) -> UOp:
    reach("compile.here")
    sink, device = kernel.unpack() if isinstance(kernel, PackedKernel) else kernel
    program: UOp = _compile_kernel((0, (sink, Device[device].renderer), settings()))[1]
    return program


def _with_local_size(program: UOp) -> UOp:
    """The program with a threadgroup size. Where a kernel of tinygrad's leaves it open, tinygrad tries out several."""
    if program.arg.local_size is not None:
        return program
    call = UOp(Ops.CALL, src=(program,), arg=CallInfo())
    return graph_rewrite(call, pm_optimize_local_size, walk=True).src[0]


def begin_worker() -> None:
    """Yield to running steps, which share the cores if the device is a CPU. Collect garbage rarely: a kernel has many
    nodes, which reference counts free, and the search for cycles took a third of the compile time."""
    Context(ALLOW_DEVICE_USAGE=0, VIZ=0, TRACK_MATCH_STATS=0, PARALLEL=0).__enter__()
    logging.disable(logging.WARNING)  # the parent has said what is wrong with the cache
    share_disk_cache()
    collect_rarely()
    rewrite_faster()
    use_fewer_copies()
    use_servers()
    os.nice(WORKER_NICENESS)


def practise(kernel: UOp) -> None:
    """Generate the code of a kernel, as C. tinygrad compiles a rule at its first use, so the first kernel of a process
    takes 0.2 s longer, unless the process is forked from one that has practised."""
    rewrite_faster()
    renderer = ClangRenderer(Target("CPU", arch="x86_64,native"))
    renderer.compiler = TinygradCompiler()  # it returns the source
    with Context(DEBUG=0, TRACK_MATCH_STATS=0, VIZ=0):
        do_to_program(kernel, renderer)


def _get_pool() -> CompileWorkers | None:
    """The processes, which are tinygrad's pool too: it compiles the kernels of eager operations and of its searches in
    them. tinygrad's own pool would wait forever for the job of a process that was killed."""
    if PARALLEL.value == 0 or multiprocessing.current_process().daemon:  # a daemon may not have children
        return None
    if worker.worker_pool is None:
        worker.worker_pool = CompileWorkers(min(PARALLEL.value, MOST_WORKERS), BEGIN_WORKER)
        atexit.register(_end_pool)
    pool: CompileWorkers = worker.worker_pool
    return pool


def _end_pool() -> None:
    """End the processes."""
    end_unused(BEGIN_WORKER)
    if worker.worker_pool is not None:
        worker.worker_pool.terminate()


if _get_pool() is None:  # asked now, before tinygrad makes a pool of its own
    end_unused(BEGIN_WORKER)
