"""Explain the difference between any two runs: a waterfall from the time per token of one to that of the other, by
stage or by kernel, with confidence intervals.

Unlike `compare`, which guards one configuration, `diff` takes runs that differ in weights, devices, commits or
settings. The parts of each run add up to its whole; time in no stage is a part of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.estimate import Estimate, noise
from tinyvllm.bench.ledger import GAPS, HOST, make_ledger
from tinyvllm.bench.runs import BREAKDOWN, PROFILE, conditions_that_differ, kind_of, make_run
from tinyvllm.errors import TinyvllmError

REST = "not in any stage"
BAR = 24  # characters of the longest bar


@dataclass(frozen=True)
class Part:
    """One part in both runs, in ms per token of a sequence. `margin`: half of the 95 % confidence interval of the
    difference; None where a run measured it once. `is_within`: a detail of the part above it, not added to the sum."""

    name: str
    before: float
    after: float
    margin: float | None
    is_within: bool = False

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def is_noise(self) -> bool:
        return self.margin is not None and abs(self.change) <= self.margin


@dataclass(frozen=True)
class Waterfall:
    """One case in both runs."""

    case: str
    whole: Part
    parts: tuple[Part, ...]

    @property
    def main(self) -> Part | None:
        """The part that explains most of the change, in its direction, beyond noise."""
        sign = math.copysign(1.0, self.whole.change)
        parts = [part for part in self.parts if not part.is_within and not part.is_noise and part.change * sign > 0]
        return max(parts, key=lambda part: part.change * sign, default=None)

    def as_json(self) -> dict[str, Any]:
        return {"case": self.case, "whole": asdict(self.whole), "parts": [asdict(part) for part in self.parts]}


@dataclass(frozen=True)
class Diff:
    """`differences`: what the runs differ in: (name, before, after)."""

    before: str
    after: str
    differences: tuple[tuple[str, Any, Any], ...]
    waterfalls: tuple[Waterfall, ...]

    def as_json(self) -> dict[str, Any]:
        names = ("name", "before", "after")
        return {
            "kind": "diff",
            "before": self.before,
            "after": self.after,
            "differences": [dict(zip(names, one, strict=True)) for one in self.differences],
            "cases": [waterfall.as_json() for waterfall in self.waterfalls],
        }


def explain(before: Any, after: Any) -> Diff:
    """The difference between two JSON values of `bench breakdown`, or of `profile`. Raises TinyvllmError for others,
    for the same run twice, and for runs without a case in common."""
    kinds = {kind_of(before), kind_of(after)}
    if kinds == {PROFILE}:
        waterfalls = [_of_profiles(before, after)]
    elif kinds == {BREAKDOWN}:
        waterfalls = [*_of_breakdowns(before, after)]
    else:
        raise TinyvllmError(
            f"these are the rows of a {kind_of(before)} and a {kind_of(after)}: give two files of `tinyvllm bench "
            "breakdown --json`, or two of `tinyvllm profile --json`"
        )
    if before == after:
        raise TinyvllmError("both files hold the same run: there is no difference to explain")
    if not waterfalls:
        raise TinyvllmError("the runs have no case in common: measure the same prompts and batches")
    one, two = make_run(before), make_run(after)
    differences = (
        *conditions_that_differ(one.conditions, two.conditions),
        *conditions_that_differ(one.labels, two.labels),
        *conditions_that_differ({"commit": one.environment.get("commit")}, {"commit": two.environment.get("commit")}),
    )
    return Diff(one.subject, two.subject, tuple(dict.fromkeys(differences)), tuple(waterfalls))


# -- a breakdown -----------------------------------------------------------------------------------------------------


def _of_breakdowns(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Waterfall]:
    earlier = {(case["name"], case["output_tokens"]): case for case in before["cases"]}
    for case in after["cases"]:
        found = earlier.get((case["name"], case["output_tokens"]))
        if found is not None:
            yield _waterfall(case["name"], _stages_of(found), _stages_of(case), _kernels_of(found), _kernels_of(case))


def _stages_of(case: Mapping[str, Any]) -> dict[str, Estimate]:
    """By stage, and the whole under the empty name, in ms for each token that a sequence generated."""
    rounds, tokens = case["wall_s"]["count"], case["output_tokens"]
    found = {"": Estimate.of_spread(case["wall_s"], 1e3 / tokens)}
    for name, stage in case["stages"].items():
        if stage["count"]:
            spread = {"mean": stage["mean_s"], "std": stage["std_s"], "count": stage["count"]}
            found[name] = Estimate.of_spread(spread, 1e3 * stage["count"] / rounds / tokens)
    return found


def _kernels_of(case: Mapping[str, Any]) -> dict[str, float]:
    """Of a decode step, in ms."""
    return {row["label"]: row["total_s"] * 1e3 for row in case.get("kernels", [])}


def _waterfall(
    name: str,
    before: Mapping[str, Estimate],
    after: Mapping[str, Estimate],
    kernels_before: Mapping[str, float],
    kernels_after: Mapping[str, float],
) -> Waterfall:
    nothing, parts = Estimate(0.0), []
    stages = [stage for stage in dict.fromkeys([*before, *after]) if stage]
    for stage in stages:
        one, two = before.get(stage, nothing), after.get(stage, nothing)
        parts.append(Part(stage, one.value, two.value, _margin(one, two)))
        if stage == "decode":
            labels = dict.fromkeys([*kernels_before, *kernels_after])
            found = [Part(one, kernels_before.get(one, 0.0), kernels_after.get(one, 0.0), None, True) for one in labels]
            parts += sorted(found, key=lambda part: -abs(part.change))
    rest = [run[""].value - sum(run.get(stage, nothing).value for stage in stages) for run in (before, after)]
    parts.append(Part(REST, rest[0], rest[1], None))
    whole = Part("time per token", before[""].value, after[""].value, _margin(before[""], after[""]))
    return Waterfall(name, whole, tuple(parts))


def _margin(one: Estimate, two: Estimate) -> float | None:
    return noise(one, two) or None


# -- a profile -------------------------------------------------------------------------------------------------------


def _of_profiles(before: Mapping[str, Any], after: Mapping[str, Any]) -> Waterfall:
    """Kernels by operation, the time between them, and the host's."""
    if (before["phase"], before["batch"], before["context"]) != (after["phase"], after["batch"], after["context"]):
        raise TinyvllmError("the profiles are of different steps: give the same --batch, --context or --prefill")
    one, two = _times_of(before), _times_of(after)
    parts = [Part(name, one.get(name, 0.0), two.get(name, 0.0), None) for name in dict.fromkeys([*one, *two])]
    parts.sort(key=lambda part: -abs(part.change))
    whole = Part("time per step", sum(one.values()), sum(two.values()), None)
    return Waterfall(str(after["bucket"]), whole, tuple(parts))


def _times_of(profile: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds by part. A kernel has its whole time: its loss and its part of the floor."""
    ledger = make_ledger(profile)
    found = {entry.name: entry.seconds for entry in ledger.losses}
    others = {name: found[name] * 1e3 for name in (GAPS, HOST) if name in found}
    kernels_ms = ledger.step_s * 1e3 - sum(others.values())
    total_s = sum(row["total_s"] for row in profile["by_operation"])
    return {row["label"]: kernels_ms * row["total_s"] / total_s for row in profile["by_operation"]} | others


# -- tables ----------------------------------------------------------------------------------------------------------


def diff_table(diff: Diff) -> RenderableType:
    lines: list[RenderableType] = [Text(f"before: {diff.before}\nafter:  {diff.after}")]
    lines += [Text(f"differs: {name}, {one} before, {two} after") for name, one, two in diff.differences]
    for waterfall in diff.waterfalls:
        lines += [Text(f"\n{headline(waterfall)}", style="bold"), _table(waterfall)]
    return Group(*lines)


def headline(waterfall: Waterfall) -> str:
    """The answer in one line."""
    whole, main = waterfall.whole, waterfall.main
    share = f" ({whole.change / whole.before:+.1%})" if whole.before else ""
    text = f"{waterfall.case}: {whole.before:,.3f} to {whole.after:,.3f} ms, {whole.change:+,.3f} ms{share}"
    if whole.is_noise:
        return f"{text}: within the noise of the repeats, ± {whole.margin:,.3f} ms"
    if main is None:
        return f"{text}; no stage explains it beyond its noise"
    return f"{text}; {main.name} makes {main.change:+,.3f} ms of it"


def _table(waterfall: Waterfall) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for column in ("before ms", "after ms", "change ms", "± ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    longest = max((abs(part.change) for part in waterfall.parts), default=0.0) or 1.0
    for part in (*waterfall.parts, waterfall.whole):
        bar = ("+" if part.change > 0 else "-") * round(BAR * min(1.0, abs(part.change) / longest))
        table.add_row(
            f"  {part.name}" if part.is_within else part.name,
            f"{part.before:,.3f}",
            f"{part.after:,.3f}",
            f"{part.change:+,.3f}",
            "" if part.margin is None else f"{part.margin:,.3f}",
            Text(bar, style="dim" if part.is_noise else "red" if part.change > 0 else "green"),
            style="bold" if part is waterfall.whole else "dim" if part.is_within else "",
        )
    return table
