"""Python clients of OpenAI's API, each used as its documentation says, with a real server.

pip install -e '.[test,clients]' && pytest -m clients tests/clients

The model is too small to call a tool by itself; where a call is required, the server's grammar forces one.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

pytestmark = [pytest.mark.clients, pytest.mark.model, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

MODEL = "smol"
QUESTION = "What is the weather like in Paris?"


class City(BaseModel):
    """A city and its country."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Paris", "Rome"]
    is_capital: bool
    sights: Annotated[list[Literal["tower", "bridge"]], Field(max_length=2)]


def check_city(city: Any) -> None:
    assert isinstance(city, City) and city.name in ("Paris", "Rome")


# ---- openai ----


def test_openai(server_url: str) -> None:
    client = openai.OpenAI(base_url=server_url, api_key="none", max_retries=0)
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Describe Paris."}], response_format=City, max_tokens=200
    )
    check_city(parsed.choices[0].message.parsed)
    tool = openai.pydantic_function_tool(City, name="describe")
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe Paris."}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    ) as stream:
        kinds = {event.type for event in stream}
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    check_city(choice.message.tool_calls[0].function.parsed_arguments)
    assert "tool_calls.function.arguments.delta" in kinds
    answer = client.responses.parse(model=MODEL, input="Describe Rome.", text_format=City, max_output_tokens=200)
    check_city(answer.output_parsed)
    scored = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, echo=True, logprobs=1
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None


async def test_openai_async(server_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=server_url, api_key="none", max_retries=0) as client:

        async def count(number: int) -> int:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Say {number}."}],
                stream=True,
                max_tokens=8,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None
            return chunks[-1].usage.completion_tokens

        assert all(0 < tokens <= 8 for tokens in await asyncio.gather(*(count(n) for n in range(4))))


# ---- langchain ----


def test_langchain(server_url: str) -> None:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
        """The weather of a city for some days."""
        return f"sunny in {city} for {days} days"

    llm = ChatOpenAI(base_url=server_url, api_key="none", model=MODEL, max_tokens=200, max_retries=0)
    assert llm.invoke("Hello").content
    assert "".join(str(chunk.content) for chunk in llm.stream("Hello"))
    bound = llm.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    message = bound.invoke(QUESTION)
    [call] = message.tool_calls
    assert call["name"] == "get_weather" and "sunny" in get_weather.invoke(call["args"])
    gathered = None
    for chunk in bound.stream(QUESTION):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered is not None and gathered.tool_calls[0]["name"] == "get_weather"
    history = [("user", QUESTION), message, get_weather.invoke(call)]
    assert llm.invoke(history).content
    for method in ("json_schema", "function_calling"):
        check_city(llm.with_structured_output(City, method=method).invoke("Describe Paris."))
    raw = llm.with_structured_output(None, method="json_mode").invoke("Answer with a JSON object.")
    assert isinstance(raw, dict)


# ---- instructor ----


def test_instructor(server_url: str) -> None:
    import instructor

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=server_url, api_key="none", max_retries=0), mode=mode)
        city = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Describe Rome."}],
            response_model=City,
            max_retries=0,
            max_tokens=200,
        )
        check_city(city)


# ---- openai-agents ----


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_openai_agents(server_url: str, kind: str) -> None:
    import agents

    agents.set_tracing_disabled(True)
    called: list[str] = []

    # offered only until it is called, so that so small a model then answers in text
    @agents.function_tool(is_enabled=lambda context, agent: not called)
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        called.append(city)
        return f"It is sunny in {city}."

    async with openai.AsyncOpenAI(base_url=server_url, api_key="none", max_retries=0) as client:
        make = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel
        agent = agents.Agent(
            name="Weather",
            instructions="You are a helpful assistant. Once you know the weather, say it in plain words.",
            model=make(model=MODEL, openai_client=client),
            tools=[get_weather],
            model_settings=agents.ModelSettings(tool_choice="required", temperature=0.0, max_tokens=100),
        )
        result = await agents.Runner.run(agent, QUESTION, max_turns=8)
        assert len(called) == 1 and result.final_output is not None
        called.clear()
        streamed = agents.Runner.run_streamed(agent, QUESTION, max_turns=8)
        events = [event.type async for event in streamed.stream_events()]
    assert len(called) == 1 and "raw_response_event" in events and streamed.final_output is not None


# ---- litellm ----


def test_litellm(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    where: dict[str, Any] = {"api_base": server_url, "api_key": "none", "max_tokens": 100, "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(model=f"openai/{MODEL}", messages=messages, **where)
    assert answer.choices[0].message.content and answer.usage.total_tokens > 0
    schema = City.model_json_schema()
    tools = [{"type": "function", "function": {"name": "describe", "parameters": schema}}]
    chunks = list(
        litellm.completion(
            model=f"openai/{MODEL}",
            messages=messages,
            tools=tools,
            tool_choice={"type": "function", "function": {"name": "describe"}},
            stream=True,
            **where,
        )
    )
    whole = litellm.stream_chunk_builder(chunks, messages=messages)
    call = whole.choices[0].message.tool_calls[0]
    check_city(City.model_validate_json(call.function.arguments))
    text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Once upon", **where)
    assert text.choices[0].text
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model=f"openai/{MODEL}", messages=messages, temperature=-1, **where)


# ---- llm ----


def test_llm(server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [{"model_id": "smol", "model_name": MODEL, "api_base": server_url, "supports_schema": True}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(settings))  # JSON is YAML
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    import llm

    model = llm.get_model("smol")
    assert model.prompt("Say hello.", max_tokens=10).text()
    assert "".join(model.prompt("Say hello.", max_tokens=10, stream=True))
    city = model.prompt("Describe Paris.", schema=City, max_tokens=200, stream=False).text()
    check_city(City.model_validate_json(city))
