"""Speculative decoding, as the scheduler sees it: who guesses tokens, how many, and what becomes of the guesses.

A *draft* is a guess at the tokens that follow a request's last known one. A step computes the known token and its
drafts together, and samples in each of their rows. A draft that equals what was sampled in the row before it is
accepted, so a step yields the tokens of as many rows as were guessed right, and one more
(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"). What is sampled depends on the
logits, the request's seed and the number of the token alone, never on the drafts: docs/SPECULATION.md.

`Drafter` guesses: a file each for prompt lookup, a draft model and a model's own heads. `DraftRule` decides whether
guessing pays and how many tokens to guess. `Speculator` brings the two together with the requests; the engine calls it
between steps, and the scheduler reads `Request.drafts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Request


class Drafter(Protocol):
    """Guesses the next tokens of requests. Used on the engine's thread only, between steps.

    A guess is only a guess: a drafter may be wrong, give fewer tokens than asked for, or none, and the output stays the
    same. It keeps what it likes for each request until `forget`. A request may be preempted in between, which changes
    none of its tokens.
    """

    def expects(self, request: Request) -> bool:
        """Whether it is likely to have a guess once the tokens in flight are known. Asked before they are collected,
        since a step with drafts cannot overlap with the one before it: at every step, so it must be cheap."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """For each request at most as many token ids as its count, those expected to follow `output_ids`. No step is in
        flight: all tokens are known. Counts are at least 1."""

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """A step was committed: its requests have their new tokens. Called for every step, with drafts or without;
        a request of the plan may have ended."""

    def forget(self, request: Request) -> None:
        """The request has ended. Called once for each that the drafter was ever shown."""


class DraftRule(Protocol):
    """Decides how many tokens to draft, from what was accepted and how long steps took."""

    def wants(self, requests: Sequence[Request]) -> bool:
        """Whether drafting may pay in the next step of these running requests. Asked at every step; cheap."""

    def counts(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        """The number of tokens to draft for each, from 0 to its limit. The requests are those that can have drafts, in
        order of rank: where rows are short, the scheduler cuts the drafts of the last ones."""

    def settled(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """So many of a request's drafts were in a step, and so many of them were accepted."""

    def note_step(self, plan: StepPlan, num_rows: int, seconds: float) -> None:
        """A step whose graph has `num_rows` token rows took so long. Called for every step."""

    def forget(self, request: Request) -> None:
        """The request has ended."""


@dataclass
class DraftCounts:
    """Counts since the start: vLLM's spec_decode metrics."""

    num_drafts: int = 0  # drafts that were verified: one for each request and step
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    per_position: list[int] = field(default_factory=list)  # accepted tokens by their place in the draft

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for place in range(num_accepted):
            self.per_position[place] += 1


class Speculator:
    """Asks the rule and the drafter for the drafts of the next step, and tells them what became of the last."""

    def __init__(self, drafter: Drafter, rule: DraftRule, num_tokens: int) -> None:
        """num_tokens: the most drafts of a request in one step."""
        self.drafter, self.rule, self.num_tokens = drafter, rule, num_tokens
        self.counts = DraftCounts(per_position=[0] * num_tokens)
        self._known: dict[Request, None] = {}  # that the drafter or the rule was shown

    def wants(self, running: Sequence[Request]) -> bool:
        """Whether to collect the step in flight now, so that `draft` can be called."""
        return self.rule.wants(running) and any(self.drafter.expects(request) for request in running)

    def draft(self, running: Sequence[Request]) -> None:
        """Set `Request.drafts` of the running requests. No step may be in flight."""
        requests, limits = [], []
        for request in running:
            limit = min(self.num_tokens, request.max_drafts)
            if limit > 0:
                requests.append(request)
                limits.append(limit)
        if not requests or not self.rule.wants(running):
            return
        counts = self.rule.counts(requests, limits)
        asked = [(request, count) for request, count in zip(requests, counts, strict=True) if count > 0]
        if not asked:
            return
        self._known |= dict.fromkeys(request for request, _ in asked)
        proposed = self.drafter.propose([request for request, _ in asked], [count for _, count in asked])
        for (request, count), ids in zip(asked, proposed, strict=True):
            request.drafts = tuple(ids[:count])

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """A step was committed."""
        self.drafter.committed(plan, output)

    def settled(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """So many of a request's drafts were in a step, and so many of them were accepted."""
        self.counts.add(num_drafted, num_accepted)
        self.rule.settled(request, num_drafted, num_accepted)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        if request in self._known:
            del self._known[request]
            self.drafter.forget(request)
            self.rule.forget(request)


class AlwaysDraft:
    """The rule without measurements: as many tokens as may be drafted, in every step."""

    def wants(self, requests: Sequence[Request]) -> bool:
        return True

    def counts(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        return list(limits)

    def settled(self, request: Request, num_drafted: int, num_accepted: int) -> None: ...

    def note_step(self, plan: StepPlan, num_rows: int, seconds: float) -> None: ...

    def forget(self, request: Request) -> None: ...
