"""A step on a CPU: one entry in the queue of each core's worker thread.

The entry is a small program that calls the core's kernels in turn from a table, with signals and waits where a kernel
depends on another core's. (tinygrad's own graph for a CPU, HCQ2's, takes a second of Python and a C compilation to
build, and 0.3 ms per step.)
"""

from __future__ import annotations

import ctypes
import functools
import time
import weakref
from dataclasses import replace

import numpy as np
from tinygrad import Device, UOp, dtypes
from tinygrad.device import Buffer, DepsTracker
from tinygrad.dtype import AddrSpace
from tinygrad.engine.realize import get_runtime
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.ops_cpu import CMD_SIZE, RING_SLOTS, CPUProgram, signal_prog
from tinygrad.uop.ops import KernelInfo, Ops

from tinyvllm.device.handle import NAP_S
from tinyvllm.device.helper_programs import helper_program
from tinyvllm.device.recording import Call, RecordedStep
from tinyvllm.errors import InvariantError

QUEUE = "COMPUTE:0"
LINE_WORDS = 32  # uint32 words: two cache lines, since some processors fetch them in pairs
MAX_COMMANDS = 1 << 20  # per step: keeps an index into its table within 32 bits


class CpuReplay:
    """A step as a table of commands for each core. A row is the address of a program, then its arguments.

    `stamps`: where to write each kernel's start and end, (calls, 2, 2) words of seconds and nanoseconds."""

    is_own_launch = True

    def __init__(self, cores: tuple[str, ...], step: RecordedStep, stamps: np.ndarray | None = None) -> None:
        self.step, self._stamps = step, stamps  # the tables hold their addresses
        self._owner = [cores.index(call.buffers[0].device) for call in step.calls]
        # how far each core has come in this step; on separate cache lines, since every core watches the others'
        self._progress = np.zeros((len(cores), LINE_WORDS), np.uint32)
        self._queues = [
            _Queue(core, np.concatenate(rows))
            for core, rows in zip(cores, _tables(cores, self._owner, step, self._progress, stamps), strict=True)
            if rows
        ]
        # the tables must outlive the workers' use, even if the replay is dropped or the process ends
        weakref.finalize(self, _drain, self._queues, self._progress, step)

    @property
    def num_barriers(self) -> int:
        """How often a core waits for another."""
        return sum(map(len, _waits(self._owner, self.step)))

    def __call__(self) -> None:
        if len(self._queues) > 1:  # the counters restart at 0: the previous step must have ended on every core
            for queue in self._queues:
                queue.wait_until_empty()
            self._progress[:] = 0
        for queue in self._queues:
            queue.submit()


def _drain(queues: list[_Queue], *kept_until_then: object) -> None:
    for queue in queues:
        queue.wait_until_empty()


class _Queue:
    """The queue of one core's worker, and the table that a step enqueues there."""

    def __init__(self, core: str, table: np.ndarray) -> None:
        self._table = table
        self._entry = np.array([_run_table().addr, table.ctypes.data, len(table)], np.uint64)
        worker = Device[core].worker(QUEUE)
        self._ring, self._put, self._done = (_words(buffer) for buffer in (worker.ring, worker.put, worker.done))
        self._post = functools.partial(ctypes.CDLL(None).sem_post, ctypes.c_void_p(worker.sem._buf.va_addr))
        # tinygrad's submitter (HCQ2) runs on a worker of its own and puts commands into the same queue
        others = [other for other in Device[core].workers if other is not worker]
        self._others = [(_words(other.put), _words(other.done)) for other in others]

    def wait_until_empty(self) -> None:
        while self._done[0] < self._put[0]:
            time.sleep(NAP_S)

    def submit(self) -> None:
        for put, done in self._others:
            while done[0] < put[0]:
                time.sleep(NAP_S)
        num_put = int(self._put[0])
        if num_put - int(self._done[0]) >= RING_SLOTS:
            raise InvariantError(f"the CPU's queue of {RING_SLOTS} steps is full: the steps' outputs are never read")
        start = num_put % RING_SLOTS * CMD_SIZE
        self._ring[start : start + len(self._entry)] = self._entry
        self._put[0] = num_put + 1
        self._post()


def _tables(
    cores: tuple[str, ...], owner: list[int], step: RecordedStep, progress: np.ndarray, stamps: np.ndarray | None
) -> list[list[np.ndarray]]:
    """Each core's rows. `owner`: the core of each call. A core runs its own kernels in order, and waits for those of
    others that they depend on."""
    waits = _waits(owner, step)
    awaited = {call for call_waits in waits for call in call_waits}
    rows: list[list[np.ndarray]] = [[] for _ in cores]
    for number, (call, core) in enumerate(zip(step.calls, owner, strict=True)):
        for other in waits[number]:
            rows[core].append(
                _synchronize(_wait_until(), progress[owner[other]], _yield_address().ctypes.data, other + 1)
            )
        commands = [_commands(cores[core], call)]
        if stamps is not None:
            commands = [_stamp(stamps[number, 0]), *commands, _stamp(stamps[number, 1])]
        rows[core] += commands
        if number in awaited:
            rows[core].append(_synchronize(Device[cores[core]].prgs[signal_prog], progress[core], number + 1))
    return rows


def _waits(owner: list[int], step: RecordedStep) -> list[list[int]]:
    """For each call, the calls of other cores to wait for: the last one of each core that touches the same memory,
    unless this core has already waited for it or a later one. (Also write after read: scratch memory is reused.)"""
    tracker = DepsTracker()
    seen: dict[tuple[int, int], int] = {}  # (core, other core) -> the last call waited for
    waits = []
    for number, call in enumerate(step.calls):
        core = owner[number]
        last: dict[int, int] = {}
        for other in tracker.access_resources(list(call.buffers), list(call.target.arg.outs), number):
            last[owner[other]] = max(other, last.get(owner[other], -1))
        needed = {o: c for o, c in last.items() if o != core and c > seen.get((core, o), -1)}
        seen |= {(core, o): c for o, c in needed.items()}
        waits.append(list(needed.values()))
    return waits


def _synchronize(program: CPUProgram, counter: np.ndarray, *arguments: int) -> np.ndarray:
    """One row: set a core's counter to a value, or wait until it has reached it."""
    row = np.zeros((1, CMD_SIZE), np.uint64)
    row[0, : 2 + len(arguments)] = program.addr, counter.ctypes.data, *arguments
    return row


def _stamp(place: np.ndarray) -> np.ndarray:
    """One row that calls libc's clock_gettime, with the clock of perf_counter."""
    clock = getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)  # macOS has the first
    address = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value
    row = np.zeros((1, CMD_SIZE), np.uint64)
    row[0, :3] = address, clock, place.ctypes.data
    return row


@functools.cache
def _yield_address() -> np.ndarray:
    """One word: the address of libc's sched_yield."""
    return np.array([ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value], np.uint64)


@functools.cache
def _wait_until() -> CPUProgram:
    """fn(counter, yield_address, value): return when the counter has reached `value`. One program for all cores.

    It yields after each look: on a busy machine a spinning wait would keep the processor from the core it waits for."""
    counter, yield_address = UOp.param(0, dtypes.uint32, (1,), volatile=True), UOp.param(1, dtypes.uint64, (1,))
    value = UOp.param(2, dtypes.int, (), vmin_vmax=(0, dtypes.int.max), name="value", addrspace=AddrSpace.ALU)
    look = UOp.loop(0)
    yielded = yield_address.after(look)[0].load().call(ret_dtype=dtypes.int)
    now = counter.after(look, yielded)[0].load()
    return _compile(now.end(look, now < value.cast(dtypes.uint32)), "wait_until")


def _words(buffer: Buffer) -> np.ndarray:
    return np.frombuffer(buffer.as_memoryview(force_zero_copy=True, no_sync=True), np.uint64)


def _commands(device: str, call: Call) -> np.ndarray:
    """One row; if the kernel has a grid, one per work item."""
    program, info = call.target, call.target.arg
    if program.op is not Ops.PROGRAM or any(name != "core_id" for name in (v.expr for v in info.vars)):
        raise InvariantError(f"a CPU's step launches kernels without variables only, but this one has {program.op}")
    words = [get_runtime(device, program).addr]
    words += [_address(call.buffers[i], device) for i in info.globals]
    rows = np.zeros((info.global_size[0], CMD_SIZE), np.uint64)
    rows[:, : len(words)] = words
    if "core_id" in info.runtimevars:
        rows[:, len(words) + info.runtimevars["core_id"]] = np.arange(len(rows))
    return rows


def _address(buffer: Buffer, device: str) -> int:
    """Of a buffer or a view. (tinygrad makes an object for each view, which took a third of building the tables.)"""
    start: int = buffer.base.get_buf(device).va_addr
    return start + buffer.offset


@functools.cache
def _run_table() -> CPUProgram:
    """fn(table, count): call the programs of a table's rows. Each is passed the whole row and reads its own part. One
    program for all cores."""
    table = UOp.param(0, dtypes.uint64, (MAX_COMMANDS * CMD_SIZE,))
    count = UOp.param(1, dtypes.int, (), vmin_vmax=(0, MAX_COMMANDS), name="count", addrspace=AddrSpace.ALU)
    row = UOp.range(count, 0, dtype=dtypes.int)
    words = [table.index(row * CMD_SIZE + i).load() for i in range(CMD_SIZE)]
    return _compile(words[0].call(*words[1:], ret_dtype=dtypes.void).end(row), "run_table")


def _compile(body: UOp, name: str) -> CPUProgram:
    opened = Device["CPU"]
    sink = body.sink(arg=KernelInfo(name), tag=1)
    program = helper_program(sink, ClangRenderer(replace(opened.renderer.target, renderer="CLANG")))
    return CPUProgram(opened, program.to_elf())
