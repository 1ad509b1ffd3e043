"""What the commands of `tinyvllm bench` share: the model, where figures go, and lists of numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tinyvllm.bench.shapes import SHAPES
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import Progress, out, progress_bars
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tinyvllm.bench.rows import Row
    from tinyvllm.bench.subject import Subject
    from tinyvllm.execution.runner import ModelRunner

DEFAULT_WEIGHTS = "float16"  # of --shape
MIN_TABLE_WIDTH, MAX_TABLE_WIDTH = 168, 1000  # columns


@dataclasses.dataclass(frozen=True)
class SubjectFlags:
    """Which model to measure, and where the figures go."""

    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help=f"A model, as for `tinyvllm generate`. [default: {DEFAULT_MODEL}, unless --shape is given]",
            show_default=False,
        ),
    ] = None
    shape: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"Random weights in the shape of a known model, instead of MODEL: {', '.join(SHAPES)}.",
        ),
    ] = None
    weights: Annotated[
        str | None,
        Option(
            metavar="KIND",
            help="With --shape, their format: float16, bfloat16, Q4_0, Q4_K, mlx-4bit-g64, fp8-block128, mxfp4, ...; "
            "bfloat16+mxfp4: mxfp4 of experts, and bfloat16 of the rest. "
            f"[default: {DEFAULT_WEIGHTS}]",
            show_default=False,
        ),
    ] = None
    layers: Annotated[
        int | None, Option(metavar="COUNT", help="With --shape: use only the first layers, for a quick look.")
    ] = None
    json: Annotated[
        str | None, Option(metavar="FILE", help="Write the rows as JSON; -: as the last line of stdout.")
    ] = None
    markdown: Annotated[
        bool, Option("--markdown", help="Print a Markdown table with llama-bench's columns instead.")
    ] = False

    def find(self, *, pull: bool) -> Subject:
        """The model's files or its shape. Raises ModelError if they are missing or cannot be run."""
        from tinyvllm.bench.subject import Subject

        if self.shape is None:
            if self.layers is not None:
                raise TinyvllmError("--layers cuts a --shape, not a model's files: give --shape NAME")
            refuse_weights(self.weights)
            return Subject.of_files(require_model(self.model or DEFAULT_MODEL, pull=pull))
        if self.model is not None:
            raise TinyvllmError(f"got both a model ({self.model}) and --shape {self.shape}: give one of them")
        return Subject.of_shape(self.shape, self.weights or DEFAULT_WEIGHTS, self.layers)

    def num_layers(self, *, pull: bool) -> int:
        """The layers of what `find` gives, without the engine's imports."""
        if self.shape is not None:
            from tinyvllm.bench.shapes import find_shape

            return self.layers or find_shape(self.shape).num_layers
        from tinyvllm.storage.model_config import read_model_config

        return read_model_config(require_model(self.model or DEFAULT_MODEL, pull=pull)).num_layers

    def write(self, rows: Sequence[Row]) -> None:
        """Write the rows as Markdown and JSON where asked for; the table is printed elsewhere."""
        from tinyvllm.bench.tables import markdown_table

        if self.markdown:
            print(markdown_table(rows))
        self.write_json([row.as_json() for row in rows])

    def write_json(self, value: Any) -> None:
        """Write to the file of --json, or as the last line of stdout."""
        write_rows(self.json, value)


def write_rows(path: str | None, value: Any) -> None:
    """Write JSON to a file; "-": as the last line of stdout; None: nowhere. Raises TinyvllmError if it cannot be."""
    if path is None:
        return
    text = json.dumps(value)
    if path == "-":
        print(text)  # not through rich, which would wrap the line
    else:
        write_file(path, text + "\n")


def refuse_weights(kind: str | None) -> None:
    """Raise TinyvllmError if --weights was given for a model's files, whose formats are fixed."""
    if kind is not None:
        raise TinyvllmError(f"--weights {kind} is the format of a --shape, not of a model's files: give --shape NAME")


def print_table(table: RenderableType) -> None:
    """Print tables at their full width: in a narrower terminal rich would truncate cells ("requests..."), while the
    terminal only breaks the lines. Text between tables is wrapped to the terminal's width."""
    from rich.console import Console, Group
    from rich.text import Text

    if isinstance(table, Group):
        for part in table.renderables:
            print_table(part)
        return
    width = max(out.width, MIN_TABLE_WIDTH, _table_width(table))
    if isinstance(table, Text) and out.is_terminal:
        width = out.width
    Console(width=width, highlight=False).print(table, crop=False)


def _table_width(part: RenderableType) -> int:
    """Columns of a table; 0 of anything else."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    if not isinstance(part, Table):
        return 0  # text is wrapped
    console = Console(width=MAX_TABLE_WIDTH)
    return Measurement.get(console, console.options, part).maximum


@contextlib.contextmanager
def loaded(subject: Subject, config: EngineConfig) -> Iterator[tuple[ModelRunner, Progress]]:
    """A warm runner, and a function that reports further stages as progress bars on stderr."""
    with progress_bars() as report:
        runner = subject.load(config, report)
        try:
            yield runner, report
        finally:
            runner.close()


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list; "none" is an empty list."""
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def write_file(path: str, text: str) -> None:
    """Raises TinyvllmError if the file cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be written: {error.strerror}") from error


def parse_counts(flag: str, text: str) -> list[int]:
    """1,8 -> [1, 8]; none -> []. Raises TinyvllmError."""
    return [parse_count(flag, part) for part in split_list(text)]


def parse_prompt(text: str) -> tuple[int, int]:
    """512 -> (1, 512), 16x1024 -> (16, 1024): the number of prompts and their length. Raises TinyvllmError."""
    batch, times, length = text.rpartition("x")
    return (parse_count("prefill", batch) if times else 1), parse_count("prefill", length)


def parse_count(flag: str, text: str) -> int:
    """Raises TinyvllmError unless the text is a whole number."""
    try:
        return int(text)
    except ValueError:
        raise TinyvllmError(f"--{flag} has {text!r}: give whole numbers separated by commas, or none") from None
