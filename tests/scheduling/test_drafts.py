"""With drafts, right or wrong, every request answers as it would without, and the pool adds up after every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.fakes import (
    FakeRunner,
    GuessingDrafter,
    add_drafts,
    make_request,
    make_scheduler,
    run,
    run_alone,
    scheduler_for,
)
from tests.scheduling.test_properties import Traffic, check_traffic, prompts
from tests.sweeps import examples
from tinyvllm.config import BlockGroup
from tinyvllm.scheduling.request import Request


def drafter_for(windows: list[int | None], right: float, seed: int = 0) -> GuessingDrafter:
    """A drafter that knows what requests answer alone."""
    answers: dict[Request, list[int]] = {}

    def truth(request: Request) -> list[int]:
        if request not in answers:
            answers[request] = run_alone(request, windows)
        return answers[request]

    return GuessingDrafter(truth, right, seed)


@pytest.mark.parametrize(
    ("seed", "num_blocks", "right", "num_tokens", "verify_rows", "depth", "num_states", "windows"),
    [
        pytest.param(1, 9, 0.8, 3, 12, 1, 0, (), marks=pytest.mark.sweep),
        pytest.param(2, 60, 0.5, 5, 32, 2, 0, (), marks=pytest.mark.sweep),
        (3, 12, 1.0, 8, 8, 1, 0, ()),
        pytest.param(4, 30, 0.0, 2, 32, 2, 0, (), marks=pytest.mark.sweep),
        pytest.param(5, 40, 0.7, 4, 16, 1, 0, (BlockGroup(24, 9), BlockGroup(16, 2)), marks=pytest.mark.sweep),
        pytest.param(6, 24, 0.8, 3, 32, 1, 20, (), marks=pytest.mark.sweep),
        (7, 24, 0.5, 4, 24, 2, 8, (BlockGroup(14, 6),)),
        (8, 12, 0.6, 3, 12, 1, 6, ()),  # at times no slot is left for a state to fall back to
    ],
)
def test_random_traffic_with_drafts_keeps_the_pools_and_the_answers(
    seed: int,
    num_blocks: int,
    right: float,
    num_tokens: int,
    verify_rows: int,
    depth: int,
    num_states: int,
    windows: tuple[BlockGroup, ...],
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_model_len=60,
        max_verify_rows=verify_rows,
        other_groups=windows,
        num_state_slots=num_states and num_states + 1,
        checkpoint_interval=2,
    )
    drafter = drafter_for([None, *(group.window for group in windows)], right, seed)
    counts = add_drafts(scheduler, drafter, num_tokens).counts
    check_traffic(Traffic(scheduler, seed, depth), 60)
    assert not drafter.shown, "who has ended is forgotten"
    assert counts.num_drafts > 5 and counts.num_accepted_tokens == sum(counts.per_position)
    assert (right == 1.0) == (counts.num_accepted_tokens == counts.num_draft_tokens)
    if right >= 0.5:
        assert counts.num_accepted_tokens > counts.num_draft_tokens / 6
    if num_blocks < 20:
        assert scheduler.num_preemptions > 0


@examples(10, 40)
@given(
    prompts=prompts,
    block_size=st.sampled_from([1, 2, 4]),
    spare_blocks=st.integers(0, 6),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 12),
    depth=st.sampled_from([1, 2]),
    windows=st.sampled_from([[None], [None, 3], [5], [None, 7, 2]]),
    num_states=st.sampled_from([0, 0, 1, 2, 5, 20]),
    verify_rows=st.integers(1, 20),
    num_tokens=st.integers(1, 6),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_answers_with_drafts_equal_those_alone(
    prompts: list[list[int]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    spare_budget: int,
    depth: int,
    windows: list[int | None],
    num_states: int,
    verify_rows: int,
    num_tokens: int,
    right: float,
) -> None:
    max_tokens = 9
    scheduler = scheduler_for(
        prompts,
        max_tokens,
        block_size=block_size,
        spare_blocks=spare_blocks,
        windows=windows,
        num_states=num_states,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_budget,
        checkpoint_interval=2,
        max_verify_rows=verify_rows,
    )
    add_drafts(scheduler, drafter_for(windows, right), num_tokens)
    requests = [
        make_request(
            f"r{i}",
            prompt,
            max_tokens,
            eos_ids=range(i * 7, i * 7 + 20),
            min_tokens=i,
            temperature=i % 2,
            logprobs=None if i % 3 else i,
        )
        for i, prompt in enumerate(prompts)
    ]
    assert run(scheduler, *requests, depth=depth) == [run_alone(request, windows) for request in requests]
    assert scheduler.block_manager.num_free == scheduler.capacity.num_blocks - 1


def test_right_drafts_save_steps() -> None:
    scheduler = make_scheduler(max_verify_rows=8)
    runner, request = FakeRunner(4), make_request("r", 5, max_tokens=13)
    add_drafts(scheduler, drafter_for([None], right=1.0), num_tokens=3).drafter.rng.seed(3)  # type: ignore[attr-defined]
    run(scheduler, request, runner=runner)
    assert len(runner.plans) < 8  # 13 without drafts
    assert request.num_accepted == request.num_drafted > 5


def test_a_request_that_ends_among_its_drafts_takes_none_after_its_end() -> None:
    plain = make_request("r", 5, max_tokens=20)
    answer = run_alone(plain)
    request = make_request("r", 5, max_tokens=20, eos_ids=[answer[6]])
    scheduler = make_scheduler(max_verify_rows=8)
    add_drafts(scheduler, GuessingDrafter(lambda _: answer, right=1.0), num_tokens=7)
    (output,) = run(scheduler, request)
    assert output == answer[: answer.index(answer[6]) + 1] and request.finish_reason == "stop"
