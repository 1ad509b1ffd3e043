"""Timed kernels, from a profile of ours or from a DEBUG=2 log, and the tables they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.chips import GB, Chip
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.names import label

GROUPINGS = ("operation", "layer", "kernel", "program")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step, or one line of a log. `seconds`, `nbytes` and `flops` are those of one run on the device;
    None if unknown."""

    operation: str  # qkv, attention, sample
    layer: int | None
    program: str
    device: str
    seconds: float
    nbytes: float | None = None
    flops: float | None = None
    count: int = 1  # kernels that this stands for: those of a graph whose time is known as a whole
    shares: int = 1  # cores of a CPU that run a share of it at the same time

    @property
    def label(self) -> str:
        return label(self.layer, self.operation)

    @property
    def launches(self) -> int:
        """Launches on all cores together."""
        return self.count * self.shares


@dataclass(frozen=True)
class Launch:
    """One run of one kernel, for a timeline. `start_ns` is a time of time.perf_counter_ns."""

    label: str
    program: str
    device: str
    start_ns: int
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """One step as it runs when serving (`step_s`), and kernel by kernel. Times are medians over repeats.

    `kernels`: on a CPU each stands for its shares on all cores, with the time of the slowest core. `is_graphed`: the
    kernels were timed inside the step as served; otherwise each was launched separately."""

    bucket: str
    device: str
    num_cores: int
    is_graphed: bool
    kernels: tuple[Kernel, ...]
    step_s: float  # from launch to done, without packing inputs and reading tokens
    profiled_s: float  # the same, while its kernels were timed
    launches: tuple[Launch, ...]  # of the last repeat, in order
    experts: tuple[ExpertLoad, ...] = ()  # of the sparse layers
    steps_s: tuple[float, ...] = ()  # of each repeat, of which step_s is the median

    @property
    def kernels_s(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def timed_inside_s(self) -> float | None:
        """The step while its kernels were timed. None unless they were timed inside it: else it takes longer anyway."""
        return self.profiled_s if self.is_graphed else None

    @property
    def between_s(self) -> float | None:
        """Time between kernels, in which they are launched and cores wait. None unless timed inside the step."""
        return max(0.0, self.profiled_s - self.kernels_s) if self.is_graphed else None

    @property
    def num_kernels(self) -> int:
        """Kernels launched by all cores together."""
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def num_dispatches(self) -> int:
        """The number of kernels, where the shares of all cores count as one."""
        return sum(kernel.count for kernel in self.kernels)


def join_steps(steps: Sequence[StepProfile]) -> StepProfile:
    """The steps of one prompt as one, with all their kernels; what its experts chose is that of the last."""
    names = [step.bucket for step in steps]
    return replace(
        steps[-1],
        bucket=" + ".join(f"{len(list(same))} x {name}" if len(steps) > 1 else name for name, same in groupby(names)),
        kernels=tuple(kernel for step in steps for kernel in step.kernels),
        step_s=sum(step.step_s for step in steps),
        profiled_s=sum(step.profiled_s for step in steps),
        steps_s=tuple(map(sum, zip(*(step.steps_s for step in steps), strict=True))),
        launches=tuple(launch for step in steps for launch in step.launches),
    )


@dataclass(frozen=True)
class KernelRow:
    """The kernels of one label. Rates cover only the kernels whose bytes or operations are known."""

    label: str
    dispatches: int  # of which the shares on several cores are one
    launches: int  # by all cores
    total_s: float
    share: float  # of the time of all kernels
    nbytes: float | None
    flops: float | None
    bytes_per_s: float | None
    flops_per_s: float | None
    roof_share: float | None  # share of the speed that the chip's roofline allows for these bytes and operations

    @property
    def average_s(self) -> float:
        return self.total_s / self.dispatches

    def as_json(self) -> dict[str, object]:
        return {
            "label": self.label,
            "dispatches": self.dispatches,
            "launches": self.launches,
            "total_s": self.total_s,
            "average_s": self.average_s,
            "share": self.share,
            "bytes": self.nbytes,
            "flops": self.flops,
            "gb_per_s": None if self.bytes_per_s is None else self.bytes_per_s / GB,
            "gflop_per_s": None if self.flops_per_s is None else self.flops_per_s / 1e9,
            "roof_share": self.roof_share,
        }


def merge_cores(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Merge the cores' shares of each kernel: the slowest one's time, and the bytes and operations of all. The n-th
    kernels of a name on each core are the shares of one."""
    shares: dict[tuple[str, str, int], list[Kernel]] = {}
    seen: dict[tuple[str, str], int] = {}
    for kernel in kernels:
        place = seen[kernel.label, kernel.device] = seen.get((kernel.label, kernel.device), -1) + 1
        shares.setdefault((kernel.label, kernel.device.split(":")[0], place), []).append(kernel)
    return [_merged(group) if len(group) > 1 else group[0] for group in shares.values()]


def _merged(group: Sequence[Kernel]) -> Kernel:
    return replace(
        max(group, key=lambda kernel: kernel.seconds),
        nbytes=_known((kernel.nbytes, 0.0) for kernel in group)[0],
        flops=_known((kernel.flops, 0.0) for kernel in group)[0],
        shares=len(group),
    )


def tabulate(kernels: Sequence[Kernel], by: str = "operation", chip: Chip | None = None) -> list[KernelRow]:
    """Group the kernels into rows, the longest first."""
    if by not in GROUPINGS:
        raise ProfilingError(f"--by is {by!r}: give one of {', '.join(GROUPINGS)}")
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(_key(kernel, by), []).append(kernel)
    whole = sum(kernel.seconds for kernel in kernels)
    rows = [_row(name, group, whole, chip) for name, group in groups.items()]
    return sorted(rows, key=lambda row: -row.total_s)


def _key(kernel: Kernel, by: str) -> str:
    if by == "layer":
        return "outside layers" if kernel.layer is None else f"layer {kernel.layer}"
    return {"operation": kernel.operation, "kernel": kernel.label, "program": kernel.program or kernel.operation}[by]


def _row(name: str, group: list[Kernel], whole_s: float, chip: Chip | None) -> KernelRow:
    total_s = sum(kernel.seconds for kernel in group)
    nbytes, bytes_s = _known((kernel.nbytes, kernel.seconds) for kernel in group)
    flops, flops_s = _known((kernel.flops, kernel.seconds) for kernel in group)
    return KernelRow(
        label=name,
        dispatches=sum(kernel.count for kernel in group),
        launches=sum(kernel.launches for kernel in group),
        total_s=total_s,
        share=total_s / whole_s if whole_s else 0.0,
        nbytes=nbytes,
        flops=flops,
        bytes_per_s=None if nbytes is None or not bytes_s else nbytes / bytes_s,
        flops_per_s=None if flops is None or not flops_s else flops / flops_s,
        roof_share=None if chip is None else _roof_share(group, chip),
    )


def _known(pairs: Iterable[tuple[float | None, float]]) -> tuple[float | None, float]:
    """The sum of the known amounts, and the seconds of their kernels."""
    known = [(amount, seconds) for amount, seconds in pairs if amount is not None]
    return (sum(amount for amount, _ in known), sum(seconds for _, seconds in known)) if known else (None, 0.0)


def _roof_share(group: list[Kernel], chip: Chip) -> float | None:
    """The minimal time of the group's kernels over the time they took, for those with known bytes."""
    known = [kernel for kernel in group if kernel.nbytes is not None]
    took_s = sum(kernel.seconds for kernel in known)
    if not took_s:
        return None
    return sum(floor_s(chip, kernel.nbytes or 0, kernel.flops or 0) for kernel in known) / took_s


def floor_s(chip: Chip, nbytes: float, flops: float) -> float:
    """The minimal time for these bytes and operations by the roofline model (Williams, Waterman and Patterson 2009)."""
    return max(nbytes / (chip.bandwidth_gbps * GB), flops / (chip.half_tflops * 1e12))
