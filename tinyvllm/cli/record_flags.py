"""Flags of the commands that can record where their time goes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated

from rich.console import Console
from typer import Option

from tinyvllm.cli.bench_flags import MIN_TABLE_WIDTH, write_file
from tinyvllm.cli.terminal import err
from tinyvllm.profiling import measure
from tinyvllm.profiling.trace_events import trace_text


@dataclasses.dataclass(frozen=True)
class RecordFlags:
    """What to record, from the moment the model is ready until the end."""

    profile: Annotated[bool, Option("--profile", help="At the end, print on stderr where the host's time went.")] = (
        False
    )
    trace: Annotated[
        str | None,
        Option(metavar="FILE", help="At the end, write the same data span by span, as a trace for Perfetto."),
    ] = None

    @property
    def is_on(self) -> bool:
        return self.profile or self.trace is not None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the block if either flag asks for it, and show the recording even if the block raises.

        Raises TinyvllmError if the trace cannot be written."""
        if not self.is_on:
            yield
            return
        measure.start(watches=True, owner=measure.FLAGS)
        try:
            yield
        finally:
            self._show(measure.stop(measure.FLAGS))

    def _show(self, recording: measure.Recording) -> None:
        if self.profile:
            _print_table(recording)
        if self.trace is not None:
            write_file(self.trace, trace_text(recording))

    def show_all(self, recordings: dict[str, measure.Recording]) -> None:
        """Show the recordings of several processes. Raises TinyvllmError if the trace cannot be written."""
        if self.profile:
            for name, recording in recordings.items():
                err.print(name, highlight=False, markup=False)
                _print_table(recording)
        if self.trace is not None:
            write_file(self.trace, trace_text(list(recordings.values())))


def _print_table(recording: measure.Recording) -> None:
    """At its own width, even if stderr is not a terminal."""
    from tinyvllm.profiling.profile_report import recording_table

    Console(stderr=True, width=max(err.width, MIN_TABLE_WIDTH), highlight=False).print(recording_table(recording))
