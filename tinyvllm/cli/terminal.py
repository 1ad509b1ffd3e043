"""What the user sees: errors as one red line, logs and progress bars on stderr, answers on stdout."""

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
    """A group of commands that shows our own errors as one line with exit code 1, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TinyvllmError as error:
            if logging.getLogger("tinyvllm").isEnabledFor(logging.DEBUG):
                raise
            err.print(Text(f"error: {' '.join(str(error).split())}", style="red"))
            raise typer.Exit(1) from error


def set_up_logging(level: str) -> None:
    """Log to stderr. `level` applies to tinyvllm and its access log; other libraries log warnings and errors."""
    if level not in LOG_LEVELS:
        raise TinyvllmError(f"--log-level is {level!r}: choose one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()], force=True)
    for name in ("tinyvllm", "uvicorn.access"):
        logging.getLogger(name).setLevel(level.upper())


def _log_handler() -> logging.Handler:
    """On a terminal rich's handler, which writes above the progress bars; elsewhere plain lines, without wrapping."""
    if err.is_terminal:
        from rich.logging import RichHandler

        return RichHandler(console=err, show_path=False, log_time_format="%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


@contextlib.contextmanager
def progress_bars(*, in_bytes: bool = False) -> Iterator[Progress]:
    """A bar for each reported stage, from any thread. If stderr is not a terminal, one line for each stage."""
    from rich import progress

    count = progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description:<10}"), progress.BarColumn(), count, progress.TimeElapsedColumn())
    bars = progress.Progress(*columns, console=err)
    tasks: dict[str, progress.TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not earlier: without a stage, it would print an empty line before an error
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
