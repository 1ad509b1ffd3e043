"""Named measurements: where the host's time goes, span by span, and counts of what happened.

    with measure.span("schedule"):
        ...

Off, which is the normal state, `span` returns one shared object that does nothing. `start` switches measuring on for
the whole process, `stop` ends it and returns the `Recording`. Times are perf_counter_ns everywhere, so that spans of
all threads, and kernels that were timed by hand, lie on one time line.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType

from tinyvllm.errors import InvariantError, ProfilingError

# What a request and a step go through, in order. One word each, in the engine, in tables and in traces.
TOKENIZE, QUEUE, SCHEDULE, PACK = "tokenize", "queue", "schedule", "pack"
LAUNCH, WAIT, COMMIT, DETOKENIZE = "launch", "wait", "commit", "detokenize"
STAGES = (TOKENIZE, QUEUE, SCHEDULE, PACK, LAUNCH, WAIT, COMMIT, DETOKENIZE)
STEP = "step"  # one turn of the engine, around its stages; facts: kind (prefill, decode, mixed), bucket

MAX_SPANS = 1 << 18  # kept: about 60 MB when full, an hour of 64 tokens a second with four spans each

Fact = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """[start_ns, end_ns) of the clock perf_counter_ns. `inner_ns`: of it, within spans that were opened inside it on
    the same thread. `depth`: spans that it was opened inside of; -1 for one that was added and is on no stack."""

    name: str
    start_ns: int
    end_ns: int
    thread: str
    depth: int = 0
    inner_ns: int = 0
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def own_ns(self) -> int:
        """What no span inside this one accounts for."""
        return self.duration_ns - self.inner_ns


@dataclass(frozen=True, slots=True)
class Total:
    """Of all spans of one name, also of those that are no longer kept."""

    count: int = 0
    total_ns: int = 0
    own_ns: int = 0

    def plus(self, span: Span) -> Total:
        return Total(self.count + 1, self.total_ns + span.duration_ns, self.own_ns + span.own_ns)


@dataclass(frozen=True)
class Recording:
    """What was measured between start and stop. `totals` and `counts` are exact; `spans` are the last ones, by end."""

    start_ns: int
    end_ns: int
    spans: tuple[Span, ...]
    totals: dict[str, Total]
    counts: dict[str, int]
    num_dropped: int  # spans that ended earlier than those kept

    @property
    def wall_ns(self) -> int:
        return self.end_ns - self.start_ns

    def named(self, name: str) -> list[Span]:
        """The kept spans of one name."""
        return [span for span in self.spans if span.name == name]


class Recorder:
    """Owns one recording while it is made. Every thread has a stack of its open spans."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        if max_spans < 1:
            raise ProfilingError(f"a recording keeps at least one span, but {max_spans} were asked for")
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._totals: dict[str, Total] = {}
        self._counts: dict[str, int] = {}
        self._num_ended = 0
        self._open = threading.local()
        self._lock = threading.Lock()
        self._start_ns = time.perf_counter_ns()

    def span(self, name: str, **facts: Fact) -> OpenSpan:
        return OpenSpan(self, name, facts)

    def add(self, name: str, start_ns: int, end_ns: int, **facts: Fact) -> None:
        """A span whose ends were seen apart: on two threads, or around an `await`. It nests in nothing."""
        if end_ns < start_ns:
            raise InvariantError(f"span {name} ends {start_ns - end_ns} ns before it starts")
        self.keep(Span(name, start_ns, end_ns, threading.current_thread().name, -1, 0, facts))

    def count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def finish(self) -> Recording:
        """What was recorded until now. A span that is still open is no part of it."""
        end_ns = time.perf_counter_ns()
        with self._lock:
            return Recording(
                self._start_ns,
                end_ns,
                tuple(self._spans),
                dict(self._totals),
                dict(self._counts),
                self._num_ended - len(self._spans),
            )

    @property
    def stack(self) -> list[OpenSpan]:
        """This thread's open spans."""
        try:
            return self._open.stack  # type: ignore[no-any-return]
        except AttributeError:
            self._open.stack = []
            return self._open.stack  # type: ignore[no-any-return]

    def keep(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)
            self._num_ended += 1
            self._totals[span.name] = self._totals.get(span.name, Total()).plus(span)


class OpenSpan:
    """A span of one thread from `with` to the block's end, however that ends."""

    __slots__ = ("_depth", "_facts", "_inner_ns", "_name", "_recorder", "_start_ns")

    def __init__(self, recorder: Recorder, name: str, facts: dict[str, Fact]) -> None:
        self._recorder, self._name, self._facts = recorder, name, facts
        self._inner_ns = self._depth = self._start_ns = 0

    def tell(self, **facts: Fact) -> None:
        """Add what is known only now: `step.tell(kind="decode", bucket="decode 8")`."""
        self._facts.update(facts)

    def __enter__(self) -> OpenSpan:
        stack = self._recorder.stack
        self._depth = len(stack)
        stack.append(self)
        self._start_ns = time.perf_counter_ns()  # last, so that what this costs is the outer span's own time
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end_ns = time.perf_counter_ns()
        stack = self._recorder.stack
        if not stack or stack[-1] is not self:
            raise InvariantError(
                f"span {self._name} ends, but {stack[-1]._name if stack else 'none'} is the innermost of its thread: "
                "a span must not lie around an await, or end on another thread; add() is for those"
            )
        stack.pop()
        if stack:
            stack[-1]._inner_ns += end_ns - self._start_ns
        if kind is not None:
            self._facts["error"] = kind.__name__
        thread = threading.current_thread().name
        self._recorder.keep(Span(self._name, self._start_ns, end_ns, thread, self._depth, self._inner_ns, self._facts))


class Nothing:
    """Stands for every span while measuring is off."""

    __slots__ = ()

    def tell(self, **facts: Fact) -> None:
        """Nothing is kept."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Errors pass."""


_NOTHING = Nothing()
_recorder: Recorder | None = None
_switch = threading.Lock()


def span(name: str, **facts: Fact) -> OpenSpan | Nothing:
    """A context manager that measures its block, on this thread: within the spans that are open here."""
    recorder = _recorder
    return _NOTHING if recorder is None else OpenSpan(recorder, name, facts)


def add(name: str, start_ns: int, end_ns: int, **facts: Fact) -> None:
    """A span whose ends were seen apart, such as a request's time in the queue."""
    if (recorder := _recorder) is not None:
        recorder.add(name, start_ns, end_ns, **facts)


def count(name: str, amount: int = 1) -> None:
    """That something happened: a copy, a synchronisation, so many bytes."""
    if (recorder := _recorder) is not None:
        recorder.count(name, amount)


def is_on() -> bool:
    """For facts that take work to find."""
    return _recorder is not None


def start(max_spans: int = MAX_SPANS) -> None:
    """Begin to measure, in every thread. Raises ProfilingError where that has begun already."""
    global _recorder
    with _switch:
        if _recorder is not None:
            raise ProfilingError("a profile is being recorded already: stop that one first")
        _recorder = Recorder(max_spans)


def stop() -> Recording:
    """End it and return what was measured. Raises ProfilingError where nothing had begun."""
    global _recorder
    with _switch:
        if _recorder is None:
            raise ProfilingError("no profile is being recorded: start one first")
        recorder, _recorder = _recorder, None
    return recorder.finish()
