"""From deltas to answers of /v1/chat/completions, whole and streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyvllm.server.answers import Choice, Tally, collect, finite, write_prompt_logprobs
from tinyvllm.server.events import ChunkEvents, TextEvent, frame
from tinyvllm.server.generation import Item, Job
from tinyvllm.server.intake import Heading
from tinyvllm.server.message import MessageParser, OutputFormat, ParsedMessage
from tinyvllm.server.openai.protocol.chat import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob
    from tinyvllm.server.state import ServerState


async def chat_answer(
    state: ServerState,
    job: Job,
    heading: Heading,
    format: OutputFormat,
    *,
    logprobs: bool,
    prompt_logprobs: int | None = None,
) -> ChatCompletion:
    choices, tally = [Choice() for _ in range(job.num_choices)], Tally()
    parsed = [(format.parser(), ParsedMessage()) for _ in choices]

    def add(item: Item) -> None:
        tally.add(item)
        choices[item.choice].add(item)
        parser, message = parsed[item.choice]
        message.add_all(parser.push(item.delta.text, len(item.delta.token_ids)), format)

    await collect(state, job, add)
    answers = []
    for index, (choice, (parser, message)) in enumerate(zip(choices, parsed, strict=True)):
        message.add_all(parser.flush(), format)
        answer = ChatChoice(
            index=index,
            message=_assistant_message(message),
            logprobs=chat_logprobs(choice.logprobs) if logprobs else None,
            finish_reason=parser.finish_reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
        )
        answers.append(answer)
    prompt_scores = (
        None if prompt_logprobs is None else write_prompt_logprobs(choices[0].prompt_logprobs, prompt_logprobs)
    )
    return ChatCompletion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=answers,
        usage=tally.usage(num_reasoning_tokens=format.count_reasoning(parser for parser, _ in parsed)),
        prompt_logprobs=prompt_scores,
    )


def _assistant_message(message: ParsedMessage) -> AssistantMessage:
    calls = [
        ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in message.calls
    ]
    return AssistantMessage(
        content=message.content if message.content or not calls else None,
        reasoning_content=message.reasoning or None,
        tool_calls=calls or None,
    )


class ChatEvents(ChunkEvents):
    """The events of one answer: the role of each choice, its message as it comes, its finish_reason, and the usage if
    requested. Owns the parsers of its choices and the token counts.
    """

    def __init__(
        self, heading: Heading, format: OutputFormat, *, n: int, include_usage: bool, continuous_usage: bool = False
    ) -> None:
        super().__init__(include_usage=include_usage, continuous_usage=continuous_usage)
        self._heading = heading
        self._format = format
        self._parsers = [format.parser() for _ in range(n)]

    def begin(self) -> bytes:
        roles = [
            ChatChunkChoice(index=n, delta=ChatDelta(role="assistant", content="")) for n in range(len(self._parsers))
        ]
        return b"".join(map(self._chunk, roles))

    def _write(self, item: Item) -> bytes:
        """The events of an item, made from models."""
        self._tally.add(item)
        parser = self._parsers[item.choice]
        if parser.is_plain and not self._continuous_usage and item.choice not in self._texts:
            example = ChatChunkChoice(index=item.choice, delta=ChatDelta(content=TextEvent.MARK))
            self._texts[item.choice] = TextEvent(self._chunk(example))
        return b"".join(map(self._chunk, self._choices(item, parser)))

    def _choices(self, item: Item, parser: MessageParser) -> list[ChatChunkChoice]:
        delta = item.delta
        pieces = parser.push(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            pieces += parser.flush()
        choices = [ChatChunkChoice(index=item.choice, delta=self._delta(piece)) for piece in pieces]
        if delta.logprobs:  # with the pieces that are now final, of which there may be none
            if not choices:
                choices = [ChatChunkChoice(index=item.choice, delta=ChatDelta(content=""))]
            choices[0].logprobs = chat_logprobs(delta.logprobs)
        if delta.finish_reason is not None:
            ended = ChatChunkChoice(
                index=item.choice,
                delta=ChatDelta(),
                finish_reason=parser.finish_reason(delta.finish_reason),
                stop_reason=delta.stop_reason,
            )
            choices.append(ended)
        return choices

    def _delta(self, piece: Event) -> ChatDelta:
        match piece:
            case Reasoning():
                return ChatDelta(reasoning_content=piece.text)
            case Text():
                return ChatDelta(content=piece.text)
            case CallBegin():
                assert self._format.tools is not None
                function = FunctionDelta(name=piece.name, arguments="")
                call_id = self._format.tools.make_id()
                call = ToolCallDelta(index=piece.index, id=call_id, type="function", function=function)
                return ChatDelta(tool_calls=[call])
            case CallArguments():
                call = ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))
                return ChatDelta(tool_calls=[call])

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        return self._frame([choice], has_usage=self._continuous_usage)

    def _frame(self, choices: list[ChatChunkChoice], *, has_usage: bool) -> bytes:
        heading = self._heading
        count = self._format.count_reasoning(self._parsers)
        usage = self._tally.usage(num_reasoning_tokens=count) if has_usage else None
        chunk = ChatChunk(id=heading.id, created=heading.created, model=heading.model, choices=choices, usage=usage)
        return frame(chunk, omit=None if self._include_usage else {"usage"})


def chat_logprobs(logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=finite(entry.logprob),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(token=top.token, logprob=finite(top.logprob), bytes=list(top.bytes)) for top in entry.top
                ],
            )
            for entry in logprobs
        ]
    )
