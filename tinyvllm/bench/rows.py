"""The row of a measurement: the schema that all benchmarks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import Trust

LATENCY, THROUGHPUT = "latency", "throughput"  # kinds of rows


@dataclass(frozen=True)
class Machine:
    """The facts that all rows of a run share."""

    model: str
    dtype: str  # the format of most of the weights' bytes
    num_params: int
    model_bytes: int
    device: str
    bandwidth_gbps: float | None  # 1e9 bytes per second; None if no floor is computed
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)  # the engine's, as they were resolved


@dataclass(frozen=True)
class Row:
    """One case. When decoding and under load, a step is one replay of a graph. For a prefill it is the whole prompt,
    which may take several replays (`num_replays`); `kernels` and `nbytes` are sums over them."""

    test: str  # its name in llama-bench: pp512, tg32 @ d1024
    phase: str  # prefill, decode or throughput
    batch: int  # sequences
    context: int  # tokens per sequence that the pool holds before the first step
    num_tokens: int  # per sequence and repeat: prompt tokens computed, or tokens generated
    machine: Machine
    tok_s: Spread  # over repeats: tokens per second of all sequences together
    step_ms: Spread  # over all steps of all repeats
    num_replays: int = 1
    bucket: str | None = None
    kernels: int | None = None
    nbytes: int | None = None  # the minimum that a step must move
    weight_bytes: int | None = None
    kv_read_bytes: int | None = None
    kv_written_bytes: int | None = None
    state_bytes: int | None = None  # of recurrent layers, read and written
    moved_bytes: int | None = None  # what its kernels actually move, counted from their arguments
    trust: Trust | None = None  # of tok_s
    more: dict[str, Any] = field(default_factory=dict)  # fields of this benchmark only; JSON values or Spreads

    @property
    def floor_ms(self) -> float | None:
        """The time that the bytes of a step take at the memory's bandwidth."""
        if self.nbytes is None or self.machine.bandwidth_gbps is None:
            return None
        return self.nbytes / self.machine.bandwidth_gbps / 1e6

    @property
    def floor_share(self) -> float | None:
        """Floor over median step. 1: as fast as the memory allows."""
        return None if self.floor_ms is None else self.floor_ms / self.step_ms.median

    @property
    def bytes_ratio(self) -> float | None:
        """Moved bytes over the minimum. 1: the kernels move only weights, keys and values, each once."""
        return None if self.moved_bytes is None or self.nbytes is None else self.moved_bytes / self.nbytes

    def as_json(self) -> dict[str, Any]:
        """Flat, except for `environment` and the spreads of `more`."""
        machine = self.machine
        return {
            "kind": THROUGHPUT if self.phase == THROUGHPUT else LATENCY,
            "test": self.test,
            "phase": self.phase,
            "batch": self.batch,
            "context": self.context,
            "tokens": self.num_tokens,
            "model": machine.model,
            "dtype": machine.dtype,
            "params": machine.num_params,
            "model_bytes": machine.model_bytes,
            "device": machine.device,
            "tok_s": self.tok_s.mean,
            "tok_s_std": self.tok_s.std,
            "repeats": self.tok_s.count,
            **{f"step_ms_{name}": value for name, value in dataclasses.asdict(self.step_ms).items() if name != "count"},
            "steps": self.step_ms.count,
            "replays": self.num_replays,
            "bucket": self.bucket,
            "kernels": self.kernels,
            "bytes": self.nbytes,
            "weight_bytes": self.weight_bytes,
            "kv_read_bytes": self.kv_read_bytes,
            "kv_written_bytes": self.kv_written_bytes,
            "state_bytes": self.state_bytes,
            "moved_bytes": self.moved_bytes,
            "bytes_ratio": self.bytes_ratio,
            "bandwidth_gbps": machine.bandwidth_gbps,
            "floor_ms": self.floor_ms,
            "floor_share": self.floor_share,
            **{k: dataclasses.asdict(v) if isinstance(v, Spread) else v for k, v in self.more.items()},
            "trust": None if self.trust is None else self.trust.as_json(),
            "settings": machine.settings,
            "environment": machine.environment,
        }
