"""An engine that answers by a script, behind the real app on a real socket: agents run against it without a model.

Only the engine is scripted. Prompts come from a real chat template, and replies are in the model's own format, so that
the template's adapter and the parser of tool calls run as they do for a model.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.agents.recorder import Recorder, Request
from tests.server.fake_engine import FakeEngine, serving_app
from tinyvllm.server.app import make_app
from tinyvllm.server.settings import ServerSettings
from tinyvllm.text.chat import ChatTemplate

TEMPLATE = Path(__file__).parent / "qwen2_5.jinja"
REASONING_TEMPLATE = Path(__file__).parent / "qwen3.jinja"  # the same calls, after a reasoning in <think>
BLOCK_SIZE = 16  # of the prefix cache, in tokens


@dataclass(frozen=True)
class Turn:
    """What to answer a prompt that `when` holds for: one that contains that text, or for which it returns True."""

    when: str | Callable[[str], bool]
    reply: str | Callable[[str], str]  # in the format of the template's model, or made from the prompt

    def matches(self, prompt: str) -> bool:
        return self.when in prompt if isinstance(self.when, str) else self.when(prompt)

    def answer(self, prompt: str) -> str:
        return self.reply if isinstance(self.reply, str) else self.reply(prompt)


def call(name: str, **arguments: Any) -> str:
    """A tool call as Qwen 2.5 and other models of the Hermes format write it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def thought(reply: str) -> str:
    """A reply that follows a reasoning, as Qwen 3 and others write it."""
    return f"<think>\nThis needs some care.\n</think>\n\n{reply}"


def num_results(prompt: str) -> int:
    """How many results of tools the conversation has."""
    return prompt.count("\n</tool_response>")


def loop(task: str, *replies: str | Callable[[str], str]) -> list[Turn]:
    """The turns of a conversation in which `task` occurs: the n-th reply answers n results of tools.

    All but the last reply must make one tool call each. Requests without tools, such as for a title, are other ones.
    """

    def has_results(number: int) -> Callable[[str], bool]:
        return lambda prompt: "<tools>" in prompt and task in prompt and num_results(prompt) == number

    return [Turn(has_results(number), reply) for number, reply in enumerate(replies)]


@dataclass
class ScriptedEngine(FakeEngine):
    """Answers with the first turn of the script that matches the rendered prompt, else with `reply`.

    Turns are not consumed: a client that sends a request again gets the same answer. A token is a byte. Tokens count as
    cached if an earlier prompt began with the same whole blocks.
    """

    script: Sequence[Turn] = ()
    reply: str = "All right."  # to what the script has no turn for, such as a request for a title
    max_model_len: int = 1_000_000
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        # room for four conversations, as an agent's requests run side by side
        self.capacity = replace(self.capacity, num_blocks=4 * self.max_model_len // BLOCK_SIZE + 1)

    def reply_to(self, prompt_ids: list[int]) -> str:
        prompt = bytes(prompt_ids).decode()
        self.prompts.append(prompt)
        turn = next((turn for turn in self.script if turn.matches(prompt)), None)
        return self.reply if turn is None else turn.answer(prompt)

    def count_cached(self, prompt_ids: list[int]) -> int:
        prompt = bytes(prompt_ids)
        earlier = (bytes(call.prompt_ids) for call in self.calls[:-1])
        longest = max((shared_length(prompt, other) for other in earlier), default=0)
        return min(longest, len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last token is always computed


def shared_length(first: bytes, second: bytes) -> int:
    """The length of the longest prefix of both."""
    differences = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


@dataclass(frozen=True)
class ScriptedServer:
    url: str  # without /v1
    engine: ScriptedEngine
    recorder: Recorder

    @property
    def requests(self) -> list[Request]:
        return self.recorder.requests

    def check_cache(self, task: str) -> None:
        """Assert that each turn of the conversation about `task` finds the turn before it in the prefix cache.

        All of it but the prompt's end, which a template replaces by the answer."""
        turns = [prompt for prompt in self.engine.prompts if "<tools>" in prompt and task in prompt]
        assert len(turns) > 1
        for before, after in itertools.pairwise(turns):
            shared = shared_length(before.encode(), after.encode())
            assert shared > len(before.encode()) - 100, f"{shared=} {before[shared:][:80]!r} {after[shared:][:80]!r}"


def make_scripted_engine(
    reply: str = "All right.",
    *,
    script: Sequence[Turn] = (),
    template: Path = TEMPLATE,
    max_model_len: int = ScriptedEngine.max_model_len,
) -> ScriptedEngine:
    source = template.read_text(encoding="utf-8")
    chat_template = ChatTemplate({"default": source}, {"bos_token": "", "eos_token": "<|im_end|>"}, "scripted")
    return ScriptedEngine(
        script=script,
        reply=reply,
        chat_template=chat_template,  # type: ignore[arg-type]
        max_model_len=max_model_len,
    )


@contextlib.contextmanager
def scripted_server(
    script: Sequence[Turn],
    template: Path = TEMPLATE,
    *,
    max_model_len: int = ScriptedEngine.max_model_len,
    **settings: Any,
) -> Iterator[ScriptedServer]:
    """A server on loopback whose model "tiny" answers by `script`. settings: those of ServerSettings."""
    engine = make_scripted_engine(script=script, template=template, max_model_len=max_model_len)
    recorder = Recorder(make_app(engine, ServerSettings(**settings)))  # type: ignore[arg-type]
    with serving_app(recorder) as url:
        yield ScriptedServer(url, engine, recorder)
