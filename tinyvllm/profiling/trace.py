"""Parse what tinygrad prints under DEBUG=2: one line per kernel, on any device, possibly truncated or interleaved.

A line of tinygrad 0.14 (realize.track_stats), without its colors:

    *** CUDA    12 qkv_float16_1x3072x2048 arg  5 mem   3.13 GB tm 10.98us/ 106.58ms ( 1081 GFLOPS  192|3893   GB/s)

Each part is matched separately, so a line without a name or a time, from an earlier version or truncated still yields
what it has. A number counts only if its unit follows, so a truncated number is never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyvllm.profiling.kernels import Kernel, merge_cores
from tinyvllm.profiling.names import SAMPLE, is_sampling, layers_by_order, role_of, split_trace_name, strip_colors

COPY = "copy"
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}

_START = re.compile(r"(?=\*\*\* )")  # the kernels of two threads may share a line
_HEAD = re.compile(r"\*\*\* (?P<device>[A-Z][A-Z0-9]*(?::\d*)?)\s+(?:(?P<number>\d{1,15})\s+)?(?P<rest>.*)")
_ARGS = re.compile(r"(?:^|\s)arg\s+(\d{1,9})\s")
_MEMORY = re.compile(r"(?:^|\s)mem\s+(\d+(?:\.\d+)?) ([KMGT]?)B\b")
_NAME_END = re.compile(r"(?:^|\s+)(?:arg\s+\d+\s|arg\s*\d*$|tm\s|mem\s)")
_TIME = re.compile(r"(?:^|\s)tm\s+(\d+(?:\.\d+)?)(ns|us|ms|s)(?=[\s/]|$)")
_FLOPS = re.compile(r"(\d+(?:\.\d+)?) ([KMGTP]?)FLOPS")
_RATES = re.compile(r"(\d+(?:\.\d+)?)(?:\|(\d+(?:\.\d+)?))?\s+([KMGTP]?)B/s")
_BATCH = re.compile(r"^batched (\d{1,9})")
_SCHEDULED = re.compile(r"(?:^|\*\*\* |\s)scheduled\s+(\d{1,9}) kernels in\s+(\d+(?:\.\d+)?) (ns|us|ms|s)\b")


@dataclass(frozen=True)
class TraceLine:
    """The contents of one line. `seconds` and the rates are None if the line lacks them or was truncated earlier."""

    device: str
    layer: int | None  # these two from the label of a step's kernel, before the program's name
    label: str | None
    program: str
    number: int | None  # kernels run so far; the kernels of one graph share it
    num_args: int | None
    memory_bytes: float | None  # in use at that time
    seconds: float | None
    flops_per_s: float | None
    bytes_per_s: float | None  # of distinct memory, as declared by the kernel
    num_kernels: int  # 1, or the number in a graph
    is_copy: bool
    is_cut: bool

    @property
    def nbytes(self) -> float | None:
        return None if self.bytes_per_s is None or self.seconds is None else self.bytes_per_s * self.seconds

    @property
    def flops(self) -> float | None:
        return None if self.flops_per_s is None or self.seconds is None else self.flops_per_s * self.seconds


@dataclass(frozen=True)
class Trace:
    """All kernels of a log in order, and its other facts."""

    lines: tuple[TraceLine, ...]
    num_other_lines: int  # lines that are not of a kernel
    scheduling_s: float  # from "scheduled N kernels in T": time in Python before kernels run
    num_scheduled: int  # N of those lines, summed

    @property
    def num_cut(self) -> int:
        return sum(line.is_cut for line in self.lines)

    @property
    def num_untimed(self) -> int:
        return sum(line.seconds is None for line in self.lines)

    @property
    def device_s(self) -> float:
        return sum(line.seconds or 0.0 for line in self.lines)

    def kernels(self, last_steps: int | None = None) -> list[Kernel]:
        """The lines with a time, named by what they do; the shares of a CPU's cores are one kernel, as in profiles.
        `last_steps`: only this many of the last steps, each of which begins with an embedding; this skips loading and
        warm-up. All lines if the log has fewer steps."""
        operations = [_operation(line) for line in self.lines]
        layers = self._layers(operations)
        first = _start_of(operations, last_steps)
        each = [
            Kernel(operation, layer, line.program, line.device, line.seconds, line.nbytes, line.flops, line.num_kernels)
            for line, operation, layer in list(zip(self.lines, operations, layers, strict=True))[first:]
            if line.seconds is not None
        ]
        copies = [kernel for kernel in each if kernel.operation == COPY]
        return copies + merge_cores([kernel for kernel in each if kernel.operation != COPY])

    def _layers(self, operations: Sequence[str]) -> list[int | None]:
        """The layer of each line: the one in its label, or counted per device, since every core of a CPU runs every
        layer."""
        layers: list[int | None] = [line.layer for line in self.lines]
        if any(line.label is not None for line in self.lines):
            return layers
        for device in {line.device for line in self.lines}:
            places = [index for index, line in enumerate(self.lines) if line.device == device]
            found = layers_by_order(operations[index] for index in places)
            for index, layer in zip(places, found, strict=True):
                layers[index] = layer
        return layers


def parse_trace(text: str) -> Trace:
    """Parse a DEBUG=2 log. Never raises: lines that are not of a kernel are only counted."""
    lines: list[TraceLine] = []
    num_other, num_scheduled, scheduling_s = 0, 0, 0.0
    for piece in _pieces(strip_colors(text)):
        scheduled = _SCHEDULED.search(piece)
        if scheduled:
            num_scheduled += int(scheduled[1])
            scheduling_s += float(scheduled[2]) * _SECONDS[scheduled[3]]
        elif (line := _parse_line(piece)) is not None:
            lines.append(line)
        elif piece.strip():
            num_other += 1
    return Trace(tuple(lines), num_other, scheduling_s, num_scheduled)


def _pieces(text: str) -> Iterator[str]:
    """Split into lines, and lines into parts that start with a kernel's `***`. Progress bars end in a carriage
    return."""
    for line in text.splitlines():
        yield from _START.split(line)


def _parse_line(piece: str) -> TraceLine | None:
    head = _HEAD.match(piece)
    if head is None:
        return None
    rest = head["rest"]
    end = _NAME_END.search(rest)
    if head["number"] is None and end is None:
        return None  # not a kernel's `***`
    layer, label, name = split_trace_name((rest[: end.start()] if end else rest).strip())
    args, memory, time = _ARGS.search(rest), _MEMORY.search(rest), _TIME.search(rest)
    figures = rest[time.end() :] if time else ""
    flops, rates = _FLOPS.search(figures), _RATES.search(figures)
    batch = _BATCH.match(name)
    is_copy = name.startswith(COPY)
    return TraceLine(
        device=head["device"],
        layer=layer,
        label=label,
        program=name,
        number=None if head["number"] is None else int(head["number"]),
        num_args=int(args[1]) if args else None,
        memory_bytes=float(memory[1]) * _SCALE[memory[2]] if memory else None,
        seconds=float(time[1]) * _SECONDS[time[2]] if time else None,
        flops_per_s=float(flops[1]) * _SCALE[flops[2]] if flops else None,
        bytes_per_s=float(rates[1]) * _SCALE[rates[3]] if rates else None,
        num_kernels=int(batch[1]) if batch else 1,
        is_copy=is_copy,
        is_cut=rates is None and not (time is None and memory is not None and rest.endswith("GB")),
    )


def _operation(line: TraceLine) -> str:
    if line.is_copy:
        return COPY
    if line.label is not None:
        return line.label
    if line.num_kernels > 1:
        return f"graph of {line.num_kernels} kernels"
    if is_sampling(line.program):
        return SAMPLE
    return role_of(line.program) or line.program or "a kernel without a name"


def _start_of(operations: Sequence[str], last_steps: int | None) -> int:
    """The index where the last steps begin; 0 for all. Consecutive embeddings are the cores of a CPU, so one step."""
    if last_steps is None:
        return 0
    starts = [
        index
        for index, operation in enumerate(operations)
        if operation == "embed" and (index == 0 or operations[index - 1] != "embed")
    ]
    return starts[-last_steps] if len(starts) >= last_steps else 0
