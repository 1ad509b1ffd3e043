"""Nothing reaches the device unseen: recorded steps, single operations, waits and copies, whoever asks for them."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Device, Tensor

import tinyvllm.device  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tinyvllm.device.accounting import DeviceAccount
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.device.recording import record
from tinyvllm.device.replay import make_replay


@pytest.fixture
def device() -> DeviceHandle:
    return open_device()


def test_recorded_step_is_one_launch_of_all_its_kernels(device: DeviceHandle) -> None:
    tensor = device.upload(np.arange(64, dtype=np.float32))
    step = record(lambda: ((tensor + 1).contiguous().sum() * 2).realize())
    run = make_replay(device, step)
    with DeviceAccount(device) as account:
        run()
        counts = account.take()
        device.wait()
        waited = account.take()
    assert (counts.replays, counts.kernels) == (1, len(step.calls))
    assert (counts.eager_kernels, counts.syncs, counts.compilations, counts.copies_d2h) == (0, 0, 0, 0)
    assert waited.syncs == 1  # of all cores together


def test_operation_outside_of_a_step_is_seen_with_its_kernel(device: DeviceHandle) -> None:
    tensor = device.upload(np.arange(8, dtype=np.float32))
    with DeviceAccount(device) as account:
        (tensor * 3).realize()
        counts = account.take()
    assert (counts.replays, counts.eager_kernels, counts.kernels, counts.compilations) == (0, 1, 1, 1)
    (detail,) = counts.details
    assert detail.endswith(f" on {device.name}")


def test_copies_are_counted_by_direction_with_their_bytes(device: DeviceHandle) -> None:
    tensor = device.upload(np.arange(8, dtype=np.int32))
    with DeviceAccount(device) as account:
        tensor.numpy()
        out = account.take()
        device.write(tensor, np.zeros(8, np.int32))
        back = account.take()
    assert (out.copies_d2h, out.bytes_d2h, out.copies_h2d, out.syncs) == (1, 32, 0, 1)
    assert (back.copies_h2d, back.bytes_h2d, back.copies_d2h) == (1, 32, 0)


def test_closed_account_leaves_nothing_behind(device: DeviceHandle) -> None:
    before = Device[device.name].synchronize
    with DeviceAccount(device) as account:
        Tensor([1.0]).realize()
        account.take()
    assert "synchronize" not in vars(Device[device.name]) and Device[device.name].synchronize == before
    (Tensor([1.0]) + 1).realize()
    assert account.take().numbers == {name: 0 for name in account.take().numbers}
