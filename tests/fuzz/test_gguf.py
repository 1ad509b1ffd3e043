"""Damaged and lying GGUF files: each is loaded or refused with a ModelError, in time, and without much memory.

The default run has thirty cases, the sweep a few hundred. A long one, from any first seed (a fault's name is its
seed):

    TINYVLLM_FUZZ_CASES=1000000 TINYVLLM_FUZZ_FIRST=0 python -m pytest -m slow --timeout 0 tests/fuzz/test_gguf.py
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.builders import CHATML
from tests.fuzz.gguf_cases import base_images, make_case
from tests.fuzz.outcome import run_cases
from tinyvllm.config import ModelFiles
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.model_check import examine_files, fit
from tinyvllm.model.registry import complete_config
from tinyvllm.model.rope import inverse_frequencies
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config
from tinyvllm.storage.model_summary import summarize
from tinyvllm.text.chat import end_of_turn_ids, load_chat_template
from tinyvllm.text.grammar import Vocabulary
from tinyvllm.text.tokenizer import load_tokenizer

NUM_CASES = 300
TEXT = "Hello, wörld!\n  12345 \N{GRINNING FACE} <|im_end|>"


def load(path: Path) -> None:
    """What a start reads of a file, and what `tinyvllm models` and `--check` say of it, up to compiling kernels. Each
    part is tried, whatever the others say; raises the first refusal."""
    files = ModelFiles("gguf", path, path.stem)
    warnings.simplefilter("error")  # numbers that overflow, but for those of weights
    warnings.filterwarnings("ignore", module="tinyvllm.arrays")
    refusals = []
    for part in (load_weights, load_text, summarize, read_generation_defaults):
        try:
            part(files)
        except TinyvllmError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def load_weights(files: ModelFiles) -> None:
    report = examine_files(files, "CPU")
    fit(report, "CPU", 1 << 30)
    config = complete_config(read_model_config(files))
    for kind in config.layers:
        if kind.rope is not None:
            assert np.isfinite(inverse_frequencies(kind.rope, kind.head_dim, 128)).all(), kind.rope
    checkpoint = open_checkpoint(files, config)
    for tensor in checkpoint.tensors.values():
        tensor.read()


def load_text(files: ModelFiles) -> None:
    template = load_chat_template(files)
    if template is not None and template.source == CHATML:  # as in most cases: probing it takes half of their time
        template = None
    if template is not None:
        template.abilities(has_tools=True)
    tokenizer = load_tokenizer(files)
    Vocabulary(tokenizer, read_model_config(files).vocab_size, tokenizer.eos_ids)  # of grammars
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.decode(range(tokenizer.vocab_size))
    if template is not None:
        end_of_turn_ids(template, tokenizer)


def cases(folder: Path, first: int, count: int) -> Iterator[tuple[str, Path]]:
    for seed in range(first, first + count):
        parts = make_case(seed)
        names = [f"{seed}-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)]
        paths = [folder / (name if len(parts) > 1 else f"{seed}.gguf") for name in names]
        for path, content in zip(paths, parts, strict=True):
            path.write_bytes(content)
        yield str(seed), paths[seed % len(paths)]
        for path in paths:
            path.unlink()


def test_the_files_that_are_mutated_load(tmp_path: Path) -> None:
    for number, image in enumerate(base_images()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(image.to_bytes())
        load(path)


@pytest.mark.parametrize("num_cases", [30, pytest.param(NUM_CASES, marks=pytest.mark.sweep)])
def test_a_mutated_file_is_loaded_or_refused(tmp_path: Path, num_cases: int) -> None:
    counts = run_cases(load, cases(tmp_path, 0, num_cases))
    assert counts["ok"] > num_cases // 20, counts
    assert counts["refused"] > num_cases // 3, counts


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_mutated_files_are_loaded_or_refused(tmp_path: Path) -> None:
    first = int(os.environ.get("TINYVLLM_FUZZ_FIRST", NUM_CASES))
    print(run_cases(load, cases(tmp_path, first, int(os.environ.get("TINYVLLM_FUZZ_CASES", 20_000)))))
