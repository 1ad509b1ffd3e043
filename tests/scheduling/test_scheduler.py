from __future__ import annotations

from typing import Any

import pytest

from tests.scheduling.fakes import FakeRunner, make_request, make_scheduler, run, run_alone, scores_alone, step
from tinyvllm.errors import ContextLengthError, InvariantError, RequestError
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Request, Status
from tinyvllm.scheduling.scheduler import NO_FINITE_LOGITS, NOTHING_ALLOWED, no_finite_logits


def token_at(index: int, **fields: Any) -> int:
    """The token that a request made of `fields` answers at `index`."""
    return run_alone(make_request(**{"max_tokens": index + 1, **fields}))[index]


def test_nothing_to_do_is_no_plan() -> None:
    assert make_scheduler().schedule() is None


def test_a_prompt_is_computed_and_answered_in_one_step_and_then_decoded() -> None:
    scheduler, request = make_scheduler(), make_request(prompt=7)
    runner = FakeRunner(4)
    scheduler.add(request)
    (out,) = step(scheduler, runner)
    assert (out.request, out.token_id) == (request, request.output_ids[0])
    plan = scheduler.schedule()
    assert plan is not None and plan.is_decode
    assert [(entry.start, entry.count) for entry in plan.entries] == [(7, 1)]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    runner = FakeRunner(4)
    short, long = make_request("short", 3, max_tokens=9), make_request("long", 40)
    scheduler.add(short)
    step(scheduler, runner)
    scheduler.add(long)
    counts = []
    for _ in range(3):
        step(scheduler, runner)
        counts.append([(entry.request.request_id, entry.count) for entry in runner.plans[-1].entries])
    assert counts == [[("short", 1), ("long", 15)], [("short", 1), ("long", 15)], [("short", 1), ("long", 10)]]
    assert len(long.output_ids) == 1


def test_chunks_change_no_token() -> None:
    request = make_request(prompt=61, max_tokens=12)
    for budget in (1, 2, 3, 7, 16, 64):
        scheduler = make_scheduler(max_num_batched_tokens=budget, max_num_seqs=1)
        assert run(scheduler, make_request(prompt=61, max_tokens=12)) == [run_alone(request)], budget


def test_a_batch_changes_no_token() -> None:
    requests = [make_request(f"r{i}", 3 + 5 * i, max_tokens=20) for i in range(16)]
    outputs = run(make_scheduler(max_num_seqs=16), *requests)
    assert outputs == [run_alone(request) for request in requests]


def test_preemption_changes_no_token_and_keeps_what_was_said() -> None:
    requests = [make_request(f"r{i}", 10, max_tokens=30) for i in range(4)]
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=4)
    outputs = run(scheduler, *requests)
    assert scheduler.num_preemptions > 0
    assert outputs == [run_alone(request) for request in requests]
    assert all(request.num_preemptions == 0 for request in requests[:1]), "the oldest is never preempted"


def test_the_newest_is_preempted_first_and_comes_back_before_any_that_waits() -> None:
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=3)  # 9 blocks
    runner = FakeRunner(4)
    first, second, third = (make_request(name, 7, max_tokens=20) for name in "abc")
    for request in (first, second, third):
        scheduler.add(request)
    while scheduler.num_preemptions == 0:
        step(scheduler, runner)
    assert (first.status, second.status, third.status) == (Status.RUNNING, Status.RUNNING, Status.WAITING)
    assert third.num_preemptions == 1
    fourth = make_request("d", 2, max_tokens=2)  # would fit long before the third does
    scheduler.add(fourth)
    ended = []
    while scheduler.has_work:
        ended += [out.request for out in step(scheduler, runner) if out.finish_reason]
        assert third.status is not Status.WAITING or fourth.status is Status.WAITING
    assert ended[0] is first


def test_a_preempted_request_keeps_its_output_and_its_place() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=2)  # 5 blocks of 4
    runner = FakeRunner(4)
    first, second, late = make_request("a", 4, 16), make_request("b", 4, 12), make_request("late", 2, 2)
    scheduler.add(first)
    scheduler.add(second)
    while second.num_preemptions == 0:
        step(scheduler, runner)
    said = list(second.output_ids)
    assert said and not second.tables and second.num_computed == 0
    scheduler.add(late)
    while scheduler.has_work:
        step(scheduler, runner)
        assert second.status is not Status.WAITING or late.status is Status.WAITING
    assert second.output_ids[: len(said)] == said
    assert second.output_ids == run_alone(second)


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=2)
    runner = FakeRunner(4)
    first, second = make_request("a", 4, 16), make_request("b", 8, 8)
    run(scheduler, first, second, runner=runner)
    assert second.num_preemptions > 0
    starts = [entry.start for plan in runner.plans for entry in plan.entries if entry.request is second and entry.start]
    assert starts.count(4) + starts.count(8) >= 1
    assert scheduler.prefix_queries == 12, "only first admissions are counted"
    assert second.num_cached_tokens == 0


def test_a_cached_prefix_is_not_computed_and_changes_no_token() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=100), FakeRunner(4)
    prompt = list(range(40))
    first = make_request("a", prompt)
    run(scheduler, first, runner=runner)
    second = make_request("b", [*prompt, 7, 7])
    num_plans = len(runner.plans)
    run(scheduler, second, runner=runner)
    assert second.num_cached_tokens == 40
    assert runner.plans[num_plans].num_tokens == 2
    assert second.output_ids == run_alone(second)
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (82, 40)


def test_a_prompt_that_is_cached_whole_computes_at_least_one_token() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=100), FakeRunner(4)
    outputs = [run(scheduler, make_request(name, range(16)), runner=runner)[0] for name in "abc"]
    assert outputs[0] == outputs[1] == outputs[2]
    assert scheduler.prefix_hits == 24  # 12 of 16, twice


def test_the_chunks_of_an_unfinished_prompt_are_found() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=8), FakeRunner(4)
    scheduler.add(make_request("a", range(40)))
    step(scheduler, runner)
    step(scheduler, runner)
    scheduler.abort("a")
    second = make_request("b", range(40))
    run(scheduler, second, runner=runner)
    assert second.num_cached_tokens == 16
    assert second.output_ids == run_alone(second)


def test_an_answer_is_a_prefix_of_the_next_turn() -> None:
    scheduler, runner = make_scheduler(), FakeRunner(4)
    first = make_request("a", range(10), max_tokens=12)
    run(scheduler, first, runner=runner)
    second = make_request("b", [*first.prompt_ids, *first.output_ids, 1, 2, 3])
    run(scheduler, second, runner=runner)
    assert second.num_cached_tokens == 20  # of 21 that were computed: the last token was never fed back
    assert second.output_ids == run_alone(second)


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=2), FakeRunner(4)
    requests = [make_request(f"r{i}", 6, max_tokens=3, priority=-i) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    ended = []
    while scheduler.has_work:
        ended += [out.request.request_id for out in step(scheduler, runner) if out.finish_reason]
    assert ended == [request.request_id for request in requests]


def test_priority_admits_lower_numbers_first() -> None:
    scheduler, runner = make_scheduler(policy="priority", max_num_seqs=1), FakeRunner(4)
    for name, priority in (("c", 5), ("a", -1), ("d", 5), ("b", 0)):
        scheduler.add(make_request(name, 6, max_tokens=2, priority=priority))
    ended = []
    while scheduler.has_work:
        ended += [out.request.request_id for out in step(scheduler, runner) if out.finish_reason]
    assert ended == ["a", "b", "c", "d"]


def test_priority_preempts_the_least_important_even_if_it_is_older() -> None:
    scheduler, runner = make_scheduler(num_blocks=8, policy="priority", max_num_seqs=2), FakeRunner(4)
    old, urgent = make_request("old", 8, 16, priority=9), make_request("urgent", 8, 16, priority=1)
    scheduler.add(old)
    step(scheduler, runner)
    scheduler.add(urgent)
    while scheduler.has_work:
        step(scheduler, runner)
    assert (old.num_preemptions > 0, urgent.num_preemptions) == (True, 0)
    assert old.output_ids == run_alone(old)


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    scheduler, runner = make_scheduler(num_blocks=9, max_num_seqs=4), FakeRunner(4)
    large = make_request("large", 28, max_tokens=4)
    for i in range(3):
        scheduler.add(make_request(f"small{i}", 4, max_tokens=8))
    step(scheduler, runner)
    scheduler.add(large)
    for i in range(3, 40):  # one more arrives at every step, and each would fit
        scheduler.add(make_request(f"small{i}", 4, max_tokens=8))
        step(scheduler, runner)
    assert large.status is Status.FINISHED
    assert large.output_ids == run_alone(large)


def test_a_prompt_stops_no_decode_even_when_it_outranks_it() -> None:
    scheduler, runner = make_scheduler(policy="priority", max_num_batched_tokens=8, max_num_seqs=4), FakeRunner(4)
    talkers = [make_request(f"t{i}", 2, max_tokens=40, priority=9) for i in range(3)]
    for request in talkers:
        scheduler.add(request)
    step(scheduler, runner)
    scheduler.add(make_request("long", 60, priority=0))
    for _ in range(8):
        before = [len(request.output_ids) for request in talkers]
        step(scheduler, runner)
        assert [len(request.output_ids) for request in talkers] == [n + 1 for n in before]


def test_a_running_request_keeps_a_free_block_when_others_are_admitted() -> None:
    scheduler, runner = make_scheduler(num_blocks=5, max_num_seqs=4), FakeRunner(4)
    first, second = make_request("a", 8, max_tokens=8), make_request("b", 8, max_tokens=2)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler, runner)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    while scheduler.has_work:
        step(scheduler, runner)
    assert scheduler.num_preemptions == 0


def test_abort_frees_blocks_at_once_whether_running_or_waiting() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=1), FakeRunner(4)
    running, waiting, last = (make_request(name, 9) for name in "abc")
    for request in (running, waiting, last):
        scheduler.add(request)
    step(scheduler, runner)
    assert scheduler.abort("a") is running
    assert scheduler.abort("b") is waiting
    assert scheduler.abort("a") is None
    assert scheduler.abort("never heard of") is None
    assert (running.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    assert scheduler.block_manager.num_free == 999
    step(scheduler, runner)
    assert last.status is Status.RUNNING


def test_finish_ends_a_request_that_reached_a_stop_string() -> None:
    scheduler, request = make_scheduler(), make_request()
    scheduler.add(request)
    step(scheduler, FakeRunner(4))
    scheduler.finish(request, "stop", "END")
    assert (request.finish_reason, request.stop_reason, request.status) == ("stop", "END", Status.FINISHED)
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_finish_after_the_end_only_changes_the_reason() -> None:
    scheduler, request = make_scheduler(), make_request(max_tokens=1)
    run(scheduler, request)
    assert request.finish_reason == "length"
    scheduler.finish(request, "stop", "END")
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    scheduler.block_manager.audit()


@pytest.mark.parametrize("prompt_len", [15, 16, 17, 5000])
def test_a_prompt_without_room_for_a_token_is_refused_with_both_lengths(prompt_len: int) -> None:
    scheduler, request = make_scheduler(max_model_len=16), make_request(prompt=prompt_len)
    if prompt_len < 16:
        scheduler.add(request)
        return
    with pytest.raises(ContextLengthError, match=rf"16 tokens.*{prompt_len} tokens") as caught:
        scheduler.add(request)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert not scheduler.has_work


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(ContextLengthError, match=r"KV pool holds 12 tokens.*prompt has 12 tokens"):
        make_scheduler(num_blocks=4).add(make_request(prompt=12))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        make_scheduler().add(make_request(prompt=[]))


def test_a_request_id_in_use_is_refused_and_free_again_afterwards() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(make_request("a"))
    scheduler.abort("a")
    scheduler.add(make_request("a"))


def test_a_budget_that_cannot_decode_every_sequence_is_our_mistake() -> None:
    with pytest.raises(InvariantError, match="7 tokens cannot decode 8"):
        make_scheduler(max_num_batched_tokens=7, max_num_seqs=8)


def test_max_tokens_ends_with_length() -> None:
    request = make_request(max_tokens=5)
    run(make_scheduler(), request)
    assert (len(request.output_ids), request.finish_reason) == (5, "length")


def test_max_model_len_ends_with_length() -> None:
    request = make_request(prompt=10, max_tokens=100)
    run(make_scheduler(max_model_len=16), request)
    assert (request.num_tokens, request.finish_reason) == (16, "length")


def test_the_end_of_the_pool_ends_with_length() -> None:
    request = make_request(prompt=5, max_tokens=100)
    run(make_scheduler(num_blocks=4), request)
    assert (request.num_tokens, request.finish_reason) == (12, "length")


def test_eos_stops_without_a_stop_reason() -> None:
    eos = token_at(3)
    request = make_request(eos_ids=[eos])
    run(make_scheduler(), request)
    assert (request.output_ids[-1], len(request.output_ids)) == (eos, 4)
    assert (request.finish_reason, request.stop_reason) == ("stop", None)


def test_a_stop_id_stops_and_is_the_stop_reason() -> None:
    stop_id = token_at(3)
    request = make_request(stop_token_ids=(stop_id,))
    run(make_scheduler(), request)
    assert (len(request.output_ids), request.finish_reason, request.stop_reason) == (4, "stop", stop_id)


def test_eos_on_the_last_allowed_token_is_a_stop() -> None:
    request = make_request(max_tokens=4, eos_ids=[token_at(3)])
    run(make_scheduler(), request)
    assert (len(request.output_ids), request.finish_reason) == (4, "stop")


def test_min_tokens_holds_the_end_back() -> None:
    eos = token_at(0)
    runner = FakeRunner(4)
    runner.choose = lambda request, digest: eos
    request = make_request(max_tokens=9, eos_ids=[eos], min_tokens=5)
    run(make_scheduler(), request, runner=runner)
    assert request.output_ids == [eos + 1] * 5 + [eos]
    assert request.finish_reason == "stop"


def test_eos_before_min_tokens_does_not_stop() -> None:
    scheduler, request = make_scheduler(), make_request(eos_ids=[7], min_tokens=1)
    scheduler.add(request)
    for reason in (None, "stop"):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.advance(plan)
        (out,) = scheduler.commit(plan, StepOutput((7,), (None,)))
        assert out.finish_reason == reason


def test_a_token_without_finite_logits_ends_its_request_alone() -> None:
    scheduler, runner = make_scheduler(), FakeRunner(4)
    bad, good = make_request("bad", 9), make_request("good", 9)
    runner.choose = lambda request, digest: -1 if request is bad and request.output_ids else digest % 50
    run(scheduler, bad, good, runner=runner)
    assert (bad.finish_reason, len(bad.output_ids)) == ("error", 1)
    assert bad.error == no_finite_logits(bad, "the model") and "position 10, after 1 tokens of output" in bad.error
    assert (good.finish_reason, len(good.output_ids)) == ("length", 8)
    again = make_request("again", bad.prompt_ids)
    run(scheduler, again, runner=FakeRunner(4))
    assert again.num_cached_tokens == 0, "what it left in the pool may be NaN"


def test_commit_refuses_an_output_of_another_size() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(InvariantError, match="samples 1 tokens, but the step returned 2"):
        scheduler.commit(plan, StepOutput((1, 2), (None, None)))


# -- prompts that are scored -----------------------------------------------------------------------------------------


def chunks_of(plans: list[StepPlan], request: Request) -> list[tuple[int, int, int]]:
    entries = [entry for plan in plans for entry in plan.entries if entry.request is request]
    return [(entry.start, entry.count, entry.num_scored) for entry in entries]


def test_a_scored_prompt_is_cut_to_the_rows_of_logits_that_nobody_needs() -> None:
    """Of 4 rows one is the request's own; one is kept for whoever waits, and each that runs has one."""
    scheduler, runner = make_scheduler(max_num_seqs=4), FakeRunner(4)
    scored, plain = make_request("a", 10, max_tokens=2, prompt_logprobs=0), make_request("b", 3, max_tokens=9)
    scheduler.add(scored)
    step(scheduler, runner)
    assert chunks_of(runner.plans, scored) == [(0, 4, 4)]
    scheduler.add(plain)
    while scheduler.has_work:
        step(scheduler, runner)
    assert chunks_of(runner.plans, scored) == [(0, 4, 4), (4, 3, 3), (7, 3, 2), (10, 1, 0)]
    assert scored.prompt_logprobs == scores_alone(scored)
    assert len(scored.prompt_logprobs) == 9
    assert chunks_of(runner.plans, plain)[0] == (0, 3, 0), "admitted with it, at once"


def test_a_scored_prompt_neither_starves_others_nor_is_starved() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=2), FakeRunner(4)
    requests = [make_request(name, 9, max_tokens=4, prompt_logprobs=1) for name in "abc"]
    assert run(scheduler, *requests, runner=runner) == [run_alone(request) for request in requests]
    assert [entry.request.request_id for entry in runner.plans[1].entries] == ["a", "b"]
    for request in requests:
        assert request.prompt_logprobs == scores_alone(request)


def test_a_scored_prompt_is_computed_whole_and_found_by_others() -> None:
    """The pool knows keys and values, and not what the logits were."""
    scheduler, runner = make_scheduler(), FakeRunner(4)
    first = make_request("a", 12)
    run(scheduler, first, runner=runner)
    scored = make_request("b", first.prompt_ids, prompt_logprobs=0)
    run(scheduler, scored, runner=runner)
    assert scored.num_cached_tokens == 0
    assert len(scored.prompt_logprobs) == 11
    again = make_request("c", first.prompt_ids)
    run(scheduler, again, runner=runner)
    assert again.num_cached_tokens == 8


def test_scores_outlive_a_preemption_and_are_not_computed_twice() -> None:
    scheduler, runner = make_scheduler(num_blocks=7, max_num_seqs=2), FakeRunner(4)
    first, scored = make_request("a", 4, max_tokens=18), make_request("b", 12, max_tokens=2, prompt_logprobs=0)
    run(scheduler, first, scored, runner=runner)
    assert scored.num_preemptions > 0
    assert scored.prompt_logprobs == scores_alone(scored)
    assert sum(num_scored for _, _, num_scored in chunks_of(runner.plans, scored)) == 11


def test_a_token_that_cannot_be_sampled_says_what_may_be_to_blame() -> None:
    errors = []
    cases: list[dict[str, Any]] = [{}, {"allowed_token_ids": (1,)}]
    for params in cases:
        scheduler, request = make_scheduler(), make_request("a", 3, **params)
        runner = FakeRunner(4)
        runner.choose = lambda request, digest: -1
        run(scheduler, request, runner=runner)
        errors.append(request.error)
    assert str(errors[0]).startswith(NO_FINITE_LOGITS) and errors[1] == NOTHING_ALLOWED


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    request = make_request("a", 1, prompt_logprobs=3)
    run(make_scheduler(), request)
    assert request.prompt_logprobs == []
