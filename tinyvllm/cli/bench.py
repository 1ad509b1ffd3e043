"""`tinyvllm bench`: how fast a model runs here, by steps and under load."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from typer import Option

from tinyvllm.cli.bench_breakdown import breakdown, compare
from tinyvllm.cli.bench_flags import SubjectFlags, loaded, parse_counts, parse_prompt, print_table, split_list
from tinyvllm.cli.bench_serve import serve
from tinyvllm.cli.bench_start import cold_start
from tinyvllm.cli.flags import RunnerFlags, spread
from tinyvllm.config import EngineConfig

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure how fast a model runs on this machine.")


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

    cases = [Case("prefill", *parse_prompt(text)) for text in split_list(prefill)]
    pairs = itertools.product(parse_counts("batch", batch), parse_counts("context", context))
    cases += [Case("decode", *pair) for pair in pairs]
    work = LatencyWork(tuple(cases), tokens, repeats, warmup, runner.seed)
    found = subject.find(pull=runner.pull)
    with loaded(found, fit_config(config, work, found.model_config)) as (model_runner, report):
        gbps = model_runner.measure_bandwidth() / 1e9 if bandwidth is None else bandwidth
        rows = measure_latency(model_runner, found.describe(model_runner, gbps, runner.seed), work, report)
    if not subject.markdown:
        print_table(latency_table(rows))
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
    with loaded(found, config) as (model_runner, report):
        row = measure_throughput(model_runner, found.describe(model_runner, None, runner.seed), work, report)
    if not subject.markdown:
        print_table(throughput_table(row))
    subject.write([row])


for command in (breakdown, cold_start, compare, serve):
    bench.command()(spread(command))
