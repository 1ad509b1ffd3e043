"""Rows as tables, for a terminal (rich) and in Markdown with llama-bench's columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread

GIB, MIB = 1 << 30, 1 << 20
LOAD_METRICS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token, ms",
    "itl_ms": "inter-token latency, ms",
    "e2e_ms": "whole request, ms",
}


def latency_table(rows: Sequence[Row], *, has_title: bool = True) -> RenderableType:
    """One line per case. "of floor" is the floor divided by the median step."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("test", no_wrap=True)
    for column in ("t/s", "median ms", "mean ms", "min ms", "p95 ms", "kernels", "MB", "moved", "floor ms", "of floor"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("trust", no_wrap=True)
    for row in rows:
        step = row.step_ms
        table.add_row(
            row.test,
            _plus_minus(row.tok_s),
            format_number(step.median),
            _plus_minus(step),
            format_number(step.min),
            format_number(step.p95),
            "-" if row.kernels is None else str(row.kernels),
            "-" if row.nbytes is None else f"{row.nbytes / 1e6:,.1f}",
            "-" if row.bytes_ratio is None else f"{row.bytes_ratio:.2f} x",
            format_number(row.floor_ms),
            "-" if row.floor_share is None else f"{row.floor_share:.0%}",
            "-" if row.trust is None else row.trust.grade,
        )
    body = Group(table, *doubts(rows))
    return Group(Text(make_title(rows[0].machine), style="bold"), body) if has_title else body


def doubts(rows: Sequence[Row]) -> list[Text]:
    """Why figures have a grade below A, once for each reason."""
    tests: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.trust is not None and row.trust.why:
            tests.setdefault((row.trust.grade, row.trust.why), []).append(row.test)
    return [Text(f"trust {grade}: {why} ({', '.join(names)})", style="dim") for (grade, why), names in tests.items()]


def throughput_table(row: Row) -> RenderableType:
    """The rates, then the spread of the times over all requests."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("mean", "std", "median", "p95", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, label in LOAD_METRICS.items():
        table.add_row(label, *_cells(row.more[name]))
    table.add_row("step, ms", *_cells(row.step_ms))
    rates = (
        f"{row.test}, at most {row.batch} at a time, {row.tok_s.count} repeats: "
        f"{_plus_minus(row.tok_s)} output tokens/s, {format_number(row.more['input_tok_s'])} input tokens/s, "
        f"{row.more['preemptions']} preemptions, {row.more['padding_share']:.1%} of all rows are padding"
    )
    return Group(Text(make_title(row.machine), style="bold"), Text(rates), table, *doubts([row]))


def markdown_table(rows: Sequence[Row]) -> str:
    """llama-bench's columns: sizes in powers of 1024, tokens per second with the standard deviation over repeats."""
    lines = ["| model | size | params | backend | test | t/s |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for row in rows:
        machine = row.machine
        cells = (
            f"{machine.model} {machine.dtype}",
            f"{machine.model_bytes / GIB:.2f} GiB"
            if machine.model_bytes >= GIB
            else f"{machine.model_bytes / MIB:.2f} MiB",
            f"{machine.num_params / 1e9:.2f} B" if machine.num_params >= 1e9 else f"{machine.num_params / 1e6:.2f} M",
            machine.device,
            row.test,
            f"{row.tok_s.mean:.2f} ± {row.tok_s.std:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_title(machine: Machine) -> str:
    """The measured model and device."""
    text = f"{machine.model}, {machine.dtype}, {machine.model_bytes / 1e6:,.1f} MB of weights, on {machine.device}"
    return text if machine.bandwidth_gbps is None else f"{text} with {machine.bandwidth_gbps:,.1f} GB/s"


def _cells(spread: Spread) -> list[str]:
    return [format_number(value) for value in (spread.mean, spread.std, spread.median, spread.p95, spread.p99)]


def _plus_minus(spread: Spread) -> str:
    return f"{format_number(spread.mean)} ± {format_number(spread.std)}"


def format_number(value: float | None) -> str:
    """At least three significant digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
