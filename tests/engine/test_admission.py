from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.scheduling.fakes import make_capacity
from tinyvllm.config import MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.errors import ContextLengthError, RequestError


def make_factory(seed: int = 0, **capacity: int) -> RequestFactory:
    fields = {"max_model_len": 64, **capacity}
    return RequestFactory(260, make_capacity(**fields), frozenset({258}), seed, lambda text: list(text.encode()))


def test_each_choice_is_a_request_with_the_next_seed() -> None:
    requests = make_factory().make_requests("x", [1, 2], SamplingParams(n=3, seed=7))
    assert [r.request_id for r in requests] == ["x:0", "x:1", "x:2"]
    assert [r.seed for r in requests] == [7, 8, 9]
    assert make_factory().make_requests("x", [1, 2], SamplingParams(seed=7))[0].request_id == "x"


@pytest.mark.parametrize(("seed", "expected"), [(2**32 + 5, 5), (-1, 2**32 - 1), (2**63 - 1, 2**32 - 1)])
def test_seeds_have_32_bits(seed: int, expected: int) -> None:
    assert make_factory().make_requests("x", [1], SamplingParams(seed=seed))[0].seed == expected


def test_drawn_seeds_follow_from_the_engine_seed() -> None:
    def draw(seed: int) -> list[int]:
        factory = make_factory(seed)
        return [factory.make_requests(str(i), [1], SamplingParams())[0].seed for i in range(3)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) == 3


def test_no_max_tokens_is_as_many_as_fit() -> None:
    factory = make_factory()
    assert factory.make_requests("x", [1] * 10, SamplingParams(max_tokens=None))[0].max_tokens == 54
    assert factory.make_requests("x", [1] * 63, SamplingParams(max_tokens=None))[0].max_tokens == 1
    assert make_factory(num_blocks=5).make_requests("x", [1], SamplingParams(max_tokens=None))[0].max_tokens == 15


def test_eos_is_ignored_on_request() -> None:
    factory = make_factory()
    assert factory.make_requests("x", [1], SamplingParams())[0].eos_ids == {258}
    assert factory.make_requests("x", [1], SamplingParams(ignore_eos=True))[0].eos_ids == frozenset()


def test_a_prompt_that_leaves_no_room_names_both_lengths() -> None:
    with pytest.raises(
        ContextLengthError, match="maximum context length is 64 tokens, but the prompt has 64"
    ) as caught:
        make_factory().make_requests("x", [1] * 64, SamplingParams(max_tokens=None))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_an_output_that_does_not_fit_names_both_parts() -> None:
    make_factory().make_requests("x", [1] * 60, SamplingParams(max_tokens=4))
    with pytest.raises(ContextLengthError, match="65 were requested, 60 for the prompt and 5 for the output") as caught:
        make_factory().make_requests("x", [1] * 60, SamplingParams(max_tokens=5))
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")


def test_a_small_pool_is_named_as_the_limit() -> None:
    with pytest.raises(ContextLengthError, match=r"KV pool holds 16 tokens \(the maximum context length is 64\)"):
        make_factory(num_blocks=5).make_requests("x", [1] * 10, SamplingParams(max_tokens=7))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        make_factory().make_requests("x", [], SamplingParams())


@pytest.mark.parametrize("token_id", [260, -1, 10**9])
def test_an_id_outside_the_vocabulary_is_named(token_id: int) -> None:
    with pytest.raises(RequestError, match=f"prompt has the token id {token_id}, .* 0 to 259") as caught:
        make_factory().make_requests("x", [5, token_id, 259], SamplingParams())
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=f"stop_token_ids has the token id {token_id}"):
        make_factory().make_requests("x", [5], SamplingParams(stop_token_ids=(token_id,)))


def test_an_id_that_is_no_integer_is_refused_and_numpys_are_taken() -> None:
    with pytest.raises(RequestError, match="not an integer"):
        make_factory().make_requests("x", [1.5], SamplingParams())  # type: ignore[list-item]
    (request,) = make_factory().make_requests("x", np.array([1, 2]), SamplingParams())  # type: ignore[arg-type]
    assert request.prompt_ids == [1, 2]
    assert all(type(token_id) is int for token_id in request.prompt_ids)


@pytest.mark.parametrize(
    ("settings", "param"),
    [({"allowed_token_ids": (3, 260)}, "allowed_token_ids"), ({"logit_bias": {-1: 1.0}}, "logit_bias")],
)
def test_ids_of_logits_processing_must_be_in_the_vocabulary(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=f"{param} has the token id .* 0 to 259") as caught:
        make_factory().make_requests("x", [5], SamplingParams(**settings))
    assert caught.value.param == param


def test_bad_words_become_tokens_with_and_without_a_space_before_them() -> None:
    (request,) = make_factory().make_requests("x", [5], SamplingParams(bad_words=("ab", " ab", "c")))
    assert request.bad_words_ids == ((97, 98), (32, 97, 98), (99,), (32, 99))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: it must be at least 1e-30"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty is 1e-46: it must be at least 1e-30"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf: it must be at least 1e-30 and at most 100"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5: it must be between -2 and 2"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan: it must be between -2 and 2"),
        ({"typical_p": 0.0}, "typical_p is 0.0: it must be at least 1e-30 and at most 1"),
        ({"typical_p": 1e-46}, "typical_p is 1e-46: it must be at least 1e-30 and at most 1"),
        ({"logit_bias": {3: 100.5}}, "logit_bias is {3: 100.5}: it must be of values between -100 and 100"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)}, "it must be of at most 1024 ids"),
        ({"bad_words": ("a", "")}, "bad_words is .*: it must be strings that are not empty"),
        ({"bad_words": tuple(map(str, range(MAX_BAD_WORDS + 1)))}, "it must be at most 256 strings"),
        ({"bad_words": ("a" * 20_000,)}, "it must be of at most 16384 characters in all"),
        ({"stop": ("a" * 4096, "b" * 4097)}, "stop is .*: it must be of at most 8192 characters in all"),
        ({"allowed_token_ids": ()}, "it must be at least one id, or omitted"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21: it must be between 0 and 20"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**settings)
    assert caught.value.param == next(iter(settings))


def test_lists_and_nothing_become_what_the_fields_say() -> None:
    params = SamplingParams(bad_words=["a"], allowed_token_ids=[1, 2], logit_bias=None)  # type: ignore[arg-type]
    assert (params.bad_words, params.allowed_token_ids, params.logit_bias) == (("a",), (1, 2), {})


def test_a_temperature_that_float32_cannot_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=1e-40).temperature == 0.0
    assert SamplingParams(temperature=1e-5).temperature == 1e-5
