"""A tiny warm engine, and faults to plant in it: each could enter real code by one careless line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)

# isort: split
import numpy as np
from tinygrad import UOp
from tinygrad.device import Buffer
from tinygrad.engine.realize import run_linear
from tinygrad.uop.ops import CallInfo, Ops

from tests.bench.fakes import make_machine
from tinyvllm.bench.breakdown import BreakdownWork
from tinyvllm.bench.breakdown_json import breakdown_json
from tinyvllm.bench.breakdown_measure import measure_breakdown
from tinyvllm.bench.cold_start import ColdStart
from tinyvllm.bench.stages import Case
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.device.recording import RecordedStep
from tinyvllm.device.replay import make_replay
from tinyvllm.execution.graphs import Graph, GraphInstance
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.profiling.chips import Chip
from tinyvllm.scheduling.plan import StepOutput, StepPlan

WORK = BreakdownWork((Case(None, 20, 1, 4), Case(None, 20, 2, 4)), num_repeats=1, num_profiled=1)
CHIP = Chip("test chip", 100.0, 10.0, "made up", "CPU")
KEPT = ("kind", "model", "dtype", "device", "vocab_size", "prefix_caching")
KEPT_OF_CASE = ("name", "prompt_tokens", "output_tokens", "per_step")


def ignore(stage: str, done: int, total: int) -> None:
    """Progress is not shown."""


def make_runner(files: ModelFiles) -> ModelRunner:
    """A warm runner on one core, with a bucket for each step of WORK."""
    config = EngineConfig(
        model="tiny",
        max_num_seqs=2,
        max_model_len=64,
        max_num_batched_tokens=40,
        num_gpu_blocks_override=16,
        decode_buckets=(1, 2),
        token_buckets=(40,),
        cpu_cores=1,
        compile_cache=False,
    )
    runner = load_runner(files, config, ignore)
    runner.warm_up(ignore)
    return runner


def measure(runner: Any) -> dict[str, Any]:
    """The JSON of a breakdown of WORK."""
    start = ColdStart(None, 0.0, 0.0, ())
    return breakdown_json(measure_breakdown(RunnerInspector(runner), None, make_machine(), WORK, start, CHIP, ignore))


def only_counts(figures: dict[str, Any]) -> dict[str, Any]:
    """The parts of a breakdown's JSON that do not depend on the machine or the date."""
    cases = [{name: case[name] for name in KEPT_OF_CASE} for case in figures["cases"]]
    return {name: figures[name] for name in KEPT} | {"cases": cases}


# -- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def extra_sync(runner: ModelRunner) -> Iterator[None]:
    """An extra wait for the step, before the read that waits anyway."""
    original = runner.collect

    def collect(flight: Any) -> StepOutput:
        runner.wait()
        return original(flight)

    with _replaced(runner, "collect", collect):
        yield


@contextmanager
def host_copy_of_logits(runner: ModelRunner) -> Iterator[None]:
    """A debugging copy of the logits that was left in."""
    original = runner.launch

    def launch(plan: StepPlan) -> Any:
        flight = original(plan)
        _logits(runner.captures.graph_for(plan)).numpy()
        return flight

    with _replaced(runner, "launch", launch):
        yield


@contextmanager
def sampler_on_the_cpu(runner: ModelRunner) -> Iterator[None]:
    """The recorded steps end with the logits, and NumPy picks the token."""

    def collect(flight: Any) -> StepOutput:
        runner.wait()
        rows = _logits(runner.captures.graph_for(flight.plan)).numpy().reshape(-1, _stride(runner))
        tokens = [int(np.argmax(row[: runner.model_config.vocab_size])) for row in rows[: len(flight.plan.sampled)]]
        return StepOutput(tuple(tokens), (None,) * len(tokens))

    with _replaced(runner, "collect", collect), _replaced_lanes(runner, _without_sampling):
        yield


@contextmanager
def ungraphed_step(runner: ModelRunner) -> Iterator[None]:
    """The step's kernels are passed to tinygrad one by one."""

    def without_graph(runner: ModelRunner, instance: GraphInstance) -> GraphInstance:
        calls = [
            UOp(Ops.CALL, src=(call.target, *(UOp.from_buffer(buffer) for buffer in call.buffers)), arg=CallInfo())
            for call in instance.step.calls
        ]
        return dataclasses.replace(instance, run=lambda: run_linear(UOp(Ops.LINEAR, src=tuple(calls))))

    with _replaced_lanes(runner, without_graph):
        yield


@contextmanager
def recompiled_prefill(runner: ModelRunner) -> Iterator[None]:
    """A prompt's graph is captured when the prompt arrives, instead of at the start."""
    original = runner.launch

    def launch(plan: StepPlan) -> Any:
        if not plan.is_decode:
            runner.captures.remake(runner.buckets[-1])
        return original(plan)

    with _replaced(runner, "launch", launch):
        yield


FAULTS = {
    "extra synchronization": extra_sync,
    "host copy of the logits": host_copy_of_logits,
    "sampler on the CPU": sampler_on_the_cpu,
    "un-graphed step": ungraphed_step,
    "recompilation": recompiled_prefill,
}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def _replaced_lanes(runner: ModelRunner, change: Any) -> Iterator[None]:
    before = dict(runner.captures.graphs)
    for bucket, graph in before.items():
        instances = tuple(change(runner, instance) for instance in graph.instances)
        runner.captures.graphs[bucket] = dataclasses.replace(graph, instances=instances)
    try:
        yield
    finally:
        runner.captures.graphs.update(before)


def _without_sampling(runner: ModelRunner, instance: GraphInstance) -> GraphInstance:
    step: RecordedStep = dataclasses.replace(instance.step, calls=instance.step.calls[: instance.step.cut])
    return dataclasses.replace(instance, step=step, run=make_replay(runner.backend.device, step))


def _stride(runner: ModelRunner) -> int:
    return runner.model.logit_stride


def _logits(graph: Graph) -> Buffer:
    """What the last kernel before sampling writes."""
    step = graph.instances[0].step
    call = step.calls[step.cut - 1]
    return call.buffers[call.target.arg.outs[0]].ensure_allocated()
