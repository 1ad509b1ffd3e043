"""The commands of `tinyvllm`, by name."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from tinyvllm.cli.bench import bench
from tinyvllm.cli.examples import epilog
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


def make_app() -> typer.Typer:
    """The command line with every command of COMMANDS, and `bench` with its own."""
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
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"tinyvllm.cli.{name}"), name)
        app.command(epilog=epilog(name))(spread(command))
    app.add_typer(bench)
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


app = make_app()


def main() -> None:
    """The console script."""
    try:
        app()
    except SystemExit as end:
        if is_queued():  # a server, whose threads and objects Python would clean up for seconds
            end_process(end.code)
        raise
