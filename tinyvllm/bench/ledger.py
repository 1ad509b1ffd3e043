"""A step as a ledger: the least time that its bytes and operations take, what each kernel loses against that, the time
between kernels, and the host's. The entries add up to the time of a step. Each loss has the tokens per second that the
step would reach without it, and a later profile shows how much of that was gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.runs import PROFILE, kind_of
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling.verdict import NO_VERDICT

FLOOR, TRAFFIC, GAPS, HOST = "floor", "bytes beyond the floor", "between kernels", "host"
REMEDIES = {
    TRAFFIC: "activations and copies between kernels: fuse kernels, so that they pass through memory less often",
    GAPS: "launching, waiting for the slowest core, dependencies: fewer kernels, or let them overlap",
    HOST: "packing inputs and reading tokens while no step runs: --async-scheduling, fewer copies",
}
NUM_NAMED = 3  # entries that the summary names


@dataclass(frozen=True)
class Entry:
    """One line. `seconds`: its part of a step. `is_loss`: false for the floor, which cannot be reduced. `tok_s`: tokens
    per second of a step without it. `dispatches`: of the kernel, if it is a kernel's loss."""

    name: str
    seconds: float
    is_loss: bool
    tok_s: float
    dispatches: int = 0
    roof_share: float | None = None


@dataclass(frozen=True)
class Ledger:
    """The entries of one step, the floor first, then losses from the largest. They sum to `step_s`."""

    subject: str
    batch: int
    step_s: float
    entries: tuple[Entry, ...]
    doubt: str = ""  # why the profile had no verdict; empty if it had one

    @property
    def tok_s(self) -> float:
        return self.batch / self.step_s

    @property
    def losses(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_loss]

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def as_json(self) -> dict[str, Any]:
        entries = [asdict(entry) for entry in self.entries]
        return {
            "kind": "ledger",
            "subject": self.subject,
            "step_s": self.step_s,
            "tok_s": self.tok_s,
            "entries": entries,
            "doubt": self.doubt,
        }


def make_ledger(profile: Any) -> Ledger:
    """From the JSON of `tinyvllm profile`, of a decode step. Raises TinyvllmError for anything else.

    Timing its kernels slows a step down, so their times and the gaps are scaled to the step as served."""
    if kind_of(profile) != PROFILE or profile["phase"] != "decode":
        raise TinyvllmError("a ledger needs the profile of a decode step: tinyvllm profile MODEL --batch 1 --json FILE")
    batch, turn_s, served_s = profile["batch"], profile["turn_s"], profile["step_s"]
    turn_s = max(turn_s, served_s)  # two medians: the host's part is at least nothing
    kernels_s = sum(row["total_s"] for row in profile["by_operation"])
    between_s = max(0.0, profile["profiled_s"] - kernels_s) if profile["timed"] == "in the step as served" else 0.0
    scale = served_s / (kernels_s + between_s)
    if not between_s:  # launched one by one: their sum may be less than the step
        scale = min(1.0, scale)
    kernels = [_kernel(row, scale) for row in profile["by_operation"]]
    ideal_s = sum(ideal for ideal, _ in kernels)
    floor_s = min(profile["roofline"]["floor_s"], ideal_s)
    entries = [entry for _, entry in kernels]
    entries.append(Entry(TRAFFIC, ideal_s - floor_s, True, 0.0))
    entries.append(Entry(GAPS, max(0.0, served_s - scale * kernels_s), True, 0.0))
    entries.append(Entry(HOST, turn_s - served_s, True, 0.0))
    losses = sorted((entry for entry in entries if entry.seconds > 0), key=lambda entry: -entry.seconds)
    floor_s += turn_s - floor_s - sum(entry.seconds for entry in losses)  # what rounding left
    return Ledger(
        subject=f"{profile['model']} ({profile['dtype']}) on {profile['hardware']}, {profile['bucket']}",
        batch=batch,
        step_s=turn_s,
        entries=(
            Entry(FLOOR, floor_s, False, batch / floor_s),
            *(_with_rate(entry, batch / (turn_s - entry.seconds)) for entry in losses),
        ),
        doubt=next((one["because"] for one in profile.get("verdict", ()) if one["name"] == NO_VERDICT), ""),
    )


def _kernel(row: Mapping[str, Any], scale: float) -> tuple[float, Entry]:
    """(the time that its bytes and operations take at the roof, the entry of its loss)."""
    total_s, share = row["total_s"] * scale, row["roof_share"]
    ideal_s = min(total_s, row["total_s"] * (share or 0.0))  # an unknown roof: all of it could be lost
    return ideal_s, Entry(row["label"], total_s - ideal_s, True, 0.0, row["dispatches"], share)


def _with_rate(entry: Entry, tok_s: float) -> Entry:
    return Entry(entry.name, entry.seconds, entry.is_loss, tok_s, entry.dispatches, entry.roof_share)


@dataclass(frozen=True)
class Promise:
    """The most that removing a loss could have gained, and what a later profile of the same step found."""

    name: str
    promised_tok_s: float  # without any of the loss
    before_s: float
    after_s: float

    @property
    def share(self) -> float:
        """The share of the loss that is gone."""
        return 1 - self.after_s / self.before_s


def check(before: Ledger, after: Ledger) -> list[Promise]:
    """How much of each earlier loss is gone. Raises TinyvllmError if the ledgers are of different steps."""
    if (before.subject, before.batch) != (after.subject, after.batch):
        raise TinyvllmError(f"the ledgers are of different steps: {before.subject}, and {after.subject}")
    found = {entry.name: entry.seconds for entry in after.losses}
    return [Promise(one.name, one.tok_s, one.seconds, found.get(one.name, 0.0)) for one in before.losses]


# -- tables ----------------------------------------------------------------------------------------------------------


def ledger_table(ledger: Ledger) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("entry", no_wrap=True)
    for column in ("ms", "share", "of roof", "dispatches", "tok/s without it", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in ledger.entries:
        gain = entry.tok_s / ledger.tok_s - 1
        table.add_row(
            entry.name,
            f"{entry.seconds * 1e3:,.3f}",
            f"{entry.seconds / ledger.step_s:.1%}",
            "-" if entry.roof_share is None else f"{entry.roof_share:.0%}",
            str(entry.dispatches or "-"),
            f"{entry.tok_s:,.1f}" if entry.is_loss else f"({entry.tok_s:,.1f} at the floor)",
            f"+{gain:.1%}" if entry.is_loss else "",
        )
    table.add_row(
        "a step", f"{ledger.step_s * 1e3:,.3f}", "100.0%", "", "", f"{ledger.tok_s:,.1f} now", "", style="bold"
    )
    lines = [Text(f"{place}. {advice(entry)}") for place, entry in enumerate(ledger.losses[:NUM_NAMED], 1)]
    doubts = [_doubt_text(ledger)] if ledger.doubt else []
    return Group(Text(ledger.subject, style="bold"), table, *doubts, Text("optimize first:"), *lines)


def _doubt_text(ledger: Ledger) -> Text:
    return Text(f"WARNING: the figures of this profile disagree, so its losses may be others: {ledger.doubt}", "yellow")


def advice(entry: Entry) -> str:
    """The time that an entry costs, and where to look."""
    cost = f"{entry.name}: {entry.seconds * 1e3:,.3f} ms"
    if entry.name in REMEDIES:
        return f"{cost}; {REMEDIES[entry.name]}"
    reached = "its roof is not known" if entry.roof_share is None else f"it reaches {entry.roof_share:.0%} of the roof"
    each = f", {entry.seconds * 1e6 / entry.dispatches:,.1f} us lost in each of {entry.dispatches}"
    return f"{cost}; {reached}{each if entry.dispatches else ''}: tinyvllm tune, or another kernel"


def promises_table(before: Ledger, after: Ledger, promises: Sequence[Promise]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("loss", no_wrap=True)
    for column in ("before ms", "after ms", "gone", "tok/s without it"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in promises:
        values = (f"{one.before_s * 1e3:,.3f}", f"{one.after_s * 1e3:,.3f}", f"{one.share:+.0%}")
        table.add_row(one.name, *values, f"{one.promised_tok_s:,.1f}")
    rate = f"{before.tok_s:,.1f} tok/s before, {after.tok_s:,.1f} after ({after.tok_s / before.tok_s - 1:+.1%})"
    doubts = [_doubt_text(ledger) for ledger in (before, after) if ledger.doubt]
    return Group(Text(after.subject, style="bold"), table, *doubts, Text(rate))
