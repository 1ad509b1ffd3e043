"""Latency rows of our replay and of TinyJit side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.rows import Row
from tinyvllm.bench.tables import format_number, make_title


def tag_capture(rows: Sequence[Row], capture: str) -> list[Row]:
    """The rows, which say how their steps were captured."""
    return [dataclasses.replace(row, more=row.more | {"capture": capture}) for row in rows]


def capture_table(replayed: Sequence[Row], jitted: Sequence[Row]) -> RenderableType:
    """One line per case: the median step of each, and how many times as fast the replay is. Both in the same order."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("test", no_wrap=True)
    columns = ("kernels", "replay ms", "min", "tinyjit ms", "min", "replay t/s", "tinyjit t/s", "replay gains")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for ours, theirs in zip(replayed, jitted, strict=True):
        table.add_row(
            ours.test,
            "-" if ours.kernels is None else str(ours.kernels),
            *[format_number(value) for row in (ours, theirs) for value in (row.step_ms.median, row.step_ms.min)],
            format_number(ours.tok_s.mean),
            format_number(theirs.tok_s.mean),
            f"{theirs.step_ms.median / ours.step_ms.median:.2f} x",
        )
    return Group(Text(make_title(replayed[0].machine), style="bold"), table)
