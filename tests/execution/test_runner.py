"""Captured graphs against the eager reference, and against themselves however the work is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import TinyLlama, make_weights, write_safetensors, write_tiny_hf_llama
from tests.execution.driver import FOUR_GRAPHS, EagerRunner, generate, give_blocks, make_request, write_mixed_gguf
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.device.handle import has_dot_instructions
from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.execution.buckets import make_buckets
from tinyvllm.execution.limits import resolve_limits
from tinyvllm.execution.runner import ModelRunner, load_random_runner, load_runner
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request, TokenLogprobs
from tinyvllm.storage.model_config import read_model_config

CONFIG = FOUR_GRAPHS
PROMPTS = [list(b"to be"), list(b"or not to be, that is the question:"), [7], list(b"whether 'tis nobler")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_mixed_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def runner(files: ModelFiles) -> Iterator[ModelRunner]:
    runner = load_runner(files, CONFIG)
    runner.warm_up()
    yield runner
    runner.close()


def outputs_of(runner: ModelRunner | EagerRunner, *, num_tokens: int = 12, chunk: int = 1 << 30) -> list[list[int]]:
    requests = [make_request(prompt) for prompt in PROMPTS]
    generate(runner, requests, num_tokens, chunk=chunk)
    return [request.output_ids for request in requests]


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> list[list[int]]:
    """Each prompt's greedy tokens, generated alone."""
    requests = [make_request(prompt) for prompt in PROMPTS]
    for request in requests:
        generate(runner, [request], 12)
    return [request.output_ids for request in requests]


@pytest.mark.sweep  # by default, against a llama in NumPy: tests/engine/test_sampling.py
def test_graphs_equal_the_eager_reference(files: ModelFiles) -> None:
    """With float32, because the reference does not round rows for products on x86."""
    config = replace(CONFIG, dtype="float32", decode_buckets=(4,), token_buckets=(24,))
    runner = load_runner(files, config)
    runner.warm_up()
    eager = EagerRunner(files, runner.capacity, make_buckets(resolve_limits(config), config))
    params: list[dict[str, Any]] = [
        {"logprobs": 3},
        {"temperature": 0.8, "seed": 3, "logprobs": 0},
        {"temperature": 1.2, "top_p": 0.7, "top_k": 20},
    ]
    results = []
    for each in (runner, eager):
        requests = [make_request(prompt, **kwargs) for prompt, kwargs in zip(PROMPTS, params, strict=False)]
        logprobs = generate(each, requests, 4)
        results.append(([request.output_ids for request in requests], logprobs))
    (tokens, logprobs), (expected_tokens, expected_logprobs) = results
    assert tokens == expected_tokens
    assert logprobs[2] == [None] * 4
    for got, expected in zip(logprobs[0] + logprobs[1], expected_logprobs[0] + expected_logprobs[1], strict=True):
        assert got is not None and expected is not None
        assert got.chosen == pytest.approx(expected.chosen, abs=1e-4)
        assert [token_id for token_id, _ in got.top] == [token_id for token_id, _ in expected.top]
        np.testing.assert_allclose([x for _, x in got.top], [x for _, x in expected.top], atol=1e-4)
    runner.close()


def test_batched_equals_alone(runner: ModelRunner, alone: list[list[int]]) -> None:
    assert outputs_of(runner) == alone


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunked_equals_unchunked(runner: ModelRunner, alone: list[list[int]], chunk: int) -> None:
    assert outputs_of(runner, chunk=chunk) == alone


def test_a_mixed_bucket_gives_the_tokens_of_a_decode_bucket(runner: ModelRunner, alone: list[list[int]]) -> None:
    """A decode together with a prompt's piece runs in a token bucket."""
    first, filler = make_request(PROMPTS[0]), make_request([9] * 60)
    give_blocks([first, filler], 80, runner.capacity)
    while len(first.output_ids) < 12:
        entries = [Scheduled(first, first.num_computed, first.num_pending)]
        if filler.num_pending > 2:
            entries.append(Scheduled(filler, filler.num_computed, 2))
        plan = StepPlan(tuple(entries))
        assert not plan.is_decode
        first_token = runner.execute(plan).token_ids[0]
        for entry in entries:
            entry.request.num_computed += entry.count
        first.output_ids.append(first_token)
    assert first.output_ids == alone[0]


def test_a_seed_gives_its_tokens_in_every_bucket(runner: ModelRunner) -> None:
    def sampled(others: int, chunk: int) -> list[int]:
        request = make_request(PROMPTS[1], temperature=1.0, seed=1234)
        rest = [make_request(PROMPTS[0], temperature=1.0, seed=seed) for seed in range(others)]
        generate(runner, [*rest, request], 12, chunk=chunk)
        return request.output_ids

    expected = sampled(0, 100)
    assert sampled(0, 5) == sampled(1, 100) == sampled(3, 7) == expected
    other = make_request(PROMPTS[1], temperature=1.0, seed=1235)
    generate(runner, [other], 12)
    assert other.output_ids != expected


def test_logprobs_are_those_of_the_raw_distribution(runner: ModelRunner) -> None:
    """Whatever the temperature, and with what min_tokens holds back."""

    def first_logprobs(request: Request) -> TokenLogprobs:
        ((logprobs,),) = generate(runner, [request], 1)
        assert logprobs is not None
        return logprobs

    plain = make_request(PROMPTS[0], logprobs=20)
    top = dict(first_logprobs(plain).top)
    assert len(top) == 20
    assert sum(math.exp(value) for value in top.values()) < 1
    hot = make_request(PROMPTS[0], logprobs=0, temperature=5.0, top_k=2)
    assert first_logprobs(hot).chosen == pytest.approx(top[hot.output_ids[0]], abs=1e-5)
    (best,) = plain.output_ids
    held = make_request(PROMPTS[0], logprobs=1, min_tokens=1, eos=frozenset({best}))
    logprobs = first_logprobs(held)
    assert held.output_ids[0] != best
    assert logprobs.top[0][0] == best
    assert logprobs.chosen == pytest.approx(top[held.output_ids[0]], abs=1e-5)


def test_every_bucket_is_captured_once_and_none_while_serving(files: ModelFiles) -> None:
    runner = load_runner(files, CONFIG)
    stages: list[tuple[str, int, int]] = []
    assert runner.num_captures == 0
    runner.warm_up(lambda *stage: stages.append(stage))
    assert stages == [("warm-up", done, 4) for done in range(5)]
    outputs_of(runner, num_tokens=3, chunk=5)
    assert runner.num_captures == len(make_buckets(resolve_limits(CONFIG), CONFIG)) == 4


@pytest.mark.skipif(not has_dot_instructions(), reason="activations are rounded on x86 alone")
@pytest.mark.parametrize(("kind", "warns"), [("Q8_0", True), ("Q4_1", False)])
def test_activation_bits_without_effect_are_named(
    files: ModelFiles, caplog: pytest.LogCaptureFixture, kind: str, warns: bool
) -> None:
    config = replace(CONFIG, activation_bits=8)
    load_random_runner(replace(read_model_config(files), name="tiny"), kind, config).close()
    assert ("--activation-bits is 8, but has no effect" in caplog.text) == warns


@pytest.mark.parametrize("usable", [0, 1])
def test_more_cores_than_there_are_bring_a_warning(
    files: ModelFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, usable: int
) -> None:
    monkeypatch.setattr("tinyvllm.execution.runner.usable_cores", lambda: usable)
    load_runner(files, replace(CONFIG, cpu_cores=1)).close()
    assert (f"--cpu-cores is 1, but this process may use {usable}" in caplog.text) == (usable < 1)


def test_a_step_before_warm_up_is_our_bug(files: ModelFiles) -> None:
    runner = load_runner(files, CONFIG)
    with pytest.raises(InvariantError, match=r"graph prefill 8 was not captured: warm_up\(\) must run before"):
        generate(runner, [make_request(PROMPTS[0])], 1)


def test_loading_reports_progress_and_says_how_large_the_pool_is(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    stages: list[tuple[str, int, int]] = []
    runner = load_runner(files, CONFIG, lambda *stage: stages.append(stage))
    assert stages == [("load", done, 3) for done in (1, 2, 3)]
    assert runner.capacity.num_blocks == 49
    assert "--num-gpu-blocks-override gives 49 blocks" in runner.capacity.explanation[0]
    assert runner.device.startswith("CPU")
    assert runner.model_config.vocab_size == 260


def test_a_pool_that_cannot_hold_one_sequence_is_refused(files: ModelFiles) -> None:
    config = EngineConfig("tiny", max_model_len=96, num_gpu_blocks_override=3, block_size=8)
    with pytest.raises(CapacityError, match="one sequence of --max-model-len 96 tokens needs 12 blocks"):
        load_runner(files, config)


@pytest.mark.sweep  # by default, through the engine, at three positions: tests/faults/test_numbers.py
def test_logits_that_are_not_numbers_give_minus_one_and_harm_nobody_else(tmp_path: Path) -> None:
    """A token whose embedding is NaN makes its own request's logits NaN: not its neighbor's, and not those of the
    next request in its blocks."""
    files = write_tiny_hf_llama(tmp_path, tie=False)
    weights = make_weights(TinyLlama(tie=False))
    weights["model.embed_tokens.weight"][66] = math.nan
    write_safetensors(tmp_path / "model.safetensors", weights)
    runner = load_runner(files, CONFIG)
    runner.warm_up()
    well = make_request([1, 2, 3])
    generate(runner, [well], 1)
    for temperature in (0.0, 1.0):
        good, bad = make_request([1, 2, 3]), make_request([1, 66, 3], temperature=temperature)
        generate(runner, [good, bad], 1)
        assert bad.output_ids == [-1]
        assert good.output_ids == well.output_ids
        for _ in range(2):
            after = [make_request([1, 2, 3]) for _ in range(2)]  # the same blocks again
            generate(runner, after, 1)
            assert [request.output_ids for request in after] == [well.output_ids] * 2
