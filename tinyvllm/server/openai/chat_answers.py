"""From deltas to answers of /v1/chat/completions, whole and streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyvllm.server.answers import Choice, Tally, collect, finite, id_name, write_prompt_logprobs
from tinyvllm.server.events import ChunkEvents, TextEvent, frame
from tinyvllm.server.generation import Item, Job
from tinyvllm.server.intake import Heading
from tinyvllm.server.message import MessageParser, OutputFormat, ParsedCall, ParsedMessage
from tinyvllm.server.openai.protocol.chat import (
    AssistantMessage,
    CalledCustom,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    CustomDelta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)
from tinyvllm.server.openai.protocol.tools import NO_TOOLS, Toolbox
from tinyvllm.text.tools.custom import InputReader
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.engine.output import TokenLogprob
    from tinyvllm.server.request_times import RequestTimes
    from tinyvllm.server.state import ServerState


async def chat_answer(
    state: ServerState,
    job: Job,
    heading: Heading,
    format: OutputFormat,
    *,
    form: CallForm,
    logprobs: bool,
    prompt_logprobs: int | None = None,
    tokens: TokenForm,
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
            message=_assistant_message(message, form),
            logprobs=chat_logprobs(choice.logprobs, tokens.names_ids) if logprobs else None,
            finish_reason=form.finish_reason(parser.finish_reason(choice.finish_reason)),
            stop_reason=choice.stop_reason,
            token_ids=None if tokens.prompt_ids is None else choice.token_ids,
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
        prompt_token_ids=tokens.prompt_ids,
    )


@dataclass(frozen=True)
class TokenForm:
    """Which token ids an answer includes."""

    prompt_ids: list[int] | None = None  # None: no ids
    names_ids: bool = False  # logprobs name tokens by id


@dataclass(frozen=True)
class CallForm:
    """The form of calls for a client."""

    toolbox: Toolbox = NO_TOOLS
    uses_functions: bool = False  # OpenAI's form before tools: a message has one call, without an id

    def is_custom(self, name: str) -> bool:
        offer = self.toolbox.find(name)
        return offer is not None and offer.is_custom

    def finish_reason(self, reason: str) -> str:
        return "function_call" if self.uses_functions and reason == "tool_calls" else reason

    def call(self, call: ParsedCall) -> ToolCall:
        if not self.is_custom(call.name):
            return ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
        reader = InputReader()
        text = reader.push(call.arguments) + reader.flush()
        return ToolCall(id=call.id, type="custom", custom=CalledCustom(name=call.name, input=text))


_PLAIN = CallForm()
_NO_IDS = TokenForm()


def _assistant_message(message: ParsedMessage, form: CallForm) -> AssistantMessage:
    calls = [form.call(call) for call in message.calls]
    return AssistantMessage(
        content=message.content if message.content or not calls else None,
        reasoning_content=message.reasoning or None,
        tool_calls=None if form.uses_functions else calls or None,
        function_call=calls[0].function if calls and form.uses_functions else None,
    )


class _CallDeltas:
    """Writes the pieces of one choice's calls. Owns the reader of the custom call that is open, if one is."""

    def __init__(self, form: CallForm, format: OutputFormat) -> None:
        self._form = form
        self._format = format
        self._reader: InputReader | None = None
        self._index = 0  # of the latest call

    def begin(self, piece: CallBegin) -> list[ChatDelta]:
        deltas = self.end()
        self._index = piece.index
        if self._form.uses_functions:
            return [*deltas, ChatDelta(function_call=FunctionDelta(name=piece.name, arguments=""))]
        assert self._format.tools is not None
        call = ToolCallDelta(index=piece.index, id=self._format.tools.make_id(), type="function")
        if self._form.is_custom(piece.name):
            self._reader = InputReader()
            call.type, call.custom = "custom", CustomDelta(name=piece.name, input="")
        else:
            call.function = FunctionDelta(name=piece.name, arguments="")
        return [*deltas, ChatDelta(tool_calls=[call])]

    def add(self, piece: CallArguments) -> list[ChatDelta]:
        if self._reader is not None:
            return self._input(self._reader.push(piece.text))
        function = FunctionDelta(arguments=piece.text)
        if self._form.uses_functions:
            return [ChatDelta(function_call=function)]
        return [ChatDelta(tool_calls=[ToolCallDelta(index=piece.index, function=function)])]

    def end(self) -> list[ChatDelta]:
        """The rest of a custom call, before the next one or at the end."""
        reader, self._reader = self._reader, None
        return [] if reader is None else self._input(reader.flush())

    def _input(self, text: str) -> list[ChatDelta]:
        call = ToolCallDelta(index=self._index, custom=CustomDelta(input=text))
        return [ChatDelta(tool_calls=[call])] if text else []


class ChatEvents(ChunkEvents):
    """The events of one answer: the role of each choice, its message as it comes, its finish_reason, and the usage if
    requested. Owns the parsers of its choices and the token counts.
    """

    def __init__(
        self,
        heading: Heading,
        format: OutputFormat,
        *,
        n: int,
        include_usage: bool,
        continuous_usage: bool = False,
        form: CallForm = _PLAIN,
        tokens: TokenForm = _NO_IDS,
        times: RequestTimes | None = None,
    ) -> None:
        super().__init__(include_usage=include_usage, continuous_usage=continuous_usage, times=times)
        self._heading = heading
        self._format = format
        self._form = form
        self._tokens = tokens
        self._parsers = [format.parser() for _ in range(n)]
        self._calls = [_CallDeltas(form, format) for _ in range(n)]

    def begin(self) -> bytes:
        roles = [
            ChatChunkChoice(index=n, delta=ChatDelta(role="assistant", content="")) for n in range(len(self._parsers))
        ]
        first, *others = roles
        events = self._frame([first], has_usage=self._continuous_usage, prompt_ids=self._tokens.prompt_ids)
        return events + b"".join(map(self._chunk, others))

    def _write(self, item: Item) -> bytes:
        """The events of an item, serialized from models."""
        self._tally.add(item)
        parser = self._parsers[item.choice]
        shows_ids = self._tokens.prompt_ids is not None
        is_plain = parser.is_plain and not self._continuous_usage and not shows_ids and self._times is None
        if is_plain and item.choice not in self._texts:
            example = ChatChunkChoice(index=item.choice, delta=ChatDelta(content=TextEvent.MARK))
            self._texts[item.choice] = TextEvent(self._chunk(example))
        return b"".join(map(self._chunk, self._choices(item, parser)))

    def _choices(self, item: Item, parser: MessageParser) -> list[ChatChunkChoice]:
        delta = item.delta
        pieces = parser.push(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            pieces += parser.flush()
        calls = self._calls[item.choice]
        deltas = [delta for piece in pieces for delta in _deltas(piece, calls)]
        if delta.finish_reason is not None:
            deltas += calls.end()
        choices = [ChatChunkChoice(index=item.choice, delta=delta) for delta in deltas]
        token_ids = None if self._tokens.prompt_ids is None else list(delta.token_ids)
        if delta.logprobs or token_ids:  # with the pieces that are now final, if any
            if not choices:
                choices = [ChatChunkChoice(index=item.choice, delta=ChatDelta(content=""))]
            choices[0].token_ids = token_ids
        if delta.logprobs:
            choices[0].logprobs = chat_logprobs(delta.logprobs, self._tokens.names_ids)
        if delta.finish_reason is not None:
            ended = ChatChunkChoice(
                index=item.choice,
                delta=ChatDelta(),
                finish_reason=self._form.finish_reason(parser.finish_reason(delta.finish_reason)),
                stop_reason=delta.stop_reason,
            )
            choices.append(ended)
        return choices

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        return self._frame([choice], has_usage=self._continuous_usage)

    def _frame(self, choices: list[ChatChunkChoice], *, has_usage: bool, prompt_ids: list[int] | None = None) -> bytes:
        heading = self._heading
        count = self._format.count_reasoning(self._parsers)
        usage = self._tally.usage(num_reasoning_tokens=count) if has_usage else None
        chunk = ChatChunk(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_ids,
            timings=self._timings(),
        )
        return frame(chunk, omit=None if self._include_usage else {"usage"})


def _deltas(piece: Event, calls: _CallDeltas) -> list[ChatDelta]:
    match piece:
        case Reasoning():
            return [ChatDelta(reasoning_content=piece.text)]
        case Text():
            return [ChatDelta(content=piece.text)]
        case CallBegin():
            return calls.begin(piece)
        case CallArguments():
            return calls.add(piece)


def chat_logprobs(logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob], names_ids: bool = False) -> ChatLogprobs:
    """names_ids: tokens are named by their ids."""

    def name(token: TokenLogprob) -> str:
        return id_name(token) if names_ids else token.token

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=name(entry),
                logprob=finite(entry.logprob),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(token=name(top), logprob=finite(top.logprob), bytes=list(top.bytes)) for top in entry.top
                ],
            )
            for entry in logprobs
        ]
    )
