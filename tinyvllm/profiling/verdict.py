"""What limits a step: rules, each with the numbers it used and what to try next.

If figures that should agree do not, or their grade of trust is D, the only verdict says so (`agreement.py`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyvllm.profiling.agreement import Disagreement, Figure, found, must_equal, must_fit
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.interpreter import Interpreter
from tinyvllm.profiling.kernels import Kernel, floor_s, tabulate
from tinyvllm.profiling.roofline import Roofline

# The shares from which a cause gets a verdict.
LOCK_SHARE = 0.3  # of the time in which another thread holds the interpreter lock
COPY_SHARE, HOST_SHARE, PREFILL_SHARE, DISPATCH_SHARE, ATTENTION_SHARE = 0.15, 0.25, 0.5, 0.3, 0.35
IDLE_SHARE = 0.1  # a kernel is mostly a launch if its bytes and operations account for less of its time
NO_VERDICT = "no verdict"
ROOF_SHARE = 0.6  # above this share of the roofline, the chip is the limit and not how the kernels are written


@dataclass(frozen=True)
class Turn:
    """One turn of the engine's loop, in seconds. `device_s` of it passed from launch until the device was done."""

    whole_s: float
    device_s: float

    @property
    def host_s(self) -> float:
        return max(0.0, self.whole_s - self.device_s)

    @property
    def host_share(self) -> float:
        return self.host_s / self.whole_s if self.whole_s else 0.0


@dataclass(frozen=True)
class Evidence:
    """Measurements of a step, in seconds. None: not measured."""

    kernels: Sequence[Kernel]
    step_s: float  # on the device, as when serving
    roofline: Roofline
    context: int  # tokens of a sequence before this step
    # steps with the host's work (packing, launching, reading): both parts of each are of the same moment
    turns: Sequence[Turn] = ()
    between_s: float | None = None  # part of the step in which a CPU's slowest core ran no kernel
    copy_s: float | None = None  # copies between host and device that are not kernels of the step
    prefill_s: float | None = None  # these two for recordings with steps of both kinds
    decode_s: float | None = None
    interpreter: Interpreter | None = None  # while the turns were measured
    engine_thread: str = "MainThread"  # the thread that ran them
    profiled_s: float | None = None  # the step while its kernels were timed inside it; None if they were not
    served_s: float | None = None  # a turn without any instrumentation
    doubt: str = ""  # why these figures deserve no trust at all; empty if they do


@dataclass(frozen=True)
class Finding:
    """One cause. `share` of the time: 0 to 1."""

    name: str
    share: float
    because: str
    next_step: str
    disagreements: tuple[Disagreement, ...] = ()  # of NO_VERDICT

    @property
    def is_withheld(self) -> bool:
        return self.name == NO_VERDICT

    @property
    def headline(self) -> str:
        """The verdict in a line. A withheld one says what to do; of others that is shown elsewhere."""
        if self.is_withheld:
            return f"{self.name}: {self.because}; {self.next_step}"
        return f"verdict: {self.name}: {self.because}"

    def as_json(self) -> dict[str, object]:
        more = {"disagreements": [one.as_json() for one in self.disagreements]} if self.is_withheld else {}
        return {"name": self.name, "share": self.share, "because": self.because, "next": self.next_step, **more}


def judge(evidence: Evidence) -> list[Finding]:
    """The causes that apply, the verdict first. Causes outside the kernels precede those inside. Never empty.

    If the figures disagree, the verdict is withheld. Only the interpreter lock is measured by itself: a thread that
    holds it explains why they do."""
    if without := withhold(disagreements(evidence), evidence.doubt):
        return [_lock(evidence) or without]
    rules: tuple[Callable[[Evidence], Finding | None], ...] = (
        _copies,
        _lock,
        _host,
        _between,
        _prefill,
        _dispatch,
        _attention,
        _compute,
        _bandwidth,
    )
    found = [finding for finding in (rule(evidence) for rule in rules) if finding is not None]
    return found or [_below_the_roof(evidence)]


def disagreements(evidence: Evidence) -> tuple[Disagreement, ...]:
    """What contradicts: how long a step takes on the device, its kernels and their step, a turn and one as served."""
    step = Figure("the step as served", evidence.step_s)
    checks = []
    if evidence.profiled_s is not None:
        timed = Figure("with its kernels timed", evidence.profiled_s)
        kernels = Figure("the sum of its kernels", sum(kernel.seconds for kernel in evidence.kernels))
        checks += [must_equal(step, timed), must_fit(kernels, timed)]
    if evidence.turns:
        on_device = Figure("in turns with the host's work", statistics.median(one.device_s for one in evidence.turns))
        checks.append(must_equal(step, on_device))
        if evidence.served_s is not None:
            turn = Figure("a turn with every stage timed", statistics.median(one.whole_s for one in evidence.turns))
            checks.append(must_equal(turn, Figure("a turn as served", evidence.served_s)))
    return found(checks)


def withhold(disagreements: Sequence[Disagreement], doubt: str = "") -> Finding | None:
    """What to say instead of a verdict; None if there is no reason to withhold one."""
    reasons = [*map(str, disagreements), *([doubt] if doubt else [])]
    if not reasons:
        return None
    next_step = "measure again when the machine is quiet"
    return Finding(NO_VERDICT, 0.0, "; ".join(reasons), next_step, tuple(disagreements))


def _copies(evidence: Evidence) -> Finding | None:
    in_kernels_s = sum(kernel.seconds for kernel in evidence.kernels if kernel.operation.startswith("copy"))
    copy_s = in_kernels_s + (evidence.copy_s or 0.0)
    whole_s = statistics.median(turn.whole_s for turn in evidence.turns) if evidence.turns else evidence.step_s
    if copy_s < COPY_SHARE * whole_s:
        return None
    return Finding(
        "copy-bound",
        copy_s / whole_s,
        f"copies take {_ms(copy_s)} of {_ms(whole_s)}",
        "find the source of the copies: weights belong on the device, and a step needs one small copy of its inputs",
    )


def _lock(evidence: Evidence) -> Finding | None:
    return judge_lock(evidence.interpreter, evidence.engine_thread)


def judge_lock(interpreter: Interpreter | None, engine_thread: str) -> Finding | None:
    """Another thread holds the interpreter lock so often that the engine's thread waits for it: whenever it has waited
    for the device, or called into C, it has to get the lock back. None if that was not measured."""
    lock = None if interpreter is None else interpreter.lock
    if lock is None or not lock.holders:
        return None
    others = [holder for holder in lock.holders if holder.thread != engine_thread]
    num_known = sum(holder.num_probes for holder in lock.holders)
    share = lock.held_share * sum(holder.num_probes for holder in others) / num_known
    if share - 2 * lock.held_error < LOCK_SHARE:
        return None
    named = ", ".join(f"{one.where} on thread {one.thread}" for one in others[:3])
    return Finding(
        "lock contention",
        share,
        f"other threads hold the interpreter lock {share:.0%} of the time: {named}; a thread that wants it waits "
        f"{_ms(lock.mean_ns / 1e9)} on average, {_ms(lock.max_ns / 1e9)} at most",
        "move that work to another process (serve: --api-server-count), or into C code that releases the lock",
    )


def _host(evidence: Evidence) -> Finding | None:
    if not evidence.turns:
        return None
    share = statistics.median(turn.host_share for turn in evidence.turns)
    if share < HOST_SHARE:
        return None
    whole_s = statistics.median(turn.whole_s for turn in evidence.turns)
    host_s = statistics.median(turn.host_s for turn in evidence.turns)
    return Finding(
        "host-bound",
        share,
        f"in the median of {len(evidence.turns)} turns the host's own work (packing, launching, reading) takes "
        f"{_ms(host_s)}, {share:.0%} of {_ms(whole_s)}",
        "let host and device overlap (async scheduling), or give a step more sequences",
    )


def _between(evidence: Evidence) -> Finding | None:
    if evidence.between_s is None:
        return None
    whole_s = evidence.between_s + sum(kernel.seconds for kernel in evidence.kernels)
    if evidence.between_s < HOST_SHARE * whole_s:
        return None
    return Finding(
        "waiting between kernels",
        evidence.between_s / whole_s,
        f"no kernel runs for {_ms(evidence.between_s)} of {_ms(whole_s)}",
        "check what else the machine runs (load_average in the JSON); try --cpu-cores 1, so that no core waits for "
        "another",
    )


def _prefill(evidence: Evidence) -> Finding | None:
    if evidence.prefill_s is None or evidence.decode_s is None:
        return None
    whole_s = evidence.prefill_s + evidence.decode_s
    if whole_s == 0 or evidence.prefill_s < PREFILL_SHARE * whole_s:
        return None
    return prefill_bound(evidence.prefill_s, evidence.decode_s)


def prefill_bound(prefill_s: float, decode_s: float) -> Finding:
    """Most of the time goes to steps that compute prompts."""
    return Finding(
        "prefill-bound",
        prefill_s / (prefill_s + decode_s),
        f"steps with prompts take {_ms(prefill_s)}, those that only decode {_ms(decode_s)}",
        "reuse prompts (prefix caching), send shorter ones, or lower --max-num-batched-tokens if decoding must not "
        "wait",
    )


def _dispatch(evidence: Evidence) -> Finding | None:
    """The fixed cost of a kernel, estimated by the shortest kernel that does almost no work, minus the extra time that
    each kernel takes when launched separately."""
    kernels = [kernel for kernel in evidence.kernels if not kernel.operation.startswith("copy")]
    chip = evidence.roofline.chip
    idle = [k.seconds for k in kernels if floor_s(chip, k.nbytes or 0, k.flops or 0) < IDLE_SHARE * k.seconds]
    whole_s = sum(kernel.seconds for kernel in kernels)
    if not idle or not whole_s:
        return None
    alone_s = max(0.0, whole_s - evidence.step_s)
    least_s = max(0.0, min(idle) - alone_s / len(kernels))
    share = min(1.0, least_s * len(kernels) / (whole_s - alone_s))
    if share < DISPATCH_SHARE or len(kernels) < 10:
        return None
    return Finding(
        "dispatch-bound",
        share,
        f"{len(kernels)} kernels of at least {least_s * 1e6:,.1f} us each add up to {_ms(least_s * len(kernels))} of "
        f"{_ms(whole_s - alone_s)}",
        "fewer kernels: fuse the short ones (see --by kernel), or give a step more sequences",
    )


def _attention(evidence: Evidence) -> Finding | None:
    whole_s = sum(kernel.seconds for kernel in evidence.kernels)
    attention_s = sum(kernel.seconds for kernel in evidence.kernels if kernel.operation == "attention")
    if whole_s == 0 or attention_s < ATTENTION_SHARE * whole_s:
        return None
    return Finding(
        "attention-bound at this context",
        attention_s / whole_s,
        f"at a context of {evidence.context:,} tokens attention takes {_ms(attention_s)} of {_ms(whole_s)}",
        "a smaller --kv-cache-dtype, shorter contexts, or a model with fewer KV heads; its kernel's share of the roof "
        "shows how much there is to gain",
    )


def _compute(evidence: Evidence) -> Finding | None:
    roof = evidence.roofline
    if roof.is_memory_bound or roof.utilization < ROOF_SHARE:
        return None
    return Finding(
        "compute-bound",
        roof.utilization,
        f"{rounded(roof.intensity)} operations per byte exceed the chip's {rounded(roof.knee)}, and the step reaches "
        f"{rounded(roof.achieved_tflops)} of {rounded(roof.chip.half_tflops)} TFLOP/s",
        "more speed needs a faster chip or fewer operations: a smaller model, or more prompts found in the prefix "
        "cache",
    )


def _bandwidth(evidence: Evidence) -> Finding | None:
    roof = evidence.roofline
    if not roof.is_memory_bound or roof.utilization < ROOF_SHARE:
        return None
    return Finding(
        "bandwidth-bound",
        roof.utilization,
        f"{rounded(roof.nbytes / 1e6)} MB per step at {rounded(roof.achieved_gbps)} of "
        f"{rounded(roof.chip.bandwidth_gbps)} GB/s",
        "fewer bytes per token: smaller weights (Q4_K), or more sequences in a step, which share the weights' bytes",
    )


def _below_the_roof(evidence: Evidence) -> Finding:
    """No resource is exhausted, so the kernels are inefficient. Names those that lose most."""
    roof = evidence.roofline
    rows = [row for row in tabulate(evidence.kernels, "operation", roof.chip) if row.roof_share is not None]
    losses = sorted(rows, key=lambda row: -row.total_s * (1 - min(1.0, row.roof_share or 0.0)))[:3]
    named = ", ".join(f"{row.label} ({_ms(row.total_s)}, {row.roof_share:.0%} of the roof)" for row in losses)
    bound = "memory" if roof.is_memory_bound else "compute"
    return Finding(
        "below the roof",
        1 - min(1.0, roof.utilization),
        f"by its counts the step is {bound}-bound, but it reaches only {roof.utilization:.0%} of that roof; most "
        f"time is lost in {named}",
        "better kernels there: reads of whole cache lines, more loads in flight, larger tiles",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
