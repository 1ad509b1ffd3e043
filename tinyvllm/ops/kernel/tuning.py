"""Tuned choices: the fastest measured values of a kernel's knobs, by kernel spec, in one file per chip.

A spec has rules that choose the shape of its kernel (tiles, splits, loads ahead). A knob is a rule that a search may
overrule. A knob changes how fast a kernel is, never what it computes, so an outdated or foreign file costs time at
worst. The search is in execution/tune.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Chosen = tuple[tuple[str, int], ...]  # (knob, value), by name


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel spec with knobs. Subclasses list them in `knobs`, and call `knob` wherever a rule decides. A knob is
    also an attribute of the spec: its value, chosen or by the rule."""

    chosen: Chosen = field(default=(), repr=False)

    def knob(self, name: str, rule: int) -> int:
        """The chosen value, or else the value of the rule."""
        return next((value for key, value in self.chosen if key == name), rule)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        """The values worth trying, for each knob. `is_possible` rejects those that do not suit the spec."""
        return {}

    def is_possible(self) -> bool:
        """Whether a kernel can be made with the chosen values."""
        return True

    @property
    def values(self) -> Chosen:
        """The value of each knob."""
        return tuple((name, int(getattr(self, name))) for name, values in self.knobs().items() if values)

    @property
    def predicted_s(self) -> float | None:
        """Seconds that the kernel takes by the model of ops/kernel/cost.py; None: it has none."""
        return None


AnySpec = TypeVar("AnySpec", bound=Tunable)


@dataclass
class Choices:
    """The choices for one chip. `bad`: candidates that faulted, hung or gave wrong results, which no search tries
    again. `searched`: names of the steps that a search has finished. `slow`: candidates that gained nothing, so that a
    search that was stopped goes on with others.

    `asked` collects the specs of the steps that are traced while `watching`; `num_asked`: how often, by key."""

    path: Path | None = None
    chosen: dict[str, Chosen] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    searched: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    loaded: dict[str, Chosen] = field(default_factory=dict)  # what `chosen` was in the file
    asked: dict[str, Tunable] | None = None
    num_asked: Counter[str] = field(default_factory=Counter)

    def choose(self, spec: AnySpec) -> AnySpec:
        """The spec with the values that were chosen for it."""
        if not spec.knobs():
            return spec
        key = spec_key(spec)
        if self.asked is not None:
            self.asked[key] = spec
            self.num_asked[key] += 1
        chosen = self.chosen.get(key)
        return dataclasses.replace(spec, chosen=chosen) if chosen else spec

    @contextmanager
    def watching(self) -> Iterator[dict[str, Tunable]]:
        """Collect the specs that are passed to `choose` inside the context."""
        self.asked = {}
        self.num_asked.clear()
        try:
            yield self.asked
        finally:
            self.asked = None

    @property
    def digest(self) -> str:
        """A hash of all choices, part of a recorded step's name: other choices give a different step. That nothing was
        found for a spec is none."""
        made = sorted((key, chosen) for key, chosen in self.chosen.items() if chosen)
        return hashlib.sha256(repr(made).encode()).hexdigest()[:16]

    def save(self) -> None:
        """Add what this process has found to the file, to which other searches may have added something since it was
        loaded. A choice that was found here replaces another one; that nothing was found does not."""
        if self.path is None:
            return
        with _locked(self.path.parent):
            merged = load_choices(self.path)
            for key, value in self.chosen.items():
                if value != self.loaded.get(key) and (value or key not in merged.chosen):
                    merged.chosen[key] = value
            merged.bad |= self.bad
            merged.searched |= self.searched
            merged.slow |= self.slow
            merged._write(self.path)

    def forget(self, searched: Iterable[str]) -> None:
        """Let the next search try again what gained nothing, in the steps of these names. What was bad stays so."""
        names = set(searched)
        self.slow.clear()
        self.searched -= names
        if self.path is not None:
            with _locked(self.path.parent):
                others = load_choices(self.path)
                others.slow.clear()
                others.searched -= names
                others._write(self.path)

    def _write(self, path: Path) -> None:
        """Write the file atomically."""
        data = {
            "chosen": {key: dict(value) for key, value in sorted(self.chosen.items())},
            "bad": sorted(self.bad),
            "slow": sorted(self.slow),
            "searched": sorted(self.searched),
        }
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other searches from writing there. The folder itself is locked, since the file is replaced."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
        yield
    finally:
        os.close(descriptor)


def load_choices(path: Path) -> Choices:
    """The file's choices; none, with a warning, if it cannot be read."""
    try:
        data = json.loads(path.read_text())
        chosen = {str(key): _checked(value) for key, value in data["chosen"].items()}
        bad, searched, slow = (set(map(str, names)) for names in (data["bad"], data["searched"], data.get("slow", ())))
        return Choices(path, chosen, bad, searched, slow, dict(chosen))
    except FileNotFoundError:
        return Choices(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): kernels are untuned until the next `tinyvllm tune`", path, error)
        return Choices(path)


def _checked(value: Any) -> Chosen:
    return tuple(sorted((str(knob), int(number)) for knob, number in value.items()))


def spec_key(spec: Tunable) -> str:
    """A spec's key in the file: a hash of all its fields but `chosen`."""
    return f"{type(spec).__name__}-{hashlib.sha256(repr(spec).encode()).hexdigest()[:24]}"


def candidates(spec: AnySpec) -> Iterator[AnySpec]:
    """The spec itself, and then with one knob at a time set to each of its other values."""
    yield spec
    for name, values in spec.knobs().items():
        for value in values:
            turned = dataclasses.replace(spec, chosen=tuple(sorted({**dict(spec.chosen), name: value}.items())))
            if turned.is_possible():
                yield turned


def combinations(spec: AnySpec) -> list[AnySpec]:
    """The spec itself, and then with all other combinations of its knobs' values that are possible, each once. The
    fastest by `predicted_s` come first, if there is a prediction."""
    names = [name for name, values in spec.knobs().items() if values]
    turned = {spec.values: spec}
    for values in itertools.product(*(spec.knobs()[name] for name in names)):
        other = dataclasses.replace(spec, chosen=tuple(sorted(zip(names, values, strict=True))))
        if other.is_possible():
            turned.setdefault(other.values, other)
    others = [other for other in turned.values() if other is not spec]
    return [spec, *sorted(others, key=lambda other: other.predicted_s or 0.0)]


def choices_path(root: Path, device: str, hardware: str) -> Path:
    """The file for one chip and one version of tinygrad, whose code generation affects what is fast."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{device} {hardware} tinygrad {version('tinygrad')}".lower()).strip("-")
    return root / f"{name}.json"


current = Choices()  # this process's choices; `use` sets them before steps are traced


def use(choices: Choices) -> None:
    """Make `choices` those of this process."""
    current.__dict__.update(choices.__dict__)


def choose(spec: AnySpec) -> AnySpec:
    """The spec with the values that were chosen for it on this chip."""
    return current.choose(spec)
