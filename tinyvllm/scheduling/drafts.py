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
from tinyvllm.scheduling.request import Request, Status

MOST_GUESSES = 4  # new ones of `Foresight` after one step, since they take the host's time


class Drafter(Protocol):
    """Guesses the next tokens of requests. Used on the engine's thread only, between steps.

    A guess is only a guess: a drafter may be wrong, give fewer tokens than asked for, or none, and the output stays the
    same. It keeps what it likes for each request until `forget`. A request may be preempted in between, which changes
    none of its tokens.
    """

    @property
    def is_free(self) -> bool:
        """Whether a guess takes no time on the device. Then guesses are made first, and the rule chooses among them;
        and what would have been accepted is found out without verifying it (`Foresight`)."""

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

    def foreseen(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """So many of the tokens that a free drafter would have drafted were those that came."""

    def missed(self) -> None:
        """The next step could not overlap with the one before it, because drafts were wanted, but it has none."""

    @property
    def is_hopeless(self) -> bool:
        """Whether drafts would not pay in the latest batch, even if all of them were accepted."""

    def note_step(self, plan: StepPlan, num_rows: int, seconds: float) -> None:
        """A step whose graph has `num_rows` token rows took so long: since the step before it was collected if the
        engine was busy, so the host's work counts unless it overlaps. Called for every step, before `settled`."""

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
        self._foresight = Foresight(drafter, rule, num_tokens) if drafter.is_free else None
        self._known: dict[Request, None] = {}  # that the drafter or the rule was shown
        self._has_collected = False  # what was in flight, because drafts were wanted

    def wants(self, running: Sequence[Request]) -> bool:
        """Whether to collect the step in flight now, so that `draft` can be called."""
        if not self.rule.wants(running):
            return False
        for request in running:
            if request.output_ids:
                self._known[request] = None
                if self.drafter.expects(request):
                    self._has_collected = True
                    return True
        return False

    def draft(self, running: Sequence[Request]) -> None:
        """Set `Request.drafts` of the running requests. No step may be in flight."""
        has_collected, self._has_collected = self._has_collected, False
        if not self.rule.wants(running):
            return
        limits = [(request, min(self.num_tokens, request.max_drafts)) for request in running]
        num_drafts = self._draft([(request, limit) for request, limit in limits if limit > 0])
        if has_collected and not num_drafts:
            self.rule.missed()

    def _draft(self, able: list[tuple[Request, int]]) -> int:
        """Draft for requests that can have so many drafts. Returns the number of tokens drafted."""
        guesses: dict[Request, list[int]] = {}
        if self.drafter.is_free:
            guesses = self._propose(able)
            able = [(request, len(guesses[request])) for request, _ in able if guesses[request]]
        if not able:
            return 0
        counts = self.rule.counts([request for request, _ in able], [limit for _, limit in able])
        asked = [(request, count) for (request, _), count in zip(able, counts, strict=True) if count > 0]
        if not self.drafter.is_free:
            guesses = self._propose(asked)
        for request, count in asked:
            request.drafts = _allowed(request, guesses[request][:count])
        return sum(len(request.drafts) for request, _ in asked)

    def _propose(self, asked: Sequence[tuple[Request, int]]) -> dict[Request, list[int]]:
        requests = [request for request, _ in asked]
        self._known |= dict.fromkeys(requests)
        return dict(zip(requests, self.drafter.propose(requests, [count for _, count in asked]), strict=True))

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """A step was committed."""
        self.drafter.committed(plan, output)
        if self._foresight is not None:
            self._known |= dict.fromkeys(self._foresight.committed(plan))

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
            if self._foresight is not None:
                self._foresight.forget(request)


class Foresight:
    """Compares guesses of a free drafter that are in no step with the tokens that come. Drafts never change the output,
    so this tells what would have been accepted. The rule learns from it that a text begins to repeat its prompt,
    although nothing is verified while there is no hope. Owns a guess for each request."""

    def __init__(self, drafter: Drafter, rule: DraftRule, num_tokens: int) -> None:
        """num_tokens: of a guess, at most."""
        self._drafter, self._rule, self._num_tokens = drafter, rule, num_tokens
        self._guesses: dict[Request, tuple[int, list[int]]] = {}  # tokens of output before it, and the guess

    def committed(self, plan: StepPlan) -> list[Request]:
        """Compare guesses with the new tokens of a step's requests, and make others. Returns the requests that the
        drafter was shown."""
        guesses = self._guesses
        shown: list[Request] = []
        if self._rule.is_hopeless:
            guesses.clear()
            return shown
        for entry in plan.entries:
            request = entry.request
            if entry.drafts:
                guesses.pop(request, None)
            elif entry.samples and request.status is Status.RUNNING:
                if request in guesses:
                    self._compare(request, *guesses[request])
                if request not in guesses and len(shown) < MOST_GUESSES:
                    shown.append(request)
        for request, guess in zip(shown, self._drafter.propose(shown, [self._num_tokens] * len(shown)), strict=True):
            if guess:
                guesses[request] = len(request.output_ids), guess
        return shown

    def _compare(self, request: Request, place: int, guess: list[int]) -> None:
        came = request.output_ids[place : place + len(guess)]
        num_right = 0
        while num_right < len(came) and came[num_right] == guess[num_right]:
            num_right += 1
        if num_right < len(came) or num_right == len(guess):  # else it has been right so far
            del self._guesses[request]
            self._rule.foreseen(request, len(guess), num_right)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._guesses.pop(request, None)


class AlwaysDraft:
    """The rule without measurements: as many tokens as may be drafted, in every step."""

    is_hopeless = True  # nothing is learned, so nothing needs to be foreseen

    def __init__(self, max_seqs: int | None = None) -> None:
        """max_seqs: no drafts while so many sequences run, or more."""
        self._max_seqs = max_seqs

    def wants(self, requests: Sequence[Request]) -> bool:
        return self._max_seqs is None or len(requests) < self._max_seqs

    def counts(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        return list(limits)

    def settled(self, request: Request, num_drafted: int, num_accepted: int) -> None: ...

    def foreseen(self, request: Request, num_drafted: int, num_accepted: int) -> None: ...

    def missed(self) -> None: ...

    def note_step(self, plan: StepPlan, num_rows: int, seconds: float) -> None: ...

    def forget(self, request: Request) -> None: ...


def _allowed(request: Request, drafts: Sequence[int]) -> tuple[int, ...]:
    """The drafts up to the first that the request's grammar does not allow, which cannot be sampled."""
    if request.constraint is not None and drafts:
        drafts = drafts[: request.constraint.count_allowed(drafts)]
    return tuple(drafts)
