"""Prompts that fit: shortens a conversation or a text that is longer than the context.

The rules are Ollama's (server/prompt.go, and the truncation of its runners), with additions. The result of a call is
never kept without the call, nor a call without the user message that led to it, so that an agent in a long loop keeps
its task. When the context is full, Ollama drops the oldest half and continues generating; here the answer ends with
done_reason "length". So when messages are dropped, room is left for an answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tinyvllm.server.conversation import Conversation, Prompt, make_prompt
from tinyvllm.server.intake import check_ids
from tinyvllm.server.notices import warn_once
from tinyvllm.server.text_limits import fit

if TYPE_CHECKING:
    from tinyvllm.server.ollama.options import Options
    from tinyvllm.server.state import ServerState

log = logging.getLogger(__name__)

USUAL_ROOM = 512  # tokens left for an answer without num_predict; never more than a quarter of the context


def context_of(state: ServerState, options: Options) -> int:
    """Tokens of prompt and answer together: the request's num_ctx, but no more than the server has."""
    limit = state.context_limit
    if options.num_ctx is not None and options.num_ctx > limit:
        warn_once("option %s is larger than the server's context, which applies instead", "num_ctx")
    return limit if options.num_ctx is None else min(options.num_ctx, limit)


def fitting_prompt(state: ServerState, conversation: Conversation, options: Options) -> Prompt:
    """The prompt of the conversation, without its oldest messages if it would not fit otherwise.

    System messages and the last message are always kept. If they are too long, the prompt is cut by `cut_ids`."""
    context = context_of(state, options)
    prompt = make_prompt(conversation, state.engine, fit(state, param="messages", is_cut=True))
    if len(prompt.ids) >= context:
        step = max(1, context // 4)
        excess = len(prompt.ids) - context + min(options.num_predict or USUAL_ROOM, step)
        # whole steps: the next turns are cut at the same message, and find their beginning in the prefix cache
        prompt = _without_oldest(state, conversation, len(prompt.ids) - step * math.ceil(excess / step))
    return replace(prompt, ids=cut_ids(prompt.ids, context - 1, options.num_keep))


def _without_oldest(state: ServerState, conversation: Conversation, max_tokens: int) -> Prompt:
    """The prompt of as many of the latest messages as fit into max_tokens, or of the fewest possible if none do."""
    messages = conversation.messages
    starts = [at for at in range(1, len(messages)) if messages[at]["role"] in ("user", "assistant")]
    starts = starts or [len(messages) - 1]
    prompts: dict[int, Prompt] = {}

    def fits(start: int) -> bool:
        kept = replace(conversation, messages=latest(messages, start))
        prompts[start] = make_prompt(kept, state.engine, fit(state, param="messages", is_cut=True))
        return len(prompts[start].ids) <= max_tokens

    low, high = 0, len(starts) - 1  # the first start that fits is in [low, high], or none does
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(starts[middle]) else (middle + 1, high)
    chosen = starts[low]
    if chosen not in prompts:
        fits(chosen)
    log.info("dropped the oldest of %d messages, to fit the context: those before message %d", len(messages), chosen)
    return prompts[chosen]


def latest(messages: Sequence[Mapping[str, Any]], start: int) -> list[Mapping[str, Any]]:
    """The messages from `start` on, and before them the system messages and the user message that `start` answers."""
    question = -1
    if messages[start]["role"] != "user":
        question = next((at for at in reversed(range(start)) if messages[at]["role"] == "user"), -1)
    before = [message for at, message in enumerate(messages[:start]) if message["role"] == "system" or at == question]
    return [*before, *messages[start:]]


def cut_ids(ids: list[int], max_tokens: int, num_keep: int) -> list[int]:
    """At most max_tokens ids: the first num_keep (negative: as many as possible) and the latest."""
    if len(ids) <= max_tokens:
        return ids
    kept = max_tokens - 1 if num_keep < 0 else min(num_keep, max_tokens - 1)
    return ids[:kept] + ids[len(ids) - (max_tokens - kept) :]


def output_limit(state: ServerState, ids: list[int], options: Options, *, param: str) -> int:
    """Maximum tokens of the answer: num_predict, but no more than fit after the prompt.

    Raises RequestError for a prompt that can never run."""
    check_ids(state, ids, None, param=param)
    room = max(1, context_of(state, options) - len(ids))
    return room if options.num_predict is None else min(options.num_predict, room)
