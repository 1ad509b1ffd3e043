"""The part of the computer's own memory that this process may use."""

from __future__ import annotations

import os
import sys


def available_bytes() -> int:
    """Memory available without swapping (Linux); physical memory elsewhere."""
    if sys.platform.startswith("linux"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return min(int(line.split()[1]) * 1024, _cgroup_limit())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limit() -> int:
    """A container's memory limit, which /proc/meminfo does not show; a huge number if there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            text = file.read().strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if text == "max" else int(text)
