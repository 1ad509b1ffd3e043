"""What DEBUG=2 and above print for work that bypasses tinygrad's executor: our copies, and programs from the cache."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvllm.device.handle import open_device
from tinyvllm.device.jit_replay import JitReplay
from tinyvllm.device.kinds.metal import find_gpu_cores
from tinyvllm.device.program_store import show_compiled
from tinyvllm.device.recording import record
from tinyvllm.device.watching import HOST, WatchedReader, watched_copy, watched_send
from tinyvllm.profiling.trace import parse_trace

from tinygrad import Tensor  # isort: skip  (tinyvllm makes its settings first)
from tinygrad.helpers import Context  # isort: skip


class Reader:
    def start(self) -> None:
        """Nothing is enqueued."""

    def read(self) -> np.ndarray:
        return np.arange(3)


def test_copies_have_lines_in_tinygrads_format(capsys: pytest.CaptureFixture[str]) -> None:
    open_device()
    sent: list[int] = []
    watched_send(lambda: sent.append(0), "CPU", 8)()
    assert capsys.readouterr().out == "", "without DEBUG=2 nothing is printed"
    with Context(DEBUG=2):
        watched_send(lambda: sent.append(1), "CPU", 684)()
        assert WatchedReader(Reader(), "CPU", 11008).read().tolist() == [0, 1, 2]
        with watched_copy("CPU", HOST, 131_070_000):
            sent.append(2)
    text = capsys.readouterr().out
    lines = parse_trace(text).lines
    assert (
        sent == [0, 1, 2]
        and len(lines) == 3
        and all(line.is_copy and line.seconds and not line.is_cut for line in lines)
    )
    assert "CPU <- host" in text and "host <- CPU" in text and "125.00 MB" in text
    assert [line.number for line in lines] == list(range(lines[0].number or 0, (lines[0].number or 0) + 3))


def test_a_program_from_the_cache_shows_what_a_compiler_shows(capsys: pytest.CaptureFixture[str]) -> None:
    x = Tensor.ones(64, device="CPU").contiguous().realize()
    (call,) = record(lambda: (x * 3).contiguous().realize()).calls
    for level, shows in ((3, False), (4, True)):
        with Context(DEBUG=level):
            show_compiled(call.target)
        assert ("void E_" in capsys.readouterr().out) == shows


def test_a_described_step_counts_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    x = Tensor.ones(1 << 16, device="CPU").contiguous().realize()
    with Context(DEBUG=2):
        replay = JitReplay(lambda: (x * 3).contiguous().realize())
        assert capsys.readouterr().out.count("***") == 0, "capturing is no step"
        amounts = [(10**9, 10**9)]
        replay.describe(["layer 3 gate up"], lambda: amounts)
        for number in (1, 2):
            amounts[0] = number * 10**9, number * 10**9
            replay()
            (line,) = parse_trace(capsys.readouterr().out).lines
            assert (line.layer, line.label, line.program.split("_")[0]) == (3, "gate up", "E")
            assert line.flops == pytest.approx(number * 1e9, rel=0.01, abs=0.51e9 * (line.seconds or 0))
    assert len(replay.step.calls) == 1 and "layer" not in replay.step.calls[0].target.arg.name, (
        "the step stays as it is"
    )


def test_the_cores_of_a_macs_gpu_are_read() -> None:
    text = '+-o AGXAcceleratorG15X\n    {\n      "gpu-core-count" = 30\n      "model" = "Apple M3 Max"\n'
    assert find_gpu_cores(text) == 30 and find_gpu_cores("nothing") is None
