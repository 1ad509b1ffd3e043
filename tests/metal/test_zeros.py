"""Buffers of zeros: small ones are copied, because a kernel that fills one would be compiled for each size."""

from __future__ import annotations

import numpy as np
import pytest

from tests.metal.simulator import Settings


def test_small_buffers_of_zeros_compile_nothing(simulator: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad import dtypes
    from tinygrad.codegen import to_program_cache

    from tinyvllm.device import handle

    monkeypatch.setattr(handle, "COPIED_BYTES", 4 * 5000)
    device = handle.open_device()
    num_programs = len(to_program_cache)
    for size in (1, 4999, 5000):
        for _ in range(2):  # the second may get the first one's memory
            tensor = device.zeros(size, dtypes.int)
            assert not device.read(tensor).any() and device.read(tensor).size == size
            device.write(tensor, np.ones(size, np.int32))
            assert device.read(tensor).all()
            del tensor
    assert len(to_program_cache) == num_programs
    assert not device.read(device.zeros(5003, dtypes.int)).any()
    assert len(to_program_cache) > num_programs, "a size of no other test, filled by kernels"
