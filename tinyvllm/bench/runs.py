"""The JSON of every benchmark, read as figures that can be compared: docs/PROFILING.md has the fields of each.

A run has conditions, which must be the same in two runs for their figures to be comparable, and cases, each with its
own conditions and figures. A figure is a time, a rate or a count; times of the host's stages have the processor time of
their thread beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.result_files import fields_of, read_result
from tinyvllm.bench.stages import DEVICE_STAGES, STAGES
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling.measure import ADMISSION, TOKENIZE
from tinyvllm.profiling.request_stages import DECODE as SERVED_DECODE
from tinyvllm.profiling.request_stages import PREFILL as SERVED_PREFILL
from tinyvllm.profiling.request_stages import STAGES as SERVED_STAGES

# Kinds of figures: a whole that users see, a stage of it, or a part of a start; a rate is better if it is higher.
WHOLE, STAGE, START, RATE = "whole", "stage", "start", "rate"
BREAKDOWN, SERVED, LOAD, COLD_START, PROFILE = "breakdown", "served breakdown", "load", "cold start", "profile"
CONTEXTS = "contexts"
# From a request's arrival until its first step: overlaps with stages of its own and of other requests' steps
QUEUE_WAIT = "wait in the queue"
SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
MACHINE_FIELDS = ("cpu", "cores", "system")
START_PARTS = ("import_s", "load_s", "schedule_s", "compile_s", "capture_s", "first_token_s", "all_graphs_s")
OLD_STAGES = {"queue": ADMISSION, "rest": "loop"}  # names before schema 3


@dataclass(frozen=True)
class Figure:
    """One figure of a case. Times in ms. `cpu`: processor time of the thread. `per`: the unit that it is measured by: a
    step, a request. `parts`: its components in ms, for the explanation."""

    name: str
    kind: str
    value: Estimate
    cpu: Estimate | None = None
    per: str = "step"
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunCase:
    """`step_ms`: how long a whole step takes, which says how much a stage's growth matters. `counts`: by phase.
    `details`: by phase, what ran outside the recorded steps. `kernels`: dispatches by name."""

    name: str
    conditions: Mapping[str, Any]
    figures: Sequence[Figure]
    step_ms: float = 0.0
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    details: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kernels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """`conditions` must be equal, else runs are refused; `labels` may differ, and are named."""

    kind: str
    conditions: Mapping[str, Any]
    labels: Mapping[str, Any]
    cases: Sequence[RunCase]
    vocab_size: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """What was measured, in one line."""
        where = [str(self.conditions[name]) for name in ("model", "dtype", "device") if self.conditions.get(name)]
        return ", ".join([*where, *(str(self.environment.get(name)) for name in ("commit", "date"))])


def read_run(path: str) -> Run:
    """The run in a file that a benchmark's --json wrote. Raises TinyvllmError for anything else."""
    data = read_result(path)
    kind = kind_of(data)
    if kind is None:
        raise TinyvllmError(
            f"{path} is not the JSON of a benchmark: create one with --json, for example "
            f"`tinyvllm bench breakdown --json {path}`"
        )
    with fields_of(path, kind=kind):
        return make_run(data)


def kind_of(data: Any) -> str | None:
    """Which benchmark wrote this JSON. None: no benchmark did."""
    first = data[0] if isinstance(data, list) and data else data
    if not isinstance(first, dict):
        return None
    if first.get("kind") in _READERS:
        return str(first["kind"])
    if "by_operation" in first:
        return PROFILE
    if "first_token_s" in first and "buckets" in first:
        return COLD_START
    if "phase" in first and "tok_s" in first:  # before rows said so
        return "throughput" if first["phase"] == "throughput" else "latency"
    return None


def make_run(data: Any) -> Run:
    """The run of a benchmark's JSON value."""
    kind = kind_of(data)
    assert kind is not None, "kind_of was asked before"
    return _READERS[kind](data)


# -- breakdown -------------------------------------------------------------------------------------------------------


def _breakdown(data: Mapping[str, Any]) -> Run:
    cases = [_breakdown_case(case) for case in data["cases"]]
    if data.get("cold_start"):
        cases.append(RunCase("cold start", _start_conditions(data["cold_start"]), _start_figures(data["cold_start"])))
    sampling = data.get("sampling", {})
    conditions = {name: data.get(name) for name in ("model", "dtype", "params", "device", "prefix_caching")}
    conditions |= {name: sampling.get(name) for name in SAMPLING_FIELDS}
    return _run(BREAKDOWN, data, conditions, cases)


def _breakdown_case(case: Mapping[str, Any]) -> RunCase:
    stages = {OLD_STAGES.get(name, name): stage for name, stage in case.get("stages", {}).items()}
    wholes = [
        Figure(name.removesuffix("_s"), WHOLE, _repeated(case[name]), per=per)
        for name, per in (("plain_wall_s", "repeat"), ("ttft_s", "request"), ("tpot_s", "token"))
        if name in case
    ]
    if "queue_wait_s" in case:
        wholes.append(Figure(QUEUE_WAIT, WHOLE, _repeated(case["queue_wait_s"]), per="request"))
    names = [name for name in STAGES if stages.get(name, {}).get("count")]
    return RunCase(
        name=case["name"],
        conditions={name: case[name] for name in ("prompt_tokens", "output_tokens")},
        figures=[*wholes, *(_stage(name, stages[name]) for name in names)],
        step_ms=case["tpot_s"]["mean"] * 1e3 if "tpot_s" in case else 0.0,
        counts={
            phase: {name: value for name, value in counts.items() if isinstance(value, int)}
            for phase, counts in case["per_step"].items()
        },
        details={phase: counts.get("details", []) for phase, counts in case["per_step"].items()},
        kernels={row["label"]: row["dispatches"] for row in case.get("kernels", [])},
    )


def _stage(name: str, stage: Mapping[str, Any]) -> Figure:
    """A stage: the mean of its repeats' medians. With a single repeat its uncertainty is that of all its times."""
    pooled = Estimate.of_spread({"mean": stage["mean_s"], "std": stage["std_s"], "count": stage["count"]}, 1e3)
    repeats = stage.get("by_repeat", [])
    value, cpu = pooled, None
    if repeats:
        value = Estimate.of_values([row["median_s"] * 1e3 for row in repeats])
        value = value if len(repeats) > 1 else value.at_least_as_unsure_as(pooled)
    if "cpu_mean_s" in stage and name not in DEVICE_STAGES:
        spread = {"mean": stage["cpu_mean_s"], "std": stage["cpu_std_s"], "count": stage["count"]}
        cpu = Estimate.of_spread(spread, 1e3)
        if len(repeats) > 1:
            cpu = cpu.at_least_as_unsure_as(Estimate.of_values([row["cpu_mean_s"] * 1e3 for row in repeats]))
    parts = {
        part: stage[f"{part}_s"] * 1e3 / stage["count"] for part in ("enqueue", "wait", "read") if f"{part}_s" in stage
    }
    return Figure(name, STAGE, value, cpu, "request" if name in (TOKENIZE, ADMISSION) else "step", parts)


def _repeated(spread: Mapping[str, Any]) -> Estimate:
    """Times of requests in ms. Those of one repeat resemble each other, so the means of repeats count if known."""
    estimate = Estimate.of_spread(spread, 1e3)
    means = spread.get("by_repeat", [])
    if len(means) < 2:
        return estimate
    return estimate.at_least_as_unsure_as(Estimate.of_values([mean * 1e3 for mean in means]))


# -- a start ---------------------------------------------------------------------------------------------------------


def _cold_start(data: Mapping[str, Any]) -> Run:
    conditions = {name: data.get(name) for name in ("model", "dtype", "params", "device")}
    return _run(COLD_START, data, conditions, [RunCase("cold start", _start_conditions(data), _start_figures(data))])


def _start_conditions(start: Mapping[str, Any]) -> dict[str, Any]:
    """Whether programs came from the cache of an earlier start, which takes much less time than compiling them."""
    return {
        "graphs": len(start.get("buckets", [])),
        "programs from the cache": not start.get("num_compiled") and bool(start.get("num_kept")),
    }


def _start_figures(start: Mapping[str, Any]) -> list[Figure]:
    return [
        Figure(name.removesuffix("_s"), START, Estimate(start[name] * 1e3), per="start")
        for name in START_PARTS
        if name in start
    ]


# -- rows of latency, throughput and load ----------------------------------------------------------------------------


def _rows(data: Sequence[Mapping[str, Any]]) -> Run:
    """Rows of `bench latency` and `bench throughput`."""
    first = data[0]
    conditions = {name: first.get(name) for name in ("model", "dtype", "params", "device")}
    return _run(str(kind_of(data)), first, conditions, [_row_case(row) for row in data])


def _row_case(row: Mapping[str, Any]) -> RunCase:
    step = {"mean": row["step_ms_mean"], "std": row["step_ms_std"], "count": row["steps"]}
    rate = {"mean": row["tok_s"], "std": row["tok_s_std"], "count": row["repeats"]}
    figures = [Figure("tok/s", RATE, Estimate.of_spread(rate)), Figure("step", WHOLE, Estimate.of_spread(step))]
    for name in ("wall_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        if row.get(name):
            scale = 1e3 if name.endswith("_s") else 1.0
            figures.append(Figure(name.rpartition("_")[0], WHOLE, Estimate.of_spread(row[name], scale), per="request"))
    name = row["test"] + (f", {row['capture']}" if row.get("capture") else "")
    counts = {
        count: row[count]
        for count in ("kernels", "replays", "bytes", "moved_bytes", "preemptions")
        if isinstance(row.get(count), int)
    }
    conditions = {field: row.get(field) for field in ("phase", "batch", "context", "tokens", "requests", "input_len")}
    return RunCase(name, conditions, figures, row["step_ms_median"], {row["phase"]: counts})


def _load(data: Sequence[Mapping[str, Any]]) -> Run:
    """Rows of `bench serve`."""
    conditions = {name: data[0].get(name) for name in ("model", "api", "slo_ms")}
    return _run(LOAD, data[0], conditions, [_load_case(row) for row in data])


def _load_case(row: Mapping[str, Any]) -> RunCase:
    name = f"{row['concurrency']} at once" if row["rate"] is None else f"{row['rate']:g} per second"
    figures = [Figure("output tok/s", RATE, Estimate(row["output_tok_s"]))]
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        if row.get(key):
            figures.append(Figure(key.removesuffix("_ms"), WHOLE, Estimate.of_spread(row[key]), per="request"))
    step_ms = row["tpot_ms"]["mean"] if row.get("tpot_ms") else 0.0
    counts = {"load": {"failed requests": sum(row["errors"].values())}}
    return RunCase(name, {"requests": row["requests"]}, figures, step_ms, counts)


# -- served requests -------------------------------------------------------------------------------------------------


def _served(data: Mapping[str, Any]) -> Run:
    conditions = {name: data.get(name) for name in ("model", "api", "input_len", "output_len")}
    return _run(SERVED, data, conditions, [_served_case(level) for level in data["levels"]])


def _served_case(level: Mapping[str, Any]) -> RunCase:
    """A level: the figures without a recording, its stages, and what the way back of every token takes."""
    plain = _load_case(level["plain"])
    rows, count = level["stages"], level.get("requests", 0)
    stages = [_served_stage(name, rows[name], count) for name in SERVED_STAGES if name in rows]
    back = [
        Figure(f"every token: {name.removesuffix('_ms').replace('_', ' ')}", STAGE, Estimate(value), per="token")
        for name, value in level.get("delivery", {}).items()
        if name.endswith("_ms")
    ]
    return RunCase(
        name=plain.name,
        conditions=plain.conditions,
        figures=[*plain.figures, *stages, *back],
        step_ms=plain.step_ms,
        counts=plain.counts,
    )


def _served_stage(name: str, row: Mapping[str, Any], num_requests: int) -> Figure:
    """The median of a stage over all requests, and its mean processor time where the engine's thread runs it."""
    is_host = name not in (SERVED_PREFILL, SERVED_DECODE)
    cpu = Estimate(row["cpu_ms"]) if is_host and row.get("cpu_ms") is not None else None
    spread = {"mean": row["p50_ms"], "std": row.get("std_ms", 0.0), "count": num_requests}
    return Figure(name, STAGE, Estimate.of_spread(spread), cpu, per="request")


# -- a profile -------------------------------------------------------------------------------------------------------


def _profile(data: Mapping[str, Any]) -> Run:
    """A step of `tinyvllm profile`, and its kernels by operation."""
    figures = [Figure(name.removesuffix("_s"), WHOLE, Estimate(data[name] * 1e3)) for name in ("step_s", "turn_s")]
    figures += [Figure(row["label"], STAGE, Estimate(row["total_s"] * 1e3)) for row in data["by_operation"]]
    counts = {data["phase"]: {name: data[name] for name in ("kernels", "moved_bytes")}}
    conditions = {name: data.get(name) for name in ("phase", "batch", "context", "bucket")}
    kernels = {row["label"]: row["dispatches"] for row in data["by_operation"]}
    case = RunCase(str(data["bucket"]), conditions, figures, data["step_s"] * 1e3, counts, kernels=kernels)
    return _run(PROFILE, data, {name: data.get(name) for name in ("model", "dtype", "device")}, [case])


def _contexts(data: Sequence[Mapping[str, Any]]) -> Run:
    """Rows of `bench contexts`."""
    conditions = {name: data[0].get(name) for name in ("model", "dtype", "params", "device")}
    cases = [
        RunCase(
            name=f"context {row['context']}, batch {row['batch']}",
            conditions={},
            figures=[
                Figure("step", WHOLE, Estimate(row["step_ms"])),
                Figure("attention", STAGE, Estimate(row["attention_ms"])),
            ],
            step_ms=row["step_ms"],
            counts={"decode": {name: row[name] for name in ("bytes", "kv_bytes")}},
        )
        for row in data
    ]
    return _run(CONTEXTS, data[0], conditions, cases)


def _run(kind: str, data: Mapping[str, Any], conditions: Mapping[str, Any], cases: Sequence[RunCase]) -> Run:
    environment = data.get("environment", {})
    labels = {name: environment.get(name) for name in (*MACHINE_FIELDS, "tinygrad", "python")}
    return Run(
        kind=kind,
        conditions=conditions,
        labels=labels | dict(data.get("settings", {})),
        cases=cases,
        vocab_size=data.get("vocab_size", 0),
        environment=environment,
    )


_READERS: dict[str, Callable[[Any], Run]] = {
    BREAKDOWN: _breakdown,
    COLD_START: _cold_start,
    "latency": _rows,
    "throughput": _rows,
    LOAD: _load,
    SERVED: _served,
    PROFILE: _profile,
    CONTEXTS: _contexts,
}


def figures_of(case: RunCase) -> dict[str, Figure]:
    """By name."""
    return {figure.name: figure for figure in case.figures}


def conditions_that_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The fields that both runs have, with different values."""
    for name in after:
        one, two = before.get(name), after[name]
        if one is not None and two is not None and one != two:
            yield name, one, two
