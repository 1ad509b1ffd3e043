"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.server.body_timings import timings_of
from tinyvllm.server.context import current
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.generation import Job, PromptCall
from tinyvllm.server.intake import (
    ERRORS,
    check_ids,
    check_request,
    event_stream,
    json_response,
    make_heading,
    openapi_event_stream,
)
from tinyvllm.server.openai.chat_answers import CallForm, ChatEvents, TokenForm, chat_answer
from tinyvllm.server.openai.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=openapi_event_stream(ChatChunk))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _chat(state, body))


async def _chat(state: ServerState, body: ChatRequest) -> Response:
    arrival_s = time.perf_counter()
    check_request(state, body)
    prompt, params = await on_thread(_read, state, body)
    heading = make_heading(state, "chatcmpl-")
    job = Job(
        [PromptCall(prompt.ids, params, request_id=heading.id)],
        n=body.num_choices,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        beams=body.beams(),
        cache_salt=body.cache_salt,
    )
    tokens = TokenForm(prompt.ids if body.return_token_ids else None, bool(body.return_tokens_as_token_ids))
    if not body.stream:
        answer = await chat_answer(
            state,
            job,
            heading,
            prompt.format,
            form=CallForm(body.toolbox, body.uses_functions),
            logprobs=bool(body.logprobs),
            prompt_logprobs=body.prompt_logprobs,
            tokens=tokens,
        )
        if body.timings_per_token:
            answer.timings = timings_of(current().times)
        return json_response(answer)
    events = ChatEvents(
        heading,
        prompt.format,
        n=job.n,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        form=CallForm(body.toolbox, body.uses_functions),
        tokens=tokens,
        times=current().times if body.timings_per_token else None,
    )
    return await event_stream(state, job, events)


def _read(state: ServerState, body: ChatRequest) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    is_cut = body.truncate_prompt_tokens is not None
    prompt = make_prompt(conversation_of(body), state.engine, fit(state, param="messages", is_cut=is_cut))
    prompt = dataclasses.replace(prompt, ids=body.fitted(state.engine.tokenizer, prompt.ids, state.context_limit))
    check_ids(state, prompt.ids, body.token_limit, param="messages")
    params = body.make_params(
        state.engine.generation_defaults,
        max_tokens=body.token_limit,
        logprobs=body.num_logprobs,
        grammar=prompt.grammar,
        special_tokens=prompt.special_tokens,
    )
    return prompt, params


def conversation_of(body: ChatRequest) -> Conversation:
    choice = body.choice()
    continues = bool(body.continue_final_message)
    return Conversation(
        messages=[message.for_template() for message in body.messages],
        # naming a function requests a single call
        is_parallel=body.parallel_tool_calls is not False and choice.named_tool is None and not body.uses_functions,
        grammar=body.grammar(),
        shows_reasoning=body.include_reasoning is not False,
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        template_arguments=body.template_arguments,
        **choice.conversation(),
    )
