"""The commands of `tinyvllm`, by name."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Annotated, Any

import typer

from tinyvllm.cli.examples import epilog, summary
from tinyvllm.cli.flags import spread
from tinyvllm.cli.terminal import RedErrors, out
from tinyvllm.server.output_queue import end_process, is_queued

# Files in this directory, each with a function of the same name. --help lists the commands in this order.
COMMANDS = (
    "serve",
    "generate",
    "chat",
    "run_batch",
    "pull",
    "models",
    "quantize",
    "profile",
    "tune",
    "doctor",
    "why",
)
BENCH = "bench"  # which has commands of its own


def make_app(only: str = "", of_bench: str = "") -> typer.Typer:
    """The command line with every command of COMMANDS, and `bench` with its own; or with a single one. of_bench: with
    `bench` as the single one, the name of its single one."""
    app = typer.Typer(
        cls=RedErrors,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a plain traceback can be pasted into an issue
        rich_markup_mode=None,  # help texts contain brackets, which rich would read as markup
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        epilog="To start: tinyvllm pull, then tinyvllm chat. Every command has --help, with examples.",
        help="Run language models on tinygrad: over the APIs of OpenAI, Anthropic and Ollama, or in the terminal.",
    )
    for name in () if only == BENCH else (only,) if only else COMMANDS:
        command = getattr(importlib.import_module(f"tinyvllm.cli.{name}"), name)
        app.command(epilog=epilog(name), short_help=summary(command))(spread(command))
    if only in ("", BENCH):
        from tinyvllm.cli.bench import make_bench

        app.add_typer(make_bench(of_bench))
    app.callback()(_options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from tinyvllm import __version__

        out.print(f"tinyvllm {__version__}", highlight=False)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


_make_whole_app = functools.cache(make_app)


def __getattr__(name: str) -> Any:
    """`app`: the command line with all commands, made for whoever asks for it."""
    if name == "app":
        return _make_whole_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The console script. It imports the modules of one command if it can: all of them take as long as a start of
    tinygrad."""
    wanted, of_bench = [*sys.argv[1:3], "", ""][:2]
    app = make_app(BENCH, of_bench) if wanted == BENCH else make_app(wanted if wanted in COMMANDS else "")
    try:
        app()
    except SystemExit as end:
        if is_queued():  # a server, whose threads and objects Python would clean up for seconds
            end_process(end.code)
        raise
