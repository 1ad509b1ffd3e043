"""POST /api/generate."""

from __future__ import annotations

import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from tinyvllm.config import SamplingParams
from tinyvllm.profiling import measure
from tinyvllm.server.context import request_span
from tinyvllm.server.conversation import Conversation, Prompt
from tinyvllm.server.intake import check_ids, json_response
from tinyvllm.server.message import OutputFormat
from tinyvllm.server.ollama.answers import AnswerForm
from tinyvllm.server.ollama.chat import answer, params_of, prompt_of
from tinyvllm.server.ollama.options import Options, read_options
from tinyvllm.server.ollama.prompts import context_of, cut_ids
from tinyvllm.server.ollama.protocol import GenerateAnswer, GenerateRequest
from tinyvllm.server.ollama.thinking import template_arguments
from tinyvllm.server.ollama.wire import make_router, openapi_lines, require_model
from tinyvllm.server.openai.completions import ending_at_marks
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

router = make_router()

_SPARE = 16  # tokens by which the parts of a text may differ from the whole


@router.post("/api/generate", response_model=GenerateAnswer, responses=openapi_lines(GenerateAnswer))
async def generate(body: GenerateRequest, request: Request) -> Response:
    return await until_disconnect(request.receive, _generate(state_of(request), body))


async def _generate(state: ServerState, body: GenerateRequest) -> Response:
    arrival_s = time.perf_counter()
    state.require_ready()
    require_model(state, body.model)
    body.refuse_unsupported()
    options = read_options(body.options)
    if not body.prompt and not body.suffix:
        form = AnswerForm(body.model, OutputFormat(), arrival_s, is_chat=False)
        return json_response(form.without_output("unload" if body.keep_alive == 0 else "load"))
    prompt, params = await on_thread(_read, state, body, options)
    context = None if body.raw else tuple(prompt.ids)
    form = AnswerForm(body.model, prompt.format, arrival_s, is_chat=False, context=context)
    return await answer(state, body, prompt.ids, params, form)


def _read(state: ServerState, body: GenerateRequest, options: Options) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. Runs on a worker thread."""
    arguments = template_arguments(state.engine, body.think, body.model)
    if body.suffix:
        prompt = _middle_prompt(state, body, options)
        params = params_of(state, body, options, prompt, param="prompt")
        return prompt, ending_at_marks(state, params)
    if body.raw or state.engine.chat_template is None:
        prompt = _plain_prompt(state, body)
    else:
        messages = [{"role": "system", "content": body.system}] if body.system else []
        conversation = Conversation(
            messages=[*messages, {"role": "user", "content": body.prompt or ""}],
            grammar=body.grammar(),
            template_arguments=arguments,
        )
        prompt = prompt_of(state, conversation, body, options)
    if body.context:
        prompt = replace(prompt, ids=_after_context(state, body.context, prompt.ids))
    if body.is_truncated:
        prompt = replace(prompt, ids=cut_ids(prompt.ids, context_of(state, options) - 1, options.num_keep))
    return prompt, params_of(state, body, options, prompt, param="prompt")


def _plain_prompt(state: ServerState, body: GenerateRequest) -> Prompt:
    """The prompt without a template; preceded by the system message if the model has no template."""
    text = f"{body.system}\n\n{body.prompt}" if body.system else body.prompt or ""
    with request_span(measure.TOKENIZE):
        ids = state.engine.tokenizer.encode(fit(state, param="prompt", is_cut=body.is_truncated)(text))
    return Prompt(ids=ids, grammar=body.grammar(), format=OutputFormat(), special_tokens="skip")


def _middle_prompt(state: ServerState, body: GenerateRequest, options: Options) -> Prompt:
    """The prompt for the text between `prompt` and `suffix`. If they do not fit, the text nearest to the middle is
    kept, three quarters of it from `prompt`."""
    tokenizer, prefix, suffix = state.engine.tokenizer, body.prompt or "", body.suffix or ""
    room = context_of(state, options) - 1
    fitted = fit(state, param="prompt", is_cut=body.is_truncated)
    prefix, suffix = fitted(prefix), fitted(suffix)
    with request_span(measure.TOKENIZE):
        ids = tokenizer.encode_middle(prefix, suffix)
        if len(ids) > room and body.is_truncated:
            before = tokenizer.encode(prefix, add_special_tokens=False, parse_special=False)
            after = tokenizer.encode(suffix, add_special_tokens=False, parse_special=False)
            room -= len(ids) - len(before) - len(after) + _SPARE
            num_after = max(0, min(len(after), max(room // 4, room - len(before))))
            num_before = max(0, room - num_after)
            ids = tokenizer.encode_middle(before[len(before) - num_before :], tokenizer.decode(after[:num_after]))
    return Prompt(ids=ids, grammar=body.grammar(), format=OutputFormat(), special_tokens="skip")


def _after_context(state: ServerState, context: list[int], ids: list[int]) -> list[int]:
    """`context` of an earlier answer, then `ids` without a second BOS. Raises RequestError for unknown ids."""
    check_ids(state, [max(context)], None, param="context")
    bos_id = state.engine.tokenizer.bos_id
    return context + (ids[1:] if bos_id is not None and ids[:1] == [bos_id] else ids)
