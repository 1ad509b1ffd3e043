"""From messages or a text to an answer, for the commands that generate in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import EngineDeadError, RequestError
from tinyvllm.text.tools.events import Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.cli.answer_view import AnswerView
    from tinyvllm.config import SamplingParams
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import Delta, Timing, TokenLogprob
    from tinyvllm.server.message import MessageParser, OutputFormat


@dataclass(frozen=True)
class Question:
    """A prompt for the engine, and how its output is parsed. format: None for raw text."""

    ids: list[int]
    params: SamplingParams
    format: OutputFormat | None


@dataclass
class Answer:
    """One answer, complete or in progress."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    timing: Timing | None = None  # once it is finished

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the next message of the conversation."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.text, **reasoning}

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the question to the first token."""
        return None if self.timing is None else self.timing.first_token_s - self.timing.submitted_s

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token; None for fewer than two tokens."""
        if self.timing is None or len(self.token_ids) < 2:
            return None
        seconds = self.timing.last_token_s - self.timing.first_token_s
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else None

    @property
    def draft_counts(self) -> dict[str, int]:
        """Drafted tokens that were verified, and those accepted, by llama.cpp's names; empty without any."""
        if self.timing is None or not self.timing.num_drafted:
            return {}
        return {"draft_n": self.timing.num_drafted, "draft_n_accepted": self.timing.num_accepted}

    def add(self, delta: Delta) -> None:
        """Record everything but the text, which may need parsing."""
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_prompt_tokens, self.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
        self.timing = delta.timing or self.timing


def chat_question(
    engine: AsyncEngine, messages: Sequence[Mapping[str, Any]], params: SamplingParams, *, thinks: bool = True
) -> Question:
    """The messages in the model's chat template. Raises RequestError if the template refuses them.

    thinks: False asks a template that can do without reasoning to leave it out."""
    from tinyvllm.server.conversation import Conversation, make_prompt  # here: --help needs neither
    from tinyvllm.server.sampling import params_for

    arguments = {} if thinks else {"enable_thinking": False}
    prompt = make_prompt(Conversation(messages, template_arguments=arguments), engine)
    return Question(prompt.ids, replace(params, **params_for(prompt.special_tokens)), prompt.format)


def raw_question(engine: AsyncEngine, text: str, params: SamplingParams) -> Question:
    """The text itself as the prompt, without a template."""
    return Question(engine.tokenizer.encode(text), params, None)


async def ask(
    engine: AsyncEngine, question: Question, answers: Sequence[Answer], view: AnswerView | None, *, request_id: str
) -> None:
    """Generate into `answers`, one for each of params.n, and show the first in `view` as it comes.

    Raises RequestError if the engine refuses or fails, and EngineDeadError if it has stopped."""
    parsers = [None if question.format is None else question.format.parser() for _ in answers]
    async with contextlib.aclosing(engine.generate(question.ids, question.params, request_id=request_id)) as deltas:
        async for delta in deltas:
            if delta.finish_reason == "abort":
                raise EngineDeadError("generation failed: the engine aborted the request")
            if delta.finish_reason == "error":
                raise RequestError(f"generation failed: {delta.error}")
            answer = answers[delta.index]
            answer.add(delta)
            _take_text(answer, delta, parsers[delta.index], view if delta.index == 0 else None)


def _take_text(answer: Answer, delta: Delta, parser: MessageParser | None, view: AnswerView | None) -> None:
    pieces: list[Event] = [Text(delta.text)]
    if parser is not None:
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.flush()
    for piece in pieces:
        match piece:
            case Reasoning():
                answer.reasoning += piece.text
                if view is not None:
                    view.reasoning(piece.text)
            case Text():
                answer.text += piece.text
                if view is not None:
                    view.content(piece.text)
