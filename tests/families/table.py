"""Print the table of docs/MODELS.md: each tiny family from each source, on one device, against transformers.

    python -m tests.families.table --device CPU
    python -m tests.families.table --device METAL --jobs 2     # simulated where there is none; a few minutes each
    python -m tests.families.table --device CUDA --dtype float16 --jobs 15

A cell is the largest difference of a log-probability from the oracle's over the 64 tokens that it continues a prompt
with, scored by us, and in float32 the number of these tokens that our greedy decoding gives. The oracle of Hugging
Face's and GGUF's files is transformers in float32 (data/*.json). That of MLX's, in 8 bits by groups of 32, is the same
engine with the dequantized weights, because transformers cannot read them; data/mlx.json has mlx-lm's own tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = ("hf", "gguf", "mlx")
BITS, GROUP = 8, 32


@dataclass(frozen=True)
class Job:
    """One cell."""

    family: str
    source: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Cell:
    """What a run found: None if the source cannot say the model. `error`: what it ended with."""

    difference: float | None = None
    num_equal: int | None = None
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return self.error
        if self.difference is None:
            return "–"
        return f"{self.difference:.0e}" + ("" if self.num_equal is None else f", {self.num_equal}")


def run(job: Job) -> tuple[Job, Cell]:
    """In a process of its own: the device is chosen before tinygrad is imported."""
    os.environ["DEV"] = job.device
    if job.device == "METAL":
        import tests.metal.plugin  # noqa: F401 - makes METAL a device, simulated where there is none
    try:
        with tempfile.TemporaryDirectory() as folder:
            return job, measure(job, Path(folder))
    except Exception as error:
        return job, Cell(error=f"{type(error).__name__}: {error}"[:200])


def measure(job: Job, folder: Path) -> Cell:
    from tests.families.recipe import write_gguf, write_hf
    from tests.families.recipes import RECIPES
    from tests.families.test_tiny import read_cases

    recipe, case = RECIPES[job.family], read_cases(job.family)[-1]
    if job.source == "gguf":
        if recipe.gguf_arch is None:
            return Cell()
        return compare(job, write_gguf(folder / "tiny.gguf", recipe).path, case)
    if job.source == "hf":
        return compare(job, write_hf(folder / "tiny", recipe).path, case)
    dense = write_hf(folder / "dense", recipe, transform=for_matrices(recipe, dequantized))
    case = case | {"given": case["tokens"], "top": score(job, dense.path, case), "tokens": None}
    return compare(job, write_mlx(folder / "mlx", recipe), case)


def write_mlx(path: Path, recipe: Any) -> Path:
    """As mlx_lm.convert has it, every matrix of whole groups quantized."""
    from tests.families.mlx import write_settings
    from tests.families.recipe import write_hf

    write_hf(path, recipe, transform=for_matrices(recipe, quantized))
    write_settings(path, {"group_size": GROUP, "bits": BITS})
    return path


Transform = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def for_matrices(recipe: Any, change: Callable[[str, np.ndarray], dict[str, np.ndarray]]) -> Transform:
    """Of the recipe's tensors as mlx-lm stores them, with `change` for the matrices of whole groups, stacked or not."""
    from tests.families.recipe import mlx_weights

    def transform(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for name, weight in mlx_weights(recipe).items():
            is_whole = weight.ndim > 1 and weight.shape[-1] % GROUP == 0 and name.endswith(".weight")
            tensors |= change(name, weight) if is_whole else {name: weight}
        return tensors

    return transform


def quantized(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    from tests.families.mlx import quantize_affine

    module = name.removesuffix(".weight")
    return {f"{module}.{end}": part for end, part in quantize_affine(weight, GROUP, BITS).items()}


def dequantized(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    from tests.families.mlx import quantize_affine

    parts = quantize_affine(weight, GROUP, BITS)
    codes = parts["weight"].view(np.uint8).reshape(*weight.shape[:-1], -1, GROUP).astype(np.float32)
    values = codes * parts["scales"][..., None] + parts["biases"][..., None]
    return {name: values.reshape(weight.shape).astype(np.float32)}


def compare(job: Job, path: Path, case: dict[str, Any]) -> Cell:
    """The largest difference of the tokens' logprobs, and the number of tokens that greedy decoding gives."""
    expected = case["top"]
    if case["tokens"] is not None:
        expected = [dict(top)[token] for token, top in zip(case["tokens"], case["top"], strict=True)]
    found, tokens = generate(job, path, case, is_greedy=job.dtype == "float32" and case["tokens"] is not None)
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if not tokens:
        return Cell(difference)
    pairs = list(zip(tokens, case["tokens"], strict=True))
    return Cell(difference, next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))


def score(job: Job, path: Path, case: dict[str, Any]) -> list[float]:
    return generate(job, path, case, is_greedy=False)[0]


def generate(job: Job, path: Path, case: dict[str, Any], *, is_greedy: bool) -> tuple[list[float], list[int]]:
    """(logprobs of the oracle's tokens after the prompt, our greedy tokens if wanted)."""
    from tests.families.test_tiny import ENGINE
    from tinyvllm import LLM, SamplingParams
    from tinyvllm.storage.resolve import resolve_model
    from tinyvllm.text.tokenizer import load_tokenizer

    tokens = case["tokens"] or case["given"]
    own = {"max_num_seqs": 1, "decode_buckets": (1,), "dtype": job.dtype}
    own |= {"kv_cache_dtype": "float32" if job.dtype == "float32" else "float16"}
    prompt = load_tokenizer(resolve_model(str(path))).encode(case["prompt"])
    llm = LLM(str(path), **ENGINE | own)
    try:
        scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": prompt + tokens}], scoring)
        assert output.prompt_logprobs is not None
        rows = output.prompt_logprobs[len(prompt) :]
        found = [row[token].logprob for row, token in zip(rows, tokens, strict=True) if row is not None]
        if not is_greedy:
            return found, []
        greedy = SamplingParams(temperature=0.0, max_tokens=len(tokens), ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy)
        return found, list(output.outputs[0].token_ids)
    finally:
        llm.close()


def main() -> None:
    from tests.families.recipes import RECIPES

    parser = argparse.ArgumentParser(description="Each tiny family from each source, against transformers.")
    parser.add_argument("--device", default="CPU", help="CPU, CUDA or METAL")
    parser.add_argument("--dtype", default="float32", help="of activations: float32, float16 or bfloat16")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--sources", default=",".join(SOURCES), help="hf, gguf, mlx, separated by commas")
    parser.add_argument("--json", type=Path, help="write the cells to this file, too")
    parser.add_argument("families", nargs="*", help="names of recipes; default: all")
    options = parser.parse_args()
    names = options.families or list(RECIPES)
    sources = options.sources.split(",")
    jobs = [Job(name, source, options.device, options.dtype) for name in names for source in sources]
    cells: dict[tuple[str, str], Cell] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for job, cell in pool.imap_unordered(run, jobs):
            cells[job.family, job.source] = cell
            print(f"{job.family} {job.source}: {cell}", flush=True)
    print(f"\n| family | {' | '.join(sources)} |\n|---|{'---|' * len(sources)}")
    for name in names:
        print(f"| {name} | {' | '.join(str(cells[name, source]) for source in sources)} |")
    if options.json:
        written = {f"{name} {source}": vars(cell) for (name, source), cell in cells.items()}
        options.json.write_text(
            json.dumps({"device": options.device, "dtype": options.dtype, "cells": written}, indent=1)
        )


if __name__ == "__main__":
    main()
