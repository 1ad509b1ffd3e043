"""The minimal bytes and operations of a step, and how close it comes to them: the roofline model (Williams, Waterman
and Patterson 2009, Communications of the ACM 52(4)).

GB is 1e9 bytes, GiB 2**30. An operation is a multiplication or an addition. Norms, rope, softmax and sampling are not
counted: together they are less than 1 % of the matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tinyvllm.config import ConvKind, ExpertsKind, LayerKind, ModelConfig
from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.chips import GB, Chip
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.kernels import Kernel, KernelRow, floor_s

# Bytes per weight on the device: ggml's blocks, with the 6-bit scales of K quants unpacked to one byte each.
BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "Q4_0": 0.5 + 2 / 32,
    "Q4_1": 0.5 + 4 / 32,
    "Q5_0": 0.625 + 2 / 32,
    "Q5_1": 0.625 + 4 / 32,
    "Q8_0": 1.0 + 2 / 32,
    "Q4_K": 0.5 + 20 / 256,
    "Q5_K": 0.625 + 20 / 256,
    "Q6_K": 0.75 + 18 / 256,
}


# For each token and element of a recurrent layer's matrices: the element decays, and its products with the key, with
# what is new of the value and with the query are added up.
OPERATIONS_A_STATE = 7


@dataclass(frozen=True)
class Work:
    """The minimal work of one step. Bytes: each weight once, of experts as many as are expected to be chosen; keys and
    values of the context, or of its part that is in a layer's window, and those written; the recurrent state of each
    sequence, read and written. Of the embedding table only the tokens' rows count, unless it is also the head, which is
    read whole."""

    weight_bytes: float
    kv_read_bytes: float
    kv_written_bytes: float
    matrix_flops: float  # including the head's
    attention_flops: float  # and the recurrent layers'
    state_bytes: float = 0.0

    @property
    def kv_bytes(self) -> float:
        return self.kv_read_bytes + self.kv_written_bytes

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.state_bytes

    @property
    def flops(self) -> float:
        return self.matrix_flops + self.attention_flops


@dataclass(frozen=True)
class WeightBytes:
    """Bytes per weight on the device: of the layers' matrices, and of the embedding and the head. `name`: the formats
    in words."""

    name: str
    layers: float
    table: float

    @classmethod
    def of_kind(cls, kind: str) -> WeightBytes:
        """All matrices in one format. Raises ProfilingError for an unknown one."""
        size = bytes_per_weight(kind)
        return cls(kind, size, size)


def weights_of(config: ModelConfig) -> tuple[int, int]:
    """(weights in the matrices of all layers, weights in one matrix of V rows: the embedding, or the head)."""
    attention = sum(_attention_weights(kind, config.hidden_size) for kind in config.layers)
    per_layer_embeddings = 3 * config.num_layers * config.per_layer_size
    in_layers = attention + config.hidden_size * (3 * sum(config.dense_sizes) + per_layer_embeddings)
    if config.experts is not None:
        kind, count = config.experts, len(config.sparse_layers)
        router = kind.num_experts + kind.has_shared_gate
        in_layers += count * config.hidden_size * (router + 3 * kind.shared_size + 3 * kind.num_experts * kind.ffn_size)
    return in_layers, config.vocab_size * config.hidden_size


def weights_in_experts(config: ModelConfig, num_experts: float) -> float:
    """Weights of `num_experts` experts in every sparse layer, without shared ones."""
    if config.experts is None:
        return 0.0
    return len(config.sparse_layers) * 3 * config.hidden_size * config.experts.ffn_size * num_experts


def experts_touched(kind: ExpertsKind, num_tokens: int) -> float:
    """How many experts some of `num_tokens` tokens are expected to choose, if each chooses any k of them: one is left
    out by all with a probability of (1 - k / E) ** T."""
    return kind.num_experts * (1 - (1 - kind.top_k / kind.num_experts) ** num_tokens)


def _attention_weights(kind: LayerKind, hidden_size: int) -> int:
    latent, state = kind.latent, kind.state
    if isinstance(state, ConvKind):
        return 4 * hidden_size * state.num_channels  # b, c and x, and the output
    if state is not None:
        projected = state.conv_size + state.value_size + 2 * state.num_heads  # q, k, v; z; b and a
        return hidden_size * (projected + state.value_size)
    if latent is None:
        gate = kind.q_size if kind.has_output_gate else 0
        return hidden_size * (2 * kind.q_size + gate + (2 * kind.kv_size if kind.kv_layer is None else 0))
    queries = hidden_size * kind.q_size
    if latent.query_rank is not None:
        queries = latent.query_rank * (hidden_size + kind.q_size)
    expanded = kind.num_heads * (latent.nope_dim + latent.value_dim)
    out = kind.num_heads * latent.value_dim
    return queries + hidden_size * (latent.stored_dim + out) + latent.rank * expanded


def operations_a_key(kind: LayerKind) -> int:
    """Operations of a layer's attention for each key that a token attends to, of all heads: two for each element of
    the keys, and of the values. Of latents, which all heads share, the whole is the key, and `rank` elements are the
    value."""
    if kind.latent is None:
        return 4 * kind.q_size
    return 2 * kind.num_heads * (kind.latent.stored_dim + kind.latent.rank)


def attended_keys(start: int, count: int, window: int | None = None) -> int:
    """Keys that tokens [start, start + count) of a sequence attend to, each its own and those before it, added up."""
    if window is None or start + count <= window:
        return count * start + count * (count + 1) // 2
    partly = max(0, min(count, window - start))  # tokens whose window reaches back to the first
    return attended_keys(start, partly) + (count - partly) * window


def earlier_keys(start: int, window: int | None = None) -> int:
    """How many of the `start` tokens before a step its tokens attend to: in a window, those that its first reaches."""
    return start if window is None else min(start, window - 1)


def count_work(
    config: ModelConfig,
    weights: WeightBytes | float,
    kv_itemsize: float,
    entries: Iterable[tuple[int, int]],
    num_sampled: int | None = None,
) -> Work:
    """Count the work of a step from the model's sizes. `entries`: (tokens before this step, tokens computed in it) for
    each sequence. `weights`: bytes of one; `kv_itemsize`: of an element of keys and values, with its share of a scale.
    `num_sampled`: rows of logits; by default one per sequence."""
    entries = list(entries)
    layer_size, table_size = (weights, weights) if isinstance(weights, float) else (weights.layers, weights.table)
    num_tokens = sum(count for _, count in entries)
    num_rows = len(entries) if num_sampled is None else num_sampled
    in_layers, in_table = weights_of(config)
    idle, unused = 0.0, 0.0  # weights of experts that no token, and that one token, passes by
    if config.experts is not None:
        kind = config.experts
        idle = weights_in_experts(config, kind.num_experts - experts_touched(kind, num_tokens))
        unused = weights_in_experts(config, kind.num_experts - kind.top_k)
    kv_token = config.kv_bytes_per_token(kv_itemsize)
    return Work(
        weight_bytes=layer_size * (in_layers - idle)
        + table_size * (in_table + (0 if config.tie_embeddings else num_tokens * config.hidden_size)),
        kv_read_bytes=sum(
            kv_itemsize
            * kind.stored_elements
            * sum(earlier_keys(start, config.kv_window(layer)) for start, _ in entries)
            for layer, kind in enumerate(config.layers)
            if kind.stores_kv
        ),
        kv_written_bytes=kv_token * num_tokens,
        matrix_flops=2 * (num_tokens * (in_layers - unused) + num_rows * in_table),
        attention_flops=sum(
            operations_a_key(kind) * attended_keys(start, count, kind.window)
            for kind in config.layers
            for start, count in entries
        )
        + OPERATIONS_A_STATE * num_tokens * sum(state.matrix_elements for state in config.states.values()),
        state_bytes=2 * len(entries) * config.state_bytes,
    )


def bytes_per_weight(kind: str) -> float:
    """Bytes per weight of a format. Raises ProfilingError for an unknown one."""
    found = {name.lower(): size for name, size in BYTES_PER_WEIGHT.items()}.get(kind.lower())
    if found is None:
        raise ProfilingError(f"weight format {kind!r} is not known; known: {', '.join(BYTES_PER_WEIGHT)}")
    return found


TIMED_S = 5e-6  # a shorter kernel's time is too uncertain for a rate
LARGE_BYTES = (
    1 << 20
)  # what a kernel reads beyond this are weights or keys, which a step reads once: no cache keeps them
ROOM, LEAST_SHARE = 1.02, 0.01  # rows above this share of the roof, with this share of the time, get a warning


def raise_roof(chip: Chip, kernels: Sequence[Kernel]) -> Chip:
    """Raise the roofs of a chip whose rates were measured to what a kernel just reached: a test of a second finds too
    little on a busy machine. Rates from the table of chips stay as they are."""
    if not chip.is_measured:
        return chip
    timed = [kernel for kernel in kernels if kernel.seconds >= TIMED_S]
    tflops = max((kernel.flops / kernel.seconds for kernel in timed if kernel.flops), default=0.0) / 1e12
    large = [kernel for kernel in timed if kernel.flops and (kernel.nbytes or 0) >= LARGE_BYTES]
    gbps = max(((kernel.nbytes or 0) / kernel.seconds for kernel in large), default=0.0) / GB
    notes = []
    if tflops > chip.half_tflops:
        notes.append(f"the test found {chip.half_tflops:.3g} TFLOP/s, but a kernel reached {tflops:.3g}")
    if gbps > chip.bandwidth_gbps:
        notes.append(f"the test found {chip.bandwidth_gbps:,.1f} GB/s, but a kernel reached {gbps:,.1f}")
    return replace(
        chip,
        half_tflops=max(tflops, chip.half_tflops),
        bandwidth_gbps=max(gbps, chip.bandwidth_gbps),
        source="; ".join([chip.source, *notes]),
    )


def row_warnings(rows: Sequence[KernelRow], chip: Chip) -> list[str]:
    """A warning for each row that is faster than the chip allows, except for rows of almost no time: these have so few
    values that they come from a cache."""
    return [
        f"{row.label} is at {row.roof_share:.0%} of the roof of {chip.name}: its bytes came from a cache, a count is "
        "wrong, or this is another chip"
        for row in rows
        if row.roof_share is not None and row.roof_share > ROOM and row.share >= LEAST_SHARE
    ]


@dataclass(frozen=True)
class Roofline:
    """A step of `nbytes` and `flops` that took `seconds`, under a chip's roofline."""

    chip: Chip
    nbytes: float
    flops: float
    seconds: float

    @property
    def memory_s(self) -> float:
        return floor_s(self.chip, self.nbytes, 0)

    @property
    def compute_s(self) -> float:
        return floor_s(self.chip, 0, self.flops)

    @property
    def floor_s(self) -> float:
        """The minimal time."""
        return max(self.memory_s, self.compute_s)

    @property
    def utilization(self) -> float:
        """Minimal time over time taken. 1: as fast as the chip allows."""
        return self.floor_s / self.seconds

    @property
    def is_memory_bound(self) -> bool:
        """Whether its operations per byte are below the knee of the roofline."""
        return self.memory_s >= self.compute_s

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.nbytes

    @property
    def knee(self) -> float:
        """Operations per byte at which memory and arithmetic take equally long."""
        return self.chip.half_tflops * 1e12 / (self.chip.bandwidth_gbps * GB)

    @property
    def achieved_gbps(self) -> float:
        return self.nbytes / self.seconds / GB

    @property
    def achieved_tflops(self) -> float:
        return self.flops / self.seconds / 1e12

    def warnings(self) -> list[str]:
        """Impossible results: above 100 %, a count or the chip's figure must be wrong; it is not that fast."""
        found = []
        if self.memory_s > self.seconds:
            found.append(
                f"{rounded(self.achieved_gbps)} GB/s is {self.memory_s / self.seconds:.0%} of the peak of "
                f"{self.chip.name} ({rounded(self.chip.bandwidth_gbps)} GB/s): a byte count is wrong, this is another "
                "chip, or the bytes fit into a cache"
            )
        if self.compute_s > self.seconds:
            found.append(
                f"{rounded(self.achieved_tflops)} TFLOP/s is {self.compute_s / self.seconds:.0%} of the peak of "
                f"{self.chip.name} ({rounded(self.chip.half_tflops)}): an operation count is wrong, or this is "
                "another chip"
            )
        return found

    def as_json(self) -> dict[str, object]:
        return {
            "chip": self.chip.name,
            "chip_source": self.chip.source,
            "bandwidth_gbps": self.chip.bandwidth_gbps,
            "half_tflops": self.chip.half_tflops,
            "bytes": self.nbytes,
            "flops": self.flops,
            "seconds": self.seconds,
            "floor_s": self.floor_s,
            "utilization": self.utilization,
            "intensity": self.intensity,
            "knee": self.knee,
            "achieved_gbps": self.achieved_gbps,
            "achieved_tflops": self.achieved_tflops,
            "bound": "memory" if self.is_memory_bound else "compute",
            "warnings": self.warnings(),
        }
