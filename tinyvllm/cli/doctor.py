"""`tinyvllm doctor`: check that a model runs on this machine as it should."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from tinyvllm.cli.bench_flags import DEFAULT_WEIGHTS, print_table, refuse_weights, write_rows
from tinyvllm.cli.flags import EngineFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.config import EngineConfig
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from tinyvllm.bench.subject import Subject

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
    profiler: Annotated[
        bool,
        Option(
            "--profiler",
            help="Check the profiler instead: plant known delays, waits, copies and slow kernels, and show which are "
            "attributed correctly. Takes about a minute on a quiet machine, and several on a busy one.",
        ),
    ] = False,
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

    def find() -> Subject:
        return _find(model, shape, weights, pull=engine.pull)

    if profiler:
        _check_profiler(find(), config, engine, json_file)
    else:
        _check_machine(find, config, json_file)


def _find(model: str, shape: str | None, weights: str | None, *, pull: bool) -> Subject:
    from tinyvllm.bench.subject import Subject

    if shape is not None:
        return Subject.of_shape(shape, weights or DEFAULT_WEIGHTS)
    return Subject.of_files(require_model(model, pull=pull))


def _check_machine(find: Callable[[], Subject], config: EngineConfig, json_file: str | None) -> None:
    """Print each check with its remedy. Raises typer.Exit with code 1 if something does not work."""
    from tinyvllm.bench.doctor import as_json, examine

    with progress_bars() as report:
        checks = list(examine(find, config, report))
    table = Table(show_header=False, box=None)
    for check in checks:
        table.add_row(MARKS[check.status], check.name, check.value)
        if check.remedy:
            table.add_row("", "", f"[bold]{check.remedy}[/]")
    print_table(table)
    found = as_json(checks)
    write_rows(json_file, found)
    if json_file not in (None, "-"):
        out.print(f"written to {json_file}", highlight=False)
    if not found["ok"]:
        raise typer.Exit(1)


def _check_profiler(subject: Subject, config: EngineConfig, engine: EngineFlags, json_file: str | None) -> None:
    """Print what is blamed for each planted fault. Raises typer.Exit with code 1 if any is attributed wrongly."""
    from tinyvllm.bench.breakdown_measure import fit_config, longest_case
    from tinyvllm.bench.kernel_profile import find_hardware
    from tinyvllm.bench.profiler_check import WORK, WORK_OF_IDS, attribution_table, check_profiler
    from tinyvllm.execution.inspector import RunnerInspector
    from tinyvllm.text.tokenizer import load_tokenizer

    tokenizer = None if subject.files is None else load_tokenizer(subject.files)
    work = WORK_OF_IDS if tokenizer is None else WORK
    fitted = fit_config(dataclasses.asdict(config), work, longest_case(work, tokenizer), subject.model_config)
    with progress_bars() as report:
        runner = subject.load(fitted, report)
        try:
            inspector = RunnerInspector(runner)
            chip = find_hardware(inspector, None)
            machine = subject.describe(runner, chip.bandwidth_gbps, config.seed)
            found = check_profiler(inspector, tokenizer, machine, chip, report)
        finally:
            runner.close()
    print_table(attribution_table(found))
    write_rows(json_file, {"kind": "profiler check", "plants": [one.as_json() for one in found]})
    if not all(one.is_right for one in found):
        raise typer.Exit(1)
