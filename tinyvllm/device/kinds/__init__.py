"""The kinds of devices, one file each. To add a kind, add a file here and a line to KINDS.

Nothing here imports tinygrad before a device is opened: its settings are read from here first.
"""

import importlib.util
from pathlib import Path

from tinyvllm.device.kinds.base import DeviceKind, ProgramLimits
from tinyvllm.device.kinds.cpu import Cpu
from tinyvllm.device.kinds.cuda import Cuda
from tinyvllm.device.kinds.metal import Metal
from tinyvllm.device.kinds.opencl import OpenCl
from tinyvllm.errors import DeviceError

# By tinygrad's names. The first that is `is_default` where the engine starts is chosen when the user names none.
KINDS: dict[str, DeviceKind] = {kind.name: kind for kind in (Metal(), Cuda(), OpenCl(), Cpu())}


def kind_of(device: str) -> DeviceKind:
    """The kind of a device by tinygrad's name of it, such as "CUDA:1". An unknown one is a plain DeviceKind."""
    name = device.split(":")[0].upper()
    return KINDS.get(name) or DeviceKind(name)


def check_known(device: str) -> None:
    """Raise DeviceError for a name of a device that neither this engine nor tinygrad has: DEV=FOO."""
    name = device.split(":")[0]
    if name.upper() not in KINDS and not _is_tinygrads(name.lower()):
        raise DeviceError(f"device {name} is not known: {choice()}")


def choice(failed: str = "") -> str:
    """What to do instead, in words: the devices that this computer may have. failed: the one that it is instead of."""
    others = {name: kind for name, kind in KINDS.items() if name != failed.split(":")[0].upper()}
    here = [name for name, kind in others.items() if not kind.why_missing()]
    if not here:
        possible = [name for name, kind in others.items() if kind.can_be_installed()]
        return f"give --device (or DEV) one of {', '.join(possible)}, and install what it needs"
    return f"give --device (or DEV) one of those here: {', '.join(here)}"


def _is_tinygrads(name: str) -> bool:
    """Whether tinygrad has a module for it. Found without importing tinygrad, whose settings are not made yet."""
    found = importlib.util.find_spec("tinygrad")
    folders = [] if found is None else found.submodule_search_locations or []
    return any((Path(folder) / "runtime" / f"ops_{name}.py").is_file() for folder in folders)


__all__ = ["KINDS", "DeviceKind", "ProgramLimits", "check_known", "choice", "kind_of"]
