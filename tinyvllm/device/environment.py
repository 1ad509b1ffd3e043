"""tinygrad's settings. They are made before tinygrad is imported, since it reads most of them once, at import."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from tinyvllm.device.kinds import KINDS, check_known, kind_of
from tinyvllm.errors import DeviceError

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def prepare_environment() -> None:
    """Choose the device (DEV) unless the user has, and make its settings. Raises DeviceError for a device that is not
    known, for a PARALLEL that tinygrad could not read, and if it is too late."""
    wanted = {"DEV": os.environ.get("DEV") or default_device()}
    check_known(wanted["DEV"])
    _check_parallel(os.environ.get("PARALLEL"))
    settings = kind_of(wanted["DEV"]).settings
    wanted |= {key: os.environ.get(key, value) for key, value in settings.items()}
    late = {key: value for key, value in wanted.items() if os.environ.get(key) != value}
    if late and "tinygrad" in sys.modules:
        missing = " ".join(f"{key}={value}" for key, value in late.items())
        raise DeviceError(
            f"tinygrad was imported before tinyvllm, so its settings can no longer be made: "
            f"import tinyvllm first, or start the program with {missing} in its environment"
        )
    os.environ.update(late)


def default_device() -> str:
    """METAL on a Mac, CUDA if its driver is installed, else CPU. (tinygrad's own search may also choose OpenCL.)"""
    return next(kind.name for kind in KINDS.values() if kind.is_default())


def num_processes() -> int:
    """tinygrad's PARALLEL, by tinygrad's own rule, for those who have not imported it."""
    default = 0 if _number("VIZ", 0) else _number("NUM_CPU_THREADS", _num_cpus())
    return _number("PARALLEL", default // max(1, _number("PYTEST_XDIST_WORKER_COUNT", 1)))


def _check_parallel(given: str | None) -> None:
    if given is not None and not (given.isascii() and given.isdigit()):
        raise DeviceError(
            f"PARALLEL is {given!r}: give the number of processes that compile, 0 for none besides this one, or leave "
            "it unset for one per core"
        )


def _number(key: str, default: int) -> int:
    return int(os.environ.get(key, default))


def _num_cpus() -> int:
    if sys.version_info >= (3, 13):
        return max(1, os.process_cpu_count() or 1)
    with contextlib.suppress(FileNotFoundError, ValueError, ZeroDivisionError):
        quota, period = CGROUP_QUOTA.read_text().split()  # a quota of "max", which is no number, sets no limit
        return max(1, int(quota) // int(period))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
