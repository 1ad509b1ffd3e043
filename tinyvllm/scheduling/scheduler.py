"""Decide which tokens of which requests the next step computes.

There are no phases. Each request has `num_pending` tokens to compute: one when it decodes, many when its prompt is new
or it was preempted. A step distributes its token budget over the running requests, then over the waiting ones, so
chunks of long prompts share steps with decodes. When the pool runs out, the request that is last in rank gives up its
blocks and is recomputed later (Kwon et al. 2023, sec. 4.5).

A step passes through three calls: `schedule` plans it, `advance` marks it as launched, `commit` takes its tokens. The
next step may be planned between the last two, while tokens are still in flight, unless the step has drafts: how many
tokens it brings is known only at its end.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort

from tinyvllm.config import Capacity
from tinyvllm.errors import ContextLengthError, InvariantError, RequestError
from tinyvllm.faults import reach
from tinyvllm.scheduling.adapter_slots import AdapterSlots
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.drafts import Speculator
from tinyvllm.scheduling.plan import ContinuedPlan, Scheduled, StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.request import MAX_REDONE, Request, Status, TokenLogprobs
from tinyvllm.scheduling.step_pace import StepPace
from tinyvllm.scheduling.tiers import Fetch

MOST_PASSED = 64  # requests that wait for their adapter's slot and that a step looks past, at most
NO_FINITE_LOGITS = "the model produced no finite logits"  # how such an error begins
NOTHING_ALLOWED = (
    "no token is left to sample: allowed_token_ids, bad_words and the grammar together exclude every one, or "
    "the model produced no finite logits"
)


def no_finite_logits(request: Request, model: str) -> str:
    """The error of a request whose next token cannot be sampled, because its logits are NaN or infinite."""
    num_output = len(request.output_ids)  # without those in flight
    position = request.num_prompt_tokens + num_output
    return (
        f"{NO_FINITE_LOGITS} for the token at position {position}, after {num_output} tokens of output: the weights "
        f"of {model}, or its kernels on this device, give NaN or infinity there"
    )


def max_request_len(capacity: Capacity) -> int:
    """The maximum number of tokens, prompt plus output, of one request."""
    return min(capacity.max_model_len, capacity.num_tokens)


def check_length(num_prompt_tokens: int, max_tokens: int | None, capacity: Capacity) -> None:
    """Refuse what can never run: an empty prompt, or one without room for `max_tokens` (None: for one token).

    Raises RequestError or ContextLengthError.
    """
    limit = max_request_len(capacity)
    if num_prompt_tokens == 0:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    total = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
    if total <= limit:
        return
    if capacity.max_model_len <= limit:
        bound, remedy = f"the maximum context length is {limit} tokens", "raise --max-model-len"
    else:
        bound = f"the KV pool holds {limit} tokens (the maximum context length is {capacity.max_model_len})"
        remedy = "raise --gpu-memory-utilization or --num-gpu-blocks-override"
    if max_tokens is None or num_prompt_tokens >= limit:
        raise ContextLengthError(
            f"{bound}, but the prompt has {num_prompt_tokens} tokens and the output needs at least one: "
            f"shorten the prompt or {remedy}"
        )
    raise ContextLengthError(
        f"{bound}, but {total} were requested, {num_prompt_tokens} for the prompt and {max_tokens} for the output: "
        f"shorten the prompt, lower max_tokens or {remedy}",
        param="max_tokens",
    )


def in_stable_rows(entries: list[Scheduled]) -> list[Scheduled]:
    """The entries of a step in batch order: each decode in the row of the step before, if it can, then the prompts.

    What a row's inputs say of its request is written only if the request has changed, so most rows should keep theirs.
    A row that has become free is filled with a request from the end.
    """
    single = [entry for entry in entries if entry.count == 1]
    rows: list[Scheduled | None] = [None] * len(single)
    moving: list[Scheduled] = []
    for entry in single:
        row = entry.request.row
        if 0 <= row < len(rows) and rows[row] is None:
            rows[row] = entry
        else:
            moving.append(entry)
    moving.reverse()
    ordered = [entry or moving.pop() for entry in rows]
    if len(single) < len(entries):
        ordered += [entry for entry in entries if entry.count != 1]
    for row, entry in enumerate(ordered):
        entry.request.row = row
    return ordered


class Scheduler:
    """Owns the waiting queue and the running list. Requests of lower rank are admitted first and preempted last.

    Rank is arrival (policy fcfs), or priority and then arrival (policy priority). No request overtakes the head of the
    queue, so within one priority none starves.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        capacity: Capacity,
        policy: str = "fcfs",
        model: str = "the model",
        pace: StepPace | None = None,
        speculator: Speculator | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        """model: its name, for error messages. pace: limits the chunks of prompts in steps that decode; None: only
        `capacity` does. speculator: what makes the drafts of `Request.drafts`; None: there are none.
        adapters: the device's slots for low-rank adapters; None: it has none."""
        if capacity.max_num_batched_tokens < capacity.max_num_seqs:
            raise InvariantError(
                f"a step of {capacity.max_num_batched_tokens} tokens cannot decode {capacity.max_num_seqs} sequences"
            )
        self.block_manager = block_manager
        self.capacity = capacity
        self.running: list[Request] = []  # in order of rank
        self.num_preemptions = 0  # since start
        self.prefix_queries = 0  # prompt tokens looked up in the prefix cache, since start
        self.prefix_hits = 0  # prompt tokens found there, since start
        self.pace = pace
        self.speculator = speculator
        self.adapters = adapters
        self._latest: StepPlan | None = None
        self._by_priority = policy == "priority"
        self._model = model
        self._max_len = max_request_len(capacity)
        self._max_chunk = capacity.max_chunk
        self._states = block_manager.state_pool
        self._requests: dict[str, Request] = {}  # all unfinished ones
        # A heap by rank. Requests that end while they wait stay in it until they reach the top: removal would be O(n).
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._fetching: dict[Request, Fetch] = {}  # not in the queue yet: the disk has more of their prefixes
        self._fetched: dict[Request, Fetch] = {}  # in the queue, or just scheduled: copies that must not give way yet
        self._num_arrived = 0
        # of the step being planned: logit rows that are not reserved for a sequence, and those that drafts may have
        self._num_spare_rows = self._num_draft_rows = 0

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All unfinished ones, in order of arrival."""
        return list(self._requests.values())

    def audit(self) -> None:
        """Check the pools, and that blocks belong to unfinished requests only. Raises InvariantError."""
        self.block_manager.audit()
        for request in self.block_manager.holders - set(self._requests.values()):
            raise InvariantError(f"request {request.request_id} has ended, but holds blocks: {request.tables}")

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError or ContextLengthError if it can never run."""
        check_length(request.num_prompt_tokens, None, self.capacity)
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is in use: choose another", param="request_id")
        request.max_tokens = min(request.max_tokens, self._max_len - request.num_prompt_tokens)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        fetch = self.block_manager.begin_fetch(request) if self._is_cacheable(request) else None
        if fetch is None:
            self._queue(request)
        else:
            self._fetching[request] = fetch

    def abort(self, request_id: str) -> Request | None:
        """End a request now and free its blocks. None if it is unknown or has finished. Call it between steps only."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        """End a request, for example at a stop string. If it has already ended, only its reason is replaced."""
        request.finish_reason, request.stop_reason, request.error = reason, stop_reason, error
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._release_slot(request)
        request.status, request.drafts = Status.FINISHED, ()
        if self.speculator is not None:
            self.speculator.forget(request)
        del self._requests[request.request_id]
        self._end_fetch(request)
        self.block_manager.free(request, keep=reason != "error")  # after a failure the blocks may hold NaN

    def schedule(self) -> StepPlan | None:
        """Choose the next step's tokens and allocate their blocks.

        None if there is nothing to do, or nothing until the tokens in flight are known.
        """
        if not self._requests:
            return None
        if self._fetching:
            self._queue_fetched()
        if self._states is not None:
            self._states.begin_step()
        if self.adapters is not None:
            self.adapters.begin_step()
        if (continued := self._continue_latest()) is not None:
            self._latest = continued
            return continued
        entries: list[Scheduled] = []
        preempted: list[Request] = []
        budget = self._continue_running(entries, preempted)
        num_continued = len(entries)
        if not preempted:  # otherwise the pool has just run out
            self._admit_waiting(entries, budget)
        if not entries:
            if self.is_fetching or any(request.num_in_flight for request in self._requests.values()):
                return None
            raise InvariantError(
                f"nothing can be scheduled: {self.num_running} running, {self.num_waiting} waiting, "
                f"{self.block_manager.least_free} blocks free"
            )
        admitted = tuple(entry.request for entry in entries[num_continued:])
        writes = () if self.adapters is None else self.adapters.take_writes()
        plan = StepPlan(tuple(in_stable_rows(entries)), tuple(preempted), admitted, writes)
        self._latest = plan
        return plan

    def _continue_latest(self) -> StepPlan | None:
        """A plan for what most steps are: the latest step's requests decode once more, and there are no others. It
        needs only a few numbers of each request. None if there is anything else to do."""
        latest = self._latest
        if latest is None or not latest.only_decodes or len(latest.requests) != len(self._requests):
            return None
        if self._states is not None or self.adapters is not None:
            return None
        starts = []
        for request in latest.requests:
            start, in_flight = request.num_computed, request.num_in_flight
            num_output = len(request.output_ids) + in_flight
            if (
                request.status is not Status.RUNNING
                or len(request.prompt_ids) + num_output - start != 1
                or (in_flight and num_output >= request.max_tokens)
                or request.drafts
                or (start >= request.room and not self.block_manager.grow(request, start + 1))
            ):
                return None
            starts.append(start)
        return ContinuedPlan(latest, starts)

    def advance(self, plan: StepPlan) -> None:
        """Mark a step as launched: its known tokens count as computed, and the token that follows each request's last
        one is in flight. What becomes of drafts, `commit` decides."""
        if plan.only_decodes:
            for row, request in enumerate(plan.requests):
                request.num_computed += 1
                request.num_in_flight += 1
                request.flight_row = row
            return
        for entry in plan.entries:
            entry.request.num_computed += entry.count - len(entry.drafts)
        for entry in plan.scored:
            entry.request.num_scored += entry.num_scored
        row = 0
        for entry in plan.sampled:
            request = entry.request
            request.num_in_flight += 1
            request.flight_row = row
            row += entry.num_sampled

    def commit(self, plan: StepPlan, output: StepOutput, outs: list[TokenOut] | None = None) -> list[TokenOut]:
        """Take the tokens of an advanced step: append them, seal full blocks, and end requests that are complete.

        Returns one TokenOut per new token, but none for requests that ended while their token was in flight. outs: the
        list that they are added to. If a request raises, it has those of the requests before it, which may have ended.
        """
        outs = [] if outs is None else outs
        reach("engine.commit")
        num_sampled = plan.num_sampled_rows
        if len(output.token_ids) != num_sampled or len(output.logprobs) != num_sampled:
            raise InvariantError(
                f"the plan samples {num_sampled} tokens, but the step returned {len(output.token_ids)} tokens and "
                f"{len(output.logprobs)} logprobs"
            )
        if plan.only_decodes:
            for request, token_id, logprobs in zip(plan.requests, output.token_ids, output.logprobs, strict=True):
                if request.status is not Status.FINISHED:
                    request.num_in_flight -= 1
                    outs.append(self._append(request, token_id, logprobs))
        else:
            self._commit_entries(plan, output, outs)
            if self.block_manager.has_windows:
                self._give_back(plan)
        if self.speculator is not None:
            self.speculator.committed(plan, output)
        return outs

    def _commit_entries(self, plan: StepPlan, output: StepOutput, outs: list[TokenOut]) -> None:
        _take_scores(plan, output)
        row = 0
        for entry in plan.entries:
            request = entry.request
            if not entry.samples:
                if request.status is Status.RUNNING:
                    self.block_manager.seal(request)
                continue
            if request.status is not Status.FINISHED:
                request.num_in_flight -= 1
                if entry.drafts:
                    self._settle(entry, output, row, outs)
                else:
                    outs.append(self._append(request, output.token_ids[row], output.logprobs[row]))
            row += entry.num_sampled

    def _settle(self, entry: Scheduled, output: StepOutput, row: int, outs: list[TokenOut]) -> None:
        """Append the tokens of an entry with drafts, whose first sampled row is `row`: as many as there are drafts that
        equal the token sampled before them, and the one after these."""
        request, drafts = entry.request, entry.drafts
        tokens = output.token_ids[row : row + entry.num_sampled]
        num_right = next((i for i, draft in enumerate(drafts) if draft != tokens[i]), len(drafts))
        request.num_drafted += len(drafts)
        request.num_accepted += num_right
        if self.speculator is not None:
            self.speculator.settled(request, len(drafts), num_right)
        is_redone = False
        if self._states is not None and request.state is not None:
            is_redone = num_right < len(drafts)
            self._states.settle(request.state, is_redone=is_redone)
        if is_redone:  # its recurrent state is the one before this step
            request.num_computed = entry.start
        for place in range(num_right + 1):
            request.num_computed += place > 0 and not is_redone
            outs.append(self._append(request, tokens[place], output.logprobs[row + place]))
            if request.status is Status.FINISHED:
                break

    def _give_back(self, plan: StepPlan) -> None:
        """Free the blocks before the windows of requests that computed many tokens. Those of single tokens are freed
        when the request needs another block."""
        for entry in plan.entries:
            if entry.count > 1 and entry.request.status is Status.RUNNING:
                self.block_manager.give_back(entry.request)

    def _continue_running(self, entries: list[Scheduled], preempted: list[Request]) -> int:
        """Schedule the running requests in order of rank; return the rest of the budget."""
        budget = self._token_budget()
        self._num_spare_rows = self.capacity.max_num_seqs - len(self.running)
        if self.speculator is not None:
            self._num_draft_rows = self._limit_drafts()
        index = 0
        while index < len(self.running):  # the list shortens from its end when requests are preempted
            request = self.running[index]
            start = request.num_computed
            num_after = len(self.running) - index - 1  # one token is reserved for each, so a long prompt stalls nobody
            in_flight, num_output = request.num_in_flight, len(request.output_ids) + request.num_in_flight
            count = min(len(request.prompt_ids) + num_output - start, budget - num_after)
            if in_flight and num_output >= request.max_tokens:
                count = 0  # the token in flight is the last, whatever its id
            if request.num_prompt_logprobs is not None:
                count = self._limit_scored(request, start, count)
            if self._states is not None and count > 1:
                count = self._cut(request, start, count)
            drafts = request.drafts
            if drafts:
                drafts = self._take_drafts(request, start + count, budget - num_after - count, num_after)
                count += len(drafts)
            if start + count > request.room:  # seldom: a block lasts for many steps
                count = min(count, self._max_chunk)
                if not self._make_room(request, start + count, preempted):
                    break
            if count:
                entries.append(Scheduled(request, start, count, drafts))
                state = request.state
                if state is not None and start + count >= state.next_event:  # as seldom as a new block
                    self._plan_state(request, start + count)
            budget -= count
            index += 1
        return budget

    def _token_budget(self) -> int:
        """The most tokens of the next step."""
        budget = self.capacity.max_num_batched_tokens
        had_prompts = self._latest is not None and not self._latest.is_decode
        if self.pace is None or not (self._waiting or had_prompts):
            return budget
        num_decoding = sum(request.num_pending == 1 for request in self.running)
        num_admissible = min(self.num_waiting, self.capacity.max_num_seqs - len(self.running))  # others wait anyway
        num_prompts = len(self.running) - num_decoding + num_admissible
        return max(len(self.running), self.pace.limit(num_decoding, budget, num_prompts))

    def _limit_drafts(self) -> int:
        """How many drafts the step may have. Steps that only decode run in graphs with logits in all of up to
        `max_verify_rows` rows; with a prompt among them, drafts have the logit rows that no sequence needs."""
        num_known = sum(request.num_pending for request in self.running)
        num_admissible = min(self.num_waiting, self._num_spare_rows)
        if num_admissible or any(request.num_pending > MAX_REDONE for request in self.running):
            return self._num_spare_rows - num_admissible if self.capacity.max_verify_rows else 0
        return self.capacity.max_verify_rows - num_known

    def _take_drafts(self, request: Request, stop: int, budget: int, num_after: int) -> tuple[int, ...]:
        """The drafts of a request that can follow its tokens up to `stop` in the step. Nobody is preempted for drafts,
        and a block is left for each of the `num_after` requests that come after it."""
        drafts, request.drafts = request.drafts, ()
        count = min(len(drafts), budget, self._num_draft_rows)
        if stop != request.num_tokens:  # a part of it that samples nothing
            return ()
        count = min(count, self._max_chunk - (stop - request.num_computed))
        if self._states is not None and request.state is not None:
            count = min(count, self._states.room_for_drafts(request.state, request.num_computed, stop))
        if stop + count > request.room and not (
            count > 0 and self.block_manager.grow(request, stop + count, num_spare=num_after)
        ):
            count = min(count, request.room - stop)
        if count <= 0:
            return ()
        if self._states is not None and request.state is not None and not self._states.fork(request.state):
            return ()
        self._num_draft_rows -= count
        self._num_spare_rows = max(0, self._num_spare_rows - count)
        return drafts[:count]

    def _limit_scored(self, request: Request, start: int, count: int) -> int:
        """Limit `count` to the free logit rows, if tokens [start, start + count) need one each for prompt logprobs.

        A step has as many logit rows as sequences may run, and the request owns one of them. The rows without an owner
        are given out by rank, except one that is kept so that the next request in the queue can be admitted.
        """
        if request.num_to_score <= 0:
            return count
        num_free = max(0, request.num_scored - start)  # recomputed after a preemption: these are scored already
        num_spare = max(0, self._num_spare_rows - (self.num_waiting > 0))
        count = min(count, num_free + 1 + num_spare)
        self._num_spare_rows -= max(0, count - num_free - 1)
        return count

    def _cut(self, request: Request, start: int, count: int) -> int:
        """The number of tokens from `start` on, at most `count`, whose end is where a checkpoint belongs."""
        assert self._states is not None and request.state is not None
        stop = start + min(count, self._max_chunk)
        return self._states.cut(request.state, start, stop, request.num_tokens) - start

    def _plan_state(self, request: Request, stop: int) -> None:
        """Choose the slots of a step that computes a request's tokens up to `stop`."""
        assert self._states is not None and request.state is not None
        self._states.step(request.state, stop, request.num_tokens)

    def _make_room(self, request: Request, num_tokens: int, preempted: list[Request]) -> bool:
        """Grow the request's block table, preempting the last in rank. False if the request itself was preempted."""
        while not self.block_manager.grow(request, num_tokens):
            victim = self.running.pop()
            self.block_manager.free(victim)
            self._release_slot(victim)
            victim.status, victim.drafts = Status.WAITING, ()
            victim.num_computed = 0
            victim.num_preemptions += 1
            self.num_preemptions += 1
            preempted.append(victim)
            self._queue(victim)  # keeps its rank and its output
            if victim is request:
                return False
        return True

    def _admit_waiting(self, entries: list[Scheduled], budget: int) -> None:
        passed: list[Request] = []  # those that wait for a slot of the device for their adapter
        while budget > 0 and len(self.running) < self.capacity.max_num_seqs and self._num_spare_rows > 0:
            request = self._first_waiting()
            if request is None or len(passed) > MOST_PASSED:
                break
            if not self._hold_slot(request, is_first=not passed):
                passed.append(heapq.heappop(self._waiting)[1])
                continue
            if not self._place(request, min(budget, self._max_chunk)):
                self._release_slot(request)
                break
            heapq.heappop(self._waiting)
            request.status = Status.RUNNING
            request.scheduled_s = time.monotonic()
            insort(self.running, request, key=self._rank)
            self._num_spare_rows -= 1
            count = min(request.num_pending, budget, self._max_chunk)
            count = self._limit_scored(request, request.num_computed, count)
            if self._states is not None:
                count = self._cut(request, request.num_computed, count)
                self._plan_state(request, request.num_computed + count)
            entries.append(Scheduled(request, request.num_computed, count))
            budget -= count
        for request in passed:
            self._queue(request)

    def _hold_slot(self, request: Request, *, is_first: bool) -> bool:
        """Have a request hold the slot of its adapter, if it has one. False if all slots are held by others, or while
        the adapter is read. While a request waits, only requests without adapters pass it: none waits forever."""
        if not request.adapter:
            return True
        slot = self.adapters.acquire(request.adapter) if self.adapters is not None and is_first else None
        request.adapter_slot = slot or 0
        return slot is not None

    def _release_slot(self, request: Request) -> None:
        if request.adapter_slot and self.adapters is not None:
            self.adapters.release(request.adapter)
            request.adapter_slot = 0

    def _place(self, request: Request, max_count: int) -> bool:
        """Allocate blocks for all known tokens of a waiting request, or in a group with a window, which gives them back
        as it goes, for the first `max_count` to be computed. False, with nothing changed, if too few are free.

        One free block of each group is reserved for each running request, which may need it soon: admitting a request
        only to preempt it wastes steps. If nothing runs, nothing is reserved, so every request that fits can run.
        """
        manager, num_reserved = self.block_manager, len(self.running)
        if manager.least_free <= num_reserved or (self._states is not None and not self._states.has_room):
            return False
        num_cached = manager.match_prefix(request) if self._is_cacheable(request) else 0
        request.num_computed = num_cached
        stop = min(request.num_tokens, num_cached + max_count)
        if not manager.grow(request, stop, ahead=request.num_tokens, num_spare=num_reserved):
            manager.free(request)
            request.num_computed = 0
            return False
        if request.num_preemptions == 0:  # a preempted request finds its own blocks, which would distort the hit rate
            request.num_cached_tokens = num_cached
            request.num_restored_tokens = min(num_cached, manager.num_restored)  # 0 if nothing was matched
            self.prefix_queries += request.num_prompt_tokens
            self.prefix_hits += num_cached
            if manager.tiers is not None:
                manager.tiers.note_lookup(request.num_prompt_tokens - num_cached + request.num_restored_tokens)
        self._end_fetch(request)
        return True

    @property
    def is_fetching(self) -> bool:
        """Whether requests wait for the disk, and may be all that there is."""
        return bool(self._fetching) or (self.adapters is not None and self.adapters.is_reading)

    def _queue_fetched(self) -> None:
        """Queue the requests for which the disk has nothing more to give. They keep their rank."""
        assert self.block_manager.tiers is not None
        self.block_manager.tiers.poll()
        for request in [request for request, fetch in self._fetching.items() if fetch.is_done]:
            self._fetched[request] = self._fetching.pop(request)
            self._queue(request)

    def _end_fetch(self, request: Request) -> None:
        """Let what was fetched for a request give way to other copies."""
        for fetches in (self._fetching, self._fetched):
            fetch = fetches.pop(request, None)
            if fetch is not None:
                fetch.release()

    @staticmethod
    def _is_cacheable(request: Request) -> bool:
        """Prompt logprobs and embeddings need hidden states, which the pool does not hold: the whole prompt is computed
        for them."""
        return request.num_to_score <= 0 and request.pooling is None

    def _queue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (self._rank(request), request))

    def _first_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][1].status is Status.FINISHED:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self._by_priority else 0, request.arrival)

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenOut:
        if token_id < 0:
            error = NOTHING_ALLOWED if request.is_masked else no_finite_logits(request, self._model)
            self.finish(request, "error", error=error)
            return TokenOut(request, token_id=None, finish_reason="error")
        request.output_ids.append(token_id)
        if request.num_computed // self.capacity.block_size > request.num_sealed:
            self.block_manager.seal(request)
        reason, stop_reason = None, None
        if token_id in request.end_ids or len(request.output_ids) >= request.max_tokens:
            reason, stop_reason = self._reason_to_stop(request, token_id)
        if request.constraint is not None and stop_reason is None:
            reason = self._follow(request, token_id, reason)
        if reason is not None:
            constraint = request.constraint
            self.finish(request, reason, stop_reason, constraint.error if constraint and reason == "error" else None)
        return TokenOut(request, token_id, logprobs, reason)

    def _follow(self, request: Request, token_id: int, reason: str | None) -> str | None:
        """Advance the request's constraint by a token, which may be EOS; return the reason to finish, if any."""
        assert request.constraint is not None
        if not request.constraint.accept(token_id):
            return "error"
        return "stop" if request.constraint.is_finished else reason

    def _reason_to_stop(self, request: Request, token_id: int) -> tuple[str | None, int | None]:
        """finish_reason and stop_reason after `token_id`, the request's newest token."""
        num_output = len(request.output_ids)
        if num_output > request.params.min_tokens:
            if token_id in request.eos_ids:
                return "stop", None
            if token_id in request.params.stop_token_ids:
                return "stop", token_id
        if num_output >= request.max_tokens:
            return "length", None
        return None, None


def _take_scores(plan: StepPlan, output: StepOutput) -> None:
    """Add a step's logprobs of prompts, and its pooled states, to their requests."""
    for entry, logprobs in zip(plan.scored, output.prompt_logprobs, strict=True):
        entry.request.prompt_logprobs += logprobs
    for entry, states in zip(plan.pooled, output.pooled, strict=True):
        request = entry.request
        earlier = request.pooled if entry.start else None  # none after a preemption
        if earlier is None or request.pooling in ("last", "score"):
            request.pooled = states
        elif request.pooling == "mean":
            request.pooled = earlier + states
