"""`tinyvllm bench`: how fast a model runs on this machine, step by step and under load."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from tinyvllm.cli.bench_across import across, contexts
from tinyvllm.cli.bench_breakdown import breakdown, compare
from tinyvllm.cli.bench_explain import diff, ledger
from tinyvllm.cli.bench_flags import SubjectFlags, loaded, parse_counts, parse_prompt, print_table, split_list
from tinyvllm.cli.bench_kv import kv_quality
from tinyvllm.cli.bench_serve import serve
from tinyvllm.cli.bench_speculation import speculation
from tinyvllm.cli.bench_start import cold_start
from tinyvllm.cli.examples import summary
from tinyvllm.cli.flags import RunnerFlags, spread
from tinyvllm.config import CAPTURES, EngineConfig
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.bench.latency import Case, LatencyWork
    from tinyvllm.bench.rows import Row
    from tinyvllm.bench.subject import Subject


def latency(
    *,
    prefill: Annotated[
        str,
        Option(
            metavar="LENGTHS", help="Prompt lengths, such as 128,512; 16x1024: sixteen prompts at once; none: skip."
        ),
    ] = "128,512",
    batch: Annotated[
        str, Option(metavar="COUNTS", help="Sequences that decode together, such as 1,8; none: skip.")
    ] = "1,8",
    context: Annotated[
        str,
        Option(metavar="LENGTHS", help="Tokens already in each sequence when decoding starts; runs with every batch."),
    ] = "128,1024",
    adapters: Annotated[
        str,
        Option(
            metavar="COUNTS",
            help="Low-rank adapters of the sequences, in turn, such as 0,1,4, for each case; none: they are off.",
        ),
    ] = "none",
    lora_rank: Annotated[int, Option(metavar="RANK", help="Rank of the adapters, whose weights are random.")] = 16,
    tokens: Annotated[int, Option(metavar="COUNT", help="Decode steps per repeat.")] = 32,
    repeats: Annotated[
        int, Option(metavar="COUNT", help="Timed repeats of each case, in turn; up to twice as many if noisy.")
    ] = 5,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats first.")] = 1,
    bandwidth: Annotated[
        float | None,
        Option(metavar="GBPS", help="Memory bandwidth in GB/s, for the floor. [default: the chip's, else measured]"),
    ] = None,
    compare_capture: Annotated[
        bool, Option("--compare-capture", help="Measure with --capture replay, then tinyjit, and print both.")
    ] = False,
    unfused: Annotated[
        bool, Option("--unfused", help="Measure with fused kernels, then with unfused ones, and print both.")
    ] = False,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Time single steps: prefill by length, decode by batch and context.

    Each is shown next to its floor, the least time that the memory's bandwidth allows."""
    if unfused and compare_capture:
        raise TinyvllmError("--unfused and --compare-capture each show two runs side by side: give one of them")
    runner.apply()
    counts = parse_counts("adapters", adapters)
    config = EngineConfig(model=subject.model or "", max_num_seqs=1, **runner.settings())

    from tinyvllm.bench.latency import LatencyWork, fit_config

    cases = _latency_cases(prefill, batch, context, counts)
    work = LatencyWork(cases, tokens, repeats, warmup, runner.seed, num_extra=repeats)
    found = subject.find(pull=runner.pull)
    fitted = fit_config(_with_adapters(config, counts, lora_rank), work, found.model_config)
    runs = _run_variants(found, _variants(fitted, compare_capture, unfused), work, bandwidth)
    if not subject.markdown:
        _print_latency(runs, of_capture=compare_capture)
    subject.write([row for rows in runs for row in rows])


def _with_adapters(config: EngineConfig, counts: list[int], rank: int) -> EngineConfig:
    """The settings for so many adapters at once, the largest of `counts`. Without counts, adapters are off."""
    if not counts:
        return config
    return dataclasses.replace(config, enable_lora=True, max_loras=max(1, *counts), max_lora_rank=rank)


def _variants(config: EngineConfig, of_capture: bool, of_fusion: bool) -> list[EngineConfig]:
    """The settings that are measured side by side."""
    variants = [dataclasses.replace(config, capture=one) for one in CAPTURES] if of_capture else [config]
    return variants + ([dataclasses.replace(config, unfused=True)] if of_fusion else [])


def _print_latency(runs: list[list[Row]], *, of_capture: bool) -> None:
    """One run, or two side by side that differ in how steps are captured or in the kernels' fusion."""
    from tinyvllm.bench.capture_table import capture_table
    from tinyvllm.bench.fusion_table import fusion_table
    from tinyvllm.bench.tables import latency_table

    both = capture_table if of_capture else fusion_table
    print_table(both(*runs) if len(runs) > 1 else latency_table(*runs))


def _latency_cases(prefill: str, batch: str, context: str, adapter_counts: list[int]) -> tuple[Case, ...]:
    """What the flags ask for: prompts, then each batch with each context, all with each count of adapters."""
    from tinyvllm.bench.latency import Case

    cases = [Case("prefill", *parse_prompt(text)) for text in split_list(prefill)]
    pairs = itertools.product(parse_counts("batch", batch), parse_counts("context", context))
    cases += [Case("decode", *pair) for pair in pairs]
    return tuple(dataclasses.replace(case, num_adapters=count) for case in cases for count in adapter_counts or [0])


def _run_variants(
    found: Subject, variants: list[EngineConfig], work: LatencyWork, bandwidth: float | None
) -> list[list[Row]]:
    """The rows of each variant of the settings, one after the other. `bandwidth` in GB/s; None: `find_bandwidth`."""
    from tinyvllm.bench.capture_table import tag_capture
    from tinyvllm.bench.fusion_table import tag_fusion
    from tinyvllm.bench.kernel_profile import find_bandwidth
    from tinyvllm.bench.latency import measure_latency
    from tinyvllm.execution.inspector import RunnerInspector

    runs = []
    for config in variants:
        with loaded(found, config) as (model_runner, report):
            inspector = RunnerInspector(model_runner)
            bandwidth = find_bandwidth(inspector) if bandwidth is None else bandwidth
            machine = found.describe(model_runner, bandwidth, work.seed)
            rows = tag_capture(measure_latency(inspector, machine, work, report), config.capture)
            runs.append(tag_fusion(rows, unfused=True) if config.unfused else rows)
    return runs


def throughput(
    *,
    num_prompts: Annotated[int, Option(metavar="COUNT", help="Requests, all queued at the start.")] = 32,
    input_len: Annotated[int, Option(metavar="TOKENS", help="Random tokens in each prompt.")] = 128,
    output_len: Annotated[int, Option(metavar="TOKENS", help="Tokens generated by each request.")] = 64,
    max_num_seqs: Annotated[int, Option(metavar="COUNT", help="Maximum sequences per step.")] = 16,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats of the whole run.")] = 3,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats first.")] = 1,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Time the engine under load, offline.

    Runs the scheduler and the steps, without text or HTTP, and with the prefix cache off."""
    runner.apply()

    from tinyvllm.bench.tables import throughput_table
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


# --help lists them in this order
COMMANDS: tuple[Callable[..., None], ...] = (
    latency,
    throughput,
    across,
    breakdown,
    cold_start,
    compare,
    contexts,
    diff,
    kv_quality,
    ledger,
    serve,
    speculation,
)


def make_bench(only: str = "") -> typer.Typer:
    """`bench` with every command of COMMANDS, or with the one that is called `only`, if there is one."""
    bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure how fast a model runs on this machine.")
    named = {command.__name__.replace("_", "-"): command for command in COMMANDS}
    for command in (named[only],) if only in named else COMMANDS:
        bench.command(short_help=summary(command))(spread(command))
    return bench
