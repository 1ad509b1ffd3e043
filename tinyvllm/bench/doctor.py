"""Checks that a model runs on this machine as it should, with a remedy for each problem. Belongs in a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import tinyvllm
from tinyvllm.bench.kernel_profile import find_hardware
from tinyvllm.bench.latency import Case, LatencyWork, measure_latency
from tinyvllm.bench.subject import Subject
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import Progress
from tinyvllm.profiling.predict import FACTORS, predict

GOOD, ODD, BAD = "ok", "odd", "bad"  # as expected; worth a look; broken
SMOKE_TOKENS, SMOKE_CONTEXT = 20, 128
SLOW = 0.6  # share of the predicted speed below which something is wrong
BUSY = 0.5  # load average per core, over the last minute


@dataclass(frozen=True)
class Check:
    """One line of the result: what was checked, its status, its value, and the remedy if something is wrong."""

    name: str
    status: str
    value: str
    remedy: str = ""


def examine(find: Callable[[], Subject], config: EngineConfig, report: Progress) -> Iterator[Check]:
    """Run all checks in turn. A failed start ends the list, since the rest depends on it. `find` locates the model."""
    yield from software()
    yield from machine()
    try:
        subject = find()
        yield Check("model", GOOD, f"{subject.name}, {subject.model_config.architecture}")
        start = time.perf_counter()
        runner = subject.load(config, report)
    except TinyvllmError as error:
        yield Check("start", BAD, type(error).__name__, " ".join(str(error).split()))
        return
    inspector = RunnerInspector(runner)
    try:
        yield from device(inspector, time.perf_counter() - start)
        yield from programs(inspector)
        yield from smoke(inspector, subject, config, report)
    finally:
        runner.close()


def software() -> Iterator[Check]:
    """Versions, and whether tinygrad's is the one that our kernels need."""
    yield Check("tinyvllm", GOOD, f"{tinyvllm.__version__}, Python {platform.python_version()}")
    try:
        needs = requires("tinyvllm") or ()
    except PackageNotFoundError:  # a checkout on the path that is not installed
        needs = ()
    wanted = next((text.partition("==")[2] for text in needs if text.startswith("tinygrad==")), "")
    try:
        found = version("tinygrad")
    except PackageNotFoundError:
        yield Check("tinygrad", BAD, "not installed", f"pip install tinygrad=={wanted}")
        return
    fits = not wanted or found == wanted
    yield Check("tinygrad", GOOD if fits else BAD, found, "" if fits else f"pip install tinygrad=={wanted}")


def machine() -> Iterator[Check]:
    """The computer: its system, its compiler, and its load."""
    yield Check(
        "system", GOOD, f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    )
    compiler = os.environ.get("CC", "clang")
    path = shutil.which(compiler)
    if path is not None:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
        yield Check("compiler", GOOD, said[0] if said else path)
    else:
        remedy = "only the CPU device needs it: apt-get install clang, or xcode-select --install"
        yield Check("compiler", ODD, f"no {compiler}", remedy)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    remedy = "" if load < BUSY else "something else is running: measurements taken now are too low"
    yield Check("load", GOOD if load < BUSY else ODD, f"{load:.2f} per core", remedy)


def device(inspector: RunnerInspector, start_s: float) -> Iterator[Check]:
    """The opened device, the engine's memory, and the result of its start."""
    runner, architecture = inspector.runner, inspector.architecture
    value = f"{runner.device}: {inspector.hardware}" + (f", {architecture}" if architecture else "")
    if inspector.has_graphs:
        yield Check("device", GOOD, value)
    else:
        remedy = "in a virtual machine Metal launches each kernel separately: run on the Mac itself for full speed"
        yield Check("device", ODD, f"{value}, without graphs", remedy)
    yield Check("weights", GOOD, "; ".join(inspector.formats))
    capacity = runner.capacity
    yield Check("KV cache", GOOD, "; ".join(capacity.explanation))
    kept = 0 if runner.store is None else runner.store.num_steps_read
    yield Check("start", GOOD, f"{start_s:.1f} s, {kept} of {2 * runner.num_captures} steps from the cache")
    remedy = (
        "" if runner.is_tuned else "run tinyvllm tune once, with the flags that you serve with; it takes some minutes"
    )
    yield Check("kernels", GOOD if runner.is_tuned else ODD, "tuned" if runner.is_tuned else "untuned", remedy)
    general = inspector.general_operations
    remedy = "" if not general else "right, but slower than a fused kernel; please report the model and this line"
    yield Check("fused kernels", ODD if general else GOOD, "; ".join(general) or "cover every operation", remedy)


def programs(inspector: RunnerInspector) -> Iterator[Check]:
    """Every program of every graph against the device's limits."""
    facts = inspector.programs()
    over = [text for fact in facts for text in fact.over(inspector.runner.device)]
    most = (max(fact.arguments for fact in facts), max(fact.threads for fact in facts))
    shared = max(fact.shared_bytes for fact in facts)
    value = f"{len(facts)}, at most {most[0]} arguments, {most[1]} threads, {shared >> 10} KiB of threadgroup memory"
    remedy = "" if not over else "please report this: " + "; ".join(over)
    yield Check("programs", BAD if over else GOOD, value, remedy)


def smoke(inspector: RunnerInspector, subject: Subject, config: EngineConfig, report: Progress) -> Iterator[Check]:
    """Generate SMOKE_TOKENS tokens, and compare their speed with the predicted one."""
    context = min(SMOKE_CONTEXT, inspector.runner.capacity.max_model_len - SMOKE_TOKENS - 1)
    work = LatencyWork((Case("decode", 1, context),), SMOKE_TOKENS, 1, 1, config.seed)
    chip = find_hardware(inspector, None)
    if chip.device not in FACTORS:  # OpenCL has no factors of its own: assume those of another GPU
        chip = replace(chip, device="CUDA")
    try:
        machine = subject.describe(inspector.runner, chip.bandwidth_gbps, config.seed)
        (row,) = measure_latency(inspector, machine, work, report)
    except TinyvllmError as error:
        yield Check("smoke", BAD, type(error).__name__, f"please report this: {error}")
        return
    expected = predict(
        subject.model_config, inspector.weights.dtype, chip, 1, context, inspector.runner.pool.formats
    ).tok_s
    found = row.tok_s.mean
    value = f"{found:.1f} tok/s at context {context}, {expected:.1f} predicted for {chip.name}"
    if found >= SLOW * expected:
        yield Check("smoke", GOOD, value)
    else:
        remedy = f"less than {SLOW:.0%} of the prediction: tinyvllm profile {subject.name} shows where the time goes"
        yield Check("smoke", ODD, value, remedy)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The checks as JSON values, for a bug report. `ok`: no check is bad."""
    return {"ok": all(check.status != BAD for check in checks), "checks": [asdict(check) for check in checks]}
