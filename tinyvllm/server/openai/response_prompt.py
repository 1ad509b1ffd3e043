"""Makes the prompt of a response from its conversation's items, shortened to fit if the request allows it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from tinyvllm.config import SamplingParams
from tinyvllm.errors import RequestError
from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.intake import check_ids
from tinyvllm.server.openai.protocol.common import effort_arguments, thinking_arguments
from tinyvllm.server.openai.protocol.response_items import InputItem, Message, messages_of
from tinyvllm.server.openai.protocol.responses import ResponsesRequest
from tinyvllm.server.openai.response_store import Item
from tinyvllm.server.state import ServerState
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread


async def read_prompt(
    state: ServerState, body: ResponsesRequest, items: Sequence[Item]
) -> tuple[Prompt, SamplingParams]:
    """The prompt and the sampling parameters. items: of the whole conversation, the request's own last."""
    return await on_thread(_read, state, body, items)


def _read(state: ServerState, body: ResponsesRequest, items: Sequence[Item]) -> tuple[Prompt, SamplingParams]:
    first = len(body.input) - len(items)
    messages = messages_of([InputItem.model_validate(item) for item in items], first)
    if not messages and not body.instructions:
        raise RequestError("input has nothing that a model can read: send a message", param="input")
    prompt = _make_prompt(state, body, messages)
    if body.truncation == "auto" and len(prompt.ids) + (body.max_output_tokens or 1) > state.context_limit:
        prompt = _truncated(state, body, messages) or prompt
    check_ids(state, prompt.ids, body.max_output_tokens, param="input", limit_param="max_output_tokens")
    params = body.make_params(
        state.engine.generation_defaults,
        max_tokens=body.max_output_tokens,
        logprobs=body.num_logprobs,
        grammar=prompt.grammar,
        special_tokens=prompt.special_tokens,
    )
    return prompt, params


def _make_prompt(state: ServerState, body: ResponsesRequest, messages: Sequence[Message]) -> Prompt:
    choice = body.choice()
    effort = thinking_arguments(body.model_extra or {})
    effort |= effort_arguments(body.reasoning.effort if body.reasoning is not None else None)
    continues = _is_unfinished(body.input[-1], messages)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    conversation = Conversation(
        messages=[*instructions, *messages],
        is_parallel=body.parallel_tool_calls is not False and choice.named_tool is None,
        grammar=body.grammar(),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        template_arguments=effort | (body.chat_template_kwargs or {}),
        is_chat=False,
        **choice.conversation(),
    )
    return make_prompt(conversation, state.engine, fit(state, param="input", is_cut=body.truncation == "auto"))


def _is_unfinished(last: InputItem, messages: Sequence[Message]) -> bool:
    """Whether the input ends with an incomplete message, which the model continues, as in vLLM."""
    is_part = (
        last.type == "message" and last.role == "assistant" and last.get("status") in ("in_progress", "incomplete")
    )
    return is_part and bool(messages[-1]["content"])


# ---- Truncation ----

_OUTPUT_SHARE = 4  # 1/4 of the context is left for output if the request sets no limit


def _truncated(state: ServerState, body: ResponsesRequest, messages: Sequence[Message]) -> Prompt | None:
    """The prompt without the oldest messages, so that it fits; None if not even the latest ones do.

    Removes as few of the oldest `_units` as possible, found by bisection, because a prompt takes milliseconds.
    """
    room = state.context_limit - (body.max_output_tokens or state.context_limit // _OUTPUT_SHARE)
    units = _units(messages)
    prompts: dict[int, Prompt] = {}

    def fits(number: int) -> bool:
        removed = {position for unit in units[:number] for position in unit}
        kept = [message for position, message in enumerate(messages) if position not in removed]
        prompts[number] = _make_prompt(state, body, kept)
        return len(prompts[number].ids) <= room

    if not units or not fits(len(units)):
        return None
    return prompts[bisect.bisect_left(range(len(units)), True, lo=1, key=fits)]


def _units(messages: Sequence[Message]) -> list[list[int]]:
    """Positions of messages that may be removed, in order of removal, grouped by what belongs together.

    First whole turns: a user message with everything that answers it. Then, in the last turn, each assistant message
    with the results of its calls, except for the latest. System messages and the last turn's user message stay.
    """
    turns: list[list[int]] = [[]]
    for position, message in enumerate(messages):
        if message["role"] == "system":
            continue
        if message["role"] == "user" and turns[-1]:
            turns.append([])
        turns[-1].append(position)
    *earlier, last = turns
    steps: list[list[int]] = []
    for position in last:
        if messages[position]["role"] == "assistant":
            steps.append([])
        if steps:
            steps[-1].append(position)
    return [*earlier, *steps[:-1]]
