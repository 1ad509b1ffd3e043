"""OpenCL: GPUs without an interface of their own here, and CPUs through PoCL. General kernels only."""

from __future__ import annotations

import ctypes.util
import sys
from typing import TYPE_CHECKING

import numpy as np

from tinyvllm.device.kinds.base import DeviceKind

if TYPE_CHECKING:
    from tinygrad.device import Buffer

    from tinyvllm.device.mapping import RowWriter


class OpenCl(DeviceKind):
    is_unified = True
    default_share = 0.5
    has_kernels = True

    def __init__(self) -> None:
        super().__init__("CL")

    def why_missing(self) -> str:
        has_library = sys.platform == "darwin" or ctypes.util.find_library("OpenCL") is not None
        return "" if has_library else "this computer has no OpenCL (libOpenCL)"

    def row_writer(self, buffer: Buffer, row_size: int) -> RowWriter:
        """By offset copies, since OpenCL has no addresses inside a buffer."""
        from tinygrad import Device
        from tinygrad.runtime.ops_cl import check, cl, from_mv  # loads OpenCL

        device, itemsize = Device[buffer.device], buffer.dtype.itemsize

        def copy(row: int, values: np.ndarray) -> None:
            data, offset = memoryview(bytearray(np.ascontiguousarray(values))), row * row_size * itemsize
            status = cl.clEnqueueWriteBuffer(
                device.queue, buffer._buf, False, offset, len(data), from_mv(data), 0, None, None
            )
            check(status)
            device.pending_copyin.append(data)  # keeps it alive until the copy has run

        return copy
