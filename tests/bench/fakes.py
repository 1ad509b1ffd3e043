"""A runner that computes nothing: it returns known tokens and records the plans it was given."""

from __future__ import annotations

from tinyvllm.bench.rows import Machine
from tinyvllm.config import Capacity, ModelConfig, Rope
from tinyvllm.execution.cost import StepCost
from tinyvllm.scheduling.plan import StepOutput, StepPlan

WEIGHT_BYTES, KV_BYTES_PER_TOKEN = 1000, 8


def make_model_config(**changes: object) -> ModelConfig:
    """A tiny llama."""
    fields: dict[str, object] = {
        "architecture": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 260,
        "max_position": 512,
        "rope": Rope(10000.0),
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "name": "tiny",
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def make_machine(bandwidth_gbps: float | None = 0.001) -> Machine:
    return Machine("tiny", "Q4_0", 2_000_000, 3 << 20, "CPU", bandwidth_gbps, {"seed": 0})


class FakeRunner:
    """Every sampled token is 7; every step has 10 kernels."""

    def __init__(self, num_blocks: int = 1000, num_seqs: int = 4, budget: int = 64, token_id: int = 7) -> None:
        self.model_config = make_model_config()
        self.capacity = Capacity(num_blocks, 16, 512, num_seqs, budget)
        self.num_captures = 1
        self.num_general_operations = 0
        self.token_id = token_id
        self.filled: list[int] = []
        # (ids of the requests' blocks, [start, stop) of their tokens, the last token's id) by step
        self.steps: list[list[tuple[tuple[int, ...], int, int, int]]] = []

    max_in_flight = 1
    verify_sizes = ()

    @property
    def runner(self) -> FakeRunner:
        """Itself, since it is its own inspector."""
        return self

    def launch(self, plan: StepPlan) -> StepOutput:
        return self.execute(plan)

    def sample(self, flight: StepOutput) -> None: ...

    def collect(self, flight: StepOutput) -> StepOutput:
        return flight

    def wait(self) -> None: ...

    def execute(self, plan: StepPlan) -> StepOutput:
        self.steps.append(
            [
                (
                    tuple(e.request.tables[0]),
                    e.start,
                    e.start + e.count,
                    e.request.tokens(e.start, e.start + e.count)[-1],
                )
                for e in plan.entries
            ]
        )
        count = len(plan.sampled)
        return StepOutput((self.token_id,) * count, (None,) * count)

    def cost(self, plan: StepPlan) -> StepCost:
        read = sum(entry.start for entry in plan.entries) * KV_BYTES_PER_TOKEN
        name = "decode" if plan.is_decode else "prefill"
        written = plan.num_tokens * KV_BYTES_PER_TOKEN
        return StepCost(name, 10, WEIGHT_BYTES, read, written, moved_bytes=2 * (WEIGHT_BYTES + read + written))

    def fill_adapters(self, seed: int) -> None: ...

    def fill_pool(self, num_blocks: int, seed: int) -> None:
        self.filled.append(num_blocks)

    def close(self) -> None:
        pass
