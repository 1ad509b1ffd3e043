"""Levels of load as tables, for a terminal (rich) and for a page (Markdown)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.tables import format_number

TIMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
PERCENTILES = ("median", "p95", "p99")
MAX_BUSY_SHARE = 0.8  # of a load process's time: above it, answers wait for the generator


def load_table(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """One line per level. Times are median / p95 / p99 in ms."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", no_wrap=True)
    for column in headings()[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    failed = [f"{row_name(row)}: {count} x {error}" for row in rows for error, count in row["errors"].items()]
    first = rows[0]
    title = f"{first['model']} at {first['url']}, {first['api']}, {first['requests']} requests per level; "
    title += "times are median / p95 / p99"
    notes = [Text(f"failed: {line}", style="red") for line in failed]
    notes += [Text(parts) for row in rows if (parts := describe_server(row))]
    notes += [Text(warning, style="yellow") for row in rows if (warning := warn_of_generator(row))]
    notes += [
        Text(f"{row_name(row)}: trust {trust['grade']}: {trust['why']}", style="dim")
        for row in rows
        if (trust := row.get("trust")) and trust["why"]
    ]
    return Group(Text(title, style="bold"), table, *notes)


def describe_server(row: dict[str, Any], least_share: float = 0.005) -> str | None:
    """Where the server's time went, on average: parts of at least `least_share`, the longest first."""
    parts = row.get("server_ms")
    if not parts or "total" not in parts:
        return None
    total_ms = parts["total"]["mean"]
    means = {name: part["mean"] for name, part in parts.items() if name != "total"}
    shown = sorted(((ms, name) for name, ms in means.items() if ms >= least_share * total_ms), reverse=True)
    listed = ", ".join(f"{name} {format_number(ms)} ({ms / total_ms:.0%})" for ms, name in shown)
    return f"{row_name(row)}, in the server: {format_number(total_ms)} ms an answer: {listed}"


def warn_of_generator(row: dict[str, Any]) -> str | None:
    """Says so if the load generator was nearly busy, so that the figures may be its own."""
    if row["load_busy_share"] <= MAX_BUSY_SHARE:
        return None
    return (
        f"{row_name(row)}: one of {row['load_processes']} load processes was busy {row['load_busy_share']:.0%} of the "
        "time, so it may have limited the figures: raise --load-processes, or use a machine with more cores"
    )


def load_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same columns in Markdown."""
    names = headings()
    lines = [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]
    return "\n".join([*lines, *[f"| {' | '.join(cells(row))} |" for row in rows]])


def headings() -> list[str]:
    """The headings of `cells`."""
    times = [f"{label} ms" for label in TIMES.values()]
    return ["load", "requests/s", "output t/s", *times, "events/answer", "good", "errors"]


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one level."""
    times = [
        "-" if row[name] is None else " / ".join(format_number(row[name][key]) for key in PERCENTILES) for name in TIMES
    ]
    good = "-" if row["goodput_share"] is None else f"{row['goodput_request_s']:.2f}/s, {row['goodput_share']:.0%}"
    rates = [format_number(row["request_s"]), format_number(row["output_tok_s"])]
    events = format_number(row["events_per_answer"]["mean"])
    return [row_name(row), *rates, *times, events, good, str(sum(row["errors"].values()))]


def row_name(row: dict[str, Any]) -> str:
    """The name of a level."""
    return f"{row['concurrency']} at once" if row["rate"] is None else f"{row['rate']:g} per second"
