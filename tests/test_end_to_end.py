"""The whole product on the real model: engine tokens against transformers', and the `openai` client over a socket.

Expected tokens: tests/data/smollm2_reference.json (scripts/make_reference.py). Buckets are few, to start quickly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests import sweeps
from tests.builders import without_logits_processing
from tests.server.fake_engine import serving
from tests.sweeps import length
from tinyvllm import LLM, EngineConfig, SamplingParams
from tinyvllm.config import CACHE_DIR_VARIABLE, ModelFiles
from tinyvllm.engine.async_engine import AsyncEngine

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

NUM_TOKENS = length(28, 40)  # of each answer
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SMALL: dict[str, Any] = {
    "max_model_len": 448,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # the longest prompt takes seven chunks, in steps with the others' decodes
    "num_gpu_blocks_override": 29,  # 448 tokens, where the prompts and outputs of eight need more: preemption
    "decode_buckets": (1, 8),
    "token_buckets": (64,),
    "cpu_cores": 1,
}


@pytest.fixture(scope="module", autouse=True)
def steps_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No request here asks for logits processing, and by default nothing is compiled for it: tests/engine has it.
    So others must not find these steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        with contextlib.nullcontext() if sweeps.is_sweeping else without_logits_processing():
            yield


# Two cores compile most kernels twice, for two shares: tests/ops/cpu/test_cores.py has them with tiny models.
@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.sweep)], ids=["one core", "two cores"])
def llm(request: pytest.FixtureRequest, smollm2_files: ModelFiles) -> Iterator[LLM]:
    model = LLM(str(smollm2_files.path), **SMALL | {"cpu_cores": request.param})
    yield model
    model.close()


def test_tokens_equal_the_reference_through_chunks_batches_preemption_and_prefix_hits(
    llm: LLM, smollm2_reference: dict[str, Any]
) -> None:
    cases = smollm2_reference["prompts"]
    cases = cases if sweeps.is_sweeping else cases[::2]  # the last one, of 388 tokens, is among them
    prompts = [{"prompt_token_ids": case["prompt_ids"]} for case in cases]
    captures = llm.stats.num_captures

    first = llm.generate(prompts, GREEDY)
    assert llm.stats.num_preemptions > 0, "the pool was meant to be too small"
    for case, output in zip(cases, first, strict=True):
        assert list(output.outputs[0].token_ids) == case["output_ids"][:NUM_TOKENS], case["name"]

    hits = 0
    for case, prompt in list(zip(cases, prompts, strict=True))[-1:]:
        for _ in range(2):  # alone, and again with its prompt in the cache
            (output,) = llm.generate([prompt], GREEDY)
            assert list(output.outputs[0].token_ids) == case["output_ids"][:NUM_TOKENS], case["name"]
        hits += output.num_cached_tokens
        assert output.num_cached_tokens == (len(case["prompt_ids"]) - 1) // 16 * 16, case["name"]
    assert hits > 0
    assert llm.stats.num_captures == captures, "a graph was captured while serving"


def test_logprobs_of_chosen_tokens_agree_with_the_reference(llm: LLM, smollm2_reference: dict[str, Any]) -> None:
    """With the default float16 pool. In float32 every logprob agrees: tests/execution/test_real_model.py (sweep)."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    cases = smollm2_reference["prompts"][:4]
    outputs = llm.generate([{"prompt_token_ids": case["prompt_ids"]} for case in cases], params)
    for case, output in zip(cases, outputs, strict=True):
        assert output.outputs[0].logprobs is not None
        for found, ids, values in zip(output.outputs[0].logprobs, case["top_ids"], case["top_logprobs"], strict=False):
            assert found[ids[0]].logprob == pytest.approx(values[0], abs=1e-2)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=7, max_tokens=12, ignore_eos=True)
    (alone,) = llm.generate(["Once upon a time"], params)
    others = [SamplingParams(temperature=1.0, seed=seed, max_tokens=16) for seed in range(7)]
    batch = llm.generate(["Once upon a time", *["The sea"] * 7], [params, *others])
    assert batch[0].outputs[0].token_ids == alone.outputs[0].token_ids
    other_seed = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=8, max_tokens=12, ignore_eos=True)
    assert llm.generate(["Once upon a time"], other_seed)[0].outputs[0].token_ids != alone.outputs[0].token_ids


@pytest.fixture(scope="module")
def client(smollm2_files: ModelFiles) -> Iterator[openai.OpenAI]:
    """The `openai` client of a server on the real model."""
    config = EngineConfig(str(smollm2_files.path), served_model_name="smollm2", **SMALL)  # whose graphs are compiled
    with serving(AsyncEngine.start(config)) as url:
        _wait_until_ready(url)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            yield client


def _wait_until_ready(url: str) -> None:
    """/health is 503 while the engine warms up."""
    for _ in range(3000):
        health = httpx.get(f"{url}/health")
        if health.status_code == 200:
            return
        assert health.status_code == 503, health.text
        time.sleep(0.1)
    pytest.fail("the server was not ready after 300 s")


CHAT: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def test_openai_client_lists_completes_and_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    done = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in done.choices[0].text
    assert done.usage is not None and done.usage.completion_tokens == 4
    chat = client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=16, temperature=0, logprobs=True)
    assert "Paris" in (chat.choices[0].message.content or "")
    assert chat.choices[0].finish_reason == "stop"
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content
    assert all(token.logprob <= 0 for token in chat.choices[0].logprobs.content)


def test_openai_client_streams_what_it_would_have_got_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=16, temperature=0.8, seed=5)
    stream = client.chat.completions.create(
        model="smollm2", messages=CHAT, max_tokens=16, temperature=0.8, seed=5, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_client_stops_at_a_string_and_cuts_it(client: openai.OpenAI) -> None:
    prompt = "Count: 1, 2, 3, 4,"
    free = client.completions.create(model="smollm2", prompt=prompt, max_tokens=24, temperature=0)
    stop = free.choices[0].text[6:9]
    cut = client.completions.create(model="smollm2", prompt=prompt, max_tokens=24, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]


def test_openai_client_cancels_and_gets_its_errors(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="smollm2",
        prompt="Tell me a very long story.",
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="smollm2", prompt=[5] * 600)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as out_of_range:
        client.completions.create(model="smollm2", prompt="x", temperature=-1)
    assert out_of_range.value.param == "temperature"
    # the canceled request's row is free again, or these could not all run at once
    done = client.completions.create(model="smollm2", prompt=list("abcdefgh"), max_tokens=2)
    assert len(done.choices) == 8
