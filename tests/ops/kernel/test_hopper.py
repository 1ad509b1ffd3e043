"""Hopper's programs are machine code, followed by what a launch must know; where their arrays lie."""

from __future__ import annotations

import pytest
from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler

from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.errors import InvariantError
from tinyvllm.ops.kernel.hopper import MachineCodeCompiler, declared_bytes, in_one_memory

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


ARRAYS = "__shared__ __align__(16) uint buf0[%d];\n__shared__ __align__(16) float buf1[10];\n"
OWN = 'asm volatile("// dynamic shared memory: 1032 bytes");'


def test_arrays_larger_than_static_memory_follow_what_a_kernel_declares() -> None:
    placed = in_one_memory(ARRAYS % 20000 + OWN)
    assert "uint* buf0 = (uint*)(shared_memory + 1040);" in placed
    assert "float* buf1 = (float*)(shared_memory + 81040);" in placed
    assert declared_bytes(placed.encode()) == 81088 and "__align__(16)" not in placed
    small = ARRAYS % 12000 + OWN
    assert in_one_memory(small) == small
    with pytest.raises(InvariantError, match="80048 bytes in threadgroup memory declares none"):
        in_one_memory(ARRAYS % 20000)


def test_kernels_of_others_may_have_arrays_of_any_type() -> None:
    """As tinygrad's sum of 65,536 integers of 64 bits has."""
    array = "__shared__ __align__(16) long temp[256];"
    assert in_one_memory(array) == array
    with pytest.raises(InvariantError, match="array of long"):
        in_one_memory(array + OWN)
