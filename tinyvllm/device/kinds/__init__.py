"""The kinds of devices, one file each. To add a kind, add a file here and a line to KINDS.

Nothing here imports tinygrad before a device is opened: its settings are read from here first.
"""

from tinyvllm.device.kinds.base import DeviceKind, ProgramLimits
from tinyvllm.device.kinds.cpu import Cpu
from tinyvllm.device.kinds.cuda import Cuda
from tinyvllm.device.kinds.metal import Metal
from tinyvllm.device.kinds.opencl import OpenCl

# By tinygrad's names. The first that is `is_default` where the engine starts is chosen when the user names none.
KINDS: dict[str, DeviceKind] = {kind.name: kind for kind in (Metal(), Cuda(), OpenCl(), Cpu())}


def kind_of(device: str) -> DeviceKind:
    """The kind of a device by tinygrad's name of it, such as "CUDA:1". An unknown one is a plain DeviceKind."""
    name = device.split(":")[0].upper()
    return KINDS.get(name) or DeviceKind(name)


__all__ = ["KINDS", "DeviceKind", "ProgramLimits", "kind_of"]
