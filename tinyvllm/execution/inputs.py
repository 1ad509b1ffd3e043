"""Packing a plan into the int32 arrays that the kernels read, padded to its bucket."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from tinyvllm.config import MAX_STOP_IDS
from tinyvllm.errors import InvariantError
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request


class Scored:
    """Stands for a request in rows that score a prompt's token, which have no request's settings."""


SCORED = Scored()
FLOATS = ("temperature", "top_p", "min_p")  # settings that are passed as their bits


class InputPacker:
    """Writes plans into one bucket's input buffer, in place.

    Nothing is written twice: a sequence that keeps its row adds only its new blocks, and its sampling settings stay. So
    a decode step writes a few words per sequence, whatever the length. Blocks that it has given back stay in its table,
    where nobody reads them.
    """

    def __init__(self, layout: StepLayout, buffer: np.ndarray) -> None:
        self.layout = layout
        self.views = layout.views(buffer)
        self._rest = layout.widest.views(buffer)["seq_rows"][layout.num_tokens :]
        self.floats = {name: self.views[name].view(np.float32) for name in FLOATS}
        # by group, as `Request.tables`
        self._groups = list(enumerate(zip(self.views["slots"], self.views["block_tables"], strict=True)))
        # by row: the owner of the tables and how many of its blocks are there; the owner of the settings
        self._tables: list[tuple[Request | None, int, int]] = [(None, 0, 0)] * layout.num_seqs
        self._samplers: list[Request | Scored | None] = [None] * layout.num_seqs
        self._num_samplers = layout.num_seqs  # rows after these have no settings
        self._suppressing: set[int] = set()  # sampled rows with suppressed ids
        self._with_minimum: set[int] = set()  # sampled rows of requests with min_tokens
        self._rows = np.arange(layout.num_seqs, dtype=np.int32)
        self._num_there = np.zeros(layout.num_seqs, np.int32)  # by row: tokens that the blocks in its tables hold
        self._continued: tuple[Request, ...] | None = None  # `requests` of the plans that `_pack_continued` packs
        self._of_states: dict[str, Sequence[int]] = {}  # by field, what is there
        self.plan: StepPlan | None = None  # what was packed last
        self.clear()

    def clear(self) -> None:
        """All rows padding: the dummy block's slot 0, position 0, greedy, no logprobs."""
        for view in self.views.values():
            view[...] = 0
        for name in ("num_logprobs", "suppressed_ids", "forced"):
            self.views[name][:] = -1
        self.views["seq_rows"][:] = self.layout.num_seqs
        self._rest[:] = -1  # what is there belongs to no sequence
        self._of_states.clear()
        self._continued = None

    def pack(self, plan: StepPlan) -> None:
        """Fill the buffer. Rows after the plan's become padding again."""
        views, layout, self.plan = self.views, self.layout, plan
        if self._continued is not None and plan.requests is self._continued:
            self._pack_continued(plan)
            return
        if plan.num_tokens > layout.num_tokens or len(plan.entries) > layout.num_seqs:
            raise InvariantError(f"{plan.num_tokens} tokens of {len(plan.entries)} sequences do not fit into {layout}")
        tables, size = self._tables, layout.block_size
        for index, entry in enumerate(plan.entries):
            owner, generation, num_there = tables[index]
            request = entry.request
            is_there = owner is request and entry.start + entry.count <= num_there * size
            if not is_there or generation != request.num_preemptions:  # no call for most: a block lasts for many steps
                self._pack_tables(index, request, entry.start + entry.count)
        self._pack_tokens(plan.entries)
        # a padding row uses the all-zero table after the last one, and a slot in the dummy block
        padding = (("token_ids", 0), ("positions", 0), ("slots", 0), ("seq_rows", layout.num_seqs))
        for name, value in padding:
            views[name][..., plan.num_tokens :] = value
        if layout.has_states:
            self._pack_states(plan)
        if layout.has_adapters:
            self._pack_adapters(plan)
        if layout.has_drafting:
            self._pack_next(plan)
        self._pack_samples(plan)
        is_plain = plan.only_decodes and not plan.needs_logits_processing and not self._with_minimum
        self._continued = plan.requests if is_plain and not self._suppressing else None

    def _pack_continued(self, plan: StepPlan) -> None:
        """Fill the buffer for requests that are in their rows already, and each of which decodes once more."""
        views, num, size = self.views, len(plan.requests), self.layout.block_size
        starts = np.array(plan.starts, np.int32)
        for index in np.flatnonzero(starts >= self._num_there[:num]).tolist():
            self._pack_tables(index, plan.requests[index], plan.starts[index] + 1)
        views["draw"][:num] += starts - views["positions"][:num]
        views["positions"][:num] = starts
        views["token_ids"][:num] = [latest_token(request) for request in plan.requests]
        for _, (slots, tables) in self._groups:
            slots[:num] = tables[self._rows[:num], starts // size] * size + starts % size
        if self.layout.has_states:
            self._pack_states(plan)
        if self.layout.has_drafting:
            self._pack_next(plan)

    def _pack_next(self, plan: StepPlan) -> None:
        """The token after each row: one that is known, or the one that this step samples in the row."""
        ids: list[int] = []
        num_sampled = 0
        for entry in plan.entries:
            known = entry.request.tokens(entry.start + 1, entry.start + 1 + entry.count - entry.num_sampled)
            ids += known
            ids += [0] * (entry.count - entry.num_sampled - len(known))  # in flight: one poor key of many
            ids += range(-1 - num_sampled, -1 - num_sampled - entry.num_sampled, -1)
            num_sampled += entry.num_sampled
        self.views["next_ids"][: len(ids)] = ids
        self.views["next_ids"][len(ids) :] = 0

    def _pack_states(self, plan: StepPlan) -> None:
        """The slots of each sequence's state, and its first token row. Padding has slot 0, and no rows. Steps that only
        decode seldom change any of these."""
        num = len(plan.entries)
        states = [entry.request.state for entry in plan.entries if entry.request.state is not None]
        if len(states) != num:
            raise InvariantError(f"{num - len(states)} of {num} sequences have no slot for their recurrent state")
        is_one_each = plan.num_tokens == num
        ends = range(1, num + 1) if is_one_each else list(accumulate(entry.count for entry in plan.entries))
        for name, values, rest in (
            ("state_reads", [state.read_slot for state in states], 0),
            ("state_writes", [state.slot for state in states], 0),
            ("first_rows", ends, plan.num_tokens),
        ):
            if self._of_states.get(name) != values:
                view = self.views[name][-self.layout.num_seqs :]  # all but the first sequence's first row, which is 0
                view[:num] = values
                view[num:] = rest
                self._of_states[name] = values

    def _pack_adapters(self, plan: StepPlan) -> None:
        """The slot of each token row's adapter. Padding has none."""
        view, num = self.views["adapter_slots"], plan.num_tokens
        slots = [entry.request.adapter_slot for entry in plan.entries]
        is_one_each = num == len(slots)
        view[:num] = slots if is_one_each else np.repeat(slots, [entry.count for entry in plan.entries])
        view[num:] = 0

    def _pack_tables(self, index: int, request: Request, stop: int) -> None:
        """Add the blocks that the sequence needs up to token `stop`, and that are missing, to the tables `index`."""
        num_blocks, least = -(-stop // self.layout.block_size), min(map(len, request.tables), default=0)
        if num_blocks > least:
            raise InvariantError(f"request {request.request_id} has {least} blocks, but computes up to token {stop}")
        owner, generation, num_there = self._tables[index]
        if owner is not request or generation != request.num_preemptions:  # a preempted request has new blocks
            num_there = 0
        if num_blocks > num_there:
            for group, (_, tables) in self._groups:
                tables[index, num_there:num_blocks] = request.tables[group][num_there:num_blocks]
            self._tables[index] = (request, request.num_preemptions, num_blocks)
            self._num_there[index] = num_blocks * self.layout.block_size

    def _pack_tokens(self, entries: tuple[Scheduled, ...]) -> None:
        """Token rows in the order of the entries. Those of single tokens, and of drafts, are written together, field by
        field."""
        single: list[Scheduled] = []
        rows: list[int] = []  # of `single` and of drafts: their token rows ...
        indices: list[int] = []  # ... and their sequences
        drafted: list[tuple[int, Scheduled]] = []  # (sequence, entry)
        firsts: list[int] = []  # token rows of `drafted`
        row = 0
        for index, entry in enumerate(entries):
            if entry.count == 1:
                single.append(entry)
                rows.append(row)
                indices.append(index)
            elif entry.drafts:
                drafted.append((index, entry))
                firsts.append(row)
            else:
                self._pack_run(index, entry, row)
            row += entry.count
        if len(rows) == row:
            self._pack_single_tokens(single, slice(0, row), indices)
        elif rows:
            self._pack_single_tokens(single, rows, indices)
        if drafted:
            self._pack_drafts(drafted, firsts)

    def _pack_single_tokens(self, entries: Sequence[Scheduled], rows: slice | list[int], indices: list[int]) -> None:
        views, size = self.views, self.layout.block_size
        starts = [entry.start for entry in entries]
        views["token_ids"][rows] = [single_token(entry) for entry in entries]
        views["positions"][rows] = starts
        for group, (slots, _) in self._groups:
            slots[rows] = [
                entry.request.tables[group][start // size] * size + start % size
                for entry, start in zip(entries, starts, strict=True)
            ]
        views["seq_rows"][rows] = indices

    def _pack_drafts(self, entries: list[tuple[int, Scheduled]], firsts: list[int]) -> None:
        """The known tokens of entries with drafts, and these, from the token rows `firsts` on. A few rows each, so
        plain lists take a third of the time of arrays for each."""
        views, size = self.views, self.layout.block_size
        rows: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        indices: list[int] = []
        for (index, entry), first in zip(entries, firsts, strict=True):
            count, start, request = entry.count, entry.start, entry.request
            rows += range(first, first + count)
            ids += request.tokens(start, request.num_tokens)
            ids += entry.drafts
            positions += range(start, start + count)
            indices += [index] * count
        at: slice | list[int] = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
        views["token_ids"][at] = ids
        views["positions"][at] = positions
        views["seq_rows"][at] = indices
        for group, (slots, _) in self._groups:
            slots[at] = [
                table[position // size] * size + position % size
                for _, entry in entries
                for table in (entry.request.tables[group],)
                for position in range(entry.start, entry.start + entry.count)
            ]

    def _pack_run(self, index: int, entry: Scheduled, row: int) -> None:
        """Several tokens of one sequence, from token row `row` on."""
        views, size, stop = self.views, self.layout.block_size, entry.start + entry.count
        rows = slice(row, row + entry.count)
        positions = np.arange(entry.start, stop, dtype=np.int32)
        views["token_ids"][rows] = known_or_fed(entry.request, entry.start, stop)
        views["positions"][rows] = positions
        for _, (slots, tables) in self._groups:
            slots[rows] = tables[index, positions // size] * size + positions % size
        views["seq_rows"][rows] = index

    def _pack_samples(self, plan: StepPlan) -> None:
        """Sampling parameters of each sampled row, in the order of `plan.sampled`: of drafts too."""
        views, samplers = self.views, self._samplers
        requests, places, logit_rows, draws = sampled_rows(plan)
        num = len(requests)
        # a drafting layer's step, which decodes, reads these rows of the hidden states of the step before
        views["logit_rows"][:num] = plan.hidden_rows or logit_rows
        views["draw"][:num] = draws
        self._pack_settings(
            [index for index, request in enumerate(requests) if samplers[index] is not request], requests
        )
        for index, request in enumerate(requests):
            if request.params.min_tokens or index in self._suppressing:
                suppressed_ids = request.suppressed_after(places[index])
                if suppressed_ids or index in self._suppressing:
                    self._pack_suppressed(index, suppressed_ids)
        if plan.scored:
            num = self._pack_scores(plan, num)
        for index in range(num, self._num_samplers):
            if samplers[index] is not None:
                self._forget_settings(index)
        self._num_samplers = num

    def _pack_settings(self, indices: list[int], requests: Sequence[Request]) -> None:
        """Write the settings of sampled rows that have changed their request, field by field."""
        if not indices:
            return
        views, changed = self.views, [requests[index] for index in indices]
        for index, request in zip(indices, changed, strict=True):
            self._samplers[index] = request
            (self._with_minimum.add if request.params.min_tokens else self._with_minimum.discard)(index)
        params = [request.params for request in changed]
        for name in FLOATS:
            self.floats[name][indices] = [getattr(one, name) for one in params]
        views["top_k"][indices] = [one.top_k for one in params]
        views["seed"][indices] = np.array([request.seed & 0xFFFFFFFF for request in changed], np.uint32).view(np.int32)
        views["num_logprobs"][indices] = [-1 if one.logprobs is None else one.logprobs for one in params]
        views["forced"][indices] = -1

    def _pack_scores(self, plan: StepPlan, num_sampled: int) -> int:
        """Logit rows after the sampled ones: greedy, with the prompt's own next token forced. Returns their end."""
        views, index, row = self.views, num_sampled, 0
        if plan.num_logit_rows > self.layout.num_seqs:
            raise InvariantError(f"{plan.num_logit_rows} rows of logits do not fit into {self.layout}")
        for entry in plan.entries:
            if entry.num_scored:
                rows = slice(index, index + entry.num_scored)
                for at in range(index, rows.stop):
                    self._forget_settings(at)
                    self._samplers[at] = SCORED
                first = entry.first_scored
                views["logit_rows"][rows] = row + np.arange(first, first + entry.num_scored) - entry.start
                views["forced"][rows] = entry.request.prompt_ids[first + 1 : first + 1 + entry.num_scored]
                views["num_logprobs"][rows] = entry.request.num_prompt_logprobs
                index = rows.stop
            row += entry.count
        return index

    def _pack_suppressed(self, index: int, ids: tuple[int, ...]) -> None:
        if len(ids) > MAX_STOP_IDS:
            raise InvariantError(f"{len(ids)} ids are suppressed, but a row has room for {MAX_STOP_IDS}")
        self.views["suppressed_ids"][index] = -1
        self.views["suppressed_ids"][index, : len(ids)] = ids
        (self._suppressing.add if ids else self._suppressing.discard)(index)

    def _forget_settings(self, index: int) -> None:
        """Reset sampled row `index`: greedy, without logprobs."""
        self._samplers[index] = None
        self._with_minimum.discard(index)
        self.views["forced"][index] = -1
        self.floats["temperature"][index] = 0.0
        self.views["num_logprobs"][index] = -1
        self._pack_suppressed(index, ())


def sampled_rows(plan: StepPlan) -> tuple[list[Request], Sequence[int], list[int], list[int]]:
    """Of each sampled row: its request, the number of drafts that its token follows, its token row, and the number of
    its draw."""
    if not plan.num_drafts:
        requests = [entry.request for entry in plan.sampled]
        ends = accumulate(entry.count for entry in plan.entries)
        rows = [end - 1 for end, entry in zip(ends, plan.entries, strict=True) if entry.samples]
        return requests, (0,) * len(requests), rows, [request.num_output_tokens for request in requests]
    requests, end = [], 0
    places: list[int] = []
    draws: list[int] = []
    rows = []
    for entry in plan.entries:
        end += entry.count
        if entry.samples:
            count, first = entry.num_sampled, entry.request.num_output_tokens
            requests += [entry.request] * count
            places += range(count)
            rows += range(end - count, end)
            draws += range(first, first + count)
    return requests, places, rows, draws


def single_token(entry: Scheduled) -> int:
    """The id of an entry's only token, or the reference to a token in flight."""
    request = entry.request
    if entry.samples and request.num_in_flight <= 1:
        return latest_token(request)
    return known_or_fed(request, entry.start, entry.start + 1)[0]


def latest_token(request: Request) -> int:
    """The id of the last token of a request with at most one in flight, or the reference to that one."""
    if request.num_in_flight:
        return -1 - request.flight_row
    return request.output_ids[-1] if request.output_ids else request.prompt_ids[-1]


def known_or_fed(request: Request, start: int, stop: int) -> list[int]:
    """Token ids [start, stop). A token in flight is -1 - its row in the previous step's output."""
    ids = request.tokens(start, stop)
    if len(ids) == stop - start:
        return ids
    if request.num_in_flight != 1 or len(ids) != stop - start - 1:
        raise InvariantError(
            f"request {request.request_id} has {request.num_in_flight} tokens in flight, but a step needs "
            f"{stop - start - len(ids)} of them: only the last one can be fed"
        )
    return [*ids, -1 - request.flight_row]
