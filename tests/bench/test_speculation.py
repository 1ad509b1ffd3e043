"""`bench speculation`: what it counts, that it compares tokens, and the command on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from tests.bench.fakes import make_machine
from tests.bench.test_command import run as run_command
from tests.engine.fakes import FakeModelRunner
from tinyvllm.bench.rows import Row
from tinyvllm.bench.speculation import ReplayDrafter, SpeculationCase, SpeculationWork, measure_speculation
from tinyvllm.bench.speculation_tasks import TASKS, make_prompts
from tinyvllm.config import ModelFiles, SpeculativeConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Request

PROMPTS = (tuple(range(20)), tuple(range(30, 50)))
WORK = SpeculationWork(output_len=40, num_repeats=2, num_warmup=1)


def make_runner() -> FakeModelRunner:
    return FakeModelRunner(max_verify_rows=16, max_num_seqs=4)


def measure(runner: FakeModelRunner, *shares: float, drafts: int = 3) -> list[Row]:
    cases = [
        SpeculationCase(f"{share}", PROMPTS, ReplayDrafter(share, runner.vocab_size)).with_rule(
            SpeculativeConfig(), drafts, runner.verify_sizes
        )
        for share in shares
    ]
    return measure_speculation(runner, make_machine(None), cases, WORK, lambda stage, done, total: None)


def test_acceptance_and_steps_follow_the_share_of_right_drafts() -> None:
    none, half, all_right = measure(make_runner(), 0.0, 0.5, 1.0)
    assert (none.more["acceptance"], all_right.more["acceptance"]) == (0.0, 1.0)
    assert none.more["mean_acceptance_length"] == pytest.approx(1.0)
    assert all_right.more["mean_acceptance_length"] == pytest.approx(3.9, abs=0.1)
    assert 1.5 < half.more["mean_acceptance_length"] < 2.5
    assert none.more["equal_tokens"] == half.more["equal_tokens"] == all_right.more["equal_tokens"] == 1.0
    assert half.batch == 2 and half.more["plain_tok_s"].count == half.more["speedup"].count == 2


def test_changed_tokens_are_counted() -> None:
    class Forgetful(FakeModelRunner):
        def execute(self, plan: StepPlan) -> StepOutput:
            output = super().execute(plan)
            if not plan.num_drafts:
                return output
            return StepOutput(tuple((id_ + 1) % 200 for id_ in output.token_ids), output.logprobs)

    (row,) = measure(Forgetful(max_verify_rows=16, max_num_seqs=4), 0.5)
    assert row.more["equal_tokens"] < 0.2


def test_a_replay_is_wrong_as_often_as_asked() -> None:
    drafter = ReplayDrafter(0.8, 1000, seed=1)
    drafter.answers[1, 2] = list(range(500))
    request = Request("r", [1, 2], None)  # type: ignore[arg-type]
    (ids,) = drafter.propose([request], [400])
    assert 290 < sum(id_ == place for place, id_ in enumerate(ids)) < 350
    request.output_ids += range(498)
    assert len(drafter.propose([request], [4])[0]) == 2


def test_tasks_differ_by_number_and_unknown_ones_are_named() -> None:
    for task in TASKS:
        assert len(set(make_prompts(task, 8))) == 8
    with pytest.raises(TinyvllmError, match=r"--tasks has 'poem': choose from edit, summary, chat"):
        make_prompts("poem", 1)


def run(flags: str, *arguments: str) -> Sequence[dict[str, object]]:
    result = run_command(f"speculation {flags} --repeats 1 --warmup 0 --log-level warning --json -", *arguments)
    assert result.exit_code == 0, result.output
    assert "speed-up" in result.stdout
    rows: list[dict[str, object]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def test_the_command_measures_tasks_and_acceptances(tiny_hf_files: ModelFiles) -> None:
    flags = "--tasks chat --acceptance 1 --input-len 8 --tokens 8 --drafts 1 --max-num-batched-tokens 16"
    chat, right = run(flags, str(tiny_hf_files.path), "-sc", '{"num_speculative_tokens": 1}')
    assert (chat["task"], right["task"], right["acceptance"]) == ("chat", "100% right", 1.0)
    assert chat["equal_tokens"] == 1.0 and chat["batch"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks none", "there is nothing to measure"),
        ("--acceptance 2", "--acceptance has '2': give probabilities from 0 to 1"),
        ("--tasks poem", "--tasks has 'poem'"),
        ("-sc {}x", "--speculative-config is not JSON"),
    ],
)
def test_bad_flags_are_named(flags: str, message: str) -> None:
    result = run_command(f"speculation {flags}")
    assert result.exit_code != 0 and message in " ".join(result.output.split())
