"""Questions to the processes of a server, which pass through the supervisor: it asks, and gathers the answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Mapping

from tinyvllm.server.control import ChildLink, Message
from tinyvllm.server.process import Process

log = logging.getLogger(__name__)

# Questions to which at most one front-end knows the answer: about a stored response, or one of its items.
GET_RESPONSE, REMOVE_RESPONSE, CANCEL_RESPONSE = "get_response", "remove_response", "cancel_response"
GET_ITEM, GET_EVENTS = "get_item", "get_events"
OF_RESPONSES = (GET_RESPONSE, REMOVE_RESPONSE, CANCEL_RESPONSE, GET_ITEM, GET_EVENTS)
# About requests that have been answered: where the time of one went, and which there are.
GET_REQUEST, LIST_REQUESTS = "get_request", "list_requests"
OF_ONE_FRONT_END = (*OF_RESPONSES, GET_REQUEST)

ALL_TIMEOUT_S = 8.0  # a process that has not answered by then is left out; one may write a long recording
FIRST_TIMEOUT_S = 1.0  # for a question of which the processes just look up the answer


class Questions:
    """The supervisor's side. `processes` are those that run now, by name."""

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self._processes = processes
        self._numbers = itertools.count(1)
        self._waiting: dict[tuple[int, str], asyncio.Future[Message | None]] = {}  # by question and process

    async def ask_all(self, question: str, about: str = "", *, but: str | None = None) -> dict[str, Message]:
        """The answers of all processes but one, by name. Those that die or stay silent are missing."""
        processes = [process for name, process in self._processes.items() if name != but]
        return await self._ask(processes, question, about, ALL_TIMEOUT_S, takes_first=False)

    async def ask_first(self, processes: Iterable[Process], question: str, about: str) -> dict[str, Message]:
        """The first answer that is not empty, with the empty ones before it, by name."""
        return await self._ask(processes, question, about, FIRST_TIMEOUT_S, takes_first=True)

    async def _ask(
        self, processes: Iterable[Process], question: str, about: str, timeout_s: float, *, takes_first: bool
    ) -> dict[str, Message]:
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        futures: dict[str, asyncio.Future[Message | None]] = {}
        for process in processes:
            futures[process.name] = self._waiting[number, process.name] = loop.create_future()
            process.send("question", number=number, question=question, about=about)
        try:
            pending = set(futures.values())
            while pending and loop.time() < end_s and not (takes_first and any(_results(futures).values())):
                condition = asyncio.FIRST_COMPLETED if takes_first else asyncio.ALL_COMPLETED
                _, pending = await asyncio.wait(pending, timeout=end_s - loop.time(), return_when=condition)
            answers = _results(futures)
            silent = [name for name, future in futures.items() if not future.done()]
            if silent and not (takes_first and any(answers.values())):
                log.warning("no answer within %g s to %s from %s", timeout_s, question, ", ".join(silent))
            return answers
        finally:
            for name in futures:
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


def _results(futures: Mapping[str, asyncio.Future[Message | None]]) -> dict[str, Message]:
    """The answers that have arrived. A process that has died has none."""
    results = {name: future.result() for name, future in futures.items() if future.done()}
    return {name: answer for name, answer in results.items() if answer is not None}


class Asker:
    """A front-end's side, on its event loop."""

    def __init__(self, link: ChildLink) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Message]]] = {}

    async def ask_others(self, question: str, about: str = "") -> dict[str, Message]:
        """The answers of the server's other processes, by name. Those that died or stayed silent are missing.

        Of a question in OF_ONE_FRONT_END, those of other front-ends until one of them knows the answer."""
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
