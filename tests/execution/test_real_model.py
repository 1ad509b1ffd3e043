"""The default model's captured graphs against transformers: token for token, however the work is cut.

Expected: tests/data/smollm2_reference.json, greedy in float32 (scripts/make_reference.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.execution.driver import generate, make_request
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.scheduling.request import Request, TokenLogprobs

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

CONFIG = EngineConfig(
    "smollm2-135m-instruct",
    max_model_len=1024,
    max_num_seqs=16,
    max_num_batched_tokens=256,
    decode_buckets=(1, 16),  # few, to be quick
    token_buckets=(16, 256),
)
CHOSEN_TOLERANCE = 1e-2  # of logprobs from a float16 KV cache, the default; the reference's is float32
TOP_TOLERANCE = 5e-2  # likewise, down to the fifth likeliest; 3e-2 without the rounding of products on x86


@pytest.fixture(scope="module")
def runner(smollm2_files: ModelFiles) -> Iterator[ModelRunner]:
    runner = load_runner(smollm2_files, CONFIG)
    runner.warm_up()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def cases(smollm2_reference: dict[str, Any]) -> list[dict[str, Any]]:
    return smollm2_reference["prompts"]


def make_requests(cases: list[dict[str, Any]], **params: Any) -> list[Request]:
    return [make_request(case["prompt_ids"], name=case["name"], **params) for case in cases]


def check_tokens(requests: list[Request], cases: list[dict[str, Any]]) -> None:
    for request, case in zip(requests, cases, strict=True):
        assert request.output_ids == case["output_ids"], case["name"]


def logprob_differences(logprobs: list[TokenLogprobs | None], case: dict[str, Any]) -> tuple[float, float]:
    """The largest of the chosen tokens, and of the five likeliest by rank: close neighbors may change places."""
    chosen, top = 0.0, 0.0
    for got, values in zip(logprobs, case["top_logprobs"], strict=True):
        assert got is not None
        chosen = max(chosen, abs(got.chosen - values[0]))
        top = max(top, *(abs(value - wanted) for (_, value), wanted in zip(got.top, values, strict=True)))
    return chosen, top


def test_the_references_are_worth_comparing_with(cases: list[dict[str, Any]]) -> None:
    assert len(cases) >= 8
    assert all(len(case["output_ids"]) == 64 for case in cases)
    assert max(len(case["prompt_ids"]) for case in cases) > 300


@pytest.mark.sweep  # tests/test_end_to_end.py compares tokens and their logprobs
def test_tokens_and_logprobs_equal_transformers(runner: ModelRunner, cases: list[dict[str, Any]]) -> None:
    requests = make_requests(cases, logprobs=5)
    for request, case in zip(requests, cases, strict=True):
        (logprobs,) = generate(runner, [request], 64)
        chosen, top = logprob_differences(logprobs, case)
        print(f"{case['name']}: {chosen:.1e} of the chosen, {top:.1e} of the five likeliest")
        assert chosen < CHOSEN_TOLERANCE, case["name"]
        assert top < TOP_TOLERANCE, case["name"]
    check_tokens(requests, cases)


@pytest.mark.sweep  # by default, with tiny models of each family: tests/families/test_tiny.py
def test_in_float32_logprobs_equal_to_a_thousandth(smollm2_files: ModelFiles, cases: list[dict[str, Any]]) -> None:
    """The cache, and products, which otherwise round rows to 16 bits on x86."""
    exact = replace(CONFIG, kv_cache_dtype="float32", dtype="float32")
    config = replace(exact, max_num_seqs=1, decode_buckets=(1,), token_buckets=(256,))
    runner = load_runner(smollm2_files, config)
    runner.warm_up()
    for case in cases[2::6]:  # the long one among them
        (request,) = make_requests([case], logprobs=5)
        (logprobs,) = generate(runner, [request], 64)
        assert max(logprob_differences(logprobs, case)) < 1e-3, case["name"]
        check_tokens([request], [case])
    runner.close()


@pytest.mark.sweep  # tests/test_end_to_end.py does the like with fewer tokens
def test_prompts_in_pieces_of_16_tokens_give_the_same_tokens(runner: ModelRunner, cases: list[dict[str, Any]]) -> None:
    requests = make_requests(cases)
    for request in requests:
        generate(runner, [request], 64, chunk=16)
    check_tokens(requests, cases)


@pytest.mark.sweep  # tests/test_end_to_end.py does the like with fewer tokens
def test_one_of_16_in_a_batch_gives_the_same_tokens(runner: ModelRunner, cases: list[dict[str, Any]]) -> None:
    """Prompts in pieces mixed with decodes, then sixteen decodes per step."""
    batch = [*cases, cases[0]][:16]
    captures = runner.num_captures
    requests = make_requests(batch)
    generate(runner, requests, 64, chunk=48)
    check_tokens(requests, batch)
    assert runner.num_captures == captures == 4
