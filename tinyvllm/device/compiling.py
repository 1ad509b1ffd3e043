"""Compiling kernels to programs in other processes, while this one continues tracing."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable
from multiprocessing.pool import AsyncResult, Pool

from tinygrad import Device, UOp
from tinygrad.codegen import to_program_cache, to_program_context, to_program_key
from tinygrad.engine import worker
from tinygrad.engine.realize import _compile_kernel, pm_optimize_local_size
from tinygrad.helpers import PARALLEL
from tinygrad.uop.ops import CallInfo, Ops, graph_rewrite

from tinyvllm.device.program_store import ProgramStore

WORKER_NICENESS = 5
WORKER_GC = (200_000, 20, 1000)  # gc.set_threshold's arguments
# A kernel is lost if its process is killed (by the OOM killer, say). After this time it is compiled here.
LOST_S = 300.0
TERMINATE_S = 5.0  # for the processes to end, which takes milliseconds

logger = logging.getLogger(__name__)
Kernel = tuple[UOp, str]  # a SINK, and the device that it is for
Key = tuple  # tinygrad's key of a kernel and of all settings that affect its program


class Pending:
    """A kernel that another process is compiling."""

    def __init__(self, result: AsyncResult) -> None:
        self._result = result
        self._begun_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._result.ready() or self._left_s <= 0

    @property
    def _left_s(self) -> float:
        return self._begun_s + LOST_S - time.monotonic()

    def wait(self) -> UOp | None:
        """The program, or None if it was lost. Raises the compiler's error."""
        self._result.wait(max(0.0, self._left_s))
        return self._result.get()[1] if self._result.ready() else None


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
                self._begun[key] = Pending(pool.apply_async(_compile_kernel, (task,)))
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


def _compile_here(sink: UOp, device: str) -> UOp:
    context = {variable.key: variable.value for variable in to_program_context}
    return _compile_kernel((0, (sink, Device[device].renderer), context))[1]


def _with_local_size(program: UOp) -> UOp:
    """The program with a threadgroup size. Where a kernel of tinygrad's leaves it open, tinygrad tries out several."""
    if program.arg.local_size is not None:
        return program
    call = UOp(Ops.CALL, src=(program,), arg=CallInfo())
    return graph_rewrite(call, pm_optimize_local_size, walk=True).src[0]


def _begin_worker() -> None:
    """Yield to running steps, which share the cores if the device is a CPU. Collect garbage rarely: a kernel has many
    nodes, which reference counts free, and the search for cycles took a third of the compile time."""
    worker._init_worker()
    gc.set_threshold(*WORKER_GC)
    os.nice(WORKER_NICENESS)


def _get_pool() -> Pool | None:
    """tinygrad's pool of processes, which its searches use too. Created here because tinygrad's ends each process after
    16 programs (a search compiles thousands), and a new one takes a second to start."""
    if PARALLEL.value == 0 or multiprocessing.current_process().daemon:  # a daemon may not have children
        return None
    if worker.worker_pool is None:
        worker.worker_pool = worker._WorkerContext().Pool(PARALLEL.value, _begin_worker)
        atexit.register(_end_pool)
    return worker.worker_pool


def _end_pool() -> None:
    """End tinygrad's pool of processes.

    A signal to the whole process group, as systemd and `timeout` send it, also ends the pool's processes. An idle one
    holds the lock of the queue of tasks, for which Pool.terminate() then waits forever. So it has limited time.
    """
    pool, worker.worker_pool = worker.worker_pool, None
    if pool is None:
        return
    ending = threading.Thread(target=pool.terminate, daemon=True)
    ending.start()
    ending.join(TERMINATE_S)
    if ending.is_alive():
        for process in list(pool._pool):
            process.kill()
