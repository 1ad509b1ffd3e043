"""Compiling kernels to programs in other processes, while this one continues tracing."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable
from typing import Any

from tinygrad import Device, UOp
from tinygrad.codegen import to_program_cache, to_program_context, to_program_key
from tinygrad.engine import worker
from tinygrad.engine.realize import _compile_kernel, pm_optimize_local_size
from tinygrad.helpers import PARALLEL, Context
from tinygrad.uop.ops import CallInfo, Ops, graph_rewrite

from tinyvllm.device.compile_workers import CompileWorkers, Job, LostJobError
from tinyvllm.device.disk_cache import share_disk_cache
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.faults import reach

WORKER_NICENESS = 5
WORKER_GC = (200_000, 20, 1000)  # gc.set_threshold's arguments
LOST_S = 300.0  # a kernel that takes longer is compiled in this process: the other may have been stopped

logger = logging.getLogger(__name__)
Kernel = tuple[UOp, str]  # a SINK, and the device that it is for
Task = tuple[int, tuple[UOp, Any], dict[str, Any]]  # tinygrad's argument of _compile_kernel
Key = tuple  # tinygrad's key of a kernel and of all settings that affect its program


class Pending:
    """A kernel that another process is compiling."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begun_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._job.is_done() or self._left_s <= 0

    @property
    def _left_s(self) -> float:
        return self._begun_s + LOST_S - time.monotonic()

    def wait(self) -> UOp | None:
        """The program, or None if it was lost, as when its process was killed (by the OOM killer, say), or failed: what
        is not that process's own trouble fails again where it is compiled next."""
        try:
            program: UOp = self._job.result(max(0.0, self._left_s))[1]
        except (LostJobError, TimeoutError):
            return None
        except Exception as error:
            logger.warning("a compiling process failed: %s: %s", type(error).__name__, error)
            return None
        return program


class Compiler:
    """Gets programs from tinygrad's cache, from `store`, or from compilers in other processes.

    Owns the compilations in progress. A kernel that two steps share is compiled once. For one thread.
    """

    def __init__(self, store: ProgramStore | None = None) -> None:
        self.store = store
        self.num_compiled = 0
        self._begun: dict[Key, Pending | None] = {}  # None: compiled here on request

    def begin(self, kernels: Iterable[Kernel]) -> list[Pending]:
        """Start compiling these kernels. Returns at once, with those that are being compiled."""
        kernels = set(kernels)
        missing = {key: kernel for kernel in kernels if not self._is_known(key := _key_of(kernel))}
        # not for one kernel: starting a process takes longer than compiling it
        pool = _get_pool() if len(missing) + len(self._begun) > 1 else None
        for key, (sink, device) in missing.items():
            if pool is None or sink.arg.beam:  # a search times its candidates on the device, which is open here
                self._begun[key] = None
            else:
                context = {variable.key: variable.value for variable in to_program_context}
                task = (0, (sink, Device[device].renderer), context)
                self._begun[key] = _begin_there(pool, task)
        pending = [self._begun.get(_key_of(kernel)) for kernel in kernels]
        return [one for one in pending if one is not None]

    def programs(self, kernels: Iterable[Kernel]) -> dict[Kernel, UOp]:
        """The kernels' programs, ready to be launched. Waits for those in progress. Raises the compiler's error."""
        distinct = set(kernels)
        self.begin(distinct)
        return {kernel: _with_local_size(self._take(kernel)) for kernel in distinct}

    def close(self) -> None:
        """End the compiling processes, to free their memory. New ones are started on demand."""
        self._begun.clear()
        _end_pool()

    def _is_known(self, key: Key) -> bool:
        """Whether the program exists or is being compiled. Reads it from the store if it is there."""
        if key in to_program_cache or key in self._begun:
            return True
        program = self.store.read_program(key) if self.store is not None else None
        if program is None:
            return False
        to_program_cache[key] = program
        return True

    def _take(self, kernel: Kernel) -> UOp:
        key = _key_of(kernel)
        if key in self._begun:
            pending, (sink, device) = self._begun.pop(key), kernel
            if key not in to_program_cache:  # an eager operation may have compiled the same kernel
                program = pending.wait() if pending is not None else None
                if program is None and pending is not None:
                    logger.warning("a compiling process lost kernel %s: it is compiled here", sink.arg.name)
                to_program_cache[key] = _compile_here(sink, device) if program is None else program
            self.num_compiled += 1
            if self.store is not None:
                self.store.write_program(key, to_program_cache[key])
        return to_program_cache[key]


def _key_of(kernel: Kernel) -> Key:
    sink, device = kernel
    return to_program_key(sink, Device[device].renderer)


def _begin_there(pool: CompileWorkers, task: Task) -> Pending | None:
    """None if no process takes it, for example for lack of memory."""
    try:
        reach("compile.begin")
        return Pending(pool.submit(_compile_there, task))
    except (OSError, MemoryError, RuntimeError) as error:
        logger.warning("a kernel is compiled here, because no process takes it: %s: %s", type(error).__name__, error)
        return None


def _compile_there(task: Task) -> tuple[int, UOp]:
    """Runs in a compiling process."""
    reach("compile.worker")
    compiled: tuple[int, UOp] = _compile_kernel(task)
    return compiled


def _compile_here(sink: UOp, device: str) -> UOp:
    reach("compile.here")
    context = {variable.key: variable.value for variable in to_program_context}
    return _compile_kernel((0, (sink, Device[device].renderer), context))[1]


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
    gc.set_threshold(*WORKER_GC)
    os.nice(WORKER_NICENESS)


def _get_pool() -> CompileWorkers | None:
    """The processes, which are tinygrad's pool too: it compiles the kernels of eager operations and of its searches in
    them. tinygrad's own pool would wait forever for the job of a process that was killed."""
    if PARALLEL.value == 0 or multiprocessing.current_process().daemon:  # a daemon may not have children
        return None
    if worker.worker_pool is None:
        worker.worker_pool = CompileWorkers(PARALLEL.value, f"{__name__}:begin_worker")
        atexit.register(_end_pool)
    pool: CompileWorkers = worker.worker_pool
    return pool


def _end_pool() -> None:
    """End the processes."""
    if worker.worker_pool is not None:
        worker.worker_pool.terminate()


_get_pool()  # now, before tinygrad makes a pool of its own
