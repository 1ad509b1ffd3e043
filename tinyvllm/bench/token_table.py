"""One request token by token: the time of each on the host and on the device, and its kernels, waits and copies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.table import Table

from tinyvllm.bench.breakdown import CaseResult
from tinyvllm.bench.stages import ENQUEUE, READ, SAMPLING, WAIT, StepTimes

DEVICE_PARTS = (ENQUEUE, WAIT, READ)
COUNTS = ("kernels", "graph_launches", "barriers", "syncs", "copies_h2d", "copies_d2h")
HEADINGS = {"graph_launches": "graphs", "copies_h2d": "to device", "copies_d2h": "to host"}


@dataclass(frozen=True)
class TokenRow:
    """A token of a request that runs alone, in ms: medians over repeats. The first one's steps are those of its prompt.
    `parts`: the stages of its steps. `counts`: of those steps together."""

    number: int  # from 1
    text: str
    steps: int
    total_ms: float
    device_ms: float
    sampling_ms: float  # the host's, and its share of `device_ms`
    parts: dict[str, float]
    counts: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return {
            "token": self.number,
            "text": self.text,
            "steps": self.steps,
            "total_ms": self.total_ms,
            "device_ms": self.device_ms,
            "sampling_ms": self.sampling_ms,
            "stages_ms": self.parts,
            **self.counts,
        }


def token_rows(result: CaseResult) -> list[TokenRow]:
    """A row for each token; [] unless the case's requests run alone."""
    if result.case.batch > 1:
        return []
    num_tokens = result.case.num_output
    rows = []
    for number in range(num_tokens):
        repeats = [_steps_of(one.steps, number, num_tokens) for one in result.rounds]
        parts = {name: 1e3 * statistics.median(_sum(steps, name) for steps in repeats) for name in _parts(repeats[0])}
        counted = _steps_of(result.step_counts, number, num_tokens)
        device_ms = sum(parts.get(name, 0.0) for name in DEVICE_PARTS)
        sampling_ms = parts.pop(SAMPLING, 0.0)  # the host's part
        share = result.sampling_shares.get(repeats[0][-1].kind, 0.0)
        rows.append(
            TokenRow(
                number=number + 1,
                text=result.token_texts[number] if number < len(result.token_texts) else "",
                steps=len(repeats[0]),
                total_ms=sum(parts.values()) + sampling_ms,
                device_ms=device_ms,
                sampling_ms=sampling_ms + share * device_ms,
                parts=parts,
                counts={name: sum(one[name] for one in counted) for name in COUNTS if counted and name in counted[0]},
            )
        )
    return rows


def token_table(rows: Sequence[TokenRow]) -> Table:
    """One line per token."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("token", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True)
    host = [name for name in rows[0].parts if name not in DEVICE_PARTS]
    counts = list(rows[0].counts)
    for column in ("ms", "device", "sampling", *host, *(HEADINGS.get(name, name) for name in counts)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times = [row.total_ms, row.device_ms, row.sampling_ms, *(row.parts.get(name, 0.0) for name in host)]
        table.add_row(
            str(row.number), repr(row.text), *(f"{ms:.3f}" for ms in times), *(str(row.counts[name]) for name in counts)
        )
    table.caption = "Medians over repeats, in ms. The first token's steps are those of its prompt."
    table.caption_justify = "left"
    return table


Step = TypeVar("Step")


def _steps_of(steps: Sequence[Step], number: int, num_tokens: int) -> Sequence[Step]:
    """The steps of a token: the last ones are of a token each, and those before are the prompt's."""
    num_prompt = len(steps) - num_tokens + 1
    return steps[:num_prompt] if number == 0 else steps[num_prompt + number - 1 : num_prompt + number]


def _parts(steps: Sequence[StepTimes]) -> list[str]:
    return list(dict.fromkeys(name for step in steps for name in step.parts))


def _sum(steps: Sequence[StepTimes], name: str) -> float:
    return sum(step.wall_s(name) for step in steps)
