"""What a step asks of the device, counted and compared with limits: anything that does not belong in a step is a fault.

Times are noisy and counts are not. So a hidden copy, an extra wait or a fallback to the CPU shows up at once, on any
machine, even where it costs little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Limits of one step. Kernels: 12 per layer plus 16, on each core.
MAX_SYNCS = 3
MAX_COPIES_H2D = 1
MAX_COPIES_D2H = 1
MAX_KERNELS_PER_LAYER, MAX_OTHER_KERNELS = 12, 16
GRAPH_KERNELS = 32  # tinygrad's smallest batch of kernels in a graph: at most one graph for each batch
COUNTED = (
    "kernels",
    "barriers",
    "graph_launches",
    "single_launches",
    "eager_kernels",
    "syncs",
    "copies_h2d",
    "copies_d2h",
)
COUNTED_BYTES = ("bytes_h2d", "bytes_d2h", "bytes")
GUARDED = (
    *COUNTED,
    "compilations",
    "captures",
    *COUNTED_BYTES,
    "moved_bytes",
)  # a rise of any of these is a regression
# Numbers beside them that may rise: of steps, sequences and blocks, of kernels already counted, and of memory.
UNGUARDED = ("steps", "num_seqs", "kv_blocks", "sampling_kernels", "output_bytes", "device_bytes")


@dataclass(frozen=True)
class StepCounts:
    """The maximum of each count over all steps of one phase.

    `bytes`: copied between host and device, both directions. `moved_bytes`: read and written by kernels in the device's
    own memory. `sampling_kernels`: kernels of the recorded step that turn logits into tokens."""

    phase: str  # prefill or decode
    steps: int
    kernels: int
    barriers: int  # at which a kernel waits for an earlier one
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
    output_bytes: int  # that the host needs from a step: tokens and their logprobs
    num_seqs: int
    kv_blocks: int  # in use
    device_bytes: int  # all buffers on the device
    details: tuple[str, ...] = ()  # what ran outside the recorded steps, and where

    @property
    def bytes(self) -> int:
        return self.bytes_h2d + self.bytes_d2h

    def as_json(self) -> dict[str, Any]:
        names = (*COUNTED, *COUNTED_BYTES, "compilations", "captures", "moved_bytes", "sampling_kernels")
        values = {name: getattr(self, name) for name in names}
        more = {"steps": self.steps, "num_seqs": self.num_seqs, "kv_blocks": self.kv_blocks}
        return values | more | {"device_bytes": self.device_bytes, "details": list(self.details)}


@dataclass(frozen=True)
class Fault:
    """Something that does not belong in a step. `name`: one of a fixed set, for programs; `text`: the numbers."""

    name: str
    text: str

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "text": self.text}


def limits_of_a_step(num_kernels: int, *, num_layers: int, num_cores: int) -> dict[str, int]:
    """The maximum of each count of a step, by name. `num_kernels`: the kernels that the step has."""
    return {
        "kernels": (MAX_KERNELS_PER_LAYER * num_layers + MAX_OTHER_KERNELS) * num_cores,
        "graph_launches": max(1, -(-num_kernels // GRAPH_KERNELS)),
        "syncs": MAX_SYNCS,
        "copies_h2d": MAX_COPIES_H2D,
        "copies_d2h": MAX_COPIES_D2H,
        "eager_kernels": 0,
        "compilations": 0,
    }


def find_faults(counts: StepCounts, *, num_layers: int, num_cores: int, vocab_size: int) -> list[Fault]:
    """Everything that breaks the limits above, the worst first."""
    limits = limits_of_a_step(counts.kernels, num_layers=num_layers, num_cores=num_cores)
    checks = (
        _recompiles(counts),
        _runs_ungraphed(counts),
        _reads_logits(counts, vocab_size),
        _over("extra synchronization", counts, "syncs", MAX_SYNCS, "waits for the device"),
        _over("extra copy to the device", counts, "copies_h2d", MAX_COPIES_H2D, "copies to the device"),
        _over("extra copy to the host", counts, "copies_d2h", MAX_COPIES_D2H, "copies to the host"),
        _over("too many kernels", counts, "kernels", limits["kernels"], "kernels"),
        _over("too many launches", counts, "graph_launches", limits["graph_launches"], "launches of graphs"),
    )
    return [finding for finding in checks if finding is not None]


def _recompiles(counts: StepCounts) -> Fault | None:
    if counts.captures:
        text = f"{counts.captures} graphs were captured during {counts.phase} steps: buckets are missing at the start"
        return Fault("recompilation", text)
    if counts.compilations and not counts.eager_kernels:
        text = f"a {counts.phase} step compiled {counts.compilations} schedules: compiling belongs to the start"
        return Fault("recompilation", text)
    return None


def _runs_ungraphed(counts: StepCounts) -> Fault | None:
    if not counts.eager_kernels:
        return None
    where = "; ".join(counts.details[:5])
    text = f"{counts.eager_kernels} kernels of a {counts.phase} step ran outside its recorded graph: {where}"
    return Fault("un-graphed step", text)


def _reads_logits(counts: StepCounts, vocab_size: int) -> Fault | None:
    """A step that reads at least one row of half-precision logits beyond its tokens."""
    if counts.bytes_d2h - counts.output_bytes < 2 * vocab_size and counts.sampling_kernels:
        return None
    if counts.bytes_d2h < 2 * vocab_size:
        return None
    read = f"a {counts.phase} step of {counts.num_seqs} sequences read {counts.bytes_d2h:,} bytes"
    if not counts.sampling_kernels:
        return Fault("sampler on the CPU", f"{read} and its graph has no sampling kernels: the host samples")
    return Fault("host copy of the logits", f"{read}, enough for logits ({vocab_size:,} per row)")


def _over(name: str, counts: StepCounts, what: str, limit: int, words: str) -> Fault | None:
    value = getattr(counts, what)
    if value <= limit:
        return None
    return Fault(name, f"a {counts.phase} step has {value} {words}, above the limit of {limit}")
