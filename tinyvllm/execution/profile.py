"""The kernels of a step, each with its name and its time: the recorded calls of the serving graph, timed one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.execution.call_names import CallNamer, program_of
from tinyvllm.execution.cost import CostCounter, count_loads
from tinyvllm.execution.graphs import Graph
from tinyvllm.execution.operations import FlopCounter
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.ops.timing import CallTime, make_timer
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.kernels import Kernel, Launch, StepProfile, merge_cores
from tinyvllm.scheduling.plan import StepPlan


def profile_step(
    graph: Graph, model: Model, pool: KVPool, device: DeviceHandle, plan: StepPlan, *, repeats: int, warmup: int
) -> StepProfile:
    """Time the step of `plan` in the graph's first instance, as a whole and kernel by kernel.

    The step runs repeatedly, and writes its tokens' keys and values to the same slots each time."""
    instance = graph.instances[0]
    instance.packer.pack(plan)
    instance.send()
    device.wait()
    step_s = [_timed(instance.run, device) for _ in range(warmup + repeats)][warmup:]
    run = make_timer(device, instance.step)
    passes, walls_s = [], []
    for number in range(warmup + repeats):
        start = time.perf_counter()
        times = run()
        if number >= warmup:
            walls_s.append(time.perf_counter() - start)
            passes.append(times)
    calls, block_size = instance.step.calls, graph.layout.block_size
    names = CallNamer(model, pool).name(calls, instance.step.cut)
    loads = read_loads(graph, model, device, plan)
    counter = CostCounter(model, pool, block_size, loads)
    flops = FlopCounter(model, pool, block_size).count(calls, plan)
    each = [
        Kernel(
            name.operation,
            name.layer,
            program_of(call),
            call.buffers[0].device,
            statistics.median(times[number].seconds for times in passes),
            counter.moved_by(call, graph.inputs, plan),
            flops[number],
        )
        for number, (call, name) in enumerate(zip(calls, names, strict=True))
    ]
    return StepProfile(
        bucket=graph.bucket.name,
        device=device.name,
        num_cores=max(1, len(device.cores)),
        is_graphed=device.is_cpu,
        kernels=tuple(merge_cores(each)),
        step_s=statistics.median(step_s),
        profiled_s=statistics.median(walls_s),
        launches=tuple(_launches(each, passes[-1])),
        experts=tuple(loads),
        steps_s=tuple(step_s),
    )


def read_loads(graph: Graph, model: Model, device: DeviceHandle, plan: StepPlan) -> list[ExpertLoad]:
    """What the sparse layers chose in the last run of the graph's first instance, which was of `plan`."""
    routings = [device.read_ints(buffer) for buffer in graph.instances[0].routings]
    return count_loads(model, routings, plan.num_tokens)


def _launches(kernels: Sequence[Kernel], times: Sequence[CallTime]) -> Iterator[Launch]:
    for kernel, timed in zip(kernels, times, strict=True):
        yield Launch(kernel.label, kernel.program, kernel.device, timed.start_ns, timed.seconds)


def _timed(run: Callable[[], None], device: DeviceHandle) -> float:
    start = time.perf_counter()
    run()
    device.wait()
    return time.perf_counter() - start
