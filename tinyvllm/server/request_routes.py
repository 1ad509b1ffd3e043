"""GET /requests: the latest or slowest requests, and one request's waterfall. `tinyvllm why` shows them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from tinyvllm.server.control import Message
from tinyvllm.server.questions import GET_REQUEST, LIST_REQUESTS
from tinyvllm.server.request_log import MAX_LISTED, RequestList, RequestLog, RequestWaterfall, merge
from tinyvllm.server.state import state_of

router = APIRouter()


@router.get("/requests", response_model=RequestList)
async def list_requests(
    request: Request,
    last: int | None = Query(None, ge=1, le=MAX_LISTED),
    slowest: int | None = Query(None, ge=1, le=MAX_LISTED),
) -> Response:
    """The latest requests that reached the engine (by default 20), or the slowest of those that are kept."""
    state = state_of(request)
    num, is_slowest = selection(last, slowest)
    others = await state.front_ends.ask_others(LIST_REQUESTS, about=f"{num} {is_slowest:d}")
    lists = [
        state.requests.select(num, slowest=is_slowest),
        *(one["requests"] for one in others.values() if "requests" in one),
    ]
    return json_answer({"requests": merge(lists, num, slowest=is_slowest)})


@router.get("/requests/{request_id:path}", response_model=RequestWaterfall)
async def get_request(request: Request, request_id: str) -> Response:
    """Where the time of one request went, by its x-request-id or by the id of its answer. 404 if it is not kept: it is
    still running, or others have taken its place."""
    state = state_of(request)
    found = answer(state.requests, GET_REQUEST, request_id, state.front_ends.name)
    if not found:
        others = await state.front_ends.ask_others(GET_REQUEST, about=request_id)
        found = next((one for one in others.values() if "total_ms" in one), {})
    if not found:
        raise unknown_request(request_id)
    return json_answer(found)


def selection(last: int | None, slowest: int | None) -> tuple[int, bool]:
    """How many requests to list, and whether the slowest."""
    return (slowest, True) if slowest is not None else (20 if last is None else last, False)


def unknown_request(request_id: str) -> HTTPException:
    return HTTPException(
        404,
        f"no answered request {request_id[:130]!a} is kept: it is still running, or was refused before it reached the "
        "engine, or later requests have taken its place. GET /requests lists those that are kept",
    )


def answer(log: RequestLog, question: str, about: str, process: str | None) -> Message:
    """One process's answer to GET_REQUEST or LIST_REQUESTS; {} if it does not know the request."""
    if question == LIST_REQUESTS:
        num, is_slowest = about.split()
        return {"requests": log.select(int(num), slowest=is_slowest == "1")}
    record = log.find(about)
    return {} if record is None else record.waterfall(process)


def json_answer(answer: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
