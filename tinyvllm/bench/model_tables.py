"""The tables of docs/MODELS.md: what the usual sizes of models take, and how fast they should be on the usual machines.

Speeds are predicted (profiling/predict.py) for one sequence with CONTEXT tokens. `scripts/models_table.py` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.bench.shapes import SHAPES
from tinyvllm.config import ModelConfig
from tinyvllm.profiling.chips import CHIPS, GB, Chip
from tinyvllm.profiling.predict import FACTORS, predict
from tinyvllm.profiling.roofline import bytes_per_weight, weights_in_experts, weights_of

CONTEXT = 1024  # tokens before the predicted step
KV_ITEMSIZE = 2
MODELS = (
    "llama-3.2-1b",
    "gemma-3-1b",
    "phi-4-mini",
    "qwen3-4b",
    "gemma-3-4b",
    "mistral-7b-v0.1",
    "qwen2.5-7b",
    "llama-3.1-8b",
    "qwen3-8b",
    "gemma-3-12b",
    "mistral-small-24b",
    "qwen2.5-32b",
    "llama-3.1-70b",
)
# With experts, recurrent layers or latents: predictions of their speed have not been compared with measurements
SPARSE_AND_HYBRID = (
    "lfm2-1.2b",
    "qwen3.5-0.8b",
    "qwen3.5-27b",
    "qwen3.5-35b-a3b",
    "qwen3-next-80b-a3b",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "glm-4.7-flash",
    "gemma-4-26b-a4b",
    "mixtral-8x7b",
)
CONTEXTS = (4096, 32768)
LAPTOP = Chip("laptop CPU", 89.6, 0.5, "two channels of DDR5-5600: 128 bits x 5600 MT/s; its rate is assumed", "CPU")
# Share of the memory that the engine takes by default: of a Mac two thirds (three quarters above 36 GB) are for the GPU
SHARES = {"METAL": 0.8, "CUDA": 0.9, "CPU": 0.5}


@dataclass(frozen=True)
class Machine:
    """A chip with a usual amount of memory, in GB (of a Mac and a laptop all of it, of a graphics card its own)."""

    chip: Chip
    memory_gb: int

    @property
    def usable_bytes(self) -> float:
        for_gpu = {"METAL": 2 / 3 if self.memory_gb <= 36 else 3 / 4}.get(self.chip.device, 1.0)
        return self.memory_gb * GB * for_gpu * SHARES[self.chip.device]


MACHINES = (
    *(
        Machine(CHIPS[name], memory)
        for name, memory in (
            ("m1", 16),
            ("m1-pro", 32),
            ("m1-max", 64),
            ("m1-ultra", 128),
            ("m2", 16),
            ("m2-pro", 32),
            ("m2-max", 64),
            ("m2-ultra", 128),
            ("m3", 16),
            ("m3-pro", 36),
            ("m3-max", 64),
            ("m3-max-30", 36),
            ("m3-ultra", 256),
            ("m4", 24),
            ("m4-pro", 48),
            ("m4-max", 128),
            ("m4-max-32", 36),
            ("m5", 24),
            ("m5-pro", 64),
            ("m5-max", 128),
            ("m5-max-32", 36),
            ("rtx-3090", 24),
            ("rtx-4090", 24),
            ("rtx-5090", 32),
            ("a100-80gb", 80),
            ("a100-80gb-pcie", 80),
            ("h100", 80),
            ("h100-pcie", 80),
            ("h100-nvl", 94),
            ("h200", 141),
        )
    ),
    Machine(LAPTOP, 32),
)
KINDS = (("Q4_K", "4 bits"), ("float16", "16 bits"))  # of the tables of speed


def num_weights(config: ModelConfig) -> int:
    """Matrices of all layers, embeddings and head; norms are too few to count."""
    in_layers, table = weights_of(config)
    return in_layers + table * (1 if config.tie_embeddings else 2)


def num_active(config: ModelConfig) -> int:
    """Those that one token passes through: all but the experts that are not chosen for it."""
    if config.experts is None:
        return num_weights(config)
    return num_weights(config) - round(weights_in_experts(config, config.experts.num_experts - config.experts.top_k))


def kv_bytes(config: ModelConfig, num_tokens: int) -> float:
    """Keys and values of one sequence, and its recurrent state. A layer with a window keeps no more than that."""
    return config.state_bytes + sum(
        KV_ITEMSIZE * kind.stored_elements * min(num_tokens, config.kv_window(layer) or num_tokens)
        for layer, kind in enumerate(config.layers)
    )


def memory_table() -> str:
    """Weights by format, and the KV cache of one sequence."""
    rows = [["model", "weights", "16 bits", "8 bits (Q8_0)", "4 bits (Q4_K)", *(f"KV, {n:,} tokens" for n in CONTEXTS)]]
    for name in MODELS:
        config = SHAPES[name]
        count = num_weights(config)
        sizes = [_gb(count * bytes_per_weight(kind)) for kind in ("float16", "Q8_0", "Q4_K")]
        rows.append([name, f"{count / 1e9:.2f} B", *sizes, *(_gb(kv_bytes(config, n)) for n in CONTEXTS)])
    return _markdown(rows)


def sparse_table() -> str:
    """Weights and those of one token, and what a sequence takes: keys and values or latents, and recurrent states."""
    head = ["model", "weights", "for one token", "16 bits", "4 bits (Q4_K)", "KV of a token", "state"]
    rows = [[*head, *(f"KV and state, {n:,} tokens" for n in CONTEXTS)]]
    for name in SPARSE_AND_HYBRID:
        config = SHAPES[name]
        count, state = num_weights(config), config.state_bytes
        rows.append(
            [
                name,
                *(f"{n / 1e9:.2f} B" for n in (count, num_active(config))),
                *(_gb(count * bytes_per_weight(kind)) for kind in ("float16", "Q4_K")),
                f"{config.kv_bytes_per_token(KV_ITEMSIZE) / 1e3:.0f} KB",
                f"{state / 1e6:.{2 if state < 1e6 else 0}f} MB" if state else "",
                *(_gb(kv_bytes(config, n)) for n in CONTEXTS),
            ]
        )
    return _markdown(rows)


def speed_table(kind: str) -> str:
    """Tokens a second of one sequence, by machine and model; empty where weights and 4,096 tokens do not fit."""
    rows = [["machine", "memory", *MODELS]]
    for machine in MACHINES:
        cells = [_speed(machine, SHAPES[name], kind) for name in MODELS]
        rows.append([machine.chip.name, f"{machine.memory_gb} GB", *cells])
    return _markdown(rows)


def _speed(machine: Machine, config: ModelConfig, kind: str) -> str:
    needed = num_weights(config) * bytes_per_weight(kind) + kv_bytes(config, CONTEXTS[0])
    if needed > machine.usable_bytes:
        return ""
    return f"{predict(config, kind, machine.chip, 1, CONTEXT).tok_s:.0f}"


def shares_line() -> str:
    """The factors of the predictions that matter most."""
    parts = [
        f"{device} {factors.quantized_share:.0%} of the bandwidth with quantized weights and "
        f"{factors.bandwidth_share:.0%} with others"
        for device, factors in FACTORS.items()
    ]
    return "; ".join(parts)


def sections() -> str:
    """All that the script writes between its marks."""
    speeds = [
        f"Predicted tokens a second, {title} ({kind}), one sequence with {CONTEXT:,} tokens of context:\n\n"
        f"{speed_table(kind)}"
        for kind, title in KINDS
    ]
    text = [
        "Weights in GB (1e9 bytes), with embeddings, and the KV cache of one sequence in float16:",
        memory_table(),
        "The same for models with experts, recurrent layers or latents, with the weights that one token passes "
        "through. KV is keys and values, or latents; layers with a window keep only its tokens. The state does not "
        "grow with the context. The experts of gpt-oss are published in MXFP4, which takes about as much as Q4_K:",
        sparse_table(),
        f"Assumed: {shares_line()}; the time of each kernel and of the host besides. A cell is empty where the weights "
        "and 4,096 tokens of context do not fit into the share of the memory that the engine takes by default.",
        *speeds,
    ]
    return "\n\n".join(text)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}" if num_bytes < 10 * GB else f"{num_bytes / GB:.1f}"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["---:" for _ in head[1:]]], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
