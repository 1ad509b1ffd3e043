"""How much of a Mac's memory the engine takes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tinyvllm.device.handle import MAX_UNIFIED_SHARE, open_device
from tinyvllm.device.kinds.metal import Metal
from tinyvllm.errors import TinyvllmError


def test_the_pool_is_cut_from_what_the_system_recommends(simulator: Any) -> None:
    device = open_device()
    assert device.is_unified
    assert device.free_memory() == simulator.memory_bytes * 2 // 3
    assert device.default_share() == Metal.default_share < MAX_UNIFIED_SHARE


def test_without_a_recommendation_the_pool_is_cut_from_the_computer_s_own_memory(
    simulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "memory_bytes", 0)
    device = open_device()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device.free_memory() <= whole
    assert device.default_share() * device.free_memory() < MAX_UNIFIED_SHARE * whole


def test_nobody_takes_more_than_the_computer_can_spare() -> None:
    device = open_device()
    device.check_share(MAX_UNIFIED_SHARE)
    with pytest.raises(TinyvllmError, match=r"--gpu-memory-utilization is 0.95, but METAL shares its memory"):
        device.check_share(0.95)
