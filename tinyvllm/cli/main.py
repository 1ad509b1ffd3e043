"""The commands by name."""

from __future__ import annotations

from typing import Annotated

import typer

from tinyvllm.cli.bench import bench
from tinyvllm.cli.chat import chat
from tinyvllm.cli.doctor import doctor
from tinyvllm.cli.flags import spread
from tinyvllm.cli.generate import generate
from tinyvllm.cli.models import models, pull
from tinyvllm.cli.profile import profile
from tinyvllm.cli.run_batch import run_batch
from tinyvllm.cli.serve import serve
from tinyvllm.cli.terminal import RedErrors, out
from tinyvllm.cli.tune import tune

app = typer.Typer(
    cls=RedErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for us: plain, so that it can be pasted into an issue
    rich_markup_mode=None,  # help texts hold brackets of their own
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Serve language models with tinygrad: paged KV cache, continuous batching, OpenAI's HTTP format.",
)

for command in (serve, generate, chat, run_batch, pull, models, profile, tune, doctor):
    app.command()(spread(command))
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tinyvllm import __version__

        out.print(f"tinyvllm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """The console script."""
    app()
