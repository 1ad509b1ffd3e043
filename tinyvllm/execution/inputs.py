"""A plan as the int32 arrays that the kernels read, padded to its bucket."""

from __future__ import annotations

import numpy as np

from tinyvllm.config import MAX_STOP_IDS
from tinyvllm.errors import InvariantError
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request


class InputPacker:
    """Writes plans into one bucket's input buffer, in place."""

    def __init__(self, layout: StepLayout, buffer: np.ndarray) -> None:
        self.layout = layout
        self.views = layout.views(buffer)
        self.floats = {name: self.views[name].view(np.float32) for name in ("temperature", "top_p", "min_p")}
        self.clear()

    def clear(self) -> None:
        """All rows padding: the dummy block's slot 0, position 0, greedy, no logprobs."""
        for view in self.views.values():
            view[...] = 0
        self.views["seq_rows"][:] = self.layout.num_seqs
        self._reset_sampling()

    def _reset_sampling(self) -> None:
        self.views["num_logprobs"][:] = -1
        self.views["held_back"][:] = -1
        self.views["forced"][:] = -1
        self.floats["temperature"][:] = 0.0

    def pack(self, plan: StepPlan) -> None:
        """Fill the buffer. Rows behind the plan's are padding again, whatever they held before."""
        views, layout = self.views, self.layout
        if plan.num_tokens > layout.num_tokens or len(plan.entries) > layout.num_seqs:
            raise InvariantError(f"{plan.num_tokens} tokens of {len(plan.entries)} sequences do not fit into {layout}")
        self._reset_sampling()
        row = 0
        for index, entry in enumerate(plan.entries):
            self._pack_tokens(index, entry, row)
            row += entry.count
        # a padded row's table is the all-zero one behind the last, its slot lies in the dummy block
        for name, padding in (("token_ids", 0), ("positions", 0), ("slots", 0), ("seq_rows", layout.num_seqs)):
            views[name][row:] = padding
        self._pack_samples(plan)

    def _pack_tokens(self, index: int, entry: Scheduled, row: int) -> None:
        """Token rows [row, row + count) and block table `index` of one sequence."""
        views, size, request = self.views, self.layout.block_size, entry.request
        stop = entry.start + entry.count
        num_blocks = -(-stop // size)
        if num_blocks > len(request.block_ids):
            raise InvariantError(
                f"request {request.request_id} has {len(request.block_ids)} blocks, but computes up to token {stop}"
            )
        table = views["block_tables"][index]
        table[:num_blocks] = request.block_ids[:num_blocks]
        rows = slice(row, row + entry.count)
        positions = np.arange(entry.start, stop, dtype=np.int32)
        views["token_ids"][rows] = known_or_fed(request, entry.start, stop)
        views["positions"][rows] = positions
        views["slots"][rows] = table[positions // size] * size + positions % size
        views["seq_rows"][rows] = index

    def _pack_samples(self, plan: StepPlan) -> None:
        """Sampling parameters by sampled sequence, in `plan.sampled`'s order."""
        views, sample, row = self.views, 0, 0
        for entry in plan.entries:
            row += entry.count
            if not entry.samples:
                continue
            request, params = entry.request, entry.request.params
            views["logit_rows"][sample] = row - 1
            self.floats["temperature"][sample] = params.temperature
            self.floats["top_p"][sample] = params.top_p
            self.floats["min_p"][sample] = params.min_p
            views["top_k"][sample] = params.top_k
            views["seed"][sample] = np.uint32(request.seed & 0xFFFFFFFF).view(np.int32)
            views["draw"][sample] = request.num_output_tokens
            views["num_logprobs"][sample] = -1 if params.logprobs is None else params.logprobs
            held_back = request.held_back_ids
            if len(held_back) > MAX_STOP_IDS:
                raise InvariantError(f"{len(held_back)} ids are held back, but a row has room for {MAX_STOP_IDS}")
            views["held_back"][sample, : len(held_back)] = held_back
            sample += 1


def known_or_fed(request: Request, start: int, stop: int) -> list[int]:
    """Token ids [start, stop). One that is in flight is -1 - its row in the output of the step before."""
    ids = request.tokens(start, stop)
    if len(ids) == stop - start:
        return ids
    if request.num_in_flight != 1 or len(ids) != stop - start - 1:
        raise InvariantError(
            f"request {request.request_id} has {request.num_in_flight} tokens in flight, but a step wants "
            f"{stop - start - len(ids)} of them: it can have the newest only"
        )
    return [*ids, -1 - request.flight_row]
