"""`tinyvllm chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Option

from tinyvllm.cli.engine import ready_engine
from tinyvllm.cli.flags import EngineFlags, Model, SamplingFlags
from tinyvllm.cli.generate import write
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import err, out
from tinyvllm.config import GenerationDefaults
from tinyvllm.errors import EngineDeadError, RequestError, TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL
from tinyvllm.text.tools.events import Event, Reasoning
from tinyvllm.text.tools.events import Text as ContentText

if TYPE_CHECKING:
    from tinyvllm.config import SamplingParams
    from tinyvllm.engine.async_engine import AsyncEngine

HELP = "Ctrl-C stops an answer, /reset clears the conversation, /exit or Ctrl-D quits."


def chat(
    *,
    model: Model = DEFAULT_MODEL,
    system: Annotated[
        str | None, Option(metavar="TEXT", help="The system message. [default: from the chat template]")
    ] = None,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Chat with a model in the terminal. No server is needed."""
    engine.apply()
    config = engine.make_config(model, num_seqs=1, warm_up="background")
    sampling.make_params(GenerationDefaults())  # raises for a bad value before the model is loaded
    require_model(model, pull=engine.pull)
    with contextlib.suppress(ImportError):  # gives input() line editing and history, if Python was built with it
        import readline  # noqa: F401
    with asyncio.Runner() as runner:
        started = runner.run(ready_engine(config))
        try:
            params = sampling.make_params(started.generation_defaults)
            _require_template(started)
            _Conversation(runner, started, params, system).hold()
        finally:
            runner.run(started.shutdown())


def _require_template(engine: AsyncEngine) -> None:
    if engine.chat_template is None:
        raise TinyvllmError(
            "this model has no chat template: give one with --chat-template FILE, or use `tinyvllm generate`"
        )


class _Conversation:
    """Reads lines and streams answers. Owns the message history."""

    def __init__(
        self,
        runner: asyncio.Runner,
        engine: AsyncEngine,
        params: SamplingParams,
        system: str | None,
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._num_answers = 0

    def hold(self) -> None:
        """Answer lines until the user quits. Raises EngineDeadError if the engine dies."""
        out.print(Text(HELP, style="dim"))
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                out.print()
                return
            except KeyboardInterrupt:
                out.print()
                continue
            if line == "/exit":
                return
            if line == "/reset":
                self._messages = list(self._opening)
                out.print(Text("Conversation cleared.", style="dim"))
            elif line.startswith("/"):
                out.print(Text(f"{line} is not a command. {HELP}", style="dim"))
            elif line:
                self._take_turn(line)

    def _take_turn(self, line: str) -> None:
        """Answer one question. An answer that was interrupted stays in the history as far as it got."""
        self._messages.append({"role": "user", "content": line})
        said: dict[str, str] = {"content": ""}
        try:
            self._runner.run(self._answer(said))
        except KeyboardInterrupt:
            write(" [stopped]")
        except RequestError as error:
            self._messages.pop()
            err.print(Text(f"error: {error} (/reset clears the conversation)", style="red"))
            return
        write("\n")
        self._messages.append({"role": "assistant", **said})

    async def _answer(self, said: dict[str, str]) -> None:
        """Show an answer as it comes, and note it in `said`: its content, and its reasoning if there is any."""
        from tinyvllm.server.conversation import Conversation, make_prompt  # here: --help needs neither
        from tinyvllm.server.sampling import params_for

        prompt = make_prompt(Conversation(self._messages), self._engine)
        parser = prompt.format.parser()
        params = replace(self._params, **params_for(prompt.special_tokens))
        self._num_answers += 1
        answer = self._engine.generate(prompt.ids, params, request_id=f"chat-{self._num_answers}")
        async with contextlib.aclosing(answer) as deltas:
            async for delta in deltas:
                if delta.finish_reason == "abort":
                    raise EngineDeadError("the engine aborted the answer")
                if delta.finish_reason == "error":
                    raise RequestError(f"generation failed: {delta.error}")
                self._show(parser.push(delta.text), said)
                if delta.finish_reason is not None:
                    self._show(parser.flush(), said)

    def _show(self, pieces: Sequence[Event], said: dict[str, str]) -> None:
        for piece in pieces:
            match piece:
                case Reasoning():
                    out.print(Text(piece.text, style="dim"), end="", soft_wrap=True)
                    said["reasoning_content"] = said.get("reasoning_content", "") + piece.text
                case ContentText():
                    if "reasoning_content" in said and not said["content"]:
                        write("\n\n")
                    write(piece.text)
                    said["content"] += piece.text
