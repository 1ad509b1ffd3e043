"""The real ollama client for Python, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.server.fake_engine import FakeEngine, serving
from tests.server.hermes import CALL, hermes
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.text.fim import FillInTheMiddle

USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return hermes("Hello, wörld!")


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url) as client:
        yield client


def test_chats_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat("tiny", USER, options=ollama.Options(temperature=0, num_predict=50), keep_alive="5m")
    assert whole.message.content == "Hello, wörld!" and whole.done_reason == "stop" and whole.eval_count == 13
    streamed = list(client.chat("tiny", USER, stream=True))
    assert "".join(part.message.content or "" for part in streamed) == "Hello, wörld!"
    assert [part.done for part in streamed] == [False] * (len(streamed) - 1) + [True]
    assert streamed[-1].total_duration == 6_000_000_000


def test_generates_whole_and_streamed(client: ollama.Client, engine: FakeEngine) -> None:
    whole = client.generate("tiny", "hi", system="Be brief.", logprobs=True, top_logprobs=1)
    assert whole.response == "Hello, wörld!" and whole.logprobs is not None and len(whole.logprobs) == 13
    streamed = list(client.generate("tiny:latest", "more", context=whole.context, stream=True))
    assert "".join(part.response or "" for part in streamed) == "Hello, wörld!"
    engine.tokenizer.fim = FillInTheMiddle(1, 2, 3, is_suffix_first=False, end_ids=frozenset())
    assert client.generate("tiny", "def f(", suffix="return x").done
    assert client.generate("tiny").done_reason == "load"
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"


def test_functions_become_tools_and_calls_come_back(client: ollama.Client, engine: FakeEngine) -> None:
    def get_weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where
        """
        return f"{city}: dry"

    engine.reply = CALL
    try:
        (call,) = client.chat("tiny", USER, tools=[get_weather]).message.tool_calls or []
        assert call.function.name == "get_weather" and call.function.arguments == {"city": "Köln"}
        parts = [part.message for part in client.chat("tiny", USER, tools=[get_weather], stream=True)]
        assert sum(len(part.tool_calls or []) for part in parts) == 1
    finally:
        engine.reply = "Hello, wörld!"
    result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
    history = [*USER, {"role": "assistant", "tool_calls": [call]}, result]
    assert client.chat("tiny", history, tools=[get_weather]).message.content == "Hello, wörld!"
    assert engine.chat_template is not None and engine.chat_template.messages[-1]["name"] == "get_weather"


def test_embeds(client: ollama.Client) -> None:
    assert len(client.embed("tiny", ["hi", "you"]).embeddings) == 2
    assert list(client.embeddings("tiny", "hi").embedding) == [2.0, 104.0, 105.0, 1.0]


def test_models_are_listed_and_shown(tiny_hf_files: ModelFiles, client: ollama.Client, engine: FakeEngine) -> None:
    engine.config = EngineConfig(str(tiny_hf_files.path))
    assert [model.model for model in client.list().models] == ["tiny:latest"]
    assert client.ps().models[0].expires_at is not None
    shown = client.show("tiny")
    assert shown.modelinfo is not None and shown.modelinfo["general.architecture"] == "llama"
    assert shown.details is not None and shown.details.format == "safetensors"
    assert client.pull("tiny").status == "success"
    assert [part.status for part in client.pull("tiny", stream=True)][-1] == "success"


def test_errors_have_their_status_and_text(client: ollama.Client, engine: FakeEngine) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as error:
        client.chat("nope", USER)
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not supported"):
        client.delete("tiny")
    engine.fail_after = 3
    try:
        with pytest.raises(ollama.ResponseError, match="not finite"):
            list(client.chat("tiny", USER, stream=True))
    finally:
        engine.fail_after = None


async def test_the_asynchronous_client_streams(url: str) -> None:
    async with ollama.AsyncClient(host=url) as client:
        parts = [part.message.content async for part in await client.chat("tiny", USER, stream=True)]
        assert "".join(part or "" for part in parts) == "Hello, wörld!"
        assert (await client.chat("tiny", USER)).message.content == "Hello, wörld!"
