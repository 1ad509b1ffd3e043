"""`tinyvllm tune`: search for the fastest kernels of a model on this chip, once."""

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
    from tinyvllm.execution.tune_process import Event, Outcome


def tune(
    *,
    buckets: Annotated[
        str, Option(metavar="NAMES", help="Only these steps, as 'decode 1,prefill 256'; all: every one that serve has.")
    ] = "all",
    budget: Annotated[float, Option(metavar="MINUTES", help="Stop after this long; what was found is kept.")] = 20.0,
    subject: SubjectFlags,
    engine: EngineFlags,
) -> None:
    """Search for the fastest kernels of a model here, once: `serve`, `generate` and `bench` use what was found.

    Give the flags that you serve with, since they decide which steps there are. The search runs in a process of its
    own: a candidate that crashes is remembered and left out. A second run goes on where the first one stopped."""
    engine.apply()
    if budget <= 0:
        raise TinyvllmError(f"--budget is {budget:g}: give minutes above 0")
    config = engine.make_config(subject.model or "")

    from tinyvllm.execution.tune_process import Job
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
        f"{outcome.num_tried} candidates tried, {outcome.num_bad} could not be used; kept in {outcome.path}",
        highlight=False,
    )
    if not outcome.is_complete:
        err.print("the budget is spent: run the same command again to go on", highlight=False)


class _Progress:
    """What the worker has said so far: by bucket and kernel a step's seconds with each candidate."""

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
        table = Table(title="a step by the fastest candidate of each kernel")
        for name in ("step", "kernel", "before", "best", "choice"):
            table.add_column(name, justify="right" if name in ("before", "best") else "left")
        for bucket, kernel, first, best, chosen in self._results():
            words = ", ".join(f"{knob} {value}" for knob, value in chosen) or "as it was"
            table.add_row(bucket, kernel, f"{first * 1e3:.3f} ms", f"{best * 1e3:.3f} ms", words)
        return table

    def rows(self) -> list[dict[str, object]]:
        return [
            {"bucket": bucket, "kernel": kernel, "before_s": first, "best_s": best, "chosen": dict(chosen)}
            for bucket, kernel, first, best, chosen in self._results()
        ]

    def _results(self) -> Iterator[tuple[str, str, float, float, tuple[tuple[str, int], ...]]]:
        """Bucket, kernel, seconds of a step by the rules and by the fastest candidate, and that candidate."""
        from tinyvllm.execution.tune_process import LEAST_GAIN

        for (bucket, kernel), times in self._seconds.items():
            chosen = min(times, key=lambda candidate: times[candidate])
            first = times.get((), times[chosen])
            if times[chosen] >= first * (1 - LEAST_GAIN):
                chosen = () if () in times else chosen
            yield bucket, kernel, first, times[chosen], chosen
