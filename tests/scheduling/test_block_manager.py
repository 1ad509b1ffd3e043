from __future__ import annotations

from typing import Any

import pytest

from tests.scheduling.fakes import make_request
from tinyvllm.config import BlockGroup
from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.scheduling import block_manager as block_manager_module
from tinyvllm.scheduling.block_hashes import hash_blocks, make_hash_seed
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.request import Request


def fill(manager: BlockManager, request: Request, num_tokens: int | None = None) -> Request:
    """Admit a request and compute its first `num_tokens` tokens, all by default."""
    num_tokens = request.num_tokens if num_tokens is None else num_tokens
    request.num_computed = manager.match_prefix(request)
    assert manager.grow(request, num_tokens)
    request.num_computed = num_tokens
    manager.seal(request)
    manager.audit()
    return request


def empty(manager: BlockManager, request: Request, keep: bool = True) -> None:
    manager.free(request, keep)
    request.num_computed = 0
    manager.audit()


def test_block_zero_is_never_handed_out() -> None:
    manager = BlockManager([BlockGroup(5)], block_size=4)
    request = make_request(prompt=16)
    assert manager.grow(request, 16)
    assert sorted(request.tables[0]) == [1, 2, 3, 4]
    assert manager.num_free == 0


def test_a_pool_of_the_dummy_alone_is_refused() -> None:
    with pytest.raises(CapacityError, match="1 blocks"):
        BlockManager([BlockGroup(1)], block_size=4)


def test_grow_takes_only_what_is_missing() -> None:
    manager = BlockManager([BlockGroup(9)], block_size=4)
    request = make_request(prompt=9)
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (3, 2), (9, 3)):
        assert manager.grow(request, num_tokens)
        assert len(request.tables[0]) == num_blocks


def test_grow_that_fails_changes_nothing() -> None:
    manager = BlockManager([BlockGroup(4)], block_size=4)
    request = make_request(prompt=16)
    assert manager.grow(request, 4)
    assert not manager.grow(request, 16)
    assert len(request.tables[0]) == 1
    assert manager.num_free == 2
    manager.audit()


def test_a_sealed_prefix_is_shared() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    first = fill(manager, make_request("a", range(10)))
    second = make_request("b", [*range(8), 99, 98])
    assert manager.match_prefix(second) == 8
    assert second.tables[0] == first.tables[0][:2]
    second.num_computed = 8
    manager.audit()


def test_a_prefix_is_found_while_its_blocks_are_free_and_not_after_their_reuse() -> None:
    manager = BlockManager([BlockGroup(4)], block_size=4)
    request = fill(manager, make_request("a", range(12)))
    empty(manager, request)
    assert manager.num_free == 3
    again = make_request("b", range(12))
    assert manager.match_prefix(again) == 8
    empty(manager, again)
    empty(manager, fill(manager, make_request("c", range(50, 62))))
    assert manager.match_prefix(make_request("d", range(12))) == 0


def test_the_same_tokens_after_another_prefix_are_not_a_hit() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    fill(manager, make_request("a", [1, 2, 3, 4, 5, 6, 7, 8]))
    assert manager.match_prefix(make_request("b", [9, 2, 3, 4, 5, 6, 7, 8, 0])) == 0


def test_a_whole_hit_leaves_a_token_to_compute_in_a_block_of_its_own() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    first = fill(manager, make_request("a", range(8)))
    second = make_request("b", range(8))
    second.num_computed = manager.match_prefix(second)
    assert second.num_computed == 4
    assert manager.grow(second, 8)
    assert second.tables[0][0] == first.tables[0][0]
    assert second.tables[0][1] != first.tables[0][1]
    manager.audit()


def test_a_block_that_is_not_full_is_not_shared() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    fill(manager, make_request("a", range(8)), num_tokens=7)
    assert manager.match_prefix(make_request("b", [*range(8), 9])) == 4


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4, enable_prefix_caching=False)
    fill(manager, make_request("a", range(8)))
    assert manager.match_prefix(make_request("b", range(8))) == 0


def test_a_prefix_is_shared_with_the_same_salt_and_adapter_only() -> None:
    manager, seeds = BlockManager([BlockGroup(20)], block_size=4), [b"", make_hash_seed("ab", "c")]
    seeds += [make_hash_seed("ab"), make_hash_seed("a", "bc"), make_hash_seed(adapter="abc"), make_hash_seed("\ud800")]
    assert len(set(seeds)) == 6 and make_hash_seed("") == b""
    for number, seed in enumerate(seeds):
        request = make_request(f"a{number}", range(8))
        request.hash_seed = seed
        assert manager.match_prefix(request) == 0
        fill(manager, request)
        again = make_request(f"b{number}", range(8))
        again.hash_seed = seed
        again.num_computed = manager.match_prefix(again)
        assert again.num_computed == 4
        assert again.block_hashes == hash_blocks(range(8), 4, seed)[:1]
        empty(manager, request)
        empty(manager, again)
    manager.audit()


def test_equal_hashes_of_other_tokens_are_not_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager_module, "hash_block", lambda parent, tokens: b"same")
    manager = BlockManager([BlockGroup(20)], block_size=4)
    fill(manager, make_request("a", range(5)))
    assert manager.match_prefix(make_request("b", range(5))) == 4
    assert manager.match_prefix(make_request("c", range(1, 6))) == 0


def test_the_tail_of_a_freed_request_is_reused_before_its_head() -> None:
    manager = BlockManager([BlockGroup(5)], block_size=4)
    empty(manager, fill(manager, make_request("a", range(16))))
    assert manager.grow(make_request("b"), 8)  # two of four blocks go
    assert manager.match_prefix(make_request("c", range(16))) == 8


def test_the_longest_unused_prefix_is_reused_first() -> None:
    manager = BlockManager([BlockGroup(5)], block_size=4)
    old, new = make_request("old", range(8)), make_request("new", range(50, 58))
    fill(manager, old)
    fill(manager, new)
    empty(manager, old)
    empty(manager, new)
    assert manager.grow(make_request("x"), 8)
    assert manager.match_prefix(make_request("y", [*range(8), 0])) == 0
    assert manager.match_prefix(make_request("z", [*range(50, 58), 0])) == 8


def test_blocks_without_a_known_prefix_are_reused_before_those_with_one() -> None:
    manager = BlockManager([BlockGroup(4)], block_size=4)
    known, unknown = make_request("known", range(8)), make_request("unknown", range(3))
    fill(manager, known)
    fill(manager, unknown)
    empty(manager, known)
    empty(manager, unknown)  # freed last, and yet the first to go
    assert manager.grow(make_request("x"), 4)
    assert manager.match_prefix(make_request("y", [*range(8), 0])) == 8


def test_two_requests_that_compute_one_prefix_at_once_keep_their_own_blocks() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    first, second = make_request("a", range(9)), make_request("b", range(9))
    for request in (first, second):
        assert manager.match_prefix(request) == 0
        assert manager.grow(request, 9)
    for request in (first, second):
        request.num_computed = 9
        manager.seal(request)
        manager.audit()
    assert not set(first.tables[0]) & set(second.tables[0])
    kept = first.tables[0][:2]
    empty(manager, second)
    third = make_request("c", range(9))
    assert manager.match_prefix(third) == 8
    assert third.tables[0] == kept


def test_what_a_failure_left_behind_is_not_found_again_and_its_sharers_keep_it() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=4)
    first = fill(manager, make_request("a", range(9)))
    second = fill(manager, make_request("b", range(9)))
    empty(manager, first, keep=False)
    assert manager.match_prefix(make_request("c", range(9))) == 0
    assert len(second.tables[0]) == 3
    empty(manager, second)
    assert manager.match_prefix(make_request("d", range(9))) == 0
    assert manager.num_free == 19


def test_freeing_twice_is_harmless() -> None:
    manager = BlockManager([BlockGroup(5)], block_size=4)
    request = fill(manager, make_request("a", range(9)))
    empty(manager, request)
    empty(manager, request)
    assert manager.num_free == 4


def test_a_block_freed_without_a_reference_is_reported() -> None:
    manager = BlockManager([BlockGroup(5)], block_size=4)
    stray = make_request("stray")
    stray.tables = [[3]]
    with pytest.raises(InvariantError, match="stray frees block 3"):
        manager.free(stray)


def lose_a_block(manager: BlockManager, request: Request) -> None:
    request.tables[0].pop()


def share_by_accident(manager: BlockManager, request: Request) -> None:
    other = make_request("other")
    assert manager.grow(other, 4)
    other.tables = [[request.tables[0][-1]]]


def repeat_a_block(manager: BlockManager, request: Request) -> None:
    request.tables[0][1] = request.tables[0][0]


def free_a_used_block(manager: BlockManager, request: Request) -> None:
    manager.pools[0]._free[request.tables[0][0]] = None


def leak_a_free_block(manager: BlockManager, request: Request) -> None:
    manager.pools[0]._free.popitem()


def hand_out_the_dummy(manager: BlockManager, request: Request) -> None:
    manager.pools[0]._free[0] = None


def rewind_into_a_sealed_block(manager: BlockManager, request: Request) -> None:
    request.num_computed = 5


def compute_past_the_table(manager: BlockManager, request: Request) -> None:
    request.num_computed = 13


def rewrite_the_text(manager: BlockManager, request: Request) -> None:
    request.prompt_ids[0] += 1


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_block,
        share_by_accident,
        repeat_a_block,
        free_a_used_block,
        leak_a_free_block,
        hand_out_the_dummy,
        rewind_into_a_sealed_block,
        compute_past_the_table,
        rewrite_the_text,
    ],
)
def test_audit_sees(damage: Any) -> None:
    manager = BlockManager([BlockGroup(9)], block_size=4)
    request = fill(manager, make_request("a", range(10)))
    damage(manager, request)
    with pytest.raises(InvariantError, match=r"\d"):
        manager.audit()
