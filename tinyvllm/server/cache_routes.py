"""The prefix cache: how much of a prompt is cached, and forgetting all of it."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from tinyvllm.server.context import current
from tinyvllm.server.conversation import make_prompt
from tinyvllm.server.intake import ERRORS, check_ids, require_model
from tinyvllm.server.openai.chat import conversation_of
from tinyvllm.server.openai.protocol.generation import refuse_extras
from tinyvllm.server.openai.protocol.tokens import TokenizeRequest
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.text_limits import fit_for_counting
from tinyvllm.server.workers import on_thread

log = logging.getLogger(__name__)

router = APIRouter(responses=ERRORS)


class LookupRequest(TokenizeRequest):
    """POST /prefix_cache: a prompt, as text or token ids, or messages."""

    prompt: str | list[int] | None = None  # type: ignore[assignment]
    cache_salt: Annotated[str | None, Field(min_length=1)] = None


class EngineLookup(BaseModel):
    """Tokens of the prompt that an engine would not compute: found in the pool alone, with the tier in host memory, and
    with the one on disk."""

    engine: int
    device: int
    host: int
    disk: int


class Lookup(BaseModel):
    prompt_tokens: int
    cached_tokens: int  # of the engine that has the most, in all tiers
    engines: list[EngineLookup]


@router.post("/prefix_cache")
async def look_up(body: LookupRequest, request: Request) -> Lookup:
    """How many tokens of a prompt are cached, and where. Computes nothing, and keeps nothing longer."""
    state = state_of(request)
    state.require_engine()
    require_model(state, body.model)
    body.check()
    refuse_extras(body.model_extra or {})
    ids = await on_thread(_read_prompt, state, body)
    chosen = current().adapter
    adapter = "" if chosen is None else chosen.key
    found = await state.engine.look_up_prefix(ids, cache_salt=body.cache_salt, adapter=adapter)
    engines = [EngineLookup(engine=number, device=a, host=b, disk=c) for number, (a, b, c) in enumerate(found)]
    return Lookup(prompt_tokens=len(ids), cached_tokens=max(one.disk for one in engines), engines=engines)


def _read_prompt(state: ServerState, body: LookupRequest) -> list[int]:
    """The prompt's token ids. Runs on a worker thread."""
    if body.prompt is None:
        chat = body.as_chat()
        chat.refuse_unsupported()
        return make_prompt(conversation_of(chat), state.engine, fit_for_counting(state, param="messages")).ids
    ids = body.prompt
    if isinstance(ids, str):
        text = fit_for_counting(state, param="prompt")(ids)
        ids = state.engine.tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)
    check_ids(state, ids, None, param="prompt")
    return ids


@router.post("/reset_prefix_cache", response_class=Response)
async def reset_prefix_cache(request: Request, reset_external: bool = Query(False)) -> Response:
    """Forget all cached prefixes; with reset_external also the copies in host memory, and the files of this model on
    disk. vLLM's route.

    Its reset_running_requests changes nothing here: running requests keep their blocks, which nobody else finds."""
    state = state_of(request)
    state.require_engine()
    await state.engine.reset_prefix_cache(reset_external=reset_external)
    log.info("the prefix cache is reset%s", ", and the tiers in host memory and on disk" if reset_external else "")
    return Response()
