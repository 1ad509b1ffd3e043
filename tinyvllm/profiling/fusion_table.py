"""A step with fused and with unfused kernels, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.profiling.kernels import KernelRow
from tinyvllm.profiling.profile_report import ProfileReport

COLUMNS = ("dispatches", "MB", "ms")


def fusion_table(fused: ProfileReport, unfused: ProfileReport, tokens: Sequence[list[int]]) -> RenderableType:
    """One line per operation, fused on the left, then the whole step. `tokens`: what each generates from one prompt."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("operation", no_wrap=True)
    for name in ("fused", "unfused"):
        for column in COLUMNS:
            table.add_column(f"{name}\n{column}", justify="right", no_wrap=True)
    sides = [{row.label: row for row in report.rows("operation")} for report in (fused, unfused)]
    for label in dict.fromkeys([*sides[0], *sides[1]]):
        table.add_row(label, *(cell for side in sides for cell in _cells(side.get(label))))
    for name, whole in (("all kernels", _sums), ("the step as served", _steps)):
        table.add_row(name, *(cell for report in (fused, unfused) for cell in whole(report)), style="bold")
    return Group(table, Text(""), *(Text(line) for line in _explain(fused, unfused, tokens)))


def fusion_as_json(fused: ProfileReport, unfused: ProfileReport, tokens: Sequence[list[int]]) -> dict[str, Any]:
    """The unfused profile and the comparison."""
    return {
        "profile": unfused.as_json(),
        "gain": unfused.profile.step_s / fused.profile.step_s,
        "kernels_saved": unfused.profile.num_kernels - fused.profile.num_kernels,
        "bytes_saved": unfused.moved_bytes - fused.moved_bytes,
        "tokens": list(tokens),
        "equal_tokens": count_equal(tokens),
    }


def count_equal(tokens: Sequence[list[int]]) -> int:
    """The number of equal tokens at the beginning."""
    pairs = list(zip(*tokens, strict=True))
    return next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))


def _explain(fused: ProfileReport, unfused: ProfileReport, tokens: Sequence[list[int]]) -> list[str]:
    equal, count = count_equal(tokens), len(tokens[0])
    fewer = unfused.profile.num_kernels - fused.profile.num_kernels
    saved_mb = (unfused.moved_bytes - fused.moved_bytes) / 1e6
    times = [(report.profile.step_s, report.profile.kernels_s) for report in (fused, unfused)]
    gains = [slow / fast for fast, slow in zip(*times, strict=True)]
    lines = [
        f"fusing saves {fewer:,} kernels and {saved_mb:,.1f} MB a step: the step is {gains[0]:.2f} x as fast, its "
        f"kernels {gains[1]:.2f} x (if the machine did nothing else at the time)"
    ]
    if equal == count:
        return [*lines, f"both generate the same {count} tokens from one prompt"]
    rest = "sums in another order round differently, so the likeliest of two near tokens may change"
    return [*lines, f"WARNING: the first {equal} of {count} tokens from one prompt are equal: {rest}"]


def _cells(row: KernelRow | None) -> tuple[str, ...]:
    if row is None:
        return ("", "", "")
    return f"{row.dispatches:,}", "-" if row.nbytes is None else _mb(row.nbytes), f"{row.total_s * 1e3:,.3f}"


def _sums(report: ProfileReport) -> tuple[str, ...]:
    return f"{report.profile.num_dispatches:,}", _mb(report.moved_bytes), f"{report.profile.kernels_s * 1e3:,.3f}"


def _steps(report: ProfileReport) -> tuple[str, ...]:
    return "", "", f"{report.profile.step_s * 1e3:,.3f}"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f}"
