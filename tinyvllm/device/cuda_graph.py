"""A step on a GPU whose kernels may be launched before the ones before them have ended (CUDA, compute capability 9).

What a kernel does before `gpu_kernel.await_previous` (reading weights above all) then overlaps the end of the kernel
before it. Such a kernel waits there for all kernels before it: the one before has ended, and that one has waited for
those before itself. So the kernels of a step are one chain, whatever they read and write. (CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization".) tinygrad's own graph cannot say this; it is made here by capture.
"""

from __future__ import annotations

import ctypes
from typing import Any

from tinygrad import Device
from tinygrad.engine.realize import get_runtime
from tinygrad.runtime.autogen import cuda
from tinygrad.runtime.ops_cuda import check, encode_args
from tinygrad.uop.ops import Ops

from tinyvllm.device.recording import AWAIT_PREVIOUS, Call, RecordedStep

MARK = AWAIT_PREVIOUS.encode()


def fits_chain(step: RecordedStep) -> bool:
    """Whether a step is made of kernels alone, without variables."""
    return all(call.target.op is Ops.PROGRAM and not call.target.arg.vars for call in step.calls)


def _awaits(device: str, call: Call) -> bool:
    return MARK in get_runtime(device, call.target).lib


class ChainReplay:
    """A step as one captured graph, in the order of its calls. It keeps the step's buffers alive."""

    def __init__(self, device: str, step: RecordedStep) -> None:
        self.step = step
        self._kept: list[Any] = []  # the arguments, until the graph has them, and the programs
        self._context = Device[device].context
        check(cuda.cuCtxSetCurrent(self._context))
        stream, graph, self._instance = cuda.CUstream(), cuda.CUgraph(), cuda.CUgraphExec()
        check(cuda.cuStreamCreate(ctypes.byref(stream), cuda.CU_STREAM_NON_BLOCKING))
        try:
            check(cuda.cuStreamBeginCapture_v2(stream, cuda.CU_STREAM_CAPTURE_MODE_RELAXED))
            for number, call in enumerate(step.calls):
                self._launch(device, call, stream, is_early=number > 0 and _awaits(device, call))
            check(cuda.cuStreamEndCapture(stream, ctypes.byref(graph)))
            check(cuda.cuGraphInstantiate_v2(ctypes.byref(self._instance), graph, None, None, 0))
            check(cuda.cuGraphDestroy(graph))
        finally:
            check(cuda.cuStreamDestroy_v2(stream))

    def _launch(self, device: str, call: Call, stream: Any, *, is_early: bool) -> None:
        info, runtime = call.target.arg, get_runtime(device, call.target)
        buffers = [call.buffers[i].ensure_allocated()._buf for i in info.globals]
        arguments, extra = encode_args(buffers, [], runtime.signature)
        attribute = cuda.CUlaunchAttribute(id=cuda.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes = (cuda.CUlaunchAttribute * 1)(attribute)
        config = cuda.CUlaunchConfig(*info.global_size, *info.local_size, runtime.smem, stream)
        config.attrs = ctypes.cast(attributes, type(config.attrs))
        config.numAttrs = int(is_early)
        check(cuda.cuLaunchKernelEx(ctypes.byref(config), runtime.prg, None, extra))
        self._kept.append((arguments, extra, runtime))

    def __call__(self) -> None:
        check(cuda.cuCtxSetCurrent(self._context))
        check(cuda.cuGraphLaunch(self._instance, None))

    def __del__(self) -> None:
        if getattr(self, "_instance", None):
            check(cuda.cuGraphExecDestroy(self._instance))
