"""The fixed shapes of graphs, and the choice of one for a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeAlias

from tinyvllm.config import Capacity, EngineConfig, Limits
from tinyvllm.errors import InvariantError, TinyvllmError
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import StepPlan

SMALLEST_TOKENS = 16
# The factor from one size to the next. Padding takes 1 - 1/E of the rows, where E = (growth - 1) / ln(growth) is the
# mean of bucket size over plan size if sizes are uniform in their logarithm: 31 % at 2, 54 % at 4. On a CPU too, where
# time follows the rows, it saves a third of a prompt's time, for two more graphs of 0.05 s each (1.3 s if compiled).
GROWTH = 2
MOST_VERIFY_ROWS = 64  # token rows of the largest step with drafts alone
# sizes of steps with drafts: with one sequence each row counts, since a token more costs little but is seldom accepted
VERIFY_SIZES = (2, 3, 4, 6, 8, 12, 16, 32, 64)
FEW_ROWS = 16  # sequences of a token bucket for one prompt or a few
ShortContexts: TypeAlias = Callable[[int, bool], Sequence[int]]  # as `Operations.short_contexts`
LOGITS_SHARE = 16  # a graph for few sequences pays if the logits of all are over 1/16 of a step's rows


@dataclass(frozen=True)
class Bucket:
    """A graph's shape: `num_tokens` rows of at most `num_seqs` sequences, with one row of logits each. A decode bucket
    has one token row per sequence. A verify bucket is for steps with drafts: every row may have logits, and attention
    is that of decodes, row by row, once the keys and values of all rows are in the pool."""

    num_tokens: int
    is_decode: bool
    num_seqs: int
    is_for_few: bool = False  # another bucket has as many tokens for more sequences
    is_verify: bool = False
    has_adapters: bool = False  # its rows may have adapters; plans without any run in a bucket without
    max_context: int | None = None  # tokens of the longest sequence, those of the step included; None: any number

    @classmethod
    def decode(cls, num_seqs: int, max_context: int | None = None) -> Bucket:
        return cls(num_seqs, True, num_seqs, max_context=max_context)

    @classmethod
    def verify(cls, num_rows: int, max_context: int | None = None) -> Bucket:
        return cls(num_rows, False, num_rows, is_verify=True, max_context=max_context)

    @property
    def is_for_prompts(self) -> bool:
        return not self.is_decode and not self.is_verify

    @property
    def num_drafts(self) -> int:
        """Drafts of a plan that fills a verify bucket with one sequence; 0 for other buckets."""
        return self.num_tokens - 1 if self.is_verify else 0

    @property
    def name(self) -> str:
        kind = "verify" if self.is_verify else "decode" if self.is_decode else "prefill"
        size = f"{self.num_tokens} of {self.num_seqs}" if self.is_for_few else f"{self.num_tokens}"
        if self.max_context is not None:
            size += f" up to {self.max_context}"
        return f"{kind} {size}" + (" with adapters" if self.has_adapters else "")

    def layout(self, capacity: Capacity) -> StepLayout:
        longest = min(self.max_context or capacity.max_model_len, capacity.max_model_len)
        max_blocks = -(-longest // capacity.block_size)
        return StepLayout(
            num_tokens=self.num_tokens,
            num_seqs=self.num_seqs,
            max_blocks=max_blocks,
            block_size=capacity.block_size,
            num_groups=len(capacity.groups),
            has_states=capacity.num_state_slots > 0,
            has_adapters=self.has_adapters,
            has_drafts=capacity.max_verify_rows > 0,
            has_drafting=capacity.has_drafting,
        )

    def holds(self, plan: StepPlan) -> bool:
        """Whether the plan fits this shape. A token bucket can run decodes and drafts too."""
        return (
            (plan.is_decode or not self.is_decode)
            and (plan.num_drafts > 0 or not self.is_verify)
            and (self.has_adapters or not plan.has_adapters)
            and plan.num_tokens <= self.num_tokens
            and max(len(plan.requests), plan.num_logit_rows) <= self.num_seqs
            and (self.max_context is None or plan.longest <= self.max_context)
        )


def make_buckets(
    limits: Limits, config: EngineConfig, short_contexts: ShortContexts = lambda num_rows, verifies: ()
) -> list[Bucket]:
    """Decode buckets by batch, then verify buckets by rows, then token buckets, for prefill and mixed steps, by tokens
    and sequences. With adapters, each kind has its buckets a second time, after the others. The last of each kind holds
    all that the limits allow of that kind; the very last holds any plan without drafts.

    short_contexts: the backend's."""
    max_num_seqs, max_num_batched_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    decode = config.decode_buckets or _series(1, max_num_seqs)
    tokens = config.token_buckets or _series(SMALLEST_TOKENS, max_num_batched_tokens)
    _check("decode-buckets", decode, "max-num-seqs", max_num_seqs)
    _check("token-buckets", tokens, "max-num-batched-tokens", max_num_batched_tokens)
    by_tokens = [bucket for n in sorted(set(tokens)) for bucket in _token_buckets(n, max_num_seqs)]
    by_seqs = _with_short([Bucket.decode(n) for n in sorted(set(decode))], short_contexts)
    verify = _with_short([Bucket.verify(n) for n in _verify_sizes(limits, config)], short_contexts)
    kinds = [by_seqs, verify, by_tokens]
    if not config.enable_lora:
        return [bucket for kind in kinds for bucket in kind]
    with_adapters = [[*kind, *[replace(bucket, has_adapters=True) for bucket in kind]] for kind in kinds]
    return [bucket for kind in with_adapters for bucket in kind]


def _with_short(buckets: Iterable[Bucket], short_contexts: ShortContexts) -> list[Bucket]:
    """Before each bucket the same for short contexts, where their kernels are faster."""
    return [
        replace(bucket, max_context=limit)
        for bucket in buckets
        for limit in (*short_contexts(bucket.num_tokens, bucket.is_verify), None)
    ]


def within(buckets: Iterable[Bucket], max_model_len: int) -> list[Bucket]:
    """Those that pay where no context has more than `max_model_len` tokens: one for short contexts does if others may
    be twice as long."""
    return [one for one in buckets if one.max_context is None or 2 * one.max_context <= max_model_len]


def named(names: Iterable[str], buckets: Sequence[Bucket]) -> list[Bucket]:
    """The buckets of these names, in their order. A name without "up to" means those for short contexts as well. Raises
    TinyvllmError for a name that none has."""
    wanted = set(names)
    known = {name for bucket in buckets for name in _names(bucket)}
    if unknown := sorted(wanted - known):
        raise TinyvllmError(
            f"no step is called {', '.join(map(repr, unknown))}: with these flags there are "
            f"{', '.join(dict.fromkeys(bucket.name for bucket in buckets))}"
        )
    return [bucket for bucket in buckets if wanted & _names(bucket)]


def _names(bucket: Bucket) -> set[str]:
    return {bucket.name, replace(bucket, max_context=None).name}


def least_context(bucket: Bucket, buckets: Iterable[Bucket]) -> int:
    """The fewest tokens that the longest sequence of a plan has if it runs in a bucket, and not in one of `buckets` for
    shorter contexts."""
    limits = (one.max_context for one in buckets if replace(one, max_context=bucket.max_context) == bucket)
    most = bucket.max_context or math.inf
    return 1 + max((limit for limit in limits if limit is not None and limit < most), default=0)


def max_verify_rows(limits: Limits, config: EngineConfig) -> int:
    """The most token rows of a step with drafts alone; 0 if there are no drafts. With more rows, a step would take so
    much longer that drafts would not pay."""
    if config.speculative_config is None:
        return 0
    if config.verify_buckets:
        return max(config.verify_buckets)
    most = limits.max_num_seqs * (1 + config.speculative_config.num_drafts)
    return min(most, MOST_VERIFY_ROWS, limits.max_num_batched_tokens)


def _verify_sizes(limits: Limits, config: EngineConfig) -> list[int]:
    """The sizes of verify buckets: among them that of one sequence with all its drafts."""
    most = max_verify_rows(limits, config)
    if most < 2 or config.speculative_config is None:
        return []
    if config.verify_buckets:
        if not 2 <= min(config.verify_buckets) <= most <= limits.max_num_batched_tokens:
            raise TinyvllmError(
                f"--verify-buckets is {config.verify_buckets}: give sizes from 2 to --max-num-batched-tokens "
                f"({limits.max_num_batched_tokens})"
            )
        return sorted(set(config.verify_buckets))
    of_one = min(most, 1 + config.speculative_config.num_drafts)
    return sorted({size for size in VERIFY_SIZES if size < most} | {of_one, most})


def _token_buckets(num_tokens: int, max_num_seqs: int) -> list[Bucket]:
    """The buckets of one token count: for the maximum of sequences and, if it saves enough, for few."""
    most = min(num_tokens, max_num_seqs)
    whole = Bucket(num_tokens, False, most)
    is_worth_it = most >= 4 * FEW_ROWS and num_tokens < LOGITS_SHARE * most
    return [Bucket(num_tokens, False, FEW_ROWS, is_for_few=True), whole] if is_worth_it else [whole]


def _series(first: int, limit: int) -> tuple[int, ...]:
    out = []
    while first < limit:
        out.append(first)
        first *= GROWTH
    return (*out, limit)


def _check(flag: str, sizes: tuple[int, ...], limit_flag: str, limit: int) -> None:
    if min(sizes) < 1 or max(sizes) != limit:
        raise TinyvllmError(
            f"--{flag} is {sizes}: the largest must equal --{limit_flag} ({limit}) and the smallest be at least 1"
        )


def choose_bucket(buckets: Iterable[Bucket], plan: StepPlan) -> Bucket:
    """The smallest bucket that holds the plan; decode buckets come first, then verify buckets."""
    best = first_fit(ranked(buckets), plan)
    if best is None:
        raise InvariantError(
            f"no bucket for a plan of {plan.num_tokens} tokens, {plan.num_drafts} of them drafts, of "
            f"{len(plan.entries)} sequences with {plan.num_logit_rows} rows of logits ({plan.is_decode=}) among "
            f"{[b.name for b in buckets]}"
        )
    return best


def ranked(buckets: Iterable[Bucket]) -> list[Bucket]:
    """In the order in which a plan takes them."""
    return sorted(buckets, key=_rank)


def first_fit(ranked: Iterable[Bucket], plan: StepPlan) -> Bucket | None:
    """The first bucket that holds the plan; None if none does."""
    for bucket in ranked:
        if bucket.holds(plan):
            return bucket
    return None


def _rank(bucket: Bucket) -> tuple[bool, bool, int, int, bool, float]:
    kind = not bucket.is_decode, not bucket.is_verify
    return *kind, bucket.num_tokens, bucket.num_seqs, bucket.has_adapters, bucket.max_context or math.inf


def lengths_that_fill(bucket: Bucket, max_model_len: int) -> list[int]:
    """Lengths of prompts that together fill a token bucket and run in no other: as few prompts as possible."""
    is_for_many = bucket.num_seqs > FEW_ROWS and not bucket.is_for_few  # fewer prompts would run in the bucket for few
    least = FEW_ROWS + 1 if is_for_many else 1
    count = min(bucket.num_seqs, max(least, -(-bucket.num_tokens // max_model_len)))
    each, more = divmod(bucket.num_tokens, count)
    return [min(max_model_len, each + (index < more)) for index in range(count)]


def first_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """The minimum that serves everything: a bucket for any plan, one in which any batch decodes, and one for all drafts
    if there are any."""
    of_kinds = (
        next((bucket for bucket in reversed(buckets) if is_kind(bucket)), None)
        for is_kind in (attrgetter("is_decode"), attrgetter("is_verify"))
    )
    return [buckets[-1], *[bucket for bucket in of_kinds if bucket is not None]]
