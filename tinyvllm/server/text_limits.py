"""Limits on texts, checked before they are encoded, because that takes about a second for each MiB."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinyvllm.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from tinyvllm.server.state import ServerState

MAX_COUNTED_CHARS = 4 * 2**20  # of a text that is only tokenized: 4 s; more, if the context could hold it

Fit = Callable[[str], str]  # what is encoded of a text, or a refusal


def fit(state: ServerState, *, param: str, is_cut: bool = False) -> Fit:
    """Refuses a text that certainly does not fit into the context, before it is encoded, which may take seconds.

    is_cut: the request's prompt is cut to fit, so only the beginning and the end of such a text are encoded."""
    if is_cut:
        return lambda text: state.engine.tokenizer.without_middle(text, state.context_limit)

    def check(text: str) -> str:
        least, limit = state.engine.tokenizer.least_tokens(text), state.context_limit
        if least >= limit:
            raise ContextLengthError(
                f"{param} has {len(text)} characters, which are at least {least} tokens, but the maximum context "
                f"length is {limit} tokens: shorten it, or start the server with a larger --max-model-len",
                param=param,
            )
        return text

    return check


def fit_for_counting(state: ServerState, *, param: str) -> Fit:
    """Refuses a text that takes many seconds to encode, on a route that only counts or returns tokens."""

    def check(text: str) -> str:
        limit = max(MAX_COUNTED_CHARS, state.engine.tokenizer.most_chars(state.context_limit))
        if len(text) > limit:
            raise RequestError(f"{param} has {len(text)} characters, but the limit is {limit}: split it", param=param)
        return text

    return check
