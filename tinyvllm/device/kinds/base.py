"""What the engine asks of a kind of device, with defaults that suit most GPUs.

The kinds import NumPy where they use it: the compiling processes begin before large imports, and ask the kind first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tinyvllm.config import Limits

if TYPE_CHECKING:
    import numpy as np
    from tinygrad.device import Buffer

    from tinyvllm.device.block_copies import BlockCopies, Plane
    from tinyvllm.device.mapping import HostArray, OutputReader, RowWriter
    from tinyvllm.device.recording import RecordedStep


@dataclass(frozen=True)
class ProgramLimits:
    """What a device allows a program."""

    arguments: int  # buffers and variables together
    threads: int  # of a threadgroup
    shared_bytes: int  # of threadgroup memory


class DeviceKind:
    """A kind of device. Subclasses override what differs; every method has a default that works on any GPU that
    tinygrad drives. `name` arguments are tinygrad's name of one device, such as "CUDA:1"."""

    settings: ClassVar[Mapping[str, str]] = {}  # environment variables that tinygrad reads when it is imported
    is_unified: ClassVar[bool] = False  # it shares the computer's memory
    default_share: ClassVar[float] = 0.9  # of the free memory, for weights and KV cache
    has_kernels: ClassVar[bool] = False  # the operations in ops have kernels for it
    program_limits: ClassVar[ProgramLimits | None] = None
    safe_threads: ClassVar[int] = 512  # of a threadgroup that runs however many registers its kernel needs
    pins_host_memory: ClassVar[bool] = False  # `host_bytes` has a result

    def __init__(self, name: str) -> None:
        self.name = name

    def is_default(self) -> bool:
        """Whether this computer has it and should use it unless the user names another."""
        return False

    def why_missing(self) -> str:
        """Why this computer cannot have such a device, as far as can be told without opening it; "" if it may."""
        return ""

    def can_be_installed(self) -> bool:
        """Whether this system can have such a device, once what it needs is installed."""
        return True

    def opened(self, name: str) -> None:
        """What to do once tinygrad has opened the device."""

    def check(self) -> None:
        """Raise DeviceError, with the remedy, if something that it needs is missing."""

    def step_limits(self, free_bytes: Callable[[], int]) -> Limits:
        """The default limits of one step."""
        return Limits(max_num_seqs=16, max_num_batched_tokens=512)

    def free_memory(self, name: str) -> int:
        """Bytes that could be allocated now."""
        from tinyvllm.device.host_memory import available_bytes

        return available_bytes()

    def hardware_name(self, name: str) -> str:
        """The maker's name ("NVIDIA H200", "Apple M4"), or tinygrad's name of the device if there is none."""
        return name

    def gpu_cores(self, name: str) -> int | None:
        """The number of its cores where its name does not tell variants apart; None elsewhere, or if unknown."""
        return None

    def input_array(self, buffer: Buffer) -> HostArray | None:
        """Host memory from which inputs reach `buffer` without waiting; None: use the allocator's copy."""
        return None

    def copy_in(self, buffer: Buffer, data: np.ndarray) -> bool:
        """Enqueue copying many bytes to the beginning of `buffer`; `data` may change when it returns. False: use the
        allocator's copy."""
        return False

    def wake(self) -> None:
        """Start the slow first part of opening the device. Called on a thread beside the engine's imports."""

    def clear(self, buffer: Buffer) -> bool:
        """Enqueue filling a buffer with zeros, without a kernel, which would be compiled. False: there is no such
        command."""
        return False

    def output_reader(self, buffer: Buffer) -> OutputReader | None:
        """A reader that waits for one step alone; None: use a mark in the queue."""
        return None

    def row_writer(self, buffer: Buffer, row_size: int) -> RowWriter | None:
        """A writer of single rows; None: use the allocator's copy at an offset."""
        return None

    def block_copies(self, name: str, planes: Sequence[Plane]) -> BlockCopies | None:
        """What copies blocks to the host's memory and back; None: nothing does, unless the memory is mapped."""
        return None

    def host_bytes(self, name: str, nbytes: int) -> np.ndarray | None:
        """Bytes of host memory that the device copies from and to by itself; None: any memory will do."""
        return None

    def make_replay(self, name: str, step: RecordedStep) -> Callable[[], Any] | None:
        """A function that enqueues a step; None: use tinygrad's graph."""
        return None
