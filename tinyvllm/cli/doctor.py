"""`tinyvllm doctor`: check that a model runs on this machine as it should."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from tinyvllm.cli.bench_flags import DEFAULT_WEIGHTS, print_table, refuse_weights, write_file
from tinyvllm.cli.flags import EngineFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.storage.catalog import DEFAULT_MODEL

MARKS = {"ok": "[green]ok[/]", "odd": "[yellow]look[/]", "bad": "[red]bad[/]"}


def doctor(
    model: Annotated[str, Argument(metavar="MODEL", help="A model, as for `tinyvllm generate`.")] = DEFAULT_MODEL,
    *,
    shape: Annotated[
        str | None,
        Option(metavar="NAME", help="Random weights in the shape of a known model instead, as in `tinyvllm bench`."),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            metavar="KIND",
            help=f"With --shape, their format: float16, Q4_0, Q4_K, ... [default: {DEFAULT_WEIGHTS}]",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        Option(
            "--json", metavar="FILE", help="Write the checks as JSON, for a bug report; -: as the last line of stdout."
        ),
    ] = None,
    engine: EngineFlags,
) -> None:
    """Check this machine, and say how to fix what is wrong.

    Looks at the device, its memory, the compiler, versions, tuning and every program's limits, and generates 20
    tokens. Give the flags that you serve with. Exits with code 1 if something does not work."""
    engine.apply()
    if shape is None:
        refuse_weights(weights)
    config = engine.make_config(model)

    from tinyvllm.bench.doctor import as_json, examine
    from tinyvllm.bench.subject import Subject

    def find() -> Subject:
        if shape is not None:
            return Subject.of_shape(shape, weights or DEFAULT_WEIGHTS)
        return Subject.of_files(require_model(model, pull=engine.pull))

    with progress_bars() as report:
        checks = list(examine(find, config, report))
    table = Table(show_header=False, box=None)
    for check in checks:
        table.add_row(MARKS[check.status], check.name, check.value)
        if check.remedy:
            table.add_row("", "", f"[bold]{check.remedy}[/]")
    print_table(table)
    found = as_json(checks)
    if json_file == "-":
        print(json.dumps(found))
    elif json_file is not None:
        write_file(json_file, json.dumps(found, indent=1) + "\n")
        out.print(f"written to {json_file}", highlight=False)
    if not found["ok"]:
        raise typer.Exit(1)
