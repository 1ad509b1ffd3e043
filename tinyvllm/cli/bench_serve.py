"""`tinyvllm bench serve`: load for a server that runs, ours or any that speaks OpenAI's format."""

from __future__ import annotations

import asyncio
import dataclasses
import json as json_module
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.cli.bench_flags import parse_counts, print_table, split_list, write_file
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.bench.load import Load


def serve(
    *,
    url: Annotated[
        str, Option(metavar="URL", help="The server, without the path of an endpoint.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, Option(metavar="NAME", help="What the requests ask for. [default: the server's first model]")
    ] = None,
    api: Annotated[str, Option(metavar="NAME", help="completions or chat.")] = "completions",
    api_key: Annotated[
        str | None, Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as a bearer token.", show_envvar=True)
    ] = None,
    num_prompts: Annotated[int, Option(metavar="COUNT", help="Requests of each level of load.")] = 32,
    input_len: Annotated[
        int, Option(metavar="TOKENS", help="Length of each prompt, about: of text, no two alike.")
    ] = 128,
    output_len: Annotated[int, Option(metavar="TOKENS", help="Tokens of each answer.")] = 64,
    concurrency: Annotated[
        str, Option(metavar="COUNTS", help="Closed loop: so many requests at once, for each; none.")
    ] = "1,4,16",
    rate: Annotated[
        str,
        Option(metavar="RATES", help="Open loop instead: so many requests a second at random times, for each; inf."),
    ] = "none",
    max_concurrency: Annotated[
        int | None, Option(metavar="COUNT", help="With --rate: requests that may be open at once.")
    ] = None,
    warmup: Annotated[int, Option(metavar="COUNT", help="Requests before each level that nobody counts.")] = 4,
    goodput: Annotated[
        str, Option(metavar="LIMITS", help="What a good request keeps, in ms: ttft:500,tpot:50,itl:100,e2e:5000.")
    ] = "none",
    stop_at_eos: Annotated[
        bool, Option("--stop-at-eos", help="Do not send ignore_eos, which servers other than vLLM and ours may refuse.")
    ] = False,
    timeout: Annotated[float, Option(metavar="SECONDS", help="How long an answer may keep silent.")] = 600.0,
    seed: Annotated[int, Option(metavar="INTEGER", help="Of prompts and of random times.")] = 0,
    json: Annotated[
        str | None, Option(metavar="FILE", help="Write the levels as JSON; -: as the last line of stdout.")
    ] = None,
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table instead.")] = False,
    plot: Annotated[
        str | None, Option(metavar="FILE", help="Draw latency and throughput against load: .html, .svg or .png.")
    ] = None,
) -> None:
    """Send load to a server and time its answers: TTFT, TPOT, ITL, E2E, goodput; closed loop or open."""
    from tinyvllm.bench.environment import describe_environment
    from tinyvllm.bench.load import LoadWork, Target, find_model, measure_load
    from tinyvllm.bench.load_report import load_markdown, load_table
    from tinyvllm.bench.plots import check_plot, draw_load

    if plot is not None:
        check_plot(plot)
    loads = _parse_loads(concurrency, rate, max_concurrency)
    work = LoadWork(num_prompts, warmup, input_len, output_len, seed, _parse_limits(goodput))
    target = Target(url.rstrip("/").removesuffix("/v1"), model or "", api, api_key, not stop_at_eos, timeout)
    if model is None:
        target = dataclasses.replace(target, model=asyncio.run(find_model(target)))
    with progress_bars() as report:
        rows = asyncio.run(measure_load(target, work, loads, report))
    environment = describe_environment(seed)
    rows = [row | {"environment": environment} for row in rows]
    if markdown:
        print(load_markdown(rows))
    else:
        print_table(load_table(rows))
    if plot is not None:
        draw_load(rows, plot)
    if json == "-":
        print(json_module.dumps(rows))
    elif json is not None:
        write_file(json, json_module.dumps(rows) + "\n")


def _parse_loads(concurrency: str, rate: str, max_concurrency: int | None) -> list[Load]:
    """Levels of an open loop where rates are given, else of a closed one. Raises TinyvllmError for none."""
    from tinyvllm.bench.load import Load

    rates = [_parse_number("rate", part) for part in split_list(rate)]
    if rates:
        return [Load(max_concurrency, one) for one in rates]
    if max_concurrency is not None:
        raise TinyvllmError("--max-concurrency limits an open loop: give --rate too, or --concurrency instead")
    loads = [Load(count) for count in parse_counts("concurrency", concurrency)]
    if not loads:
        raise TinyvllmError("there is no load: give --concurrency or --rate")
    return loads


def _parse_limits(text: str) -> dict[str, float]:
    """ttft:500,tpot:50 -> {"ttft": 500.0, "tpot": 50.0}."""
    pairs = [part.partition(":") for part in split_list(text)]
    return {name.strip(): _parse_number("goodput", value) for name, _, value in pairs}


def _parse_number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TinyvllmError(f"--{flag} has {text!r}: give numbers with commas between, or none") from None
