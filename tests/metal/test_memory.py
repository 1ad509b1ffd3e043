"""How much of a Mac's memory the engine takes."""

from __future__ import annotations

from typing import Any

import pytest

from tinyvllm.errors import TinyvllmError
from tinyvllm.ops.device import MAX_UNIFIED_SHARE, METAL_SHARE, open_device


def test_the_pool_is_cut_from_what_the_system_recommends(simulator: Any) -> None:
    device = open_device()
    assert device.is_unified
    assert device.free_memory() == simulator.memory_bytes * 2 // 3
    assert device.default_share() == METAL_SHARE < MAX_UNIFIED_SHARE


def test_nobody_takes_more_than_the_computer_can_spare() -> None:
    device = open_device()
    device.check_share(MAX_UNIFIED_SHARE)
    with pytest.raises(TinyvllmError, match=r"--gpu-memory-utilization is 0.95, but METAL shares its memory"):
        device.check_share(0.95)
