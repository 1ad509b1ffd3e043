"""`tinyvllm chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from tinyvllm.cli import transcript
from tinyvllm.cli.answer import Answer, ask, chat_question
from tinyvllm.cli.answer_view import make_view
from tinyvllm.cli.engine import ready_engine
from tinyvllm.cli.flags import Model, SamplingFlags, TerminalEngineFlags
from tinyvllm.cli.line_input import LineInput
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import err, out, without_echo
from tinyvllm.config import GenerationDefaults
from tinyvllm.errors import ContextLengthError, EngineDeadError, RequestError, TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.cli.answer_view import AnswerView
    from tinyvllm.config import SamplingParams
    from tinyvllm.engine.async_engine import AsyncEngine

HINT = "/help: commands. Ctrl-C: stop an answer. Ctrl-D: quit."
START_ANEW = "/reset starts a new conversation; a larger --max-model-len allows longer ones"


@dataclass
class Manner:
    """How a conversation is held and shown."""

    thinks: bool
    plain: bool
    shows_stats: bool


def chat(
    *,
    model: Model = DEFAULT_MODEL,
    system: Annotated[
        str | None, Option(metavar="TEXT", help="The system message. [default: from the chat template]")
    ] = None,
    no_think: Annotated[
        bool, Option("--no-think", help="Ask a reasoning model to answer without reasoning, if its template can.")
    ] = False,
    plain: Annotated[bool, Option("--plain", help="Print answers as they are, without rendering Markdown.")] = False,
    stats: Annotated[bool, Option("--stats", help="After each answer, print its speed and the context used.")] = False,
    history: Annotated[
        bool, Option(help="Keep what you type for the next chat, in chat_history in the cache directory.")
    ] = True,
    sampling: SamplingFlags,
    engine: TerminalEngineFlags,
) -> None:
    """Chat with a model in the terminal. No server is needed.

    In the chat, /help lists the commands."""
    engine.apply()
    config = engine.make_config(model, num_seqs=1, warm_up="idle")
    sampling.make_params(GenerationDefaults())  # raises for a bad value before the model is loaded
    require_model(model, pull=engine.pull)
    make_view(plain=plain)  # imports what it needs while the model is loaded
    with asyncio.Runner() as runner:
        with without_echo():
            started = runner.run(ready_engine(config, uses_adapter=bool(config.lora_modules)))
        try:
            params = sampling.make_params(started.generation_defaults)
            _require_template(started)
            conversation = _Conversation(runner, started, params, system, Manner(not no_think, plain, stats))
            lines = LineInput(keeps_history=history)
            try:
                conversation.hold(lines)
            finally:
                lines.close()
        finally:
            runner.run(started.shutdown())


def _require_template(engine: AsyncEngine) -> None:
    if engine.chat_template is None:
        raise TinyvllmError(
            "this model has no chat template: give one with --chat-template FILE, or use `tinyvllm generate --raw`"
        )


def _tell(text: str) -> None:
    """Print a message of the program, dimmed to set it apart from the model's text."""
    err.print(Text(text, style="dim"))


class _Conversation:
    """Reads messages, streams answers and runs commands. Owns the history."""

    def __init__(
        self, runner: asyncio.Runner, engine: AsyncEngine, params: SamplingParams, system: str | None, manner: Manner
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._params = params
        self._system = system
        self._manner = manner
        self._turns: list[dict[str, Any]] = []  # questions and answers
        self._num_answers = 0

    def hold(self, lines: LineInput) -> None:
        """Answer messages until the user quits. Raises EngineDeadError if the engine dies."""
        limit = self._engine.capacity.max_model_len
        _tell(f"{self._engine.served_model_name}, {limit:,} tokens of context\n{HINT}")
        while True:
            try:
                message = lines.read()
            except EOFError:
                if out.is_terminal:
                    out.print()
                return
            except KeyboardInterrupt:
                _tell("\n(/exit or Ctrl-D quits)")
                continue
            if message == "/exit":
                return
            if message.startswith("/"):
                self._run_command(message)
            elif message:
                self._answer(self._turns, message)

    # ---- Answers ----

    @property
    def _messages(self) -> list[dict[str, Any]]:
        return self._with_system(self._turns)

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return turns if self._system is None else [{"role": "system", "content": self._system}, *turns]

    def _answer(self, turns: list[dict[str, Any]], question: str) -> None:
        """Answer a question that follows `turns`. If that fails, the history is unchanged; an interrupted answer is
        kept as far as it got."""
        turns = [*turns, {"role": "user", "content": question}]
        answer, view = Answer(), make_view(plain=self._manner.plain)
        try:
            try:
                with without_echo():
                    self._runner.run(self._generate(turns, answer, view))
            except KeyboardInterrupt:
                view.close("[stopped]")
            except BaseException:
                view.abandon()
                raise
            else:
                view.close()
        except RequestError as error:
            remedy = f" ({START_ANEW})" if isinstance(error, ContextLengthError) else ""
            err.print(Text(f"error: {error}{remedy}", style="red"))
            return
        if answer.finish_reason is None and not answer.text and not answer.reasoning:
            return  # interrupted before it began
        self._turns = [*turns, answer.message]
        self._tell_end(answer)

    async def _generate(self, turns: list[dict[str, Any]], answer: Answer, view: AnswerView) -> None:
        question = chat_question(self._engine, self._with_system(turns), self._params, thinks=self._manner.thinks)
        self._num_answers += 1
        await ask(self._engine, question, [answer], view, request_id=f"chat-{self._num_answers}")

    def _tell_end(self, answer: Answer) -> None:
        num_tokens, limit = answer.num_prompt_tokens + len(answer.token_ids), self._engine.capacity.max_model_len
        if answer.finish_reason == "length":
            if len(answer.token_ids) == self._params.max_tokens:
                _tell(f"[cut after --max-tokens {self._params.max_tokens}]")
            else:
                _tell(f"[cut: the context of {limit:,} tokens is full; {START_ANEW}]")
        if self._manner.shows_stats and answer.timing is not None:
            _tell(_stats_line(answer, num_tokens, limit))

    # ---- Commands ----

    def _run_command(self, message: str) -> None:
        name, _, argument = message.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            _tell(f"{name} is not a command. {HINT}")
            return
        try:
            command.run(self, argument.strip())
        except EngineDeadError:
            raise
        except TinyvllmError as error:
            err.print(Text(f"error: {error}", style="red"))

    def help(self, _: str) -> None:
        width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            _tell(f"{f'{name} {command.argument}':<{width}}  {command.help}")
        _tell('For a message of several lines, put it between """ and """, end lines with a backslash, or paste it.')

    def set_system(self, text: str) -> None:
        if text:
            self._system = text
            _tell("The system message applies from the next answer on.")
        else:
            _tell(f"System message: {self._system or 'the chat template decides'}")

    def answer_again(self, _: str) -> None:
        last = next(
            (index for index in reversed(range(len(self._turns))) if self._turns[index]["role"] == "user"), None
        )
        if last is None:
            _tell("There is no answer yet.")
            return
        self._answer(self._turns[:last], self._turns[last]["content"])

    def save(self, name: str) -> None:
        if not name:
            _tell("Name a file: /save chat.md, or chat.json to load it again.")
            return
        path = transcript.save(name, self._engine.served_model_name, self._messages)
        _tell(f"Saved {len(self._messages)} messages in {path}")

    def load(self, name: str) -> None:
        messages = transcript.load(name)
        self._system = None
        if messages and messages[0]["role"] == "system":
            self._system, messages = messages[0]["content"], messages[1:]
        self._turns = messages
        _tell(f"Loaded {len(messages)} messages.")

    def reset(self, _: str) -> None:
        self._turns = []
        _tell("Conversation cleared.")

    def toggle_stats(self, _: str) -> None:
        self._manner.shows_stats = not self._manner.shows_stats
        _tell(f"The speed of answers is {'shown' if self._manner.shows_stats else 'not shown'}.")

    def leave(self, _: str) -> None:
        """Does nothing: `hold` handles the command."""


@dataclass(frozen=True)
class Command:
    argument: str
    help: str
    run: Callable[[_Conversation, str], None]


COMMANDS = {
    "/help": Command("", "this list", _Conversation.help),
    "/system": Command("TEXT", "set the system message; without TEXT, show it", _Conversation.set_system),
    "/regen": Command("", "answer the last message again", _Conversation.answer_again),
    "/save": Command("FILE", "write the conversation: .md to read, .json to load", _Conversation.save),
    "/load": Command("FILE", "continue a conversation saved as .json", _Conversation.load),
    "/reset": Command("", "start a new conversation, with the same system message", _Conversation.reset),
    "/stats": Command("", "show the speed of answers, or stop showing it", _Conversation.toggle_stats),
    "/exit": Command("", "quit, as Ctrl-D does", _Conversation.leave),
}


def _stats_line(answer: Answer, num_tokens: int, limit: int) -> str:
    parts = [f"{len(answer.token_ids)} tokens"]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.first_token_s is not None:
        parts.append(f"first token after {answer.first_token_s:.2f} s")
    parts.append(f"context {num_tokens:,} of {limit:,} tokens")
    return " · ".join(parts)
