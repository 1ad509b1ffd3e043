"""tinygrad's settings. They are made before tinygrad is imported, since it reads most of them once, at import."""

from __future__ import annotations

import ctypes.util
import os
import sys

from tinyvllm.errors import DeviceError

# DMC: scalar C, which clang vectorizes 8 wide. Without it tinygrad emits float4 loads, which limit clang to 4.
CPU_SETTINGS = {"DMC": "1"}
# ALLOW_HALF8: 16-byte loads of float16. METAL has no such vectors.
CUDA_SETTINGS = {"ALLOW_HALF8": "1"}
SETTINGS = {"CPU": CPU_SETTINGS, "CUDA": CUDA_SETTINGS}


def prepare_environment() -> None:
    """Choose the device (DEV) unless the user has, and make its settings. Raises DeviceError if it is too late."""
    wanted = {"DEV": os.environ.get("DEV") or default_device()}
    settings = SETTINGS.get(wanted["DEV"].split(":")[0].upper(), {})
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
    if sys.platform == "darwin":
        return "METAL"
    return "CUDA" if ctypes.util.find_library("cuda") else "CPU"
