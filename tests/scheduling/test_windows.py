"""Groups of layers with windows: what a request holds, gives back and finds again."""

from __future__ import annotations

import random

import pytest

from tests.scheduling.fakes import Flights, make_capacity, make_request, make_runner, make_scheduler, run, run_alone
from tinyvllm.config import BlockGroup
from tinyvllm.errors import InvariantError
from tinyvllm.scheduling.block_manager import BlockManager, fixed_tables
from tinyvllm.scheduling.request import Request

ALL, WINDOW = BlockGroup(30), BlockGroup(10, 6)  # a window of 6 tokens in blocks of 4: 3 blocks at most, 2 before it


def compute(manager: BlockManager, request: Request, num_tokens: int, chunk: int = 4) -> Request:
    """Admit a request and compute its first `num_tokens` tokens in chunks."""
    request.num_computed = manager.match_prefix(request)
    while request.num_computed < num_tokens:
        stop = min(num_tokens, request.num_computed + chunk)
        assert manager.grow(request, stop)
        manager.audit()
        request.num_computed = stop
        manager.seal(request)
        manager.give_back(request)
        manager.audit()
    return request


def test_a_group_with_a_window_holds_the_window() -> None:
    manager = BlockManager([ALL, WINDOW], 4)
    request = compute(manager, make_request("a", 61), 61)
    everything, window = request.tables
    assert 0 not in everything and len(everything) == len(window) == 16
    assert window[:14] == [0] * 14 and 0 not in window[14:], "token 61 attends to tokens 56 to 61"
    assert [pool.num_free for pool in manager.pools] == [29 - 16, 9 - 2]
    assert manager.num_free == 13 and manager.least_free == 7
    assert manager.states().count(b"h") == 18 and len(manager.states()) == 29 + 9
    manager.free(request)
    assert manager.states().count(b"h") == 0 and manager.num_free == 29


def test_the_fullest_group_says_how_much_is_free() -> None:
    manager = BlockManager([ALL, BlockGroup(4, 6)], 4)
    assert manager.grow(make_request("a", 8), 8)
    assert manager.num_free == 29 // 3, "a third of the window's three blocks is free"


def test_a_prefix_is_found_where_every_group_has_what_follows_it_needs() -> None:
    manager = BlockManager([ALL, BlockGroup(7, 6)], 4)  # six blocks: of 40 tokens the last six are kept
    manager.free(compute(manager, make_request("a", range(40)), 40))
    again = make_request("b", [*range(38), 99, 98, 97])  # nine whole blocks are the same
    again.num_computed = manager.match_prefix(again)
    assert again.num_computed == 36
    assert [table.count(0) for table in again.tables] == [0, 7] and len(again.tables[1]) == 9
    manager.audit()
    manager.free(again)
    assert manager.match_prefix(make_request("c", [*range(20), 99])) == 0, "blocks 3 and 4 of the window are gone"
    assert manager.match_prefix(make_request("d", [*range(28), 99])) == 28


def test_a_gap_in_one_group_shortens_the_prefix_to_where_the_others_have_a_window() -> None:
    manager = BlockManager([ALL, BlockGroup(20, 6), BlockGroup(20, 9)], 4)
    request = compute(manager, make_request("a", range(40)), 40)
    lost = request.block_hashes[8]
    manager.pools[2].hide_hash(lost)  # block 8 is in the windows of 9 tokens of prefixes of 9 and 10 blocks
    manager.pools[1].hide_hash(request.block_hashes[7])  # block 7 is in the windows of 6 tokens of 8 and 9 blocks
    found = make_request("b", [*range(40), 99])
    found.num_computed = manager.match_prefix(found)
    assert found.num_computed == 7 * 4
    manager.audit()


def test_without_a_group_that_keeps_all_tokens_the_last_window_is_found() -> None:
    manager = BlockManager([BlockGroup(6, 6)], 4)
    manager.free(compute(manager, make_request("a", range(80)), 80))
    found = make_request("b", [*range(80), 99])
    assert manager.match_prefix(found) == 80
    assert len(found.tables[0]) == 20 and found.tables[0].count(0) == 18


def test_a_block_that_is_computed_again_takes_the_place_of_a_free_one() -> None:
    manager = BlockManager([ALL, WINDOW], 4)
    manager.free(compute(manager, make_request("a", range(12)), 12))
    manager.pools[0].hide_hash(manager.pools[0].cached_hashes()[0])  # nothing is found: all is computed again
    manager.free(compute(manager, make_request("b", range(12)), 12))
    assert manager.grow(make_request("c", 4), 4 * 6), "what is older is reused first"
    assert manager.match_prefix(make_request("d", [*range(12), 99])) == 12


def test_what_a_failure_left_behind_is_not_found_even_if_it_was_given_back() -> None:
    manager = BlockManager([BlockGroup(20, 6)], 4)
    request = compute(manager, make_request("a", range(40)), 40)
    manager.free(request, keep=False)
    assert not manager.cached_hashes()


def test_audit_sees_that_a_block_was_given_back_too_early() -> None:
    manager = BlockManager([ALL, WINDOW], 4)
    request = compute(manager, make_request("a", 61), 61)
    manager.pools[1].release(request.tables[1][14], "a")
    request.tables[1][14] = 0
    with pytest.raises(InvariantError, match="given back a block that its token 61 attends to"):
        manager.audit()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_conversation_of_many_windows_runs_in_one(depth: int) -> None:
    """Prompts in chunks, and outputs, of a pool whose window's group holds little more than a window and a chunk."""
    group = BlockGroup(6, 6)
    scheduler = make_scheduler(100, other_groups=(group,))
    assert scheduler.capacity.max_chunk == 20 - 5 - 3
    flights, request = Flights(scheduler, make_runner(scheduler), depth), make_request("a", 150, max_tokens=100)
    scheduler.add(request)
    pool, most = scheduler.block_manager.pools[1], 0
    while scheduler.has_work:
        flights.step()
        if request.num_output_tokens > depth:
            most = max(most, group.num_blocks - 1 - pool.num_free)
    assert most == 3 and scheduler.num_preemptions == 0
    assert request.output_ids == run_alone(request, [None, 6])


def test_a_window_without_room_bounds_the_length_and_the_chunk() -> None:
    assert make_capacity(11, window=6, max_model_len=500).num_tokens == 500
    assert make_capacity(11, window=38, max_model_len=500).num_tokens == 40, "a window that may begin in a block"
    assert make_capacity(100, other_groups=(BlockGroup(6, 6),)).max_chunk == 20 - 5 - 3
    assert make_capacity(6, other_groups=(BlockGroup(6, 6),)).max_chunk == 64, "no sequence needs more blocks"


def test_when_a_windows_group_is_full_the_last_request_is_preempted() -> None:
    scheduler = make_scheduler(100, other_groups=(BlockGroup(6, 9),), prefix_caching=False)
    requests = [make_request(name, 3, max_tokens=20) for name in "ab"]
    assert run(scheduler, *requests) == [run_alone(request, [None, 9]) for request in requests]
    assert scheduler.num_preemptions > 0


def test_fixed_tables_go_round_in_a_group_with_too_few_blocks() -> None:
    (one, two) = fixed_tables([BlockGroup(9), BlockGroup(5, 6)], [3, 5])
    assert one == [[1, 2, 3], [1, 2, 1]] and two == [[4, 5, 6, 7, 8], [3, 4, 3, 4, 3]]
    (one, two) = fixed_tables([BlockGroup(9)], [3, 5], random.Random(1))
    assert sorted(one[0] + two[0]) == list(range(1, 9)) and one[0] != [1, 2, 3]
