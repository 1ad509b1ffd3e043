"""Where served time goes, as tables for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.load_tables import row_name, warn_of_generator
from tinyvllm.bench.served import MAX_RESIDUAL_SHARE, ServedLevel
from tinyvllm.bench.tables import format_number
from tinyvllm.profiling.stage_rows import RESIDUAL, WALL, StageRow, delivery_as_json, process_as_json, stage_rows

STAGE_COLUMNS = ("stage", "p50 ms", "p99 ms", "mean ms", "share", "to first token ms", "per token ms")
PROCESS_COLUMNS = ("process", "CPU", "waits for a core", "lock held", "wait for lock: mean", "p99 ms", "probes")
MIN_SHARE = 0.005  # of a core: threads below it are not shown


def served_tables(levels: Sequence[ServedLevel]) -> RenderableType:
    """For each level: figures as users see them, stages, delivery, and processes."""
    return Group(*[part for level in levels for part in _level_parts(level)])


def served_markdown(levels: Sequence[ServedLevel]) -> str:
    """The stages and processes of each level in Markdown."""
    parts = []
    for level in levels:
        parts.append(f"{row_name(level.plain)}: {_figures(level.plain)}; {summary_line(level)}")
        parts.append(_markdown(STAGE_COLUMNS, [_stage_cells(row) for row in stage_rows(level.served.requests)]))
        parts.append(_markdown(PROCESS_COLUMNS, _process_rows(level)))
    return "\n\n".join(parts)


def summary_line(level: ServedLevel) -> str:
    """The residual, the requests that it is about, and the overhead of recording."""
    served = level.served
    rows = {row.stage: row for row in stage_rows(served.requests)}
    if not rows:
        return "no request was followed from its first byte to its last: did other clients use the server?"
    residual = rows[RESIDUAL].share
    verdict = "within" if residual <= MAX_RESIDUAL_SHARE else "OVER"
    left_out = f", {served.num_left_out} left out" if served.num_left_out else ""
    return (
        f"residual {residual:.2%}, {verdict} the limit of {MAX_RESIDUAL_SHARE:.0%}; {len(served.requests)} requests"
        f"{left_out}; recording cost {level.overhead_share:+.1%}"
    )


def delivery_line(level: ServedLevel) -> str:
    """What a token's way to the socket takes while the engine computes the next."""
    mean = delivery_as_json(level.served.delivery)
    return (
        f"every token, beside the engine's next step: hop back {mean['hop_back_ms']:.3f} ms, detokenize "
        f"{mean['detokenize_ms']:.3f}, serialize {mean['serialize_ms']:.3f}, send {mean['send_ms']:.3f}; "
        f"{mean['events']:,} events in {mean['messages']:,} messages"
    )


def _level_parts(level: ServedLevel) -> list[RenderableType]:
    parts: list[RenderableType] = [
        Text(f"\n{row_name(level.plain)}: {_figures(level.plain)}", style="bold"),
        _table(STAGE_COLUMNS, [_stage_cells(row) for row in stage_rows(level.served.requests)]),
        Text(summary_line(level)),
        Text(delivery_line(level)),
        _table(PROCESS_COLUMNS, _process_rows(level)),
    ]
    failed = [f"failed: {count} x {error}" for error, count in level.recorded["errors"].items()]
    parts += [Text(line, style="red") for line in failed]
    warning = warn_of_generator(level.plain)
    return parts if warning is None else [*parts, Text(warning, style="yellow")]


def _figures(row: dict[str, Any]) -> str:
    """Without a recording."""
    times = [
        f"{label} {format_number(row[name]['median'])} / {format_number(row[name]['p99'])} ms"
        for name, label in (("ttft_ms", "TTFT"), ("itl_ms", "ITL"))
        if row[name] is not None
    ]
    return ", ".join([f"{format_number(row['output_tok_s'])} tok/s", *times, "(p50 / p99)"])


def _stage_cells(row: StageRow) -> list[str]:
    times = [f"{value:,.3f}" for value in (row.p50_ms, row.p99_ms, row.mean_ms)]
    parts = ["-" if not value else f"{value:,.3f}" for value in (row.first_ms, row.token_ms)]
    return [row.stage, *times, f"{row.share:.2%}", *parts]


def _process_rows(level: ServedLevel) -> list[list[str]]:
    """A line for each process, and one for each thread that did something."""
    rows = []
    for process in map(process_as_json, level.recordings):
        if "threads" not in process:
            continue
        lock = process["lock"]
        locked = ["-"] * 4
        if lock is not None:
            locked = [
                f"{lock['held_share']:.0%} ± {lock['held_error']:.0%}",
                f"{lock['mean_wait_ms']:.3f}",
                f"{lock['p99_wait_ms']:.3f}",
                f"{lock['probes']:,}",
            ]
        waits = sum(thread["core_wait_share"] for thread in process["threads"])
        rows.append([f"{process['name']} ({process['pid']})", f"{process['cpu_share']:.0%}", f"{waits:.0%}", *locked])
        rows += [
            [f"  {thread['name']}", f"{thread['cpu_share']:.1%}", f"{thread['core_wait_share']:.1%}", *[""] * 4]
            for thread in process["threads"]
            if thread["cpu_share"] >= MIN_SHARE
        ]
        rows += [
            [f"  lock held by {holder['thread']}: {holder['where']}", "", "", f"{holder['share']:.0%}", *[""] * 3]
            for holder in ([] if lock is None else lock["holders"])
            if holder["share"] >= MIN_SHARE
        ]
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        style = "dim" if row[0] == RESIDUAL else "bold" if row[0] == WALL else ""
        table.add_row(*row, style=style)
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
