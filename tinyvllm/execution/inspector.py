"""What measurements need from a runner besides running steps: costs, profiles, programs, and its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tinyvllm.config import KVFormat
from tinyvllm.device import hardware
from tinyvllm.device.accounting import DeviceAccount
from tinyvllm.device.bandwidth import measure_bandwidth
from tinyvllm.device.kinds import ProgramLimits
from tinyvllm.device.program_limits import ProgramFacts, program_facts
from tinyvllm.device.recording import with_repeated_call
from tinyvllm.device.replay import make_replay
from tinyvllm.execution.cost import CostCounter, StepCost, WeightFacts, formats_in_use, weight_facts
from tinyvllm.execution.profile import profile_step
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.kernels import StepProfile
from tinyvllm.scheduling.plan import StepPlan

FILL_VALUES = 1_000_003  # random numbers that a pool is filled with, over and over: a prime, so that no block repeats


class RunnerInspector:
    """Looks into a runner for benchmarks, profiles and the doctor. Changes only the pool's contents."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    @property
    def weights(self) -> WeightFacts:
        """Format, count and bytes of the model's matrices."""
        return weight_facts(self.runner.model)

    @property
    def formats(self) -> list[str]:
        """The formats of the matrices, by what they are for."""
        return formats_in_use(self.runner.model)

    @property
    def num_cores(self) -> int:
        """The cores of a CPU, each of which launches its own kernels; 1 elsewhere."""
        return max(1, len(self.runner.backend.device.cores))

    @property
    def output_bytes(self) -> int:
        """What the host reads after every step: tokens and their logprobs, padding included."""
        return self.runner.outputs[0].nbytes()

    @property
    def hardware(self) -> str:
        """The maker's name of the device."""
        return hardware.hardware_name(self.runner.backend.device)

    @property
    def gpu_cores(self) -> int | None:
        """The number of cores of a Mac's GPU; None elsewhere."""
        return hardware.gpu_cores(self.runner.backend.device)

    @property
    def architecture(self) -> str:
        """The target of the kernels: "Apple9", "sm_90"; "" on a CPU."""
        return hardware.architecture(self.runner.backend.device)

    @property
    def has_graphs(self) -> bool:
        """Whether the device launches a step as one graph."""
        return hardware.has_graphs(self.runner.backend.device)

    @property
    def general_operations(self) -> list[str]:
        """The operations in the general kernels, a line for each reason."""
        return self.runner.backend.coverage.lines()

    def cost(self, plan: StepPlan, loads: Sequence[ExpertLoad] = ()) -> StepCost:
        """Kernels and bytes of the step that executes `plan`, counted. `loads`: of its experts, if they were
        measured."""
        runner = self.runner
        graph = runner.captures.graph_for(plan)
        counter = CostCounter(runner.model, runner.pool, runner.capacity.block_size, loads)
        return counter.count(graph.bucket.name, graph.calls, graph.inputs, plan)

    @property
    def program_limits(self) -> ProgramLimits | None:
        """What the device allows a program; None if it has no such limits."""
        return self.runner.backend.device.kind.program_limits

    def programs(self) -> list[ProgramFacts]:
        """How much of the device's limits each program of each graph uses."""
        instances = [graph.instances[0] for graph in self.runner.captures.graphs.values()]
        return program_facts([call for one in instances for call in (*one.step.calls, *one.processed.calls)])

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile:
        """Time each kernel of `plan`'s step. Nothing else may be in flight."""
        runner = self.runner
        graph, device = runner.captures.graph_for(plan), runner.backend.device
        return profile_step(graph, runner.model, runner.pool, device, plan, repeats=repeats, warmup=warmup)

    @contextmanager
    def repeated_kernel(self) -> Iterator[None]:
        """Within this context, each step launches the kernel that reads and writes the most bytes twice in a row, which
        computes the same result."""
        captures, device = self.runner.captures, self.runner.backend.device
        before = dict(captures.graphs)
        for bucket, graph in before.items():
            instances = []
            for instance in graph.instances:
                step = with_repeated_call(instance.step)
                instances.append(dataclasses.replace(instance, step=step, run=make_replay(device, step)))
            captures.graphs[bucket] = dataclasses.replace(graph, instances=tuple(instances))
        try:
            yield
        finally:
            captures.graphs.update(before)

    def account(self) -> DeviceAccount:
        """A counter of everything that the host asks of the device while it is open."""
        return DeviceAccount(self.runner.backend.device)

    def measure_flops(self) -> float:
        """Operations a second of a matrix product, by a test of a second or two."""
        return hardware.measure_flops(self.runner.backend.device)

    def measure_bandwidth(self) -> float:
        """Bytes a second of the device's memory, by a test of a second or less."""
        return measure_bandwidth(self.runner.backend.device)

    def fill_adapters(self, seed: int) -> None:
        """Put random adapters of the largest rank into all slots."""
        assert self.runner.adapters is not None, "adapters are on"
        self.runner.adapters.fill_slots(seed)

    def fill_pool(self, num_blocks: int, seed: int) -> None:
        """Write random keys and values to the first blocks of each layer. Memory that was never written may not exist
        yet: a CPU reads all untouched pages from one page of zeros, out of its cache."""
        pool, write = self.runner.pool, self.runner.backend.device.write
        values = np.random.default_rng(seed).standard_normal(FILL_VALUES, np.float32)
        for layer, count in pool.num_blocks.items():
            share = min(num_blocks, count) / count
            for tensor, form in pool.codes_of(layer):
                write(tensor, np.resize(_drawn(values, form), round(tensor.nbytes() * share)))
            for tensor in pool.tensors_of(layer)[len(pool.codes_of(layer)) :]:
                scales = np.abs(values * np.float32(0.01)).astype(np.float16).view(np.uint8)
                write(tensor, np.resize(scales, round(tensor.nbytes() * share)))


def _drawn(values: np.ndarray, form: KVFormat) -> np.ndarray:
    """The bytes of random numbers in a format; of codes, any bytes but those of e4m3's NaN."""
    if form.is_quantized:
        codes = values.view(np.uint8)
        return codes & 0xBF if form.name == "fp8_e4m3" else codes
    if form.name == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(form.name).view(np.uint8)
