"""`tinyvllm bench diff` and `tinyvllm bench ledger`: what makes two runs differ, and where a step loses time."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from tinyvllm.cli.bench_flags import print_table, write_rows

JsonFile = Annotated[
    str | None, Option("--json", metavar="FILE", help="Write the result as JSON; -: as the last line of stdout.")
]


def diff(
    before: Annotated[
        str, Argument(metavar="BEFORE", help="JSON of `tinyvllm bench breakdown` or `tinyvllm profile`.")
    ],
    after: Annotated[str, Argument(metavar="AFTER", help="JSON of the same command.")],
    *,
    json_file: JsonFile = None,
) -> None:
    """Explain the difference between two runs as a waterfall, in ms for each stage or kernel.

    The runs may differ in anything: weights, device, commit, tuning, settings. What differs is listed first. Parts
    that differ by less than the confidence interval of their repeats are dim."""
    from tinyvllm.bench.diff import diff_table, explain
    from tinyvllm.bench.result_files import fields_of

    one, two = _read(before), _read(after)
    with fields_of(before, after):
        found = explain(one, two)
        print_table(diff_table(found))
    write_rows(json_file, found.as_json())


def ledger(
    profile: Annotated[str, Argument(metavar="PROFILE", help="JSON of `tinyvllm profile` of a decode step.")],
    *,
    after: Annotated[
        str | None,
        Option(metavar="FILE", help="A later profile of the same step: show how much of each loss is gone."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Split a step into its floor, each kernel's loss, gaps and the host's part, and rank what to optimize.

    "tok/s without it" is the speed if that loss alone were gone."""
    from tinyvllm.bench.ledger import check, ledger_table, make_ledger, promises_table
    from tinyvllm.bench.result_files import fields_of

    paths = [profile] if after is None else [profile, after]
    values = [_read(path) for path in paths]
    with fields_of(*paths):
        found, *later = map(make_ledger, values)
        if not later:
            print_table(ledger_table(found))
        else:
            print_table(promises_table(found, later[0], check(found, later[0])))
    write_rows(json_file, found.as_json())


def _read(path: str) -> Any:
    """The value in a benchmark's JSON file."""
    from tinyvllm.bench.result_files import read_result
    from tinyvllm.bench.runs import read_run

    read_run(path)  # its errors say what is wrong with the file
    return read_result(path)
