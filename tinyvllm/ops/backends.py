"""The choice of a backend by device."""

from __future__ import annotations

from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu import CpuBackend
from tinyvllm.ops.device import DeviceHandle


def make_backend(device: DeviceHandle, dtype: str, *, dequantize: bool) -> Backend:
    """`dtype`: "auto" or a name of config.DTYPES."""
    return CpuBackend(device, None if dtype == "auto" else dtype, dequantize=dequantize)
