"""Kernels are compiled in other processes, once each, and a lost one is not waited for."""

from __future__ import annotations

import logging
import os
import signal
import time
from multiprocessing import TimeoutError
from types import SimpleNamespace
from unittest import mock

import pytest
from tinygrad import UOp
from tinygrad.codegen import to_program_cache
from tinygrad.engine import worker

from tests.ops.kernel.examples import add_one_kernel
from tinyvllm.device import compiling
from tinyvllm.device.compiling import Compiler
from tinyvllm.ops.kernel.body import F32


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


class Lost:
    """What a process that was killed leaves behind."""

    def ready(self) -> bool:
        return False

    def wait(self, timeout_s: float) -> None:
        pass

    def get(self) -> None:
        raise TimeoutError


class LosingPool:
    def apply_async(self, function: object, arguments: object) -> Lost:
        return Lost()


def test_a_kernel_that_is_lost_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "_get_pool", LosingPool)
    compiler, kernels = Compiler(), [kernel(1005), kernel(1006)]
    with mock.patch.dict(to_program_cache, clear=True), caplog.at_level(logging.WARNING):
        pending = compiler.begin(kernels)
        assert not any(one.is_done for one in pending)
        monkeypatch.setattr(compiling, "LOST_S", 0.0)
        assert all(one.is_done for one in pending)
        assert len(compiler.programs(kernels)) == 2
    assert caplog.text.count("a compiling process lost kernel") == 2


def test_processes_that_a_signal_has_ended_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to the process group ends them too, while an idle one holds the lock of the queue."""
    monkeypatch.setattr(compiling, "PARALLEL", SimpleNamespace(value=1))
    monkeypatch.setattr(compiling, "TERMINATE_S", 1.0)
    monkeypatch.setattr(worker, "worker_pool", None)
    pool = compiling._get_pool()
    assert pool is not None and pool.apply(int, ("1",)) == 1
    os.kill(pool._pool[0].pid, signal.SIGTERM)  # type: ignore[attr-defined]
    start_s = time.monotonic()
    Compiler().close()
    assert time.monotonic() - start_s < 5 and worker.worker_pool is None
