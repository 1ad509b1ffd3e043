"""Limits of all front-ends together: exact under contention, and free again after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tinyvllm.server.board import NUM_RECENT, NUM_SEQS, NUM_WAITING_TOKENS, Board
from tinyvllm.server.context import RequestContext
from tinyvllm.server.request_limits import Admission, QueueFullError
from tinyvllm.server.settings import ServerSettings

# Admits as many sequences as it can, and prints how many those were.
GREEDY = """
import sys
from pathlib import Path
from tinyvllm.server.board import Board
from tinyvllm.server.context import RequestContext
from tinyvllm.server.request_limits import Admission, QueueFullError
from tinyvllm.server.settings import ServerSettings

board = Board.open(Path(sys.argv[1]), 3, int(sys.argv[2]))
admission = Admission(ServerSettings(max_num_queued_requests=40000), board)
print("ready", flush=True)
sys.stdin.readline()
num_admitted = 0
try:
    while True:
        admission.admit(RequestContext("a"), 1, 10, max_num_seqs=7)
        num_admitted += 1
except QueueFullError:
    print(num_admitted, flush=True)
"""

# Dies while it holds the lock, in the middle of an addition.
KILLED = """
import os, signal, sys
from pathlib import Path
from tinyvllm.server.board import Board

board = Board.open(Path(sys.argv[1]), 3, 2)
with board.locked():
    board.add(0, 5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_front_ends_admit_exactly_as_many_as_the_limit_allows(tmp_path: Path) -> None:
    path = tmp_path / "board"
    board = Board.create(path, 3)
    greedy = [start(GREEDY, str(path), str(number)) for number in range(2)]
    for process in greedy:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in greedy:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.communicate()[0]) for process in greedy]
    assert sum(counts) == 40007 == board.sum(NUM_SEQS)
    assert board.sum(NUM_WAITING_TOKENS) == 400070
    assert [row.cells[NUM_SEQS] for row in board.rows] == [*counts, 0]


def test_a_killed_front_end_keeps_neither_the_lock_nor_its_places(tmp_path: Path) -> None:
    path = tmp_path / "board"
    board = Board.create(path, 3)
    killed = start(KILLED, str(path))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and board.sum(NUM_SEQS) == 5
    board.rows[2].clear()
    admission = Admission(ServerSettings(max_num_queued_requests=0), board)
    admission.admit(RequestContext("a"), 4, 10, max_num_seqs=4)
    assert board.sum(NUM_SEQS) == 4


def test_releases_of_one_front_end_make_room_at_another(tmp_path: Path) -> None:
    path = tmp_path / "board"
    Board.create(path, 2)
    settings = ServerSettings(max_num_queued_requests=0, max_num_queued_tokens=100)
    here, there = (Admission(settings, Board.open(path, 2, own)) for own in range(2))
    mine, yours = RequestContext("mine"), RequestContext("yours")
    here.admit(mine, 1, 100, max_num_seqs=1)
    for _ in range(2):
        try:
            there.admit(yours, 1, 1, max_num_seqs=1)
        except QueueFullError:
            here.release(mine)
    assert (here.num_seqs, there.num_seqs, there.num_waiting_tokens) == (1, 1, 1)


def test_recent_latencies_of_all_front_ends_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "board"
    Board.create(path, 2)
    here, there = (Board.open(path, 2, own) for own in range(2))
    for number in range(NUM_RECENT + 3):
        here.own.recent_itl_s.append(float(number))
    there.own.recent_itl_s.append(0.5)
    there.own.recent_ttft_s.append(2.5)
    assert sorted(there.recent_itl_s()) == [0.5, *map(float, range(3, NUM_RECENT + 3))]
    assert here.recent_ttft_s() == [2.5]


def test_a_board_leaves_no_file_open(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        return
    before = len(os.listdir("/proc/self/fd"))
    board = Board.create(tmp_path / "board", 1)
    assert board.sum(NUM_SEQS) == 0
    del board
    assert len(os.listdir("/proc/self/fd")) == before
