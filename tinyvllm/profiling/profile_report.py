"""A profile as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.expert_load import describe_loads
from tinyvllm.profiling.kernels import Kernel, KernelRow, StepProfile, tabulate
from tinyvllm.profiling.layer_table import describe_layers, layer_markdown, layer_table, tabulate_layers
from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.predict import Measured, Prediction
from tinyvllm.profiling.recording_verdict import judge_recording
from tinyvllm.profiling.roofline import Roofline, row_warnings
from tinyvllm.profiling.stage_rows import process_as_json
from tinyvllm.profiling.trace import Trace
from tinyvllm.profiling.verdict import Finding

SCHEMA = 3  # version of the JSON: raised when a field changes its name or meaning


@dataclass(frozen=True)
class ProfileReport:
    """A step of a model on a device: its kernels, its roofline, and the verdict."""

    model: str
    dtype: str
    hardware: str
    phase: str
    batch: int
    context: int
    profile: StepProfile
    roofline: Roofline
    findings: tuple[Finding, ...]
    turn_s: float  # one step including the host's work, median
    pack_s: float
    host_s: float  # the host's part of a turn, median over the same turns
    moved_bytes: int  # by the kernels, counted from their arguments
    num_repeats: int
    counts: Mapping[str, int] = field(default_factory=dict)  # what a step asks of the device, by name
    limits: Mapping[str, int] = field(default_factory=dict)  # of those that have one
    program_limits: Sequence[str] = ()  # how much of the device's limits of a program is used, in words
    trust: Mapping[str, Any] = field(default_factory=dict)  # the grade of `step_s` and its reasons, as JSON
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def chip(self) -> Chip:
        return self.roofline.chip

    def rows(self, by: str) -> list[KernelRow]:
        return tabulate(self.profile.kernels, by, self.chip)

    @property
    def row_warnings(self) -> list[str]:
        return row_warnings(self.rows("operation"), self.chip)

    def as_json(self) -> dict[str, Any]:
        profile = self.profile
        return {
            "schema": SCHEMA,
            "model": self.model,
            "dtype": self.dtype,
            "device": profile.device,
            "hardware": self.hardware,
            "cores": profile.num_cores,
            "phase": self.phase,
            "batch": self.batch,
            "context": self.context,
            "bucket": profile.bucket,
            "repeats": self.num_repeats,
            "step_s": profile.step_s,
            "profiled_s": profile.profiled_s,
            "kernels_s": profile.kernels_s,
            "turn_s": self.turn_s,
            "pack_s": self.pack_s,
            "host_s": self.host_s,
            "dispatches": profile.num_dispatches,
            "kernels": profile.num_kernels,
            "counts": dict(self.counts),
            "limits": dict(self.limits),
            "moved_bytes": self.moved_bytes,
            "experts": [load.as_json() for load in profile.experts],
            "timed": "in the step as served" if profile.is_graphed else "one by one",
            "roofline": self.roofline.as_json(),
            "row_warnings": self.row_warnings,
            "trust": dict(self.trust) or None,
            "verdict": [finding.as_json() for finding in self.findings],
            **tables_as_json(profile.kernels, self.chip, ("operation", "kernel")),
            "environment": self.environment,
        }


def profile_table(report: ProfileReport, by: str) -> RenderableType:
    """The kernels, followed by an explanation of their times."""
    profile = report.profile
    where = f"{profile.bucket}, context {report.context}" if report.phase == "decode" else profile.bucket
    title = f"{report.model} ({report.dtype}) on {report.hardware}: {where}"
    return Group(
        Text(title, style="bold"),
        kernels_by(by, profile.kernels, report.chip),
        Text(""),
        *(Text(line) for line in _explain_times(report)),
        *(Text(line) for line in _explain_counts(report)),
        *(Text(line) for line in _explain_roof(report)),
        *(Text(line) for line in describe_loads(profile.experts)),
        Text(""),
        *(_finding_text(finding, index == 0) for index, finding in enumerate(report.findings)),
    )


def kernels_by(by: str, kernels: Sequence[Kernel], chip: Chip | None) -> RenderableType:
    """The table of --by."""
    if by != "layer":
        return kernel_table(tabulate(kernels, by, chip))
    rows = tabulate_layers(kernels, chip)
    return Group(layer_table(rows), Text(""), *(Text(line) for line in describe_layers(rows)))


def markdown_by(by: str, kernels: Sequence[Kernel], chip: Chip | None) -> str:
    """The same in Markdown, for an issue or a page."""
    if by == "layer":
        return layer_markdown(tabulate_layers(kernels, chip))
    return kernel_markdown(tabulate(kernels, by, chip))


def tables_as_json(kernels: Sequence[Kernel], chip: Chip | None, groupings: Sequence[str]) -> dict[str, Any]:
    """`by_operation` and so on; `by_layer` has each layer's operations."""
    tables = {f"by_{by}": [row.as_json() for row in tabulate(kernels, by, chip)] for by in groupings if by != "layer"}
    return tables | {"by_layer": [row.as_json() for row in tabulate_layers(kernels, chip)]}


KERNEL_COLUMNS = ("name", "dispatches", "total ms", "average us", "share", "GB/s", "GFLOP/s", "of roof")


def kernel_table(rows: Sequence[KernelRow]) -> Table:
    """One line per row, the longest first. Without a chip there is no column for its roof."""
    columns = KERNEL_COLUMNS if any(row.roof_share is not None for row in rows) else KERNEL_COLUMNS[:-1]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*_kernel_cells(row)[: len(columns)])
    return table


def kernel_markdown(rows: Sequence[KernelRow]) -> str:
    """The same in Markdown."""
    lines = [KERNEL_COLUMNS, ("---", *("---:" for _ in KERNEL_COLUMNS[1:])), *(_kernel_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _kernel_cells(row: KernelRow) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.dispatches:,}",
        f"{row.total_s * 1e3:,.3f}",
        f"{row.average_s * 1e6:,.1f}",
        f"{row.share:.1%}",
        _rate(row.bytes_per_s),
        _rate(row.flops_per_s),
        "-" if row.roof_share is None else f"{row.roof_share:.0%}",
    )


def _rate(per_s: float | None) -> str:
    if not per_s:
        return "-"
    return f"{per_s / 1e9:,.1f}" if per_s < 1e12 else f"{per_s / 1e9:,.0f}"


def _explain_times(report: ProfileReport) -> list[str]:
    """Compare the sum of the kernels with the step as served, and state the overhead of timing them."""
    profile = report.profile
    kernels, step, profiled = (_ms(s) for s in (profile.kernels_s, profile.step_s, profile.profiled_s))
    cost = profile.profiled_s / profile.step_s - 1
    shares = f" ({profile.num_kernels:,} launches of {profile.num_cores} cores)" if profile.num_cores > 1 else ""
    lines = [f"kernels {kernels} in {profile.num_dispatches:,} dispatches{shares}; the step as served {step}"]
    if profile.between_s is not None:
        lines.append(
            f"timed inside the step on {profile.num_cores} core(s); a row has its slowest core's time; timed, the "
            f"step took {profiled} ({cost:+.0%}), {_ms(profile.between_s)} of it between kernels: launching, waiting"
        )
    else:
        each_us = max(0.0, profile.kernels_s - profile.step_s) / len(profile.kernels) * 1e6
        lines.append(
            f"timed one by one with the device's clock, outside the graph: the step took {profiled} ({cost:+.0%}), and "
            f"each kernel {each_us:,.1f} us longer than in the graph: read the shares here, the speed from the step as "
            "served"
        )
    lines.append(
        f"with the host's work {_ms(report.turn_s)}: packing {_ms(report.pack_s)}, host in total {_ms(report.host_s)}"
    )
    if report.trust.get("why"):
        lines.append(f"trust {report.trust['grade']}: {report.trust['why']}")
    return lines


COUNT_WORDS = {
    "kernels": "kernels",
    "barriers": "barriers",
    "graph_launches": "graph launches",
    "syncs": "syncs",
    "copies_h2d": "copies to the device",
    "copies_d2h": "copies to the host",
    "eager_kernels": "kernels outside the graph",
    "compilations": "compilations",
}


def _explain_counts(report: ProfileReport) -> list[str]:
    """What a step asks of the device, each count with its limit."""
    counts = [
        f"{words} {report.counts[name]:,}" + (f" (at most {report.limits[name]:,})" if name in report.limits else "")
        for name, words in COUNT_WORDS.items()
        if name in report.counts
    ]
    lines = [f"a step's counts: {', '.join(counts)}"] if counts else []
    over = [name for name, limit in report.limits.items() if report.counts.get(name, 0) > limit]
    lines += [f"WARNING: {COUNT_WORDS.get(name, name)} exceed the limit" for name in over]
    return lines + list(report.program_limits)


def _explain_roof(report: ProfileReport) -> list[str]:
    roof, chip = report.roofline, report.chip
    bound = "memory" if roof.is_memory_bound else "compute"
    lines = [
        f"at least {roof.nbytes / 1e6:,.1f} MB and {roof.flops / 1e9:,.3f} GFLOP per step "
        f"({roof.intensity:,.2f} FLOP/B; the roofline bends at {roof.knee:,.1f}); the kernels move "
        f"{report.moved_bytes / 1e6:,.1f} MB ({report.moved_bytes / roof.nbytes:.2f} x)",
        f"{chip.name}: {rounded(chip.bandwidth_gbps)} GB/s, {rounded(chip.half_tflops)} TFLOP/s ({chip.source})",
        f"floor {_ms(roof.floor_s)} ({bound}); achieved {rounded(roof.achieved_gbps)} GB/s and "
        f"{rounded(roof.achieved_tflops)} TFLOP/s: {roof.utilization:.0%} of the roof",
    ]
    return lines + [f"WARNING: {warning}" for warning in (*roof.warnings(), *report.row_warnings)]


def _finding_text(finding: Finding, is_verdict: bool) -> Text:
    if finding.is_withheld:
        return Text(finding.headline, "bold")
    name = f"verdict: {finding.name}" if is_verdict else f"also: {finding.name}"
    return Text.assemble((name, "bold" if is_verdict else ""), f" - {finding.because}. Next: {finding.next_step}.")


def trace_table(trace: Trace, by: str, last_steps: int | None, chip: Chip | None = None) -> RenderableType:
    """The kernels of a DEBUG=2 log, with notes."""
    kernels = trace.kernels(last_steps)
    notes = [
        f"{sum(kernel.count for kernel in kernels):,} dispatches in {sum(kernel.launches for kernel in kernels):,} "
        f"launches, {_ms(sum(kernel.seconds for kernel in kernels))} on "
        f"{', '.join(sorted({kernel.device for kernel in kernels})) or 'no device'}; tinygrad waited after each one"
    ]
    if any(kernel.operation.startswith("graph of") for kernel in kernels):
        notes.append("each graph is one line: run with JIT=2 to see its kernels")
    if trace.num_scheduled:
        notes.append(f"{trace.num_scheduled:,} kernels were scheduled, in {_ms(trace.scheduling_s)} of Python")
    for count, what in (
        (trace.num_cut, "lines were truncated"),
        (trace.num_untimed, "lines have no time and are left out"),
        (trace.num_other_lines, "lines do not describe a kernel"),
    ):
        if count:
            notes.append(f"{count:,} {what}")
    return Group(kernels_by(by, kernels, chip), Text(""), *(Text(note) for note in notes))


def recording_table(recording: Recording) -> RenderableType:
    """The spans of a recording by name: where the host's time went."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("span", no_wrap=True)
    for column in ("count", "total ms", "own ms", "CPU ms", "mean ms", "median ms", "p95 ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, total in sorted(recording.totals.items(), key=lambda item: -item[1].total_ns):
        times = sorted(span.duration_ns for span in recording.named(name))
        table.add_row(
            name,
            f"{total.count:,}",
            f"{total.total_ns / 1e6:,.2f}",
            f"{total.own_ns / 1e6:,.2f}",
            f"{total.own_cpu_ns / 1e6:,.2f}" if total.timed_ns else "-",
            f"{total.total_ns / total.count / 1e6:,.3f}",
            f"{_quantile(times, 0.5) / 1e6:,.3f}",
            f"{_quantile(times, 0.95) / 1e6:,.3f}",
            f"{total.total_ns / recording.wall_ns:.1%}",
        )
    for thread, rest_ns in sorted(outside_spans(recording).items()):
        share = f"{rest_ns / recording.wall_ns:.1%}"
        table.add_row(f"outside spans ({thread})", "", f"{rest_ns / 1e6:,.2f}", "", "", "", "", "", share)
    notes = [Text(f"{name}: {count:,}") for name, count in sorted(recording.counts.items())]
    if recording.num_dropped:
        notes.append(Text(f"percentiles cover the latest spans: {recording.num_dropped:,} earlier ones were dropped"))
    title = f"recorded {recording.wall_ns / 1e9:,.3f} s; the host waits for the device in `wait`; kernels are not shown"
    findings = (_finding_text(finding, index == 0) for index, finding in enumerate(judge_recording(recording)))
    return Group(Text(title, style="bold"), table, *notes, *findings)


def outside_spans(recording: Recording) -> dict[str, int]:
    """Nanoseconds of each thread outside all of its spans. Empty if spans were dropped."""
    if recording.num_dropped:
        return {}
    rest: dict[str, int] = {}
    for span in recording.spans:
        if span.depth == 0:
            rest[span.thread] = rest.get(span.thread, recording.wall_ns) - span.duration_ns
    return rest


def recording_as_json(recording: Recording) -> dict[str, Any]:
    """The same as JSON values, in seconds."""
    return {
        "schema": SCHEMA,
        "wall_s": recording.wall_ns / 1e9,
        "spans": {
            name: {
                "count": total.count,
                "total_s": total.total_ns / 1e9,
                "own_s": total.own_ns / 1e9,
                "own_cpu_s": total.own_cpu_ns / 1e9 if total.timed_ns else None,
                "share": total.total_ns / recording.wall_ns,
            }
            for name, total in recording.totals.items()
        },
        "outside_s": {thread: rest_ns / 1e9 for thread, rest_ns in outside_spans(recording).items()},
        "verdict": [finding.as_json() for finding in judge_recording(recording)],
        "counts": recording.counts,
        "dropped": recording.num_dropped,
        "process": process_as_json(recording),
    }


def prediction_table(
    name: str, kind: str, prediction: Prediction, checks: Sequence[tuple[Measured, Prediction]]
) -> RenderableType:
    """A prediction, its assumptions, and the rule's error where it can be checked."""
    p = prediction
    table = Table(box=None, pad_edge=False, header_style="bold")
    ahead = [("prefill", str(p.prompt))] if p.prompt else [("batch", str(p.batch)), ("context", str(p.context))]
    times = (p.step_s, p.memory_s, p.compute_s, p.kernels_s, p.host_s)
    names = ("ms in total" if p.prompt else "ms per step", "memory", "compute", "kernels", "host")
    cells = [(title, f"{seconds * 1e3:,.3f}") for title, seconds in zip(names, times, strict=True)]
    cells = [*ahead, *cells, ("tok/s", f"{p.tok_s:,.1f}"), ("roof tok/s", f"{p.roof_tok_s:,.1f}")]
    for column, _ in cells:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*(text for _, text in cells))
    lines = [f"assumes: {text}" for text in p.assumptions]
    lines += [
        f"checked: {m.title}: predicted {of.tok_s:,.0f}, measured {m.tok_s:,.0f} tok/s ({m.error_of(of):+.0%})"
        for m, of in checks
    ]
    title = Text(f"{name} ({kind}) on {p.chip.name}, predicted, not measured; parts in ms", style="bold")
    return Group(title, table, Text(""), *(Text(line) for line in lines))


def _quantile(ordered: Sequence[int], share: float) -> float:
    """The quantile, interpolated linearly between neighbors; 0 without values."""
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
