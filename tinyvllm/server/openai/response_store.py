"""A bounded store, in memory, of responses that later requests may continue.

Each front-end stores the responses that it made, and asks the others for one that it does not have, because a client's
next request may arrive over another connection.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinyvllm.server.control import Message
from tinyvllm.server.failures import UnknownResponseError
from tinyvllm.server.front_ends import Ask, nobody
from tinyvllm.server.questions import CANCEL_RESPONSE, GET_EVENTS, GET_ITEM, GET_RESPONSE, REMOVE_RESPONSE

if TYPE_CHECKING:
    from tinyvllm.server.openai.protocol.responses import ResponseAnswer

Item = Mapping[str, Any]  # of a response's input or output, as JSON values

POLL_S = 0.2  # between requests for the events of a response that another front-end generates

MAX_RESPONSES = 1000
MAX_CHARS = 64 * 2**20  # of all conversations together


class Run(Protocol):
    """A background response: its events so far, one for each sequence number."""

    frames: list[bytes]
    is_complete: bool

    def cancel(self) -> None: ...

    def follow(self, after: int) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True)
class StoredResponse:
    answer: ResponseAnswer
    items: tuple[Item, ...]  # the conversation that it answers, without instructions
    run: Run | None = None  # of a background response, in the front-end that generates it

    @property
    def num_chars(self) -> int:
        num_event_bytes = 0 if self.run is None else sum(map(len, self.run.frames))
        return num_event_bytes + sum(len(str(item)) for item in self.conversation())

    def conversation(self) -> tuple[Item, ...]:
        """The conversation up to and including the answer."""
        return (*self.items, *(item.model_dump() for item in self.answer.output))

    def as_message(self) -> Message:
        """For another front-end, as JSON values."""
        return {"answer": self.answer.model_dump(mode="json", by_alias=True), "items": self.items}

    @classmethod
    def from_message(cls, message: Message) -> StoredResponse:
        # here, because a start does without the route that has these models
        from tinyvllm.server.openai.protocol.responses import ResponseAnswer

        return cls(ResponseAnswer.model_validate(message["answer"]), tuple(message["items"]))


class ResponseStore:
    """Owns the latest responses. Used only on the server's event loop."""

    def __init__(
        self,
        max_responses: int = MAX_RESPONSES,
        max_chars: int = MAX_CHARS,
        ask_others: Ask = nobody,
    ) -> None:
        """ask_others: puts questions to the other front-ends, whose `answer` answers them."""
        self._ask_others = ask_others
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_chars = 0

    def add(self, stored: StoredResponse) -> None:
        """Store a response, or one that has grown. Evicts the oldest ones if there is no room."""
        self.discard(stored.answer.id)
        self._responses[stored.answer.id] = stored, stored.num_chars
        self._num_chars += stored.num_chars
        while len(self._responses) > self._max_responses or self._num_chars > self._max_chars:
            _, (_, num_chars) = self._responses.popitem(last=False)
            self._num_chars -= num_chars

    def update(self, stored: StoredResponse) -> None:
        """Count again what a response takes, unless it has been removed in the meantime."""
        if stored.answer.id in self._responses:
            self.add(stored)

    async def get(self, response_id: str, param: str) -> StoredResponse:
        """Raises UnknownResponseError, naming the field `param`, if no front-end has it."""
        if response_id in self._responses:
            return self._responses[response_id][0]
        answers = await self._ask_others(GET_RESPONSE, response_id)
        for message in answers.values():
            if "answer" in message:
                return StoredResponse.from_message(message)
        raise self._unknown(response_id, param)

    async def get_item(self, item_id: str, param: str) -> Item:
        """An item of a stored response's conversation. Raises UnknownResponseError, naming the field `param`."""
        found = self._find_item(item_id)
        if found is not None:
            return found
        answers = await self._ask_others(GET_ITEM, item_id)
        for message in answers.values():
            if "item" in message:
                other: Item = message["item"]
                return other
        raise UnknownResponseError(
            f"{param} refers to the item {ascii(item_id)[:80]}, which no stored response has: send the item itself",
            param,
        )

    def _find_item(self, item_id: str) -> Item | None:
        for stored, _ in reversed(self._responses.values()):
            for item in reversed(stored.conversation()):
                if item.get("id") == item_id:
                    return item
        return None

    async def remove(self, response_id: str, param: str) -> None:
        """Raises UnknownResponseError, naming the field `param`, if no front-end has it."""
        if self._remove(response_id):
            return
        answers = await self._ask_others(REMOVE_RESPONSE, response_id)
        if not any(message.get("removed") for message in answers.values()):
            raise self._unknown(response_id, param)

    def answer(self, question: str, response_id: str) -> Message:
        """The answer to another front-end's question about a response or an item: empty if it is not stored here."""
        if question == REMOVE_RESPONSE:
            return {"removed": True} if self._remove(response_id) else {}
        if question == GET_EVENTS:
            return self._events_from(response_id)
        if question == CANCEL_RESPONSE and response_id in self._responses:
            self._cancel(self._responses[response_id][0])
        if question == GET_ITEM:
            item = self._find_item(response_id)
            return {} if item is None else {"item": item}
        return self._responses[response_id][0].as_message() if response_id in self._responses else {}

    def _remove(self, response_id: str) -> bool:
        """Remove a response, and end it if it is still being generated. Returns whether it was there."""
        if response_id not in self._responses:
            return False
        self._cancel(self._responses[response_id][0])
        return self.discard(response_id)

    def discard(self, response_id: str) -> bool:
        """Remove a response without ending its generation. Returns whether it was there."""
        if response_id not in self._responses:
            return False
        _, num_chars = self._responses.pop(response_id)
        self._num_chars -= num_chars
        return True

    # ---- Background responses ----

    async def cancel(self, response_id: str, param: str) -> StoredResponse:
        """End a background response; a complete one is unchanged. Raises UnknownResponseError, naming
        the field `param`, if no front-end has it."""
        if response_id not in self._responses:
            for message in (await self._ask_others(CANCEL_RESPONSE, response_id)).values():
                if "answer" in message:
                    return StoredResponse.from_message(message)
            raise self._unknown(response_id, param)
        stored = self._responses[response_id][0]
        self._cancel(stored)
        return stored

    def _cancel(self, stored: StoredResponse) -> None:
        if stored.run is not None:
            stored.run.cancel()

    def follow(self, stored: StoredResponse, after: int) -> AsyncIterator[bytes]:
        """The events of a background response with a sequence number above `after`, as they come."""
        if stored.run is not None:
            return stored.run.follow(after)
        return self._follow_other(stored.answer.id, after)

    async def _follow_other(self, response_id: str, after: int) -> AsyncIterator[bytes]:
        """Poll the front-end that generates it."""
        while True:
            answers = await self._ask_others(GET_EVENTS, f"{after}:{response_id}")
            found = next((message for message in answers.values() if message), None)
            if found is None:  # removed, or the front-end has died
                return
            for frame in found["events"]:
                yield frame.encode()
            after += len(found["events"])
            if found["is_complete"]:
                return
            await asyncio.sleep(POLL_S)

    def _events_from(self, about: str) -> Message:
        after, _, response_id = about.partition(":")
        run = self._responses[response_id][0].run if response_id in self._responses else None
        if run is None:
            return {}
        frames = run.frames[int(after) + 1 :]
        return {"events": [frame.decode() for frame in frames], "is_complete": run.is_complete}

    def _unknown(self, response_id: str, param: str) -> UnknownResponseError:
        return UnknownResponseError(
            f"the response {ascii(response_id)[:80]} is not stored: the server keeps the latest "
            f"{self._max_responses} that allow it, while it runs. Send the whole conversation as input",
            param,
        )
