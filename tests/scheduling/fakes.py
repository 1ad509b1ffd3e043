"""A device of integers: what it answers depends on every slot that a request's block table names.

Each slot holds a digest of its token and of the slot before it in the sequence, as keys and values depend on all that
came before. The next token is a hash of all the digests that are read back through the table. So a block that was
given away too early, shared while it was written, found for the wrong text or not computed changes the output. A slot
of recurrent states holds a position and the digest of the token before it, and must fit the sequence that reads it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tinyvllm.config import BlockGroup, Capacity, SamplingParams
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.drafts import AlwaysDraft, Speculator
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.request import Request, Status, TokenLogprobs
from tinyvllm.scheduling.scheduler import Scheduler

VOCAB_SIZE = 260  # as tests.builders' byte tokenizer


def mix(*numbers: int) -> int:
    """A hash of integers that is the same in every process."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = (value ^ (number & 0xFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return value


class FakeRunner:
    """Executes plans on a dict of slots for each group of layers, which has one of `windows`. `before_step` may raise,
    to play a device that fails."""

    num_captures = 3
    num_general_operations = 0
    verify_sizes: tuple[int, ...] = (2, 4, 8, 16)
    max_in_flight = 1

    def __init__(self, block_size: int, vocab_size: int = VOCAB_SIZE, windows: Sequence[int | None] = (None,)) -> None:
        self.block_size, self.windows = block_size, windows
        self.vocab_size = vocab_size
        self.pools: list[dict[int, int]] = [{} for _ in windows]
        self.states: dict[int, tuple[int, int]] = {}  # by slot: a position, and the digest of the token before it
        self.plans: list[StepPlan] = []
        self.before_step: Callable[[StepPlan], None] = lambda plan: None
        self.choose: Callable[[Request, int], int] = lambda request, digest: digest % self.vocab_size
        self.is_closed = False
        self._newest: dict[Request, int] = {}  # the token that was sampled last, which the host may not know yet

    def launch(self, plan: StepPlan) -> StepOutput:
        """A device that is done at once; whoever launches reads its output when they like."""
        return self.execute(plan)

    def sample(self, flight: StepOutput) -> None: ...

    def collect(self, flight: StepOutput) -> StepOutput:
        return flight

    def wait(self) -> None: ...

    def execute(self, plan: StepPlan) -> StepOutput:
        self.before_step(plan)
        self.plans.append(plan)
        written: set[tuple[int, int]] = set()
        for entry in plan.entries:
            self._write(entry, written)
        self._move_states(plan)
        rows = [(entry.request, place) for entry in plan.sampled for place in range(entry.num_sampled)]
        sampled = [self._sample(request, place) for request, place in rows]
        self._newest = {request: ids for (request, place), (ids, _) in zip(rows, sampled, strict=True) if not place}
        ids, logprobs = [token for token, _ in sampled], [logprob for _, logprob in sampled]
        scores = tuple(self._score(entry) for entry in plan.scored)
        return StepOutput(tuple(ids), tuple(logprobs), scores, pack_s=0.25, device_s=0.5)

    def close(self) -> None:
        self.is_closed = True

    def _slot(self, request: Request, position: int, group: int = 0) -> int:
        block_id = request.tables[group][position // self.block_size]
        assert block_id != 0, f"request {request.request_id} was given the dummy block: {request.tables}"
        return block_id * self.block_size + position % self.block_size

    def _write(self, entry: Scheduled, written: set[tuple[int, int]]) -> None:
        request, stop = entry.request, entry.start + entry.count
        assert entry.count > 0 and entry.start == request.num_computed, entry
        known = stop - len(entry.drafts)
        tokens = [*request.tokens(entry.start, known), *entry.drafts]
        if len(tokens) < entry.count:  # the last is in flight
            assert list(self._newest)[request.flight_row] is request, (
                "the row that the step is told to read is another's"
            )
            tokens = [*tokens, self._newest[request]]
        for group, pool in enumerate(self.pools):
            for position, token_id in enumerate(tokens, entry.start):
                slot = self._slot(request, position, group)
                assert (group, slot) not in written, f"slot {slot} is written twice in one step"
                written.add((group, slot))
                before = pool[self._slot(request, position - 1, group)] if position else 0
                pool[slot] = mix(before, token_id)

    def _move_states(self, plan: StepPlan) -> None:
        """Read all states, and then write all: a step's sequences are computed in any order."""
        moving = [(entry, entry.request.state) for entry in plan.entries if entry.request.state is not None]
        for entry, state in moving:
            if entry.start:
                expected = (entry.start, self.pools[0][self._slot(entry.request, entry.start - 1)])
                assert self.states[state.read_slot] == expected, f"slot {state.read_slot} has another sequence's state"
        writes = [state.slot for _, state in moving]
        reads = {state.read_slot for entry, state in moving if entry.start and state.read_slot != state.slot}
        assert 0 not in writes and len(set(writes)) == len(writes), f"sequences write the same slot: {writes}"
        assert reads.isdisjoint(writes), f"a slot is read and written by different sequences: {reads}, {writes}"
        for entry, state in moving:
            stop = entry.start + entry.count
            self.states[state.slot] = (stop, self.pools[0][self._slot(entry.request, stop - 1)])

    def _sample(self, request: Request, place: int) -> tuple[int, TokenLogprobs | None]:
        """The token after a request's known tokens and the first `place` drafts."""
        digests, end = [], request.num_tokens + place
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            seen = range(0 if window is None else max(0, end - window), end)
            digests += [pool[self._slot(request, position, group)] for position in seen]
        noise = (request.seed, end) if request.params.temperature else ()
        token_id = self.choose(request, mix(*digests, *noise))
        while token_id in request.suppressed_after(place):
            token_id = (token_id + 1) % self.vocab_size
        if request.params.logprobs is None:
            return token_id, None
        top = tuple(((token_id + i) % self.vocab_size, -0.5 - i) for i in range(request.params.logprobs))
        return token_id, TokenLogprobs(-0.5, top, rank=1)

    def _score(self, entry: Scheduled) -> tuple[TokenLogprobs, ...]:
        """For each scored token a number that says what was read before it, and which token came."""
        request, count = entry.request, entry.request.num_prompt_logprobs or 0
        scores = []
        for position in range(entry.first_scored, entry.first_scored + entry.num_scored):
            assert entry.start <= position < entry.start + entry.count, "only what is computed has logits"
            digest = mix(self.pools[0][self._slot(request, position)], request.prompt_ids[position + 1])
            top = tuple((digest % self.vocab_size, -float(rank)) for rank in range(count))
            scores.append(TokenLogprobs(-float(digest % 1000), top, rank=1 + digest % 7))
        return tuple(scores)


def make_capacity(num_blocks: int = 1000, block_size: int = 4, **fields: Any) -> Capacity:
    defaults: dict[str, Any] = {"max_model_len": 100_000, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Capacity(num_blocks=num_blocks, block_size=block_size, **{**defaults, **fields})


def make_scheduler(
    num_blocks: int = 1000, block_size: int = 4, policy: str = "fcfs", prefix_caching: bool = True, **fields: Any
) -> Scheduler:
    capacity = make_capacity(num_blocks, block_size, **fields)
    return Scheduler(BlockManager.of(capacity, prefix_caching), capacity, policy)


def scheduler_for(
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    block_size: int,
    spare_blocks: int,
    windows: Sequence[int | None],
    num_states: int,
    **fields: Any,
) -> Scheduler:
    """With blocks for the longest answer and a few more, in a group for each window, and slots for so many states."""
    num_blocks = 1 + -(-(max(map(len, prompts)) + max_tokens) // block_size) + spare_blocks
    least = {window: min(num_blocks, 3 + -(-window // block_size)) for window in windows if window is not None}
    return make_scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        window=windows[0],
        other_groups=tuple(BlockGroup(least[window], window) for window in windows[1:] if window is not None),
        num_state_slots=num_states and num_states + 1,
        **fields,
    )


class GuessingDrafter:
    """Proposes the token that will be sampled with probability `right`, otherwise another one, and at times fewer
    tokens than asked for. `truth`: what a request answers without drafts."""

    def __init__(
        self, truth: Callable[[Request], list[int]], right: float, seed: int = 0, *, is_free: bool = False
    ) -> None:
        self.is_free = is_free
        self.truth, self.right, self.rng = truth, right, random.Random(seed)
        self.shown: set[Request] = set()
        self.num_committed = 0

    def expects(self, request: Request) -> bool:
        self.shown.add(request)
        return self.rng.random() < 0.8

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        return [self._guess(request, count) for request, count in zip(requests, counts, strict=True)]

    def _guess(self, request: Request, count: int) -> list[int]:
        assert count > 0 and not request.num_in_flight and request.status is Status.RUNNING
        self.shown.add(request)
        known = len(request.output_ids)
        coming = self.truth(request)[known : known + self.rng.choice([count, count, self.rng.randint(0, count)])]
        return [token if self.rng.random() < self.right else self.rng.randrange(200) for token in coming]

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        self.num_committed += 1

    def forget(self, request: Request) -> None:
        self.shown.remove(request)  # once, and only what was shown


def add_drafts(scheduler: Scheduler, drafter: GuessingDrafter, num_tokens: int = 3) -> Speculator:
    """Let a scheduler's steps have drafts."""
    scheduler.speculator = Speculator(drafter, AlwaysDraft(), num_tokens)
    return scheduler.speculator


def make_runner(scheduler: Scheduler) -> FakeRunner:
    """A device with the scheduler's groups."""
    capacity = scheduler.capacity
    return FakeRunner(capacity.block_size, windows=[group.window for group in capacity.groups])


def make_request(
    request_id: str = "r",
    prompt: int | Iterable[int] = 5,
    max_tokens: int = 8,
    eos_ids: Iterable[int] = (),
    priority: int = 0,
    seed: int = 0,
    **params: Any,
) -> Request:
    """A greedy request. An integer prompt is that many tokens which no other id shares."""
    if isinstance(prompt, int):
        rng = random.Random(request_id)
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(prompt)]
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **params})
    return Request(
        request_id,
        list(prompt),
        settings,
        eos_ids=frozenset(eos_ids),
        max_tokens=max_tokens,
        seed=seed,
        priority=priority,
        num_prompt_logprobs=settings.prompt_logprobs,
    )


class Flights:
    """Steps on a FakeRunner that were not committed yet: as many as `depth` before the first is."""

    def __init__(self, scheduler: Scheduler, runner: FakeRunner, depth: int = 1) -> None:
        self.scheduler, self.runner, self.depth = scheduler, runner, depth
        self._flights: deque[tuple[StepPlan, StepOutput]] = deque()

    def step(self) -> list[TokenOut]:
        """Plan one step and commit the oldest if it is time, with the pool audited after each of these."""
        outs: list[TokenOut] = []
        speculator = self.scheduler.speculator
        if speculator is not None:
            while self._flights and (self._flights[-1][0].num_drafts or speculator.wants(self.scheduler.running)):
                outs += self._commit()
            if not self._flights:
                speculator.draft(self.scheduler.running)
        return outs + self._run(self.scheduler.schedule())

    def step_plan(self) -> StepPlan:
        """The same of a step that there is; its plan."""
        plan = self.scheduler.schedule()
        assert plan is not None
        self._run(plan)
        return plan

    def _run(self, plan: StepPlan | None) -> list[TokenOut]:
        scheduler = self.scheduler
        scheduler.block_manager.audit()
        if plan is not None:
            check_limits(scheduler, plan)
            self._flights.append((plan, self.runner.execute(plan)))
            scheduler.advance(plan)
        if not self._flights or (plan is not None and len(self._flights) < self.depth):
            return []
        return self._commit()

    def _commit(self) -> list[TokenOut]:
        outs = self.scheduler.commit(*self._flights.popleft())
        self.scheduler.block_manager.audit()
        return outs


def step(scheduler: Scheduler, runner: FakeRunner) -> list[TokenOut]:
    """One step, planned, run and committed."""
    return Flights(scheduler, runner).step()


def check_limits(scheduler: Scheduler, plan: StepPlan) -> None:
    capacity = scheduler.capacity
    assert 0 < plan.num_tokens <= capacity.max_num_batched_tokens, plan.num_tokens
    assert len(plan.entries) <= capacity.max_num_seqs
    is_verified_alone = plan.num_drafts and plan.num_tokens <= capacity.max_verify_rows
    assert is_verified_alone or plan.num_logit_rows <= capacity.max_num_seqs
    assert not any(request.drafts for request in scheduler.requests), "drafts are for one step"
    ending = {request for request in scheduler.running if request.num_in_flight and request not in _requests(plan)}
    assert _requests(plan) | ending == set(scheduler.running), "all that run move in every step, or end with it"
    for request in ending:
        num_tokens = min(request.num_prompt_tokens + request.max_tokens, capacity.max_model_len, capacity.num_tokens)
        assert request.num_tokens == num_tokens, "who stands still has its last token in flight"
    assert not set(plan.preempted) & set(scheduler.running), "who was preempted in this step does not come back in it"


def _requests(plan: StepPlan) -> set[Request]:
    return {entry.request for entry in plan.entries}


def run(scheduler: Scheduler, *requests: Request, runner: FakeRunner | None = None, depth: int = 1) -> list[list[int]]:
    """Add the requests together, run until all have ended and return their outputs."""
    flights = Flights(scheduler, runner or make_runner(scheduler), depth)
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        flights.step()
    return [request.output_ids for request in requests]


def run_alone(request: Request, windows: Sequence[int | None] = (None,)) -> list[int]:
    """What the request answers with nobody else there, unchunked, uncached and never preempted, and with no block given
    back: its steps' tokens alone depend on the windows."""
    return _run_twin(request, windows).output_ids


def scores_alone(request: Request, windows: Sequence[int | None] = (None,)) -> list[TokenLogprobs]:
    """Its prompt's logprobs, computed in one step."""
    return _run_twin(request, windows).prompt_logprobs


def _run_twin(request: Request, windows: Sequence[int | None]) -> Request:
    everything = [BlockGroup(1000)] * (len(windows) - 1)
    scheduler = make_scheduler(
        prefix_caching=False, max_num_batched_tokens=100_000, max_num_seqs=100_000, other_groups=everything
    )
    twin = Request(
        request.request_id,
        list(request.prompt_ids),
        request.params,
        eos_ids=request.eos_ids,
        max_tokens=request.max_tokens,
        seed=request.seed,
        num_prompt_logprobs=request.num_prompt_logprobs,
    )
    run(scheduler, twin, runner=FakeRunner(scheduler.capacity.block_size, windows=windows))
    return twin
