"""The lanes of this run's device."""

from __future__ import annotations

import pytest

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.kernel.lanes import Lanes, lanes_of


@pytest.fixture
def lanes(device: DeviceHandle) -> Lanes:
    found = lanes_of(device.name)
    if found is None:
        pytest.fail(f"the fused kernels do not run on DEV={device.name}", pytrace=False)
    return found
