"""The handlers: what each route reads, asks of the engine and answers. Errors are raised; failures.py answers them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from tinyvllm.errors import ContextLengthError, RequestError
from tinyvllm.server.answers import Heading, chat_answer, chat_frames, completion_answer, completion_frames
from tinyvllm.server.context import current
from tinyvllm.server.failures import UnknownModelError
from tinyvllm.server.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    GenerationRequest,
    ModelCard,
    ModelList,
)
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import EventStream, Item, begun, guarded, merge, until_disconnect

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

router = APIRouter(responses=_ERRORS)


# ---- Models ----


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[_model_card(state_of(request))])


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, request: Request) -> ModelCard:
    state = state_of(request)
    require_model(state, model_id)
    return _model_card(state)


def _model_card(state: ServerState) -> ModelCard:
    state.require_engine()
    engine = state.engine
    return ModelCard(
        id=engine.served_model_name,
        created=engine.created,
        root=engine.model_config.name or engine.served_model_name,
        max_model_len=engine.capacity.max_model_len,
    )


def require_model(state: ServerState, name: str | None) -> None:
    served = state.engine.served_model_name
    if name is not None and name != served:
        raise UnknownModelError(f"the model {name!a} does not exist: this server has {served!r}")


# ---- Completions ----


@router.post("/v1/completions", response_model=Completion)
async def completions(body: CompletionRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _complete(state, body))


async def _complete(state: ServerState, body: CompletionRequest) -> Response:
    arrival_s = time.perf_counter()
    _check_request(state, body)
    params = body.sampling_params(state.engine.generation_defaults)
    prompts, echoes = await asyncio.to_thread(_read_prompts, state, body)
    heading = _heading(state, "cmpl")
    streams: list[AsyncGenerator[Delta, None]] = []
    for position, ids in enumerate(prompts):
        fitted = params
        if body.max_tokens is None:  # the default gives way to a long prompt; what was asked for does not
            room = _context_limit(state) - len(ids)
            fitted = dataclasses.replace(params, max_tokens=min(DEFAULT_COMPLETION_TOKENS, room))
        request_id = f"{heading.id}-{position}"
        streams.append(
            state.generate(ids, fitted, request_id=request_id, arrival_s=arrival_s, priority=body.priority or 0)
        )
    items = merge(streams, params.n)
    if not body.stream:
        wants_logprobs = body.logprobs is not None
        answer = await completion_answer(items, heading, n=params.n, echoes=echoes, logprobs=wants_logprobs)
        return _json(answer)
    items = await begun(items)
    frames = completion_frames(items, heading, n=params.n, echoes=echoes, include_usage=body.include_usage)
    return _event_stream(frames, items)


def _read_prompts(state: ServerState, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Each prompt's ids, and its text if it shall be echoed (else ""). Runs on a worker thread."""
    tokenizer = state.engine.tokenizer
    prompts: list[list[int]] = []
    echoes: list[str] = []
    for prompt in body.prompt:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        _check_ids(state, ids, body.max_tokens, param="prompt")
        prompts.append(ids)
        if not body.echo:
            echoes.append("")
        elif isinstance(prompt, str):
            echoes.append(prompt)
        else:
            echoes.append(tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens is not False))
    return prompts, echoes


# ---- Chat ----


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _chat(state, body))


async def _chat(state: ServerState, body: ChatRequest) -> Response:
    arrival_s = time.perf_counter()
    _check_request(state, body)
    params = body.sampling_params(state.engine.generation_defaults)
    ids = await asyncio.to_thread(_read_messages, state, body)
    heading = _heading(state, "chatcmpl")
    deltas = state.generate(ids, params, request_id=heading.id, arrival_s=arrival_s, priority=body.priority or 0)
    items = merge([deltas], params.n)
    if not body.stream:
        return _json(await chat_answer(items, heading, n=params.n, logprobs=bool(body.logprobs)))
    items = await begun(items)
    return _event_stream(chat_frames(items, heading, n=params.n, include_usage=body.include_usage), items)


def _read_messages(state: ServerState, body: ChatRequest) -> list[int]:
    """The conversation through the model's template, as ids. Runs on a worker thread."""
    template = state.engine.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
        )
    messages = [message.for_template() for message in body.messages]
    goes_on = bool(body.continue_final_message)
    begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    text = template.render(messages, add_generation_prompt=begins, **(body.chat_template_kwargs or {}))
    if goes_on:
        text = _cut_after(text, messages[-1]["content"])
    ids = state.engine.tokenizer.encode_chat(text)
    _check_ids(state, ids, body.token_limit, param="messages")
    return ids


def _cut_after(text: str, last_content: str) -> str:
    """`text` without what the template puts after the last message's content, so that the model goes on with it."""
    content = last_content.strip()  # templates strip it
    start = text.rfind(content) if content else -1
    if start < 0:
        raise RequestError(
            "continue_final_message needs a last message whose content the chat template shows as it is",
            param="continue_final_message",
        )
    return text[: start + len(content)]


# ---- Helpers of both ----


def _check_request(state: ServerState, body: GenerationRequest) -> None:
    state.require_ready()
    require_model(state, body.model)
    body.refuse_unsupported()


def _context_limit(state: ServerState) -> int:
    """Most tokens of prompt and output together: the pool may hold fewer than the model can."""
    return min(state.engine.capacity.max_model_len, state.engine.capacity.num_tokens)


def _check_ids(state: ServerState, ids: list[int], max_tokens: int | None, *, param: str) -> None:
    """Refuse what can never run: here, while the whole request can still be refused, and under its field's name."""
    vocab_size, limit = state.engine.model_config.vocab_size, _context_limit(state)
    if not ids:
        raise RequestError(f"{param} has no tokens: give at least one", param=param)
    if max(ids) >= vocab_size:
        raise RequestError(f"{param} has the token id {max(ids)}, but the vocabulary has {vocab_size}", param=param)
    if len(ids) >= limit:
        raise ContextLengthError(
            f"{param} has {len(ids)} tokens, but the maximum context length is {limit} tokens, of which one must be "
            "left for the output: shorten it, or start the server with a larger --max-model-len",
            param=param,
        )
    if max_tokens is not None and len(ids) + max_tokens > limit:
        raise ContextLengthError(
            f"{len(ids)} tokens of {param} and {max_tokens} of output are more than the maximum context length of "
            f"{limit} tokens: shorten the first, ask for fewer, or start the server with a larger --max-model-len",
            param="max_tokens",
        )


def _heading(state: ServerState, prefix: str) -> Heading:
    context = current()  # its id is in this one, and so in every line that the engine logs of the request
    unique = context.request_id if context.is_own_id else f"{context.request_id}-{uuid.uuid4().hex[:8]}"
    return Heading(id=f"{prefix}-{unique}", created=int(time.time()), model=state.engine.served_model_name)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _event_stream(frames: AsyncGenerator[str, None], items: AsyncGenerator[Item, None]) -> EventStream:
    return EventStream(guarded(frames), items)
