"""A step's ledger: it adds up, ranks losses by what removing them gains, and is checked by a later profile."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tinyvllm.bench.ledger import FLOOR, GAPS, HOST, TRAFFIC, check, ledger_table, make_ledger, promises_table
from tinyvllm.errors import TinyvllmError

MS = 1e-3


def row(label: str, total_ms: float, roof_share: float | None, dispatches: int = 2) -> dict[str, Any]:
    return {"label": label, "total_s": total_ms * MS, "roof_share": roof_share, "dispatches": dispatches}


def make_profile(**changes: Any) -> dict[str, Any]:
    """Kernels of 8 ms, 2 ms between them, a step of 10 ms as served, and 1 ms of the host's."""
    return {
        "model": "tiny",
        "dtype": "float16",
        "device": "CPU",
        "hardware": "CPU",
        "phase": "decode",
        "batch": 4,
        "context": 64,
        "bucket": "decode 4",
        "timed": "in the step as served",
        "step_s": 10 * MS,
        "profiled_s": 10 * MS,
        "turn_s": 11 * MS,
        "kernels": 4,
        "moved_bytes": 10,
        "by_operation": [row("head", 6, 0.5), row("qkv", 2, 0.75)],
        "roofline": {"floor_s": 4 * MS},
    } | changes


def entries(profile: dict[str, Any]) -> dict[str, float]:
    return {entry.name: entry.seconds / MS for entry in make_ledger(profile).entries}


def test_entries_add_up_to_the_step() -> None:
    assert entries(make_profile()) == pytest.approx({FLOOR: 4, "head": 3, GAPS: 2, HOST: 1, TRAFFIC: 0.5, "qkv": 0.5})
    ledger = make_ledger(make_profile())
    assert ledger.tok_s == pytest.approx(4 / (11 * MS))
    assert ledger.find("head").tok_s == pytest.approx(4 / (8 * MS))  # type: ignore[union-attr]
    assert [entry.name for entry in ledger.losses][:3] == ["head", GAPS, HOST]


@pytest.mark.parametrize(
    "changes",
    [
        {"profiled_s": 14 * MS},  # timing slowed the step: 8 of 14 ms were kernels
        {"turn_s": 9 * MS},  # medians of different repeats: less than the step
        {"roofline": {"floor_s": 9 * MS}},  # weights that came from a cache
        {"by_operation": [row("head", 6, None), row("qkv", 2, 1.4)]},
        {"timed": "one by one", "by_operation": [row("head", 60, 0.5)]},  # slower alone than in the step
        {"timed": "one by one", "by_operation": [row("head", 6, 0.5)]},
    ],
    ids=str,
)
def test_entries_add_up_even_if_medians_disagree(changes: dict[str, Any]) -> None:
    profile = make_profile(**changes)
    found = entries(profile)
    assert sum(found.values()) == pytest.approx(max(profile["turn_s"], profile["step_s"]) / MS)
    assert min(found.values()) >= 0 and found[FLOOR] > 0


def test_a_prompt_and_other_files_are_refused() -> None:
    for wrong in (make_profile(phase="prefill"), [{"phase": "decode", "tok_s": 1}], {}):
        with pytest.raises(TinyvllmError, match="tinyvllm profile MODEL --batch 1 --json FILE"):
            make_ledger(wrong)


def test_a_later_profile_says_how_much_of_each_loss_is_gone() -> None:
    later = make_profile(
        by_operation=[row("head", 4, 0.75), row("qkv", 2, 0.75)], step_s=8 * MS, profiled_s=8 * MS, turn_s=9 * MS
    )
    before, after = make_ledger(make_profile()), make_ledger(later)
    found = {one.name: one for one in check(before, after)}
    assert found["head"].share == pytest.approx(2 / 3)
    assert found[GAPS].share == pytest.approx(0, abs=1e-9) and found["qkv"].share == pytest.approx(0, abs=1e-9)
    assert found["head"].promised_tok_s == pytest.approx(4 / (8 * MS))
    with pytest.raises(TinyvllmError, match="different steps"):
        check(before, make_ledger(make_profile(batch=1)))


def shown(*tables: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_tables_name_what_to_optimize_first() -> None:
    before = make_ledger(make_profile())
    text = shown(ledger_table(before), promises_table(before, before, check(before, before)))
    assert "1. head: 3.000 ms; it reaches 50% of the roof, 1,500.0 us lost in each of 2" in text
    assert "2. between kernels: 2.000 ms; launching" in text and "363.6 now" in text
    assert "363.6 tok/s before, 363.6 after (+0.0%)" in text


def test_a_profile_without_a_verdict_is_doubted() -> None:
    because = "the step as served 39.000 ms, with its kernels timed 67.800 ms (+74%)"
    doubted = make_ledger(make_profile(verdict=[{"name": "no verdict", "because": because}]))
    sure = make_ledger(make_profile(verdict=[{"name": "host-bound", "because": "it is"}]))
    assert doubted.as_json()["doubt"] == because and not sure.doubt
    for table in (ledger_table(doubted), promises_table(sure, doubted, check(sure, doubted))):
        assert because in shown(table)
    assert "WARNING" not in shown(ledger_table(sure))
