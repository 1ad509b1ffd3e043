"""From deltas to answers: what all formats share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyvllm.server.protocol.common import PromptLogprob, PromptLogprobs
from tinyvllm.server.streaming import Item, Tally

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI and vLLM write this number


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass
class Choice:
    """The deltas of one choice, gathered."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def add(self, item: Item) -> None:
        self.texts.append(item.delta.text)
        self.logprobs += item.delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or item.delta.prompt_logprobs
        if item.delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = item.delta.finish_reason, item.delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


def write_prompt_logprobs(scores: tuple[TokenLogprob | None, ...] | None, num_top: int) -> PromptLogprobs | None:
    """Prompt logprobs in vLLM's form: for each token itself, and the `num_top` likeliest in its place."""
    if scores is None:
        return None
    return [
        None
        if token is None
        else {
            one.token_id: PromptLogprob(logprob=finite(one.logprob), rank=one.rank, decoded_token=one.token)
            for one in (*token.top[:num_top], token)
        }
        for token in scores
    ]


async def gather(items: AsyncGenerator[Item, None], num_choices: int) -> tuple[list[Choice], Tally]:
    """All choices, complete, and their token counts."""
    choices, tally = [Choice() for _ in range(num_choices)], Tally()
    async with contextlib.aclosing(items):
        async for item in items:
            tally.add(item)
            choices[item.choice].add(item)
    return choices, tally
