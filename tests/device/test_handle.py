"""Opening a device; arrays reach it, whoever owns their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from tinygrad import Device, dtypes
from tinygrad.device import Buffer, BufferSpec
from tinygrad.helpers import Context, from_mv

from tinyvllm.config import CORES_VARIABLE, usable_cores
from tinyvllm.device import handle
from tinyvllm.device.environment import prepare_environment
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.kinds import KINDS
from tinyvllm.errors import DeviceError


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("is_writable", [True, False])
def test_an_array_of_a_files_pages_is_uploaded(
    device: DeviceHandle, monkeypatch: pytest.MonkeyPatch, is_mapped: bool, is_writable: bool
) -> None:
    """CUDA's and OpenCL's allocators take writable memory only; a memory map of a checkpoint is not."""
    values = np.arange(64, dtype=np.float32)
    values.flags.writeable = is_writable
    if not is_mapped:
        monkeypatch.setattr(handle, "is_mapped", lambda name: False)

        def copy_in(allocator: object, target: object, source: memoryview) -> None:
            copied.append(bytes(from_mv(source)))

        copied: list[bytes] = []
        probe = device.zeros(1, handle.FLOATS["float32"]).uop.base.buffer.allocator
        monkeypatch.setattr(type(probe), "_copyin", copy_in)
        device.upload(values)
        assert copied == [values.tobytes()]
    else:
        np.testing.assert_array_equal(device.upload(values).numpy(), values)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has METAL")
def test_a_device_that_is_not_here_is_refused_with_those_that_are() -> None:
    program = "from tinyvllm.device.handle import open_device; open_device()"
    here = ", ".join(name for name, kind in KINDS.items() if not kind.why_missing())
    assert here.endswith("CPU") and "METAL" not in here
    instead = f"give --device (or DEV) one of those here: {here}"
    for name, says in (
        ("FOO", f"device FOO is not known: {instead}"),
        ("METAL", f"METAL is the GPU of a Mac, and this computer is not a Mac. Instead, {instead}"),
    ):
        environment = {**os.environ, "DEV": name}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stderr.splitlines()[-1].endswith(says), done.stderr


@pytest.mark.parametrize("wrong", ["abc", "-1", ""])
def test_a_number_of_processes_that_tinygrad_could_not_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("PARALLEL", wrong)
    with pytest.raises(DeviceError, match=f"^PARALLEL is '{wrong}': give the number of processes that compile"):
        prepare_environment()


def test_an_environment_variable_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES_VARIABLE, "1")
    assert usable_cores() == 1
    monkeypatch.setenv(CORES_VARIABLE, "100000")
    most = usable_cores()
    monkeypatch.delenv(CORES_VARIABLE)
    assert usable_cores() == most
    for wrong in ("0", "two", "-1", "1.5"):
        monkeypatch.setenv(CORES_VARIABLE, wrong)
        with pytest.raises(DeviceError, match=f"{CORES_VARIABLE} is '{wrong}': it must be a whole number"):
            usable_cores()


def test_a_buffer_of_several_cores_may_be_freed_while_code_is_generated() -> None:
    """tinygrad lets nobody use a device then, and the garbage collector does not know."""
    handle.open_device(2)
    buffer = Buffer("CPU", 64, dtypes.float, options=BufferSpec(nolru=True)).allocate()
    buffer.get_buf("CPU:1")
    with Context(ALLOW_DEVICE_USAGE=0):
        buffer.deallocate()
        with pytest.raises(AssertionError, match="usage of device CPU:63 disallowed"):
            _ = Device["CPU:63"]
    assert not buffer.is_allocated()
