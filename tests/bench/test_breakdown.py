"""Stages add up to the wall time, and a breakdown has every documented field."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.clocked import LOOK_NS, PACK_NS, STEP_NS, Clock, ClockedRunner, install
from tinyvllm.bench.breakdown import MAX_RESIDUAL_SHARE, BreakdownWork
from tinyvllm.bench.breakdown_measure import longest_case
from tinyvllm.bench.plots import draw_breakdown
from tinyvllm.bench.prompts import LENGTHS, make_ids, make_text
from tinyvllm.bench.stages import STAGES, WAIT, Case, Driver, PlainRound, RequestTimes
from tinyvllm.cli.commands import app
from tinyvllm.config import ModelFiles
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling.measure import PACK
from tinyvllm.profiling.request_stages import DECODE, PREFILL
from tinyvllm.text.tokenizer import load_tokenizer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(Clock(), monkeypatch)


def test_stages_sum_to_the_wall_time(clock: Clock) -> None:
    one = Driver(ClockedRunner(clock), None).run(Case(None, 100, 2, 5))
    in_steps = sum(took.wall_s for step in one.steps for took in step.parts.values())
    named_s = sum(took.wall_s for took in (*one.tokenize, *one.admission)) + in_steps
    assert named_s <= one.wall_s
    assert 1 - named_s / one.wall_s < MAX_RESIDUAL_SHARE


def test_times_lie_in_the_stage_that_took_them(clock: Clock) -> None:
    one = Driver(ClockedRunner(clock), None).run(Case(None, 100, 1, 5))
    assert [step.kind for step in one.steps] == [PREFILL] * 2 + [DECODE] * 4
    assert [step.num_tokens for step in one.steps] == [64, 36, 1, 1, 1, 1]
    for step in one.steps:
        assert step.wall_s(PACK) == pytest.approx(PACK_NS / 1e9, rel=0.05)
        assert step.parts[PACK].cpu_s == pytest.approx(PACK_NS / 1e9, rel=0.05)
        assert step.wall_s(WAIT) == pytest.approx(STEP_NS / 1e9, rel=0.01)  # none of it is left for the read
        assert step.parts[WAIT].cpu_s < 10 * LOOK_NS / 1e9  # the thread does not run meanwhile
        assert max(step.wall_s(part) for part in step.parts if part not in (PACK, WAIT)) < 100 * LOOK_NS / 1e9
    (request,) = one.requests
    assert request.num_prompt_tokens == 100 and len(request.token_s) == 5
    assert request.token_s[0] == pytest.approx(2 * (STEP_NS + PACK_NS) / 1e9, rel=0.05)


def test_plain_round_does_the_same_work() -> None:
    runner = ClockedRunner(Clock())
    driver = Driver(runner, None)
    driver.run(Case(None, 30, 3, 4))
    looked, runner.steps = runner.steps, []
    plain = driver.run_plain(Case(None, 30, 3, 4))
    assert [[entry[1:3] for entry in step] for step in runner.steps] == [[e[1:3] for e in step] for step in looked]
    assert [len(request.token_s) for request in plain.requests] == [4, 4, 4]


def test_tokens_before_the_last_prompt_was_read_are_not_decoding() -> None:
    one = PlainRound(9.0, [RequestTimes(4, 0.0, (1.0, 2.0, 5.0, 6.0)), RequestTimes(4, 0.0, (4.0, 5.0, 6.0, 9.0))])
    assert (one.first_token_s, one.num_decoded, one.num_decode_steps) == (4.0, 5, 3)


@pytest.mark.parametrize("is_on", [False, True])
def test_prefix_cache_is_off_unless_asked_for(is_on: bool) -> None:
    runner = ClockedRunner(Clock())
    driver = Driver(runner, None, prefix_caching=is_on)
    for _ in range(2):
        driver.run_plain(Case(None, 64, 1, 2))
    first_tokens = [step[0][1] for step in runner.steps]
    assert first_tokens == ([0, 64, 48, 64] if is_on else [0, 64, 0, 64])


def test_prompts_are_the_same_everywhere_and_differ_in_a_batch(tiny_hf_files: ModelFiles) -> None:
    assert make_ids(8, 1000, 0) == [864, 394, 776, 911, 430, 41, 265, 988]
    texts = [make_text("medium", number) for number in range(4)]
    assert len({text[:16] for text in texts}) == 4
    assert len(make_text("short")) < len(texts[0]) < len(make_text("long"))
    with pytest.raises(TinyvllmError, match=f"choose from {', '.join(LENGTHS)}"):
        make_text("huge")
    work = BreakdownWork((Case("short", 0, 2, 3), Case(None, 7, 1, 3)))
    assert longest_case(work, load_tokenizer(tiny_hf_files)) == 3 + max(len(make_text("short", n)) for n in range(2))


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(TinyvllmError, match="no tokenizer"):
        Driver(ClockedRunner(Clock()), None).run_plain(Case("short", 0, 1, 2))


# -- the command -----------------------------------------------------------------------------------------------------

QUICK = "--batch 1,2 --tokens 3 --repeats 1 --log-level warning --cpu-cores 1 --max-num-batched-tokens 16 --chip m4"


@pytest.fixture(scope="module")
def run(tiny_hf_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("breakdown")
    files = f"--json {folder / 'a.json'} --csv {folder / 'a.csv'} --plot {folder / 'a.html'}"
    arguments = f"bench breakdown --prompts short --context 16 --per-token {QUICK} {files} --model".split()
    yield CliRunner().invoke(app, [*arguments, str(tiny_hf_files.path)]), folder


@pytest.fixture(scope="module")
def figures(run: tuple[Any, Path]) -> dict[str, Any]:
    result, folder = run
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    return figures


def test_json_has_what_the_documentation_promises(figures: dict[str, Any]) -> None:
    assert list(figures["stages"]) == list(STAGES)
    names = {"count", "total_s", "share", "mean_s", "std_s", "min_s", "median_s", "p95_s", "p99_s"}
    for stage in figures["stages"].values():
        assert names <= set(stage)
    assert sum(s["share"] for s in figures["stages"].values()) + figures["residual_share"] == pytest.approx(1)
    assert sum(s["total_s"] for s in figures["stages"].values()) <= figures["wall_s"]
    for name in ("import_s", "load_s", "schedule_s", "compile_s", "capture_s", "warm_up_s", "total_s"):
        assert figures["cold_start"][name] >= 0
    assert all(len(bucket["calls_s"]) == 3 for bucket in figures["cold_start"]["buckets"])
    for name in (
        "kernels",
        "graph_launches",
        "syncs",
        "copies_h2d",
        "copies_d2h",
        "bytes",
        "kv_blocks",
        "device_bytes",
    ):
        assert isinstance(figures["per_step"][name], int)
    assert figures["per_step"]["bytes"] == figures["per_step"]["bytes_h2d"] + figures["per_step"]["bytes_d2h"]
    assert figures["environment"]["seed"] == 0 and figures["verdicts"] and figures["findings"] == []
    assert all(case["repeats"] == 1 and case["trust"]["grade"] in "CD" for case in figures["cases"])


def test_every_request_is_counted_in_its_stage(figures: dict[str, Any]) -> None:
    counts = {name: stage["count"] for name, stage in figures["stages"].items()}
    assert [case["name"] for case in figures["cases"]] == [
        "short text, batch 1",
        "16 ids, batch 1",
        "short text, batch 2",
        "16 ids, batch 2",
    ]
    assert (counts["tokenize"], counts["admission"]) == (1 + 2, 1 + 1 + 2 + 2)  # ids are tokens already
    assert counts["schedule"] == counts["pack"] == counts["prefill"] + counts["decode"] == counts["sampling"]


def test_tables_name_stages_kernels_and_verdict(run: tuple[Any, Path], figures: dict[str, Any]) -> None:
    text = run[0].stdout
    for word in (
        *STAGES,
        "residual",
        "Cold start",
        "tg3 @ d16",
        "verdict:",
        "roof of m4",
        "sampling: the share of its kernels",
    ):
        assert word in text, word
    main = next(case for case in figures["cases"] if case["name"] == figures["main_case"])
    for row in main["kernels"][:5]:
        assert row["label"] in text and row["share"] > 0
    assert "…" not in text  # nothing is truncated
    lines = text.splitlines()
    assert lines[1].startswith("the time goes to prefill ") and "of what m4 allows" in lines[2]
    assert lines[3].startswith(("verdict: ", "no verdict: "))  # on a busy machine figures disagree
    assert any(line.startswith("trust ") for line in lines[4:8])  # of a single repeat, after a verdict of some lines
    assert text.index("Stages, all cases") < text.index("Counts of a step") < text.index("Checks")
    assert "measuring 4 cases, 1 repeat each: about " in run[0].stderr and "left out" not in run[0].stderr


def test_tokens_and_memory_are_shown_block_by_block(run: tuple[Any, Path], figures: dict[str, Any]) -> None:
    assert [row["token"] for row in figures["tokens"]] == [1, 2, 3]
    for row in figures["tokens"]:
        assert row["total_ms"] == pytest.approx(row["sampling_ms"] + sum(row["stages_ms"].values()), rel=0.5)
        assert 0 < row["device_ms"] < row["total_ms"] and row["kernels"] > 0
    assert [row["syncs"] for row in figures["tokens"]] == [3, 1, 1], "of a prompt of 39 tokens, in three steps"
    blocks = {row["block"]: row for row in figures["memory"]}
    assert list(blocks)[:4] == ["import", "load", "capture 3 graphs", "warm-up calls"]
    assert "16 ids, batch 2, decode" in blocks and blocks["load"]["device_delta_bytes"] > 0
    if sys.platform.startswith("linux"):
        assert all(row["rss_peak_bytes"] >= row["rss_bytes"] > 0 for row in blocks.values())
    assert "Token by token" in run[0].stdout and "capture 3 graphs" in run[0].stdout


def test_csv_has_a_line_for_each_case_and_stage(run: tuple[Any, Path], figures: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO((run[1] / "a.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 5 * len(STAGES)
    assert {row["case"] for row in rows} == {"all", *(case["name"] for case in figures["cases"])}
    by_stage = {row["stage"]: float(row["total_s"]) for row in rows if row["case"] == "all"}
    assert by_stage == pytest.approx({name: stage["total_s"] for name, stage in figures["stages"].items()})


def test_a_page_has_the_plots_and_one_title(run: tuple[Any, Path], figures: dict[str, Any]) -> None:
    page = (run[1] / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1 and page.count("roof of m4") == 2
    title = f"{figures['model']}, {figures['dtype']}, on CPU"
    assert page.count(f"<h1>{title}</h1>") == 1 and page.count(f"<!-- {title} -->") == 0  # the picture has none


@pytest.mark.sweep  # the page above has one that scales
def test_a_picture_of_its_own_is_a_png_or_scales_and_has_the_title(
    run: tuple[Any, Path], figures: dict[str, Any]
) -> None:
    draw_breakdown(figures, str(run[1] / "b.png"))
    assert (run[1] / "b.png").read_bytes().startswith(b"\x89PNG")
    title = f"{figures['model']}, {figures['dtype']}, on CPU"
    draw_breakdown(figures, str(run[1] / "b.svg"))
    svg = (run[1] / "b.svg").read_text(encoding="utf-8")
    assert svg.count(f"<!-- {title} -->") == 1


def test_bars_and_points_say_their_numbers(run: tuple[Any, Path], figures: dict[str, Any]) -> None:
    page = (run[1] / "a.html").read_text(encoding="utf-8")
    for case in figures["cases"]:
        for name in STAGES:
            share = 100 * case["stages"][name]["share"]
            assert f"<title>{case['name']}\n{name}: {share:.3g}% of the wall time" in page
    for row in (row for row in figures["cases"][0]["kernels"] if row["flops"]):
        assert f"<title>{row['label']}: " in page
    assert "<title>16 ids\n2 requests at once\n" in page
    axis = page[page.rindex('<g id="axes_') : page.index("<!-- requests at once -->")]
    assert re.findall("<!-- (.*) -->", axis) == ["1", "2"]  # whole numbers of requests


def test_markdown_has_llama_benchs_columns(tiny_hf_files: ModelFiles) -> None:
    flags = f"bench breakdown --prompts short --context 16 --markdown {QUICK}"  # as above: its programs are kept
    result = CliRunner().invoke(app, [*flags.split(), str(tiny_hf_files.path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "| model | size | params | backend | test | t/s |"
    assert "| pp16 |" in result.stdout and "| tg3 @ d16 |" in result.stdout


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--prompts huge", "choose from short, medium, long"),
        ("--prompts none --context none", "nothing to measure"),
        ("--tokens 1", "--tokens is 1"),
        ("--plot out.pdf", "must end in one of .png, .svg, .html"),
        ("--baseline nowhere.json", "nowhere.json cannot be read"),
        ("--max-regress lots", "--max-regress is 'lots'"),
        ("--chip abacus", "abacus"),
        ("--model other", "both a model"),
    ],
)
def test_bad_flag_is_one_line(tiny_hf_files: ModelFiles, flags: str, text: str) -> None:
    result = CliRunner().invoke(app, ["bench", "breakdown", *QUICK.split(), *flags.split(), str(tiny_hf_files.path)])
    assert result.exit_code == 1 and text in result.stderr and "Traceback" not in result.stderr


def test_missing_matplotlib_is_said_before_anything_is_measured(
    tiny_hf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = f"bench breakdown --plot out.png {QUICK}"
    result = CliRunner().invoke(app, [*flags.split(), str(tiny_hf_files.path)])
    assert result.exit_code == 1 and 'pip install "tinyvllm[plot]"' in result.stderr
