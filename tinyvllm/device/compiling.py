"""From kernels to programs, in other processes, while this one goes on tracing."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
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
WORKER_GC = (200_000, 20, 1000)  # objects of the youngest generation, and of the others collections before theirs
# A process that was killed, for memory say, takes its kernel along: after so long it is compiled here.
LOST_S = 300.0

logger = logging.getLogger(__name__)
Kernel = tuple[UOp, str]  # a SINK, and the device that it is for
Key = tuple  # tinygrad's, of a kernel and all that decides what it becomes


class Pending:
    """A kernel that another process compiles."""

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
        """The program; None where it was lost. Raises what kept it from being compiled."""
        self._result.wait(max(0.0, self._left_s))
        return self._result.get()[1] if self._result.ready() else None


class Compiler:
    """Gets programs from tinygrad's cache, from `store`, or from compilers that run beside this process.

    Owns what is being compiled. Two steps that want one kernel have it compiled once, whoever is first. One thread.
    """

    def __init__(self, store: ProgramStore | None = None) -> None:
        self.store = store
        self.num_compiled = 0
        self._begun: dict[Key, Pending | None] = {}  # None: to be made here, when it is asked for

    def begin(self, kernels: Iterable[Kernel]) -> list[Pending]:
        """See to it that these kernels become programs. Returns at once: what is ready when the compilers are done."""
        kernels = set(kernels)
        missing = {key: kernel for kernel in kernels if not self._is_known(key := _key_of(kernel))}
        pool = _get_pool() if len(missing) + len(self._begun) > 1 else None  # a process takes longer to start than one
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
        """The kernels' programs, ready to be launched. Waits for those that are not done; raises what kept one from
        being compiled."""
        distinct = set(kernels)
        self.begin(distinct)
        return {kernel: _with_local_size(self._take(kernel)) for kernel in distinct}

    def close(self) -> None:
        """End the processes that compile, which hold memory. Others are started when they are needed."""
        self._begun.clear()
        worker.terminate_worker_pool()

    def _is_known(self, key: Key) -> bool:
        """Whether there is a program, or will be; one that is stored is read."""
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
            if key not in to_program_cache:  # somebody's eager operation may have had the same kernel
                program = pending.wait() if pending is not None else None
                if program is None and pending is not None:
                    logger.warning("kernel %s was lost by a compiling process: it is compiled here", sink.arg.name)
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
    """A program that says how it is launched: tinygrad tries that where a kernel of its own leaves it open."""
    if program.arg.local_size is not None:
        return program
    call = UOp(Ops.CALL, src=(program,), arg=CallInfo())
    return graph_rewrite(call, pm_optimize_local_size, walk=True).src[0]


def _begin_worker() -> None:
    """Let steps that run meanwhile, on the same cores where the device is a CPU, come first; and look for cycles
    seldom, which took a third of the time of compiling: a kernel's nodes are many, and freed by their counts."""
    worker._init_worker()
    gc.set_threshold(*WORKER_GC)
    os.nice(WORKER_NICENESS)


def _get_pool() -> Pool | None:
    """tinygrad's pool of processes, which searches use too. Made here, because tinygrad's ends each process after 16
    programs, and a new one takes a second to begin; theirs is for searches of thousands."""
    if PARALLEL.value == 0 or multiprocessing.current_process().daemon:  # a daemon may not have children
        return None
    if worker.worker_pool is None:
        worker.worker_pool = worker._WorkerContext().Pool(PARALLEL.value, _begin_worker)
        atexit.register(worker.terminate_worker_pool)
    return worker.worker_pool
