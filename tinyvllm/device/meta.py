"""Tensors without memory, with which another process traces a step as this one would.

`dump` pickles a value whose tensors lie on a device: of each buffer only its size, type and device. `load` restores it
with tensors whose buffers have no memory (PyTorch calls these meta tensors). What traces on them sees the shapes, the
formats, and which tensors share a buffer, and opens no device: `use_meta_devices` puts renderers in the devices' place.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinygrad import Device, Tensor, UOp
from tinygrad.device import Allocator, BufferSpec, Compiled
from tinygrad.dtype import AddrSpace, DType
from tinygrad.helpers import ALLOW_DEVICE_USAGE
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, ParamArg


def dump(value: object) -> bytes:
    """Pickle a value without its buffers' contents. Raises what pickle raises."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return Tensor, (obj.uop,)
        if isinstance(obj, UOp) and obj.op is Ops.BUFFER and obj.addrspace is AddrSpace.GLOBAL:
            return _make_buffer, (obj.dtype, obj.src, obj.arg, obj.tag)
        return NotImplemented


def _make_buffer(dtype: DType, src: tuple[UOp, ...], arg: ParamArg, tag: object) -> UOp:
    """A BUFFER node like the one that was pickled, with a number of this process's: by the other's, tinygrad would take
    it for a buffer that is made here. It has a buffer from now on, as one that is in memory."""
    uop = UOp(Ops.BUFFER, dtype, src, replace(arg, slot=next(UOp.unique_num)), tag)
    _ = uop.buffer
    return uop


def load(payload: bytes) -> Any:
    """The value that `dump` pickled, with meta tensors."""
    return pickle.loads(payload)


def make_tensor(device: str, size: int, dtype: DType) -> Tensor:
    """A flat meta tensor."""
    uop = UOp.new_buffer(device, size, dtype)
    _ = uop.buffer
    return Tensor(uop)


def use_meta_devices(renderers: Mapping[str, Renderer]) -> None:
    """From now on these devices, by tinygrad's names, have no memory and run nothing in this process."""
    devices = {name: _MetaDevice(name, renderer) for name, renderer in renderers.items()}
    Device._Device__get_canonicalized_item = devices.__getitem__
    ALLOW_DEVICE_USAGE.value = 1


def has_memory(device: str) -> bool:
    """Whether a device is more than a renderer here."""
    return not isinstance(Device[device], _MetaDevice)


class _MetaDevice(Compiled):
    def __init__(self, name: str, renderer: Renderer) -> None:
        super().__init__(name, _NoMemory(self), [type(renderer)], None)
        self._renderer = renderer

    @property
    def renderer(self) -> Renderer:
        return self._renderer


class _NoMemory(Allocator[_MetaDevice]):
    """A buffer in no memory is its offset."""

    def _alloc(self, size: int, options: BufferSpec) -> int:
        return 0

    def _offset(self, buf: int, size: int, offset: int) -> int:
        return buf + offset
