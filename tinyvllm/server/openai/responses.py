"""/v1/responses: responses, which the server may store for later requests to continue."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from tinyvllm.config import SamplingParams
from tinyvllm.errors import RequestError
from tinyvllm.server.answers import collect
from tinyvllm.server.events import EVENT_STREAM
from tinyvllm.server.generation import Job, PromptCall
from tinyvllm.server.intake import (
    ERRORS,
    answering_model,
    check_request,
    event_stream,
    json_response,
    openapi_event_stream,
)
from tinyvllm.server.openai.protocol.response_items import InputItem, listed
from tinyvllm.server.openai.protocol.responses import (
    DeletedResponse,
    InputTokens,
    ItemList,
    ReasoningSettings,
    ResponseAnswer,
    ResponsesRequest,
    TextFormat,
    TextSettings,
)
from tinyvllm.server.openai.protocol.tools import shown_choice
from tinyvllm.server.openai.response_events import ResponseWriter, new_item_id
from tinyvllm.server.openai.response_prompt import read_prompt
from tinyvllm.server.openai.response_runs import BackgroundRun, ResponseEvents
from tinyvllm.server.openai.response_store import Item, ResponseStore
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import STREAM_HEADERS, until_disconnect

router = APIRouter(responses=ERRORS)


def store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


@router.post("/v1/responses", response_model=ResponseAnswer, responses=openapi_event_stream(ResponseAnswer))
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _respond(state, store_of(request), body))


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: ResponsesRequest, request: Request) -> InputTokens:
    """The number of tokens that a request's prompt would have."""
    state, store = state_of(request), store_of(request)
    check_request(state, body)
    prompt, _ = await read_prompt(state, body, await _conversation(store, body))
    return InputTokens(input_tokens=len(prompt.ids))


@router.get("/v1/responses/{response_id}", response_model=ResponseAnswer)
async def retrieve_response(
    response_id: str,
    request: Request,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """A stored response or, with `stream`, the events of a background one."""
    store = store_of(request)
    stored = await store.get(response_id, "response_id")
    if not stream:
        return json_response(stored.answer)
    if not stored.answer.background:
        raise RequestError(
            "only the events of background responses are kept: leave stream out, or create the response with "
            "background=true",
            param="stream",
        )
    return StreamingResponse(store.follow(stored, starting_after), media_type=EVENT_STREAM, headers=STREAM_HEADERS)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> DeletedResponse:
    await store_of(request).remove(response_id, "response_id")
    return DeletedResponse(id=response_id)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> ResponseAnswer:
    """End a background response. A complete one is unchanged."""
    store = store_of(request)
    if not (await store.get(response_id, "response_id")).answer.background:
        raise RequestError(
            "only background responses can be cancelled: for others, close the connection",
            param="response_id",
        )
    return (await store.cancel(response_id, "response_id")).answer


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> ItemList:
    """The items that a stored response answers, including those of the responses that it continues."""
    items = list((await store_of(request).get(response_id, "response_id")).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestError(f"after names the item {after!a:.80}, which the response does not have", param="after")
        items = items[ids.index(after) + 1 :]
    page = [listed(item) for item in items[:limit]]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > limit,
    )


async def _respond(state: ServerState, store: ResponseStore, body: ResponsesRequest) -> Response:
    arrival_s = time.perf_counter()
    check_request(state, body)
    items = await _conversation(store, body)
    prompt, params = await read_prompt(state, body, items)
    answer = _make_answer(state, body, params)
    job = Job(
        [PromptCall(prompt.ids, params, request_id=answer.id)],
        n=1,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        beams=body.beams(),
        cache_salt=body.cache_salt,
    )
    writer = ResponseWriter(
        answer,
        prompt.format,
        body.toolbox,
        summarizes=body.summarizes,
        seals_reasoning=body.seals_reasoning,
    )
    if body.background:
        run = BackgroundRun(writer, store, items)
        await run.start(state, job)
        if body.stream:
            return StreamingResponse(run.follow(-1), media_type=EVENT_STREAM, headers=STREAM_HEADERS)
        return json_response(answer)
    events = ResponseEvents(writer, store, items)
    if body.stream:
        return await event_stream(state, job, events)
    await collect(state, job, events.grow)
    return json_response(answer)


async def _conversation(store: ResponseStore, body: ResponsesRequest) -> tuple[Item, ...]:
    """The items of the whole conversation, the request's own last."""
    own = await _resolve(store, body.input)
    if body.previous_response_id is None:
        return tuple(own)
    earlier = await store.get(body.previous_response_id, "previous_response_id")
    if earlier.answer.status in ("queued", "in_progress"):
        raise RequestError(
            f"the response {body.previous_response_id!a:.80} is {earlier.answer.status}: wait until it is complete",
            param="previous_response_id",
        )
    return (*earlier.conversation(), *own)


async def _resolve(store: ResponseStore, given: list[InputItem]) -> list[Item]:
    """The items of a request, each with an id, and references replaced by what they refer to."""
    items: list[Item] = []
    for position, item in enumerate(given):
        if item.type == "item_reference":
            items.append(await store.get_item(item.id or "", f"input.{position}.id"))
        else:
            items.append({"id": new_item_id(item.type), **item.model_dump(exclude_none=True)})
    return items


def _make_answer(state: ServerState, body: ResponsesRequest, params: SamplingParams) -> ResponseAnswer:
    """The answer, still without output."""
    text = body.text or TextSettings()
    return ResponseAnswer(
        id=f"resp_{uuid.uuid4().hex}",  # never the client's choice: whoever knows it may read the conversation
        created_at=int(time.time()),
        status="in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=answering_model(state),
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
        truncation=body.truncation or "disabled",
        user=(body.model_extra or {}).get("user"),
        max_tool_calls=body.max_tool_calls,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
        service_tier=None if body.service_tier is None else "default",
        metadata=body.metadata or {},
    )
