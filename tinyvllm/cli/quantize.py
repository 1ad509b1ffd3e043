"""`tinyvllm quantize`: write a model in a smaller format, and measure what it loses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from tinyvllm.cli.flags import Model, RunnerFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.config import ModelFiles
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.bench.perplexity import Comparison
    from tinyvllm.convert.quantize import Outcome
    from tinyvllm.convert.targets import Target

EVAL_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class TargetFlags:
    """What to write, and where."""

    to: Annotated[
        str,
        Option(
            metavar="FORMAT",
            help="The format to write. GGUF: q4_k_m (llama.cpp's mix of Q4_K and Q6_K, the usual choice), q4_k_s, "
            "q5_k_m, q5_k_s, q4_k, q5_k, q6_k, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl; unquantized f16, bf16, f32. "
            "MLX: mlx-4, mlx-8, mlx-2, mlx-3, mlx-5, mlx-6 in groups of 64, or mlx-4-g32, mlx-4-g128. "
            "FP8: fp8 (a scale per row), fp8-block (per 128 x 128).",
        ),
    ] = "q4_k_m"
    out_path: Annotated[
        str | None,
        Option(
            "--out",
            metavar="PATH",
            help="The file (GGUF) or directory (MLX, FP8) to write. [default: beside the downloaded models, as "
            "MODEL-FORMAT, which the other commands find by that name]",
            show_default=False,
        ),
    ] = None
    force: Annotated[
        bool,
        Option(
            "--force",
            help="Replace what is at --out if it is a model of the same kind: a GGUF file, or a directory with "
            "config.json, *.safetensors and nothing but a model's files. The source is never replaced.",
        ),
    ] = False
    threads: Annotated[
        int | None,
        Option(metavar="NUMBER", help="Cores to quantize with. [default: all, at most 16]", show_default=False),
    ] = None


@dataclasses.dataclass(frozen=True)
class LossFlags:
    """Whether and how to measure what is lost."""

    evaluate: Annotated[
        bool, Option("--eval/--no-eval", help="Measure the perplexity of a bundled text before and after.")
    ] = True
    eval_tokens: Annotated[
        int, Option(metavar="TOKENS", help="Tokens of that text: more take longer, with a smaller standard error.")
    ] = EVAL_TOKENS
    json_line: Annotated[bool, Option("--json", help="Print the result as one JSON document.")] = False


def quantize(*, model: Model = DEFAULT_MODEL, target_flags: TargetFlags, loss: LossFlags, engine: RunnerFlags) -> None:
    """Write a model in a smaller format.

    Reads a directory in Hugging Face format (unquantized, MLX, or of another format that runs here) or a .gguf file,
    and writes what llama.cpp, mlx-lm, or transformers and vLLM read too. Start from unquantized weights if you have
    them: what an earlier quantization lost stays lost. Tensors are converted a few rows at a time, so a model may be
    larger than the memory (with --no-eval). The output has its name only when it is complete."""
    engine.apply()
    from tinyvllm.bench.perplexity import windows_of
    from tinyvllm.convert.quantize import default_threads
    from tinyvllm.convert.quantize import quantize as convert
    from tinyvllm.convert.targets import parse_target

    target = parse_target(target_flags.to)
    source = require_model(model, pull=engine.pull)
    windows = windows_of(source, loss.eval_tokens) if loss.evaluate else []
    path = _output_path(source, target, target_flags.out_path)
    with progress_bars(in_bytes=True) as report:
        outcome = convert(
            source,
            target,
            path,
            lambda done, total: report("quantize", done, total),
            force=target_flags.force,
            num_threads=target_flags.threads or default_threads(),
        )
    comparison = _compare(source, outcome.files, windows, engine) if loss.evaluate else None
    if loss.json_line:
        print(json.dumps(_as_json(outcome, target, comparison)))
    else:
        _print(outcome, comparison)


def _output_path(source: ModelFiles, target: Target, chosen: str | None) -> Path:
    from tinyvllm.storage.resolve import models_dir

    if chosen is not None:
        return Path(chosen).expanduser()
    return models_dir() / f"{source.name.rpartition('/')[2]}-{target.suffix}"


def _compare(
    source: ModelFiles, written: ModelFiles, windows: list[list[int]], engine: RunnerFlags
) -> Comparison | None:
    from tinyvllm.bench.perplexity import Comparison, losses

    with progress_bars() as report:
        found = [
            losses(str(files.path), windows, report, stage, **engine.settings())
            for stage, files in (("before", source), ("after", written))
        ]
    return Comparison(*found)


def _print(outcome: Outcome, comparison: Comparison | None) -> None:
    types = ", ".join(f"{count} {name}" for name, count in sorted(outcome.types.items()))
    out.print(
        f"{outcome.files.path}: {outcome.num_bytes / 1e9:.3f} GB, {outcome.bits_per_weight:.2f} bits per weight, in "
        f"{outcome.seconds:.0f} s ({types})",
        highlight=False,
        markup=False,
    )
    if comparison is None:
        return
    table = Table("TOKENS", "PERPLEXITY BEFORE", "AFTER", "DIFFERENCE", "STANDARD ERROR", box=None, pad_edge=False)
    before, after = comparison.perplexities
    table.add_row(
        str(comparison.num_tokens),
        f"{before:.3f}",
        f"{after:.3f}",
        f"{comparison.difference:+.3f}",
        f"{comparison.standard_error:.3f}",
    )
    out.print(table, soft_wrap=False)


def _as_json(outcome: Outcome, target: Target, comparison: Comparison | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": str(outcome.files.path),
        "format": target.name,
        "bytes": outcome.num_bytes,
        "weights": outcome.num_weights,
        "bits_per_weight": outcome.bits_per_weight,
        "seconds": outcome.seconds,
        "arrays_by_type": outcome.types,
    }
    if comparison is not None:
        before, after = comparison.perplexities
        found["perplexity"] = {
            "tokens": comparison.num_tokens,
            "before": before,
            "after": after,
            "difference": comparison.difference,
            "standard_error": comparison.standard_error,
        }
    return found
