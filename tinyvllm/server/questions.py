"""Questions to the processes of a server, which pass through the supervisor: it asks, and gathers the answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

from tinyvllm.server.control import ChildLink, Message
from tinyvllm.server.process import Process

TIMEOUT_S = 20.0  # a process that has not answered by then is left out


class Questions:
    """The supervisor's side. `processes` are those that run now, by name."""

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self._processes = processes
        self._numbers = itertools.count(1)
        self._waiting: dict[tuple[int, str], asyncio.Future[Message | None]] = {}  # by question and process

    async def ask_all(self, question: str, about: str = "", *, but: str | None = None) -> dict[str, Message]:
        """The answers of all processes but one, by name. Those that die or stay silent are missing."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        answers: dict[str, asyncio.Future[Message | None]] = {}
        for name, process in self._processes.items():
            if name != but:
                answers[name] = self._waiting[number, name] = loop.create_future()
                process.send("question", number=number, question=question, about=about)
        try:
            if answers:
                await asyncio.wait(answers.values(), timeout=TIMEOUT_S)
            done = {name: answer.result() for name, answer in answers.items() if answer.done()}
            return {name: answer for name, answer in done.items() if answer is not None}
        finally:
            for name in answers:
                del self._waiting[number, name]

    def take_answer(self, name: str, message: Message) -> None:
        """A process has answered."""
        self._settle(message["number"], name, message["answer"])

    def forget(self, name: str) -> None:
        """A process has ended: nobody waits for its answers any more."""
        for number, other in list(self._waiting):
            if other == name:
                self._settle(number, name, None)

    def _settle(self, number: int, name: str, answer: Message | None) -> None:
        future = self._waiting.get((number, name))
        if future is not None and not future.done():
            future.set_result(answer)


class Asker:
    """A front-end's side, on its event loop."""

    def __init__(self, link: ChildLink) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Message]]] = {}

    async def ask_others(self, question: str, about: str = "") -> dict[str, Message]:
        """The answers of all other processes of the server, by name. Those that died or stayed silent are missing."""
        number = next(self._numbers)
        answers = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._link.send("ask", number=number, question=question, about=about)
            gathered: dict[str, Message] = await answers
            return gathered
        finally:
            del self._waiting[number]

    def take_answers(self, message: Message) -> None:
        """The supervisor has gathered the answers to a question."""
        answers = self._waiting.get(message["number"])
        if answers is not None and not answers.done():
            answers.set_result(message["answers"])
