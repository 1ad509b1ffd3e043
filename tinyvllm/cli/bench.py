"""`tinyvllm bench`: how fast a model runs here, by steps and under load."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from tinyvllm.cli.flags import RunnerFlags, spread
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import Progress, out, progress_bars
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tinyvllm.bench.rows import Row
    from tinyvllm.bench.subject import Subject
    from tinyvllm.execution.runner import ModelRunner

TABLE_WIDTH = 140  # columns

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure how fast a model runs on this machine.")


@dataclasses.dataclass(frozen=True)
class SubjectFlags:
    """Which model is measured, and where the figures go."""

    model: Annotated[
        str | None,
        Argument(
            metavar="[MODEL]",
            help=f"A model as `tinyvllm generate` takes it. [default: {DEFAULT_MODEL}, where there is no --shape]",
            show_default=False,
        ),
    ] = None
    shape: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Random weights of a model's shape, instead of MODEL: smollm2-135m, tinyllama-1.1b, llama-3.2-1b or "
            "llama-3.1-8b.",
        ),
    ] = None
    weights: Annotated[
        str, Option(metavar="KIND", help="With --shape: float32, float16, bfloat16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, ...")
    ] = "float16"
    layers: Annotated[
        int | None, Option(metavar="COUNT", help="With --shape: only the first layers, for a quick look.")
    ] = None
    json: Annotated[
        str | None, Option(metavar="FILE", help="Write the rows as JSON; -: as the last line of stdout.")
    ] = None
    markdown: Annotated[
        bool, Option("--markdown", help="Print a Markdown table with llama-bench's columns instead.")
    ] = False

    def find(self, *, pull: bool) -> Subject:
        """Raises ModelError for what is not here or cannot be run."""
        from tinyvllm.bench.subject import Subject

        if self.shape is None:
            if self.layers is not None:
                raise TinyvllmError("--layers cuts a --shape, not a model's files: give --shape NAME")
            return Subject.of_files(require_model(self.model or DEFAULT_MODEL, pull=pull))
        if self.model is not None:
            raise TinyvllmError(f"both a model ({self.model}) and --shape {self.shape} are given: give one of them")
        return Subject.of_shape(self.shape, self.weights, self.layers)

    def write(self, rows: Sequence[Row]) -> None:
        """Everything but the table for people."""
        from tinyvllm.bench.report import markdown_table

        if self.markdown:
            print(markdown_table(rows))
        if self.json is None:
            return
        text = json.dumps([row.as_json() for row in rows])
        if self.json == "-":
            print(text)  # stdout itself: rich would wrap
        else:
            Path(self.json).write_text(text + "\n", encoding="utf-8")


@bench.command()
@spread
def latency(
    *,
    prefill: Annotated[
        str,
        Option(metavar="LENGTHS", help="Prompt lengths, as 128,512; 16x1024: sixteen prompts at once; none: nothing."),
    ] = "128,512",
    batch: Annotated[str, Option(metavar="COUNTS", help="Sequences that decode at once; none: no decoding.")] = "1,8",
    context: Annotated[
        str, Option(metavar="LENGTHS", help="Tokens that each decoding sequence has behind it, for every batch.")
    ] = "128,1024",
    tokens: Annotated[int, Option(metavar="COUNT", help="Decode steps in a repeat.")] = 32,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of each case.")] = 5,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats before them.")] = 1,
    bandwidth: Annotated[
        float | None,
        Option(metavar="GBPS", help="The memory's speed in 1e9 bytes a second, for the floor. [default: measured]"),
    ] = None,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Time single steps: prefill by length, decode by batch and context, beside the floor that memory sets."""
    runner.apply()
    config = EngineConfig(model=subject.model or "", max_num_seqs=1, **runner.settings())

    from tinyvllm.bench.latency import Case, LatencyWork, fit_config, measure_latency
    from tinyvllm.bench.report import latency_table

    cases = [Case("prefill", *_parse_prompt(text)) for text in _split(prefill)]
    pairs = itertools.product(_parse_counts("batch", batch), _parse_counts("context", context))
    cases += [Case("decode", *pair) for pair in pairs]
    work = LatencyWork(tuple(cases), tokens, repeats, warmup, runner.seed)
    found = subject.find(pull=runner.pull)
    with _loaded(found, fit_config(config, work, found.model_config)) as (loaded, report):
        gbps = loaded.measure_bandwidth() / 1e9 if bandwidth is None else bandwidth
        rows = measure_latency(loaded, found.describe(loaded, gbps, runner.seed), work, report)
    if not subject.markdown:
        _print_table(latency_table(rows))
    subject.write(rows)


@bench.command()
@spread
def throughput(
    *,
    num_prompts: Annotated[int, Option(metavar="COUNT", help="Requests, all there at the start.")] = 32,
    input_len: Annotated[int, Option(metavar="TOKENS", help="Random tokens of each prompt.")] = 128,
    output_len: Annotated[int, Option(metavar="TOKENS", help="Tokens that each request generates.")] = 64,
    max_num_seqs: Annotated[int, Option(metavar="COUNT", help="Most sequences in one step.")] = 16,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of the whole.")] = 3,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats before them.")] = 1,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Time the engine under load, offline: scheduler and steps, without text and HTTP, the prefix cache off."""
    runner.apply()

    from tinyvllm.bench.report import throughput_table
    from tinyvllm.bench.throughput import ThroughputWork, measure_throughput

    work = ThroughputWork(num_prompts, input_len, output_len, repeats, warmup, runner.seed)
    config = EngineConfig(
        model=subject.model or "",
        max_num_seqs=max_num_seqs,
        max_model_len=work.max_model_len,
        **runner.settings(),
    )
    found = subject.find(pull=runner.pull)
    with _loaded(found, config) as (loaded, report):
        row = measure_throughput(loaded, found.describe(loaded, None, runner.seed), work, report)
    if not subject.markdown:
        _print_table(throughput_table(row))
    subject.write([row])


def _print_table(table: RenderableType) -> None:
    """In its own width, also where stdout is no terminal, whose 80 columns would cut figures short."""
    from rich.console import Console

    Console(width=max(out.width, TABLE_WIDTH), highlight=False).print(table, crop=False)


@contextlib.contextmanager
def _loaded(subject: Subject, config: EngineConfig) -> Iterator[tuple[ModelRunner, Progress]]:
    """A warm runner and where to report further stages, with bars on stderr."""
    with progress_bars() as report:
        runner = subject.load(config, report)
        try:
            yield runner, report
        finally:
            runner.close()


def _split(text: str) -> list[str]:
    """The parts of a list with commas; "none" has none."""
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _parse_counts(flag: str, text: str) -> list[int]:
    return [_parse_count(flag, part) for part in _split(text)]


def _parse_prompt(text: str) -> tuple[int, int]:
    """512 -> (1, 512), 16x1024 -> (16, 1024): how many prompts, and how long they are."""
    batch, times, length = text.rpartition("x")
    return (_parse_count("prefill", batch) if times else 1), _parse_count("prefill", length)


def _parse_count(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise TinyvllmError(f"--{flag} has {text!r}: give whole numbers with commas between, or none") from None
