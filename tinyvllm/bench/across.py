"""Different models, formats, devices and engines in one table: rows of `bench latency` side by side, case by case.

Rows may also come from files, including those of scripts/bench_llama_cpp.py and scripts/bench_mlx.py. Each run that is
measured here gets a process of its own, one after another, because a process has one device.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tinyvllm.bench.result_files import read_result
from tinyvllm.bench.rows import LATENCY, THROUGHPUT
from tinyvllm.bench.runs import kind_of
from tinyvllm.bench.tables import format_number
from tinyvllm.errors import TinyvllmError

MEGA = 1e6


@dataclass(frozen=True)
class Combination:
    """One run: the flags of `bench latency` that select model, format and device."""

    name: str
    flags: tuple[str, ...]


def combinations(
    models: Sequence[str], shape: str | None, weights: Sequence[str], devices: Sequence[str]
) -> list[Combination]:
    """Every model, or the shape in each format, on every device. Raises TinyvllmError if there is nothing to run."""
    if shape is None and weights:
        raise TinyvllmError("--weights are formats of a --shape: give --shape NAME, or models")
    subjects: list[tuple[str, tuple[str, ...]]] = [(model, (model,)) for model in models]
    subjects += [(f"{shape} {kind}", ("--shape", shape, "--weights", kind)) for kind in weights if shape]
    if shape and not weights:
        subjects.append((shape, ("--shape", shape)))
    if not subjects:
        raise TinyvllmError("there is nothing to compare: give models, --shape with --weights, or files of rows")
    return [
        Combination(f"{name} on {device}" if device else name, (*flags, *(("--device", device) if device else ())))
        for (name, flags), device in itertools.product(subjects, devices or [""])
    ]


def run_latency(combination: Combination, flags: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `bench latency` in a process of its own. Its log and progress go to stderr. Raises TinyvllmError if
    it fails."""
    command = [sys.executable, "-P", "-m", "tinyvllm", "bench", "latency", *combination.flags, *flags, "--json", "-"]
    environment = os.environ.copy()
    if "--device" in combination.flags:
        environment.pop("DEV", None)
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        raise TinyvllmError(f"{combination.name} failed with code {done.returncode}: its message is above")
    return list(json.loads(done.stdout.decode().splitlines()[-1]))


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of latency or throughput from a file. Raises TinyvllmError for anything else."""
    rows = read_result(path)
    if kind_of(rows) not in (LATENCY, THROUGHPUT):
        raise TinyvllmError(f"{path} has no rows of `bench latency` or `bench throughput`: write them with --json")
    return list(rows)


def measure_across(
    runs: Sequence[Combination], flags: Sequence[str], report: Callable[[str], None]
) -> list[list[dict[str, Any]]]:
    """The rows of each run, one after another."""
    groups = []
    for number, run in enumerate(runs, 1):
        report(f"{number} of {len(runs)}: {run.name}")
        groups.append(run_latency(run, flags))
    return groups


def across_table(groups: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    """One line per case and run, grouped by case. `x` compares with the first run that has the case."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("test", "model", "format", "device"):
        table.add_column(column, no_wrap=True)
    for column in ("weights MB", "t/s", "x", "median ms", "kernels", "MB a step", "GB/s", "of floor", "load"):
        table.add_column(column, justify="right", no_wrap=True)
    tests = list(dict.fromkeys(row["test"] for rows in groups for row in rows))
    for test in tests:
        found = [row for rows in groups for row in rows if row["test"] == test]
        for number, row in enumerate(found):
            table.add_row(test if number == 0 else "", *_cells(row, found[0]), end_section=number == len(found) - 1)
    return table


def _cells(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    nbytes, step_ms = row.get("bytes"), row["step_ms_median"]
    share = row.get("floor_share")
    capture = f", {row['capture']}" if row.get("capture", "replay") != "replay" else ""
    return [
        f"{row['model']}{capture}",
        row["dtype"] or "-",
        row["device"],
        format_number(row["model_bytes"] / MEGA),
        f"{format_number(row['tok_s'])} ± {format_number(row['tok_s_std'])}",
        "1.00" if row is first else f"{row['tok_s'] / first['tok_s']:.2f}",
        format_number(step_ms),
        "-" if row.get("kernels") is None else str(row["kernels"]),
        "-" if nbytes is None else format_number(nbytes / MEGA),
        "-" if nbytes is None else format_number(nbytes / MEGA / step_ms),
        "-" if share is None else f"{share:.0%}",
        str(row["environment"].get("load_average", "-")),
    ]
