"""Memory by block: what remains, the peak, and blocks of the same name added up."""

from __future__ import annotations

import sys

import pytest

from tinyvllm.bench import memory
from tinyvllm.bench.memory import MemoryWatch

MIB = 1 << 20


def test_blocks_add_up_what_stays_and_keep_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rss, peak = iter([10, 15, 15, 12, 12, 20, 20]), iter([30, 12, 25])
    monkeypatch.setattr(memory, "rss_bytes", lambda: next(rss))
    monkeypatch.setattr(memory, "peak_bytes", lambda: next(peak))
    watch = MemoryWatch()
    watch.device_bytes = lambda: 7
    watch.end("steps")
    watch.end("other")
    watch.end("steps")
    steps, other = watch.blocks
    assert (steps.rss, steps.rss_delta, steps.rss_peak) == (20, 5 + 8, 30)
    assert (other.rss_delta, other.rss_peak) == (-3, 12)
    assert (steps.device, steps.device_delta, other.device_delta) == (7, 7, 0)


def test_each_block_has_its_own_peak() -> None:
    watch = MemoryWatch()
    held = bytearray(b"x" * (64 * MIB))
    del held
    watch.end("large")
    watch.end("small")
    large, small = watch.blocks
    if not sys.platform.startswith("linux"):
        assert large.rss is large.rss_peak is large.rss_delta is None
        return
    assert large.rss_peak is not None and small.rss_peak is not None
    assert large.rss_peak - small.rss_peak > 32 * MIB or large.rss_peak == small.rss_peak  # where it cannot be reset
