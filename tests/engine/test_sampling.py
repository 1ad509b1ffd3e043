"""What requests ask of sampling, through a whole engine: against a llama in NumPy, an id at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.builders import TinyLlama, make_weights, write_tiny_hf_llama
from tests.model.test_llama import numpy_llama
from tests.ops.sampling.wishes import Wish
from tests.sweeps import swept
from tinyvllm.config import SamplingParams
from tinyvllm.engine.llm import LLM, RequestOutput
from tinyvllm.ops.sampling.reference import gumbel_max, uniforms

MODEL = TinyLlama(seed=11)
WEIGHTS = make_weights(MODEL)
PROMPTS = [list(text) for text in (b"to be or not to be", b"ababab", b"x", b"the rest is silence, is silence")]
SETTINGS: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "decode_buckets": (4,),
    "token_buckets": (16,),
    "block_size": 8,
    "num_gpu_blocks_override": 15,  # four requests do not fit with their output: some are preempted
    "kv_cache_dtype": "float32",
    "dtype": "float32",  # on a GPU too
}


@pytest.fixture(scope="module", params=swept([False, True], [True]), ids=["in turn", "overlapped"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    files = write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "sampling", seed=MODEL.seed)
    llm = LLM(str(files.path), async_scheduling=request.param, **SETTINGS)
    yield llm
    llm.close()


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


def raw_logits(token_ids: list[int]) -> np.ndarray:
    return numpy_llama(MODEL, WEIGHTS, token_ids)[-1]


def draw(prompt: list[int], params: SamplingParams, num_tokens: int) -> list[int]:
    """What NumPy says: the distribution of processed logits, and the engine's own noise over it."""
    output: list[int] = []
    for index in range(num_tokens):
        wish = Wish(
            prompt=tuple(prompt),
            output=tuple(output),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            bias=dict(params.logit_bias),
            allowed=params.allowed_token_ids,
            temperature=params.temperature or 1e-9,
            typical_p=params.typical_p,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
        )
        probabilities = wish.probabilities(raw_logits([*prompt, *output]))
        noise = uniforms(params.seed or 0, index, len(probabilities))
        output.append(gumbel_max(probabilities, noise) if params.temperature else int(probabilities.argmax()))
    return output


CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.1},
    "presence": {"presence_penalty": 1.9},
    "bias": {"logit_bias": {97: 6.0, 120: -100.0, 200: 5.5}},
    "allowed": {"allowed_token_ids": (98, 99, 100, 150, 151)},
    "typical": {"typical_p": 0.4, "temperature": 0.9, "seed": 3},
    "all": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": -0.3,
        "logit_bias": {98: 2.0, 30: -3.0},
        "allowed_token_ids": tuple(range(20, 220)),
        "temperature": 0.8,
        "typical_p": 0.95,
        "top_p": 0.97,
        "top_k": 60,
        "min_p": 0.001,
        "seed": 77,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_gets_the_tokens_that_its_settings_say(llm: LLM, name: str) -> None:
    """Penalties over prompt and output, as they grow; four requests together, preempted now and then."""
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **CASES[name]}
    params = SamplingParams(**fields)
    plain = SamplingParams(temperature=params.temperature, seed=params.seed, max_tokens=12, ignore_eos=True)
    got = tokens_of(generate(llm, PROMPTS, params))
    assert got == [draw(prompt, params, 12) for prompt in PROMPTS]
    assert got != tokens_of(generate(llm, PROMPTS, plain)), "the settings change something"


def test_seeds_reproduce_in_any_company_and_over_preemptions(llm: LLM) -> None:
    """With logits processing on: alone, together, and in a batch with requests that ask for nothing."""
    wishes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {},
        {"frequency_penalty": 0.8, "typical_p": 0.9},
        {"logit_bias": {65: 3.0}},
    ]
    all_params = [SamplingParams(seed=100 + i, max_tokens=30, ignore_eos=True, **wish) for i, wish in enumerate(wishes)]
    alone = [tokens_of(generate(llm, [prompt], params))[0] for prompt, params in zip(PROMPTS, all_params, strict=True)]
    before = llm.stats.num_preemptions
    assert tokens_of(generate(llm, PROMPTS, all_params)) == alone
    assert llm.stats.num_preemptions > before
    twice = tokens_of(generate(llm, PROMPTS[::-1] * 2, all_params[::-1] * 2))
    assert twice == alone[::-1] * 2


def test_bad_words_do_not_come_and_their_beginnings_may(llm: LLM) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": 10,
        "ignore_eos": True,
        "allowed_token_ids": tuple(range(33, 127)),  # a token is a character
    }

    def answer(*bad_words: str) -> str:
        (tokens,) = tokens_of(generate(llm, PROMPTS[:1], SamplingParams(bad_words=bad_words, **settings)))
        return bytes(tokens).decode()

    plain = answer()
    word = plain[3:6]
    place = plain.index(word)
    got = answer(word)
    assert word not in got
    assert got[: place + 2] == plain[: place + 2], "its beginning may come"
    assert got[place + 2] != plain[place + 2]
    assert plain[0] not in answer(plain[0])
    assert answer("never", word, plain[0]).count(word) == 0


def test_min_tokens_holds_ends_back_in_steps_with_logits_processing_too(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={65: 100.0}, stop_token_ids=(65,), min_tokens=4)
    (got,) = tokens_of(generate(llm, PROMPTS[:1], params))
    assert 65 not in got[:4]
    assert got[4:] == [65]


def test_a_prompts_logprobs_are_those_of_the_model(llm: LLM) -> None:
    """Of prompts longer than a step has rows, together with a request that only decodes."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=count, logprobs=1) for count in (0, 3, 20, 2)
    ]
    params[2] = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = generate(llm, PROMPTS, params)
    assert outputs[2].prompt_logprobs is None
    for prompt, one, output in zip(PROMPTS, params, outputs, strict=True):
        if one.prompt_logprobs is None:
            continue
        check_prompt_logprobs(output, prompt, one.prompt_logprobs)
    assert tokens_of(outputs)[0] == draw(PROMPTS[0], params[0], 3)


def check_prompt_logprobs(output: RequestOutput, prompt: list[int], count: int) -> None:
    logits = numpy_llama(MODEL, WEIGHTS, prompt)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for place, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        order = np.argsort(-expected[place], kind="stable")
        chosen = prompt[place + 1]
        assert list(entry) == list(dict.fromkeys([chosen, *order[:count].tolist()]))
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[place, token], abs=1e-4)
            assert logprob.rank == 1 + order.tolist().index(token)


def test_a_prompt_in_the_prefix_cache_is_scored_again(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    first, again = (generate(llm, PROMPTS[3:], params)[0] for _ in range(2))
    assert again.prompt_logprobs == first.prompt_logprobs
    assert again.num_cached_tokens == 0
    (plain,) = generate(llm, PROMPTS[3:], SamplingParams(temperature=0.0, max_tokens=2))
    assert plain.num_cached_tokens > 0
    assert tokens_of([plain]) == tokens_of([again])


def test_processed_scored_and_plain_requests_share_their_steps(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, presence_penalty=1.0),
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=2, logit_bias={97: 4.0}),
        SamplingParams(temperature=1.2, seed=2, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0),
    ]
    outputs = generate(llm, PROMPTS, params)
    assert tokens_of(outputs) == [draw(prompt, one, 8) for prompt, one in zip(PROMPTS, params, strict=True)]
    check_prompt_logprobs(outputs[1], PROMPTS[1], 2)
    check_prompt_logprobs(outputs[3], PROMPTS[3], 0)


def test_a_request_that_allows_nothing_ends_with_an_error(llm: LLM) -> None:
    """And its neighbors do not notice."""
    params = SamplingParams(max_tokens=4, allowed_token_ids=(97,), bad_words=("a",))
    well = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    bad, good = generate(llm, PROMPTS[:2], [params, well])
    assert bad.outputs[0].finish_reason == "error"
    assert tokens_of([good]) == [draw(PROMPTS[1], well, 4)]
