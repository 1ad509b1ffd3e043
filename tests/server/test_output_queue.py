"""Output that nobody reads blocks nobody, and dropped lines are counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvllm.server.output_queue import QueuedOutput

ROOT = Path(__file__).parents[2]


def make_pipe(max_chars: int) -> tuple[int, QueuedOutput]:
    reader, writer = os.pipe()
    return reader, QueuedOutput(os.fdopen(writer, "w"), max_chars)


def count(read: str) -> int:
    """Lines that are there, and lines that are said to be missing."""
    return sum(int(line.split()[0]) if "missing" in line else len(line) == 99 for line in read.splitlines())


def test_lines_that_do_not_fit_are_counted_where_they_are_missing() -> None:
    reader, output = make_pipe(max_chars=200_000)
    for number in range(10_000):  # more than the pipe and the queue hold
        output.write(f"{number:099d}\n")
    assert not output.finish(quiet_s=0.05), "nobody reads"
    assert output.num_lost > 0
    read = b""
    while count(read.decode()) < 10_000:
        read += os.read(reader, 1 << 20)
    assert count(read.decode()) == 10_000 and len(read) < 700_000
    assert read.decode().endswith(" lines are missing here: nobody read the log\n")
    print("after", file=output)
    assert output.finish() and os.read(reader, 100) == b"after\n"
    os.close(reader)


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, output = make_pipe(max_chars=1000)
    os.close(reader)
    print("x", file=output)
    output.finish()
    print("y", file=output)
    output.finish()


def test_queued_output_has_the_attributes_of_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    primary, secondary = os.openpty()
    target = os.fdopen(secondary, "w")
    output = QueuedOutput(target, 1000)
    assert output.isatty() and output.fileno() == secondary and output.encoding == target.encoding
    print("é", file=output)
    assert output.finish() and os.read(primary, 100).decode() == "é\r\n"


PROGRAM = """
import os, sys, threading
from tinyvllm.server.output_queue import queue_outputs, show_stacks_on_usr1, exit_now
queue_outputs()
show_stacks_on_usr1()
"""


SHOW_STACKS = """
shown, write = threading.Event(), sys.stderr.write
sys.stderr.write = lambda text: write(text) and "in <module>" in text and shown.set()
os.kill(os.getpid(), 10)
shown.wait()
"""


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("raise ValueError('crash')", 1, "ValueError: crash"),
        ("exit_now(3)", 3, "last words"),
        (SHOW_STACKS, 0, "in <module>"),
    ],
)
def test_last_lines_are_written_and_a_full_pipe_does_not_delay_the_end(end: str, code: int, words: str) -> None:
    program = f"{PROGRAM}\nsys.stderr.write('last words\\n')\n{end}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and words in done.stderr
    program = f"{PROGRAM}\nsys.stderr.write('x' * 500_000)\nsys.stdout.write('y' * 500_000)\n{end}"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.wait() == code


FORK = f"""
if pid := os.fork():
    sys.exit(os.waitpid(pid, 0)[1])
sys.stderr = os.fdopen(1, "w", closefd=False)
queue_outputs()
show_stacks_on_usr1()
{SHOW_STACKS}
exit_now(0)
"""


def test_a_fork_of_a_process_that_shows_its_stacks_shows_its_own() -> None:
    """It inherits the handler, but not the thread that copies stacks to the log."""
    done = subprocess.run([sys.executable, "-c", PROGRAM + FORK], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "(most recent call first)" in done.stdout
