"""Writing single rows of a tensor while the device runs steps that read other rows."""

from __future__ import annotations

import numpy as np
from tinygrad import Device, Tensor
from tinygrad.device import Buffer

from tinyvllm.device.kinds import kind_of
from tinyvllm.device.mapping import RowWriter, is_mapped
from tinyvllm.device.meta import has_memory


def row_writer(tensor: Tensor, row_size: int) -> RowWriter:
    """A writer of rows of `row_size` elements of a realized tensor. If memory is mapped, a row changes at once, so no
    step in flight may read it. Otherwise it changes after everything enqueued before. Without memory, it never does."""
    if not has_memory(tensor.uop.base.buffer.device):
        return lambda row, values: None
    buffer = tensor.uop.base.buffer.ensure_allocated()
    allocator = Device[buffer.device].allocator
    if is_mapped(buffer.device):
        rows = np.frombuffer(buffer.as_memoryview(force_zero_copy=True), np.uint8).reshape(-1, row_size * _size(buffer))

        def write(row: int, values: np.ndarray) -> None:
            data = _bytes(buffer, values)
            rows[row, : len(data)] = data

        return write
    own = kind_of(buffer.device).row_writer(buffer, row_size)
    if own is not None:
        return own

    def copy(row: int, values: np.ndarray) -> None:
        target = allocator._offset(buffer._buf, values.nbytes, row * row_size * _size(buffer))
        allocator._copyin(target, _bytes(buffer, values).data)

    return copy


def _size(buffer: Buffer) -> int:
    return buffer.dtype.itemsize


def _bytes(buffer: Buffer, values: np.ndarray) -> np.ndarray:
    assert values.itemsize == _size(buffer), f"{values.dtype} values for a tensor of {buffer.dtype}"
    return np.ascontiguousarray(values).view(np.uint8)
