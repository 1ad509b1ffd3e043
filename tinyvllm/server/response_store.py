"""A bounded store, in memory, of responses that later requests may continue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyvllm.server.failures import UnknownResponseError
from tinyvllm.server.protocol.responses import ResponseAnswer

MAX_RESPONSES = 1000
MAX_CHARS = 64 * 2**20  # of all conversations together


@dataclass(frozen=True)
class StoredResponse:
    answer: ResponseAnswer
    messages: tuple[Mapping[str, Any], ...]  # the conversation up to and including the answer, without instructions

    @property
    def num_chars(self) -> int:
        return sum(len(str(message)) for message in self.messages)


class ResponseStore:
    """Owns the latest responses. Used only on the server's event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_chars = 0

    def add(self, stored: StoredResponse) -> None:
        """Store a response. Evicts the oldest ones if there is no room."""
        self._responses[stored.answer.id] = stored, stored.num_chars
        self._num_chars += stored.num_chars
        while len(self._responses) > self._max_responses or self._num_chars > self._max_chars:
            _, (_, num_chars) = self._responses.popitem(last=False)
            self._num_chars -= num_chars

    def get(self, response_id: str, param: str) -> StoredResponse:
        """Raises UnknownResponseError, naming the field `param`, if it is not stored."""
        if response_id not in self._responses:
            raise UnknownResponseError(
                f"the response {ascii(response_id)[:80]} is not stored: the server keeps the latest "
                f"{self._max_responses} that allow it, while it runs. Send the whole conversation as input",
                param,
            )
        return self._responses[response_id][0]

    def remove(self, response_id: str, param: str) -> None:
        self.get(response_id, param)
        _, num_chars = self._responses.pop(response_id)
        self._num_chars -= num_chars
