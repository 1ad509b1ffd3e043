"""/v1/responses: responses, which the server may store for later requests to continue."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.server.answers import collect
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.events import ServerSentEvents
from tinyvllm.server.failures import failure_of
from tinyvllm.server.generation import Item as Output
from tinyvllm.server.generation import Job, PromptCall
from tinyvllm.server.intake import ERRORS, check_ids, check_request, event_stream, json_response, openapi_event_stream
from tinyvllm.server.openai.protocol.common import effort_arguments
from tinyvllm.server.openai.protocol.response_items import InputItem, messages_of
from tinyvllm.server.openai.protocol.responses import (
    DeletedResponse,
    ReasoningSettings,
    ResponseAnswer,
    ResponsesRequest,
    TextFormat,
    TextSettings,
)
from tinyvllm.server.openai.protocol.tools import shown_choice
from tinyvllm.server.openai.response_events import Event, ResponseWriter, frame_event, new_item_id
from tinyvllm.server.openai.response_store import Item, ResponseStore, StoredResponse
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect

router = APIRouter(responses=ERRORS)


def store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


@router.post("/v1/responses", response_model=ResponseAnswer, responses=openapi_event_stream(ResponseAnswer))
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _respond(state, store_of(request), body))


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, request: Request) -> ResponseAnswer:
    """A response that is still stored."""
    return (await store_of(request).get(response_id, "response_id")).answer


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> DeletedResponse:
    await store_of(request).remove(response_id, "response_id")
    return DeletedResponse(id=response_id)


async def _respond(state: ServerState, store: ResponseStore, body: ResponsesRequest) -> Response:
    arrival_s = time.perf_counter()
    check_request(state, body)
    earlier: tuple[Item, ...] = ()
    if body.previous_response_id is not None:
        earlier = (await store.get(body.previous_response_id, "previous_response_id")).conversation()
    items = (*earlier, *await _resolve(store, body.input))
    prompt, params = await asyncio.to_thread(_read, state, body, items)
    answer = _make_answer(state, body, params)
    job = Job(
        [PromptCall(prompt.ids, params, request_id=answer.id)],
        n=1,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        beams=body.beams(),
    )
    writer = ResponseWriter(answer, prompt.format, body.toolbox, seals_reasoning=body.seals_reasoning)
    events = _ResponseEvents(writer, store, items)
    if body.stream:
        return await event_stream(state, job, events)
    await collect(state, job, events.grow)
    return json_response(answer)


async def _resolve(store: ResponseStore, given: list[InputItem]) -> list[Item]:
    """The items of a request, each with an id, and references replaced by what they refer to."""
    items: list[Item] = []
    for position, item in enumerate(given):
        if item.type == "item_reference":
            items.append(await store.get_item(item.id or "", f"input.{position}.id"))
        else:
            items.append({"id": new_item_id(item.type), **item.model_dump(exclude_none=True)})
    return items


class _ResponseEvents(ServerSentEvents):
    """The events of one response, which is stored once it is complete, unless the request says store=false."""

    def __init__(self, writer: ResponseWriter, store: ResponseStore, items: tuple[Item, ...]) -> None:
        self._writer = writer
        self._store = store
        self._items = items  # of the conversation that is answered

    def begin(self) -> bytes:
        return b"".join(map(frame_event, self._writer.begin()))

    def take(self, item: Output) -> bytes:
        return self._writer.frame_text(item.delta) or b"".join(map(frame_event, self.grow(item)))

    def end(self) -> bytes:
        return b""

    def fail(self, error: BaseException) -> bytes:
        return frame_event(self._writer.failure(failure_of(error).detail().model_dump()))

    def grow(self, item: Output) -> list[Event]:
        """Add an item to the answer. Returns its events.

        A complete answer is stored before its last event is sent, because the client may continue it at once.
        """
        events = list(self._writer.push(item.delta))
        if item.delta.finish_reason is not None:
            self._keep()
        return events

    def _keep(self) -> None:
        answer = self._writer.answer
        if answer.store:
            self._store.add(StoredResponse(answer, self._items))


def _read(state: ServerState, body: ResponsesRequest, items: tuple[Item, ...]) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    first = len(body.input) - len(items)
    messages = messages_of([InputItem.model_validate(item) for item in items], first)
    prompt = make_prompt(_conversation_of(body, messages), state.engine)
    check_ids(state, prompt.ids, body.max_output_tokens, param="input")
    params = body.make_params(
        state.engine.generation_defaults,
        max_tokens=body.max_output_tokens,
        logprobs=body.num_logprobs,
        grammar=prompt.grammar,
        special_tokens=prompt.special_tokens,
    )
    return prompt, params


def _conversation_of(body: ResponsesRequest, messages: list[dict[str, Any]]) -> Conversation:
    choice = body.choice()
    effort = effort_arguments(body.reasoning.effort if body.reasoning is not None else None)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Conversation(
        messages=[*instructions, *messages],
        is_parallel=body.parallel_tool_calls is not False and choice.named_tool is None,
        grammar=body.grammar(),
        template_arguments=effort | (body.chat_template_kwargs or {}),
        is_chat=False,
        **choice.conversation(),
    )


def _make_answer(state: ServerState, body: ResponsesRequest, params: SamplingParams) -> ResponseAnswer:
    """The answer, still without output."""
    text = body.text or TextSettings()
    return ResponseAnswer(
        id=f"resp_{uuid.uuid4().hex}",  # never the client's choice: whoever knows it may read the conversation
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=state.engine.served_model_name,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=body.reasoning or ReasoningSettings(),
        store=body.store is not False,
        temperature=params.temperature,
        text=text if text.format is not None else TextSettings(format=TextFormat(type="text")),
        tool_choice=shown_choice(body.tool_choice),
        tools=[tool.shown() for tool in body.tools or []],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        user=(body.model_extra or {}).get("user"),
        metadata=body.metadata or {},
    )
