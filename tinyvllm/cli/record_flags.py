"""Flags of commands that can record where their time goes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated

from rich.console import Console
from typer import Option

from tinyvllm.cli.bench_flags import TABLE_WIDTH, write_file
from tinyvllm.cli.terminal import err
from tinyvllm.profiling import measure
from tinyvllm.profiling.trace_events import trace_text


@dataclasses.dataclass(frozen=True)
class RecordFlags:
    """What is recorded from when the model is ready to the end."""

    profile: Annotated[bool, Option("--profile", help="Print where the host's time went, on stderr at the end.")] = (
        False
    )
    trace: Annotated[
        str | None, Option(metavar="FILE", help="Write the same as a trace for Perfetto, span by span, at the end.")
    ] = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside; nothing where neither is asked for. However it ends, what was recorded is shown.

        Raises TinyvllmError where the trace cannot be written."""
        if not self.profile and self.trace is None:
            yield
            return
        measure.start()
        try:
            yield
        finally:
            self._show(measure.stop())

    def _show(self, recording: measure.Recording) -> None:
        from tinyvllm.profiling.report import recording_table

        if self.profile:  # in its own width, where stderr is no terminal
            Console(stderr=True, width=max(err.width, TABLE_WIDTH), highlight=False).print(recording_table(recording))
        if self.trace is not None:
            write_file(self.trace, trace_text(recording))
