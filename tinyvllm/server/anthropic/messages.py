"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.errors import ContextLengthError, RequestError
from tinyvllm.server.answers import collect
from tinyvllm.server.anthropic.answers import AnswerBuilder, Form
from tinyvllm.server.anthropic.events import MessageEvents
from tinyvllm.server.anthropic.history import Canonical, canonical_messages
from tinyvllm.server.anthropic.protocol import (
    CountTokensRequest,
    ErrorAnswer,
    MessageAnswer,
    MessagesRequest,
    TokenCount,
)
from tinyvllm.server.anthropic.tools import OfferedTools
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.generation import Job, PromptCall
from tinyvllm.server.intake import check_ids, event_stream, json_response, make_heading, require_model
from tinyvllm.server.sampling import sampling_params
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit_for_counting
from tinyvllm.server.workers import on_thread

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
_STREAM_SCHEMA = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "description": "message_start, content blocks, message_delta, message_stop; the data as JSON.",
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _STREAM_SCHEMA}}}}

router = APIRouter(responses=ERRORS)


@router.post("/v1/messages", response_model=MessageAnswer, responses=_STREAM)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _answer(state, body))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request) -> TokenCount:
    """The number of tokens in the prompt that the same body makes at /v1/messages."""
    state = state_of(request)
    _check(state, body)
    prompt = await on_thread(_count, state, body)
    return TokenCount(input_tokens=len(prompt.ids))


async def _answer(state: ServerState, body: MessagesRequest) -> Response:
    arrival_s = time.perf_counter()
    _check(state, body)
    body.refuse_unsupported()
    prompt, params = await on_thread(_read, state, body)
    heading = make_heading(state, "msg_")
    form = Form(
        id=heading.id,
        model=heading.model,
        format=prompt.format,
        stop_sequences=params.stop,
        num_prompt_tokens=len(prompt.ids),
        is_clamped=params.max_tokens is not None and params.max_tokens < body.max_tokens,
        is_empty=body.max_tokens == 0,
        omits_thoughts=body.omits_thoughts,
    )
    job = Job(
        [PromptCall(prompt.ids, params, request_id=heading.id)], n=1, arrival_s=arrival_s, cache_salt=body.cache_salt
    )
    if body.stream:
        return await event_stream(state, job, MessageEvents(form))
    builder = AnswerBuilder(form)
    await collect(state, job, lambda item: builder.add(item.delta))
    return json_response(builder.finish())


def _count(state: ServerState, body: CountTokensRequest) -> Prompt:
    """The prompt. Runs on a worker thread."""
    return make_prompt(conversation_of(body), state.engine, fit_for_counting(state, param="messages"))


def _check(state: ServerState, body: CountTokensRequest) -> None:
    """Raise errors that can be found before the prompt is made."""
    state.require_ready()
    require_model(state, body.model)
    body.note_extras()


def _read(state: ServerState, body: MessagesRequest) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    limit = state.context_limit

    def check_length(num_tokens: int) -> None:
        if num_tokens >= limit:  # Anthropic's wording, on which its clients shorten the conversation
            raise ContextLengthError(
                f"prompt is too long: {num_tokens} tokens > {limit - 1} maximum: shorten it, or start the server with "
                "a larger --max-model-len",
                param="messages",
            )

    def check_text(text: str) -> str:
        check_length(state.engine.tokenizer.least_tokens(text))
        return text

    prompt = make_prompt(conversation_of(body), state.engine, check_text)
    num_tokens = len(prompt.ids)
    check_length(num_tokens)
    check_ids(state, prompt.ids, None, param="messages")
    settings = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences or None,
        "grammar": prompt.grammar if body.max_tokens else None,
    }
    # asking for more than fits is not an error: the answer ends with model_context_window_exceeded
    max_tokens = min(max(body.max_tokens, 1), limit - num_tokens)
    params = sampling_params(
        settings,
        state.engine.generation_defaults,
        max_tokens=max_tokens,
        special_tokens=prompt.special_tokens,
    )
    return prompt, params


def conversation_of(body: CountTokensRequest) -> Conversation:
    tools = OfferedTools.read(body.tools or [], body.messages)
    messages = canonical_messages(body.system, body.messages, tools.describe)
    is_prefilled = False
    if messages and _is_open(messages[-1]):
        is_prefilled = bool(messages[-1]["content"].strip())
        messages = messages if is_prefilled else messages[:-1]
    if not messages:
        raise RequestError("messages have no content: give at least one message with text", param="messages")
    return Conversation(
        messages=messages,
        tools=tools.tools,
        tools_for_template=tools.for_template(),
        grammar=body.grammar(),
        shows_reasoning=not body.hides_thinking,
        add_generation_prompt=not is_prefilled,
        continue_final_message=is_prefilled,
        template_arguments=body.template_arguments,
        **tools.choice(body.tool_choice),
    )


def _is_open(last: Canonical) -> bool:
    """Whether the last message is the beginning of the answer, which the model continues."""
    return last["role"] == "assistant" and "tool_calls" not in last
