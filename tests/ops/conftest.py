"""The kinds of backends. The GPU kind's tests carry the mark `gpu` and run on any device with threadgroups; OpenCL on a
CPU (PoCL) is one: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import pytest

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend

KINDS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session")
def device() -> DeviceHandle:
    return open_device()


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest, device: DeviceHandle) -> str:
    """Which kernels are tested: "cpu" or "gpu". They need a device of their own kind."""
    if (request.param == "cpu") != device.is_cpu:
        pytest.fail(f"the {request.param} kind's kernels do not run on DEV={device.name}", pytrace=False)
    return request.param


@pytest.fixture(scope="session")
def backend(kind: str, device: DeviceHandle) -> Backend:
    """Activations in float32; matrices as they are."""
    return CpuBackend(device, None) if kind == "cpu" else GpuBackend(device, "float32")


@pytest.fixture(scope="session")
def reference(device: DeviceHandle) -> ReferenceBackend:
    return ReferenceBackend(device)
