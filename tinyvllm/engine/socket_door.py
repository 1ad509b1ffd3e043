"""Clients in other processes: MessagePack over ZeroMQ, which queues and sends on a thread that needs no GIL."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque

import zmq

from tinyvllm.engine.loop import ClientId, Item, Task
from tinyvllm.engine.messages import Closed, ToClient, Unreadable, decode_for_engine, encode_message
from tinyvllm.faults import reach

logger = logging.getLogger(__name__)

LINGER_MS = 1000  # how long closing waits for messages that are still queued


class SocketDoor:
    """A ROUTER socket, to which each client connects a DEALER whose identity is its name. Messages are never refused:
    the queue of a client that does not read grows until its process ends."""

    def __init__(self, address: str) -> None:
        """address: ZeroMQ's, such as ipc:///run/x/engine-0."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.bind(address)
        self._clients: set[ClientId] = set()
        self._tasks: deque[Task] = deque()
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def post(self, task: Task) -> None:
        self._tasks.append(task)
        with contextlib.suppress(BlockingIOError, OSError):  # full: the loop will wake anyway; closed: nobody listens
            os.write(self._wake_write, b"\0")

    def receive(self, timeout_s: float | None) -> list[Item]:
        if timeout_s != 0.0 and not self._tasks:
            self._poller.poll(None if timeout_s is None else max(1, round(1000 * timeout_s)))
        items: list[Item] = []
        while True:
            try:
                client, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._clients.add(client)
            try:
                reach("hop.take")
                items.append((client, decode_for_engine(data)))
            except Exception as error:
                logger.exception("a message of client %s cannot be read: its requests are ended", client)
                reason = f"the engine could not read a message: {type(error).__name__}: {error}"
                items.append((client, Unreadable(reason)))
        if self._tasks:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 1 << 16)
            while self._tasks:
                items.append(self._tasks.popleft())
        return items

    def send(self, client: ClientId, message: ToClient) -> None:
        if isinstance(client, bytes) and client in self._clients:
            reach("hop.reply")
            self._socket.send_multipart([client, encode_message(message)], zmq.NOBLOCK)

    def close(self, reason: str) -> None:
        for client in self._clients:
            self.send(client, Closed(reason))
        self._socket.close()
        self._context.term()  # waits for the queues to be sent, at most LINGER_MS
        os.close(self._wake_read)
        os.close(self._wake_write)
