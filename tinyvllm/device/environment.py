"""tinygrad's settings. They are made before tinygrad is imported, since it reads most of them once, at import."""

from __future__ import annotations

import os
import sys

from tinyvllm.device.kinds import KINDS, check_known, kind_of
from tinyvllm.errors import DeviceError


def prepare_environment() -> None:
    """Choose the device (DEV) unless the user has, and make its settings. Raises DeviceError for a device that is not
    known, and if it is too late."""
    wanted = {"DEV": os.environ.get("DEV") or default_device()}
    check_known(wanted["DEV"])
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
