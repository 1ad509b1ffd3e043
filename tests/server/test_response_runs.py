"""Responses in the background, what is listed of stored ones, and conversations that are too long."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseItemList

from tests.patience import until
from tests.server.client import client_of, error_of, post
from tests.server.fake_engine import FakeEngine, serving
from tests.server.test_responses import respond
from tinyvllm.config import SamplingParams
from tinyvllm.engine.output import Delta
from tinyvllm.errors import RequestError
from tinyvllm.server.control import Message
from tinyvllm.server.generation import Item
from tinyvllm.server.message import OutputFormat
from tinyvllm.server.openai.protocol.responses import ResponsesRequest
from tinyvllm.server.openai.response_events import ResponseWriter
from tinyvllm.server.openai.response_prompt import _units
from tinyvllm.server.openai.response_runs import BackgroundRun
from tinyvllm.server.openai.response_store import ResponseStore
from tinyvllm.server.openai.responses import _make_answer
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.state import ServerState

# ---- In the background ----


async def wait_for(client: Any, response_id: str, *statuses: str) -> dict[str, Any]:
    while (answer := (await client.get(f"/v1/responses/{response_id}")).json())["status"] not in statuses:
        await asyncio.sleep(0.01)
    return dict(answer)


def events_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def test_a_response_in_the_background_is_polled_and_read_from_any_event_on() -> None:
    engine = FakeEngine(reply="Hello")
    async with client_of(engine) as client:
        begun = (await client.post("/v1/responses", json={"input": "a", "background": True})).json()
        assert begun["status"] in ("queued", "in_progress") and begun["background"]
        answer = await wait_for(client, begun["id"], "completed")
        assert answer["output"][0]["content"][0]["text"] == "Hello" and answer["usage"]["output_tokens"] == 5
        path = f"/v1/responses/{begun['id']}"
        events = events_in((await client.get(path, params={"stream": True})).text)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"] for event in events]
        assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
        assert kinds.count("response.output_text.delta") == 5 and events[-1]["response"] == answer
        rest = events_in((await client.get(path, params={"stream": True, "starting_after": 6})).text)
        assert rest == events[7:]
        assert (await client.post(f"{path}/cancel")).json() == answer, "a complete response stays as it is"
        streamed = await client.post("/v1/responses", json={"input": "a", "background": True, "stream": True})
        assert [event["type"] for event in events_in(streamed.text)] == kinds
        continued = await client.post("/v1/responses", json={"input": "b", "previous_response_id": begun["id"]})
        assert continued.status_code == 200 and not engine.running


async def test_a_response_in_the_background_is_cancelled() -> None:
    engine = FakeEngine(reply="Hello", hang_after=3)
    async with client_of(engine) as client:
        begun = (await client.post("/v1/responses", json={"input": "a", "background": True})).json()
        path = f"/v1/responses/{begun['id']}"
        await wait_for(client, begun["id"], "in_progress")
        for _ in range(50):
            await asyncio.sleep(0)  # the reply's first three characters
        early = await client.post("/v1/responses", json={"input": "b", "previous_response_id": begun["id"]})
        assert error_of(early)["param"] == "previous_response_id"
        cancelled = (await client.post(f"{path}/cancel")).json()
        assert cancelled["status"] == "cancelled" and cancelled["output"][0]["status"] == "incomplete"
        assert cancelled["output"][0]["content"][0]["text"] == "Hel"
        assert events_in((await client.get(path, params={"stream": True})).text)[-1]["type"] == "response.cancelled"
        deleted = (await client.post("/v1/responses", json={"input": "a", "background": True})).json()
        await client.delete(f"/v1/responses/{deleted['id']}")
        await until(lambda: len(engine.closed) == 2)
        state = client._transport.app.state.server  # type: ignore[attr-defined]
        assert not engine.running
        assert state.admission.num_seqs == state.admission.num_waiting_tokens == state.drain.num_requests == 0


async def test_a_response_in_the_background_fails_with_its_reason() -> None:
    async with client_of(FakeEngine(fail_after=3)) as client:
        begun = (await client.post("/v1/responses", json={"input": "a", "background": True})).json()
        answer = await wait_for(client, begun["id"], "failed")
        assert "not finite" in answer["error"]["message"] and answer["error"]["code"] == "server_error"
        events = events_in((await client.get(f"/v1/responses/{begun['id']}", params={"stream": True})).text)
        assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]
    refused = await post(
        FakeEngine(refuse=RequestError("no", param="x")), "/v1/responses", {"input": "a", "background": True}
    )
    assert refused.status_code == 400 and error_of(refused)["param"] == "x"


async def test_only_responses_in_the_background_are_cancelled_or_streamed_again() -> None:
    async with client_of(FakeEngine()) as client:
        path = f"/v1/responses/{(await client.post('/v1/responses', json={'input': 'a'})).json()['id']}"
        assert error_of(await client.post(f"{path}/cancel"))["param"] == "response_id"
        assert error_of(await client.get(path, params={"stream": True}))["param"] == "stream"
        assert error_of(await client.get(path, params={"starting_after": "x"}))["param"] == "starting_after"
        assert (await client.post("/v1/responses/resp_x/cancel")).status_code == 404


def test_the_client_resumes_and_cancels() -> None:
    engine = FakeEngine(reply="Hello")
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        first: list[Any] = []
        for event in client.responses.create(model="tiny", input="hi", background=True, stream=True):
            first.append(event)
            if event.sequence_number == 4:
                break
        response_id = first[0].response.id
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=4))
        assert rest[0].sequence_number == 5 and rest[-1].type == "response.completed"
        assert client.responses.retrieve(response_id).output_text == "Hello"
        engine.hang_after = 1
        running = client.responses.create(model="tiny", input="hi", background=True)
        assert client.responses.cancel(running.id).status == "cancelled"


async def test_another_front_end_polls_cancels_and_streams() -> None:
    """Two stores, of which one asks the other, as front-ends do through their supervisor."""
    state = ServerState(FakeEngine(), ServerSettings())  # type: ignore[arg-type]
    one = ResponseStore()

    async def ask(question: str, about: str = "") -> dict[str, Message]:
        return {"one": json.loads(json.dumps(one.answer(question, about)))}

    other = ResponseStore(ask_others=ask)
    body = ResponsesRequest.model_validate({"input": "a", "background": True})
    answer = _make_answer(state, body, SamplingParams())
    run = BackgroundRun(
        ResponseWriter(answer, OutputFormat()), one, ({"id": "msg_1", "type": "message", "content": "a"},)
    )
    run._append(run._writer.begin(is_queued=True))
    one.add(run._stored)
    run.take(
        Item(
            0,
            0,
            Delta(index=0, text="Hel", token_ids=(1,), num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=1),
        )
    )
    found = await other.get(answer.id, "response_id")
    assert found.answer.status == "in_progress" and found.run is None
    frames = other.follow(found, 0)
    assert b"response.queued" in await anext(frames)
    assert (await other.cancel(answer.id, "response_id")).answer.status == "cancelled"
    rest = [frame async for frame in frames]
    assert b"Hel" in b"".join(rest) and b"response.cancelled" in rest[-1]
    assert await other.get_item("msg_1", "input.0.id") == {"id": "msg_1", "type": "message", "content": "a"}


# ---- Listed items ----


async def test_input_items_are_listed_in_pages() -> None:
    async with client_of(FakeEngine(reply="Hi.")) as client:
        first = (await client.post("/v1/responses", json={"input": "a"})).json()
        items = [
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "r"},
            {"role": "assistant", "content": "b"},
        ]
        body = {"input": items, "previous_response_id": first["id"]}
        path = f"/v1/responses/{(await client.post('/v1/responses', json=body)).json()['id']}/input_items"
        whole = (await client.get(path, params={"order": "asc"})).json()
        kinds = [item["type"] for item in whole["data"]]
        assert kinds == ["message", "message", "function_call", "function_call_output", "message"]
        assert whole["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
        ResponseItemList.model_validate(whole)
        assert whole["data"][1] == first["output"][0] and whole["data"][4]["content"][0]["type"] == "output_text"
        ids = [item["id"] for item in whole["data"]]
        assert len(set(ids)) == 5 and (whole["first_id"], whole["last_id"]) == (ids[0], ids[-1])
        page = (await client.get(path, params={"limit": 2, "after": ids[3]})).json()
        assert [item["id"] for item in page["data"]] == [ids[2], ids[1]] and page["has_more"]
        assert not (await client.get(path, params={"after": ids[1]})).json()["has_more"]
        assert error_of(await client.get(path, params={"after": "x"}))["param"] == "after"
        assert error_of(await client.get(path, params={"limit": 0}))["param"] == "limit"
        count = (await client.post("/v1/responses/input_tokens", json={"input": "a"})).json()
        assert count == {"object": "response.input_tokens", "input_tokens": len("<user>a\n<assistant>")}


# ---- Truncation ----


def test_the_oldest_turns_are_removed_first_and_then_the_oldest_calls() -> None:
    roles = ["system", "user", "assistant", "tool", "user", "system", "assistant", "tool", "tool", "assistant", "tool"]
    assert _units([{"role": role} for role in roles]) == [[1, 2, 3], [6, 7, 8]]
    assert _units([{"role": "user"}]) == [] and _units([]) == []


TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "S"},
    *[{"role": role, "content": f"{number}" * 20} for number in range(5) for role in ("user", "assistant")],
    {"role": "user", "content": "last"},
]


async def test_a_conversation_that_is_too_long_loses_its_oldest_turns() -> None:
    engine = FakeEngine(max_model_len=210, reply="x")
    answer = await respond(engine, input=TURNS, truncation="auto", instructions="Be brief.", max_output_tokens=10)
    assert answer["truncation"] == "auto"
    prompt = engine.calls[-1].prompt
    assert re.findall("<.*>(.+)", prompt) == ["Be brief.", "S", "3" * 20, "3" * 20, "4" * 20, "4" * 20, "last"]
    await respond(engine, input=TURNS, truncation="auto", instructions="Be brief.")
    assert len(prompt) <= 200 and re.findall("<.*>(.+)", engine.calls[-1].prompt) == [
        "Be brief.", "S", "4" * 20, "4" * 20, "last"
    ], "a quarter of the context is left for the output"  # fmt: skip
    await respond(engine, input="hi", truncation="auto")
    assert engine.calls[-1].prompt == "<user>hi\n<assistant>"
    items = (await post(engine, "/v1/responses", {"input": TURNS, "truncation": "disabled"})).json()
    assert items["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", [{"input": "x" * 200}, {"input": TURNS, "instructions": "y" * 200}])
async def test_what_cannot_be_truncated_is_refused(body: dict[str, Any]) -> None:
    response = await post(FakeEngine(max_model_len=160), "/v1/responses", {**body, "truncation": "auto"})
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
