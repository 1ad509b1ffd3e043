"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.profiling import measure
from tinyvllm.server.body_timings import timings_of
from tinyvllm.server.context import current, request_span
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
from tinyvllm.server.openai.completion_answers import CompletionEvents, CompletionForm, Echo, completion_answer
from tinyvllm.server.openai.protocol.completions import DEFAULT_TOKENS, Completion, CompletionRequest
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

if TYPE_CHECKING:
    from tinyvllm.config import SamplingParams

MAX_QUICK_LENGTH = 1000  # characters or ids of all prompts; a tokenizer takes 0.35 us for each

router = APIRouter(responses=ERRORS)


@router.post("/v1/completions", response_model=Completion, responses=openapi_event_stream(Completion))
async def completions(body: CompletionRequest, request: Request) -> Response:
    state = state_of(request)
    return await until_disconnect(request.receive, _complete(state, body))


async def _complete(state: ServerState, body: CompletionRequest) -> Response:
    arrival_s = time.perf_counter()
    check_request(state, body)
    params = body.sampling_params(state.engine.generation_defaults)
    if _is_quick(body):
        prompts, echoes = _read_prompts(state, body)
    else:
        prompts, echoes = await on_thread(_read_prompts, state, body)
    if body.suffix:
        params = ending_at_marks(state, params)
    heading = make_heading(state, "cmpl-")
    calls = []
    for position, ids in enumerate(prompts):
        fitted_params = params
        if body.max_tokens is None:  # only the default shrinks to fit a long prompt
            room = state.context_limit - len(ids)
            fitted_params = dataclasses.replace(params, max_tokens=min(DEFAULT_TOKENS, room))
        calls.append(PromptCall(ids, fitted_params, request_id=f"{heading.id}-{position}"))
    job = Job(
        calls,
        n=body.num_choices,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        beams=body.beams(),
        cache_salt=body.cache_salt,
    )
    form = CompletionForm(
        n=job.n,
        echoes=echoes,
        has_logprobs=body.logprobs is not None,
        num_echoed_top=body.logprobs if body.echo else None,
        num_prompt_logprobs=body.prompt_logprobs,
        has_output=body.max_tokens != 0,
        prompt_ids=prompts if body.return_token_ids else None,
        names_ids=bool(body.return_tokens_as_token_ids),
    )
    if not body.stream:
        answer = await completion_answer(state, job, heading, form)
        if body.timings_per_token:
            answer.timings = timings_of(current().times)
        return json_response(answer)
    events = CompletionEvents(
        heading,
        form,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        times=current().times if body.timings_per_token else None,
    )
    return await event_stream(state, job, events)


def _is_quick(body: CompletionRequest) -> bool:
    """Whether the prompts are read in less than half a millisecond: a worker thread would cost as much."""
    return not body.echo and sum(len(prompt) for prompt in body.prompt) + len(body.suffix or "") <= MAX_QUICK_LENGTH


def _read_prompts(state: ServerState, body: CompletionRequest) -> tuple[list[list[int]], list[Echo]]:
    """Each prompt's token ids, and what is echoed of it. Long ones are read on a worker thread."""
    tokenizer = state.engine.tokenizer
    prompts: list[list[int]] = []
    echoes: list[Echo] = []
    for prompt in body.prompt:
        with request_span(measure.TOKENIZE):
            whole = _encode(state, prompt, body)
        ids = body.fitted(tokenizer, whole, state.context_limit, has_special_tokens=_adds_special(prompt, body))
        check_ids(state, ids, body.max_tokens, param="prompt")
        prompts.append(ids)
        if not body.echo:
            echoes.append(Echo())
            continue
        text = prompt
        if ids != whole or not isinstance(prompt, str):
            text = tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens is not False)
        echoes.append(Echo(text, tokenizer.token_bytes(ids[0]), ids[0]))
    return prompts, echoes


def _adds_special(prompt: str | list[int], body: CompletionRequest) -> bool:
    return isinstance(prompt, str) and body.add_special_tokens is not False


def _encode(state: ServerState, prompt: str | list[int], body: CompletionRequest) -> list[int]:
    tokenizer, adds_special = state.engine.tokenizer, _adds_special(prompt, body)
    fitted = fit(state, param="prompt", is_cut=body.truncate_prompt_tokens is not None)
    if isinstance(prompt, str):
        prompt = fitted(prompt)
    if body.suffix:
        return tokenizer.encode_middle(prompt, fitted(body.suffix), add_special_tokens=adds_special)
    return tokenizer.encode(prompt, add_special_tokens=adds_special) if isinstance(prompt, str) else prompt


def ending_at_marks(state: ServerState, params: SamplingParams) -> SamplingParams:
    """The parameters of a request with a suffix: what marks the parts of a prompt ends the answer."""
    fim = state.engine.tokenizer.fim
    ends = frozenset() if fim is None else fim.end_ids - state.engine.tokenizer.eos_ids
    return dataclasses.replace(params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *sorted(ends)))))
