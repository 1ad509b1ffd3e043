"""`tinyvllm bench serve`: load for a running server, ours or any other that speaks OpenAI's API."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.cli.bench_flags import parse_counts, print_table, split_list, write_file
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.bench.load import Load, LoadWork, Target


@dataclasses.dataclass(frozen=True)
class TargetFlags:
    """Which server, and how to talk to it."""

    url: Annotated[
        str,
        Option(
            metavar="URL",
            help="The server's address, without the path of an endpoint: http://HOST:PORT, https://HOST:PORT "
            "($SSL_CERT_FILE: a private authority's certificate) or unix:/PATH/OF/SOCKET.",
        ),
    ] = "http://127.0.0.1:8000"
    model: Annotated[
        str | None, Option(metavar="NAME", help="The model to request. [default: the first that the server lists]")
    ] = None
    api: Annotated[str, Option(metavar="NAME", help="completions or chat.")] = "completions"
    api_key: Annotated[
        str | None, Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as a bearer token.", show_envvar=True)
    ] = None

    new_connections: Annotated[
        bool,
        Option(
            "--new-connections",
            help="Open a connection for each request, as clients do that send one alone, instead of keeping it alive. "
            "The time to connect does not count.",
        ),
    ] = False

    def make_target(self, *, ignore_eos: bool, timeout_s: float) -> Target:
        """The server, asked for its first model unless one is named. Raises TinyvllmError if it does not answer."""
        from tinyvllm.bench.load import Target
        from tinyvllm.bench.load_measure import find_model

        url = self.url.rstrip("/").removesuffix("/v1")
        target = Target(
            url=url,
            model=self.model or "",
            api=self.api,
            api_key=self.api_key,
            ignore_eos=ignore_eos,
            timeout_s=timeout_s,
            keeps_alive=not self.new_connections,
        )
        if self.model is not None:
            return target
        return dataclasses.replace(target, model=find_model(target))


@dataclasses.dataclass(frozen=True)
class LoadFlags:
    """Which requests are sent, and when."""

    num_prompts: Annotated[int, Option(metavar="COUNT", help="Requests at each level of load.")] = 32
    input_len: Annotated[
        int, Option(metavar="TOKENS", help="Approximate length of each prompt; no two prompts begin alike.")
    ] = 128
    prompt_ids: Annotated[
        bool,
        Option(
            "--prompt-ids",
            help="Send random token ids, so that prompts have exactly --input-len tokens. Needs --api completions.",
        ),
    ] = False
    vocab_size: Annotated[
        int | None,
        Option(metavar="COUNT", help="With --prompt-ids: draw ids below this. [default: ask /tokenizer_info]"),
    ] = None
    output_len: Annotated[int, Option(metavar="TOKENS", help="Tokens of each answer.")] = 64
    concurrency: Annotated[
        str, Option(metavar="COUNTS", help="Closed loop: keep this many requests open; one level for each; or none.")
    ] = "1,4,16"
    rate: Annotated[
        str,
        Option(
            metavar="RATES",
            help="Open loop instead: requests per second, at random times; one level for each; inf: all at once.",
        ),
    ] = "none"
    max_concurrency: Annotated[
        int | None, Option(metavar="COUNT", help="With --rate: maximum number of requests that may be open at once.")
    ] = None
    warmup: Annotated[int, Option(metavar="COUNT", help="Requests before each level, left out of the figures.")] = 4
    goodput: Annotated[
        str,
        Option(
            metavar="LIMITS",
            help="Limits in ms that a request must meet to count as good: ttft:500,tpot:50,itl:100,e2e:5000.",
        ),
    ] = "none"
    stop_at_eos: Annotated[
        bool, Option("--stop-at-eos", help="Do not send ignore_eos, which servers other than vLLM and ours may reject.")
    ] = False
    timeout: Annotated[float, Option(metavar="SECONDS", help="Maximum time that a server may stay silent.")] = 600.0
    seed: Annotated[int, Option(metavar="INTEGER", help="Seed of the random times of --rate.")] = 0
    load_processes: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Processes that send the requests and time the answers. [default: half the cores, up to 8, and at "
            "least 4 clients for each]",
            show_default=False,
        ),
    ] = None

    def make_work(self) -> LoadWork:
        """Raises TinyvllmError for a bad value."""
        from tinyvllm.bench.load import LoadWork

        if self.vocab_size is not None and not self.prompt_ids:
            raise TinyvllmError("--vocab-size is for prompts of token ids: give --prompt-ids too")
        return LoadWork(
            num_requests=self.num_prompts,
            num_warmup=self.warmup,
            input_len=self.input_len,
            output_len=self.output_len,
            seed=self.seed,
            slo_ms=_parse_limits(self.goodput),
            vocab_size=self.vocab_size,
        )

    def complete(self, work: LoadWork, target: Target) -> LoadWork:
        """With the server's vocabulary, if ids are to be sent and --vocab-size does not give it."""
        from tinyvllm.bench.load_measure import find_vocab_size

        if not self.prompt_ids:
            return work
        if target.api != "completions":
            raise TinyvllmError("--prompt-ids needs --api completions: a chat's messages are text")
        return work if work.vocab_size else dataclasses.replace(work, vocab_size=find_vocab_size(target))

    def levels(self) -> list[Load]:
        """An open loop if rates are given, else a closed one. Raises TinyvllmError if there is neither."""
        return _parse_loads(self.concurrency, self.rate, self.max_concurrency)


@dataclasses.dataclass(frozen=True)
class LoadOutputFlags:
    """Where the figures go."""

    json: Annotated[
        str | None, Option(metavar="FILE", help="Write the levels as JSON; -: as the last line of stdout.")
    ] = None
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table instead.")] = False
    plot: Annotated[
        str | None, Option(metavar="FILE", help="Plot latency and throughput against load: .html, .svg or .png.")
    ] = None


def serve(*, server: TargetFlags, load: LoadFlags, output: LoadOutputFlags) -> None:
    """Send load to a running server and time its answers.

    The server is ours or any other that streams in OpenAI's format. Each level of load gives one line:

    \b
    TTFT           time to the first piece of text
    TPOT           time per token after the first
    ITL            gaps between pieces of text
    E2E            time to the last piece of text
    events/answer  pieces of text; fewer than --output-len if the server merges tokens
    good           requests within the limits of --goodput

    Examples: how fast the answers are for 1, 8 and 64 users at once; how many requests per second are answered in time;
    prompts of exact lengths; another server, from 8 processes.

    \b
    tinyvllm bench serve --concurrency 1,8,64 --num-prompts 128
    tinyvllm bench serve --rate 1,2,4 --goodput ttft:1000,tpot:50
    tinyvllm bench serve --prompt-ids --input-len 512 --output-len 128
    tinyvllm bench serve --url http://host:8000 --api chat --load-processes 8
    """
    from tinyvllm.bench.environment import describe_environment
    from tinyvllm.bench.load_measure import measure_load
    from tinyvllm.bench.load_tables import load_markdown, load_table
    from tinyvllm.bench.plots import check_plot, draw_load

    if output.plot is not None:
        check_plot(output.plot)
    loads, work = load.levels(), load.make_work()
    target = server.make_target(ignore_eos=not load.stop_at_eos, timeout_s=load.timeout)
    work = load.complete(work, target)
    with progress_bars() as report:
        rows = measure_load(target, work, loads, report, load.load_processes)
    environment = describe_environment(load.seed)
    rows = [row | {"environment": environment} for row in rows]
    if output.markdown:
        print(load_markdown(rows))
    else:
        print_table(load_table(rows))
    if output.plot is not None:
        draw_load(rows, output.plot)
    if output.json == "-":
        print(json.dumps(rows))
    elif output.json is not None:
        write_file(output.json, json.dumps(rows) + "\n")


def _parse_loads(concurrency: str, rate: str, max_concurrency: int | None) -> list[Load]:
    """Levels of an open loop if rates are given, else of a closed one. Raises TinyvllmError if there are none."""
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
        raise TinyvllmError(f"--{flag} has {text!r}: give numbers separated by commas, or none") from None
