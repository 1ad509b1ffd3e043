"""Where the time of the engine's thread goes, always on: a clock that assigns all of it to stages.

The loop tells the clock which stage has just ended (`mark`). A request copies the clock's sums when it enters the
queue, leaves it, gets its first token and ends; the differences divide its whole time in the engine into stages,
without work for each token. `measure` has the same stages as spans; it records everything, but only when asked to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

# Places in `StepClock.seconds`. Prefill: on the device, a step with prompts; decode: one without.
SCHEDULE, PACK, PREFILL, DECODE, TOKENS, COMMIT, CAPTURE, LOOP, DRAFT = range(9)


class Parts(Struct, frozen=True, array_like=True, gc=False):
    """An interval of a request's time, divided by what the engine's thread did, in seconds. The sum is the interval."""

    draft: float = 0.0  # guessing tokens for steps to verify, on the host or on the device
    schedule: float = 0.0
    pack: float = 0.0
    prefill: float = 0.0  # on the device, steps with a part of the request's own prompt
    others: float = 0.0  # on the device, steps with prompts of other requests
    decode: float = 0.0  # on the device, steps without prompts
    tokens: float = 0.0
    commit: float = 0.0
    capture: float = 0.0
    loop: float = 0.0

    @property
    def total_s(self) -> float:
        return math.fsum(getattr(self, name) for name in self.__struct_fields__)


class StepClock:
    """Owns the sums. Used on the engine's thread only."""

    __slots__ = ("_now", "now_s", "seconds")

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.now_s = now()  # at the latest mark
        self.seconds = [0.0] * 9

    def mark(self, stage: int) -> float:
        """Assign all time since the latest mark to `stage`. Returns that time in seconds."""
        now_s = self._now()
        passed_s = now_s - self.now_s
        self.now_s = now_s
        self.seconds[stage] += passed_s
        return passed_s

    def mark_divided(self, stage: int, seconds: float, other: int) -> float:
        """As `mark`, but assign up to `seconds` of the time to the stage `other`. Returns the rest."""
        passed_s = self.mark(stage)
        seconds = min(seconds, passed_s)
        self.seconds[stage] -= seconds
        self.seconds[other] += seconds
        return passed_s - seconds


@dataclass(slots=True)
class Passage:
    """A request's way through the engine: the clock's sums at transitions, and the steps that computed its prompt."""

    clock: StepClock
    queued: tuple[float, ...]
    scheduled: tuple[float, ...] | None = None
    first: tuple[float, ...] | None = None  # its first token is known
    num_chunks: int = 0  # steps that computed a part of its prompt
    # Device time of those steps that count as prefill and as decode, until the first token, and after it: a preempted
    # request computes its prompt again.
    own_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    later_own_s: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @classmethod
    def begin(cls, clock: StepClock) -> Passage:
        return cls(clock, tuple(clock.seconds))

    def leave_queue(self) -> None:
        """A step includes the request; only the first time counts."""
        if self.scheduled is None:
            self.scheduled = tuple(self.clock.seconds)

    def add_chunk(self, stage: int, seconds: float) -> None:
        """A step that computed a part of its prompt took the device `seconds`. stage: PREFILL, or DECODE for a step
        with single tokens only."""
        self.num_chunks += 1
        own_s = self.own_s if self.first is None else self.later_own_s
        own_s[stage == DECODE] += seconds

    def before_first(self) -> tuple[Parts, Parts]:
        """In the queue, and from there to the first token, which is known now."""
        now = self.first = tuple(self.clock.seconds)
        scheduled = self.scheduled or now
        return _parts(self.queued, scheduled), _parts(scheduled, now, self.own_s)

    def after_first(self) -> Parts:
        """From the first token until now."""
        now = tuple(self.clock.seconds)
        return _parts(self.first or now, now, self.later_own_s)


def _parts(before: tuple[float, ...], after: tuple[float, ...], own_s: list[float] | None = None) -> Parts:
    """The time between two copies of the sums. own_s: of prefill and decode, the time for the request's own prompt."""
    passed = [then - earlier for earlier, then in zip(before, after, strict=True)]
    own_prefill_s, own_decode_s = own_s or (0.0, 0.0)
    own_prefill_s, own_decode_s = min(own_prefill_s, passed[PREFILL]), min(own_decode_s, passed[DECODE])
    return Parts(
        draft=passed[DRAFT],
        schedule=passed[SCHEDULE],
        pack=passed[PACK],
        prefill=own_prefill_s + own_decode_s,
        others=passed[PREFILL] - own_prefill_s,
        decode=passed[DECODE] - own_decode_s,
        tokens=passed[TOKENS],
        commit=passed[COMMIT],
        capture=passed[CAPTURE],
        loop=passed[LOOP],
    )
