"""Latency rows of fused and of unfused kernels side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.rows import Row
from tinyvllm.bench.tables import format_number, make_title


def tag_fusion(rows: Sequence[Row], *, unfused: bool) -> list[Row]:
    """The rows, which say whether their kernels were fused."""
    return [dataclasses.replace(row, more=row.more | {"unfused": unfused}) for row in rows]


def fusion_table(fused: Sequence[Row], unfused: Sequence[Row]) -> RenderableType:
    """One line per case: kernels, bytes and the median step of each. Both in the same order."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("test", no_wrap=True)
    columns = ("kernels", "unfused", "moved MB", "unfused", "ms", "unfused", "t/s", "unfused", "fusing gains")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for ours, theirs in zip(fused, unfused, strict=True):
        both = (ours, theirs)
        table.add_row(
            ours.test,
            *("-" if row.kernels is None else f"{row.kernels:,}" for row in both),
            *("-" if row.moved_bytes is None else format_number(row.moved_bytes / 1e6) for row in both),
            *(format_number(row.step_ms.median) for row in both),
            *(format_number(row.tok_s.mean) for row in both),
            f"{theirs.step_ms.median / ours.step_ms.median:.2f} x",
        )
    return Group(Text(make_title(fused[0].machine), style="bold"), table)
