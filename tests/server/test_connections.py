"""The count of connections that were handed over, when a front-end cannot take one."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tinyvllm.server.board import NUM_TAKEN, Board
from tinyvllm.server.connections import Intake


async def test_a_lost_connection_counts_as_taken(caplog: pytest.LogCaptureFixture) -> None:
    board = Board.in_memory()
    here, there = socket.socketpair()
    intake = Intake(there, asyncio.Protocol, board, None)
    here.send(b"c")  # this is how a mark arrives whose descriptor exceeds the limit
    await asyncio.sleep(0.01)
    assert board.own.cells[NUM_TAKEN] == 1
    assert "too many open files" in caplog.text
    intake.close()
    here.close()


async def test_a_connection_that_was_reset_counts_as_taken() -> None:
    board = Board.in_memory()
    here, there = socket.socketpair()
    intake = Intake(there, asyncio.Protocol, board, None)
    reset = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # has no TCP_NODELAY, like a reset connection on macOS
    socket.send_fds(here, [b"c"], [reset.fileno()])
    await asyncio.sleep(0.05)
    assert board.own.cells[NUM_TAKEN] == 1
    for sock in (here, reset):
        sock.close()
    intake.close()
