"""From deltas to answers: the two formats, whole and streamed, with their two shapes of logprobs."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyvllm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ContentDelta,
    EmptyDelta,
    RoleDelta,
    TopLogprob,
)
from tinyvllm.server.streaming import Item, Tally, frame

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI and vLLM write this number


@dataclass(frozen=True)
class Heading:
    """What every chunk of one answer repeats."""

    id: str
    created: int
    model: str


@dataclass
class _Choice:
    """One choice, gathered."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None

    def add(self, item: Item) -> None:
        self.texts.append(item.delta.text)
        self.logprobs += item.delta.logprobs
        if item.delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = item.delta.finish_reason, item.delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def _gather(items: AsyncGenerator[Item, None], num_choices: int) -> tuple[list[_Choice], Tally]:
    choices, tally = [_Choice() for _ in range(num_choices)], Tally()
    async with contextlib.aclosing(items):
        async for item in items:
            tally.add(item)
            choices[item.choice].add(item)
    return choices, tally


# ---- Chat ----


async def chat_answer(items: AsyncGenerator[Item, None], heading: Heading, *, n: int, logprobs: bool) -> ChatCompletion:
    choices, tally = await _gather(items, n)
    answers = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=choice.text),
            logprobs=_chat_logprobs(choice.logprobs) if logprobs else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for index, choice in enumerate(choices)
    ]
    return ChatCompletion(
        id=heading.id, created=heading.created, model=heading.model, choices=answers, usage=tally.usage()
    )


async def chat_frames(
    items: AsyncGenerator[Item, None], heading: Heading, *, n: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The role of each choice, its content as it comes, its finish_reason, and the usage if asked."""
    omit = None if include_usage else {"usage"}
    tally = Tally()

    def chunk(choice: ChatChunkChoice) -> str:
        return frame(
            ChatChunk(id=heading.id, created=heading.created, model=heading.model, choices=[choice]), omit=omit
        )

    for index in range(n):
        yield chunk(ChatChunkChoice(index=index, delta=RoleDelta()))
    async with contextlib.aclosing(items):
        async for item in items:
            tally.add(item)
            delta = item.delta
            if delta.text or delta.logprobs:
                logprobs = _chat_logprobs(delta.logprobs) if delta.logprobs else None
                yield chunk(
                    ChatChunkChoice(index=item.choice, delta=ContentDelta(content=delta.text), logprobs=logprobs)
                )
            if delta.finish_reason is not None:
                ended = ChatChunkChoice(
                    index=item.choice,
                    delta=EmptyDelta(),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
                yield chunk(ended)
    if include_usage:
        yield frame(
            ChatChunk(id=heading.id, created=heading.created, model=heading.model, choices=[], usage=tally.usage())
        )


def _chat_logprobs(logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=max(entry.logprob, LOWEST_LOGPROB),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(token=top.token, logprob=max(top.logprob, LOWEST_LOGPROB), bytes=list(top.bytes))
                    for top in entry.top
                ],
            )
            for entry in logprobs
        ]
    )


# ---- Completions ----


async def completion_answer(
    items: AsyncGenerator[Item, None], heading: Heading, *, n: int, echoes: list[str], logprobs: bool
) -> Completion:
    """`echoes` is the text to put before each prompt's choices: one string a prompt."""
    choices, tally = await _gather(items, n * len(echoes))
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


async def completion_frames(
    items: AsyncGenerator[Item, None], heading: Heading, *, n: int, echoes: list[str], include_usage: bool
) -> AsyncGenerator[str, None]:
    """The echo of each choice if there is one, its text as it comes, and the usage if asked."""
    omit = None if include_usage else {"usage"}
    tally = Tally()
    writers: dict[int, CompletionLogprobsWriter] = {}

    def chunk(choice: CompletionChoice) -> str:
        return frame(
            Completion(id=heading.id, created=heading.created, model=heading.model, choices=[choice]), omit=omit
        )

    for index in range(n * len(echoes)):
        if echoes[index // n]:
            yield chunk(CompletionChoice(index=index, text=echoes[index // n]))
    async with contextlib.aclosing(items):
        async for item in items:
            tally.add(item)
            delta = item.delta
            if delta.text or delta.logprobs or delta.finish_reason is not None:
                writer = writers.setdefault(item.choice, CompletionLogprobsWriter())
                piece = CompletionChoice(
                    index=item.choice,
                    text=delta.text,
                    logprobs=writer.write(delta.logprobs) if delta.logprobs else None,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
                yield chunk(piece)
    if include_usage:
        yield frame(
            Completion(id=heading.id, created=heading.created, model=heading.model, choices=[], usage=tally.usage())
        )


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
            tokens=[_token_name(entry) for entry in logprobs],
            token_logprobs=[max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
            top_logprobs=[_top(entry) for entry in logprobs],
            text_offset=offsets,
        )


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by name, and the chosen one, which may be missing there. Of equal names the first stays."""
    named: dict[str, float] = {}
    for token in (*entry.top, entry):
        named.setdefault(_token_name(token), max(token.logprob, LOWEST_LOGPROB))
    return named


def _token_name(entry: TokenLogprob) -> str:
    """The token's text; OpenAI's `bytes:\\x..` form where the token holds a part of a character."""
    try:
        return entry.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
