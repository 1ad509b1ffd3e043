"""Check the profiler itself, on the user's machine: plant known faults in a running engine, and see what is blamed.

Each fault is planted alone: a delay of PLANTED_MS in one function of the host, a second wait for the device, a needless
copy, a kernel that runs twice. A breakdown with it is compared with a clean one, as `bench compare` would. A
fault is attributed correctly if its own stage or count is a regression, and no stage grew more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.breakdown import BreakdownWork
from tinyvllm.bench.breakdown_json import breakdown_json
from tinyvllm.bench.breakdown_measure import measure_breakdown
from tinyvllm.bench.cold_start import ColdStart
from tinyvllm.bench.compare import Change, compare
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.runs import STAGE
from tinyvllm.bench.stages import Case
from tinyvllm.engine import core
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.output import OutputProcessor
from tinyvllm.execution import runner as execution
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling.chips import Chip
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.text.tokenizer import Tokenizer

Report = Callable[[str, int, int], None]  # stage, done, total

PLANTED_MS = 5.0
LIMIT = 0.05  # growth of the whole that counts, as in `bench compare`
WORK = BreakdownWork((Case("short", 0, 1, 12),), num_repeats=4, num_profiled=1)
WORK_OF_IDS = BreakdownWork((Case(None, 32, 1, 12),), num_repeats=4, num_profiled=1)  # without a tokenizer

# Each host stage, with a function that belongs to it
DELAYS: dict[str, tuple[Any, str]] = {
    "tokenize": (Tokenizer, "encode"),
    "admission": (EngineCore, "add"),
    "schedule": (Scheduler, "schedule"),
    "pack": (InputPacker, "pack"),
    "sampling": (ModelRunner, "sample"),
    "tokens": (execution, "make_output"),
    "commit": (Scheduler, "commit"),
    "loop": (core, "count_step"),
    "detokenize": (OutputProcessor, "push"),
}
TEXT_STAGES = ("tokenize", "detokenize")  # which a model without a tokenizer does not have
NOTHING = "nothing"


@dataclass(frozen=True)
class Plant:
    """A fault. `expected`: the stage or the count that must be blamed; NOTHING if none is planted."""

    name: str
    expected: str
    make: Callable[[RunnerInspector], AbstractContextManager[None]]


@dataclass(frozen=True)
class Attribution:
    """What was blamed for a plant: stages by their growth in ms, from the largest, and counts that rose."""

    plant: str
    expected: str
    stages: tuple[tuple[str, float], ...]
    counts: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        if self.expected == NOTHING:
            return not self.stages and not self.counts
        return self.expected in self.counts or (bool(self.stages) and self.stages[0][0] == self.expected)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_right": self.is_right}


def make_plants(*, has_tokenizer: bool) -> list[Plant]:
    """All faults that can be planted in this model."""
    plants = [Plant(NOTHING, NOTHING, lambda inspector: _left_alone())]
    for stage, (owner, name) in DELAYS.items():
        if has_tokenizer or stage not in TEXT_STAGES:
            plants.append(Plant(f"{PLANTED_MS:g} ms in {_place(owner, name)}", stage, _delay(owner, name)))
    return [
        *plants,
        Plant("a second wait for the device", "syncs", lambda inspector: _extra_wait()),
        Plant("a copy of the output to the host", "copies_d2h", lambda inspector: _extra_copy()),
        Plant("the largest kernel twice", "kernels", lambda inspector: inspector.repeated_kernel()),
    ]


def check_profiler(
    inspector: RunnerInspector, tokenizer: Tokenizer | None, machine: Machine, chip: Chip, report: Report
) -> list[Attribution]:
    """Plant all faults in turn. The runner must be warm and otherwise unused; it is left as it was."""
    work, plants = (WORK if tokenizer else WORK_OF_IDS), make_plants(has_tokenizer=tokenizer is not None)

    def measure() -> dict[str, Any]:
        start = ColdStart(None, 0.0, 0.0, ())
        return breakdown_json(
            measure_breakdown(inspector, tokenizer, machine, work, start, chip, lambda stage, done, total: None)
        )

    report("plant", 0, len(plants) + 1)
    clean, found = measure(), []
    for done, plant in enumerate(plants, 1):
        report("plant", done, len(plants) + 1)
        with plant.make(inspector):
            changes = compare(clean, measure(), LIMIT)
        found.append(attribute(plant, changes))
    report("plant", len(plants) + 1, len(plants) + 1)
    return found


def attribute(plant: Plant, changes: list[Change]) -> Attribution:
    """What a comparison blames."""
    worse = [change for change in changes if change.is_regression]
    stages = sorted(
        ((change.name, round(change.growth_ms, 3)) for change in worse if change.kind == STAGE), key=lambda one: -one[1]
    )
    counts = dict.fromkeys(change.name.split()[-1] for change in worse if not change.unit)
    return Attribution(plant.name, plant.expected, tuple(stages), tuple(counts))


def _place(owner: Any, name: str) -> str:
    return f"{owner.__name__.rpartition('.')[2]}.{name}"


# -- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def _left_alone() -> Iterator[None]:
    yield


def _delay(owner: Any, name: str) -> Callable[[RunnerInspector], AbstractContextManager[None]]:
    def before(*args: Any) -> None:
        end_s = time.thread_time() + PLANTED_MS / 1e3
        while time.thread_time() < end_s:
            pass

    return lambda inspector: _called_first(owner, name, before)


def _extra_wait() -> AbstractContextManager[None]:
    return _called_first(ModelRunner, "collect", lambda runner, flight: runner.wait())


def _extra_copy() -> AbstractContextManager[None]:
    return _called_first(ModelRunner, "collect", lambda runner, flight: runner.outputs[0].numpy())


@contextmanager
def _called_first(owner: Any, name: str, before: Callable[..., Any]) -> Iterator[None]:
    """Call `before` with the arguments of every call of a function, before it."""
    original = getattr(owner, name)

    def planted(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return original(*args, **kwargs)

    setattr(owner, name, planted)
    try:
        yield
    finally:
        setattr(owner, name, original)


# -- tables ----------------------------------------------------------------------------------------------------------


def attribution_table(found: list[Attribution]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("planted", "expected", "blamed", ""):
        table.add_column(column)
    for one in found:
        blamed = [f"{name} +{growth:,.1f} ms" for name, growth in one.stages[:2]] + [
            f"{name} rose" for name in one.counts
        ]
        mark = Text("right", "green") if one.is_right else Text("wrong", "red")
        table.add_row(one.plant, one.expected, ", ".join(blamed) or NOTHING, mark)
    num_right = sum(one.is_right for one in found)
    line = f"{num_right} of {len(found)} were attributed correctly"
    if num_right < len(found):
        line += ": on a busy machine the noise hides some; measure again when it is quiet, and report what stays wrong"
    return Group(table, Text(line, "bold"))
