"""The host's side of logits processing: which request has which row of the sampling state, and what the row holds."""

from __future__ import annotations

import numpy as np

from tinyvllm.errors import InvariantError
from tinyvllm.ops.sampling.logits_processing import SamplingState, mask_words
from tinyvllm.ops.step_inputs import PROCESSING_FLOATS
from tinyvllm.scheduling.plan import StepPlan
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
        self._words = np.empty(mask_words(state.vocab_size), np.uint32)
        self._allowed: dict[Request, np.ndarray] = {}  # the words of allowed_token_ids, of requests with a row

    def pack(self, plan: StepPlan, views: dict[str, np.ndarray]) -> None:
        """Write the sampled requests' settings into the state and the step's inputs."""
        sampled = [entry.request for entry in plan.sampled]
        processed = {r for r in sampled if r.needs_logits_processing and r.status is not Status.FINISHED}
        for request in [request for request in self._rows if request not in processed]:
            self._free.append(self._rows.pop(request))
            self._allowed.pop(request, None)
        views["state_rows"][:] = -1
        for index, request in enumerate(sampled):
            if request in processed:
                views["state_rows"][index] = self._row_of(request)
                self._pack_row(index, request, views)

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
            if request.is_masked and not request.mask_follows_output:
                self._state.write_mask(row, self._mask(request))
        if request.mask_follows_output:
            self._state.write_mask(row, self._mask(request))
        return row

    def _pack_row(self, index: int, request: Request, views: dict[str, np.ndarray]) -> None:
        params = request.params
        views["is_counted"][index] = params.has_penalties
        views["is_masked"][index] = request.is_masked
        views["num_bias"][index] = len(params.logit_bias)
        for name in PROCESSING_FLOATS:
            views[name].view(np.float32)[index] = getattr(params, name)

    def _mask(self, request: Request) -> np.ndarray:
        """(W,) uint32: a bit for each id that may be sampled next."""
        words = self._words
        if request.constraint is not None:
            request.constraint.fill_mask(words.view(np.int32))
        else:
            words[:] = ALL_ALLOWED
        if request.params.allowed_token_ids is not None:
            words &= self._allowed_words(request, request.params.allowed_token_ids)
        banned = request.banned_ids()
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
