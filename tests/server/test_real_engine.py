"""The server around a real AsyncEngine with a fake device: text, blocks and metrics end to end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.engine.fakes import say
from tests.patience import PATIENCE_S, wait_for
from tests.server.device import ANSWER, Device
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.scheduling.plan import StepPlan

USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_says_what_the_model_says_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=USER, temperature=0)
    assert whole.choices[0].message.content == ANSWER and whole.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(model="tiny", messages=USER, temperature=0, stream=True)
    contents = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(contents) == ANSWER and "\ufffd" not in "".join(contents)


def test_second_question_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt="a long enough prompt", max_tokens=3).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0 and cached[1] == 16  # of 20 tokens: full blocks of 4, without the last, which is recomputed


def test_stop_seed_and_logprobs(client: openai.OpenAI, device: Device) -> None:
    stopped = client.completions.create(model="tiny", prompt="x", max_tokens=40, stop="世")
    assert stopped.choices[0].text == "Grüße, " and stopped.choices[0].finish_reason == "stop"
    device.generate_endlessly(step_s=0)
    texts = [client.completions.create(model="tiny", prompt="x", seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 16
    answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=5, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_many_clients_are_answered_at_once(client: openai.OpenAI, device: Device) -> None:
    def ask(number: int) -> str:
        answer = client.completions.create(model="tiny", prompt=f"number {number}", max_tokens=40, n=1 + number % 2)
        return "|".join(choice.text for choice in answer.choices)

    device.runner.choose = say(ANSWER, ANSWER)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers == [ANSWER, f"{ANSWER}|{ANSWER}"] * 12
    device.wait_until_all_blocks_are_free()


def hold_decodes_of_4(device: Device, until: threading.Event) -> None:
    """Hold steps in which four requests are past their prompts."""
    pace = device.runner.before_step

    def before_step(plan: StepPlan) -> None:
        if len(plan.entries) == 4 and all(entry.start for entry in plan.entries):
            until.wait(PATIENCE_S)
        pace(plan)

    device.runner.before_step = before_step


def test_clients_that_leave_free_their_blocks(url: str, device: Device) -> None:
    device.generate_endlessly(step_s=0.1)  # until all run
    have_left = threading.Event()
    hold_decodes_of_4(device, have_left)
    with contextlib.ExitStack() as streams:
        for number in range(4):
            body = {"prompt": f"{number} is a prompt", "max_tokens": 200, "stream": True}
            response = streams.enter_context(httpx.stream("POST", url + "/v1/completions", json=body))
            chunks: Any = response.iter_text()  # a generator
            streams.enter_context(contextlib.closing(chunks))
            next(chunks)
        wait_for(lambda: device.stats.num_running == 4)
        assert device.stats.num_free_blocks < 63
    have_left.set()
    device.wait_until_all_blocks_are_free()
    assert 'finished_reason="abort",model_name="tiny"} 4.0' in httpx.get(url + "/metrics").text


def test_client_that_leaves_the_queue_is_never_run(url: str, device: Device) -> None:
    device.generate_endlessly(step_s=0)
    has_left = threading.Event()
    hold_decodes_of_4(device, has_left)
    body = {"prompt": "x", "max_tokens": 50, "n": 4}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, url + "/v1/completions", json=body)
        wait_for(lambda: device.stats.num_running == 4)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/completions", json={"prompt": "late"}, timeout=httpx.Timeout(PATIENCE_S, read=0.2))
        has_left.set()
        assert whole.result().status_code == 200
    device.wait_until_all_blocks_are_free()
    assert max(len(plan.entries) for plan in device.runner.plans) == 4
    assert {entry.request.num_prompt_tokens for plan in device.runner.plans for entry in plan.entries} == {1}


def test_a_failed_step_is_an_error_and_the_server_continues(client: openai.OpenAI, device: Device) -> None:
    def fail(plan: Any) -> None:
        device.runner.before_step = lambda plan: None
        raise RuntimeError("the device is on fire")

    device.runner.before_step = fail
    with pytest.raises(openai.InternalServerError, match="on fire"):
        client.chat.completions.create(model="tiny", messages=USER)
    assert client.chat.completions.create(model="tiny", messages=USER).choices[0].message.content == ANSWER


def test_refusals_carry_their_fields(client: openai.OpenAI) -> None:
    for arguments, param in (
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": "x" * 200, "max_tokens": 100}, "max_tokens"),
        ({"prompt": [9999]}, "prompt"),
        ({"prompt": "x", "extra_body": {"stop_token_ids": [9999]}}, "stop_token_ids"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", **arguments)
        assert refused.value.param == param


def test_metrics_show_what_was_done(url: str, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="abcdefgh", max_tokens=5)
    text = httpx.get(url + "/metrics").text
    label = 'engine="0",model_name="tiny"'
    assert f"vllm:kv_cache_usage_perc{{{label}}} 0.0" in text
    assert f"vllm:prompt_tokens_total{{{label}}} 8.0" in text
    assert f"vllm:generation_tokens_total{{{label}}} 5.0" in text
    assert f"vllm:prefix_cache_queries_total{{{label}}} 8.0" in text
    assert f"tinyvllm:graph_captures_total{{{label}}} 3.0" in text


def test_stopping_engine_ends_its_streams(url: str, device: Device, engine: AsyncEngine) -> None:
    device.generate_endlessly(step_s=0.02)
    body = {"prompt": "x", "max_tokens": 200, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body) as response:
        chunks = response.iter_text()
        text = next(chunks)
        asyncio.run(engine.shutdown())
        text += "".join(chunks)
    assert "request_aborted" in text and text.endswith("data: [DONE]\n\n")
    assert httpx.get(url + "/health").status_code == 503
