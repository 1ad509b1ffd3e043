"""What a step asks of the device, by count, against written limits: what has no place in a step is called by its name.

Times are noisy and counts are not, so a hidden copy, a wait too many or a fall-back to the CPU is seen at once, on any
machine and also when it costs little there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# One step at most. Kernels: 12 a layer and 16 besides, on each core.
MAX_SYNCS = 3
MAX_COPIES_H2D = 1
MAX_COPIES_D2H = 1
MAX_KERNELS_PER_LAYER, MAX_OTHER_KERNELS = 12, 16
GRAPH_KERNELS = 32  # tinygrad's smallest batch of kernels in a graph: a step has a graph for each of them at most
COUNTED = ("kernels", "graph_launches", "single_launches", "eager_kernels", "syncs", "copies_h2d", "copies_d2h")
COUNTED_BYTES = ("bytes_h2d", "bytes_d2h", "bytes")
GUARDED = (*COUNTED, "compilations", "captures", *COUNTED_BYTES, "moved_bytes")  # none of these may rise unseen


@dataclass(frozen=True)
class StepCounts:
    """The most that any step of one kind asked for, and what the model makes of it. `bytes` go between host and device,
    both ways; `moved_bytes` are those that the kernels touch in the device's own memory. `sampling_kernels`: of the
    recorded step, those that make a token of logits."""

    phase: str  # prefill or decode
    steps: int
    kernels: int
    graph_launches: int
    single_launches: int
    eager_kernels: int
    syncs: int
    copies_h2d: int
    copies_d2h: int
    bytes_h2d: int
    bytes_d2h: int
    compilations: int
    captures: int
    moved_bytes: int
    sampling_kernels: int
    output_bytes: int  # that a step hands to the host by right: tokens and their logprobs
    num_seqs: int
    kv_blocks: int  # in use
    device_bytes: int  # all buffers on the device
    details: tuple[str, ...] = ()  # what ran outside of recorded steps, and where

    @property
    def bytes(self) -> int:
        return self.bytes_h2d + self.bytes_d2h

    def as_json(self) -> dict[str, Any]:
        names = (*COUNTED, *COUNTED_BYTES, "compilations", "captures", "moved_bytes", "sampling_kernels")
        values = {name: getattr(self, name) for name in names}
        more = {"steps": self.steps, "num_seqs": self.num_seqs, "kv_blocks": self.kv_blocks}
        return values | more | {"device_bytes": self.device_bytes, "details": list(self.details)}


@dataclass(frozen=True)
class Finding:
    """Something that has no place in a step. `name` is one of a few, for programs; `text` has the numbers."""

    name: str
    text: str

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "text": self.text}


def find_faults(counts: StepCounts, *, num_layers: int, num_cores: int, vocab_size: int) -> list[Finding]:
    """What is wrong with a step by the limits above; the worst first."""
    checks = (
        _recompiles(counts),
        _runs_ungraphed(counts),
        _reads_logits(counts, vocab_size),
        _over("extra synchronisation", counts, "syncs", MAX_SYNCS, "waits for the device"),
        _over("extra copy to the device", counts, "copies_h2d", MAX_COPIES_H2D, "copies to the device"),
        _over("extra copy to the host", counts, "copies_d2h", MAX_COPIES_D2H, "copies to the host"),
        _over(
            "too many kernels",
            counts,
            "kernels",
            (MAX_KERNELS_PER_LAYER * num_layers + MAX_OTHER_KERNELS) * num_cores,
            "kernels",
        ),
        _over(
            "too many launches",
            counts,
            "graph_launches",
            max(1, -(-counts.kernels // GRAPH_KERNELS)),
            "launches of graphs",
        ),
    )
    return [finding for finding in checks if finding is not None]


def _recompiles(counts: StepCounts) -> Finding | None:
    if counts.captures:
        text = f"{counts.captures} graphs were captured during {counts.phase} steps: a bucket is missing at start"
        return Finding("recompilation", text)
    if counts.compilations and not counts.eager_kernels:
        text = f"a {counts.phase} step compiled {counts.compilations} schedules: all of it belongs to the start"
        return Finding("recompilation", text)
    return None


def _runs_ungraphed(counts: StepCounts) -> Finding | None:
    if not counts.eager_kernels:
        return None
    where = "; ".join(counts.details[:5])
    text = f"{counts.eager_kernels} kernels of a {counts.phase} step ran outside of its recorded graph: {where}"
    return Finding("un-graphed step", text)


def _reads_logits(counts: StepCounts, vocab_size: int) -> Finding | None:
    """Beyond its tokens, at least a row of half-precision logits."""
    if counts.bytes_d2h - counts.output_bytes < 2 * vocab_size and counts.sampling_kernels:
        return None
    if counts.bytes_d2h < 2 * vocab_size:
        return None
    read = f"a {counts.phase} step of {counts.num_seqs} sequences read {counts.bytes_d2h:,} bytes"
    if not counts.sampling_kernels:
        return Finding("sampler on the CPU", f"{read} and its graph has no sampling kernels: the host samples")
    return Finding("host copy of the logits", f"{read}, as many as logits have ({vocab_size:,} a row)")


def _over(name: str, counts: StepCounts, what: str, limit: int, words: str) -> Finding | None:
    value = getattr(counts, what)
    if value <= limit:
        return None
    return Finding(name, f"a {counts.phase} step has {value} {words}, where {limit} are the limit")
