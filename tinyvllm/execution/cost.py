"""What a step costs by count: kernels launched and the bytes that must cross the memory's bus, at the least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tinyvllm.model.registry import Model
from tinyvllm.scheduling.plan import StepPlan


@dataclass(frozen=True)
class WeightFacts:
    """The matrices as they lie on the device."""

    num_params: int
    nbytes: int
    dtype: str  # of most of the bytes: float16, Q4_K, ...


@dataclass(frozen=True)
class StepCost:
    """One step's. Bytes are those of the plan, not of the bucket's padding: each matrix once, of the embedding table
    the tokens' rows, keys and values of the context before this step, and those of its tokens. Norms and activations,
    which are small, do not count."""

    bucket: str
    num_kernels: int
    weight_bytes: int
    kv_read_bytes: int
    kv_written_bytes: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes


def weight_facts(model: Model) -> WeightFacts:
    """Count a model's matrices."""
    by_format: Counter[str] = Counter()
    for matrix in model.matrices:
        by_format[matrix.format.name] += matrix.nbytes
    num_params = sum(matrix.used_rows * matrix.num_cols for matrix in model.matrices)
    return WeightFacts(num_params, by_format.total(), by_format.most_common(1)[0][0])


def step_cost(bucket: str, num_kernels: int, plan: StepPlan, model: Model, kv_bytes_per_token: int) -> StepCost:
    """Count what `plan` needs."""
    weights = sum(matrix.nbytes for matrix in model.matrices)
    if model.head is not model.embedding:
        table = model.embedding
        weights += plan.num_tokens * (table.nbytes // table.num_rows) - table.nbytes
    num_read = sum(entry.start for entry in plan.entries)
    return StepCost(bucket, num_kernels, weights, num_read * kv_bytes_per_token, plan.num_tokens * kv_bytes_per_token)
