"""The fixed shapes that graphs are captured for, and which of them a plan runs in."""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.config import Capacity, EngineConfig
from tinyvllm.errors import InvariantError, TinyvllmError
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import StepPlan

SMALLEST_TOKENS, TOKEN_GROWTH = 16, 4  # token buckets: 16, 64, 256, ...


@dataclass(frozen=True)
class Bucket:
    """A graph's shape: `num_tokens` rows; a decode bucket has one row a sequence."""

    num_tokens: int
    is_decode: bool

    @property
    def name(self) -> str:
        return f"decode {self.num_tokens}" if self.is_decode else f"prefill {self.num_tokens}"

    def layout(self, capacity: Capacity) -> StepLayout:
        max_blocks = -(-capacity.max_model_len // capacity.block_size)
        num_seqs = self.num_tokens if self.is_decode else capacity.max_num_seqs
        return StepLayout(self.num_tokens, num_seqs, max_blocks, capacity.block_size)


def make_buckets(config: EngineConfig) -> list[Bucket]:
    """Decode buckets by batch, then token buckets for prefill and mixed steps; each list ends at its limit."""
    decode = config.decode_buckets or _series(1, 2, config.max_num_seqs)
    tokens = config.token_buckets or _series(SMALLEST_TOKENS, TOKEN_GROWTH, config.max_num_batched_tokens)
    _check("decode-buckets", decode, "max-num-seqs", config.max_num_seqs)
    _check("token-buckets", tokens, "max-num-batched-tokens", config.max_num_batched_tokens)
    return [Bucket(n, True) for n in sorted(set(decode))] + [Bucket(n, False) for n in sorted(set(tokens))]


def _series(first: int, factor: int, limit: int) -> tuple[int, ...]:
    out = []
    while first < limit:
        out.append(first)
        first *= factor
    return (*out, limit)


def _check(flag: str, sizes: tuple[int, ...], limit_flag: str, limit: int) -> None:
    if min(sizes) < 1 or max(sizes) != limit:
        raise TinyvllmError(
            f"--{flag} is {sizes}: the largest must equal --{limit_flag} ({limit}) and the smallest be at least 1"
        )


def choose_bucket(buckets: list[Bucket], plan: StepPlan) -> Bucket:
    """The smallest bucket that the plan fits in."""
    for bucket in buckets:
        if bucket.is_decode == plan.is_decode and bucket.num_tokens >= plan.num_tokens:
            return bucket
    raise InvariantError(
        f"no bucket for a plan of {plan.num_tokens} tokens ({plan.is_decode=}) among {[b.name for b in buckets]}"
    )
