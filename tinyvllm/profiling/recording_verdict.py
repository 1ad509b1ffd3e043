"""What limits the steps of a recording: rules like those of `verdict.py`, from the spans of the engine's thread.

Host and device time are separated within each step and then summed over steps; averages of different steps are never
subtracted from each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tinyvllm.profiling.agreement import Disagreement, Figure, found, must_fit
from tinyvllm.profiling.measure import (
    CAPTURE,
    COMMIT,
    DETOKENIZE,
    DRAFT,
    LAUNCH,
    PACK,
    SCHEDULE,
    STEP,
    TOKENS,
    WAIT,
    Recording,
    Span,
)
from tinyvllm.profiling.verdict import HOST_SHARE, PREFILL_SHARE, Finding, judge_lock, prefill_bound, withhold

CAPTURE_SHARE = 0.2  # of the time of steps and captures
IDLE_SHARE = 0.5  # of the host's own time in which its thread did not run
_HOST = (DRAFT, SCHEDULE, PACK, LAUNCH, TOKENS, COMMIT, DETOKENIZE)


@dataclass(frozen=True)
class StepParts:
    """One recorded step, in ns. `host_ns`: all but the wait for the device; its thread ran for `host_cpu_ns` of it."""

    kind: str
    whole_ns: int
    wait_ns: int
    host_cpu_ns: int | None  # None if it was not measured
    by_stage_ns: dict[str, int]  # own time of the spans inside, by name

    @property
    def host_ns(self) -> int:
        return self.whole_ns - self.wait_ns


def step_parts(recording: Recording) -> list[StepParts]:
    """The steps whose spans are all kept, in order."""
    steps = sorted(recording.named(STEP), key=lambda span: span.start_ns)
    first_kept_ns = min((span.end_ns for span in recording.spans), default=0)
    if recording.num_dropped:
        steps = [step for step in steps if step.start_ns >= first_kept_ns]
    starts = [step.start_ns for step in steps]
    inside: list[list[Span]] = [[] for _ in steps]
    for span in recording.spans:
        place = bisect_right(starts, span.start_ns) - 1
        if place < 0 or span.name == STEP or span.depth < 0:
            continue
        step = steps[place]
        if span.thread == step.thread and span.end_ns <= step.end_ns:
            inside[place].append(span)
    return [_parts_of(step, spans) for step, spans in zip(steps, inside, strict=True)]


def _parts_of(step: Span, inside: Sequence[Span]) -> StepParts:
    waits = [span for span in inside if span.name == WAIT]
    by_stage: Counter[str] = Counter()
    for span in inside:
        by_stage[span.name] += span.own_ns
    host_cpu_ns = None
    if step.cpu_ns is not None:
        host_cpu_ns = max(0, step.cpu_ns - sum(span.cpu_ns or 0 for span in waits))
    return StepParts(
        kind=str(step.facts.get("kind", "")),
        whole_ns=step.duration_ns,
        wait_ns=sum(span.duration_ns for span in waits),
        host_cpu_ns=host_cpu_ns,
        by_stage_ns=dict(by_stage),
    )


def judge_recording(recording: Recording) -> list[Finding]:
    """The causes that apply to steps recorded while serving, the verdict first. May be empty. If the parts of the steps
    contradict the whole, no cause is named from them."""
    parts = step_parts(recording)
    thread = next((span.thread for span in recording.spans if span.name == STEP), "")
    whole_s = sum(part.whole_ns for part in parts) / 1e9
    lock = judge_lock(recording.interpreter, thread)  # measured by itself
    if without := withhold(disagreements(parts)):
        return [lock or without]
    causes = [_capturing(recording, whole_s), lock]
    if parts:
        causes += [_host(parts, whole_s), _prompts(parts, whole_s)]
    return [finding for finding in causes if finding is not None]


def disagreements(parts: Sequence[StepParts]) -> tuple[Disagreement, ...]:
    """Stages that take longer than their steps, and a thread that ran for longer than passed."""
    whole_ns = sum(part.whole_ns for part in parts)
    stages_ns = sum(sum(part.by_stage_ns.values()) for part in parts)
    timed = [part for part in parts if part.host_cpu_ns is not None]
    host_ns, host_cpu_ns = sum(part.host_ns for part in timed), sum(part.host_cpu_ns or 0 for part in timed)
    return found(
        [
            must_fit(Figure("the sum of their stages", stages_ns / 1e9), Figure("all steps together", whole_ns / 1e9)),
            must_fit(
                Figure("by the clock of its thread", host_cpu_ns / 1e9),
                Figure("the host's part of all steps", host_ns / 1e9),
            ),
        ]
    )


def _capturing(recording: Recording, steps_s: float) -> Finding | None:
    captures = recording.named(CAPTURE)
    captures_s = sum(span.own_ns for span in captures) / 1e9
    if not captures or captures_s < CAPTURE_SHARE * (captures_s + steps_s):
        return None
    return Finding(
        "capturing graphs",
        captures_s / (captures_s + steps_s),
        f"between steps the engine's thread traced and captured graphs for {_ms(captures_s)}, the longest time "
        f"{_ms(max(span.own_ns for span in captures) / 1e9)}; steps took {_ms(steps_s)}",
        "wait until /ready counts no graphs to capture; a second start finds them in the cache",
    )


def _host(parts: Sequence[StepParts], whole_s: float) -> Finding | None:
    host_s = sum(part.host_ns for part in parts) / 1e9
    if host_s < HOST_SHARE * whole_s:
        return None
    timed = [part for part in parts if part.host_cpu_ns is not None]
    idle_s = sum(max(0, part.host_ns - (part.host_cpu_ns or 0)) for part in timed) / 1e9
    by_stage: Counter[str] = Counter()
    for part in parts:
        by_stage.update({name: ns for name, ns in part.by_stage_ns.items() if name in _HOST})
    longest = max(by_stage, key=lambda name: by_stage[name], default=STEP)
    where = f"of {len(parts)} steps, {_ms(whole_s)}, the host's own part is {_ms(host_s)}"
    if idle_s >= IDLE_SHARE * host_s:
        return Finding(
            "host waits",
            host_s / whole_s,
            f"{where}, but its thread ran for only {_ms(host_s - idle_s)} of it: it waited for a core or for the "
            f"interpreter lock, mostly in {longest}",
            "see who uses the interpreter and the cores: bench breakdown --served, or the load of the machine",
        )
    return Finding(
        "host-bound",
        host_s / whole_s,
        f"{where}, most of it in {longest}, {_ms(by_stage[longest] / 1e9)}",
        "let host and device overlap (async scheduling), or give a step more sequences",
    )


def _prompts(parts: Sequence[StepParts], whole_s: float) -> Finding | None:
    prompts_s = sum(part.whole_ns for part in parts if part.kind in ("prefill", "mixed")) / 1e9
    return prefill_bound(prompts_s, whole_s - prompts_s) if prompts_s >= PREFILL_SHARE * whole_s else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
