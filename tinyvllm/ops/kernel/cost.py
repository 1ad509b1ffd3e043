"""Predicted times of kernels that read a matrix from memory once, to choose between the shapes that such a kernel can
have.

A kernel takes the time of whatever limits it: the memory, the way from the caches into one multiprocessor, its
instructions, or the latency of its loads. Few kernels are limited by one of them alone, so they are added by a p-norm.

    memory        bytes / bandwidth. Threadgroups that all run at once share the bandwidth unevenly, since the
                  multiprocessors are at different distances from the memory, and the slowest one ends last. With
                  several turns, a threadgroup that ends early makes room for the next one.
    core          bytes of the busiest multiprocessor / what its caches deliver
    instructions  of the busiest multiprocessor / (4 a cycle)
    latency       turns * steps * (latency + loads * interval): a warp loads, waits, computes. By Little's law, bytes in
                  flight = bandwidth * latency, this is what limits kernels with too few bytes in flight.

Turns are threadgroups / (multiprocessors * threadgroups that fit into one by their registers and warps).

The constants of an H200 are those of its data sheet where there are any; the others were fitted to 564 times of one
row's products in float16 (44 matrices from 0.5B to 70B with 13 shapes each, drawn at random), of shapes up to 30 %
slower than the fastest with a root mean square error of 5.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.ops.kernel.lanes import LANES

SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction a cycle


@dataclass(frozen=True)
class Gpu:
    """What limits a kernel on a chip. `source`: of the figures, in this order."""

    cores: int  # multiprocessors
    clock_hz: float
    warps: int  # that a multiprocessor holds
    groups: int
    registers: int
    bandwidth: float  # bytes a second that long kernels reach
    core_bandwidth: float  # from the caches into one multiprocessor
    latency_s: float  # of a step's loads, plus `load_s` for each load of a lane
    load_s: float
    launch_s: float  # of a kernel whose loads begin after the previous kernel has ended
    early_s: float  # of those, what a kernel gains that loads while the previous one still runs
    unevenness: float  # of the share of the bandwidth
    even_turns: float  # turns that halve it
    norm: float  # p


# NVIDIA H200 Tensor Core GPU data sheet, and CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability", 9.0: the first five. The other figures were fitted.
H200 = Gpu(
    cores=132,
    clock_hz=1.755e9,
    warps=64,
    groups=32,
    registers=65536,
    bandwidth=4.74e12,
    core_bandwidth=150e9,
    latency_s=0.14e-6,
    load_s=0.106e-6,
    launch_s=1.84e-6,
    early_s=0.85e-6,
    unevenness=0.195,
    even_turns=2.8,
    norm=3.95,
)


@dataclass(frozen=True)
class Streaming:
    """The work of a kernel."""

    nbytes: int  # of the matrix
    groups: int  # threadgroups
    warps: int  # of each
    registers: int  # of a lane
    steps: int  # of a warp, each of which waits for memory once
    loads: int  # of 16 bytes that a lane has in flight in a step
    instructions: float  # of a warp, in all steps
    begins_early: bool  # all loads of the matrix precede the wait for the previous kernel

    def residents(self, gpu: Gpu) -> int:
        """Threadgroups that a multiprocessor holds."""
        by_registers = gpu.registers // (self.registers * LANES * self.warps)
        return max(1, min(gpu.warps // self.warps, by_registers, gpu.groups))

    def seconds(self, gpu: Gpu) -> float:
        """The predicted time, with a launch in a graph."""
        busiest = -(-self.groups // gpu.cores)
        turns = self.groups / (gpu.cores * self.residents(gpu))
        uneven = 1 + gpu.unevenness / (1 + (turns / gpu.even_turns) ** 2)
        limits = (
            self.nbytes / gpu.bandwidth * uneven,
            self.nbytes / self.groups * busiest / gpu.core_bandwidth,
            self.instructions * self.warps * busiest / (SCHEDULERS * gpu.clock_hz),
            -(-self.groups // (gpu.cores * self.residents(gpu)))
            * self.steps
            * (gpu.latency_s + self.loads * gpu.load_s),
        )
        start_s = gpu.launch_s - (gpu.early_s if self.begins_early else 0.0)
        return start_s + sum(limit**gpu.norm for limit in limits) ** (1 / gpu.norm)
