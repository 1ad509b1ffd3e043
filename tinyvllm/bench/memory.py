"""How much memory each part of a run takes, in the process and on the device: what remains, and the peak."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Linux: Documentation/filesystems/proc.rst, clear_refs


@dataclass(frozen=True)
class MemoryBlock:
    """The memory of one part of a run, in bytes. None where it is unknown: on systems other than Linux, or before there
    is a device.

    rss: of the process, at the end; `rss_delta`: what stays; `rss_peak`: the most meanwhile. `device`: all buffers at
    the end."""

    name: str
    rss: int | None
    rss_delta: int | None
    rss_peak: int | None
    device: int | None = None
    device_delta: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "block": self.name,
            "rss_bytes": self.rss,
            "rss_delta_bytes": self.rss_delta,
            "rss_peak_bytes": self.rss_peak,
            "device_bytes": self.device,
            "device_delta_bytes": self.device_delta,
        }


class MemoryWatch:
    """Measures blocks one after another. `device_bytes`: called at both ends of a block, once there is a device."""

    def __init__(self) -> None:
        self.device_bytes: Callable[[], int] | None = None
        self._blocks: dict[str, MemoryBlock] = {}
        self._rss: int | None = None
        self._device: int | None = None
        self.mark()

    @property
    def blocks(self) -> list[MemoryBlock]:
        """In the order in which they began."""
        return list(self._blocks.values())

    def mark(self) -> None:
        """Begin a block here. What happened before belongs to none."""
        _reset_peak()
        self._rss, self._device = rss_bytes(), self._ask_device()

    def end(self, name: str) -> None:
        """End a block here, and begin the next. Blocks of the same name are added up."""
        rss, device, peak = rss_bytes(), self._ask_device(), peak_bytes()
        earlier = self._blocks.get(name)
        self._blocks[name] = MemoryBlock(
            name=name,
            rss=rss,
            rss_delta=_added(None if earlier is None else earlier.rss_delta, _growth(self._rss, rss)),
            rss_peak=peak if peak is None or earlier is None else max(peak, earlier.rss_peak or 0),
            device=device,
            device_delta=_added(None if earlier is None else earlier.device_delta, _growth(self._device or 0, device)),
        )
        self.mark()

    def _ask_device(self) -> int | None:
        return None if self.device_bytes is None else self.device_bytes()


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _added(before: int | None, more: int | None) -> int | None:
    return more if before is None or more is None else before + more


def rss_bytes() -> int | None:
    """The resident memory of this process; None on systems other than Linux."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The peak since the last reset; None on systems other than Linux."""
    return _status("VmHWM")


def _status(name: str) -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10  # kB
    return None


def _reset_peak() -> None:
    """Reset the peak to the resident memory now. Where that is forbidden, peaks are since the start of the process."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            CLEAR.write_text(RESET_PEAK)
