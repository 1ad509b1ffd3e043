"""The table of `bench speculation`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.rows import Row
from tinyvllm.bench.tables import doubts, format_number, make_title

NOTE = (
    "Plain and with drafts in turn, from the first token on. Accepted: of the drafted tokens. Length: mean tokens "
    "of a sequence in a step with drafts. Equal: tokens before the first that differs with drafts."
)


def speculation_table(rows: Sequence[Row]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    columns = (
        "batch",
        "drafts",
        "plain tok/s",
        "tok/s",
        "speed-up",
        "accepted",
        "length",
        "plain ms",
        "ms",
        "equal",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        more = row.more
        drafts = f"{'up to ' if more['is_adaptive'] else ''}{more['num_speculative_tokens']}"
        table.add_row(
            more["task"],
            str(row.batch),
            drafts,
            format_number(more["plain_tok_s"].mean),
            format_number(row.tok_s.mean),
            f"{more['speedup'].median:.2f} x",
            "-" if more["acceptance"] is None else f"{more['acceptance']:.0%} of {more['draft_tokens']:,}",
            f"{more['mean_acceptance_length']:.2f}",
            format_number(more["plain_step_ms"].median),
            format_number(row.step_ms.median),
            f"{more['equal_tokens']:.0%}",
        )
    return Group(Text(make_title(rows[0].machine), style="bold"), table, Text(NOTE, style="dim"), *doubts(rows))
