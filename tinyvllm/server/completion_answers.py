"""From deltas to answers of /v1/completions, whole and streamed."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from tinyvllm.server.answers import finite, gather
from tinyvllm.server.intake import Heading
from tinyvllm.server.protocol.completions import Completion, CompletionChoice, CompletionLogprobs
from tinyvllm.server.streaming import Item, Tally, frame

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob


async def completion_answer(
    items: AsyncGenerator[Item, None], heading: Heading, *, n: int, echoes: list[str], logprobs: bool
) -> Completion:
    """`echoes` is the text to put before each prompt's choices: one string a prompt."""
    choices, tally = await gather(items, n * len(echoes))
    answers = [
        CompletionChoice(
            index=index,
            text=echoes[index // n] + choice.text,
            logprobs=CompletionLogprobsWriter().write(choice.logprobs) if logprobs else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for index, choice in enumerate(choices)
    ]
    return Completion(id=heading.id, created=heading.created, model=heading.model, choices=answers, usage=tally.usage())


class CompletionStream:
    """The events of one answer. Owns the running logprob offsets of its choices and the count of tokens."""

    def __init__(self, heading: Heading, *, include_usage: bool, continuous_usage: bool = False) -> None:
        self._heading = heading
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._tally = Tally()
        self._writers: dict[int, CompletionLogprobsWriter] = {}

    async def frames(
        self, items: AsyncGenerator[Item, None], *, n: int, echoes: list[str]
    ) -> AsyncGenerator[str, None]:
        """The echo of each choice if there is one, its text as it comes, and the usage if asked."""
        for index in range(n * len(echoes)):
            if echoes[index // n]:
                yield self._chunk(CompletionChoice(index=index, text=echoes[index // n]))
        async with contextlib.aclosing(items):
            async for item in items:
                self._tally.add(item)
                if item.delta.text or item.delta.logprobs or item.delta.finish_reason is not None:
                    yield self._chunk(self._choice(item))
        if self._include_usage:
            yield self._frame([], has_usage=True)

    def _choice(self, item: Item) -> CompletionChoice:
        delta = item.delta
        writer = self._writers.setdefault(item.choice, CompletionLogprobsWriter())
        return CompletionChoice(
            index=item.choice,
            text=delta.text,
            logprobs=writer.write(delta.logprobs) if delta.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def _chunk(self, choice: CompletionChoice) -> str:
        return self._frame([choice], has_usage=self._continuous_usage)

    def _frame(self, choices: list[CompletionChoice], *, has_usage: bool) -> str:
        heading = self._heading
        usage = self._tally.usage() if has_usage else None
        chunk = Completion(id=heading.id, created=heading.created, model=heading.model, choices=choices, usage=usage)
        return frame(chunk, omit=None if self._include_usage else {"usage"})


class CompletionLogprobsWriter:
    """Writes one choice's logprobs, piece by piece. Owns the running character offset."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def write(self, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for entry in logprobs:
            offsets.append(self._num_chars)
            self._num_chars += len(self._decoder.decode(entry.bytes))
        return CompletionLogprobs(
            tokens=[token_name(entry) for entry in logprobs],
            token_logprobs=[finite(entry.logprob) for entry in logprobs],
            top_logprobs=[named_top(entry) for entry in logprobs],
            text_offset=offsets,
        )


def named_top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by name, and the chosen one, which may be missing there. Of equal names the first stays."""
    named: dict[str, float] = {}
    for token in (*entry.top, entry):
        named.setdefault(token_name(token), finite(token.logprob))
    return named


def token_name(entry: TokenLogprob) -> str:
    """The token's text; OpenAI's `bytes:\\x..` form where the token holds a part of a character."""
    try:
        return entry.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
