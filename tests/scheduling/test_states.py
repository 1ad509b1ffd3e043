"""Recurrent states: where checkpoints are made, who resumes from them, and what gives way when slots run out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.scheduling.fakes import FakeRunner, Flights, make_request, make_runner, make_scheduler, run, run_alone
from tests.sweeps import swept
from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.scheduling.block_manager import BlockManager, fixed_states
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.state_pool import StatePool

SIZE = 4  # tokens of a block


def scheduler_of(num_states: int = 40, num_blocks: int = 200, interval: int = 100, **fields: Any) -> Scheduler:
    return make_scheduler(num_blocks, num_state_slots=num_states + 1, checkpoint_interval=interval, **fields)


def pool_of(scheduler: Scheduler) -> StatePool:
    assert scheduler.block_manager.state_pool is not None
    return scheduler.block_manager.state_pool


def steps_of(request: Request, runner: FakeRunner) -> list[tuple[int, int]]:
    """(start, stop) of each step that computed something of a request."""
    entries = [entry for plan in runner.plans for entry in plan.entries if entry.request is request]
    return [(entry.start, entry.start + entry.count) for entry in entries]


def answer(scheduler: Scheduler, runner: FakeRunner, name: str, prompt: Iterable[int], **options: Any) -> Request:
    """Run one request to its end, with the pools audited at each step."""
    request = make_request(name, prompt, **options)
    run(scheduler, request, runner=runner, depth=options.pop("depth", 1))
    return request


def checkpoints(scheduler: Scheduler, tokens: list[int]) -> list[int]:
    """The positions in a text at which there are checkpoints."""
    probe = make_request("probe", [*tokens, 0])
    manager, states = scheduler.block_manager, pool_of(scheduler)
    manager._longest_match(probe)
    return [SIZE * (index + 1) for index, block_hash in enumerate(probe.block_hashes) if states.has(block_hash)]


# -- where checkpoints are made ----------------------------------------------------------------------------------------


def test_a_prompt_stops_at_the_last_border_before_its_end() -> None:
    scheduler = scheduler_of()
    runner = make_runner(scheduler)
    first = answer(scheduler, runner, "a", range(11), max_tokens=1)
    again = answer(scheduler, runner, "b", range(11), max_tokens=1)
    assert steps_of(first, runner) == [(0, 8), (8, 11)] and steps_of(again, runner) == [(8, 11)]
    assert checkpoints(scheduler, list(range(11))) == [8]
    short = answer(scheduler, runner, "c", [9, 9, 9, 9], max_tokens=1)
    assert steps_of(short, runner) == [(0, 4)], "no border before its last token"
    whole = answer(scheduler, runner, "d", [7] * 8, max_tokens=1)
    assert steps_of(whole, runner) == [(0, 4), (4, 8)], "its last token must be computed again, with its block"
    assert checkpoints(scheduler, [7] * 8) == [4, 8]


def test_while_it_decodes_a_sequence_replaces_its_checkpoint() -> None:
    scheduler = scheduler_of()
    request = answer(scheduler, make_runner(scheduler), "a", range(6), max_tokens=20)
    assert checkpoints(scheduler, request.tokens(0, 26)) == [4, 24], "the prompt's, and the last border's"
    assert pool_of(scheduler).num_checkpoints == 2 and pool_of(scheduler).num_live == 0


def test_a_long_output_keeps_checkpoints_at_the_interval() -> None:
    scheduler = scheduler_of(interval=3)
    request = answer(scheduler, make_runner(scheduler), "a", range(6), max_tokens=40)
    assert checkpoints(scheduler, request.tokens(0, 46)) == [4, 16, 28, 40, 44]


def test_chunks_of_a_long_prompt_end_at_checkpoints() -> None:
    scheduler = scheduler_of(interval=7, max_num_batched_tokens=30)
    runner = make_runner(scheduler)
    request = answer(scheduler, runner, "a", range(100), max_tokens=1)
    assert steps_of(request, runner) == [(0, 28), (28, 56), (56, 84), (84, 96), (96, 100)]
    assert checkpoints(scheduler, list(range(100))) == [28, 56, 84, 96, 100]
    scheduler = scheduler_of(interval=10, max_num_batched_tokens=30)
    runner = make_runner(scheduler)
    request = answer(scheduler, runner, "a", range(100), max_tokens=1)
    assert steps_of(request, runner) == [(0, 30), (30, 40), (40, 70), (70, 80), (80, 96), (96, 100)]
    assert checkpoints(scheduler, list(range(100))) == [40, 80, 96, 100]


def test_a_prefix_that_others_share_gets_a_checkpoint() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=100)
    runner = make_runner(scheduler)
    system = list(range(50, 74))
    asked = [answer(scheduler, runner, f"r{i}", [*system, *[i] * 10], max_tokens=1) for i in range(4)]
    assert [steps_of(request, runner) for request in asked] == [
        [(0, 32), (32, 34)],
        [(0, 24), (24, 32), (32, 34)],  # its blocks were found up to 24, so that is where texts part
        [(24, 32), (32, 34)],
        [(24, 32), (32, 34)],
    ]
    assert [request.num_cached_tokens for request in asked] == [0, 0, 24, 24]
    few = [answer(scheduler, runner, f"s{i}", [200, 201, 202, 203, *[i] * 10], max_tokens=1) for i in range(2)]
    assert steps_of(few[1], runner) == [(0, 12), (12, 14)], "one block is not worth it"


def test_embeddings_make_no_checkpoints_and_prompt_logprobs_do() -> None:
    scheduler = scheduler_of()
    runner = make_runner(scheduler)
    pooled = make_request("a", range(11), max_tokens=1)
    pooled.pooling = "last"
    scheduler.add(pooled)
    plan = scheduler.schedule()
    assert plan is not None and plan.num_tokens == 11
    scheduler.abort("a")
    assert pool_of(scheduler).num_free == 40
    scored = answer(scheduler, runner, "b", range(11), max_tokens=1, prompt_logprobs=0)
    assert checkpoints(scheduler, list(range(11))) == [8] and len(scored.prompt_logprobs) == 10


def test_without_prefix_caching_prompts_are_not_cut() -> None:
    scheduler = scheduler_of(num_states=2, prefix_caching=False)
    runner = make_runner(scheduler)
    request = answer(scheduler, runner, "a", range(11), max_tokens=9)
    assert steps_of(request, runner)[0] == (0, 11)
    assert pool_of(scheduler).num_free == 2 and pool_of(scheduler).num_hits == 0


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_each_turn_of_a_conversation_computes_at_most_one_block_and_the_new_text(depth: int) -> None:
    rng = random.Random(1)
    scheduler = scheduler_of()
    runner = make_runner(scheduler)
    text: list[int] = []
    for turn in range(10):
        new = [rng.randrange(200) for _ in range(rng.randrange(1, 30))]
        request = make_request(f"turn{turn}", [*text, *new], max_tokens=rng.randrange(1, 30))
        (output,) = run(scheduler, request, runner=runner, depth=depth)
        assert output == run_alone(request)
        steps = steps_of(request, runner)
        assert steps[0][0] >= (len(text) - 1) // SIZE * SIZE if text else True, f"turn {turn} resumes at {steps[0][0]}"
        in_prompt = sum(
            min(stop, request.num_prompt_tokens) - min(start, request.num_prompt_tokens) for start, stop in steps
        )
        assert in_prompt <= SIZE + len(new)
        text = request.tokens(0, request.num_tokens)
    assert pool_of(scheduler).num_hits == 9


@pytest.mark.parametrize(
    ("num_states", "num_blocks", "budget"),
    swept([(40, 200, 8), (3, 200, 64), (1, 60, 64), (12, 36, 16), (6, 36, 12)], [(1, 60, 64), (12, 36, 16)]),
)
def test_conversations_under_pressure_answer_as_without_a_cache(num_states: int, num_blocks: int, budget: int) -> None:
    """Five conversations with three choices each turn, of which a random one is continued."""
    rng = random.Random(num_states)
    scheduler = scheduler_of(num_states, num_blocks, interval=4, max_num_seqs=6, max_num_batched_tokens=budget)
    flights = Flights(scheduler, make_runner(scheduler), depth=2)
    texts: list[list[int]] = [[] for _ in range(5)]
    for turn in range(4):
        requests = []
        for talk, text in enumerate(texts):
            prompt = [*text, *[rng.randrange(200) for _ in range(rng.randrange(1, 9))]]
            for choice in range(3):
                name = f"{talk}.{turn}.{choice}"
                requests.append(
                    make_request(name, prompt, max_tokens=rng.randrange(1, 25), seed=choice, temperature=1.0)
                )
        for request in requests:
            scheduler.add(request)
        while scheduler.has_work:
            flights.step()
        for request in requests:
            assert request.output_ids == run_alone(request), request.request_id
        texts = [rng.choice(requests[3 * talk : 3 * talk + 3]).tokens(0, 10_000) for talk in range(5)]
    if num_blocks < 40:
        assert scheduler.num_preemptions > 0
    if num_states > 3:
        assert pool_of(scheduler).num_hits > 0
    pool_of(scheduler).begin_step()
    assert pool_of(scheduler).num_live == 0


def test_choices_of_one_prompt_read_its_checkpoint_and_write_slots_of_their_own() -> None:
    scheduler = scheduler_of(max_num_seqs=3)
    runner = make_runner(scheduler)
    answer(scheduler, runner, "before", range(11), max_tokens=1)
    requests = [make_request(f"c{i}", range(11), max_tokens=6, seed=i, temperature=1.0) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    flights = Flights(scheduler, runner)
    flights.step()
    states = [request.state for request in requests if request.state is not None]
    assert len({state.read_slot for state in states}) == 1 and len({state.slot for state in states}) == 3
    assert all(steps_of(request, runner) == [(8, 11)] for request in requests)
    while scheduler.has_work:
        flights.step()
    assert [request.output_ids for request in requests] == [run_alone(request) for request in requests]


def test_a_preempted_request_resumes_from_its_best_checkpoint() -> None:
    scheduler = scheduler_of(num_blocks=16, max_num_seqs=2)
    runner = make_runner(scheduler)
    first, second = make_request("a", range(16), max_tokens=24), make_request("b", range(40, 57), max_tokens=24)
    assert run(scheduler, first, second, runner=runner) == [run_alone(first), run_alone(second)]
    assert scheduler.num_preemptions >= 1 and pool_of(scheduler).num_hits >= 1
    starts = [start for start, _ in steps_of(second, runner)]
    resumed = next(later for earlier, later in itertools.pairwise(starts) if later < earlier)
    assert resumed >= 16, "its prompt's checkpoint, or a later one"


# -- slots that run out, and failures ----------------------------------------------------------------------------------


def test_sequences_wait_for_slots_and_never_fail_for_lack_of_them() -> None:
    scheduler = scheduler_of(num_states=2, max_num_seqs=6)
    requests = [make_request(f"r{i}", 9, max_tokens=9) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    flights = Flights(scheduler, make_runner(scheduler))
    flights.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)
    while scheduler.has_work:
        flights.step()
    assert [request.output_ids for request in requests] == [run_alone(request) for request in requests]
    assert scheduler.num_preemptions == 0


def test_the_least_recently_used_checkpoint_is_evicted_first() -> None:
    scheduler = scheduler_of(num_states=4)
    runner = make_runner(scheduler)
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        answer(scheduler, runner, name, range(first, first + 7), max_tokens=1)
    answer(scheduler, runner, "a again", range(7), max_tokens=1)
    answer(scheduler, runner, "d", range(60, 67), max_tokens=1)
    answer(scheduler, runner, "e", range(80, 87), max_tokens=1)
    found = [checkpoints(scheduler, list(range(first, first + 7))) for first in (0, 20, 40, 60, 80)]
    assert found[0] == [4] and found[1] == [] and found[4] == [4]
    assert pool_of(scheduler).num_evictions == sum(not one for one in found)


def test_a_checkpoint_is_evicted_with_its_block() -> None:
    scheduler = scheduler_of(num_blocks=9)
    runner = make_runner(scheduler)
    answer(scheduler, runner, "a", range(10), max_tokens=1)
    assert pool_of(scheduler).num_checkpoints == 1
    answer(scheduler, runner, "b", range(100, 130), max_tokens=1)
    assert pool_of(scheduler).num_evictions >= 1 and checkpoints(scheduler, list(range(10))) == []


def test_a_failed_request_leaves_no_checkpoint_and_an_aborted_one_does() -> None:
    scheduler = scheduler_of()
    flights = Flights(scheduler, make_runner(scheduler))
    for name, prompt in (("a", range(7)), ("b", range(20, 27))):
        scheduler.add(make_request(name, prompt, max_tokens=9))
    for _ in range(3):
        flights.step()
    scheduler.finish(scheduler.running[0], "error")
    scheduler.abort("b")
    scheduler.block_manager.audit()
    assert checkpoints(scheduler, list(range(7))) == [] and checkpoints(scheduler, list(range(20, 27))) == [4]
    assert pool_of(scheduler).num_live == 0


def test_two_slots_are_the_least() -> None:
    with pytest.raises(CapacityError, match="1 state slots: it needs 2"):
        StatePool(1, 4)


def test_fixed_states_go_round_in_too_few_slots() -> None:
    capacity = scheduler_of(num_states=2).capacity
    slots = [state.slot for state in fixed_states(capacity, 3) if state is not None]
    assert slots == [1, 2, 1] and fixed_states(make_scheduler().capacity, 2) == [None, None]


def forget_a_slot(manager: BlockManager, request: Request, states: StatePool) -> None:
    states._free.pop()


def free_a_live_slot(manager: BlockManager, request: Request, states: StatePool) -> None:
    assert request.state is not None
    states._free.append(request.state.slot)


def cache_a_slot_that_is_not_sealed(manager: BlockManager, request: Request, states: StatePool) -> None:
    states._cached[states._free.pop()] = None


def find_another_slot(manager: BlockManager, request: Request, states: StatePool) -> None:
    (block_hash, slot), *_ = states._findable.items()
    states._findable[block_hash] = slot + 1


def hand_out_the_dummy(manager: BlockManager, request: Request, states: StatePool) -> None:
    states._free.append(0)


Damage = Callable[[BlockManager, Request, StatePool], None]


@pytest.mark.parametrize(
    "damage",
    [forget_a_slot, free_a_live_slot, cache_a_slot_that_is_not_sealed, find_another_slot, hand_out_the_dummy],
)
def test_audit_sees(damage: Damage) -> None:
    scheduler = scheduler_of()
    request = make_request("a", range(7))
    scheduler.add(request)
    flights = Flights(scheduler, make_runner(scheduler))
    for _ in range(2):
        flights.step()
    damage(scheduler.block_manager, request, pool_of(scheduler))
    with pytest.raises(InvariantError, match=r"\d"):
        scheduler.block_manager.audit()
