"""`tinyvllm bench kv-quality`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from tinyvllm.cli.bench_flags import print_table, split_list, write_rows
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL


@dataclasses.dataclass(frozen=True)
class QualityFlags:
    """What is scored, and with which formats."""

    model: Annotated[str, Argument(metavar="MODEL", help="A model, as for `tinyvllm generate`.")] = DEFAULT_MODEL
    formats: Annotated[
        str,
        Option(metavar="NAMES", help="Formats to compare with float16; KEYS/VALUES: of keys and of values apart."),
    ] = "fp8,q8_0,q8_0/q4_0,q4_0"
    tokens: Annotated[
        int, Option(metavar="COUNT", help="Tokens of the text: more take longer, with a smaller standard error.")
    ] = 10_000
    window: Annotated[
        int, Option(metavar="TOKENS", help="Tokens that are scored with nothing before them: the longest context.")
    ] = 1024
    text: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="A text to score. Repeatable. [default: a bundled one]", show_default=False),
    ] = None
    json: Annotated[
        str | None, Option(metavar="FILE", help="Write the rows as JSON; -: as the last line of stdout.")
    ] = None


def kv_quality(*, flags: QualityFlags, engine: RunnerFlags) -> None:
    """Measure how much the format of the KV cache changes a model.

    A text's tokens are scored with keys and values in float16, and in each of the formats: how often the same token is
    the most likely one, and how much the log-probabilities of the text change."""
    engine.apply()
    from tinyvllm.bench.kv_quality import measure_quality, parse_formats, quality_table
    from tinyvllm.bench.perplexity import TEXT, windows_of

    formats = parse_formats(split_list(flags.formats))
    if flags.window < 2:
        raise TinyvllmError(
            f"--window is {flags.window}: give at least 2 tokens, of which all but the first are scored"
        )
    missing = [str(path) for path in flags.text or () if not path.is_file()]
    if missing:
        raise TinyvllmError(f"--text {missing[0]} is not a file")
    files = require_model(flags.model, pull=engine.pull)
    windows = windows_of(files, flags.tokens, window=flags.window, texts=flags.text or (TEXT,), flag="--tokens")
    with progress_bars() as report:
        rows = measure_quality(str(files.path), windows, formats, report, **engine.settings())
    print_table(quality_table(rows))
    write_rows(flags.json, [row.as_json() | {"model": files.name} for row in rows])
