"""Anthropic's Python SDK, used as its documentation says, with an engine that answers by a script.

pip install -e '.[test,clients]' && pytest -m clients tests/clients/test_anthropic.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from tests.agents.scripted_engine import ScriptedServer, Turn, call, loop, scripted_server
from tests.server.fake_engine import FakeEngine, TagTemplate, serving
from tests.server.hermes import CALL, THINKING

pytest.importorskip("anthropic")
import anthropic

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

MODEL = "tiny"
TOOL: anthropic.types.ToolParam = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK: anthropic.types.MessageParam = {"role": "user", "content": "What is the weather in Köln?"}


def client_of(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


class City(BaseModel):
    name: str
    is_capital: bool


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    script = [
        Turn("Describe Paris", '{"name": "Paris", "is_capital": true}'),
        *loop("weather in Köln", call("get_weather", city="Köln"), "It rains."),
    ]
    with scripted_server(script) as running:
        yield running


def test_whole_and_streamed(server: ScriptedServer) -> None:
    client = client_of(server.url)
    message = client.messages.create(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "Hi"}])
    assert message.content[0].type == "text" and message.content[0].text == "All right."
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0
    assert message._request_id
    with client.messages.stream(
        model=MODEL, max_tokens=100, system="Be brief.", messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        assert "".join(stream.text_stream) == "All right."
        final = stream.get_final_message()
    assert final.content[0].type == "text" and final.content[0].text == "All right."
    assert final.usage.output_tokens == message.usage.output_tokens
    raw = client.messages.create(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "Hi"}], stream=True)
    kinds = [event.type for event in raw]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_a_tool_loop_ends(server: ScriptedServer) -> None:
    client = client_of(server.url)
    history = [ASK]
    for expected in ("tool_use", "end_turn"):
        with client.messages.stream(model=MODEL, max_tokens=200, tools=[TOOL], messages=history) as stream:
            answer = stream.get_final_message()
        assert answer.stop_reason == expected
        history.append({"role": "assistant", "content": answer.content})
        for block in answer.content:
            if block.type == "tool_use":
                assert block.input == {"city": "Köln"}
                result: anthropic.types.ToolResultBlockParam = {
                    "type": "tool_result", "tool_use_id": block.id, "content": "rain"
                }  # fmt: skip
                history.append({"role": "user", "content": [result]})
    assert answer.content[0].type == "text" and answer.content[0].text == "It rains."
    assert answer.usage.cache_read_input_tokens is not None and answer.usage.cache_read_input_tokens > 0


def test_the_tool_runner_runs_tools_by_itself(server: ScriptedServer) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"rain in {city}"

    for streams in (False, True):
        runner = client_of(server.url).beta.messages.tool_runner(
            model=MODEL, max_tokens=200, tools=[get_weather], messages=[ASK], stream=streams
        )
        last = runner.until_done()
        assert last.content[0].type == "text" and last.content[0].text == "It rains."


def test_thinking_and_calls_in_one_stream() -> None:
    engine = FakeEngine(reply=f"<think>hm</think>Sure.{CALL}", chat_template=TagTemplate(THINKING))
    with serving(engine) as url:
        client = client_of(url)
        settings: anthropic.types.ThinkingConfigEnabledParam = {"type": "enabled", "budget_tokens": 1024}
        with client.messages.stream(
            model=MODEL, max_tokens=2000, tools=[TOOL], thinking=settings, messages=[ASK]
        ) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_message()
        whole = client.messages.create(model=MODEL, max_tokens=2000, tools=[TOOL], thinking=settings, messages=[ASK])
    assert {"thinking", "signature", "text", "input_json"} <= kinds
    for message in (streamed, whole):
        thinking, text, use = message.content
        assert thinking.type == "thinking" and thinking.thinking == "hm" and thinking.signature
        assert text.type == "text" and text.text == "Sure."
        assert use.type == "tool_use" and use.input == {"city": "Köln"}


def test_structured_outputs_are_parsed(server: ScriptedServer) -> None:
    answer = client_of(server.url).messages.parse(
        model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "Describe Paris"}], output_format=City
    )
    assert answer.parsed_output == City(name="Paris", is_capital=True)


def test_tokens_and_models(server: ScriptedServer) -> None:
    client = client_of(server.url)
    count = client.messages.count_tokens(model=MODEL, messages=[ASK], tools=[TOOL]).input_tokens
    assert count > len(json.dumps(TOOL))
    [model] = client.models.list()
    assert (model.id, model.type) == (MODEL, "model")
    assert client.models.retrieve(MODEL).created_at.year == 2023


def test_errors_have_the_sdks_classes() -> None:
    hi: anthropic.types.MessageParam = {"role": "user", "content": "Hi"}
    with serving(FakeEngine(fail_after=3), api_keys=("secret-key",)) as url:
        with pytest.raises(anthropic.AuthenticationError) as failed:
            client_of(url).messages.create(model=MODEL, max_tokens=10, messages=[hi])
        assert failed.value.type == "authentication_error" and failed.value.request_id
        client = client_of(url).with_options(api_key="secret-key")
        with pytest.raises(anthropic.NotFoundError, match="'tiny'"):
            client.messages.create(model="claude", max_tokens=10, messages=[hi])
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("claude")
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(model=MODEL, max_tokens=-1, messages=[hi])
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(model=MODEL, max_tokens=10, messages=[hi])
        with (
            pytest.raises(anthropic.APIStatusError, match="generation failed"),
            client.messages.stream(model=MODEL, max_tokens=10, messages=[hi]) as stream,
        ):
            stream.get_final_message()
    with serving(FakeEngine(is_ready=False)) as url, pytest.raises(anthropic.ServiceUnavailableError) as busy:
        client_of(url).messages.create(model=MODEL, max_tokens=10, messages=[hi])
    assert busy.value.type == "overloaded_error"
