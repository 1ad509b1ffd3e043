"""What the user sees: errors as one red line, logs and progress bars on stderr, answers on stdout."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from tinyvllm.errors import TinyvllmError
from tinyvllm.processes import explain_limit
from tinyvllm.server.output_queue import finish_outputs

Progress = Callable[[str, int, int], None]  # (stage, done, total)

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

LOG_LEVELS = ("debug", "info", "warning", "error")


INTERRUPTED = 130  # the exit code that shells give a program ended by Ctrl-C


class RedErrors(TyperGroup):
    """A group of commands that shows our own errors as one line with exit code 1, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print()
            raise typer.Exit(INTERRUPTED) from None
        except TinyvllmError as error:
            if logging.getLogger("tinyvllm").isEnabledFor(logging.DEBUG):
                raise
            _print_error(str(error))
            raise typer.Exit(1) from error
        except Exception as error:
            if (advice := explain_limit(error)) is None:
                raise
            _print_error(advice)
            raise typer.Exit(1) from error


def _print_error(text: str) -> None:
    err.print(Text(f"error: {' '.join(text.split())}", style="red"))


def read_stdin() -> str:
    """All of stdin. Raises TinyvllmError if it is not UTF-8, whether the locale lets Python read that or not."""
    try:
        text = sys.stdin.read()
        text.encode()  # bytes that are no UTF-8 may have been read as lone surrogates
    except UnicodeError as error:
        raise TinyvllmError("stdin is not UTF-8 text: convert it, for example with iconv") from error
    return text


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Turn off echo, because typed keys would displace what is drawn. They wait for the next prompt; Ctrl-C works."""
    # changing the terminal would stop a background job
    if not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
        yield
        return
    import termios  # here: not every system has it

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO  # local modes
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def set_up_logging(level: str) -> None:
    """Log to stderr. `level` applies to tinyvllm and its access log; other libraries log warnings and errors."""
    if level not in LOG_LEVELS:
        raise TinyvllmError(f"--log-level is {level!r}: choose one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()], force=True)
    for name in ("tinyvllm", "uvicorn.access"):
        logging.getLogger(name).setLevel(level.upper())


def _log_handler() -> logging.Handler:
    """On a terminal colored lines above the progress bars; elsewhere plain lines with date and level."""
    if err.is_terminal:
        return _TerminalHandler()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


class _TerminalHandler(logging.Handler):
    """Writes through rich, above the progress bars. Colors show the level, and from warnings up a word does too."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style, word = "dim", ""
            if record.levelno >= logging.WARNING:
                style, word = ("red", "error: ") if record.levelno >= logging.ERROR else ("yellow", "warning: ")
            text = self.format(record)
            start = len("00:00:00 ")
            err.print(Text(f"{text[:start]}{word}{text[start:]}", style=style), highlight=False)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def progress_bars(*, in_bytes: bool = False) -> Iterator[Progress]:
    """A bar for each reported stage, from any thread; they vanish at the end. If stderr is not a terminal, one line for
    each stage at the end."""
    from rich import progress

    count = progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description:<10}"), progress.BarColumn(), count, progress.TimeElapsedColumn())
    bars = progress.Progress(*columns, console=err, transient=err.is_terminal)
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
            if err.is_terminal:  # a server's stdout has a queue of its own, and must not come before the bars' end
                finish_outputs()
