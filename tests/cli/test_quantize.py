"""`tinyvllm quantize`: its flags, its answer, and the measured loss of a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.builders import without_logits_processing, write_tiny_hf_llama
from tinyvllm.bench import perplexity
from tinyvllm.bench.perplexity import Comparison, windows_of
from tinyvllm.cli.commands import app
from tinyvllm.storage.gguf_file import GGUFFile


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["quantize", *arguments], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def models_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TINYVLLM_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_a_model_is_written_and_its_loss_measured(tmp_path: Path, models_dir: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "tiny", hidden=64, ffn=128, max_position=1024)
    with without_logits_processing():
        flags = ("--eval-tokens", "600", "--json", "--device", "CPU", "--no-compile-cache")
        done = run(str(source.path), "--to", "q4_0", *flags)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    path = models_dir / "tiny-Q4_0.gguf"  # found by the name tiny-Q4_0
    assert document["path"] == str(path) and GGUFFile(path).tensors["blk.0.ffn_up.weight"].ggml_type == "Q4_0"
    loss = document["perplexity"]
    assert loss["tokens"] == 598  # of 600 in two windows, all but the first of each
    assert loss["after"] == pytest.approx(loss["before"] + loss["difference"])
    assert 100 < loss["before"] < 1000, "random weights: about as many as there are tokens"
    assert 0 < abs(loss["difference"]) < 5 * loss["standard_error"] + 10


def test_without_the_loss_one_line_is_printed(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "tiny", hidden=64)
    done = run(str(source.path), "--to", "mlx-4", "--out", str(tmp_path / "out"), "--no-eval")
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'out'}: 0.000 GB, ") and "bits per weight" in line and "U32" in line


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--to", "q9"), "--to is 'q9', which is not known; known: f32"),
        (("--eval-tokens", "1"), "--eval-tokens is 1: give 2 to "),
        (("--to", "mlx-4", "--out", "."), " is not a model directory (config.json and *.safetensors), and no other is"),
        (("--to", "mlx-4", "--out", ".", "--force"), " is not a model directory (config.json and *.safetensors)"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_written(
    tmp_path: Path, models_dir: Path, flags: tuple[str, ...], text: str
) -> None:
    source = write_tiny_hf_llama(tmp_path / "tiny", hidden=64)
    done = run(str(source.path), *flags)
    assert done.exit_code == 1 and text in done.stderr and "Traceback" not in done.stderr
    assert not models_dir.exists()


def test_the_text_is_scored_in_windows_that_begin_as_texts_do(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "tiny")
    settings = source.path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": True}))
    windows = windows_of(source, 1100)
    bos_id = windows[0][0]
    assert [len(window) for window in windows] == [512, 512, 79] and {window[0] for window in windows} == {bos_id}
    assert perplexity.TEXT.stat().st_size <= 60_000


def test_the_standard_error_is_that_of_the_difference() -> None:
    """Two models that differ by the same loss at every token differ for certain, however uneven the text is."""
    before = np.random.default_rng(1).gamma(2.0, 1.5, 4000)
    same = Comparison(before, before + 0.1)
    assert same.difference == pytest.approx(math.exp(before.mean()) * (math.exp(0.1) - 1))
    assert same.standard_error == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(2).normal(0, 0.5, 4000)
    noisy = Comparison(before, before + noise)
    assert noisy.standard_error == pytest.approx(noisy.perplexities[1] * 0.5 / math.sqrt(4000), rel=0.1)
