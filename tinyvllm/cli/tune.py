"""`tinyvllm tune`: search once for a model's fastest kernels on this chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

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
        str,
        Option(
            metavar="NAMES",
            help="Only these steps, such as 'decode 1,prefill 256'; all: every step of serve. 'decode 1' includes "
            "those for short contexts, such as 'decode 1 up to 512'.",
        ),
    ] = "all",
    budget: Annotated[float, Option(metavar="MINUTES", help="Stop after this long; results so far are kept.")] = 20.0,
    again: Annotated[
        bool,
        Option("--again", help="Try once more the candidates of these steps that gained nothing in earlier searches."),
    ] = False,
    subject: SubjectFlags,
    engine: EngineFlags,
) -> None:
    """Search once for a model's fastest kernels here.

    `serve`, `generate` and `bench` use the result. Give the flags that you serve with: they decide which steps there
    are. The search runs in its own process, so a candidate that crashes is recorded and skipped. A second run continues
    where the first one stopped: candidates that gained nothing are not tried again without --again, and those that
    crashed or computed something else never, until you delete the file that is printed at the end."""
    engine.apply()
    if budget <= 0:
        raise TinyvllmError(f"--budget is {budget:g}: give more than 0 minutes")
    names = () if buckets == "all" else tuple(name for part in buckets.split(",") if (name := part.strip()))
    if not names and buckets != "all":
        raise TinyvllmError(f"--buckets is {buckets!r}: give names of steps, or all")
    config = engine.make_config(subject.model or "")

    from tinyvllm.execution.tune_events import Job
    from tinyvllm.execution.tune_process import tune as search

    found = subject.find(pull=engine.pull)
    shape = None if found.files is not None else found.model_config
    progress = _Progress()
    job = Job(config, found.files, shape, found.kind, names, is_again=again)
    try:
        with progress_bars() as report:
            outcome = search(job, budget * 60, lambda event: progress.see(event, report))
    except KeyboardInterrupt:
        err.print(f"interrupted: {progress.kept}", highlight=False)
        raise
    if progress.has_rows:
        print_table(progress.table())
    _say(outcome, progress)
    subject.write_json(progress.rows())


def _say(outcome: Outcome, progress: _Progress) -> None:
    for bucket, before_s, seconds in progress.whole_steps():
        out.print(
            f"{bucket}: {before_s * 1e3:.3f} ms before, {seconds * 1e3:.3f} ms with all choices, in turn",
            highlight=False,
        )
    for event in progress.deaths:
        err.print(f"{event.message}: it will not be tried again ({event.name})", highlight=False)
    if outcome.path is None or (outcome.num_tried == 0 and not outcome.is_complete):
        when = "before the model was loaded" if outcome.path is None else "before the first candidate was ready"
        err.print(f"nothing was tried: the budget ended {when}; give a larger --budget", highlight=False)
        return
    out.print(
        f"{outcome.num_tried} candidates tried, {outcome.num_bad} unusable; results are in {outcome.path}",
        highlight=False,
    )
    if not outcome.is_complete:
        err.print("out of time: run the same command again to continue", highlight=False)


class _Progress:
    """The worker's results so far, by bucket and kernel."""

    def __init__(self) -> None:
        self._buckets: tuple[str, ...] = ()
        self._path = ""
        self._done: dict[str, str] = {}  # by bucket, why it has no results
        self.deaths: list[Event] = []  # candidates that crashed or stopped the process
        self._results: dict[tuple[str, str], list[Event]] = {}

    def see(self, event: Event, report: Callable[[str, int, int], None]) -> None:
        if event.what == "stage":
            report(event.bucket, event.place, event.total)
        elif event.what == "ready":
            self._buckets, self._path = event.buckets, event.path
        elif event.what == "saved":
            self._done[event.bucket] = event.message
        elif event.what == "end":
            self._results.setdefault((event.bucket, event.kernel), []).append(event)
            if event.message:
                self.deaths.append(event)
            if event.total:
                report(event.bucket, event.place, event.total)
        if len(self._buckets) > 1:
            report("all steps", len(self._done), len(self._buckets))

    @property
    def kept(self) -> str:
        """What an interrupted search leaves behind."""
        if not self._results:
            return "nothing was tried"
        return f"results so far are in {self._path}; run the same command again to continue"

    def whole_steps(self) -> Iterator[tuple[str, float, float]]:
        """(bucket, seconds of its step before the search and after it, timed in turn), where something was kept."""
        from tinyvllm.execution.tune import WHOLE_STEP

        for (bucket, kernel), (*_, event) in self._results.items():
            if kernel == WHOLE_STEP and event.seconds is not None:
                yield bucket, event.before_s, event.seconds

    @property
    def has_rows(self) -> bool:
        return bool(self._results or self._done)

    def table(self) -> Table:
        table = Table(title="what each kernel's fastest candidate changes of the step's time")
        for name in ("step", "kernel", "tried", "change", "choice"):
            table.add_column(name, justify="right" if name in ("tried", "change") else "left")
        for row in self.rows():
            words = ", ".join(f"{knob} {value}" for knob, value in row["chosen"].items()) or "unchanged"
            change = f"{row['best_s'] / row['before_s'] - 1:+.1%}" if row["tried"] else ""
            if change and not row["chosen"] and row["best_s"] < row["before_s"]:
                change, words = "", "unchanged: the gain was too small, or did not hold when timed again"
            table.add_row(row["bucket"], row["kernel"], str(row["tried"]), change, words)
        for bucket, why in self._done.items():
            if why and not any(bucket == name for name, _ in self._results):
                table.add_row(bucket, "", "", "", why)
        return table

    def rows(self) -> list[dict[str, Any]]:
        """By bucket and kernel: how many candidates were tried, the step's seconds with the fastest one and with what
        it took turns with, and the choice that was kept; {}: none."""
        from tinyvllm.execution.tune import WHOLE_STEP

        rows: list[dict[str, Any]] = []
        for (bucket, kernel), (first, *others) in self._results.items():
            if kernel == WHOLE_STEP:
                continue
            events = [event for event in others if event.chosen]  # not what a second worker began with
            kept = [event for event in events if event.is_kept]
            timed = kept[-1:] or [event for event in events if event.seconds is not None] or [first]
            best = min(timed, key=lambda event: (event.seconds or 0.0) / event.before_s)
            chosen = dict(best.chosen) if best.is_kept else {}
            sizes = {"bucket": bucket, "kernel": kernel, "tried": len(events)}
            rows.append(sizes | {"before_s": best.before_s, "best_s": best.seconds, "chosen": chosen})
        return rows
