"""A step as a CUDA graph whose kernels start before the previous ones have ended (compute capability 9).

What a kernel does before its wait (`recording.AWAIT_PREVIOUS`), above all reading weights, overlaps the end of the
previous kernel, and of those before it: each kernel lets the next one start at once. The wait returns once the previous
kernel has ended, which itself has waited for those before it. So a step's kernels form one chain, whatever they read
and write. (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".) tinygrad's graph has no
such edges, so this one is built by stream capture.
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
    """Whether a step consists of kernels without variables."""
    return all(call.target.op is Ops.PROGRAM and not call.target.arg.vars for call in step.calls)


def _awaits(device: str, call: Call) -> bool:
    """Whether the program waits for the previous kernel by itself. Read from its code (of PTX, or what hopper.py leaves
    of it), because tinygrad's KernelInfo and ProgramInfo have no field for it, and are part of every kernel's key."""
    return MARK in get_runtime(device, call.target).lib


class ChainReplay:
    """A step as one captured graph, in the order of its calls. Keeps the step's buffers alive."""

    is_own_launch = True

    def __init__(self, device: str, step: RecordedStep) -> None:
        self.step = step
        self._kept: list[Any] = []  # the programs, and their arguments until the graph has copied them
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

    @property
    def num_barriers(self) -> int:
        """Each kernel waits for the one before it, at its start or in its middle."""
        return max(0, len(self.step.calls) - 1)

    def __call__(self) -> None:
        check(cuda.cuCtxSetCurrent(self._context))
        check(cuda.cuGraphLaunch(self._instance, None))

    def __del__(self) -> None:
        if getattr(self, "_instance", None):
            check(cuda.cuGraphExecDestroy(self._instance))
