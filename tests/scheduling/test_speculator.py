"""Rule, drafter and requests together: what is drafted, and what is learned from tokens that were not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scheduling.fakes import FakeRunner, make_request, make_scheduler, run
from tinyvllm.config import SpeculativeConfig
from tinyvllm.scheduling.draft_rule import MeasuredRule, make_rule
from tinyvllm.scheduling.drafts import AlwaysDraft, Speculator
from tinyvllm.scheduling.ngram_drafter import NgramDrafter
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

SIZES = (2, 4, 8, 16, 32)


class ClockedSpeculator(Speculator):
    """Tells the rule that each step takes the longer the more rows it has."""

    def committed(self, plan: StepPlan, output: Any) -> None:
        self.rule.note_step(plan, plan.num_tokens, 0.01 + 0.001 * plan.num_tokens)
        super().committed(plan, output)


def make_speculating(**config: Any) -> tuple[Scheduler, Speculator]:
    settings = SpeculativeConfig.of(config)
    drafter = NgramDrafter(*settings.lookup)
    scheduler = make_scheduler(200, max_num_seqs=16, max_verify_rows=32)
    speculator = ClockedSpeculator(drafter, make_rule(settings, drafter, SIZES), settings.num_drafts)
    scheduler.speculator = speculator
    return scheduler, speculator


class CopyingRunner(FakeRunner):
    """A model that says 40 tokens of its own, then repeats its prompt, whatever it reads."""

    def _sample(self, request: Request, place: int) -> tuple[int, None]:
        number = request.num_tokens + place - request.num_prompt_tokens
        if number < 40:
            return 100 + number, None
        return request.prompt_ids[number % request.num_prompt_tokens], None


def test_a_copied_prompt_takes_a_fraction_of_the_steps() -> None:
    scheduler, speculator = make_speculating(num_speculative_tokens=8)
    runner = CopyingRunner(4)
    request = make_request("r", range(60), max_tokens=220)
    (output,) = run(scheduler, request, runner=runner)
    assert output == [100 + n for n in range(40)] + [n % 60 for n in range(40, 220)]
    assert len(runner.plans) < 90
    assert request.num_accepted == speculator.counts.num_accepted_tokens > 140
    assert not speculator.drafter._texts and not speculator.rule._each, "who has ended is forgotten"  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_text_that_never_repeats_is_left_alone(depth: int) -> None:
    """Each guess is compared with what comes, and a new one is made; so steps overlap as without drafts."""
    scheduler, speculator = make_speculating(num_speculative_tokens=4, prompt_lookup_min=1)
    runner = FakeRunner(4, vocab_size=16)  # so that each token has occurred before
    requests = [make_request(f"r{i}", [n % 16 for n in range(30)], max_tokens=150) for i in range(3)]
    twins = [make_request(f"r{i}", [n % 16 for n in range(30)], max_tokens=150) for i in range(3)]
    alone = run(make_scheduler(), *twins, runner=FakeRunner(4, vocab_size=16))
    assert run(scheduler, *requests, runner=runner, depth=depth) == alone
    rule = speculator.rule
    assert isinstance(rule, MeasuredRule)
    first, _ = rule._all.estimate(rule._all)
    assert first < 0.2 and rule._all.first.num_tried > 5
    assert speculator.counts.num_draft_tokens < 0.3 * 450


def test_drafts_begin_where_guesses_turn_out_right() -> None:
    """Foresight alone finds that a text has begun to repeat itself."""
    scheduler, speculator = make_speculating(num_speculative_tokens=4)
    rule = speculator.rule
    assert isinstance(rule, MeasuredRule)
    for _ in range(60):
        rule.foreseen(make_request("old"), 4, 0)
    runner = CopyingRunner(4)
    request = make_request("r", range(60), max_tokens=120)
    run(scheduler, request, runner=runner)
    assert request.num_accepted > 30


def test_the_rule_can_be_left_out() -> None:
    drafter = NgramDrafter(2, 4)
    rule = make_rule(SpeculativeConfig(adaptive=False, disable_by_batch_size=2), drafter, SIZES)
    assert isinstance(rule, AlwaysDraft)
    requests = [make_request(f"r{i}") for i in range(2)]
    assert rule.wants(requests[:1]) and not rule.wants(requests)
    assert rule.counts(requests, [3, 1]) == [3, 1]


def test_a_step_that_waited_for_drafts_in_vain_is_no_plain_step() -> None:
    """Its time, without overlap, would make plain steps look slow. It is charged to the budget."""
    _, speculator = make_speculating(num_speculative_tokens=4)
    rule = speculator.rule
    assert isinstance(rule, MeasuredRule)
    request = make_request("r", [1, 2, 3, 1], max_tokens=50)
    request.output_ids.append(2)
    plan = StepPlan((Scheduled(request, 4, 1),))
    for _ in range(3):
        rule.note_step(plan, 1, 0.010)
    assert speculator.wants([request]), "the text's end has occurred before"
    request.output_ids.append(77)  # what was in flight
    speculator.draft([request])
    assert not request.drafts
    budget = rule.budget
    rule.note_step(plan, 1, 0.012)
    assert rule._times.plain_s(1) == 0.010 and rule.budget < budget
    rule.note_step(plan, 1, 0.020)
    assert list(rule._times._plain[1].latest)[-1] == 0.020, "only that step"
