"""Decides which model is loaded next, and which is unloaded for it. Has no processes and no clock.

Requests enter and leave. A request for a loaded model runs at once; others wait. Models are loaded one at a time, in
the order of their first requests, because the free memory is measured before each load. A model that needs room gets
it from the one that has been idle longest. If all are busy, it waits until one becomes idle; after PATIENCE_S, the one
that was loaded first accepts no more requests, so that it is certain to become idle.

    unloaded -> starting -> examined -> loading -> ready -> ending -> unloaded

A process first reads its model's files, and reports what the model needs and how much memory is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

PATIENCE_S = 10.0  # until a busy model accepts no more requests, because another one waits for room
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0  # after a failed load: the first time, and at most
REFUSED_S = 5.0  # how long requests are refused after a model did not fit


class State(Enum):
    UNLOADED = "unloaded"
    STARTING = "starting"
    EXAMINED = "examined"
    LOADING = "loading"
    READY = "ready"
    ENDING = "ending"


@dataclass(frozen=True)
class Rule:
    """What the policy needs to know about a model. Times are in seconds."""

    name: str
    keep_alive_s: float  # inf: forever
    is_pinned: bool = False
    memory_share: float | None = None  # of the device's memory, for weights and KV cache; None: an equal part


@dataclass(frozen=True)
class Need:
    """What a model's own process has measured. Sizes are in bytes."""

    device: str  # tinygrad's name
    weights: int
    scratch: int  # intermediate values of a step
    kv: int  # of the shortest useful context
    context: int  # its length in tokens
    free: int  # of the device's memory, now
    share: float  # of the memory that would be free without models: what all models together may take
    max_share: float = 1.0  # of `free` that one engine may take
    is_total: bool = False  # `free` is the device's total, whoever uses it

    @property
    def least(self) -> int:
        return self.weights + self.scratch + self.kv


@dataclass(eq=False)
class Ticket:
    """One request. keep_alive_s: how long its model should stay loaded after it; None: the model's own setting."""

    model: str
    since_s: float
    keep_alive_s: float | None = None


@dataclass
class Entry:
    """One model. held: bytes of device memory that it has been given."""

    rule: Rule
    state: State = State.UNLOADED
    waiting: list[Ticket] = field(default_factory=list)
    running: set[Ticket] = field(default_factory=set)
    keep_alive_s: float = 0.0
    keep_alive_since_s: float = -math.inf  # when the request came that keep_alive_s is of
    used_s: float = -math.inf  # when its last request ended
    loaded_s: float = -math.inf
    is_retiring: bool = False  # it takes no more requests, and ends once it is idle
    need: Need | None = None
    is_measured: bool = False  # since the last model ended
    held: int = 0
    num_failures: int = 0  # loads in a row
    error: str = ""  # of the latest load, or why it does not fit
    retry_s: float = -math.inf  # until then, requests are answered with the error

    @property
    def is_resident(self) -> bool:
        return self.state is not State.UNLOADED

    @property
    def is_idle(self) -> bool:
        return self.state is State.READY and not self.running and (self.is_retiring or not self.waiting)

    @property
    def expires_s(self) -> float:
        """When it is unloaded if it is not used; inf: never."""
        return math.inf if self.rule.is_pinned else self.used_s + self.keep_alive_s


# ---- Actions ----


@dataclass(frozen=True)
class Start:
    """Start the model's process, which then reports what it needs."""

    model: str


@dataclass(frozen=True)
class Measure:
    """Ask the model's process again how much memory is free."""

    model: str


@dataclass(frozen=True)
class Load:
    """Have the model's process load it, in at most `num_bytes`."""

    model: str
    num_bytes: int


@dataclass(frozen=True)
class Admit:
    """These requests run now."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True)
class Unload:
    """End the model's process."""

    model: str
    reason: str
    is_eviction: bool = False  # for another model


@dataclass(frozen=True)
class Refuse:
    """Answer these requests with an error: their model does not fit."""

    tickets: tuple[Ticket, ...]
    reason: str


Action = Start | Measure | Load | Admit | Unload | Refuse


class Policy:
    """Owns the state of every model that decisions depend on."""

    def __init__(self, rules: Sequence[Rule], max_loaded: int) -> None:
        self.entries = {rule.name: Entry(rule) for rule in rules}
        self._max_loaded = max_loaded

    # ---- Requests ----

    def enter(self, model: str, now_s: float, keep_alive_s: float | None = None) -> Ticket:
        """A request has arrived. It runs or waits; see `Admit`. The caller has checked `error_of`."""
        entry, ticket = self.entries[model], Ticket(model, now_s, keep_alive_s)
        entry.waiting.append(ticket)
        return ticket

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """A request has been answered, or its client has left."""
        entry = self.entries[ticket.model]
        if ticket in entry.waiting:
            entry.waiting.remove(ticket)
        elif ticket in entry.running:
            entry.running.discard(ticket)
            entry.used_s = now_s
            if ticket.since_s >= entry.keep_alive_since_s:  # a longer one that came before has no say any more
                entry.keep_alive_since_s = ticket.since_s
                entry.keep_alive_s = entry.rule.keep_alive_s if ticket.keep_alive_s is None else ticket.keep_alive_s

    def error_of(self, model: str, now_s: float) -> str:
        """Why the model cannot be loaded now; "" if loading may be tried."""
        entry = self.entries[model]
        return entry.error if entry.state is State.UNLOADED and now_s < entry.retry_s else ""

    # ---- What has happened to processes ----

    def examined(self, model: str, need: Need) -> None:
        entry = self.entries[model]
        entry.need, entry.is_measured = need, True
        if entry.state is State.STARTING:
            entry.state = State.EXAMINED

    def loaded(self, model: str, now_s: float, num_bytes: int | None = None) -> None:
        """num_bytes: what it actually takes, if that is known."""
        entry = self.entries[model]
        entry.state, entry.loaded_s, entry.used_s = State.READY, now_s, now_s
        entry.keep_alive_s, entry.keep_alive_since_s = entry.rule.keep_alive_s, -math.inf
        entry.num_failures, entry.error, entry.retry_s = 0, "", -math.inf
        if num_bytes is not None:
            entry.held = num_bytes

    def lost(self, model: str) -> None:
        """Its process has died or is about to end: it takes no more requests. `ended` follows."""
        entry = self.entries[model]
        if entry.state is State.READY:
            entry.state = State.ENDING

    def ended(self, model: str, now_s: float, error: str = "") -> tuple[Ticket, ...]:
        """Its process has ended. error: why it could not be loaded. Returns the requests that end with this error."""
        entry = self.entries[model]
        has_failed = entry.state in (State.STARTING, State.EXAMINED, State.LOADING)
        entry.state, entry.held, entry.is_retiring = State.UNLOADED, 0, False
        entry.running.clear()
        for other in self.entries.values():
            other.is_measured = False
        if not has_failed:
            return ()
        entry.num_failures += 1
        entry.error = error
        entry.retry_s = now_s + min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (entry.num_failures - 1))
        failed, entry.waiting = tuple(entry.waiting), []
        return failed

    # ---- Decisions ----

    def actions(self, now_s: float) -> Iterator[Action]:
        """What to do now, one action after the other. The policy takes each as done when the next is requested."""
        while (action := self._next(now_s)) is not None:
            yield action

    def wake_up_s(self, now_s: float) -> float:
        """When `actions` may yield something without a further event; inf: never."""
        times = [entry.expires_s for entry in self.entries.values() if entry.is_idle]
        times += [entry.retry_s for entry in self.entries.values() if entry.rule.is_pinned and not entry.is_resident]
        seeker = self._seeker(now_s)
        if seeker is not None and seeker.waiting and not any(entry.is_retiring for entry in self.entries.values()):
            times.append(seeker.waiting[0].since_s + PATIENCE_S)
        return min((time_s for time_s in times if time_s > now_s), default=math.inf)

    def _next(self, now_s: float) -> Action | None:
        seeker = self._seeker(now_s)
        if seeker is None:
            for entry in self.entries.values():
                entry.is_retiring = False
        for entry in self.entries.values():
            if entry.state is State.READY and entry.waiting and not entry.is_retiring:
                return self._admit(entry)
            if entry.is_idle and now_s >= entry.expires_s:
                return self._unload(entry, f"it has been idle for {now_s - entry.used_s:.0f} s")
        if any(entry.state in (State.STARTING, State.LOADING, State.ENDING) for entry in self.entries.values()):
            return None
        if seeker is None:
            return None
        if seeker.state is State.EXAMINED:
            return self._find_memory(seeker, now_s)
        if sum(entry.is_resident for entry in self.entries.values()) < self._max_loaded:
            seeker.state, seeker.is_measured = State.STARTING, False
            return Start(seeker.rule.name)
        return self._make_room(seeker, self.entries.values(), now_s)

    def _seeker(self, now_s: float) -> Entry | None:
        """The model to load next, or the one that is being loaded and has no memory yet."""
        for entry in self.entries.values():
            if entry.state is State.EXAMINED:
                return entry
        unloaded = [entry for entry in self.entries.values() if entry.state is State.UNLOADED]
        pinned = [entry for entry in unloaded if entry.rule.is_pinned and now_s >= entry.retry_s]
        waiting = sorted((e for e in unloaded if e.waiting), key=lambda entry: entry.waiting[0].since_s)
        return next(iter((*pinned, *waiting)), None)

    def _admit(self, entry: Entry) -> Admit:
        tickets, entry.waiting = tuple(entry.waiting), []
        entry.running.update(tickets)
        return Admit(tickets)

    def _unload(self, entry: Entry, reason: str, *, is_eviction: bool = False) -> Unload:
        entry.state = State.ENDING
        return Unload(entry.rule.name, reason, is_eviction)

    def _find_memory(self, entry: Entry, now_s: float) -> Action | None:
        """Load a model whose needs are known, or unload another one, or refuse it."""
        if not entry.waiting and not entry.rule.is_pinned:
            return self._unload(entry, "no request waits for it any more")
        if not entry.is_measured:
            entry.state = State.STARTING
            return Measure(entry.rule.name)
        need = entry.need
        assert need is not None, f"{entry.rule.name} has not been examined"
        others = [e for e in self.entries.values() if e.held and e.need is not None and e.need.device == need.device]
        budget, available = self.memory_for(entry)
        if need.least <= available:
            entry.state = State.LOADING
            entry.held = max(need.least, min(budget, available))
            return Load(entry.rule.name, entry.held)
        if need.least > available + sum(other.held for other in others if not other.rule.is_pinned):
            entry.error, entry.retry_s, entry.num_failures = self.explain(entry.rule.name), now_s + REFUSED_S, 0
            if entry.waiting:
                tickets, entry.waiting = tuple(entry.waiting), []
                return Refuse(tickets, entry.error)
            return self._unload(entry, "it does not fit")
        return self._make_room(entry, others, now_s)

    def _make_room(self, seeker: Entry, others: Iterable[Entry], now_s: float) -> Unload | None:
        """Unload the least recently used of the idle models in `others`. If none is idle, have one become idle."""
        candidates = [entry for entry in others if entry.state is State.READY and not entry.rule.is_pinned]
        idle = [entry for entry in candidates if entry.is_idle]
        if idle:
            victim = min(idle, key=lambda entry: entry.used_s)
            return self._unload(victim, f"{seeker.rule.name} needs room", is_eviction=True)
        since_s = seeker.waiting[0].since_s if seeker.waiting else now_s
        if candidates and now_s >= since_s + PATIENCE_S and not any(entry.is_retiring for entry in candidates):
            min(candidates, key=lambda entry: entry.loaded_s).is_retiring = True
        return None

    # ---- Memory ----

    def memory_for(self, entry: Entry) -> tuple[int, int]:
        """(the bytes that the model should get, those that it can get now).

        All models together may take `share` of the memory that would be free without them. Each should have an equal
        part of it, so that as many fit as may be loaded, unless a share of its own is set."""
        need = entry.need
        assert need is not None
        held = sum(e.held for e in self.entries.values() if e.held and e.need and e.need.device == need.device)
        base = need.free if need.is_total else need.free + held
        usable = int(base * need.share)
        own = entry.rule.memory_share
        budget = usable // self._max_loaded if own is None else int(base * own)
        return budget, max(0, min(need.free, usable - held))

    def explain(self, model: str) -> str:
        """A message with the numbers: why a model is not loaded yet, and what to change."""
        entry = self.entries[model]
        others = [e for e in self.entries.values() if e is not entry and e.is_resident]
        shown = ", ".join(self._in_words(other) for other in others) or "none"
        if entry.need is None:
            return (
                f"{self._max_loaded} models may be loaded at once, and these are: {shown}. Try again later, or raise "
                "--max-loaded"
            )
        need, (_, available) = entry.need, self.memory_for(entry)
        return (
            f"the model {model!r} needs {_gib(need.least)}: {_gib(need.weights)} of weights, {_gib(need.scratch)} for "
            f"a step's intermediate values and {_gib(need.kv)} for a context of {need.context} tokens. "
            f"{_gib(available)} are free for it on {need.device}, where models may take {need.share:.0%} of the "
            f"memory; loaded: {shown}. Try again later, or lower its max_model_len, raise --gpu-memory-utilization, "
            "unpin a model, or choose a smaller one"
        )

    @staticmethod
    def _in_words(entry: Entry) -> str:
        if entry.state is not State.READY:
            state = entry.state.value
        elif entry.rule.is_pinned:
            state = "pinned"
        else:
            state = f"{len(entry.running)} requests running" if entry.running else "idle"
        size = f"{_gib(entry.held)}, " if entry.held else ""
        return f"{entry.rule.name!r} ({size}{state})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
