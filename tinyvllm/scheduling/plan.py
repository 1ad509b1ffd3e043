"""What the scheduler and the device exchange: plans in one direction, tokens in the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from tinyvllm.config import MAX_SPECULATIVE_TOKENS
from tinyvllm.scheduling.adapter_slots import SlotWrite
from tinyvllm.scheduling.request import Request, TokenLogprobs


@dataclass(
    slots=True, init=False
)  # not frozen: a step makes one per sequence, and assignments would take four times as long
class Scheduled:
    """Compute tokens [start, start + count) of `request` in this step.

    samples: the step reaches the request's last token, so a new one is sampled.
    drafts: the last tokens of `count`, which are guesses: after each of them a token is sampled too.
    num_scored: the number of tokens, from `first_scored` on, whose logits give the logprob of the next prompt token.
    Both are fixed when the entry is made, because the request changes before the step's output arrives.
    """

    request: Request
    start: int
    count: int
    samples: bool
    first_scored: int
    num_scored: int
    drafts: tuple[int, ...]

    def __init__(self, request: Request, start: int, count: int, drafts: tuple[int, ...] = ()) -> None:
        """count: with the drafts."""
        stop = start + count - len(drafts)
        self.request, self.start, self.count, self.drafts = request, start, count, drafts
        self.samples = stop == request.num_tokens
        self.first_scored = self.num_scored = 0
        if request.num_prompt_logprobs is not None:
            self.first_scored = max(start, request.num_scored)
            self.num_scored = max(0, min(stop, request.num_prompt_tokens - 1) - self.first_scored)

    @property
    def decodes(self) -> bool:
        """Whether it computes a request's last token, and perhaps drafts, rather than a part of a prompt."""
        return self.samples and (self.count == 1 or bool(self.drafts))

    @property
    def num_sampled(self) -> int:
        """Rows that sample: those of the last known token and of the drafts."""
        return self.samples + len(self.drafts)

    @property
    def num_logit_rows(self) -> int:
        return self.samples + len(self.drafts) + self.num_scored


@dataclass(frozen=True)
class StepPlan:
    """One step's work. Entries are in batch order; each request appears once."""

    entries: tuple[Scheduled, ...]
    preempted: tuple[Request, ...] = ()
    admitted: tuple[Request, ...] = ()  # those of the entries that have just left the queue
    slot_writes: tuple[SlotWrite, ...] = ()  # adapters to put on the device first
    hidden_rows: tuple[int, ...] = ()  # of a drafting layer's step: the kept hidden state that each entry continues

    @cached_property
    def starts(self) -> Sequence[int]:
        """Those of the entries."""
        return [entry.start for entry in self.entries]

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """Those of the entries. Plans that continue each other have the same tuple."""
        return tuple(entry.request for entry in self.entries)

    @cached_property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, those of this step and drafts included."""
        if self.num_tokens == len(self.starts):
            return max(self.starts) + 1
        return max(entry.start + entry.count for entry in self.entries)

    @cached_property
    def only_decodes(self) -> bool:
        """Every entry is one token that samples, and nothing else is wanted of the step: the next may continue it."""
        return self.is_decode and not self.scored and not self.hidden_rows

    @cached_property
    def is_decode(self) -> bool:
        """Every entry is one token that samples, so a decode graph can run it; such a graph keeps no hidden states."""
        return all(entry.count == 1 and entry.samples for entry in self.entries) and not self.pooled

    @cached_property
    def has_no_prompts(self) -> bool:
        """Every entry computes its request's last token, and perhaps drafts."""
        return all(entry.decodes for entry in self.entries) and not self.pooled

    @cached_property
    def has_adapters(self) -> bool:
        return any(entry.request.adapter_slot for entry in self.entries)

    @cached_property
    def num_drafts(self) -> int:
        return sum(len(entry.drafts) for entry in self.entries)

    @cached_property
    def needs_logits_processing(self) -> bool:
        """Some row is sampled from other logits than the model's."""
        return any(entry.samples and entry.request.needs_logits_processing for entry in self.entries)

    @cached_property
    def has_logprobs(self) -> bool:
        """Whether logprobs of some sampled token are wanted."""
        return any(entry.request.params.logprobs is not None for entry in self.sampled)

    @cached_property
    def sampled(self) -> tuple[Scheduled, ...]:
        return tuple(entry for entry in self.entries if entry.samples)

    @cached_property
    def num_sampled_rows(self) -> int:
        """One of each entry in `sampled`, and one of each draft."""
        return len(self.sampled) + self.num_drafts

    @cached_property
    def pooled(self) -> tuple[Scheduled, ...]:
        return tuple(entry for entry in self.entries if entry.request.pooling is not None)

    @cached_property
    def scored(self) -> tuple[Scheduled, ...]:
        return tuple(entry for entry in self.entries if entry.num_scored)

    @cached_property
    def num_logit_rows(self) -> int:
        """Token rows whose logits are used: first those of `sampled`, then those of each entry in `scored`."""
        return self.num_sampled_rows + sum(entry.num_scored for entry in self.scored)


# what plans that continue each other have in common, besides their requests
COMMON = (
    "num_tokens",
    "only_decodes",
    "is_decode",
    "has_no_prompts",
    "has_adapters",
    "has_logprobs",
    "num_drafts",
    "needs_logits_processing",
    "num_sampled_rows",
    "num_logit_rows",
    "pooled",
    "scored",
)


class ContinuedPlan(StepPlan):
    """The requests of a plan that only decodes do so once more, each in its row.

    Most steps are such. Their entries are made only if someone asks for them: of 256 requests, that and what follows
    from it took the host half of its time for a step."""

    def __init__(self, latest: StepPlan, starts: Sequence[int]) -> None:
        """starts: the position of each request's token."""
        super().__init__(entries=())
        known = self.__dict__
        del known["entries"]
        known.update({name: getattr(latest, name) for name in COMMON}, requests=latest.requests, starts=starts)

    @cached_property
    def entries(self) -> tuple[Scheduled, ...]:
        entries = tuple(Scheduled(request, at, 1) for request, at in zip(self.requests, self.starts, strict=True))
        for entry in entries:
            entry.samples = True  # whatever has become of the request meanwhile
        return entries


@dataclass(frozen=True)
class StepOutput:
    """What the device returned. `token_ids` and `logprobs` have a place for each sampled row: the `num_sampled` rows of
    each entry in `plan.sampled`, one entry after another. `prompt_logprobs` are aligned with `plan.scored`, `pooled`
    with `plan.pooled`. A token id of -1 means that no logit was finite."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    pack_s: float = 0.0
    device_s: float = 0.0
    tokens_s: float = 0.0  # to turn the sampled rows into token ids and logprobs
    num_rows: int = 0  # token rows of the graph that ran: the plan's tokens plus padding
    pooled: tuple[NDArray[np.float32], ...] = ()  # (hidden,): the sum of an entry's normed states, or the last state


class TokenOut(Struct, gc=False):  # a step makes one per sequence: three times as fast as a dataclass
    """One new token of one request, after commit. A step with drafts brings several. The last has a finish_reason."""

    request: Request
    token_id: int | None  # None: the request ended without a token (abort, error)
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None


STEP_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens; vLLM's histogram buckets


@dataclass
class StepStats:
    """Counts and times of one step, for the log, /metrics and the benchmarks."""

    schedule_s: float = 0.0
    pack_s: float = 0.0
    device_s: float = 0.0
    commit_s: float = 0.0
    num_tokens: int = 0
    num_seqs: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache, since start
    prefix_hits: int = 0  # tokens found, since start
    num_preemptions: int = 0  # since start
    num_live_states: int = 0  # slots of recurrent states that sequences own
    num_checkpoints: int = 0  # slots that hold a checkpoint and that no sequence owns
    num_checkpoint_hits: int = 0  # sequences that resumed from a checkpoint, since start
    num_checkpoint_evictions: int = 0  # checkpoints dropped for lack of slots, or with their blocks, since start
    num_captures: int = 0  # graphs captured, since start
    num_captures_to_come: int = 0  # graphs still to be captured between steps; at 0, num_captures is final
    num_failed_captures: int = 0  # since start; larger graphs are used in their place
    num_drafts: int = 0  # drafts verified, since start: one for each request and step that had any
    num_draft_tokens: int = 0  # their tokens, since start
    num_accepted_tokens: int = 0  # of these, those that were accepted, since start
    num_general_operations: int = 0  # of all layers' operations, those that no fused kernel covers
    end_s: float = 0.0  # monotonic clock: when the latest step ended; 0 before the first
    # steps since start by their number of tokens: at most STEP_SIZES[0], at most STEP_SIZES[1], ..., more than the last
    step_sizes: tuple[int, ...] = (0,) * (len(STEP_SIZES) + 1)
    accepted_per_position: tuple[int, ...] = (0,) * MAX_SPECULATIVE_TOKENS  # of a draft's tokens, since start
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def sum(cls, each: Sequence[StepStats]) -> StepStats:
        """Several engines' counts added up, with the times of the step that ended last."""
        latest = max(each, key=lambda stats: stats.end_s)
        counts = {
            one.name: sum(getattr(stats, one.name) for stats in each)
            for one in fields(cls)
            if one.name.startswith("num_")
        }
        return replace(
            latest,
            **counts | {"num_tokens": latest.num_tokens, "num_seqs": latest.num_seqs},
            prefix_queries=sum(stats.prefix_queries for stats in each),
            prefix_hits=sum(stats.prefix_hits for stats in each),
            step_sizes=tuple(map(sum, zip(*(stats.step_sizes for stats in each), strict=True))),
            accepted_per_position=tuple(map(sum, zip(*(stats.accepted_per_position for stats in each), strict=True))),
            extra={name: sum(stats.extra.get(name, 0) for stats in each) for name in latest.extra},
        )


def count_step(step_sizes: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """`StepStats.step_sizes` after one more step."""
    place = bisect_left(STEP_SIZES, num_tokens)
    return (*step_sizes[:place], step_sizes[place] + 1, *step_sizes[place + 1 :])
