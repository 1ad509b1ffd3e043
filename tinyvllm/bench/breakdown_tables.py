"""A breakdown for a terminal (the answer, tables, and checks), and as CSV with all stages of all cases."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.breakdown import MAX_RESIDUAL_SHARE, Breakdown, CaseResult, sum_stages
from tinyvllm.bench.breakdown_rows import bench_rows
from tinyvllm.bench.cold_start import ColdStart
from tinyvllm.bench.memory import MemoryBlock
from tinyvllm.bench.stages import DEVICE_STAGES
from tinyvllm.bench.tables import MIB, format_number, latency_table, make_title
from tinyvllm.bench.token_table import token_rows, token_table
from tinyvllm.bench.trust import Trust
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.expert_load import describe_loads
from tinyvllm.profiling.kernels import tabulate
from tinyvllm.profiling.request_stages import DECODE, PREFILL

NUM_TOP_KERNELS = 5
STAGE_COLUMNS = ("count", "total ms", "share", "mean ± std ms", "min", "median", "p95", "p99")


def breakdown_tables(breakdown: Breakdown, *, by_token: bool = False) -> RenderableType:
    """The answer in three lines; then all tables, from the stages to the parts of a start; then the checks.
    `by_token`: also the main case's tokens."""
    rows = token_rows(breakdown.main) if by_token else []
    by_tokens: list[RenderableType] = []
    if rows:
        by_tokens = [Text(f"\nToken by token: {breakdown.main.case.name}", style="bold"), token_table(rows)]
    return Group(
        Text(make_title(breakdown.machine), style="bold"),
        *answer_lines(breakdown),
        Text("\nStages, all cases and repeats", style="bold"),
        _stage_table(breakdown),
        Text("\nWithout instrumentation", style="bold"),
        latency_table(bench_rows(breakdown), has_title=False),
        Text(f"\nKernels of a decode step: {breakdown.main.case.name}", style="bold"),
        _kernel_table(breakdown),
        *by_tokens,
        *_verdict_lines(breakdown),
        Text("\nCounts of a step: the maximum over all steps of a phase", style="bold"),
        _count_table(breakdown),
        Text("\nMemory", style="bold"),
        memory_table(breakdown.memory),
        Text("\nCold start", style="bold"),
        cold_start_table(breakdown.cold_start),
        Text("\nChecks", style="bold"),
        Text(stage_summary(breakdown)),
    )


def answer_lines(breakdown: Breakdown) -> list[Text]:
    """Where the time goes, how fast one request is, and what limits it; then faults: what does not belong in a step."""
    share = {stage.name: stage.share for stage in breakdown.stages}
    host = sum(share[name] for name in share if name not in DEVICE_STAGES)
    device = ", ".join(f"{name} {_percent(share[name])}" for name in DEVICE_STAGES)
    main = breakdown.main
    first_s = statistics.median(request.token_s[0] for one in main.plain for request in one.requests)
    token_s = main.token_s
    roofline = breakdown.roofline(DECODE)
    roof = "" if roofline is None else f", {roofline.utilization:.0%} of what {roofline.chip.name} allows"
    verdict = breakdown.verdicts[0]
    return [
        Text(f"the time goes to {device}, and {_percent(host)} to the host"),
        Text(
            f"one request of {main.num_prompt_tokens} + {main.case.num_output} tokens: the first after "
            f"{first_s * 1e3:,.0f} ms, then {token_s * 1e3:,.2f} ms a token ({1 / token_s:,.1f} tok/s){roof}"
        ),
        Text(verdict.headline, style="bold"),
        *trust_lines(main.trust),
        *[Text(f"fault: {fault.name}: {fault.text}", style="red") for fault in breakdown.faults],
    ]


def trust_lines(trust: Trust | None) -> list[Text]:
    """Why a figure has a grade below A; [] if it has an A."""
    return [] if trust is None or not trust.why else [Text(f"trust {trust.grade}: {trust.why}")]


def _percent(share: float) -> str:
    """At least two significant digits."""
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def memory_table(blocks: Sequence[MemoryBlock]) -> Table:
    """One line per block."""
    table = _table("MiB", "process", "new", "peak", "device", "new")
    for block in blocks:
        sizes = (block.rss, block.rss_delta, block.rss_peak, block.device, block.device_delta)
        signs = ("", "+", "", "", "+")
        table.add_row(
            block.name,
            *("-" if size is None else f"{size / MIB:{sign},.1f}" for size, sign in zip(sizes, signs, strict=True)),
        )
    table.caption = "Process: its resident memory (Linux); on a CPU the device's buffers are part of it."
    table.caption_justify = "left"
    return table


def stage_summary(breakdown: Breakdown) -> str:
    """The residual, the device's share, and the measurement overhead, in words."""
    residual = breakdown.residual_share
    verdict = "within" if residual < MAX_RESIDUAL_SHARE else "OVER"
    decode = breakdown.main.sampling_shares.get(DECODE, 0.0)
    return (
        f"residual: {residual:.2%} of {breakdown.wall_s:.3f} s is in no stage ({verdict} the limit of "
        f"{MAX_RESIDUAL_SHARE:.0%}); device, from launch to done: {breakdown.device_share:.1%}, the rest host\n"
        f"measurement overhead: {breakdown.overhead_share:+.1%} compared with plain runs, which have up to "
        f"{breakdown.max_in_flight} steps in flight\n"
        "sampling: the share of its kernels in a step timed kernel by kernel, in the same bucket and context "
        f"({decode:.2%} of a decode step of {breakdown.main.case.name})"
    )


def breakdown_csv(breakdown: Breakdown) -> str:
    """One line per case and stage, in seconds. The case "all" is all of them together."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("count", "total_s", "share", "mean_s", "std_s", "min_s", "median_s", "p95_s", "p99_s")
    writer.writerow(("case", "stage", *names))
    groups: list[tuple[str, Sequence[CaseResult]]] = [("all", breakdown.cases)]
    groups += [(result.case.name, [result]) for result in breakdown.cases]
    for name, results in groups:
        for stage in sum_stages(results):
            values = stage.as_json()
            writer.writerow((name, stage.name, *(values[column] for column in names)))
    return out.getvalue()


def cold_start_table(start: ColdStart) -> Table:
    """A start graph by graph, in the order of capture. The caption has the times of its other parts."""
    table = _table("", "schedule s", "compile s", "capture s", "warm-up calls ms")
    for bucket in start.buckets:
        calls = " ".join(f"{seconds * 1e3:.2f}" for seconds in bucket.calls_s)
        table.add_row(bucket.name, *_seconds(bucket.schedule_s, bucket.compile_s, bucket.capture_s), calls)
    sums = start.sums
    table.add_row("all buckets", *_seconds(sums["schedule_s"], sums["compile_s"], sums["capture_s"]), "")
    process = "unknown" if start.process_s is None else f"{start.process_s:.2f} s"
    table.caption = f"process {process}, import {start.import_s:.2f} s, load {start.load_s:.2f} s, " + (
        f"first token after {start.first_token_s:.2f} s, all graphs after {start.all_graphs_s:.2f} s, with warm-up "
        f"calls {start.total_s:.2f} s; {start.num_kept} of {2 * len(start.buckets)} steps from the cache, "
        f"{start.num_compiled} programs compiled"
    )
    table.caption_justify = "left"
    return table


def _stage_table(breakdown: Breakdown) -> Table:
    table = _table("stage", *STAGE_COLUMNS)
    for stage in breakdown.stages:
        spread = stage.spread
        if spread is None:
            table.add_row(stage.name, "0", *["-"] * (len(STAGE_COLUMNS) - 1))
            continue
        ms = [f"{value * 1e3:.3f}" for value in (spread.min, spread.median, spread.p95, spread.p99)]
        mean = f"{spread.mean * 1e3:.3f} ± {spread.std * 1e3:.3f}"
        table.add_row(stage.name, str(spread.count), f"{stage.total_s * 1e3:,.1f}", f"{stage.share:.2%}", mean, *ms)
    residual_ms = breakdown.residual_share * breakdown.wall_s * 1e3
    empty = [""] * (len(STAGE_COLUMNS) - 3)
    table.add_row("residual", "", f"{residual_ms:,.1f}", f"{breakdown.residual_share:.2%}", *empty, style="dim")
    table.add_row("wall", "", f"{breakdown.wall_s * 1e3:,.1f}", "100.00%", *empty, style="bold")
    return table


def _count_table(breakdown: Breakdown) -> Table:
    table = _table(
        "case", "kernels", "graphs", "single", "eager", "syncs", "to device", "to host", "KV blocks", "device MiB"
    )
    for result in breakdown.cases:
        for phase in (PREFILL, DECODE):
            counts = result.counts.get(phase)
            if counts is None:
                continue
            table.add_row(
                f"{result.case.name}, {phase}",
                str(counts.kernels),
                str(counts.graph_launches),
                str(counts.single_launches),
                str(counts.eager_kernels),
                str(counts.syncs),
                f"{counts.copies_h2d} ({counts.bytes_h2d:,} B)",
                f"{counts.copies_d2h} ({counts.bytes_d2h:,} B)",
                str(counts.kv_blocks),
                f"{counts.device_bytes / MIB:,.0f}",
            )
    return table


def _verdict_lines(breakdown: Breakdown) -> list[Text]:
    """Rooflines with their warnings, then what to try next, and the other verdicts."""
    lines = [Text("")]
    for phase in (PREFILL, DECODE):
        roofline = breakdown.roofline(phase)
        if roofline is not None:
            lines.append(
                Text(
                    f"{phase} step: at least {roofline.nbytes / 1e6:,.1f} MB and {roofline.flops / 1e9:,.2f} GFLOP, "
                    f"floor {roofline.floor_s * 1e3:.3f} ms, took {roofline.seconds * 1e3:.3f} ms: "
                    f"{roofline.utilization:.0%} of the roof of {roofline.chip.name} "
                    f"({rounded(roofline.chip.bandwidth_gbps)} GB/s, {rounded(roofline.chip.half_tflops)} TFLOP/s)"
                )
            )
            lines += [Text(f"warning: {warning}", style="yellow") for warning in roofline.warnings()]
    for place, verdict in enumerate(breakdown.verdicts):
        if verdict.is_withheld:
            continue
        if place:
            lines.append(Text(f"also: {verdict.name}: {verdict.because}"))
        lines.append(Text(f"{'' if place else verdict.name + ', '}next: {verdict.next_step}"))
    return lines


def _kernel_table(breakdown: Breakdown) -> Table:
    profile = breakdown.main.profiles[DECODE]
    table = _table("operation", "dispatches", "total ms", "average us", "share", "GB/s", "GFLOP/s", "of roof")
    for row in tabulate(profile.kernels, chip=breakdown.chip)[:NUM_TOP_KERNELS]:
        table.add_row(
            row.label,
            str(row.dispatches),
            f"{row.total_s * 1e3:.3f}",
            f"{row.average_s * 1e6:.1f}",
            f"{row.share:.1%}",
            format_number(None if row.bytes_per_s is None else row.bytes_per_s / 1e9),
            format_number(None if row.flops_per_s is None else row.flops_per_s / 1e9),
            "-" if row.roof_share is None else f"{row.roof_share:.0%}",
        )
    caption = (
        f"{profile.num_kernels} kernels, {profile.kernels_s * 1e3:.3f} ms one by one, "
        f"{profile.step_s * 1e3:.3f} ms as one step"
    )
    table.caption = "\n".join([caption, *describe_loads(profile.experts)])
    table.caption_justify = "left"
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _seconds(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]
