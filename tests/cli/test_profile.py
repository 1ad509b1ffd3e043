"""`tinyvllm profile`: a table, JSON and a trace, from a run, from a log, or from a model's shape."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.builders import without_logits_processing
from tinyvllm.cli.commands import app
from tinyvllm.cli.models import require_model

DATA = Path(__file__).parents[1] / "profiling" / "data"


def run(*arguments: str, fails: bool = False, text: str | None = None) -> str:
    result = CliRunner().invoke(app, ["profile", *arguments], input=text)
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_a_shape_is_profiled_from_its_kernels_to_a_verdict(tmp_path: Path) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    with without_logits_processing():
        output = run(
            *("--shape", "smollm2-135m", "--layers", "1", "--weights", "Q4_0", "--context", "16", "--tokens", "2"),
            *("--warmup", "1", "--chip", "m4", "--json", str(figures), "--trace", str(trace), "--no-compile-cache"),
        )
    for words in ("gate up", "head", "the step as served", "floor", "verdict: "):
        assert words in output
    document = json.loads(figures.read_text(encoding="utf-8"))
    assert document["dispatches"] == sum(row["dispatches"] for row in document["by_kernel"]) > 8
    assert document["kernels"] == sum(row["launches"] for row in document["by_kernel"]) == document["counts"]["kernels"]
    for row in document["by_operation"]:
        assert row["dispatches"] * row["average_s"] == pytest.approx(row["total_s"])
    (layer,) = (row for row in document["by_layer"] if row["operations"])
    assert layer["label"] == "layer 0" and layer["total_s"] == pytest.approx(
        sum(r["total_s"] for r in layer["operations"])
    )
    assert {"qkv", "attention", "down"} <= {row["label"] for row in layer["operations"]}
    counts, limits = document["counts"], document["limits"]
    assert counts["graph_launches"] == 1 and all(counts[name] <= limit for name, limit in limits.items())
    assert "a step's counts: kernels " in output and "barriers " in output
    assert sum(row["total_s"] for row in document["by_layer"]) == pytest.approx(document["kernels_s"])
    assert document["roofline"]["chip"] == "m4" and document["verdict"][0]["because"]
    assert document["environment"]["command"] and document["timed"] == "in the step as served"
    names = {event["name"] for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}
    assert {"layer 0 · attention", "head", "step"} <= names


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.txt")))
def test_a_text_of_debug_2_is_tabled(name: str) -> None:
    *_, last = run("--from", str(DATA / name), "--json", "-").splitlines()
    document = json.loads(last)
    assert sum(row["share"] for row in document["by_operation"]) == pytest.approx(1)


def test_markdown_has_a_row_for_each_kernel() -> None:
    lines = run("--from", str(DATA / "cuda.txt"), "--last-steps", "1", "--by", "kernel", "--markdown").splitlines()
    assert lines[0].startswith("| name | dispatches |") and set(lines[1]) == set("| -:")
    assert any(line.startswith("| layer 1 · gate up | 1 |") for line in lines)
    assert "one of them" in run("--predict", "m4", "--from", "-", "--markdown", fails=True)
    assert "--markdown would have no effect" in run("--predict", "m4", "--markdown", fails=True)


def test_a_text_may_come_from_stdin() -> None:
    output = run(
        "--from", "-", "--last-steps", "1", "--by", "layer", text=(DATA / "cpu.txt").read_text(encoding="utf-8")
    )
    assert "layer 1" in output and "layers take" in output
    rows = [line.split()[0] for line in output.splitlines() if line[:5] in ("layer", "embed", "head ")]
    assert rows == ["layer", "embed", "layer", "layer", "head"], "in the order of a step, under the columns' names"
    lines = run("--from", str(DATA / "cpu.txt"), "--last-steps", "1", "--by", "layer", "--markdown").splitlines()
    assert "| qkv us |" in lines[0] and all(line.count("|") == lines[0].count("|") for line in lines)


def test_a_text_without_kernels_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("nothing\n")
    assert "DEBUG=2" in run("--from", str(path), fails=True)
    assert "cannot be read" in run("--from", str(tmp_path / "none.txt"), fails=True)


def test_a_prediction_lists_what_it_rests_on_and_how_far_it_is_off() -> None:
    output = run("--predict", "m4", "--shape", "tinyllama-1.1b", "--json", "-")
    document = json.loads(output.splitlines()[-1])
    assert "predicted, not measured" in output and len(document["assumptions"]) > 3
    assert {" on h200, " in check["what"] for check in document["checked"]} == {True, False}
    assert all(f"({check['error']:+.0%})" in output for check in document["checked"])
    assert 30 < document["tok_s"] < document["roof_tok_s"] < 60


@pytest.mark.parametrize("kind", ["Q4_K", "q4_k", "mlx-4bit-g64", "IQ4_NL"])
def test_every_format_of_random_weights_is_predicted(kind: str) -> None:
    output = run("--predict", "m4", "--shape", "tinyllama-1.1b", "--weights", kind, "--batch", "2", "--json", "-")
    document = json.loads(output.splitlines()[-1])
    assert document["dtype"].lower() == kind.lower()
    assert 0.55e9 < document["bytes"] < 0.68e9  # 1.03 billion weights of 4.5 bits, and some scales


@pytest.mark.sweep  # the pieces are tests/profiling/test_roofline.py's
def test_a_prompt_is_predicted_in_the_pieces_that_it_would_be_computed_in() -> None:
    flags = ("--predict", "m4", "--shape", "tinyllama-1.1b", "--prefill", "1024", "--json", "-")
    usual, whole = (
        json.loads(run(*flags, *more).splitlines()[-1]) for more in ((), ("--max-num-batched-tokens", "1024"))
    )
    assert usual["kernels"] == 2 * whole["kernels"] and usual["prefill"] == 1024
    assert 100 < usual["tok_s"] < whole["tok_s"] < whole["roof_tok_s"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--predict", "m9", "--shape", "smollm2-135m"), "known: m1"),
        (("--by", "color", "--from", "-"), "--by"),
        (("--predict", "m4", "--from", "-"), "one of them"),
        (("--last-steps", "1"), "--from FILE"),
        (("smollm2-135m-instruct", "--from", "-"), "MODEL smollm2-135m-instruct would have no effect"),
        (("--batch", "2", "--from", "-"), "--batch 2 would have no effect"),
        (("--dequantize", "--from", "-"), "--dequantize would have no effect"),
        (("--by", "layer", "--predict", "m4"), "--by layer would have no effect"),
        (("--trace", "x.json", "--predict", "m4"), "--trace x.json would have no effect"),
        (("--device", "CPU", "--predict", "m4"), "--device CPU would have no effect"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--batch", "100000000"), "at most 8192 sequences"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--context", "8192"), "takes at most 8192 tokens"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--prefill", "8193"), "takes at most 8192 tokens"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--batch", "0"), "--batch is 0: give at least 1"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--context", "-1"), "--context is -1: give at least 0"),
        (("--predict", "m4", "--shape", "smollm2-135m", "--prefill", "-5"), "--prefill is -5: give at least 1"),
        (
            ("--predict", "m4", "--shape", "smollm2-135m", "--prefill", "5", "--max-num-batched-tokens", "0"),
            "--max-num-batched-tokens is 0: give at least 1",
        ),
        (("--predict", "m4", "--shape", "smollm2-135m", "--weights", "Q4_X"), "Q4_K, Q5_K, Q6_K"),
        (("--chip", "z80", "--from", str(DATA / "cpu.txt")), "z80"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(arguments: tuple[str, ...], says: str) -> None:
    assert says in run(*arguments, fails=True)


def test_a_log_becomes_a_trace_of_kernels_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run("--from", str(DATA / "cuda.txt"), "--last-steps", "1", "--trace", str(path))
    events = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event["ph"] == "X"]
    assert events[0]["name"] == "embed" and events[-1]["name"] == "sample"
    for before, after in itertools.pairwise(events):
        assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=0.01)


def test_the_formats_of_a_file_are_read_and_not_guessed() -> None:
    """SmolLM2's Q4_1 has its embedding, which is its head, in Q8_0: by size alone it looked like Q5_1."""
    document = json.loads(run("--predict", "m4", "smollm2-135m-instruct", "--json", "-").splitlines()[-1])
    assert document["dtype"] == "Q4_1, embedding and head Q8_0"
    path = require_model("smollm2-135m-instruct", pull=False).path
    assert document["bytes"] - 30 * 128 * 2 * 192 * 2 == pytest.approx(path.stat().st_size, rel=0.025)
