"""Plans as arrays: every word that a kernel reads is the plan's or padding."""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import pytest

from tests.execution.driver import make_request
from tests.scheduling.fakes import Flights, make_runner, make_scheduler
from tests.scheduling.fakes import make_request as make_traffic
from tinyvllm.config import MAX_STOP_IDS
from tinyvllm.errors import InvariantError
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import COMMON, ContinuedPlan, Scheduled, StepPlan
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.state_pool import SequenceState

LAYOUT = StepLayout(num_tokens=8, num_seqs=3, max_blocks=4, block_size=4)


def make_packer(layout: StepLayout = LAYOUT) -> InputPacker:
    """Over a buffer of rubbish."""
    return InputPacker(layout, np.full(layout.size, -1234567, np.int32))


def running(num_prompt: int, block_ids: list[int], *, outputs: int = 0, computed: int = 0, **params: Any) -> Request:
    """A request of tokens 100, 101, ... of which `computed` are done."""
    request = make_request(list(range(100, 100 + num_prompt)), **params)
    request.output_ids = list(range(200, 200 + outputs))
    request.tables, request.num_computed = [block_ids], computed
    return request


def plan_of(*entries: tuple[Request, int]) -> StepPlan:
    """A plan that computes `count` tokens of each request."""
    return StepPlan(tuple(Scheduled(request, request.num_computed, count) for request, count in entries))


def test_tokens_lie_in_their_sequences_slots() -> None:
    packer = make_packer()
    decode = running(5, [7, 2], outputs=1, computed=5)
    chunk = running(9, [3, 9, 4], computed=2)
    packer.pack(plan_of((decode, 1), (chunk, 4)))
    views = {name: view.tolist() for name, view in packer.views.items()}
    assert views["token_ids"] == [200, 102, 103, 104, 105, 0, 0, 0]
    assert views["positions"] == [5, 2, 3, 4, 5, 0, 0, 0]
    assert views["slots"][0] == [2 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3, 9 * 4, 9 * 4 + 1, 0, 0, 0]
    assert views["seq_rows"] == [0, 1, 1, 1, 1, 3, 3, 3]
    assert views["block_tables"][0][0][:2] == [7, 2]
    assert views["block_tables"][0][1][:2] == [3, 9]


def test_padding_lies_in_the_dummy_block() -> None:
    packer = make_packer()
    request = running(8, [1, 2], computed=0)
    packer.pack(plan_of((request, 8)))
    request.num_computed = 4
    packer.pack(plan_of((request, 2)))
    views = packer.views
    assert views["slots"][0, 2:].tolist() == [0] * 6
    assert views["positions"][2:].tolist() == [0] * 6
    assert (views["seq_rows"][2:] == LAYOUT.num_seqs).all(), "the table after the last"
    assert (views["block_tables"][0, LAYOUT.num_seqs] == 0).all()


def test_only_sequences_that_reach_their_last_token_are_sampled_in_order() -> None:
    packer = make_packer()
    unfinished = running(9, [1, 2, 3], temperature=0.9)
    decode = running(5, [4, 5], outputs=2, computed=6, temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, seed=42)
    last_chunk = running(6, [6, 7], computed=4, logprobs=3)
    packer.pack(plan_of((unfinished, 4), (decode, 1), (last_chunk, 2)))
    views = packer.views
    assert views["logit_rows"][:2].tolist() == [4, 6]
    assert packer.floats["temperature"].tolist() == [0.5, 0.0, 0.0]
    assert views["top_k"][:2].tolist() == [7, 0]
    np.testing.assert_array_equal(packer.floats["top_p"][:2], np.array([0.8, 1.0], np.float32))
    np.testing.assert_array_equal(packer.floats["min_p"][:2], np.array([0.1, 0.0], np.float32))
    assert views["seed"][0] == 42
    assert views["draw"][:2].tolist() == [2, 0], "tokens drawn before"
    assert views["num_logprobs"].tolist() == [-1, 3, -1]


def test_floats_travel_as_their_bits() -> None:
    packer = make_packer()
    packer.pack(plan_of((running(1, [1], temperature=0.7), 1)))
    assert packer.views["temperature"][0] == np.float32(0.7).view(np.int32)


@pytest.mark.parametrize(("seed", "word"), [(0, 0), (2**31, -(2**31)), (2**32 - 1, -1), (-1, -1), (2**40 + 5, 5)])
def test_a_seed_is_its_low_32_bits(seed: int, word: int) -> None:
    packer = make_packer()
    request = running(1, [1], temperature=1.0)
    request.seed = seed
    packer.pack(plan_of((request, 1)))
    assert packer.views["seed"][0] == word


def test_ids_are_suppressed_until_min_tokens_is_reached() -> None:
    packer = make_packer()
    params = {"min_tokens": 2, "max_tokens": 9, "stop_token_ids": (9, 5)}
    early = running(3, [1, 5], outputs=1, computed=3, eos=frozenset({258, 5}), **params)
    reached = running(2, [2], outputs=2, computed=3, eos=frozenset({258}), **params)
    packer.pack(plan_of((early, 1), (reached, 1)))
    suppressed_ids = packer.views["suppressed_ids"]
    assert suppressed_ids[0].tolist() == [5, 9, 258] + [-1] * (MAX_STOP_IDS - 3)
    assert (suppressed_ids[1:] == -1).all()
    early.output_ids.append(1)
    early.num_computed = 4
    packer.pack(plan_of((early, 1)))
    assert (packer.views["suppressed_ids"] == -1).all(), "nothing stays of the step before"


def test_a_fresh_packer_is_all_padding() -> None:
    packer = make_packer()
    views = packer.views
    assert (views["seq_rows"] == LAYOUT.num_seqs).all()
    assert (views["num_logprobs"] == -1).all()
    assert (views["suppressed_ids"] == -1).all()
    assert (views["forced"] == -1).all()
    rest = [
        view for name, view in views.items() if name not in ("seq_rows", "num_logprobs", "suppressed_ids", "forced")
    ]
    assert all((view == 0).all() for view in rest)


def test_the_layout_covers_the_buffer_once() -> None:
    buffer = np.zeros(LAYOUT.size, np.int32)
    for view in LAYOUT.views(buffer).values():
        view += 1
    assert (buffer == 1).all()


def test_a_plan_that_does_not_fit_is_our_bug() -> None:
    with pytest.raises(InvariantError, match="9 tokens of 1 sequences do not fit"):
        make_packer().pack(plan_of((running(9, [1, 2, 3]), 9)))
    with pytest.raises(InvariantError, match="4 tokens of 4 sequences do not fit"):
        make_packer().pack(plan_of(*[(running(1, [i]), 1) for i in range(1, 5)]))


def test_a_request_without_enough_blocks_is_our_bug() -> None:
    with pytest.raises(InvariantError, match="request a has 1 blocks, but computes up to token 5"):
        make_packer().pack(plan_of((running(5, [1]), 5)))


def test_more_suppressed_ids_than_a_row_has_room_for_are_our_bug() -> None:
    request = running(1, [1], eos=frozenset(range(MAX_STOP_IDS + 1)), min_tokens=1)
    with pytest.raises(InvariantError, match=f"{MAX_STOP_IDS + 1} ids are suppressed"):
        make_packer().pack(plan_of((request, 1)))


def test_each_group_has_slots_and_tables_of_its_own() -> None:
    layout = StepLayout(8, 3, 4, 4, num_groups=2)
    packer = make_packer(layout)
    decode, chunk = running(9, [7, 2, 5], outputs=1, computed=9), running(9, [3, 9, 4], computed=2)
    decode.tables, chunk.tables = [[7, 2, 5], [0, 8, 6]], [[3, 9, 4], [1, 2]]
    packer.pack(plan_of((decode, 1), (chunk, 4)))
    views = packer.views
    assert views["slots"].tolist() == [
        [5 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3, 9 * 4, 9 * 4 + 1, 0, 0, 0],
        [6 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3, 2 * 4, 2 * 4 + 1, 0, 0, 0],
    ]
    assert views["block_tables"][:, 0, :3].tolist() == [[7, 2, 5], [0, 8, 6]]
    assert (views["block_tables"][:, layout.num_seqs] == 0).all(), "the table after the last, of each group"
    offsets = [layout.slots_offset(0), layout.slots_offset(1), layout.table_offset(0), layout.table_offset(1)]
    assert [offset - offsets[0] for offset in offsets[1:]] == [8, 2 * 8 + 8 + 3, 2 * 8 + 8 + 3 + 4 * 4]


def test_each_sequence_has_slots_of_its_state_and_a_first_row() -> None:
    layout = StepLayout(8, 3, 4, 4, has_states=True)
    packer = make_packer(layout)
    decode, chunk = running(9, [7, 2, 5], outputs=1, computed=9), running(9, [3, 9, 4], computed=2)
    with pytest.raises(InvariantError, match="2 of 2 sequences have no slot"):
        packer.pack(plan_of((chunk, 4), (decode, 1)))
    decode.state, chunk.state = SequenceState(slot=4, read_slot=4), SequenceState(slot=2, read_slot=6)
    packer.pack(plan_of((chunk, 4), (decode, 1)))
    packed = {name: packer.views[name].tolist() for name in ("state_reads", "state_writes", "first_rows")}
    assert packed == {"state_reads": [6, 4, 0], "state_writes": [2, 4, 0], "first_rows": [0, 4, 5, 5]}
    packer.pack(plan_of((decode, 1)))
    packed = {name: packer.views[name].tolist() for name in packed}
    assert packed == {"state_reads": [4, 0, 0], "state_writes": [4, 0, 0], "first_rows": [0, 1, 1, 1]}


def test_drafts_follow_the_last_token_and_each_row_samples_its_own() -> None:
    packer = make_packer(StepLayout(num_tokens=8, num_seqs=8, max_blocks=4, block_size=4))
    drafting = running(5, [7, 2, 9], outputs=2, computed=6, temperature=0.5, seed=9, min_tokens=4, stop_token_ids=(3,))
    again = running(5, [4, 5, 3], outputs=3, computed=6)  # its last two tokens are computed again
    packer.pack(StepPlan((Scheduled(drafting, 6, 3, (31, 32)), Scheduled(again, 6, 4, (41, 42)))))
    views = {name: view.tolist() for name, view in packer.views.items()}
    assert views["token_ids"][:7] == [201, 31, 32, 201, 202, 41, 42]
    assert views["positions"][:7] == [6, 7, 8, 6, 7, 8, 9]
    assert views["seq_rows"][:7] == [0, 0, 0, 1, 1, 1, 1]
    assert views["slots"][0][:3] == [2 * 4 + 2, 2 * 4 + 3, 9 * 4]
    assert views["logit_rows"][:6] == [0, 1, 2, 4, 5, 6]
    assert views["draw"][:6] == [2, 3, 4, 3, 4, 5]
    assert views["seed"][:3] == [9, 9, 9] and packer.floats["temperature"][:3].tolist() == [0.5] * 3
    assert [row[0] for row in views["suppressed_ids"][:6]] == [3, 3, -1, -1, -1, -1], "until min_tokens"


OF_SEQUENCES = (
    "draw",
    "logit_rows",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "num_logprobs",
    "suppressed_ids",
    "forced",
)


def packed(packer: InputPacker, plan: StepPlan) -> dict[str, list[Any]]:
    """What the packer has written for a plan that it has packed, and padding where the kernels read it."""
    views, num = packer.views, plan.num_sampled_rows
    words = {name: views[name].tolist() for name in ("token_ids", "positions", "slots", "seq_rows")}
    words |= {name: views[name][:num].tolist() for name in OF_SEQUENCES}
    tables = []
    for index, entry in enumerate(plan.entries):
        count = -(-(entry.start + entry.count) // packer.layout.block_size)
        for table, blocks in zip(views["block_tables"], entry.request.tables, strict=True):
            kept = np.array(blocks[:count]) > 0  # nobody reads the others
            tables.append((table[index, :count] * kept).tolist())
    return words | {"block_tables": tables}


@pytest.mark.parametrize(("seed", "depth", "window"), [(0, 2, None), (1, 1, None), (2, 2, 20)])
def test_a_plan_that_continues_another_is_packed_like_any_other(seed: int, depth: int, window: int | None) -> None:
    """Random traffic, whose steps take turns between two packers, as those in flight do."""
    rng, kinds = random.Random(seed), collections.Counter[type]()
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=6, max_num_batched_tokens=40, window=window)
    runner, layout = make_runner(scheduler), StepLayout(num_tokens=40, num_seqs=6, max_blocks=32, block_size=4)
    packers = [make_packer(layout) for _ in range(2)]

    def check(plan: StepPlan) -> None:
        packer, fresh, alone = packers[kinds.total() % 2], make_packer(layout), StepPlan(plan.entries)
        kinds[type(plan)] += 1
        for one, what in ((packer, plan), (fresh, alone)):
            one.pack(what)
        assert packed(packer, plan) == packed(fresh, alone)
        for name in (*COMMON, "requests", "sampled", "starts"):
            assert getattr(plan, name) == getattr(alone, name), name

    runner.before_step = check
    flights = Flights(scheduler, runner, depth)
    for number in range(400):
        if rng.random() < 0.08:
            ends = range(0, 256, rng.choice([17, 255]))
            more: dict[str, Any] = rng.choice([{}, {"min_tokens": 4}, {"logprobs": 2}, {"temperature": 0.5}])
            lengths = rng.randint(1, 30), rng.randint(4, 50)
            scheduler.add(make_traffic(f"r{number}", *lengths, ends, seed=number, **more))
        if scheduler.requests and rng.random() < 0.02:
            scheduler.abort(rng.choice(scheduler.requests).request_id)
        flights.step()
    assert kinds[ContinuedPlan] > 100 and kinds[StepPlan] > 50, kinds


def test_layouts_with_the_same_room_have_the_same_offsets() -> None:
    """Kernels whose rows are independent are then the same for all of them. Rows that a step does not have belong to no
    sequence."""
    wide = StepLayout(8, 4, max_blocks=4, block_size=4, num_groups=2, room=(8, 4))
    small = StepLayout(3, 2, max_blocks=4, block_size=4, num_groups=2, room=(8, 4))
    buffer = np.full(small.size, -1234567, np.int32)
    InputPacker(small, buffer)
    views, all_views = small.views(buffer), wide.views(buffer)
    assert small.widest == wide.widest == wide
    assert views["seq_rows"].tolist() == [2, 2, 2] and all_views["seq_rows"].tolist() == [2, 2, 2, -1, -1, -1, -1, -1]
    for name, view in views.items():
        assert view.__array_interface__["data"] == all_views[name].__array_interface__["data"], name
    for group in range(2):
        assert (small.slots_offset(group), small.table_offset(group)) == (
            wide.slots_offset(group),
            wide.table_offset(group),
        )
    assert small.num_sampling_words == wide.num_sampling_words // 2
