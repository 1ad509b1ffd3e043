"""The real openai client, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.fake_engine import FakeEngine, serving

USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinyvllm"


def test_completion_is_typed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="ab", max_tokens=50, logprobs=1)
    assert answer.choices[0].text == "Hello, wörld!"
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens == list("Hello, wörld!")
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_chat_is_typed(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, seed=42, logprobs=True, top_logprobs=2, extra_body={"top_k": 5}
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, wörld!")
    assert choice.finish_reason == "stop" and choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert (engine.calls[0].params.seed, engine.calls[0].params.top_k) == (42, 5)
    assert answer._request_id is not None


def test_streams_are_typed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="tiny", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, wörld!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 13
    texts = client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=5)
    assert "".join(chunk.choices[0].text for chunk in texts) == "Hello"


def test_stream_helper_rebuilds_the_completion(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=USER) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, wörld!"


def test_stop_is_obeyed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, stop=["zz", ","])
    assert answer.choices[0].finish_reason == "stop"


async def test_async_client_streams(engine: FakeEngine) -> None:
    with serving(engine) as url:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="tiny", messages=USER, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "Hello, wörld!"


def test_closing_a_stream_cancels_the_request() -> None:
    engine = FakeEngine(hang_after=3)
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=USER, stream=True)
        next(iter(stream))
        stream.close()
        engine.wait_until(lambda: len(engine.closed) == 1)
        assert not engine.running


def test_timing_out_cancels_the_request() -> None:
    engine = FakeEngine(hang_after=3)
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", messages=USER, timeout=openai.Timeout(None, read=0.5))
        engine.wait_until(lambda: len(engine.closed) == 1)


def test_errors_are_of_their_right_classes(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=USER, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "model_not_found"
    engine.fail_after = 0
    with pytest.raises(openai.InternalServerError, match="logits are not finite"):
        client.chat.completions.create(model="tiny", messages=USER)


def test_error_inside_a_stream_is_raised(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 3
    stream = client.chat.completions.create(model="tiny", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(stream)
