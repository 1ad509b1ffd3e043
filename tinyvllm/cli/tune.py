"""`tinyvllm tune`: search once for a model's fastest kernels on this chip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from tinyvllm.cli.bench_flags import SubjectFlags, print_table
from tinyvllm.cli.flags import EngineFlags
from tinyvllm.cli.terminal import err, out, progress_bars
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.execution.tune_events import Event
    from tinyvllm.execution.tune_process import Outcome


def tune(
    *,
    buckets: Annotated[
        str, Option(metavar="NAMES", help="Only these steps, such as 'decode 1,prefill 256'; all: every step of serve.")
    ] = "all",
    budget: Annotated[float, Option(metavar="MINUTES", help="Stop after this long; results so far are kept.")] = 20.0,
    subject: SubjectFlags,
    engine: EngineFlags,
) -> None:
    """Search once for a model's fastest kernels here.

    `serve`, `generate` and `bench` use the result. Give the flags that you serve with: they decide which steps there
    are. The search runs in its own process, so a candidate that crashes is recorded and skipped. A second run continues
    where the first one stopped."""
    engine.apply()
    if budget <= 0:
        raise TinyvllmError(f"--budget is {budget:g}: give more than 0 minutes")
    config = engine.make_config(subject.model or "")

    from tinyvllm.execution.tune_events import Job
    from tinyvllm.execution.tune_process import tune as search

    found = subject.find(pull=engine.pull)
    names = () if buckets == "all" else tuple(name.strip() for name in buckets.split(","))
    shape = None if found.files is not None else found.model_config
    progress = _Progress()
    with progress_bars() as report:
        outcome = search(
            Job(config, found.files, shape, found.kind, names), budget * 60, lambda event: progress.see(event, report)
        )
    print_table(progress.table())
    _say(outcome)
    subject.write_json(progress.rows())


def _say(outcome: Outcome) -> None:
    out.print(
        f"{outcome.num_tried} candidates tried, {outcome.num_bad} unusable; results are in {outcome.path}",
        highlight=False,
    )
    if not outcome.is_complete:
        err.print("out of time: run the same command again to continue", highlight=False)


class _Progress:
    """The worker's events so far: a step's seconds by bucket, kernel and candidate."""

    def __init__(self) -> None:
        self._buckets: tuple[str, ...] = ()
        self._done: set[str] = set()
        self._seconds: dict[tuple[str, str], dict[tuple[tuple[str, int], ...], float]] = {}

    def see(self, event: Event, report: object) -> None:
        if event.what == "ready":
            self._buckets = event.buckets
        elif event.what == "saved":
            self._done.add(event.bucket)
        elif event.what == "end" and event.seconds is not None:
            times = self._seconds.setdefault((event.bucket, event.kernel), {})
            times[event.chosen] = min(event.seconds, times.get(event.chosen, event.seconds))
        if callable(report) and self._buckets:
            report("tune", len(self._done), len(self._buckets))

    def table(self) -> Table:
        table = Table(title="step time with the fastest candidate of each kernel")
        for name in ("step", "kernel", "before", "best", "choice"):
            table.add_column(name, justify="right" if name in ("before", "best") else "left")
        for bucket, kernel, first, best, chosen in self._results():
            words = ", ".join(f"{knob} {value}" for knob, value in chosen) or "unchanged"
            table.add_row(bucket, kernel, f"{first * 1e3:.3f} ms", f"{best * 1e3:.3f} ms", words)
        return table

    def rows(self) -> list[dict[str, object]]:
        return [
            {"bucket": bucket, "kernel": kernel, "before_s": first, "best_s": best, "chosen": dict(chosen)}
            for bucket, kernel, first, best, chosen in self._results()
        ]

    def _results(self) -> Iterator[tuple[str, str, float, float, tuple[tuple[str, int], ...]]]:
        """(bucket, kernel, seconds of a step by the default rules, by the fastest candidate, that candidate)."""
        from tinyvllm.execution.tune import LEAST_GAIN

        for (bucket, kernel), times in self._seconds.items():
            chosen = min(times, key=lambda candidate: times[candidate])
            first = times.get((), times[chosen])
            if times[chosen] >= first * (1 - LEAST_GAIN):
                chosen = () if () in times else chosen
            yield bucket, kernel, first, times[chosen], chosen
