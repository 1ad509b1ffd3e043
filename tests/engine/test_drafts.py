"""Real graphs: with drafts, right or wrong, requests of every kind answer as they do without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.engine.requests import answer, make_requests, make_runner
from tests.scheduling.fakes import GuessingDrafter
from tinyvllm.config import ModelFiles
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.scheduling.drafts import AlwaysDraft, Speculator
from tinyvllm.scheduling.request import Request

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
    answer(runner, requests["without"])
    truth = {request.request_id: request.output_ids for request in requests["without"]}
    speculator = make_speculator(truth, right)
    core = answer(runner, requests["with"], speculator)
    for a, b in zip(requests["without"], requests["with"], strict=True):
        assert a.output_ids == b.output_ids and a.finish_reason == b.finish_reason, a.request_id
    assert core.stats.extra["num_failed_steps"] == 0
    return speculator


@pytest.mark.parametrize("is_processed", [False, True], ids=["plain", "processed"])
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_answers_are_those_without_drafts(runner: ModelRunner, right: float, is_processed: bool) -> None:
    requests = {name: make_requests(12, is_processed=is_processed) for name in ("without", "with")}
    counts = check_drafts(runner, requests, right).counts
    assert counts.num_drafts > 5
    assert not is_processed or any(request.num_drafted for request in requests["with"] if request.constraint)
    assert (counts.num_accepted_tokens == counts.num_draft_tokens) == (right == 1.0)
