"""Drafts by the model's own drafting layer (model/drafting.py), in decode steps of that layer alone.

Every step of the model has noted the layer's keys and values of its rows, and its hidden states. So to draft, a
sequence's first step takes the newest token, at the position before it, and the hidden state of its last accepted row;
each further step takes the token and the hidden state that the step before has given, without a read in between. Drafts
are drawn with the noise that the model itself will use, as those of a draft model (execution/draft_model.py).

The slots that drafts' keys go to belong to the sequence, and the model's next step writes them again. So a draft ends
at the last block that the sequence has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyvllm.execution.captures import Progress
from tinyvllm.execution.fed_steps import FedSteps, shadow, usable
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan
from tinyvllm.scheduling.request import Request


@dataclass(eq=False)
class _Lane:
    """A request that drafts in the current call."""

    request: Request
    draft: Request  # the same tokens without the first: row p of the layer has the token after position p
    count: int  # drafts wanted


class MtpDrafter:
    """A `Drafter`. Owns the graphs of the drafting layer, and a request of its own for each that it drafts for."""

    is_free = False  # drafts take time on the device

    def __init__(self, target: ModelRunner) -> None:
        self.runner = target.drafting_runner()
        self._steps = FedSteps(self.runner)
        self._num_ids, self._max_len = target.model_config.vocab_size, target.capacity.max_model_len
        assert target.model.hidden is not None, "the model keeps no hidden states"
        self._first_own_row = target.model.hidden.num_tokens
        self._rows: dict[Request, int] = {}  # of the latest step: the row of the last accepted token of each request
        self._drafts: dict[Request, Request] = {}

    def warm_up(self, progress: Progress | None = None) -> None:
        """Capture the graphs, which are small."""
        self.runner.warm_up(progress)

    def close(self) -> None:
        """Release the graphs."""
        self.runner.close()

    # -- scheduling.drafts.Drafter -----------------------------------------------------------------------------------

    def expects(self, request: Request) -> bool:
        """It always has a guess."""
        return True

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Up to counts[i] tokens that may follow the known tokens of requests[i]; [] for those that were not in the
        latest step. Raises DeviceError."""
        lanes = [self._lane(request, count) for request, count in zip(requests, counts, strict=True)]
        active = [lane for lane in lanes if lane is not None]
        if not active:
            return [[] for _ in lanes]
        rows = {lane.draft: self._rows[lane.request] for lane in active}
        try:
            self._steps.launch([_next_of(lane) for lane in active], rows.__getitem__)
            for place in range(1, max(lane.count for lane in active)):
                longer = [_next_of(lane) for lane in active if lane.count > place]
                self._steps.launch(longer, lambda draft: self._first_own_row + draft.flight_row)
            self._steps.finish()
        except Exception:
            self._steps.clear()
            for lane in active:
                self._drafts.pop(lane.request, None)
            raise
        return [[] if lane is None else self._drafted(lane) for lane in lanes]

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """Note where each request's last accepted token was in the step: its hidden state is in the same row."""
        self._rows.clear()
        first = 0
        for entry in plan.entries:
            place = entry.request.num_tokens - 2 - entry.start  # also where a recurrent state must be computed again
            if entry.samples and 0 <= place < entry.count:
                self._rows[entry.request] = first + place
            first += entry.count

    def forget(self, request: Request) -> None:
        """The request has ended; the blocks were its own."""
        self._drafts.pop(request, None)
        self._rows.pop(request, None)

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _lane(self, request: Request, count: int) -> _Lane | None:
        """None if a request can have no drafts now."""
        num_tokens = request.num_tokens
        count = min(count, min(request.room, self._max_len) + 2 - num_tokens)
        if count < 1 or num_tokens < 2 or request.num_in_flight or request not in self._rows:
            return None
        draft = self._drafts.get(request)
        if draft is None:
            draft = self._drafts[request] = shadow(request, request.prompt_ids[1:])
        num_known = len(request.output_ids)
        same = min(len(draft.output_ids), num_known)
        while same and draft.output_ids[same - 1] != request.output_ids[same - 1]:
            same -= 1
        draft.output_ids[same:] = request.output_ids[same:]
        draft.tables, draft.room, draft.num_preemptions = request.tables, request.room, request.num_preemptions
        draft.num_computed = num_tokens - 2
        return _Lane(request, draft, count)

    def _drafted(self, lane: _Lane) -> list[int]:
        return usable(lane.draft.output_ids[len(lane.request.output_ids) :], self._num_ids)


def _next_of(lane: _Lane) -> Scheduled:
    return Scheduled(lane.draft, lane.draft.num_computed, 1)
