"""The host's side of logits processing: which request has which row of the sampling state, and what the row holds."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from tinyvllm.errors import InvariantError
from tinyvllm.ops.sampling.logits_processing import SamplingState, mask_words
from tinyvllm.ops.step_inputs import PROCESSING_FLOATS
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request, Status

ALL_ALLOWED = np.uint32(0xFFFFFFFF)


class SamplingRows:
    """Owns the state's rows. A request holds one from the first step with logits processing that samples it until the
    first such step that does not. A new row is filled from the prompt and the output, so a preemption loses nothing.

    Rows change hands while no step with logits processing is in flight: `pack` runs after the previous step was read.
    """

    def __init__(self, state: SamplingState) -> None:
        self._state = state
        self._rows: dict[Request, int] = {}
        self._free = list(range(state.num_rows))
        self._mask_rows: dict[
            Request, list[int]
        ] = {}  # one, or one for each sampled row if the mask follows the output
        self._free_masks = list(range(state.num_rows))
        self._words = np.empty(mask_words(state.vocab_size), np.uint32)
        self._allowed: dict[Request, np.ndarray] = {}  # the words of allowed_token_ids, of requests with a row

    def pack(self, plan: StepPlan, views: dict[str, np.ndarray]) -> None:
        """Write the sampled requests' settings into the state and the step's inputs."""
        entries = [
            entry
            for entry in plan.sampled
            if entry.request.needs_logits_processing and entry.request.status is not Status.FINISHED
        ]
        self._take_back(entries)
        views["state_rows"][:] = -1
        for index, entry in zip(
            accumulate((e.num_sampled for e in plan.sampled), initial=0), plan.sampled, strict=False
        ):
            if entry.request.needs_logits_processing and entry.request.status is not Status.FINISHED:
                self._pack_entry(index, entry, views)

    def _take_back(self, entries: list[Scheduled]) -> None:
        """Free the rows of requests that are not among those of `entries`, and masks that these no longer need."""
        needed = {entry.request: entry.num_sampled if entry.request.mask_follows_output else 1 for entry in entries}
        for request in [request for request in self._rows if request not in needed]:
            self._free.append(self._rows.pop(request))
            self._allowed.pop(request, None)
        for request, rows in list(self._mask_rows.items()):
            count = needed.get(request, 0)
            self._free_masks += rows[count:]
            del rows[count:]
            if not rows:
                del self._mask_rows[request]

    def _pack_entry(self, index: int, entry: Scheduled, views: dict[str, np.ndarray]) -> None:
        """The settings of an entry's sampled rows, from row `index` on."""
        request, drafts = entry.request, entry.drafts
        row = self._row_of(request)
        masks = self._masks_of(entry) if request.is_masked else [0]
        for place in range(entry.num_sampled):
            views["state_rows"][index + place] = row
            views["mask_rows"][index + place] = masks[min(place, len(masks) - 1)]
            views["draft"][index + place] = drafts[place - 1] if place else -1
            views["num_before"][index + place] = place
            views["num_after"][index + place] = 0 if place else len(drafts)
            self._pack_row(index + place, request, views)

    def _row_of(self, request: Request) -> int:
        """The request's row, filled if it is new."""
        row = self._rows.get(request)
        if row is None:
            if not self._free:
                raise InvariantError(f"all {self._state.num_rows} rows of the sampling state are taken")
            row = self._rows[request] = self._free.pop()
            if request.params.has_penalties:
                self._state.write_counts(row, request.prompt_ids, request.output_ids)
            if request.params.logit_bias:
                self._state.write_bias(row, request.params.logit_bias)
        return row

    def _masks_of(self, entry: Scheduled) -> list[int]:
        """The rows of a request's masks: of each sampled row, or one for all if it does not depend on the output."""
        request, rows = entry.request, self._mask_rows.setdefault(entry.request, [])
        is_new, count = not rows, entry.num_sampled if entry.request.mask_follows_output else 1
        while len(rows) < count:
            if not self._free_masks:
                raise InvariantError(f"all {self._state.num_rows} masks of the sampling state are taken")
            rows.append(self._free_masks.pop())
        if is_new or request.mask_follows_output:
            for place, row in enumerate(rows):
                self._state.write_mask(row, self._mask(request, entry.drafts[:place]))
        return rows

    def _pack_row(self, index: int, request: Request, views: dict[str, np.ndarray]) -> None:
        params = request.params
        views["is_counted"][index] = params.has_penalties
        views["is_masked"][index] = request.is_masked
        views["num_bias"][index] = len(params.logit_bias)
        for name in PROCESSING_FLOATS:
            views[name].view(np.float32)[index] = getattr(params, name)

    def _mask(self, request: Request, drafts: tuple[int, ...]) -> np.ndarray:
        """(W,) uint32: a bit for each id that may be sampled next, after these drafts."""
        words = self._words
        if request.constraint is not None:
            request.constraint.fill_mask(words.view(np.int32), drafts)
        else:
            words[:] = ALL_ALLOWED
        if request.params.allowed_token_ids is not None:
            words &= self._allowed_words(request, request.params.allowed_token_ids)
        banned = request.banned_ids(drafts)
        if banned:
            words &= ~_bits(banned, len(words))
        return words

    def _allowed_words(self, request: Request, ids: tuple[int, ...]) -> np.ndarray:
        """(W,) uint32. Built once per row, since a grammar's mask is combined with it at every step."""
        if request not in self._allowed:
            self._allowed[request] = _bits(ids, len(self._words))
        return self._allowed[request]


def _bits(ids: tuple[int, ...] | list[int], num_words: int) -> np.ndarray:
    """(num_words,) uint32 with these ids' bits set."""
    flags = np.zeros(num_words * 32, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)
