"""How connections reach the front-ends: the supervisor accepts each and hands it to the front-end with the fewest.

The kernel spreads them unevenly. With four processes that accept from one socket, one of them got 80 to 239 of 256
connections, as it happened to wake up. With SO_REUSEPORT, whose hash is random, the shares of 8 were 0 to 5. A few long
streams would then share one core while others are idle. Handed over, the shares are 2 of 8, and 64 of 256, and each
connection takes 10 us of the supervisor's time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import Any

from tinyvllm.server.board import ALIVE_MS, NUM_CONNECTIONS, NUM_TAKEN, Board
from tinyvllm.server.gate import MAX_ACCEPTS, Gate, RareLog

LATE_MS = 1000  # a front-end that has not been seen for so long is busy: it gets connections only if all are
RETRY_S = 0.02  # while no front-end can take a connection
ERROR_RETRY_S = 0.1  # while the supervisor cannot accept any
_MARK = b"c"  # a connection travels as ancillary data, which needs at least one byte of ordinary data


class Handover:
    """The supervisor's end: accepts connections on the listening socket and gives them to front-ends."""

    def __init__(self, listener: socket.socket, board: Board) -> None:
        self._listener = listener
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._takers: dict[int, socket.socket] = {}  # the front-ends that serve, by number
        self._num_given: dict[int, int] = {}
        self._waiting: socket.socket | None = None  # a connection that nobody could take yet
        self._turn = 0
        self._is_accepting = False
        self._is_closed = False
        self._failed = RareLog(logging.ERROR, "connections cannot be accepted (%d times so far): %s")
        listener.setblocking(False)

    def add(self, number: int, sock: socket.socket) -> None:
        """A front-end serves. `sock` leads to it."""
        sock.setblocking(False)
        self._takers[number] = sock
        self._num_given[number] = 0
        self._resume()

    def remove(self, number: int) -> None:
        """A front-end is gone. Until another serves, new connections wait in the kernel's queue."""
        sock = self._takers.pop(number, None)
        if sock is not None:
            sock.close()
        if not self._takers:
            self._pause()

    def close(self) -> None:
        """Accept no more."""
        self._is_closed = True
        self._pause()
        self._listener.close()
        if self._waiting is not None:
            self._waiting.close()
        for number in list(self._takers):
            self.remove(number)

    def _resume(self) -> None:
        if not self._is_accepting and not self._is_closed and self._takers:
            self._is_accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def _pause(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection = self._waiting or self._listener.accept()[0]
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:  # too many open files, say
                self._failed.add(error)
                self._retry_later(ERROR_RETRY_S)
                return
            self._waiting = None if self._give(connection) else connection
            if self._waiting is not None:
                self._retry_later(RETRY_S)
                return
            connection.close()

    def _give(self, connection: socket.socket) -> bool:
        """Hand over a connection. False if no front-end can take it now."""
        for number in self._by_load():
            try:
                socket.send_fds(self._takers[number], [_MARK], [connection.fileno()])
            except OSError:  # it is dead, or so late that its queue is full
                continue
            self._num_given[number] += 1
            return True
        return False

    def _by_load(self) -> list[int]:
        """The front-ends, the best one first."""
        now_ms, count = int(1000 * time.monotonic()), len(self._board.rows)
        self._turn += 1

        def rank(number: int) -> tuple[bool, int, int]:
            cells = self._board.rows[number].cells
            num_open = cells[NUM_CONNECTIONS] + self._num_given[number] - cells[NUM_TAKEN]
            return now_ms - cells[ALIVE_MS] > LATE_MS, num_open, (number - self._turn) % count

        return sorted(self._takers, key=rank)

    def _retry_later(self, delay_s: float) -> None:
        self._pause()
        self._loop.call_later(delay_s, self._resume)


class Intake:
    """A front-end's end: takes connections over, and passes them through its gate."""

    def __init__(self, sock: socket.socket, gate: Gate, board: Board) -> None:
        self._sock = sock
        self._gate = gate
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._lost = RareLog(logging.ERROR, "connections are lost (%d so far): %s")
        sock.setblocking(False)
        self._loop.add_reader(sock, self._take)

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _take(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                mark, fds, _, _ = socket.recv_fds(self._sock, 1, 1)
            except (BlockingIOError, InterruptedError):
                return
            if not mark:  # the supervisor is gone
                self._loop.remove_reader(self._sock)
                return
            if not fds:  # the kernel has closed it
                self._lost.add("this process has too many open files")
                self._gate.make_room()
                self._board.add(NUM_TAKEN, 1)
            for fd in fds:
                task = self._gate.admit(socket.socket(fileno=fd))
                if task is None:
                    self._count()
                else:  # until it ends, the supervisor counts the connection as given
                    task.add_done_callback(self._count)

    def _count(self, task: asyncio.Task[None] | None = None) -> None:
        self._board.add(NUM_TAKEN, 1)


class Connections(set[Any]):
    """uvicorn's set of open connections, which keeps their number on the board."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._cells = board.own.cells

    def add(self, connection: Any) -> None:
        super().add(connection)
        self._cells[NUM_CONNECTIONS] = len(self)

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self._cells[NUM_CONNECTIONS] = len(self)
