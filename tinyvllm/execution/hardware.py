"""A device's measured rates, without a model."""

from __future__ import annotations

from tinyvllm.config import default_cores
from tinyvllm.device.bandwidth import measure_bandwidth
from tinyvllm.device.handle import open_device
from tinyvllm.device.hardware import measure_flops


def measure_device(num_cores: int | None = None) -> tuple[float, float]:
    """(bytes, operations) per second of the default device, by tests of a few seconds. Raises DeviceError."""
    device = open_device(num_cores or default_cores())
    return measure_bandwidth(device), measure_flops(device)
