"""What the front-ends of a server share: limits, counters, and questions that all processes answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tinyvllm.server.board import Board
from tinyvllm.server.control import Message
from tinyvllm.server.counters import Cells, Counters

Ask = Callable[[str], Awaitable[dict[str, Message]]]  # question -> answers by the name of the process


async def _nobody(question: str) -> dict[str, Message]:
    return {}


@dataclass(frozen=True)
class FrontEnds:
    """As seen by one front-end. The default is a server of one process."""

    board: Board = field(default_factory=Board.in_memory)
    counters: Counters = field(default_factory=lambda: Counters(Cells()))
    name: str | None = None  # of this process; None if it is the only one
    ask_others: Ask = _nobody  # put a question to all other processes of the server but the supervisor
    pids: Callable[[], dict[str, int]] = dict  # of all processes of the server, by name; empty if it is the only one
