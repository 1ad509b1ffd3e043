"""Hand-written Metal kernels through tinygrad's own METAL device: compiled, bound, dispatched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Device
from tinygrad.device import Buffer, TinyELF
from tinygrad.dtype import _from_np_dtype
from tinygrad.helpers import Target

PLACES = "uint3 gid [[threadgroup_position_in_grid]], uint3 lid [[thread_position_in_threadgroup]]"


def make_source(params: str, body: str, *, name: str = "tested") -> str:
    """A kernel as tinygrad writes them."""
    head = "#include <metal_stdlib>\nusing namespace metal;\n"
    return f"{head}kernel void {name}({params}, {PLACES}) {{\n{body}\n}}"


def launch(
    source: str,
    arrays: Sequence[np.ndarray],
    *,
    threads: int | tuple[int, int, int] = 32,
    groups: int | tuple[int, int, int] = 1,
    name: str = "tested",
) -> list[np.ndarray]:
    """Run a kernel on copies of the arrays; what they are afterwards. Raises CompileError, RuntimeError."""
    device = Device["METAL"]
    buffers = [Buffer("METAL", array.size, _from_np_dtype(array.dtype)).allocate() for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        device.allocator._copyin(buffer._buf, np.ascontiguousarray(array).data.cast("B"))
    library = device.compiler.compile(source)
    program = device.runtime(TinyELF(library, name, Target("METAL"), ()))
    sizes = [size if isinstance(size, tuple) else (size, 1, 1) for size in (groups, threads)]
    try:
        program(*(buffer._buf for buffer in buffers), global_size=sizes[0], local_size=sizes[1], wait=True)
    except RuntimeError:
        device.mtl_buffers_in_flight.clear()  # tinygrad would report this command buffer's error again and again
        raise
    out = []
    for buffer, array in zip(buffers, arrays, strict=True):
        result = np.empty_like(array)
        device.allocator._copyout(result.data.cast("B"), buffer._buf)
        out.append(result)
    return out
