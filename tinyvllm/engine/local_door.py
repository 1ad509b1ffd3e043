"""Clients in the same process: messages are handed over as they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tinyvllm.engine.loop import ClientId, Item, Task
from tinyvllm.engine.messages import Closed, Goodbye, ToClient, ToEngine


class LocalDoor:
    """A list that client threads fill and the step loop empties. Replies arrive by one `call_soon_threadsafe` each."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._inbox: list[Item] = []
        self._is_closed = False
        self._receivers: dict[ClientId, tuple[asyncio.AbstractEventLoop, Callable[[ToClient], None]]] = {}

    # ---- From any thread ----

    def connect(self, client: ClientId, loop: asyncio.AbstractEventLoop, receive: Callable[[ToClient], None]) -> None:
        """Let messages for `client` be passed to `receive` on its event loop."""
        self._receivers[client] = loop, receive

    def put(self, client: ClientId, message: ToEngine) -> bool:
        """Queue a message for the step loop. False if it has closed: nobody reads the message."""
        with self._wake:
            if not self._is_closed:
                self._inbox.append((client, message))
                self._wake.notify()
            return not self._is_closed

    def post(self, task: Task) -> None:
        with self._wake:
            self._inbox.append(task)
            self._wake.notify()

    # ---- On the step loop's thread ----

    def receive(self, timeout_s: float | None) -> list[Item]:
        with self._wake:
            if not self._inbox and timeout_s != 0.0:
                self._wake.wait(timeout_s)
            items, self._inbox = self._inbox, []
            return items

    def send(self, client: ClientId, message: ToClient) -> None:
        receiver = self._receivers.get(client)
        if receiver is None:
            return
        loop, receive = receiver
        try:
            loop.call_soon_threadsafe(receive, message)
        except RuntimeError:  # the loop is closed, so its readers are gone
            del self._receivers[client]
            self.put(client, Goodbye())

    def close(self, reason: str) -> None:
        with self._wake:
            self._is_closed = True
            self._inbox.clear()
        for client in list(self._receivers):
            self.send(client, Closed(reason))
