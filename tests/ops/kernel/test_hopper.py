"""Hopper's programs are machine code, followed by what a launch must know."""

from __future__ import annotations

import pytest
from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler

from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.ops.kernel.hopper import MachineCodeCompiler, declared_bytes

CODE = b"\x7fELF code"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> MachineCodeCompiler:
    """One whose NVRTC, which this computer may lack, always gives the same code."""
    monkeypatch.setattr(NVRTCCompiler, "compile", lambda self, source: CODE)
    return MachineCodeCompiler.__new__(MachineCodeCompiler)


def test_machine_code_is_followed_by_what_its_launch_must_know(compiler: MachineCodeCompiler) -> None:
    source = f'asm volatile("// dynamic shared memory: 4096 bytes");\nasm volatile("{AWAIT_PREVIOUS};" ::: "memory");'
    program = compiler.compile(source)
    assert program.startswith(CODE)
    assert declared_bytes(program) == 4096
    assert AWAIT_PREVIOUS.encode() in program


def test_nothing_follows_the_machine_code_of_a_plain_kernel(compiler: MachineCodeCompiler) -> None:
    assert compiler.compile("void plain() {}") == CODE
