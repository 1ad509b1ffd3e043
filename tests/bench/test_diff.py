"""Two runs that may differ in anything, explained part by part."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from tests.bench.test_ledger import MS, make_profile, row
from tinyvllm.bench.diff import REST, diff_table, explain, headline
from tinyvllm.errors import TinyvllmError


def spread(mean: float, std: float = 0.0, count: int = 1) -> dict[str, Any]:
    return {"mean": mean, "std": std, "count": count}


def stage(mean_s: float, std_s: float, count: int) -> dict[str, Any]:
    return {"mean_s": mean_s, "std_s": std_s, "count": count, "median_s": mean_s}


def make_breakdown(**changes: Any) -> dict[str, Any]:
    """Three rounds of ten tokens: 10 ms a token, of which decode takes 8, packing 1, and no stage 1."""
    case = {
        "name": "short",
        "output_tokens": 10,
        "prompt_tokens": 5,
        "wall_s": spread(0.1, 0.001, 3),
        "stages": {"decode": stage(8 * MS, 0.1 * MS, 30), "pack": stage(1 * MS, 0.01 * MS, 30), "idle": stage(0, 0, 0)},
        "kernels": [{"label": "head", "total_s": 5 * MS, "dispatches": 1}],
        "per_step": {},
    }
    environment = {"commit": "a", "date": "2026"}
    found = {"kind": "breakdown", "model": "tiny", "dtype": "float16", "device": "CPU", "cases": [case]}
    return found | {"environment": environment, "settings": {}} | changes


def test_parts_sum_to_the_whole_and_the_part_that_grew_is_named() -> None:
    before, after = make_breakdown(), copy.deepcopy(make_breakdown(dtype="Q4_K"))
    case = after["cases"][0]
    case["wall_s"]["mean"], case["stages"]["pack"]["mean_s"], case["kernels"][0]["total_s"] = 0.15, 6 * MS, 5.01 * MS
    (waterfall,) = (found := explain(before, after)).waterfalls
    assert found.differences == (("dtype", "float16", "Q4_K"),)
    assert waterfall.whole.before == pytest.approx(10) and waterfall.whole.after == pytest.approx(15)
    changes = {part.name: part.change for part in waterfall.parts if not part.is_within}
    assert changes == pytest.approx({"decode": 0, "pack": 5, REST: 0})
    assert sum(changes.values()) == pytest.approx(waterfall.whole.change)
    assert waterfall.main is not None and waterfall.main.name == "pack"
    assert headline(waterfall) == "short: 10.000 to 15.000 ms, +5.000 ms (+50.0%); pack makes +5.000 ms of it"


def test_a_difference_within_the_noise_is_called_that() -> None:
    after = make_breakdown()
    after["cases"][0]["wall_s"]["mean"] = 0.1005
    (waterfall,) = explain(make_breakdown(), after).waterfalls
    assert waterfall.whole.is_noise and "within the noise of the repeats" in headline(waterfall)


def test_profiles_are_explained_by_kernel() -> None:
    later = make_profile(
        dtype="Q8_0", by_operation=[row("head", 3, 0.9), row("qkv", 2, 0.75)], step_s=7 * MS, profiled_s=7 * MS,
        turn_s=8 * MS,
    )  # fmt: skip
    (waterfall,) = explain(make_profile(), later).waterfalls
    changes = {part.name: part.change for part in waterfall.parts}
    assert changes == pytest.approx({"head": -3, "qkv": 0, "between kernels": 0, "host": 0}, abs=1e-9)
    assert waterfall.whole.change == pytest.approx(-3)


def test_what_cannot_be_explained_is_refused() -> None:
    other = make_breakdown()
    other["cases"][0]["name"] = "long"
    with pytest.raises(TinyvllmError, match="no case in common"):
        explain(make_breakdown(), other)
    with pytest.raises(TinyvllmError, match="give two files of `tinyvllm bench breakdown --json`, or two"):
        explain(make_breakdown(), make_profile())
    with pytest.raises(TinyvllmError, match="both files hold the same run"):
        explain(make_breakdown(), make_breakdown())
    with pytest.raises(TinyvllmError, match="different steps"):
        explain(make_profile(), make_profile(context=9))


def test_the_table_shows_every_part_and_what_differs() -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    after = make_breakdown(device="CUDA")
    after["cases"][0]["wall_s"]["mean"] = 0.05
    after["cases"][0]["stages"]["decode"]["mean_s"] = 3 * MS
    console.print(diff_table(found := explain(make_breakdown(), after)))
    text = console.export_text()
    assert "differs: device, CPU before, CUDA after" in text
    assert all(name in text for name in ("decode", "  head", "pack", REST, "time per token"))
    assert found.as_json()["cases"][0]["whole"]["after"] == pytest.approx(5)
