"""OpenCL: GPUs without an interface of their own here, and CPUs through PoCL. General kernels only."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import weakref
from typing import TYPE_CHECKING, Any

from tinyvllm.device.kinds.base import DeviceKind

if TYPE_CHECKING:
    import numpy as np
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

    def opened(self, name: str) -> None:
        """Let buffers be parts of others, as steps have them: tinygrad's allocator for OpenCL has no such parts."""
        from tinygrad.device import Allocator
        from tinygrad.runtime.ops_cl import CLAllocator  # loads OpenCL

        if CLAllocator._offset is Allocator._offset:
            CLAllocator._offset = _sub_buffer

    def row_writer(self, buffer: Buffer, row_size: int) -> RowWriter:
        """By offset copies, since OpenCL has no addresses inside a buffer."""
        import numpy as np
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


def _sub_buffer(allocator: Any, buffer: Any, size: int, offset: int) -> Any:
    """The part of a buffer of `size` bytes from `offset` on, which OpenCL counts as a use of the whole."""
    from tinygrad.runtime.ops_cl import check, checked, cl  # loads OpenCL

    region, status = cl.cl_buffer_region(origin=offset, size=size), ctypes.c_int32()
    kind, place = cl.CL_BUFFER_CREATE_TYPE_REGION, ctypes.cast(ctypes.pointer(region), ctypes.c_void_p)
    part = checked(cl.clCreateSubBuffer(buffer, cl.CL_MEM_READ_WRITE, kind, place, status), status)
    address = ctypes.cast(part, ctypes.c_void_p).value
    weakref.finalize(part, lambda: check(cl.clReleaseMemObject(ctypes.cast(ctypes.c_void_p(address), cl.cl_mem))))
    return part
