"""From deltas to answers: what all formats share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyvllm.server.generation import Item, Job
from tinyvllm.server.openai.protocol.common import (
    CompletionTokensDetails,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob
    from tinyvllm.server.state import ServerState

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI and vLLM write this number


def finite(logprob: float) -> float:
    """JSON has no NaN either, which a prompt's logprobs are where its logits are not finite."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def id_name(token: TokenLogprob) -> str:
    """What vLLM calls a token with return_tokens_as_token_ids."""
    return f"token_id:{token.token_id}"


@dataclass
class Choice:
    """The deltas of one choice, gathered."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def add(self, item: Item) -> None:
        self.texts.append(item.delta.text)
        self.token_ids += item.delta.token_ids
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


class Tally:
    """Counts tokens for `usage`: each prompt once, and the output of every choice."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}  # prompt -> (tokens, of them cached)
        self._outputs: dict[int, int] = {}  # choice -> tokens so far

    def add(self, item: Item) -> None:
        # only a prompt's first delta: with n > 1, later choices hit what the first has just cached
        self._prompts.setdefault(item.prompt, (item.delta.num_prompt_tokens, item.delta.num_cached_tokens))
        self._outputs[item.choice] = item.delta.num_output_tokens

    @property
    def num_outputs(self) -> int:
        """Output tokens of all choices so far."""
        return sum(self._outputs.values())

    def usage(self, *, has_output: bool = True, num_reasoning_tokens: int | None = None) -> Usage:
        """has_output: False if only the prompt was requested. num_reasoning_tokens: None if reasoning cannot be told
        from the answer."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        completion_tokens = sum(self._outputs.values()) if has_output else 0
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(cached for _, cached in self._prompts.values())
            ),
            completion_tokens_details=(
                None if num_reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens=num_reasoning_tokens)
            ),
        )


class _Collector:
    """Hands every item to a function, and completes `done` after the last: a Sink."""

    def __init__(self, add: Callable[[Item], object]) -> None:
        self._add = add
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, item: Item) -> None:
        try:
            self._add(item)
        except Exception as error:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


async def collect(state: ServerState, job: Job, add: Callable[[Item], object]) -> None:
    """Generate, and hand each item to `add` as it arrives. Returns after the last; raises what ends them early."""
    collector = _Collector(add)
    generation = await state.generate(job, collector)
    try:
        await collector.done
    finally:
        generation.close()


async def gather(state: ServerState, job: Job) -> tuple[list[Choice], Tally]:
    """Generate all choices. Returns them complete, with their token counts."""
    choices, tally = [Choice() for _ in range(job.num_choices)], Tally()

    def add(item: Item) -> None:
        tally.add(item)
        choices[item.choice].add(item)

    await collect(state, job, add)
    return choices, tally
