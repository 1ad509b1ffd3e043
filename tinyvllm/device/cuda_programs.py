"""Compiled kernels of Hopper, whose launch needs more than tinygrad gives it: the size of their threadgroup memory, and
tensor maps behind the other arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Self

from tinygrad.device import TinyELF
from tinygrad.runtime import ops_cuda
from tinygrad.runtime.graph import cuda as graph
from tinygrad.runtime.ops_cuda import CUDAProgram, check, encode_args

from tinyvllm.device.tensor_map import MapOfArgument, encode_map
from tinyvllm.errors import DeviceError


class Mapped(tuple[Any, ...]):
    """The signature of a kernel (`TinyELF.signature`) whose last parameters are tensor maps, and where these begin in
    the memory of the parameters."""

    maps: Sequence[MapOfArgument]
    places: Sequence[int]

    @classmethod
    def of(cls, signature: Sequence[Any], maps: Sequence[MapOfArgument], places: Sequence[int]) -> Self:
        mapped = cls(signature)
        mapped.maps, mapped.places = maps, places
        return mapped


class HopperProgram(CUDAProgram):
    """A program that is launched with tensor maps of its arguments."""

    def __init__(self, dev: Any, obj: TinyELF, smem: int = 0) -> None:
        super().__init__(dev, obj, smem)
        if maps := MapOfArgument.all_of(obj.lib):
            places = [parameter_place(self.prg, len(obj.signature) + i) for i in range(len(maps))]
            self.signature = Mapped.of(obj.signature, maps, places)

    def __call__(self, *args: Any, **more: Any) -> Any:
        if isinstance(self.signature, Mapped):
            self.__dict__.pop("vargs", None)  # tinygrad keeps the arguments of the first launch, and replaces addresses
        return super().__call__(*args, **more)


def parameter_place(function: Any, index: int) -> int:
    """Where a parameter of a kernel begins: the compiler aligns it where the device has the parameters, which is no
    multiple of their alignment."""
    place, size = ctypes.c_size_t(), ctypes.c_size_t()
    ask = getattr(ctypes.CDLL("libcuda.so.1"), "cuFuncGetParamInfo", None)  # tinygrad's bindings lack this function
    if ask is None:
        raise DeviceError("the NVIDIA driver is older than that of CUDA 12.4, which kernels on Hopper need: update it")
    check(ask(function, ctypes.c_size_t(index), ctypes.byref(place), ctypes.byref(size)))
    return place.value


def encode_arguments(args: Sequence[Any], vals: Sequence[int], signature: Sequence[Any]) -> tuple[Any, Any]:
    """tinygrad's `encode_args`, with the maps of a `Mapped` signature behind the other arguments."""
    plain, extra = encode_args(args, vals, signature)
    if not isinstance(signature, Mapped):
        return plain, extra
    passed = bytes(plain)
    for one, place in zip(signature.maps, signature.places, strict=True):
        passed = passed.ljust(place, b"\0") + encode_map(args[one.argument].value, one.box)
    memory = ctypes.create_string_buffer(passed, len(passed))
    extra[1] = ctypes.cast(memory, ctypes.c_void_p)
    extra[3] = ctypes.cast(ctypes.pointer(ctypes.c_size_t(len(memory))), ctypes.c_void_p)
    return memory, extra


def pass_maps() -> None:
    """Have tinygrad's launches and graphs pass tensor maps."""
    ops_cuda.encode_args = graph.encode_args = encode_arguments
