"""POST /api/chat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.generation import Job, PromptCall
from tinyvllm.server.intake import event_stream, json_response, make_heading
from tinyvllm.server.message import OutputFormat
from tinyvllm.server.ollama.answers import AnswerForm, AnswerLines, whole_answer
from tinyvllm.server.ollama.options import Options, read_options, with_defaults
from tinyvllm.server.ollama.prompts import fitting_prompt, output_limit
from tinyvllm.server.ollama.protocol import ChatAnswer, ChatRequest, GenerationRequest, Message
from tinyvllm.server.ollama.thinking import template_arguments
from tinyvllm.server.ollama.wire import make_router, openapi_lines, require_model
from tinyvllm.server.sampling import sampling_params
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

router = make_router()


@router.post("/api/chat", response_model=ChatAnswer, responses=openapi_lines(ChatAnswer))
async def chat(body: ChatRequest, request: Request) -> Response:
    return await until_disconnect(request.receive, _chat(state_of(request), body))


async def _chat(state: ServerState, body: ChatRequest) -> Response:
    arrival_s = time.perf_counter()
    state.require_ready()
    require_model(state, body.model)
    body.refuse_unsupported()
    options = read_options(body.options)
    if not body.messages:
        form = AnswerForm(body.model, OutputFormat(), arrival_s, is_chat=True)
        return json_response(form.without_output("unload" if body.keep_alive == 0 else "load"))
    prompt, params = await on_thread(_read, state, body, options)
    form = AnswerForm(body.model, prompt.format, arrival_s, is_chat=True)
    return await answer(state, body, prompt.ids, params, form)


async def answer(
    state: ServerState, body: GenerationRequest, ids: list[int], params: SamplingParams, form: AnswerForm
) -> Response:
    """Generate, and answer whole or streamed, as the request asks."""
    heading = make_heading(state, "chat-" if form.is_chat else "gen-")
    job = Job([PromptCall(ids, params, request_id=heading.id)], n=1, arrival_s=form.arrival_s)
    if body.is_streamed:
        return await event_stream(state, job, AnswerLines(form))
    return json_response(await whole_answer(state, job, form))


def _read(state: ServerState, body: ChatRequest, options: Options) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    tools = body.tools or []
    messages = canonical_messages(body.messages or [])
    # as in Ollama, the model continues an answer at the end of the conversation
    is_begun = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    continues = is_begun and bool(messages[-1]["content"].strip())
    conversation = Conversation(
        messages=messages,
        tools=[tool.as_tool(position) for position, tool in enumerate(tools)],
        tools_for_template=[tool.for_template() for tool in tools],
        grammar=body.grammar(),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        template_arguments=template_arguments(state.engine, body.think, body.model),
    )
    prompt = prompt_of(state, conversation, body, options)
    return prompt, params_of(state, body, options, prompt, param="messages")


def prompt_of(state: ServerState, conversation: Conversation, body: GenerationRequest, options: Options) -> Prompt:
    if body.is_truncated:
        return fitting_prompt(state, conversation, options)
    return make_prompt(conversation, state.engine, fit(state, param="messages"))


def params_of(
    state: ServerState, body: GenerationRequest, options: Options, prompt: Prompt, *, param: str
) -> SamplingParams:
    """Raises RequestError for a prompt that does not fit, naming the field `param`, and for bad values of options."""
    return sampling_params(
        {**options.sampling, "logprobs": body.num_logprobs, "grammar": prompt.grammar},
        with_defaults(state.engine.generation_defaults),
        max_tokens=output_limit(state, prompt.ids, options, param=param),
        special_tokens=prompt.special_tokens,
    )


def canonical_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the form that all APIs pass on.

    Ollama's calls need no ids, and results at most name a function. A call without an id gets one. A result without one
    belongs to the first call of its name that has no result yet, or to the first of all calls if it has no name."""
    canonical: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (id, name) of calls without a result
    num_calls = 0
    for message in messages:
        written: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            written["reasoning_content"] = message.thinking
        if message.role == "assistant" and message.tool_calls:
            written["tool_calls"] = []
            for call in message.tool_calls:
                call_id, name = call.id or f"call_{num_calls:08}", call.function.name
                num_calls += 1
                open_calls.append((call_id, name))
                function = {"name": name, "arguments": call.function.arguments or {}}
                written["tool_calls"].append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool":
            written |= _result_fields(message, open_calls)
        canonical.append(written)
    return canonical


def _result_fields(message: Message, open_calls: list[tuple[str, str]]) -> dict[str, str]:
    """The fields that name the call of a result, which is removed from `open_calls`."""
    fields = {"tool_call_id": message.tool_call_id, "name": message.tool_name}
    for position, (call_id, name) in enumerate(open_calls):
        is_its = call_id == message.tool_call_id if message.tool_call_id else message.tool_name in (None, "", name)
        if is_its:
            del open_calls[position]
            fields = {"tool_call_id": call_id, "name": name}
            break
    return {field: value for field, value in fields.items() if value}
