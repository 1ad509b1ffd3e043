"""The device's limits for a program, and how much of them the programs of a recorded step use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from tinygrad.uop.ops import Ops

from tinyvllm.device.kinds import kind_of
from tinyvllm.device.recording import Call

# As tinygrad's renderers declare threadgroup memory. Read from the source: a compiled program has no field for its size
# (ProgramInfo), and one restored from disk no other statements.
_SHARED = re.compile(
    r"(?:threadgroup __attribute__\(\(aligned\(16\)\)\)|__shared__ __align__\(16\)) (?:unsigned )?(\w+) \w+\[(\d+)\]"
)
_BYTES = {
    "bool": 1,
    "char": 1,
    "uchar": 1,
    "half": 2,
    "bfloat": 2,
    "nv_bfloat16": 2,
    "short": 2,
    "ushort": 2,
}


@dataclass(frozen=True)
class ProgramFacts:
    """One program: its arguments (buffers and variables), and a threadgroup's threads and bytes of memory."""

    name: str
    arguments: int
    threads: int
    shared_bytes: int

    def over(self, device: str) -> list[str]:
        """The limits of the device that it exceeds, in words."""
        limits = kind_of(device).program_limits
        if limits is None:
            return []
        taken = (self.arguments, self.threads, self.shared_bytes)
        names = ("arguments", "threads", "bytes of threadgroup memory")
        return [
            f"{self.name}: {value} {name}, {device} has {limit}"
            for value, limit, name in zip(taken, astuple(limits), names, strict=True)
            if value > limit
        ]


def program_facts(calls: Iterable[Call]) -> list[ProgramFacts]:
    """Facts of each program that the calls launch, once each."""
    programs = {id(call.target): call for call in calls if call.target.op is Ops.PROGRAM}
    return [_facts(call) for call in programs.values()]


def _facts(call: Call) -> ProgramFacts:
    info = call.target.arg
    sources = [uop.arg for uop in call.target.src if uop.op is Ops.SOURCE]
    threads = math.prod(info.local_size or (1,))
    return ProgramFacts(info.name, len(call.buffers) + len(info.vars), threads, shared_bytes("".join(sources)))


def shared_bytes(source: str) -> int:
    """Bytes of the threadgroup memory that a kernel's source declares."""
    return sum(_BYTES.get(kind, 4) * int(count) for kind, count in _SHARED.findall(source))
