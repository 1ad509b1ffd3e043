"""Whatever comes and goes, the pool adds up and every request answers as it would alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.fakes import (
    Flights,
    make_request,
    make_runner,
    make_scheduler,
    run,
    run_alone,
    scheduler_for,
    scores_alone,
)
from tests.sweeps import examples, in_both, length, swept
from tinyvllm.config import BlockGroup
from tinyvllm.scheduling.request import Request, Status
from tinyvllm.scheduling.scheduler import Scheduler


class Traffic:
    """Drives a scheduler with seeded arrivals, aborts and stops, and remembers every request."""

    def __init__(self, scheduler: Scheduler, seed: int, depth: int) -> None:
        self.scheduler = scheduler
        self.flights = Flights(scheduler, make_runner(scheduler), depth)
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.disturbed: set[Request] = set()
        # A few heads that many prompts share, of lengths at and next to the borders of blocks.
        self.heads = [[self.rng.randrange(200) for _ in range(n)] for n in (0, 3, 4, 8, 9, 12)]

    def arrive(self) -> None:
        longest = min(self.scheduler.capacity.num_tokens, self.scheduler.capacity.max_model_len) - 1
        tail = [self.rng.randrange(200) for _ in range(self.rng.randrange(1, 7))]
        prompt = [*self.rng.choice(self.heads), *tail][:longest]
        if self.requests and self.rng.random() < 0.2:  # a next turn, or the same again
            earlier = self.rng.choice(self.requests)
            prompt = [*earlier.prompt_ids, *earlier.output_ids][:longest]
        request = make_request(
            f"r{len(self.requests)}",
            prompt,
            max_tokens=self.rng.randrange(1, 24),
            eos_ids=[self.rng.randrange(200) for _ in range(2)],
            priority=self.rng.randrange(3),
            seed=self.rng.randrange(2**32),
            temperature=self.rng.choice([0.0, 1.0]),
            prompt_logprobs=self.rng.choice([None, None, 0, 2]),
        )
        self.requests.append(request)
        self.scheduler.add(request)

    def disturb(self) -> None:
        """Abort or stop somebody, running or waiting."""
        alive = [request for request in self.requests[-40:] if request.status is not Status.FINISHED]
        if not alive:
            return
        victim = self.rng.choice(alive)
        self.disturbed.add(victim)
        if self.rng.random() < 0.7:
            assert self.scheduler.abort(victim.request_id) is victim
        else:
            self.scheduler.finish(victim, self.rng.choice(["stop", "error"]))
        self.scheduler.block_manager.audit()

    def move(self, arrivals: float, disturbances: float) -> None:
        while self.rng.random() < arrivals and self.scheduler.num_waiting < 20:
            self.arrive()
        if self.rng.random() < disturbances:
            self.disturb()
        self.flights.step()

    def check_answers(self) -> None:
        for request in self.requests:
            assert request.status is Status.FINISHED
            windows = [group.window for group in self.scheduler.capacity.groups]
            alone, scores = run_alone(request, windows), scores_alone(request, windows)
            assert request.output_ids == alone[: len(request.output_ids)], request.request_id
            assert request.prompt_logprobs == scores[: len(request.prompt_logprobs)], request.request_id
            if request.output_ids and request.num_prompt_logprobs is not None:
                assert len(request.prompt_logprobs) == request.num_prompt_tokens - 1, request.request_id
            if request not in self.disturbed and request.num_tokens < self.scheduler.capacity.num_tokens:
                assert len(request.output_ids) == len(alone), request.request_id


TRAFFIC = [
    (1, 9, "fcfs", True, 8),
    (2, 12, "fcfs", True, 64),
    (3, 9, "priority", True, 8),
    (4, 30, "priority", True, 16),
    (5, 9, "fcfs", False, 9),
    (6, 60, "fcfs", True, 24),
]


@in_both
@pytest.mark.parametrize(
    ("seed", "num_blocks", "policy", "prefix_caching", "budget", "depth"),
    swept(
        [(*case, depth) for case in TRAFFIC for depth in (1, 2)],
        [(*TRAFFIC[0], 2), (*TRAFFIC[2], 1), (*TRAFFIC[4], 2)],
    ),
)
def test_random_traffic_keeps_the_pool_and_the_answers(
    seed: int, num_blocks: int, policy: str, prefix_caching: bool, budget: int, depth: int
) -> None:
    scheduler = make_scheduler(
        num_blocks, policy=policy, prefix_caching=prefix_caching, max_num_seqs=6, max_num_batched_tokens=budget
    )
    check_traffic(Traffic(scheduler, seed, depth), length(250, 1000))
    if num_blocks < 20:
        assert scheduler.num_preemptions > 10
    if prefix_caching:
        assert scheduler.prefix_hits > 0


@in_both
@pytest.mark.parametrize(
    ("seed", "groups", "prefix_caching", "budget"),
    [
        (1, [BlockGroup(12), BlockGroup(9, 6)], True, 8),
        pytest.param(2, [BlockGroup(40), BlockGroup(24, 9), BlockGroup(16, 2)], True, 24, marks=pytest.mark.sweep),
        pytest.param(3, [BlockGroup(60), BlockGroup(14, 5)], True, 16, marks=pytest.mark.sweep),
        (4, [BlockGroup(9, 8)], True, 12),  # every layer has a window
        pytest.param(5, [BlockGroup(30), BlockGroup(9, 6)], False, 10, marks=pytest.mark.sweep),
        (6, [BlockGroup(11, 30), BlockGroup(6, 3)], True, 8),  # no room for the wide window: it bounds the length
    ],
)
def test_random_traffic_over_windows_keeps_the_pools_and_the_answers(
    seed: int, groups: list[BlockGroup], prefix_caching: bool, budget: int
) -> None:
    first, *others = groups
    scheduler = make_scheduler(
        first.num_blocks,
        prefix_caching=prefix_caching,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        max_model_len=60,
        window=first.window,
        other_groups=tuple(others),
    )
    check_traffic(Traffic(scheduler, seed, depth=1 + seed % 2), length(70, 250))
    if prefix_caching:
        assert scheduler.prefix_hits > 0


@in_both
@pytest.mark.parametrize(
    ("seed", "num_blocks", "num_states", "interval", "windows", "budget"),
    [
        (1, 12, 6, 2, (), 8),  # preemptions; at times no slot is left for a checkpoint
        pytest.param(2, 60, 30, 3, (), 24, marks=pytest.mark.sweep),
        (3, 60, 5, 2, (), 16),  # fewer sequences run than may
        (4, 30, 12, 4, (BlockGroup(14, 6),), 16),
        pytest.param(5, 24, 12, 1, (), 64, marks=pytest.mark.sweep),
    ],
)
def test_random_traffic_with_states_keeps_the_slots_and_the_answers(
    seed: int, num_blocks: int, num_states: int, interval: int, windows: tuple[BlockGroup, ...], budget: int
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        max_model_len=60,
        other_groups=windows,
        num_state_slots=num_states + 1,
        checkpoint_interval=interval,
    )
    check_traffic(Traffic(scheduler, seed, depth=1 + seed % 2), length(70, 250))
    states = scheduler.block_manager.state_pool
    assert states is not None and scheduler.prefix_hits > 0 and states.num_hits > 0
    states.begin_step()
    assert states.num_live == 0
    if num_blocks < 20:
        assert scheduler.num_preemptions > 10


def check_traffic(traffic: Traffic, num_moves: int) -> None:
    """Steps with arrivals, and then steps until all have ended."""
    scheduler, num_steps = traffic.scheduler, 0
    for _ in range(num_moves):
        traffic.move(arrivals=0.35, disturbances=0.1)
    while scheduler.has_work:
        traffic.flights.step()
        num_steps += 1
        assert num_steps < 2000, "what waits is reached"
    for pool in scheduler.block_manager.pools:
        assert pool.num_free == pool.num_blocks - 1
    assert len(traffic.requests) > num_moves // 10
    traffic.check_answers()


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=6)


@examples(20, 150)
@given(
    prompts=prompts,
    block_size=st.sampled_from([1, 2, 4]),
    spare_blocks=st.integers(0, 6),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 12),
    policy=st.sampled_from(["fcfs", "priority"]),
    depth=st.sampled_from([1, 2]),
    windows=st.sampled_from([[None], [None, 3], [5], [None, 7, 2]]),
    num_states=st.sampled_from([0, 0, 1, 2, 5, 20]),
    interval=st.sampled_from([1, 2, 5]),
)
def test_batched_chunked_cached_and_preempted_answers_equal_those_alone(
    prompts: list[list[int]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    spare_budget: int,
    policy: str,
    depth: int,
    windows: list[int | None],
    num_states: int,
    interval: int,
) -> None:
    max_tokens = 6
    scheduler = scheduler_for(
        prompts,
        max_tokens,
        block_size=block_size,
        spare_blocks=spare_blocks,
        windows=windows,
        num_states=num_states,
        policy=policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_budget,
        checkpoint_interval=interval,
    )
    requests = [make_request(f"r{i}", p, max_tokens, priority=i % 2) for i, p in enumerate(prompts)]
    assert run(scheduler, *requests, depth=depth) == [run_alone(request, windows) for request in requests]
    assert scheduler.block_manager.num_free == scheduler.capacity.num_blocks - 1


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    alone = run(make_scheduler(), make_request("x", range(9), seed=7, temperature=1.0))[0]
    crowd = [make_request(f"r{i}", 5 + i, seed=i, temperature=1.0) for i in range(5)]
    request, other = (make_request(name, range(9), seed=s, temperature=1.0) for name, s in (("x", 7), ("y", 8)))
    outputs = run(make_scheduler(num_blocks=14), *crowd, request, other)
    assert outputs[-2] == alone
    assert outputs[-1] != alone
