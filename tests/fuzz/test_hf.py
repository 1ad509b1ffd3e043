"""Damaged and lying directories in Hugging Face's format: each is loaded or refused with a ModelError, in time, and
without much memory.

The default run has thirty cases, the sweep a few hundred. A long one, from any first seed (a fault's name is its
seed):

    TINYVLLM_FUZZ_CASES=1000000 TINYVLLM_FUZZ_FIRST=0 python -m pytest -m slow --timeout 0 tests/fuzz/test_hf.py
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.hf_cases import base_images, make_case
from tests.fuzz.hf_image import write_image
from tests.fuzz.outcome import Runner, run_cases
from tinyvllm.arrays import to_float32
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.execution.model_check import examine_files, fit
from tinyvllm.model.registry import complete_config
from tinyvllm.model.rope import rope_table
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config
from tinyvllm.storage.model_summary import summarize
from tinyvllm.text.chat import end_of_turn_ids, load_chat_template
from tinyvllm.text.tokenizer import load_tokenizer

NUM_CASES = 300
TEXT = "Hello, wörld!\n  12345 \N{GRINNING FACE} <|im_end|>"


def load(path: Path) -> None:
    """What a start reads of a directory, and what `tinyvllm models` and `--check` say of it, up to compiling kernels.
    Each part is tried, whatever the others say; raises the first refusal."""
    files = ModelFiles("hf", path, path.name)
    refusals = []
    for part in (load_weights, load_text, summarize, read_generation_defaults):
        try:
            part(files)
        except ModelError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def load_weights(files: ModelFiles) -> None:
    report = examine_files(files, "CPU")
    fit(report, "CPU", 1 << 30)
    config = complete_config(read_model_config(files))
    for rope in (config.rope, config.local_rope or config.rope):
        assert np.isfinite(rope_table(rope, config.head_dim, 100, config.query_scaling)).all(), rope
    checkpoint = open_checkpoint(files, config)
    for tensor in checkpoint.tensors.values():
        to_float32(tensor.read())


def load_text(files: ModelFiles) -> None:
    template = load_chat_template(files)
    if template is not None:
        template.abilities(has_tools=True)
    tokenizer = load_tokenizer(files)
    with contextlib.suppress(RequestError):  # the library fails on this text
        tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.decode(range(min(tokenizer.vocab_size, 1000)))
    if template is not None:
        end_of_turn_ids(template, tokenizer)


def cases(folder: Path, first: int, count: int) -> Iterator[tuple[str, Path]]:
    for seed in range(first, first + count):
        path = folder / str(seed)
        write_image(path, make_case(seed))
        yield str(seed), path
        shutil.rmtree(path)


def test_the_directories_that_are_mutated_load(tmp_path: Path) -> None:
    with Runner(load) as runner:
        for number, image in enumerate(base_images()):
            write_image(tmp_path / str(number), image)
            outcome = runner.run(tmp_path / str(number))
            assert outcome.kind == "ok", f"{number}: {outcome}"


@pytest.mark.parametrize("num_cases", [30, pytest.param(NUM_CASES, marks=pytest.mark.sweep)])
def test_a_mutated_directory_is_loaded_or_refused(tmp_path: Path, num_cases: int) -> None:
    counts = run_cases(load, cases(tmp_path, 0, num_cases))
    assert counts["ok"] > num_cases // 20, counts
    assert counts["refused"] > num_cases // 3, counts


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_mutated_directories_are_loaded_or_refused(tmp_path: Path) -> None:
    first = int(os.environ.get("TINYVLLM_FUZZ_FIRST", NUM_CASES))
    print(run_cases(load, cases(tmp_path, first, int(os.environ.get("TINYVLLM_FUZZ_CASES", 20_000)))))


def test_cases_that_failed_are_refused(tmp_path: Path) -> None:
    """201120: a single number where rows of several modules are meant."""
    write_image(tmp_path / "201120", make_case(201120))
    with pytest.raises(ModelError):
        load(tmp_path / "201120")
