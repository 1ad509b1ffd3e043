"""Spans and counters: where the host's time goes, and how often things happen.

    with measure.span("schedule"):
        ...

Measuring is off by default; `span` then returns one shared object that does nothing. `start` turns it on for the whole
process, `stop` turns it off and returns the `Recording`. All times are those of time.perf_counter_ns, so that the spans
of all threads and separately timed kernels share one timeline. A span also has the processor time of its thread
(time.thread_time_ns): what remains of its wall time, its thread waited, for a core, for the interpreter lock, or for
what it called. Reading that clock twice takes 0.7 us of the 6 us that a span takes while recording
(`python -m tests.profiling.span_cost`).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from types import TracebackType

from tinyvllm.errors import InvariantError, ProfilingError
from tinyvllm.profiling.interpreter import Interpreter, Watch

# The stages of a request and a step, in order. The engine, tables and traces use the same words. Admission: a request
# is checked and passed to the engine; queue: it waits in the scheduler's queue; draft: tokens are guessed for the step
# to verify; tokens: sampled rows become token ids and logprobs.
ADMISSION = "admission"
TOKENIZE, QUEUE, DRAFT, SCHEDULE, PACK = "tokenize", "queue", "draft", "schedule", "pack"
LAUNCH, WAIT, TOKENS, COMMIT, DETOKENIZE = "launch", "wait", "tokens", "commit", "detokenize"
STAGES = (TOKENIZE, QUEUE, DRAFT, SCHEDULE, PACK, LAUNCH, WAIT, TOKENS, COMMIT, DETOKENIZE)
STEP = "step"  # one turn of the engine loop, around its stages; facts: kind (prefill, decode, mixed), bucket
TIERS = "tiers"  # KV blocks are copied to and from host memory before a step
CAPTURE = "capture"  # part of capturing a graph between two steps, on the engine's thread

# What a server adds, so that one request can be followed from socket to socket (request_stages.py). Facts: `http`, the
# id of the HTTP request, and `request`, the engine's id of one call.
REQUEST = "request"  # from the head of an HTTP request until it is answered
CALL = "call"  # from the parsed body until the engine's client has been called
TEMPLATE, SUBMIT, RECEIVE, REPLY = "template", "submit", "receive", "reply"
INBOX = "inbox"  # the engine's loop takes messages, or waits for them
HOP_BACK, SERIALIZE, SEND = "hop back", "serialize", "send"
ANSWER = "answer"  # a stream, from its first output until its last byte was sent; its facts are the times in between

# Who may start a recording. Only the one that started it can stop it.
FLAGS, ROUTE, CODE = "--profile or --trace", "POST /start_profile", "a function of this program"

MAX_SPANS = 1 << 18  # about 60 MB when full: an hour at 64 tokens per second with four spans each

Fact = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """[start_ns, end_ns) by time.perf_counter_ns. `inner_ns`: the part covered by spans opened inside it on the same
    thread. `depth`: number of spans around it; -1 for a span that was added by `add` and is on no stack.

    `cpu_ns`: processor time of its thread meanwhile, at most the span's duration; `inner_cpu_ns`: that of the spans
    inside. None for a span that was added by `add`: it is on no thread."""

    name: str
    start_ns: int
    end_ns: int
    thread: str
    depth: int = 0
    inner_ns: int = 0
    facts: dict[str, Fact] = field(default_factory=dict)
    cpu_ns: int | None = None
    inner_cpu_ns: int = 0

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def own_ns(self) -> int:
        """The part that no inner span covers."""
        return self.duration_ns - self.inner_ns

    @property
    def own_cpu_ns(self) -> int | None:
        """Processor time outside inner spans, at most `own_ns`. None if it was not measured."""
        return None if self.cpu_ns is None else max(0, min(self.cpu_ns - self.inner_cpu_ns, self.own_ns))


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over all spans of one name, including those no longer kept. `own_cpu_ns` covers the `timed_ns` of
    `own_ns` whose processor time was measured: all but the spans of `add`."""

    count: int = 0
    total_ns: int = 0
    own_ns: int = 0
    timed_ns: int = 0
    own_cpu_ns: int = 0

    @property
    def waited_ns(self) -> int:
        """Time in which the threads were in spans of this name, outside inner ones, but did not run."""
        return self.timed_ns - self.own_cpu_ns


@dataclass(frozen=True)
class Recording:
    """The measurements between start and stop. `totals` and `counts` cover everything; `spans` are the latest, by
    end."""

    start_ns: int
    end_ns: int
    spans: tuple[Span, ...]
    totals: dict[str, Total]
    counts: dict[str, int]
    num_dropped: int  # spans that ended earlier than those kept
    process: str = "host"  # the process's name
    pid: int = 0
    interpreter: Interpreter | None = None  # if `start` was told to watch it

    @property
    def wall_ns(self) -> int:
        return self.end_ns - self.start_ns

    def named(self, name: str) -> list[Span]:
        """The kept spans of one name."""
        return [span for span in self.spans if span.name == name]


class Recorder:
    """Makes one recording. Every thread has its own stack of open spans."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        if max_spans < 1:
            raise ProfilingError(f"a recording must keep at least one span, but max_spans is {max_spans}")
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._totals: dict[str, list[int]] = {}  # the fields of Total
        self._counts: dict[str, int] = {}
        self._num_ended = 0
        self._open = threading.local()
        self._lock = threading.Lock()
        self._start_ns = time.perf_counter_ns()

    def span(self, name: str, **facts: Fact) -> OpenSpan:
        return OpenSpan(self, name, facts)

    def add(self, name: str, start_ns: int, end_ns: int, **facts: Fact) -> None:
        """Add a span whose ends were measured separately: on two threads, or around an `await`. It has no depth."""
        if end_ns < start_ns:
            raise InvariantError(f"span {name} ends {start_ns - end_ns} ns before it starts")
        self.keep(Span(name, start_ns, end_ns, threading.current_thread().name, -1, 0, facts))

    def tally(self, name: str, start_ns: int, end_ns: int, cpu_ns: int | None = None) -> None:
        """Add to the total of `name` without keeping a span: for what happens once a token. It counts as a part of the
        span that is open on this thread. cpu_ns: processor time of this thread meanwhile, if measured."""
        duration_ns = end_ns - start_ns
        cpu_ns = None if cpu_ns is None else min(cpu_ns, duration_ns)
        if stack := self.stack:
            stack[-1].cover(duration_ns, cpu_ns or 0)
        with self._lock:
            self._sum(name, duration_ns, duration_ns, cpu_ns)

    def count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def finish(self) -> Recording:
        """The recording so far, without spans that are still open."""
        end_ns = time.perf_counter_ns()
        with self._lock:
            return Recording(
                self._start_ns,
                end_ns,
                tuple(self._spans),
                {name: Total(*sums) for name, sums in self._totals.items()},
                dict(self._counts),
                self._num_ended - len(self._spans),
                _process,
                os.getpid(),
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
            self._sum(span.name, span.duration_ns, span.own_ns, span.own_cpu_ns)

    def _sum(self, name: str, duration_ns: int, own_ns: int, own_cpu_ns: int | None) -> None:
        sums = self._totals.get(name)
        if sums is None:
            sums = self._totals[name] = [0, 0, 0, 0, 0]
        sums[0] += 1
        sums[1] += duration_ns
        sums[2] += own_ns
        if own_cpu_ns is not None:
            sums[3] += own_ns
            sums[4] += own_cpu_ns


class OpenSpan:
    """A span on one thread, from the `with` statement until the block ends, even by an exception."""

    __slots__ = ("_depth", "_facts", "_inner_cpu_ns", "_inner_ns", "_name", "_recorder", "_start_cpu_ns", "_start_ns")

    def __init__(self, recorder: Recorder, name: str, facts: dict[str, Fact]) -> None:
        self._recorder, self._name, self._facts = recorder, name, facts
        self._inner_ns = self._inner_cpu_ns = self._depth = self._start_ns = self._start_cpu_ns = 0

    def tell(self, **facts: Fact) -> None:
        """Add facts that become known inside the block: `step.tell(kind="decode", bucket="decode 8")`."""
        self._facts.update(facts)

    def cover(self, duration_ns: int, cpu_ns: int) -> None:
        """Count a part of the block as covered by something inside it."""
        self._inner_ns += duration_ns
        self._inner_cpu_ns += cpu_ns

    def __enter__(self) -> OpenSpan:
        stack = self._recorder.stack
        self._depth = len(stack)
        stack.append(self)
        self._start_cpu_ns = time.thread_time_ns()
        self._start_ns = time.perf_counter_ns()  # last, so that this overhead counts as the outer span's own time
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end_ns = time.perf_counter_ns()
        cpu_ns = min(time.thread_time_ns() - self._start_cpu_ns, end_ns - self._start_ns)
        stack = self._recorder.stack
        if not stack or stack[-1] is not self:
            raise InvariantError(
                f"span {self._name} ends, but {stack[-1]._name if stack else 'none'} is the innermost of its thread: "
                "a span must not contain an await or end on another thread; use add() for those"
            )
        stack.pop()
        if stack:
            stack[-1].cover(end_ns - self._start_ns, cpu_ns)
        if kind is not None:
            self._facts["error"] = kind.__name__
        thread = threading.current_thread().name
        self._recorder.keep(
            Span(
                name=self._name,
                start_ns=self._start_ns,
                end_ns=end_ns,
                thread=thread,
                depth=self._depth,
                inner_ns=self._inner_ns,
                facts=self._facts,
                cpu_ns=cpu_ns,
                inner_cpu_ns=self._inner_cpu_ns,
            )
        )


class Nothing:
    """Takes the place of every span while measuring is off."""

    __slots__ = ()

    def tell(self, **facts: Fact) -> None:
        """Do nothing."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let exceptions pass."""


_NOTHING = Nothing()
_recorder: Recorder | None = None
_watch: Watch | None = None
_owner = CODE  # of the recording that runs
_process = "host"
_switch = threading.Lock()


def name_process(name: str) -> None:
    """Set the name that this process has in recordings: "engine 0"."""
    global _process
    _process = name


def span(name: str, **facts: Fact) -> OpenSpan | Nothing:
    """A context manager that measures its block, inside the spans that are open on this thread."""
    recorder = _recorder
    return _NOTHING if recorder is None else OpenSpan(recorder, name, facts)


def add(name: str, start_ns: int, end_ns: int, **facts: Fact) -> None:
    """Add a span whose ends were measured separately, such as a request's time in the queue."""
    if (recorder := _recorder) is not None:
        recorder.add(name, start_ns, end_ns, **facts)


def tally(name: str, start_ns: int, end_ns: int, cpu_ns: int | None = None) -> None:
    """Add to a total without keeping a span: for what happens once a token."""
    if (recorder := _recorder) is not None:
        recorder.tally(name, start_ns, end_ns, cpu_ns)


def count(name: str, amount: int = 1) -> None:
    """Count an event or an amount: a copy, a synchronization, a number of bytes."""
    if (recorder := _recorder) is not None:
        recorder.count(name, amount)


def is_on() -> bool:
    """Whether measuring is on. For facts that are costly to compute."""
    return _recorder is not None


def start(max_spans: int = MAX_SPANS, *, watches: bool = False, owner: str = CODE) -> None:
    """Start measuring in all threads. Raises ProfilingError if measuring is already on.

    watches: also measure the processor time of each thread, and how often the interpreter lock is held, and by whom. It
    takes a thread that wakes up 200 times a second. owner: who may stop the recording."""
    global _recorder, _watch, _owner
    with _switch:
        if _recorder is not None:
            raise ProfilingError(f"a profile is already being recorded: {_owner} started it{_remedy(_owner)}")
        _recorder, _owner = Recorder(max_spans), owner
        _watch = Watch() if watches else None


def stop(owner: str = CODE) -> Recording:
    """Stop measuring and return the recording. Raises ProfilingError if measuring is off, or if someone else than
    `owner` started it: that one would lose its recording."""
    global _recorder, _watch
    with _switch:
        if _recorder is None:
            raise ProfilingError("no profile is being recorded: start one first")
        if owner != _owner:
            raise ProfilingError(
                f"the profile that is being recorded is not yours: {_owner} started it{_remedy(_owner)}"
            )
        recorder, _recorder = _recorder, None
        watch, _watch = _watch, None
    recording = recorder.finish()
    return recording if watch is None else replace(recording, interpreter=watch.stop())


def _remedy(owner: str) -> str:
    """How a recording of this owner ends, for error messages."""
    return {
        FLAGS: ", and it ends with the process: start the server without these flags to record on request",
        ROUTE: ": POST /stop_profile ends it",
    }.get(owner, ": it has to stop it first")
