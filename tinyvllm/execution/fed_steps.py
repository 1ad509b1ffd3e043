"""Decode steps that follow each other at once: the device feeds each with what the one before it has sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from tinyvllm.config import SamplingParams
from tinyvllm.execution.runner import Flight, ModelRunner
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import in_stable_rows


def shadow(request: Request, prompt_ids: list[int]) -> Request:
    """A request of a drafter's own for one of the engine's, whose drafts are drawn with the same noise: of the same
    seed, temperature and filters, but without what changes logits before sampling, and without logprobs."""
    return Request(
        request_id=request.request_id,
        prompt_ids=prompt_ids,
        params=_unprocessed(request.params),
        eos_ids=request.eos_ids,
        max_tokens=request.max_tokens,
        seed=request.seed,
        hash_seed=request.hash_seed,
    )


def _unprocessed(params: SamplingParams) -> SamplingParams:
    return replace(
        params,
        logprobs=None,
        logit_bias={},
        allowed_token_ids=None,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        typical_p=1.0,
    )


@dataclass
class _Flight:
    plan: StepPlan
    handle: Flight


class FedSteps:
    """Runs the steps of one call of a drafter: while one runs, the next is packed and enqueued.

    Requests count their tokens as the engine's do: those in flight first, and their ids once they were read. Known
    tokens may come as drafts of an entry, of which only what the last row samples counts."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_steps = 0  # since the start
        self._flights: deque[_Flight] = deque()  # oldest first

    def launch(self, entries: list[Scheduled], hidden_row: Callable[[Request], int] | None = None) -> None:
        """Enqueue a step. Steps older than those that the runner can have in flight are read first. hidden_row: of each
        request's kept hidden state, for a drafting layer."""
        ordered = tuple(in_stable_rows(entries))
        rows = () if hidden_row is None else tuple(hidden_row(entry.request) for entry in ordered)
        plan = StepPlan(ordered, hidden_rows=rows)
        while len(self._flights) >= self.runner.max_in_flight:
            self._collect()
        self._flights.append(_Flight(plan, self.runner.launch(plan)))
        self.num_steps += 1
        for entry in plan.entries:
            entry.request.num_computed += entry.count
        for row, entry in last_rows(plan):
            entry.request.output_ids += entry.drafts
            entry.request.num_in_flight += 1
            entry.request.flight_row = row

    def finish(self) -> None:
        """Read what is in flight."""
        while self._flights:
            self._collect()

    def clear(self) -> None:
        """Forget what is in flight, after a failure."""
        self._flights.clear()

    def _collect(self) -> None:
        flight = self._flights.popleft()
        output = self.runner.collect(flight.handle)
        for row, entry in last_rows(flight.plan):
            entry.request.num_in_flight -= 1
            entry.request.output_ids.append(output.token_ids[row])


def last_rows(plan: StepPlan) -> Iterator[tuple[int, Scheduled]]:
    """(the last sampled row, entry) of each entry that samples."""
    ends = accumulate(entry.num_sampled for entry in plan.sampled)
    return zip((end - 1 for end in ends), plan.sampled, strict=True)


def usable(drafts: list[int], num_ids: int) -> list[int]:
    """The drafts before the first that is no token of the model: -1 where no logit was finite, or an id that only the
    draft model's padding has."""
    is_token = [0 <= token_id < num_ids for token_id in drafts]
    return drafts if all(is_token) else drafts[: is_token.index(False)]
