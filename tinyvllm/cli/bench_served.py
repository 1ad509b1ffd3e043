"""`tinyvllm bench breakdown --served`: where the time of served requests goes."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from tinyvllm.cli.bench_flags import SubjectFlags, parse_counts, print_table, write_file
from tinyvllm.cli.bench_serve import TargetFlags
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.bench.load import Target


@dataclasses.dataclass(frozen=True)
class ServedFlags:
    """A server, and the load that is sent to it."""

    served: Annotated[
        bool, Option("--served", help="Measure requests to a server, from socket to socket, instead of the engine.")
    ] = False
    url: Annotated[
        str | None,
        Option(metavar="URL", help="With --served: a server that runs with --enable-profiling. [default: start one]"),
    ] = None
    serve_flags: Annotated[
        str, Option(metavar="FLAGS", help='With --served: more flags of `tinyvllm serve`: "--api-server-count 2".')
    ] = ""
    concurrency: Annotated[
        str, Option(metavar="COUNTS", help="With --served: clients at once; a table for each count.")
    ] = "1,16"
    num_prompts: Annotated[int, Option(metavar="COUNT", help="With --served: requests of each measurement.")] = 32
    input_len: Annotated[int, Option(metavar="TOKENS", help="With --served: approximate length of each prompt.")] = 128
    api: Annotated[str, Option(metavar="NAME", help="With --served: completions or chat.")] = "chat"
    api_key: Annotated[
        str | None,
        Option(metavar="KEY", envvar="OPENAI_API_KEY", help="With --served: sent as a bearer token.", show_envvar=True),
    ] = None
    trace: Annotated[
        str | None,
        Option(metavar="FILE", help="With --served: write the last level's processes as one trace for Perfetto."),
    ] = None


def measure_requests(
    flags: ServedFlags, subject: SubjectFlags, runner: RunnerFlags, *, named: str | None, num_tokens: int
) -> None:
    """Measure each level of load, print its tables, and write the files that are asked for. Raises TinyvllmError."""
    from tinyvllm.bench.environment import describe_environment
    from tinyvllm.bench.load import Load, LoadWork
    from tinyvllm.bench.served import measure_served
    from tinyvllm.bench.served_tables import served_markdown, served_tables
    from tinyvllm.profiling.trace_events import trace_text

    loads = [Load(count) for count in parse_counts("concurrency", flags.concurrency)]
    if not loads:
        raise TinyvllmError("there is no load: give --concurrency")
    work = LoadWork(flags.num_prompts, input_len=flags.input_len, output_len=num_tokens, seed=runner.seed)
    with progress_bars() as report, _target(flags, subject, runner, named) as target:
        levels = measure_served(target, work, loads, report)
    if subject.markdown:
        print(served_markdown(levels))
    else:
        print_table(Text(f"{target.model} at {target.url}, {target.api}, {work.num_requests} requests", style="bold"))
        print_table(served_tables(levels))
    subject.write_json(
        {
            "schema": 1,
            "kind": "served breakdown",
            "model": target.model,
            "api": target.api,
            "input_len": work.input_len,
            "output_len": work.output_len,
            "levels": [level.as_json() for level in levels],
            "environment": describe_environment(runner.seed),
        }
    )
    if flags.trace is not None:
        write_file(flags.trace, trace_text(levels[-1].recordings))


@contextlib.contextmanager
def _target(flags: ServedFlags, subject: SubjectFlags, runner: RunnerFlags, named: str | None) -> Iterator[Target]:
    """The server of --url, or one that is started and ends with the block."""
    from tinyvllm.bench.served import running_server

    def ask(url: str) -> Target:
        return TargetFlags(url, None, flags.api, flags.api_key).make_target(ignore_eos=True, timeout_s=600.0)

    if subject.shape is not None:
        raise TinyvllmError("--shape has random weights and no tokenizer, so it cannot be served: give a MODEL")
    if flags.url is not None:
        yield ask(flags.url)
        return
    model = subject.model or named or DEFAULT_MODEL
    require_model(model, pull=runner.pull)
    with running_server(model, [*given_flags(runner), *shlex.split(flags.serve_flags)]) as url:
        yield ask(url)


def given_flags(runner: RunnerFlags) -> list[str]:
    """The flags that differ from their defaults, as arguments of `tinyvllm serve`, which has the same."""
    arguments: list[str] = []
    for field in dataclasses.fields(RunnerFlags):
        value: Any = getattr(runner, field.name)
        if value == field.default or field.name == "pull":
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
