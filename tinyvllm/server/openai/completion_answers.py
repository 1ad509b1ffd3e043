"""From deltas to answers of /v1/completions, whole and streamed."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinyvllm.engine.output import TokenLogprob
from tinyvllm.server.answers import finite, gather, id_name, write_prompt_logprobs
from tinyvllm.server.events import ChunkEvents, TextEvent, frame
from tinyvllm.server.generation import Item, Job
from tinyvllm.server.intake import Heading
from tinyvllm.server.openai.protocol.completions import Completion, CompletionChoice, CompletionLogprobs

if TYPE_CHECKING:
    from tinyvllm.server.request_times import RequestTimes
    from tinyvllm.server.state import ServerState

EMPTY_LOGPROBS = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


@dataclass(frozen=True)
class Echo:
    """The part of a prompt that its choices repeat."""

    text: str = ""
    first_token: bytes = b""  # the prompt's first, which has no logprob
    first_id: int = 0


@dataclass(frozen=True)
class CompletionForm:
    """What an answer includes."""

    n: int
    echoes: list[Echo]  # one per prompt
    has_logprobs: bool = False
    num_echoed_top: int | None = None  # likeliest tokens for each echoed one; None: no logprobs of the echo
    num_prompt_logprobs: int | None = None
    prompt_ids: list[list[int]] | None = None  # None: the answer has no token ids
    names_ids: bool = False  # logprobs name tokens by their ids
    has_output: bool = True  # False for max_tokens=0: hide the one token that the engine has to generate

    @property
    def num_choices(self) -> int:
        return self.n * len(self.echoes)


async def completion_answer(state: ServerState, job: Job, heading: Heading, form: CompletionForm) -> Completion:
    choices, tally = await gather(state, job)
    answers = []
    for index, choice in enumerate(choices):
        scores = choices[index - index % form.n].prompt_logprobs  # they come with a prompt's first choice
        echo, writer = form.echoes[index // form.n], CompletionLogprobsWriter(names_ids=form.names_ids)
        logprobs = None
        if form.has_logprobs:
            logprobs = EMPTY_LOGPROBS if form.num_echoed_top is None else writer.echo(echo, scores, form.num_echoed_top)
            logprobs = logprobs.then(writer.write(choice.logprobs if form.has_output else []))
        answer = CompletionChoice(
            index=index,
            text=echo.text + (choice.text if form.has_output else ""),
            logprobs=logprobs,
            finish_reason=choice.finish_reason if form.has_output else "length",
            stop_reason=choice.stop_reason if form.has_output else None,
        )
        if form.num_prompt_logprobs is not None:
            answer.prompt_logprobs = write_prompt_logprobs(scores, form.num_prompt_logprobs)
        if form.prompt_ids is not None:
            answer.token_ids = choice.token_ids if form.has_output else []
            answer.prompt_token_ids = form.prompt_ids[index // form.n]
        answers.append(answer)
    return Completion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=answers,
        usage=tally.usage(has_output=form.has_output),
    )


class CompletionEvents(ChunkEvents):
    """The events of one answer: the echo of each choice if any, its text as it comes, and the usage if requested.

    Owns the logprob offsets of its choices and the token counts.
    """

    def __init__(
        self,
        heading: Heading,
        form: CompletionForm,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        times: RequestTimes | None = None,
    ) -> None:
        super().__init__(include_usage=include_usage, continuous_usage=continuous_usage, times=times)
        self._heading = heading
        self._form = form
        self._writers = [CompletionLogprobsWriter(names_ids=form.names_ids) for _ in range(form.num_choices)]
        # a prompt whose echo waits for its logprobs -> the items that must follow the echo
        self._waiting: dict[int, list[Item]] = {}
        # choices whose first chunk, which has the prompt's ids, is still to come
        self._unbegun = set(range(form.num_choices)) if form.prompt_ids is not None else set()

    def begin(self) -> bytes:
        echoes = b""
        for prompt, echo in enumerate(self._form.echoes):
            if echo.text and self._form.num_echoed_top is not None:
                self._waiting[prompt] = []
            elif echo.text:
                for index in range(prompt * self._form.n, (prompt + 1) * self._form.n):
                    echoes += self._chunk(CompletionChoice(index=index, text=echo.text))
        return echoes

    def _write(self, item: Item) -> bytes:
        """The events of an item, made from models."""
        self._tally.add(item)
        form = self._form
        is_plain = form.has_output and form.prompt_ids is None and not self._continuous_usage
        is_plain = is_plain and item.prompt not in self._waiting and self._times is None
        if is_plain and item.choice not in self._texts:
            example = CompletionChoice(index=item.choice, text=TextEvent.MARK)
            self._texts[item.choice] = TextEvent(self._chunk(example))
        return b"".join(map(self._chunk, self._choices(item)))

    def _choices(self, item: Item) -> list[CompletionChoice]:
        if item.prompt not in self._waiting:
            return self._choice(item)
        self._waiting[item.prompt].append(item)
        scores = item.delta.prompt_logprobs
        if scores is None:
            return []
        form, echo, num_top = self._form, self._form.echoes[item.prompt], self._form.num_echoed_top
        assert num_top is not None
        choices = [
            CompletionChoice(index=index, text=echo.text, logprobs=self._writers[index].echo(echo, scores, num_top))
            for index in range(item.prompt * form.n, (item.prompt + 1) * form.n)
        ]
        for held in self._waiting.pop(item.prompt):
            choices += self._choice(held)
        return choices

    def _choice(self, item: Item) -> list[CompletionChoice]:
        delta = item.delta
        is_last = delta.finish_reason is not None
        if not self._form.has_output:
            return [CompletionChoice(index=item.choice, text="", finish_reason="length")] if is_last else []
        token_ids = None if self._form.prompt_ids is None else list(delta.token_ids)
        if not delta.text and not delta.logprobs and not token_ids and not is_last:
            return []
        choice = CompletionChoice(
            index=item.choice,
            text=delta.text,
            logprobs=self._writers[item.choice].write(delta.logprobs) if delta.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=token_ids,
        )
        return [choice]

    def _chunk(self, choice: CompletionChoice) -> bytes:
        if choice.index in self._unbegun:
            assert self._form.prompt_ids is not None
            choice.prompt_token_ids = self._form.prompt_ids[choice.index // self._form.n]
            self._unbegun.remove(choice.index)
        return self._frame([choice], has_usage=self._continuous_usage)

    def _frame(self, choices: list[CompletionChoice], *, has_usage: bool) -> bytes:
        heading = self._heading
        usage = self._tally.usage(has_output=self._form.has_output) if has_usage else None
        chunk = Completion(id=heading.id, created=heading.created, model=heading.model, choices=choices, usage=usage)
        chunk.timings = self._timings()
        return frame(chunk, omit=None if self._include_usage else {"usage"})


class CompletionLogprobsWriter:
    """Writes one choice's logprobs incrementally. Owns the running character offset."""

    def __init__(self, *, names_ids: bool) -> None:
        self._name = id_name if names_ids else token_name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def echo(self, echo: Echo, scores: tuple[TokenLogprob | None, ...] | None, num_top: int) -> CompletionLogprobs:
        """The prompt's logprobs. The first token has none, because nothing predicts it."""
        self._num_chars = len(self._decoder.decode(echo.first_token))
        first = CompletionLogprobs(
            tokens=[self._name(_first(echo))], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
        )
        known = [replace(score, top=score.top[:num_top]) for score in scores or () if score is not None]
        return first.then(self.write(known))

    def write(self, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for entry in logprobs:
            offsets.append(self._num_chars)
            self._num_chars += len(self._decoder.decode(entry.bytes))
        return CompletionLogprobs(
            tokens=[self._name(entry) for entry in logprobs],
            token_logprobs=[finite(entry.logprob) for entry in logprobs],
            top_logprobs=[named_top(entry, self._name) for entry in logprobs],
            text_offset=offsets,
        )


def _first(echo: Echo) -> TokenLogprob:
    """A prompt's first token, which has no logprob."""
    return TokenLogprob(token_id=echo.first_id, token="", bytes=echo.first_token, logprob=0.0)


def named_top(entry: TokenLogprob, name: Callable[[TokenLogprob], str]) -> dict[str, float]:
    """The logprobs of the likeliest tokens and of the chosen one, by name. The first of equal names is kept."""
    named: dict[str, float] = {}
    for token in (*entry.top, entry):
        named.setdefault(name(token), finite(token.logprob))
    return named


def token_name(entry: TokenLogprob) -> str:
    return bytes_name(entry.bytes)


def bytes_name(data: bytes) -> str:
    """A token's text; OpenAI's `bytes:\\x..` form if the token holds part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
