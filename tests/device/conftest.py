"""The device of this run, opened once."""

from __future__ import annotations

import pytest

import tinyvllm.device  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tinyvllm.device.handle import DeviceHandle, open_device


@pytest.fixture(scope="session")
def device() -> DeviceHandle:
    return open_device()
