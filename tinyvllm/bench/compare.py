"""Compare two runs of a benchmark, stage by stage: what grew, by how much a step, and which counts rose.

A figure regresses if it is worse by more than the limit and by more than noise. A stage of the host is judged by the
processor time of its thread, which other work on the machine hardly changes, and by its median wall time, which shows
where a thread waits. Its growth must also matter to a step: see `floor_ms`. A count regresses if it rises at all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.counts import GUARDED, UNGUARDED
from tinyvllm.bench.estimate import Estimate, noise
from tinyvllm.bench.runs import (
    MACHINE_FIELDS,
    RATE,
    STAGE,
    START,
    WHOLE,
    Figure,
    Run,
    RunCase,
    conditions_that_differ,
    figures_of,
    make_run,
)
from tinyvllm.errors import TinyvllmError

# A stage's growth counts from this share of a step, within these bounds: below, nobody would notice.
STAGE_SHARE, MIN_STAGE_MS, MAX_STAGE_MS = 0.005, 0.01, 0.1
# A start is measured once, so its noise is unknown: its parts have a wider limit.
START_LIMITS, MIN_START_SHARE, MIN_START_MS = 4, 0.2, 250.0
# A stage that grew by less than this share of the one that grew most is considered a consequence: after a wait caches
# are cold, so all stages take longer.
CONSEQUENCE_SHARE = 0.05
COMPUTED_SHARE = 0.2  # of a stage's growth: from this share on, its thread computes longer and does not only wait
NUM_NAMED = 5  # of the kernels or places that a message lists
# What a rise of a count is called.
FAULTS = {
    "syncs": "extra synchronization",
    "barriers": "extra barrier",
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
    """One figure in two runs. `is_regression`: the later one is worse by more than noise and the limit. `growth_ms`: of
    a stage, per step or request; 0 for other figures."""

    case: str
    name: str
    before: float
    after: float
    unit: str  # ms, tok/s; empty for a count
    is_regression: bool
    why: str = ""
    kind: str = ""
    growth_ms: float = 0.0

    @property
    def share(self) -> float:
        """Relative change from the earlier value; infinite if that was 0."""
        if self.before == self.after:
            return 0.0
        return math.inf if self.before == 0 else self.after / self.before - 1

    @property
    def is_better(self) -> bool:
        return self.after > self.before if self.kind == RATE else self.after < self.before


def parse_share(text: str) -> float:
    """Parse 5% or 0.05, both as 0.05. Raises TinyvllmError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise TinyvllmError(f"--max-regress is {text!r}: give a share, such as 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def compare(before: Any, after: Any, max_regress: float, *, counts_only: bool = False) -> list[Change]:
    """Every figure that both runs have. `before` and `after` are runs, or the JSON of their benchmark. Raises
    TinyvllmError if they did different work."""
    one, two = (run if isinstance(run, Run) else make_run(run) for run in (before, after))
    check_same_work(one, two, counts_only=counts_only)
    earlier = {case.name: case for case in one.cases}
    changes: list[Change] = []
    for case in two.cases:
        if case.name not in earlier or not is_same_work(earlier[case.name], case):
            continue
        if not counts_only:
            changes += _compare_figures(earlier[case.name], case, max_regress)
        changes += _compare_counts(earlier[case.name], case, two.vocab_size)
    return changes


# -- the same work ---------------------------------------------------------------------------------------------------


def check_same_work(before: Run, after: Run, *, counts_only: bool = False) -> None:
    """Raises TinyvllmError if the runs cannot be compared: another benchmark, model, device or sampling, or no case in
    common; for times, another machine."""
    if before.kind != after.kind:
        raise TinyvllmError(f"one run is a {before.kind} and the other a {after.kind}: compare runs of one benchmark")
    for name, one, two in conditions_that_differ(before.conditions, after.conditions):
        raise TinyvllmError(
            f"the runs differ in {name}, {one} and {two}: compare runs with the same {name}; "
            "`tinyvllm bench across A B` shows different ones side by side"
        )
    for name, one, two in conditions_that_differ(before.labels, after.labels):
        if name in MACHINE_FIELDS and not counts_only:
            raise TinyvllmError(
                f"the runs are from different machines ({name}: {one} and {two}), so their times do not compare: "
                "use --counts-only"
            )
    earlier = {case.name: case for case in before.cases}
    if any(case.name in earlier and is_same_work(earlier[case.name], case) for case in after.cases):
        return
    names = ", ".join(f"{case.name} ({_work(case.conditions)})" for case in after.cases)
    raise TinyvllmError(f"the earlier run lacks {names}: measure the same cases")


def is_same_work(before: RunCase, after: RunCase) -> bool:
    """Whether two cases of one name measured the same."""
    return next(conditions_that_differ(before.conditions, after.conditions), None) is None


def _work(conditions: Mapping[str, Any]) -> str:
    if "prompt_tokens" in conditions:
        return f"{conditions['prompt_tokens']} + {conditions['output_tokens']} tokens"
    return ", ".join(f"{name} {value}" for name, value in conditions.items() if value is not None)


def notes(before: Run, after: Run) -> list[str]:
    """What else differs between runs that can be compared, and what was not compared."""
    lines = [
        f"the runs differ in {name}: {one} before, {two} after"
        for name, one, two in conditions_that_differ(before.labels, after.labels)
    ]
    earlier = {case.name: case for case in before.cases}
    for case in after.cases:
        if case.name not in earlier:
            lines.append(f"{case.name} is not compared: the earlier run lacks it")
        for name, one, two in conditions_that_differ(earlier.get(case.name, case).conditions, case.conditions):
            lines.append(f"{case.name} is not compared: {name} was {one} and is {two}")
    lines += [f"{name} is not compared: the later run lacks it" for name in earlier if name not in _names(after)]
    return lines


def _names(run: Run) -> set[str]:
    return {case.name for case in run.cases}


# -- times -----------------------------------------------------------------------------------------------------------


def floor_ms(step_ms: float) -> float:
    """The growth of a stage that is too small to matter in a step of `step_ms`."""
    return min(max(STAGE_SHARE * step_ms, MIN_STAGE_MS), MAX_STAGE_MS)


def _compare_figures(before: RunCase, after: RunCase, max_regress: float) -> list[Change]:
    """Stages first, since the explanation of a whole names the stage that grew most."""
    earlier = figures_of(before)
    pairs = [(earlier[figure.name], figure) for figure in after.figures if figure.name in earlier]
    stages = [_stage_change(before, after, one, two, max_regress) for one, two in pairs if two.kind == STAGE]
    most = max(stages, key=lambda change: change.growth_ms, default=None)
    stages = [_without_consequence(change, most) for change in stages]
    wholes = [_whole_change(before, one, two, max_regress, most) for one, two in pairs if two.kind != STAGE]
    return [*wholes, *stages]


def _without_consequence(change: Change, most: Change | None) -> Change:
    """Not a regression if another stage grew so much more that this one's growth may follow from it."""
    if most is None or not most.is_regression or change.growth_ms >= CONSEQUENCE_SHARE * most.growth_ms:
        return change
    return dataclasses.replace(change, is_regression=False)


def _whole_change(case: RunCase, before: Figure, after: Figure, max_regress: float, most: Change | None) -> Change:
    """A time or a rate of the whole, or a part of a start."""
    one, two = before.value, after.value
    worse = one.value - two.value if after.kind == RATE else two.value - one.value
    chance, limit, least = noise(one, two), max_regress, 0.0
    if after.kind == WHOLE:
        least = floor_ms(case.step_ms)
    if after.kind == START:
        limit, least = max(START_LIMITS * max_regress, MIN_START_SHARE), MIN_START_MS
    is_worse = worse > limit * one.value and worse > max(chance, least)
    unit = "tok/s" if after.kind == RATE else "ms"
    why = ""
    if is_worse:
        share = worse / one.value if one.value else math.inf
        why = (
            f"{after.name} is {'lower' if after.kind == RATE else 'slower'} by {share:.1%}, from {one.value:,.3f} to "
            f"{two.value:,.3f} {unit}, above the limit of {limit:.1%} and the noise of {chance:,.3f} {unit}"
        )
        if most is not None and most.growth_ms > 0 and after.kind == WHOLE:
            why += f"; the stage that grew most is {most.name}, by {most.growth_ms:,.3f} ms"
    return Change(case.name, after.name, one.value, two.value, unit, is_worse, why, after.kind)


def _stage_change(before: RunCase, after: RunCase, one: Figure, two: Figure, max_regress: float) -> Change:
    """A stage grew if its thread's processor time did, or its wall time."""
    least = floor_ms(before.step_ms)
    growth = two.value.value - one.value.value
    has_grown = _has_grown(one.value, two.value, max_regress, least)
    why = ""
    if one.cpu is not None and two.cpu is not None and _has_grown(one.cpu, two.cpu, max_regress, least):
        has_grown, growth = True, max(growth, two.cpu.value - one.cpu.value)
    if has_grown:
        text = (
            f"{two.name} grew by {growth:,.3f} ms a {two.per}, from {one.value.value:,.3f} to {two.value.value:,.3f} ms"
        )
        why = text + (_explain_host(one, two) if two.cpu is not None else _explain_device(before, after, one, two))
    return Change(
        case=after.name,
        name=two.name,
        before=one.value.value,
        after=two.value.value,
        unit="ms",
        is_regression=has_grown,
        why=why,
        kind=STAGE,
        growth_ms=growth,
    )


def _has_grown(before: Estimate, after: Estimate, max_regress: float, least_ms: float) -> bool:
    growth = after.value - before.value
    return growth > max(max_regress * before.value, least_ms, noise(before, after))


def _explain_host(before: Figure, after: Figure) -> str:
    """Whether a stage of the host computes longer or waits longer."""
    if before.cpu is None or after.cpu is None:
        return ""
    growth, computed = after.value.value - before.value.value, after.cpu.value - before.cpu.value
    # a thread that computes longer on a busy machine also waits longer for its core
    cause = "its thread computes longer" if computed > COMPUTED_SHARE * growth else "its thread waits"
    return f": {cause} (processor time {before.cpu.value:,.3f} to {after.cpu.value:,.3f} ms)"


def _explain_device(before: RunCase, after: RunCase, one: Figure, two: Figure) -> str:
    """Which components of a device stage grew, and whether it launches as many kernels and moves as many bytes."""
    grown = {part: two.parts[part] - one.parts[part] for part in two.parts if part in one.parts}
    shown = [f"{part} {growth:+,.3f} ms" for part, growth in grown.items() if growth > 0.2 * sum(grown.values()) > 0]
    text = f": {', '.join(shown)}" if shown else ""
    earlier, later = before.counts.get(two.name, {}), after.counts.get(two.name, {})
    same = [name for name in ("kernels", "moved_bytes") if name in later and later[name] == earlier.get(name)]
    if len(same) == 2:
        text += f"; as many kernels ({later['kernels']}) and bytes ({later['moved_bytes'] / 1e6:,.1f} MB) as before"
    return text


# -- counts ----------------------------------------------------------------------------------------------------------


def _compare_counts(before: RunCase, after: RunCase, vocab_size: int) -> Iterator[Change]:
    for phase, counts in after.counts.items():
        earlier = before.counts.get(phase)
        if earlier is None:
            continue
        case = f"{after.name}, {phase}"
        for name in (*GUARDED, *(name for name in counts if name not in GUARDED and name not in UNGUARDED)):
            if name not in counts or name not in earlier:
                continue
            one, two = earlier[name], counts[name]
            why = _name_fault(name, before, after, phase, vocab_size) if two > one else ""
            yield Change(case, name, one, two, "", two > one, why)
        if "sampling_kernels" in earlier and "sampling_kernels" in counts:
            lost = earlier["sampling_kernels"] > 0 and counts["sampling_kernels"] == 0
            why = "sampler on the CPU: the step's graph no longer has sampling kernels" if lost else ""
            one, two = earlier["sampling_kernels"], counts["sampling_kernels"]
            yield Change(case, "sampling_kernels", one, two, "", lost, why)


def _name_fault(name: str, before: RunCase, after: RunCase, phase: str, vocab_size: int) -> str:
    """What a rise of a count means, in words and numbers."""
    earlier, later = before.counts[phase], after.counts[phase]
    fault, one, two = FAULTS.get(name, f"more {name}"), earlier.get(name, 0), later.get(name, 0)
    if name == "bytes_d2h" and two - one >= 2 * vocab_size:  # at least one row of half-precision logits
        fault = "host copy of the logits" if later.get("sampling_kernels") else "sampler on the CPU"
    text = f"{fault}: {name} of a {phase} step rose from {one:,} to {two:,}"
    named: list[str] = []
    if name in ("eager_kernels", "compilations", "single_launches"):
        known = set(before.details.get(phase, ()))
        named = [line for line in after.details.get(phase, ()) if line not in known]
    elif name == "kernels" and phase == "decode":
        named = _new_kernels(before.kernels, after.kernels)
    return text + (f" ({'; '.join(named[:NUM_NAMED])})" if named else "")


def _new_kernels(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Kernels that a step launches more often than before."""
    return [
        f"{label} {before[label]} to {count}" if label in before else f"new: {label} x {count}"
        for label, count in after.items()
        if count > before.get(label, 0)
    ]


# -- what is shown ---------------------------------------------------------------------------------------------------


def regressions(changes: list[Change]) -> list[str]:
    """The regressions, one line each: stages by their growth, then counts, then the whole."""
    order = {STAGE: 0, "": 1}
    worse = [change for change in changes if change.is_regression]
    worse.sort(key=lambda change: (order.get(change.kind, 2), -change.growth_ms))
    return [f"{change.case}: {change.why or change.name}" for change in worse]


def comparison_table(before: Run, after: Run, changes: list[Change]) -> RenderableType:
    """Both runs side by side: all times, and the counts that differ."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in changes:
        if change.unit == "" and change.before == change.after:
            continue
        style = "red" if change.is_regression else "green" if change.is_better else ""
        pattern = f"{{:,.3f}} {change.unit}" if change.unit else "{:,.0f}"
        share = "new" if math.isinf(change.share) else f"{change.share:+.1%}"
        table.add_row(
            change.case, change.name, pattern.format(change.before), pattern.format(change.after), share, style=style
        )
    same = sum(change.unit == "" and change.before == change.after for change in changes)
    heads = [
        f"{word}: {run.subject}, load {run.environment.get('load_average')}"
        for word, run in (("before", before), ("after", after))
    ]
    differences = [Text(f"note: {line}", style="yellow") for line in notes(before, after)]
    return Group(*map(Text, heads), *differences, table, Text(f"{same} counts are unchanged"))
