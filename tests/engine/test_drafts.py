"""Real graphs: with drafts, right or wrong, requests of every kind answer as they do without."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import write_tiny_hf_llama
from tests.engine.fakes import FakeModelRunner
from tests.engine.requests import answer, make_requests, make_runner
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.scheduling.fakes import GuessingDrafter, add_drafts, make_request, run_alone
from tests.sweeps import swept
from tinyvllm.config import ModelFiles, SamplingParams
from tinyvllm.engine.core import EngineCore
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.drafts import AlwaysDraft, Speculator
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

SPECULATION: dict[str, Any] = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 4},
    "decode_buckets": (4,),
    "verify_buckets": (3, 8),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def runner(files: ModelFiles) -> Iterator[ModelRunner]:
    runner = make_runner(files, **SPECULATION)
    yield runner
    runner.close()


def make_speculator(truth: dict[str, list[int]], right: float) -> Speculator:
    return Speculator(GuessingDrafter(lambda request: truth[request.request_id], right), AlwaysDraft(), 4)


def check_drafts(runner: ModelRunner, requests: dict[str, list[Request]], right: float) -> Speculator:
    """Run the same requests without drafts and with them."""
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    answer(runner, requests["without"], note=before)
    truth = {request.request_id: request.output_ids for request in requests["without"]}
    speculator = make_speculator(truth, right)
    core = answer(runner, requests["with"], speculator, note=after)
    for a, b in zip(requests["without"], requests["with"], strict=True):
        assert a.output_ids == b.output_ids and a.finish_reason == b.finish_reason, a.request_id
        np.testing.assert_allclose(after.get(a.request_id, []), before.get(a.request_id, []), atol=1e-3)
    assert core.stats.extra["num_failed_steps"] == 0
    return speculator


@pytest.mark.parametrize(
    ("right", "is_processed"),
    swept(itertools.product((0.0, 0.7, 1.0), (False, True)), [(0.0, False), (0.7, True), (1.0, False)]),
)
def test_answers_are_those_without_drafts(runner: ModelRunner, right: float, is_processed: bool) -> None:
    requests = {name: make_requests(12, is_processed=is_processed) for name in ("without", "with")}
    counts = check_drafts(runner, requests, right).counts
    assert counts.num_drafts > 5
    assert not is_processed or any(request.num_drafted for request in requests["with"] if request.constraint)
    assert (counts.num_accepted_tokens == counts.num_draft_tokens) == (right == 1.0)


def test_sampled_tokens_keep_their_distribution(runner: ModelRunner) -> None:
    """Counts of three sampled tokens, the last two of them drafted at random, against the model's probabilities."""
    allowed, count, prompt, rng = (30, 60, 90), 600, [7, 8], random.Random(3)
    temperature = 4.0  # so that no token is rare
    drafter = GuessingDrafter(lambda request: [rng.choice(allowed) for _ in range(3)], 1.0)
    params = SamplingParams(temperature=temperature, allowed_token_ids=allowed)
    requests = [Request(f"r{i}", prompt, params, max_tokens=3, seed=i) for i in range(count)]
    answer(runner, requests, Speculator(drafter, AlwaysDraft(), 2))
    assert 0.2 < sum(r.num_accepted for r in requests) / sum(r.num_drafted for r in requests) < 0.5

    triples = list(itertools.product(allowed, repeat=3))
    scored = [
        Request(f"s{i}", [*prompt, *ids], SamplingParams(), num_prompt_logprobs=0) for i, ids in enumerate(triples)
    ]
    answer(runner, scored)
    weight = {
        ids[: place + 1]: math.exp(request.prompt_logprobs[1 + place].chosen / temperature)
        for ids, request in zip(triples, scored, strict=True)
        for place in range(3)
    }
    expected = {}
    for ids in triples:
        share = [weight[ids[: i + 1]] / sum(weight[(*ids[:i], other)] for other in allowed) for i in range(3)]
        expected[ids] = count * math.prod(share)
    found = Counter(tuple(request.output_ids) for request in requests)
    assert min(expected.values()) > 2
    chi_square = sum((found[ids] - wanted) ** 2 / wanted for ids, wanted in expected.items())
    assert chi_square < 54.1, "of 26 degrees of freedom, more than this once in a thousand"


class NeverDraft(AlwaysDraft):
    """A rule that is asked at every step, and says no."""

    def wants(self, requests: Sequence[Request]) -> bool:
        return False


def test_a_speculator_that_drafts_nothing_costs_no_kernel_and_no_wait(runner: ModelRunner, files: ModelFiles) -> None:
    plain = make_runner(files, decode_buckets=(4,))
    for graph in plain.captures.graphs.values():
        assert runner.captures.graphs[graph.bucket].num_kernels == graph.num_kernels, graph.bucket.name
    plain.close()
    calls: dict[str, list[str]] = {}
    for name, speculator in (
        ("none", None),
        ("unused", Speculator(GuessingDrafter(lambda request: [], 1.0), NeverDraft(), 4)),
    ):
        fake, calls[name] = FakeModelRunner(), []
        fake.max_in_flight = 2
        note_calls(fake, calls[name])
        answer(fake, [make_request(f"r{i}", 3 + i, max_tokens=9) for i in range(5)], speculator)  # type: ignore[arg-type]
    assert calls["unused"] == calls["none"] and calls["none"][:3] == ["launch", "launch", "collect"]


def note_calls(runner: Any, calls: list[str]) -> None:
    for name in ("launch", "collect"):
        original = getattr(runner, name)

        def noting(argument: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(argument)

        setattr(runner, name, noting)


# A family for each way to keep a context: states beside keys, convolutions' inputs, windows beside whole contexts with
# sinks, and latents.
FAMILIES = ("qwen3_5", "gpt_oss", "lfm2", "glm4_moe_lite")


@pytest.mark.parametrize("family", swept(FAMILIES, ["qwen3_5"]))
def test_every_kind_of_context_takes_drafts_back(family: str, tmp_path: Path) -> None:
    """Wrong drafts leave nothing behind: not in keys, latents and windows, nor in recurrent states."""
    files = write_hf(tmp_path / "tiny", RECIPES[family])
    # one number of rows for all steps, and the sizes of tests/execution/test_mtp.py, which shares programs
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "float32", "verify_buckets": (8,)}
    settings |= {"max_num_seqs": 8, "decode_buckets": (8,), "max_model_len": 512, "num_gpu_blocks_override": 66}
    runner = make_runner(files, **{**SPECULATION, **settings})
    for right in (0.6, 1.0):
        requests = {name: make_requests(8, is_processed=False) for name in ("without", "with")}
        speculator = check_drafts(runner, requests, right)
        assert speculator.counts.num_accepted_tokens > 0
    runner.close()


@pytest.mark.parametrize("point", ["step", "drafter"])
def test_a_failure_among_drafts_ends_its_requests_and_leaves_the_pool_whole(point: str) -> None:
    fake = FakeModelRunner(num_state_slots=8, max_verify_rows=16)
    fake.max_in_flight = 2
    drafter: Any = GuessingDrafter(run_alone, 0.7)
    scheduler = Scheduler(BlockManager.of(fake.capacity), fake.capacity)
    core, propose = EngineCore(fake, scheduler), drafter.propose
    add_drafts(scheduler, drafter)

    def fail(*shown: Any) -> Any:
        if point == "drafter":
            propose(*shown)
        raise RuntimeError("the device is gone")

    for number in range(2):
        requests = [make_request(f"{number} {i}", 5, max_tokens=30) for i in range(3)]
        for request in requests:
            core.add(request)
        while not any(plan.num_drafts for plan in fake.plans):
            core.step()
        if point == "step":
            fake.before_step = fail
        else:
            drafter.propose = fail
        while scheduler.has_work:
            core.step()
        assert {request.finish_reason for request in requests} == {"error"}
        scheduler.audit()
        assert not drafter.shown and scheduler.block_manager.num_free == fake.capacity.num_blocks - 1
        fake.before_step = lambda plan: None
        drafter.propose = propose
        fake.plans.clear()
        (after,) = [make_request(f"after {number}", 5, max_tokens=20)]
        core.add(after)
        while core.has_work:
            core.step()
        assert after.output_ids == run_alone(after)
