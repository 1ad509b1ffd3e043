"""Predict how fast a model runs on a chip that is not available, from counted bytes, operations and kernels and a few
measured factors. Every prediction lists the factors, and the error of the same rule where measurements exist.

    step = bytes / (bandwidth x its share) + operations / (peak x its share) + kernels x cost of one + host

Quantized weights reach another share of the bandwidth than unquantized ones. The first two terms are added, not
overlapped: kernels are short, and each waits for the previous one. The shares of the bandwidth were measured on
products of a matrix and a single row, so they include the arithmetic of that row; only the operations of further rows
are added.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from tinyvllm.config import FLOAT16_KV, KVFormats, ModelConfig
from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.apple import StepArithmetic, overlap_line
from tinyvllm.profiling.chips import CHIPS, GB, Chip
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.kernels import floor_s
from tinyvllm.profiling.roofline import BYTES_PER_WEIGHT, WeightBytes, Work, count_work

FEW_ROWS = 64  # steps of up to this many rows have kernels of their own; above, they use those of prompts


@dataclass(frozen=True)
class Factors:
    """The factors of one kind of device. `sources` says what was measured and where, and what is assumed."""

    bandwidth_share: float
    quantized_share: float  # of the bandwidth, for quantized weights
    compute_share: float  # of the peak, for products of at most FEW_ROWS rows
    prompt_share: float  # of the peak, for more rows and for a prompt's attention
    attention_share: float  # of the peak, for a decode step's attention
    kernel_us: float
    host_us: float  # per step, plus host_us_per_seq for each sequence
    host_us_per_seq: float
    layer_kernels: tuple[int, int, int]  # per layer: for one sequence, for more, for a prompt
    sparse_kernels: tuple[int, int, int]  # as many more in a layer with experts
    other_kernels: tuple[int, int, int]  # the same, outside layers
    sources: tuple[str, ...]


FACTORS = {
    "CUDA": Factors(
        bandwidth_share=0.94,
        quantized_share=0.78,
        compute_share=0.8,
        prompt_share=0.675,
        attention_share=0.34,
        kernel_us=2.2,
        host_us=5,
        host_us_per_seq=0,
        layer_kernels=(5, 7, 8),
        sparse_kernels=(2, 3, 3),
        other_kernels=(4, 4, 7),
        sources=(
            "bandwidth 94 %, 78 % for quantized weights, 80 % of the peak for up to 64 rows, 34 % for decoding's "
            "attention and 2.2 us per kernel: fitted to 21 steps of Llama-3.2-1B and 3.1-8B on an H200 "
            "(docs/PERFORMANCE.md)",
            "67.5 % of the peak for more rows and for prompts: fitted to the same, at that GPU's limit of 700 W",
            "host 5 us per step: it prepares a step while the device computes the one before",
        ),
    ),
    "METAL": Factors(
        bandwidth_share=0.79,
        quantized_share=0.79,
        compute_share=0.42,
        prompt_share=0.74,
        attention_share=0.42,
        kernel_us=2.4,
        host_us=90,
        host_us_per_seq=1.1,
        layer_kernels=(5, 7, 8),
        sparse_kernels=(2, 3, 3),
        other_kernels=(4, 4, 7),
        sources=(
            "bandwidth 79 %: a 4-bit matrix-vector product on an M1 Max, 315.7 of 400 GB/s "
            "(github.com/ggml-org/llama.cpp/pull/1642). llama.cpp's whole steps reach 80 % on an M4 (Llama-3.1-8B "
            "Q4_K_M, 4.62 GB per token, 20.9 tok/s: github.com/brand-o/normiebench/issues/3)",
            "2.4 us per kernel that waits for the previous one in the same command buffer: 3,200 of them in 7.7 ms on "
            "an M3 Ultra, minus 16 borders of 20 us (github.com/ml-explore/mlx/issues/4521)",
            "42 % of the peak for decoding's attention, and for up to 64 rows unless their kernels are counted: what "
            "kernels like METAL's reached on an H200, decoding 64 sequences",
            "74 % for prompts unless their kernels are counted: about 85 % by counts, of which a prompt keeps 89 %",
            "host 90 us per step and 1.1 us per sequence: the H200's, plus 50 us to commit and wait (akunu: 30 to 80)",
        ),
    ),
    "CPU": Factors(
        bandwidth_share=0.85,
        quantized_share=0.47,
        compute_share=0.85,
        prompt_share=0.85,
        attention_share=0.1,
        kernel_us=1.5,
        host_us=150,
        host_us_per_seq=10,
        layer_kernels=(5, 5, 5),
        sparse_kernels=(2, 4, 4),
        other_kernels=(6, 6, 6),
        sources=(
            "1.5 us per kernel: one call through the table and one exchange with the other core, 1.3 to 1.9 us "
            "measured",
            "85 % of NumPy's float32 rate: what a prompt's products reach on two cores of an AMD EPYC",
            "10 % of it for the attention of a decode step, with its exponentials and float16 conversions: from the "
            "cost of 896 more tokens of context at batch 1 and 16, 22 and 28 GFLOP/s of 262; 85 % for a prompt's "
            "attention, like its products",
            "85 % of the bandwidth: a guess; 47 % for quantized weights: fitted to Q4_1 at batch 1, context 128",
            "host 150 us per step and 10 us per sequence: packing and reading, measured",
        ),
    ),
}


@dataclass(frozen=True)
class Prediction:
    """The prediction for one decode step, or for a whole prompt. `prompt`: its tokens; 0 for a decode step."""

    chip: Chip
    batch: int
    context: int
    prompt: int
    work: Work
    num_kernels: int
    memory_s: float
    compute_s: float
    kernels_s: float
    host_s: float
    assumptions: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """Seconds of the step; for a prompt, of all its steps."""
        return self.memory_s + self.compute_s + self.kernels_s + self.host_s

    @property
    def num_tokens(self) -> int:
        return self.prompt or self.batch

    @property
    def tok_s(self) -> float:
        """Tokens per second of all sequences together."""
        return self.num_tokens / self.step_s

    @property
    def roof_tok_s(self) -> float:
        """The rate that the chip allows: limited by its memory or its arithmetic, whichever takes longer."""
        return self.num_tokens / floor_s(self.chip, self.work.nbytes, self.work.flops)

    def as_json(self) -> dict[str, object]:
        return {
            "chip": self.chip.name,
            "batch": self.batch,
            "context": self.context,
            "prefill": self.prompt or None,
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


def predict(
    config: ModelConfig,
    kind: str | WeightBytes,
    chip: Chip,
    batch: int,
    context: int,
    kv: KVFormats = FLOAT16_KV,
    arithmetic: StepArithmetic | None = None,
) -> Prediction:
    """Predict one decode step of `batch` sequences with `context` tokens each, weights in format `kind`, and keys and
    values in `kv`. `arithmetic`: the products' share of the peak by counts, whose time is not added to that of the
    weights, but overlaps it. Raises ProfilingError for an unknown format."""
    weights = WeightBytes.of_kind(kind) if isinstance(kind, str) else kind
    if batch < 1 or context < 0:
        raise ProfilingError(f"a step needs at least one sequence and no negative context: {batch=}, {context=}")
    work = count_work(config, weights, kv.bytes_per_element, [(context, 1)] * batch)
    factors = FACTORS[chip.device]
    setup = _Setup(weights, chip, num_steps=1, column=int(batch > 1))
    if arithmetic is None:
        share = factors.compute_share if batch <= FEW_ROWS else factors.prompt_share
        compute_s = _compute_s(chip, work.matrix_flops * (batch - 1) / batch, share)
    else:
        products_s = _compute_s(chip, work.matrix_flops, arithmetic.products)
        compute_s = max(0.0, products_s - setup.weights_s(work))
    compute_s += _compute_s(chip, work.attention_flops, factors.attention_share)
    prediction = setup.prediction(config, work, compute_s, batch=batch, context=context, prompt=0)
    lines = () if arithmetic is None else (overlap_line(), *arithmetic.lines)
    return replace(prediction, assumptions=prediction.assumptions + lines)


def predict_prompt(
    config: ModelConfig,
    kind: str | WeightBytes,
    chip: Chip,
    num_tokens: int,
    step_tokens: int,
    num_rows: int = 1,
    arithmetic: StepArithmetic | None = None,
    kv: KVFormats = FLOAT16_KV,
) -> Prediction:
    """Predict a single prompt of `num_tokens`, computed `step_tokens` at a time. `num_rows`: rows of logits in each
    step, one for each sequence that the engine allows; `arithmetic`: the shares of the peak by counts, instead of the
    factor's. Otherwise like `predict`."""
    if min(num_tokens, step_tokens, num_rows) < 1:
        raise ProfilingError(f"counts of a prompt must be at least 1, but {num_tokens=}, {step_tokens=}, {num_rows=}")
    spans = [(start, min(step_tokens, num_tokens - start)) for start in range(0, num_tokens, step_tokens)]
    weights = WeightBytes.of_kind(kind) if isinstance(kind, str) else kind
    steps = [count_work(config, weights, kv.bytes_per_element, [span], num_rows) for span in spans]
    work = Work(*(sum(values) for values in zip(*map(astuple, steps), strict=True)))
    matrix_flops = sum(step.matrix_flops * (count - 1) / count for step, (_, count) in zip(steps, spans, strict=True))
    share = FACTORS[chip.device].prompt_share
    shares = (share, share) if arithmetic is None else (arithmetic.products, arithmetic.attention)
    compute_s = _compute_s(chip, matrix_flops, shares[0]) + _compute_s(chip, work.attention_flops, shares[1])
    setup = _Setup(weights, chip, num_steps=len(spans), column=2)
    prediction = setup.prediction(config, work, compute_s, batch=1, context=0, prompt=num_tokens)
    lines = () if arithmetic is None else arithmetic.lines
    return replace(prediction, assumptions=prediction.assumptions + lines)


def _compute_s(chip: Chip, flops: float, share: float) -> float:
    return flops / (chip.half_tflops * 1e12 * share)


@dataclass(frozen=True)
class _Setup:
    """What is predicted. `column`: which of the kernel counts applies."""

    weights: WeightBytes
    chip: Chip
    num_steps: int
    column: int

    def weights_s(self, work: Work) -> float:
        """Until all weights are read."""
        factors = FACTORS[self.chip.device]
        share = factors.bandwidth_share if self.weights.layers >= 2 else factors.quantized_share
        return work.weight_bytes / (self.chip.bandwidth_gbps * GB * share)

    def prediction(
        self, config: ModelConfig, work: Work, compute_s: float, *, batch: int, context: int, prompt: int
    ) -> Prediction:
        chip, factors = self.chip, FACTORS[self.chip.device]
        layer, others = factors.layer_kernels[self.column], factors.other_kernels[self.column]
        sparse, more = len(config.sparse_layers), factors.sparse_kernels[self.column]
        num_kernels = self.num_steps * (config.num_layers * layer + sparse * more + others)
        states_s = (work.kv_bytes + work.state_bytes) / (chip.bandwidth_gbps * GB * factors.bandwidth_share)
        return Prediction(
            chip,
            batch,
            context,
            prompt,
            work,
            num_kernels,
            memory_s=self.weights_s(work) + states_s,
            compute_s=compute_s,
            kernels_s=num_kernels * factors.kernel_us * 1e-6,
            host_s=self.num_steps * (factors.host_us + batch * factors.host_us_per_seq) * 1e-6,
            assumptions=(
                f"{chip.name}: {rounded(chip.bandwidth_gbps)} GB/s, {rounded(chip.half_tflops)} TFLOP/s "
                f"({chip.source})",
                f"{num_kernels} kernels: {layer} per layer, {others} more per step"
                + (f", {more} more per layer with experts" if sparse else ""),
                *factors.sources,
            ),
        )


@dataclass(frozen=True)
class Measured:
    """A measurement in docs/PERFORMANCE.md or docs/EXPERIMENTS.md: a decode step, or, if `prompt` is not 0, a prompt
    computed `step_tokens` at a time with `num_rows` rows of logits."""

    chip: Chip
    shape: str
    kind: str | WeightBytes
    tok_s: float
    batch: int = 1
    context: int = 0
    prompt: int = 0
    step_tokens: int = 0
    num_rows: int = 1

    @property
    def title(self) -> str:
        work = f"batch {self.batch}, context {self.context}"
        if self.prompt:
            work = f"prompt of {self.prompt} with logits of {self.num_rows}"
        kind = self.kind if isinstance(self.kind, str) else self.kind.name
        return f"{self.shape} {kind} on {self.chip.name}, {work}"

    def predict(self, config: ModelConfig) -> Prediction:
        """The prediction for the same work. `config`: that of the shape."""
        if self.prompt:
            return predict_prompt(config, self.kind, self.chip, self.prompt, self.step_tokens, self.num_rows)
        return predict(config, self.kind, self.chip, self.batch, self.context)

    def error_of(self, prediction: Prediction) -> float:
        """Prediction over measurement, minus one: 0.1 means 10 % too fast."""
        return prediction.tok_s / self.tok_s - 1


H200 = CHIPS["h200"]
EPYC = Chip(
    "two EPYC cores",
    44.6,
    0.262,
    "measured idle: docs/PROFILING.md, 57 GFLOP in 0.227 s at 96 % of NumPy's rate",
    "CPU",
)
SMOLLM2 = WeightBytes("Q4_1, embedding and head Q8_0", BYTES_PER_WEIGHT["Q4_1"], BYTES_PER_WEIGHT["Q8_0"])
MEASURED = (
    Measured(H200, "llama-3.2-1b", "float16", 1349, batch=1, context=128),
    Measured(H200, "llama-3.2-1b", "float16", 9789, batch=8, context=128),
    Measured(H200, "llama-3.2-1b", "float16", 63063, batch=64, context=128),
    Measured(H200, "llama-3.2-1b", "float16", 123352, batch=256, context=128),
    Measured(H200, "llama-3.2-1b", "Q4_0", 2740, batch=1, context=128),
    Measured(H200, "llama-3.2-1b", "Q4_0", 15806, batch=8, context=128),
    Measured(H200, "llama-3.2-1b", "Q4_0", 83586, batch=64, context=128),
    Measured(H200, "llama-3.2-1b", "float16", 203229, prompt=512, step_tokens=8192, num_rows=16),
    Measured(H200, "llama-3.2-1b", "float16", 282686, prompt=2048, step_tokens=8192, num_rows=16),
    Measured(H200, "llama-3.1-8b", "float16", 264.5, batch=1, context=128),
    Measured(H200, "llama-3.1-8b", "float16", 2040, batch=8, context=128),
    Measured(H200, "llama-3.1-8b", "float16", 14139, batch=64, context=128),
    Measured(H200, "llama-3.1-8b", "float16", 26864, batch=256, context=128),
    Measured(H200, "llama-3.1-8b", "Q4_K", 764, batch=1, context=128),
    Measured(H200, "llama-3.1-8b", "Q4_K", 746, batch=1, context=1000),
    Measured(H200, "llama-3.1-8b", "Q4_K", 611, batch=1, context=8000),
    Measured(H200, "llama-3.1-8b", "Q4_K", 3851, batch=8, context=128),
    Measured(H200, "llama-3.1-8b", "Q4_K", 1959, batch=8, context=8000),
    Measured(H200, "llama-3.1-8b", "Q4_K", 18869, batch=64, context=128),
    Measured(H200, "llama-3.1-8b", "float16", 38334, prompt=512, step_tokens=8192, num_rows=16),
    Measured(H200, "llama-3.1-8b", "float16", 42422, prompt=2048, step_tokens=8192, num_rows=16),
    Measured(EPYC, "smollm2-135m", SMOLLM2, 171.8, batch=1, context=128),
    Measured(EPYC, "smollm2-135m", SMOLLM2, 117.8, batch=1, context=1024),
    Measured(EPYC, "smollm2-135m", SMOLLM2, 552, batch=16, context=128),
    Measured(EPYC, "smollm2-135m", SMOLLM2, 219, batch=16, context=1024),
    Measured(EPYC, "smollm2-135m", SMOLLM2, 875, prompt=512, step_tokens=256),
)
