"""Tensor maps by the driver: what it is asked for, and how a launch passes them. What copies fetch by them is compared
on a GPU, in tests/ops/gpu/test_stream.py and test_quantized_cluster.py."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinygrad.runtime import ops_cuda
from tinygrad.runtime.autogen import cuda

from tinyvllm.device import cuda_programs
from tinyvllm.device.cuda_programs import HopperProgram, Mapped, encode_arguments, parameter_place
from tinyvllm.device.tensor_map import MAP_ALIGNED, MAP_BYTES, Box, MapOfArgument, encode_map
from tinyvllm.errors import DeviceError

BOX = Box((64, 32, 2, 8), (1024, 32768, 128), (64, 8, 2, 4))
PLAIN = Box((4096, 8), (8192,), (64, 8), is_swizzled=False)


def test_the_driver_is_asked_for_a_matrix_and_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def encode(target: Any, *rest: Any) -> int:
        asked.extend(rest)
        assert ctypes.addressof(target) % MAP_ALIGNED == 0
        ctypes.memmove(ctypes.addressof(target), bytes(range(MAP_BYTES)), MAP_BYTES)
        return 0

    monkeypatch.setattr(cuda, "cuTensorMapEncodeTiled", encode)
    assert encode_map(1 << 40, BOX) == bytes(range(MAP_BYTES))
    kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill = asked
    assert (kind, rank, address) == (cuda.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, 1 << 40)
    assert [*sizes] == [64, 32, 2, 8] and [*strides] == [1024, 32768, 128]
    assert [*box] == [64, 8, 2, 4] and [*steps] == [1] * 4
    assert swizzle == cuda.CU_TENSOR_MAP_SWIZZLE_128B and interleave == promotion == fill == 0


def test_machine_code_is_followed_by_its_maps() -> None:
    maps = [MapOfArgument(0, 3, BOX), MapOfArgument(1, 2, PLAIN)]
    code = "\n".join(["\x7fELF", str(maps[1]), "between", str(maps[0])]).encode()
    assert MapOfArgument.all_of(code) == maps
    assert MapOfArgument.all_of(b"\x7fELF") == []


def test_maps_follow_the_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver says that they begin."""
    monkeypatch.setattr(cuda_programs, "encode_map", lambda address, box: bytes([address + len(box.sizes)]) * MAP_BYTES)
    signature = [(None, i, None, ()) for i in range(3)]
    buffers = [cuda.CUdeviceptr_v2(address) for address in (10, 20, 30)]
    maps = [MapOfArgument(0, 2, BOX), MapOfArgument(1, 0, PLAIN)]
    memory, extra = encode_arguments(buffers, [], Mapped.of(signature, maps, [48, 176]))
    size = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t))[0]
    assert size == 48 + 2 * MAP_BYTES == ctypes.sizeof(memory) and extra[1] == ctypes.addressof(memory)
    passed = ctypes.string_at(extra[1], size)
    assert [*np.frombuffer(passed[:24], np.uint64)] == [10, 20, 30]
    assert passed[48:] == bytes([34]) * MAP_BYTES + bytes([12]) * MAP_BYTES
    (plain, _), (expected, _) = (encode(buffers, [], signature) for encode in (encode_arguments, ops_cuda.encode_args))
    assert bytes(plain) == bytes(expected)


def test_each_launch_passes_the_maps_of_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """tinygrad keeps the arguments of a program's first launch, and replaces addresses in them."""
    passed: list[bytes] = []

    def launch(*arguments: Any) -> int:
        extra = arguments[-1]
        passed.append(ctypes.string_at(extra[1], ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t))[0]))
        return 0

    monkeypatch.setattr(cuda_programs, "encode_map", lambda address, box: bytes([address]) * MAP_BYTES)
    monkeypatch.setattr(ops_cuda, "encode_args", encode_arguments)
    monkeypatch.setattr(cuda, "cuCtxSetCurrent", lambda context: 0)
    monkeypatch.setattr(cuda, "cuLaunchKernel", launch)
    monkeypatch.setattr(cuda, "cuModuleUnload", lambda module: 0)
    program = HopperProgram.__new__(HopperProgram)
    program.dev, program.prg, program.smem, program.module = SimpleNamespace(context=None), None, 0, None
    program.signature = Mapped.of([(None, 0, None, ())], [MapOfArgument(0, 0, PLAIN)], [48])
    for address in (10, 20):
        program(cuda.CUdeviceptr_v2(address))
    assert [[*np.frombuffer(one[:8], np.uint64)] for one in passed] == [[10], [20]]
    assert [one[48:] for one in passed] == [bytes([10]) * MAP_BYTES, bytes([20]) * MAP_BYTES]


def test_a_driver_that_does_not_tell_where_parameters_begin_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(DeviceError, match=r"older than that of CUDA 12\.4.*update it"):
        parameter_place(None, 3)
