"""What the front-ends of a server share: limits, counters, and questions that all processes answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tinyvllm.server.board import Board
from tinyvllm.server.control import Message
from tinyvllm.server.counters import Cells, Counters


class Ask(Protocol):
    """Puts a question to all other processes of the server but the supervisor."""

    async def __call__(self, question: str, about: str = "") -> dict[str, Message]:
        """The answers, by the name of the process. Those that died or stayed silent are missing."""


async def nobody(question: str, about: str = "") -> dict[str, Message]:
    """For a server of one process."""
    return {}


@dataclass(frozen=True)
class FrontEnds:
    """As seen by one front-end. The default is a server of one process."""

    board: Board = field(default_factory=Board.in_memory)
    counters: Counters = field(default_factory=lambda: Counters(Cells()))
    name: str | None = None  # of this process; None if it is the only one
    large_lane: str | None = None  # the Unix socket of the front-end that this one passes large bodies on to
    is_large_lane: bool = False  # this is that front-end: all of its requests come from the others
    ask_others: Ask = nobody
    pids: Callable[[], dict[str, int]] = dict  # of all processes of the server, by name; empty if it is the only one
