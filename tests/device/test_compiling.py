"""Kernels are compiled in other processes, once each, and a lost one is not waited for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tinygrad import UOp
from tinygrad.codegen import to_program_cache

from tests.ops.kernel.examples import add_one_kernel
from tests.server.test_control import wait_until_gone
from tinyvllm.device import compiling
from tinyvllm.device.compile_workers import CompileWorkers, Job
from tinyvllm.device.compiling import Compiler
from tinyvllm.ops.kernel.body import F32

pytestmark = pytest.mark.usefixtures("compiling_processes")


def kernel(size: int) -> tuple[UOp, str]:
    """Of a size of its own, so that no other test has compiled it."""
    return add_one_kernel(size)(*[UOp.placeholder((size,), F32, slot) for slot in range(2)]), "CPU"


def test_two_who_want_a_kernel_have_it_compiled_once() -> None:
    compiler, kernels = Compiler(), [kernel(size) for size in (1001, 1002, 1003)]
    with mock.patch.dict(to_program_cache, clear=True):
        assert len(compiler.begin(kernels)) == len(compiler.begin(kernels[:2])) + 1 == 3
        programs = compiler.programs(kernels)
        assert compiler.programs(kernels[:1])[kernels[0]] is programs[kernels[0]]
        assert compiler.begin(kernels) == [], "what is there is not waited for"
    assert compiler.num_compiled == 3
    assert {program.src[0].arg.name for program in programs.values()} == {one.arg.name for one, _ in kernels}


def test_a_kernel_that_fails_is_raised_to_who_waits_and_tried_again_when_asked_for_again() -> None:
    compiler = Compiler()
    with mock.patch.dict(to_program_cache, clear=True), mock.patch.object(compiling, "_get_pool", lambda: None):
        with (
            mock.patch.object(compiling, "_compile_here", side_effect=RuntimeError("no compiler")),
            pytest.raises(RuntimeError, match="no compiler"),
        ):
            compiler.programs([kernel(1004)])
        assert len(compiler.programs([kernel(1004)])) == 1


class SlowPool:
    """Its jobs never end."""

    def submit(self, function: Any, argument: Any, urgency: int = 0, cost: int = 0) -> Job:
        return Job(function, argument)


def test_a_kernel_that_is_lost_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "_get_pool", SlowPool)
    compiler, kernels = Compiler(), [kernel(1005), kernel(1006)]
    with mock.patch.dict(to_program_cache, clear=True), caplog.at_level(logging.WARNING):
        pending = compiler.begin(kernels)
        assert not any(one.is_done for one in pending)
        monkeypatch.setattr(compiling, "LOST_S", 0.0)
        assert all(one.is_done for one in pending)
        assert len(compiler.programs(kernels)) == 2
    assert caplog.text.count("a compiling process lost kernel") == 2


@pytest.mark.parametrize("size", [1, 2])
def test_kernels_of_a_dead_process_are_compiled_here_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """As after a signal to the whole process group, or the OOM killer's."""
    pool = CompileWorkers(size, f"{__name__}:stop")
    monkeypatch.setattr(compiling, "_get_pool", lambda: pool)
    compiler, kernels = Compiler(), [kernel(1007), kernel(1008)]
    with mock.patch.dict(to_program_cache, clear=True), caplog.at_level(logging.WARNING):
        pending = compiler.begin(kernels)
        pids = wait_for_stop(pool)
        pool.terminate()  # a kernel that waits is not begun in another process
        wait_until_gone(pids)
        assert all(one.is_done for one in pending) and len(compiler.programs(kernels)) == 2
    assert caplog.text.count("a compiling process lost kernel") == 2


def stop() -> None:
    """A process that never begins its job."""
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_stop(pool: CompileWorkers) -> list[int]:
    """The ids of its processes, once all have stopped."""
    while len(pids := pool.pids()) < pool.size or any(
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T" for pid in pids
    ):
        time.sleep(0.01)
    return pids


PRACTICE = """
import tinyvllm.device
from tinygrad import UOp, dtypes
from tinygrad.uop import upat
from tinyvllm.device.compiling import practise
from tinyvllm.ops.backends import practice_kernel
from tinyvllm.ops.cpu.linear import join_kernel

rules, compile_rule = [], upat.upat_compile
upat.upat_compile = lambda *rule: rules.append(rule) or compile_rule(*rule)
for kernel in (practice_kernel(), join_kernel(4, (32,))(*[UOp.placeholder((128,), dtypes.float, i) for i in (0, 1)])):
    before = len(rules)
    practise(kernel)
    print(len(rules) - before)
"""


def test_after_practice_another_kernel_compiles_hardly_any_rule() -> None:
    process = subprocess.run([sys.executable, "-c", PRACTICE], capture_output=True, text=True, check=True)
    first, second = map(int, process.stdout.split())
    assert first > 100 and second < first / 10
