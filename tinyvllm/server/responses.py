"""/v1/responses: responses, which the server may store for later requests to continue."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.failures import failure_of
from tinyvllm.server.intake import ERRORS, check_ids, check_request, json_response, openapi_event_stream
from tinyvllm.server.protocol.responses import (
    DeletedResponse,
    InputItem,
    ReasoningSettings,
    ResponseAnswer,
    ResponsesRequest,
    TextFormat,
    TextSettings,
    messages_of,
)
from tinyvllm.server.protocol.tools import NamedChoice
from tinyvllm.server.response_events import ResponseWriter, frame_event
from tinyvllm.server.response_store import ResponseStore, StoredResponse
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import EventStream, Item, first_choices, merge, until_disconnect, wait_for_first

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
    return store_of(request).get(response_id, "response_id").answer


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> DeletedResponse:
    store_of(request).remove(response_id, "response_id")
    return DeletedResponse(id=response_id)


async def _respond(state: ServerState, store: ResponseStore, body: ResponsesRequest) -> Response:
    arrival_s = time.perf_counter()
    check_request(state, body)
    earlier: tuple[Mapping[str, Any], ...] = ()
    if body.previous_response_id is not None:
        earlier = store.get(body.previous_response_id, "previous_response_id").messages
    messages = (*earlier, *body.messages())
    prompt, params = await asyncio.to_thread(_read, state, body, messages)
    answer = _make_answer(state, body, params)
    deltas = state.generate(
        prompt.ids,
        params,
        request_id=answer.id,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        beams=body.beams(),
    )
    items = merge([first_choices(deltas, 1)], 1)
    stream = _ResponseStream(ResponseWriter(answer, prompt.format), store, messages)
    if not body.stream:
        async for _ in stream.frames(items):
            pass
        return json_response(answer)
    items = await wait_for_first(items)
    return EventStream(_errors_as_events(stream, stream.frames(items)), items)


class _ResponseStream:
    """Streams one response, and stores it once it is complete, unless the request says store=false."""

    def __init__(self, writer: ResponseWriter, store: ResponseStore, messages: tuple[Mapping[str, Any], ...]) -> None:
        self.writer = writer
        self._store = store
        self._messages = messages

    async def frames(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[str, None]:
        writer = self.writer
        for event in writer.begin():
            yield frame_event(event)
        async with contextlib.aclosing(items):
            async for item in items:
                for event in writer.push(item.delta):
                    if item.delta.finish_reason is not None:
                        self._keep()
                    yield frame_event(event)

    def _keep(self) -> None:
        """Store the response if it is complete. Called before the last event, because a client may continue at once."""
        answer = self.writer.answer
        if answer.store and answer.status != "in_progress":
            said = messages_of([InputItem.model_validate(item.model_dump()) for item in answer.output])
            self._store.add(StoredResponse(answer, (*self._messages, *said)))


async def _errors_as_events(stream: _ResponseStream, frames: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`frames`. An error becomes the last event, because status 200 has already been sent."""
    async with contextlib.aclosing(frames):
        try:
            async for text in frames:
                yield text
        except Exception as error:  # any error: a stream that just ended would look complete
            yield frame_event(stream.writer.failure(failure_of(error).detail().model_dump()))


def _read(
    state: ServerState, body: ResponsesRequest, messages: tuple[Mapping[str, Any], ...]
) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    prompt = make_prompt(_conversation_of(body, messages), state.engine)
    check_ids(state, prompt.ids, body.max_output_tokens, param="input")
    params = body.make_params(
        state.engine.generation_defaults,
        max_tokens=body.max_output_tokens,
        logprobs=body.num_logprobs,
        grammar=prompt.grammar,
        keeps_special_tokens=prompt.keeps_special_tokens,
    )
    return prompt, params


def _conversation_of(body: ResponsesRequest, messages: tuple[Mapping[str, Any], ...]) -> Conversation:
    choice: dict[str, Any] = {}
    if isinstance(body.tool_choice, NamedChoice):
        choice = {"tool_choice": "required", "named_tool": body.tool_choice.name}
    elif body.tool_choice is not None:
        choice = {"tool_choice": body.tool_choice}
    tools = body.tools or []
    effort = (
        {} if body.reasoning is None or body.reasoning.effort is None else {"reasoning_effort": body.reasoning.effort}
    )
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Conversation(
        messages=[*instructions, *messages],
        tools=[tool.as_tool(f"tools.{position}") for position, tool in enumerate(tools)],
        tools_for_template=[tool.for_template() for tool in tools],
        is_parallel=body.parallel_tool_calls is not False and "named_tool" not in choice,
        grammar=body.grammar(),
        template_arguments=effort | (body.chat_template_kwargs or {}),
        **choice,
    )


def _make_answer(state: ServerState, body: ResponsesRequest, params: SamplingParams) -> ResponseAnswer:
    """The answer, still without output."""
    choice = body.tool_choice
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
        tool_choice={"type": "function", "name": choice.name} if isinstance(choice, NamedChoice) else choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        user=(body.model_extra or {}).get("user"),
        metadata=body.metadata or {},
    )
