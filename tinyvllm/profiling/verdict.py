"""What limits a step: rules, each with the numbers it used and what to try next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyvllm.profiling.kernels import Kernel, floor_s, tabulate
from tinyvllm.profiling.measure import COMMIT, DETOKENIZE, LAUNCH, PACK, SCHEDULE, STEP, WAIT, Recording
from tinyvllm.profiling.roofline import Roofline

# The shares from which a cause gets a verdict.
COPY_SHARE, HOST_SHARE, PREFILL_SHARE, DISPATCH_SHARE, ATTENTION_SHARE = 0.15, 0.25, 0.5, 0.3, 0.35
IDLE_SHARE = 0.1  # a kernel is mostly a launch if its bytes and operations account for less of its time
ROOF_SHARE = 0.6  # above this share of the roofline, the chip is the limit and not how the kernels are written


@dataclass(frozen=True)
class Evidence:
    """Measurements of a step, in seconds. None: not measured."""

    kernels: Sequence[Kernel]
    step_s: float  # on the device, as when serving
    roofline: Roofline
    context: int  # tokens of a sequence before this step
    turn_s: float | None = None  # including the host's work: packing, launching, reading
    between_s: float | None = None  # part of the step in which a CPU's slowest core ran no kernel
    copy_s: float | None = None  # copies between host and device that are not kernels of the step
    prefill_s: float | None = None  # these two for recordings with steps of both kinds
    decode_s: float | None = None


@dataclass(frozen=True)
class Finding:
    """One cause. `share` of the time: 0 to 1."""

    name: str
    share: float
    because: str
    next_step: str

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "share": self.share, "because": self.because, "next": self.next_step}


def judge(evidence: Evidence) -> list[Finding]:
    """The causes that apply, the verdict first. Causes outside the kernels precede those inside. Never empty."""
    rules: tuple[Callable[[Evidence], Finding | None], ...] = (
        _copies,
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


def judge_recording(recording: Recording) -> list[Finding]:
    """The causes that apply to steps recorded while serving: host or device, prompts or decoding. May be empty."""
    steps = recording.named(STEP)
    steps_s = sum(span.duration_ns for span in steps) / 1e9
    if not steps:
        return []
    wait_s = sum(span.duration_ns for span in recording.named(WAIT)) / 1e9
    prompts_s = sum(span.duration_ns for span in steps if span.facts.get("kind") in ("prefill", "mixed")) / 1e9
    found = []
    if steps_s - wait_s >= HOST_SHARE * steps_s:
        host = max((SCHEDULE, PACK, LAUNCH, COMMIT, DETOKENIZE), key=lambda name: _own_ns(recording, name))
        found.append(
            Finding(
                "host-bound",
                1 - wait_s / steps_s,
                f"steps take {_ms(steps_s)}, in which the host waits {_ms(wait_s)} for the device; most of its own "
                f"time goes to {host}, {_ms(_own_ns(recording, host) / 1e9)}",
                "let host and device overlap (async scheduling), or give a step more sequences",
            )
        )
    if prompts_s >= PREFILL_SHARE * steps_s:
        found.append(_of_prompts(prompts_s, steps_s - prompts_s))
    return found


def _own_ns(recording: Recording, name: str) -> int:
    return recording.totals[name].own_ns if name in recording.totals else 0


def _copies(evidence: Evidence) -> Finding | None:
    in_kernels_s = sum(kernel.seconds for kernel in evidence.kernels if kernel.operation.startswith("copy"))
    copy_s = in_kernels_s + (evidence.copy_s or 0.0)
    whole_s = evidence.turn_s or evidence.step_s
    if copy_s < COPY_SHARE * whole_s:
        return None
    return Finding(
        "copy-bound",
        copy_s / whole_s,
        f"copies take {_ms(copy_s)} of {_ms(whole_s)}",
        "find the source of the copies: weights belong on the device, and a step needs one small copy of its inputs",
    )


def _host(evidence: Evidence) -> Finding | None:
    if evidence.turn_s is None or evidence.turn_s - evidence.step_s < HOST_SHARE * evidence.turn_s:
        return None
    host_s = evidence.turn_s - evidence.step_s
    return Finding(
        "host-bound",
        host_s / evidence.turn_s,
        f"a step takes {_ms(evidence.turn_s)}, but the device works for {_ms(evidence.step_s)}: "
        f"packing, launching and reading take {_ms(host_s)}",
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
    return _of_prompts(evidence.prefill_s, evidence.decode_s)


def _of_prompts(prefill_s: float, decode_s: float) -> Finding:
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
        f"{roof.intensity:,.1f} operations per byte exceed the chip's {roof.knee:,.1f}, and the step reaches "
        f"{roof.achieved_tflops:,.2f} of {roof.chip.half_tflops:,g} TFLOP/s",
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
        f"{roof.nbytes / 1e6:,.1f} MB per step at {roof.achieved_gbps:,.1f} of {roof.chip.bandwidth_gbps:,g} GB/s",
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
