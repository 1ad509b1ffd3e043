"""`tinyvllm bench breakdown` and `tinyvllm bench compare`: where the time goes, and whether it was less before."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from tinyvllm.cli.bench_flags import SubjectFlags, parse_counts, print_table, split_list, write_file
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.terminal import err, out, progress_bars
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.bench.breakdown import Breakdown, BreakdownWork
    from tinyvllm.bench.subject import Subject
    from tinyvllm.profiling.chips import Chip
    from tinyvllm.text.tokenizer import Tokenizer

MaxRegress = Annotated[
    str,
    Option(metavar="SHARE", help="Slower by more than this, and by more than chance, is a regression: 5% or 0.05."),
]
CountsOnly = Annotated[
    bool,
    Option("--counts-only", help="Compare kernels, waits, copies and bytes alone: for machines that do other work."),
]


def breakdown(
    *,
    named: Annotated[str | None, Option("--model", metavar="MODEL", help="The same as MODEL.")] = None,
    prompts: Annotated[
        str | None,
        Option(
            metavar="LENGTHS", help="Prompts of real text: short, medium, long; none. [default: all, with a tokenizer]"
        ),
    ] = None,
    context: Annotated[
        str, Option(metavar="LENGTHS", help="Prompts of so many random ids, from which decoding goes on; none.")
    ] = "512",
    batch: Annotated[str, Option(metavar="COUNTS", help="Requests that are there at once, for every prompt.")] = "1,4",
    tokens: Annotated[int, Option(metavar="COUNT", help="Tokens that each request generates.")] = 32,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of each case.")] = 3,
    warmup: Annotated[int, Option(metavar="COUNT", help="Calls of each bucket before them, 3 at least.")] = 3,
    temperature: Annotated[float, Option(metavar="NUMBER", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, Option(metavar="SHARE", help="Sample from the likeliest tokens of this probability.")
    ] = 1.0,
    top_k: Annotated[int, Option(metavar="COUNT", help="Sample from this many of the likeliest tokens; 0: all.")] = 0,
    prefix_caching: Annotated[
        bool, Option("--prefix-caching", help="Let repeats find the prompts of those before, which flatters them.")
    ] = False,
    chip: Annotated[
        str | None, Option(metavar="NAME", help="Whose roofline counts. [default: by the device's name, else measured]")
    ] = None,
    csv: Annotated[str | None, Option(metavar="FILE", help="Write the stages of all cases as CSV.")] = None,
    plot: Annotated[
        str | None, Option(metavar="FILE", help="Draw stages, roofline and latency against batch: .html, .svg or .png.")
    ] = None,
    baseline: Annotated[
        str | None, Option(metavar="FILE", help="A breakdown's JSON to compare with; worse than it: exit code 1.")
    ] = None,
    max_regress: MaxRegress = "5%",
    counts_only: CountsOnly = False,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Say where an engine's time goes: stages that sum to the wall time, a step's counts, a start's parts, kernels."""
    from tinyvllm.bench.cold_start import import_engine, process_age

    process_s = process_age()
    runner.apply()
    import_s = import_engine()  # first of all: what it takes is part of a cold start

    from tinyvllm.bench.breakdown import BreakdownWork, breakdown_json
    from tinyvllm.bench.breakdown_report import breakdown_csv
    from tinyvllm.bench.compare import parse_share, read_breakdown
    from tinyvllm.bench.plots import check_plot, draw_breakdown
    from tinyvllm.bench.stages import Case
    from tinyvllm.config import SamplingParams
    from tinyvllm.profiling.chips import find_chip

    limit, earlier = parse_share(max_regress), None if baseline is None else read_breakdown(baseline)
    if plot is not None:
        check_plot(plot)
    roof = None if chip is None else find_chip(chip)
    found, tokenizer = _find(subject, named, pull=runner.pull)
    texts = ("short,medium,long" if tokenizer else "none") if prompts is None else prompts
    shapes: list[tuple[str | None, int]] = [(text, 0) for text in split_list(texts)]
    shapes += [(None, length) for length in parse_counts("context", context)]
    work = BreakdownWork(
        tuple(Case(*shape, count, tokens) for count in parse_counts("batch", batch) for shape in shapes),
        num_repeats=repeats,
        num_warmup=warmup,
        seed=runner.seed,
        prefix_caching=prefix_caching,
        params=SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, ignore_eos=True),
    )
    result = _measure(found, tokenizer, work, runner, roof, process_s, import_s)
    figures = breakdown_json(result)
    _show(result, subject)
    subject.write_json(figures)
    if csv is not None:
        write_file(csv, breakdown_csv(result))
    if plot is not None:
        draw_breakdown(figures, plot)
    if earlier is not None:
        _judge(earlier, figures, limit, counts_only=counts_only)


def compare(
    *,
    before: Annotated[str, Argument(metavar="BEFORE", help="JSON of a breakdown.")],
    after: Annotated[str, Argument(metavar="AFTER", help="JSON of a later one, of the same cases.")],
    max_regress: MaxRegress = "5%",
    counts_only: CountsOnly = False,
) -> None:
    """Print two breakdowns side by side; exit code 1 where the later is slower beyond its spread, or any count rose."""
    from tinyvllm.bench.compare import parse_share, read_breakdown

    _judge(read_breakdown(before), read_breakdown(after), parse_share(max_regress), counts_only=counts_only)


def _find(subject: SubjectFlags, named: str | None, *, pull: bool) -> tuple[Subject, Tokenizer | None]:
    """What is measured, and its tokenizer, which random weights have none of."""
    from tinyvllm.text.tokenizer import load_tokenizer

    if named is not None:
        if subject.model is not None:
            raise TinyvllmError(f"both a model ({subject.model}) and --model {named} are given: give one of them")
        subject = dataclasses.replace(subject, model=named)
    found = subject.find(pull=pull)
    return found, None if found.files is None else load_tokenizer(found.files)


def _measure(
    found: Subject,
    tokenizer: Tokenizer | None,
    work: BreakdownWork,
    runner: RunnerFlags,
    chip: Chip | None,
    process_s: float | None,
    import_s: float,
) -> Breakdown:
    from tinyvllm.bench.breakdown import fit_config, longest_case, measure_breakdown
    from tinyvllm.bench.cold_start import start_engine
    from tinyvllm.bench.kernels import find_hardware

    longest = longest_case(work, tokenizer)
    config = fit_config({"model": found.name, **runner.settings()}, work, longest, found.model_config)
    with progress_bars() as report:
        loaded, cold_start = start_engine(found, config, report, process_s, import_s, work.num_warmup)
        try:
            roof = find_hardware(loaded, chip)
            machine = found.describe(loaded, roof.bandwidth_gbps, work.seed)
            return measure_breakdown(loaded, tokenizer, machine, work, cold_start, roof, report)
        finally:
            loaded.close()


def _show(result: Breakdown, subject: SubjectFlags) -> None:
    from tinyvllm.bench.breakdown import bench_rows
    from tinyvllm.bench.breakdown_report import breakdown_tables, stage_summary
    from tinyvllm.bench.report import markdown_table

    if subject.markdown:
        print(markdown_table(bench_rows(result)))
        err.print(stage_summary(result), highlight=False)
    else:
        print_table(breakdown_tables(result))


def _judge(before: dict[str, object], after: dict[str, object], limit: float, *, counts_only: bool) -> None:
    """Print both side by side. Raises typer.Exit with code 1 for a regression."""
    from tinyvllm.bench.compare import compare as compare_runs
    from tinyvllm.bench.compare import comparison_table, regressions

    changes = compare_runs(before, after, limit, counts_only=counts_only)
    print_table(comparison_table(before, after, changes))
    worse = regressions(changes)
    if not worse:
        out.print("no regression")
        return
    for line in worse:
        err.print(f"regression: {line}", style="red", highlight=False)
    raise typer.Exit(1)
