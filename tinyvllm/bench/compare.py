"""Compare two runs. The later one regresses if it is slower beyond its spread, or if any count rose."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.counts import GUARDED
from tinyvllm.bench.stages import STAGES
from tinyvllm.errors import TinyvllmError

# 95 % of a normal distribution: two means closer than this many standard errors of their difference count as equal.
SURE_DEVIATIONS = 1.96
# What a rise of a count is called.
FAULTS = {
    "syncs": "extra synchronization",
    "copies_h2d": "extra copy to the device",
    "copies_d2h": "extra copy to the host",
    "bytes_h2d": "more bytes to the device",
    "bytes_d2h": "more bytes to the host",
    "eager_kernels": "un-graphed step",
    "single_launches": "un-graphed step",
    "compilations": "recompilation",
    "captures": "recompilation",
    "kernels": "more kernels",
    "graph_launches": "more launches",
    "moved_bytes": "more memory traffic",
    "bytes": "more bytes between host and device",
}


@dataclass(frozen=True)
class Change:
    """One figure in two runs. `is_regression`: the later one is worse by more than noise and the limit."""

    case: str
    name: str
    before: float
    after: float
    unit: str  # ms; empty for a count
    is_regression: bool
    why: str = ""

    @property
    def share(self) -> float:
        """Relative change from the earlier value; infinite if that was 0."""
        if self.before == self.after:
            return 0.0
        return math.inf if self.before == 0 else self.after / self.before - 1


def parse_share(text: str) -> float:
    """Parse 5% or 0.05, both as 0.05. Raises TinyvllmError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise TinyvllmError(f"--max-regress is {text!r}: give a share, such as 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def read_breakdown(path: str) -> dict[str, Any]:
    """Read a file written by `bench breakdown --json`. Raises TinyvllmError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TinyvllmError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != "breakdown":
        raise TinyvllmError(f"{path} is not a breakdown: create one with `tinyvllm bench breakdown --json {path}`")
    return data


def compare(
    before: dict[str, Any], after: dict[str, Any], max_regress: float, *, counts_only: bool = False
) -> list[Change]:
    """Every figure that both runs have. Raises TinyvllmError if they did different work."""
    _check_same_work(before, after)
    earlier = {case["name"]: case for case in before["cases"]}
    changes: list[Change] = []
    for case in after["cases"]:
        one = earlier[case["name"]]
        if not counts_only:
            changes += _compare_times(one, case, max_regress)
        changes += _compare_counts(one, case, after["vocab_size"])
    return changes


def _check_same_work(before: dict[str, Any], after: dict[str, Any]) -> None:
    for field in ("model", "dtype", "device", "prefix_caching"):
        if before[field] != after[field]:
            raise TinyvllmError(
                f"the runs differ in {field}, {before[field]} and {after[field]}: compare runs with the same {field}"
            )
    shapes = [[(c["name"], c["prompt_tokens"], c["output_tokens"]) for c in run["cases"]] for run in (before, after)]
    missing = [shape for shape in shapes[1] if shape not in shapes[0]]
    if missing:
        names = ", ".join(f"{name} ({prompt} + {output} tokens)" for name, prompt, output in missing)
        raise TinyvllmError(f"the earlier run lacks {names}: measure the same cases")


def _compare_times(before: dict[str, Any], after: dict[str, Any], max_regress: float) -> Iterator[Change]:
    """Compare whole cases, which can regress, and their stages, which are shown only."""
    for name in ("plain_wall_s", "ttft_s", "tpot_s"):
        yield _time_change(after["name"], name.removesuffix("_s"), before[name], after[name], max_regress)
    for name in STAGES:
        one, two = before["stages"].get(name), after["stages"].get(name)
        if one and two and one["count"] and two["count"]:
            spreads = [{"mean": s["mean_s"], "std": s["std_s"], "count": s["count"]} for s in (one, two)]
            # no limit: a slower stage alone is no regression of the whole
            yield _time_change(after["name"], name, spreads[0], spreads[1], math.inf)


def _time_change(case: str, name: str, before: dict[str, Any], after: dict[str, Any], max_regress: float) -> Change:
    """Compare two means: a regression is slower by more than the limit and by more than noise (Welch 1947)."""
    slower_s = after["mean"] - before["mean"]
    deviation_s = math.hypot(before["std"] / math.sqrt(before["count"]), after["std"] / math.sqrt(after["count"]))
    is_slower = slower_s > max_regress * before["mean"] and slower_s > SURE_DEVIATIONS * deviation_s
    why = ""
    if is_slower:
        why = (
            f"slower by {slower_s / before['mean']:.1%}, above the limit of {max_regress:.1%} and above "
            f"{SURE_DEVIATIONS} standard errors of the means ({SURE_DEVIATIONS * deviation_s * 1e3:.3f} ms)"
        )
    return Change(case, name, before["mean"] * 1e3, after["mean"] * 1e3, "ms", is_slower, why)


def _compare_counts(before: dict[str, Any], after: dict[str, Any], vocab_size: int) -> Iterator[Change]:
    for phase, counts in after["per_step"].items():
        earlier = before["per_step"].get(phase)
        if earlier is None:
            continue
        for name in GUARDED:
            one, two = earlier.get(name, 0), counts.get(name, 0)
            why = _name_fault(name, earlier, counts, phase, vocab_size) if two > one else ""
            yield Change(f"{after['name']}, {phase}", name, one, two, "", two > one, why)
        lost = earlier["sampling_kernels"] > 0 and counts["sampling_kernels"] == 0
        why = "sampler on the CPU: the step's graph no longer has sampling kernels" if lost else ""
        case = f"{after['name']}, {phase}"
        yield Change(case, "sampling_kernels", earlier["sampling_kernels"], counts["sampling_kernels"], "", lost, why)


def _name_fault(name: str, before: dict[str, Any], after: dict[str, Any], phase: str, vocab_size: int) -> str:
    """What a rise of a count means, in words and numbers."""
    fault, one, two = FAULTS.get(name, f"more {name}"), before.get(name, 0), after.get(name, 0)
    if name == "bytes_d2h" and two - one >= 2 * vocab_size:  # at least one row of half-precision logits
        fault = "host copy of the logits" if after["sampling_kernels"] else "sampler on the CPU"
    text = f"{fault}: {name} of a {phase} step rose from {one:,} to {two:,}"
    if name in ("eager_kernels", "compilations") and after.get("details"):
        text += f" ({'; '.join(after['details'][:5])})"
    return text


def regressions(changes: list[Change]) -> list[str]:
    """The regressions, one line each."""
    return [f"{change.case}: {change.why or change.name}" for change in changes if change.is_regression]


def comparison_table(before: dict[str, Any], after: dict[str, Any], changes: list[Change]) -> RenderableType:
    """Both runs side by side: all times, and the counts that differ."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in changes:
        if change.unit == "" and change.before == change.after:
            continue
        style = "red" if change.is_regression else "green" if change.after < change.before else ""
        pattern = "{:,.3f} ms" if change.unit else "{:,.0f}"
        share = "new" if math.isinf(change.share) else f"{change.share:+.1%}"
        table.add_row(
            change.case, change.name, pattern.format(change.before), pattern.format(change.after), share, style=style
        )
    same = sum(change.unit == "" and change.before == change.after for change in changes)
    heads = [
        f"{word}: {run['model']} on {run['device']}, {run['environment']['commit']}, {run['environment']['date']}, "
        f"load {run['environment']['load_average']}"
        for word, run in (("before", before), ("after", after))
    ]
    return Group(*map(Text, heads), table, Text(f"{same} counts are unchanged"))
