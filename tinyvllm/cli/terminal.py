"""What the user sees: errors in one red line, logs and progress bars on stderr, answers on stdout."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from tinyvllm.errors import TinyvllmError

Progress = Callable[[str, int, int], None]  # (stage, done, total)

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

LOG_LEVELS = ("debug", "info", "warning", "error")


class RedErrors(TyperGroup):
    """A group of commands in which our own errors are one line and exit code 1, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TinyvllmError as error:
            if logging.getLogger("tinyvllm").isEnabledFor(logging.DEBUG):
                raise
            err.print(Text(f"error: {' '.join(str(error).split())}", style="red"))
            raise typer.Exit(1) from error


def set_up_logging(level: str) -> None:
    """Log to stderr. `level` is for tinyvllm and its HTTP accesses; other libraries speak from warnings on."""
    if level not in LOG_LEVELS:
        raise TinyvllmError(f"--log-level is {level!r}: choose one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()], force=True)
    for name in ("tinyvllm", "uvicorn.access"):
        logging.getLogger(name).setLevel(level.upper())


def _log_handler() -> logging.Handler:
    """On a terminal rich's, which writes above the bars; in files whole lines, which rich would wrap."""
    if err.is_terminal:
        from rich.logging import RichHandler

        return RichHandler(console=err, show_path=False, log_time_format="%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


@contextlib.contextmanager
def progress_bars(*, in_bytes: bool = False) -> Iterator[Progress]:
    """A bar for each stage that is reported, from any thread. On a stderr that is no terminal, one line a stage."""
    from rich import progress

    count = progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description:<10}"), progress.BarColumn(), count, progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=err) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
