"""`tinyvllm bench across` and `bench contexts`: formats, devices and engines side by side; attention by context."""

from __future__ import annotations

import itertools
from typing import Annotated

from typer import Argument, Option

from tinyvllm.cli.bench_flags import SubjectFlags, loaded, parse_counts, print_table, split_list, write_rows
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.terminal import err
from tinyvllm.config import EngineConfig


def across(
    *,
    runs: Annotated[
        list[str] | None,
        Argument(metavar="[RUN]...", help="Models to measure, or files of rows that a benchmark's --json wrote."),
    ] = None,
    shape: Annotated[str | None, Option(metavar="NAME", help="Random weights in the shape of a known model.")] = None,
    weights: Annotated[
        str,
        Option(
            metavar="KINDS",
            help="With --shape: its formats, such as float16,Q8_0,Q4_0. [default: float16]",
            show_default=False,
        ),
    ] = "none",
    device: Annotated[
        str,
        Option(
            metavar="DEVICES",
            help="tinygrad's devices, such as CPU,CL. [default: METAL on a Mac, else CUDA if present, else CPU]",
            show_default=False,
        ),
    ] = "none",
    prefill: Annotated[str, Option(metavar="LENGTHS", help="Prompt lengths; none: skip.")] = "128",
    batch: Annotated[str, Option(metavar="COUNTS", help="Sequences that decode together; none: skip.")] = "1",
    context: Annotated[str, Option(metavar="LENGTHS", help="Tokens in each sequence when decoding starts.")] = "128",
    tokens: Annotated[int, Option(metavar="COUNT", help="Decode steps per repeat.")] = 32,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of each case.")] = 3,
    json: Annotated[
        str | None, Option(metavar="FILE", help="Write all rows as JSON; -: as the last line of stdout.")
    ] = None,
) -> None:
    """Compare quantizations, devices and engines in one table.

    Measures each model, or each format of a shape, on each device with `bench latency`, one after another. Files of
    earlier runs may be added, also those of scripts/bench_llama_cpp.py and scripts/bench_mlx.py:

    tinyvllm bench across --shape smollm2-135m --weights float16,Q8_0,Q4_0 --device CPU,CL

    tinyvllm bench across ours.json llama.json mlx.json"""
    from tinyvllm.bench.across import across_table, combinations, measure_across, read_rows
    from tinyvllm.bench.result_files import fields_of

    named = runs or []
    groups = [read_rows(run) for run in named if run.endswith(".json")]
    models = [run for run in named if not run.endswith(".json")]
    if models or shape or not groups:
        flags = f"--prefill {prefill} --batch {batch} --context {context} --tokens {tokens} --repeats {repeats}".split()
        wanted = combinations(models, shape, split_list(weights), split_list(device))
        groups += measure_across(wanted, flags, lambda text: err.print(text, highlight=False))
    with fields_of(*(run for run in named if run.endswith(".json"))):
        print_table(across_table(groups))
    write_rows(json, [row for rows in groups for row in rows])


def contexts(
    *,
    context: Annotated[str, Option(metavar="LENGTHS", help="Tokens in each sequence.")] = "128,512,1024,2048,4096",
    batch: Annotated[str, Option(metavar="COUNTS", help="Sequences that decode together.")] = "1",
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of each step; medians are reported.")] = 5,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats first.")] = 2,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Show how a decode step grows with the context, and attention's share of it.

    Contexts beyond the model's limit are left out."""
    runner.apply()
    config = EngineConfig(model=subject.model or "", max_num_seqs=1, **runner.settings())

    from tinyvllm.bench.contexts import contexts_table, measure_contexts
    from tinyvllm.bench.latency import Case, LatencyWork, fit_config
    from tinyvllm.execution.inspector import RunnerInspector

    found = subject.find(pull=runner.pull)
    longest = found.model_config.max_position - 2
    pairs = itertools.product(parse_counts("batch", batch), parse_counts("context", context))
    cases = tuple(Case("decode", count, length) for count, length in pairs if length <= longest)
    work = LatencyWork(cases, num_decoded=1, num_repeats=repeats, num_warmup=warmup, seed=runner.seed)
    with loaded(found, fit_config(config, work, found.model_config)) as (model_runner, report):
        rows = measure_contexts(RunnerInspector(model_runner), work, report)
        machine = found.describe(model_runner, None, runner.seed)
    print_table(contexts_table(machine, rows))
    shared = {"model": machine.model, "dtype": machine.dtype, "params": machine.num_params, "device": machine.device}
    more = {"settings": machine.settings, "environment": machine.environment}
    subject.write_json([row.as_json() | shared | more for row in rows])
