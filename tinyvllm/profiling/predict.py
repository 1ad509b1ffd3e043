"""How fast a model would decode on a chip that is not at hand: counted bytes, operations and kernels, and a few
measured factors. Every prediction lists them, and how far the same rule is off where a measurement exists.

    step = bytes / (bandwidth x its share) + operations / (peak x its share) + kernels x cost of one + host

Weights that have to be unpacked reach another share of the bandwidth than those that need not. The two first are added,
not overlapped: kernels of a decode step are short, and each waits for the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.config import ModelConfig
from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.chips import GB, Chip
from tinyvllm.profiling.roofline import Work, bytes_per_weight, count_work

KV_ITEMSIZE = 2  # float16


@dataclass(frozen=True)
class Factors:
    """Of a kind of device. What was measured, and where; what is assumed says so."""

    bandwidth_share: float
    quantized_share: float  # of the bandwidth, for weights that are unpacked on the way
    compute_share: float
    kernel_us: float
    host_us: float  # of a step, and of each sequence in it
    host_us_per_seq: float
    layer_kernels: tuple[int, int]  # of a layer: for one sequence, for more
    other_kernels: tuple[int, int]  # outside of layers
    sources: tuple[str, ...]


FACTORS = {
    "CUDA": Factors(
        bandwidth_share=0.9,
        quantized_share=0.36,
        compute_share=0.42,
        kernel_us=2.2,
        host_us=39,
        host_us_per_seq=1.1,
        layer_kernels=(5, 7),
        other_kernels=(5, 6),
        sources=(
            "bandwidth 90 %, 2.2 us a kernel and 42 % of the peak: fitted to three device times of a prototype of "
            "these kernels on an H200 (Llama-3.2-1B, float16, context 256: 0.760 ms at batch 1, 0.875 at 8, 1.333 at "
            "64)",
            "bandwidth 36 % for quantised weights: fitted to one figure, Q4_0 at batch 1 on the same chip",
            "host 39 us a step and 1.1 us a sequence, not overlapped: measured on that H200's host",
        ),
    ),
    "METAL": Factors(
        bandwidth_share=0.79,
        quantized_share=0.79,
        compute_share=0.42,
        kernel_us=4.0,
        host_us=90,
        host_us_per_seq=1.1,
        layer_kernels=(5, 7),
        other_kernels=(5, 6),
        sources=(
            "bandwidth 79 %: a 4-bit product of a matrix and a vector on an M1 Max, 315.7 of 400 GB/s "
            "(github.com/ggml-org/llama.cpp/pull/1642)",
            "4 us a kernel: a guess between the H200's 2.2 and the 6 us that akunu's book lists for its shortest",
            "42 % of the peak: taken from the H200",
            "host 90 us a step and 1.1 us a sequence: the H200's, and 50 us to commit and wait (akunu: 30 to 80)",
        ),
    ),
    "CPU": Factors(
        bandwidth_share=0.85,
        quantized_share=0.5,
        compute_share=0.85,
        kernel_us=1.5,
        host_us=150,
        host_us_per_seq=10,
        layer_kernels=(5, 5),
        other_kernels=(6, 6),
        sources=(
            "1.5 us a kernel: a call of the table and an exchange with the other core, 1.3 to 1.9 us measured",
            "85 % of NumPy's float32 rate: what the products of a prompt reach on two cores of an AMD EPYC",
            "85 % of the bandwidth: a guess; half of it for quantised weights: fitted to Q4_1 at batch 1, context 128",
            "host 150 us a step and 10 us a sequence: packing and reading, measured",
        ),
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Of one decode step."""

    chip: Chip
    batch: int
    context: int
    work: Work
    num_kernels: int
    memory_s: float
    compute_s: float
    kernels_s: float
    host_s: float
    assumptions: tuple[str, ...]

    @property
    def step_s(self) -> float:
        return self.memory_s + self.compute_s + self.kernels_s + self.host_s

    @property
    def tok_s(self) -> float:
        """Tokens of all sequences a second."""
        return self.batch / self.step_s

    @property
    def roof_tok_s(self) -> float:
        """What the memory alone allows."""
        return self.batch * self.chip.bandwidth_gbps * GB / self.work.nbytes

    def as_json(self) -> dict[str, object]:
        return {
            "chip": self.chip.name,
            "batch": self.batch,
            "context": self.context,
            "step_ms": self.step_s * 1e3,
            "tok_s": self.tok_s,
            "roof_tok_s": self.roof_tok_s,
            "bytes": self.work.nbytes,
            "flops": self.work.flops,
            "kernels": self.num_kernels,
            "memory_ms": self.memory_s * 1e3,
            "compute_ms": self.compute_s * 1e3,
            "kernels_ms": self.kernels_s * 1e3,
            "host_ms": self.host_s * 1e3,
            "assumptions": list(self.assumptions),
        }


def predict(config: ModelConfig, kind: str, chip: Chip, batch: int, context: int) -> Prediction:
    """One decode step of `batch` sequences with `context` tokens behind each, weights of `kind`, a float16 KV cache.
    Raises ProfilingError for weights that are not known."""
    if batch < 1 or context < 0:
        raise ProfilingError(f"a step has at least one sequence and no negative context, but {batch=} and {context=}")
    factors = FACTORS[chip.device]
    weights_share = factors.bandwidth_share if bytes_per_weight(kind) >= 2 else factors.quantized_share
    work = count_work(config, bytes_per_weight(kind), KV_ITEMSIZE, [(context, 1)] * batch)
    several = int(batch > 1)
    num_kernels = config.num_layers * factors.layer_kernels[several] + factors.other_kernels[several]
    return Prediction(
        chip,
        batch,
        context,
        work,
        num_kernels,
        memory_s=(work.weight_bytes / weights_share + work.kv_bytes / factors.bandwidth_share)
        / (chip.bandwidth_gbps * GB),
        compute_s=work.flops / (chip.half_tflops * 1e12 * factors.compute_share),
        kernels_s=num_kernels * factors.kernel_us * 1e-6,
        host_s=(factors.host_us + batch * factors.host_us_per_seq) * 1e-6,
        assumptions=(
            f"{chip.name}: {chip.bandwidth_gbps:,g} GB/s, {chip.half_tflops:,g} TFLOP/s ({chip.source})",
            f"{num_kernels} kernels: {factors.layer_kernels[several]} a layer, {factors.other_kernels[several]} more",
            *factors.sources,
        ),
    )


@dataclass(frozen=True)
class Measured:
    """A figure of docs/PERFORMANCE.md: one step after the other, with the host's part, which does not overlap. `chip`
    "cpu" is two cores of the AMD EPYC there."""

    chip: str
    shape: str
    kind: str
    batch: int
    context: int
    tok_s: float

    def error_of(self, prediction: Prediction) -> float:
        """The prediction over the measurement, less one: 0.1 is ten per cent too fast."""
        return prediction.tok_s / self.tok_s - 1


MEASURED = (
    Measured("h200", "llama-3.2-1b", "float16", 1, 256, 1141),
    Measured("h200", "llama-3.2-1b", "float16", 8, 256, 8339),
    Measured("h200", "llama-3.2-1b", "float16", 64, 256, 41544),
    Measured("h200", "llama-3.2-1b", "Q4_0", 1, 256, 1558),
    Measured("h200", "llama-3.2-1b", "Q4_0", 8, 256, 9988),
    Measured("h200", "llama-3.2-1b", "Q4_0", 64, 256, 42266),
    Measured("cpu", "smollm2-135m", "Q4_1", 1, 128, 203),
    Measured("cpu", "smollm2-135m", "Q4_1", 1, 1024, 122),
    Measured("cpu", "smollm2-135m", "Q4_1", 16, 128, 587),
    Measured("cpu", "smollm2-135m", "Q4_1", 16, 1024, 229),
)
