"""The kernels of a DEBUG=2 log are read on any device, even if the log is damaged."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.profiling.kernels import GROUPINGS, tabulate
from tinyvllm.profiling.trace import parse_trace

DATA = Path(__file__).parent / "data"
# How the logs were made: two layers of SmolLM2-135M's shape with random Q4_0 weights, decoding at a context of 32 and a
# prompt of 20, by tinygrad 0.14 under DEBUG=2. CPU: two cores, calls one by one, with colors. CL: PoCL 2 on that CPU.
# METAL: the simulator of tests/metal, once with JIT=2 and once with graphs; its times are a CPU's. CUDA: an H200, both
# ways too.
TRACES = sorted(path.name for path in DATA.glob("*.txt"))


def read(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def test_there_are_traces_of_four_kinds_of_device() -> None:
    devices = {line.device.partition(":")[0] for name in TRACES for line in parse_trace(read(name)).lines}
    assert devices >= {"CPU", "CL", "METAL", "CUDA"}
    assert all((DATA / name).stat().st_size < 100_000 for name in TRACES)


@pytest.mark.parametrize("name", TRACES)
def test_every_line_with_stars_and_a_time_is_read_whole(name: str) -> None:
    trace = parse_trace(read(name))
    assert len(trace.lines) == sum(" arg " in line for line in read(name).splitlines())
    assert trace.num_cut == trace.num_untimed == 0
    assert all(line.program and line.number and line.num_args is not None for line in trace.lines)


def test_scheduling_is_summed() -> None:
    trace = parse_trace(read("cpu.txt"))
    assert trace.num_scheduled == 70
    assert trace.scheduling_s == pytest.approx(71.24e-3)


@pytest.mark.parametrize("name", TRACES)
def test_the_sum_is_what_tinygrad_itself_counted(name: str) -> None:
    """The last number before the rates is tinygrad's own running total."""
    sums = re.findall(r"(?:us|ms|s)\S*/\s*([\d.]+)ms \(", read(name))
    assert parse_trace(read(name)).device_s * 1e3 == pytest.approx(float(sums[-1]), rel=2e-3)


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("by", GROUPINGS)
def test_totals_add_up_however_they_are_grouped(name: str, by: str) -> None:
    trace = parse_trace(read(name))
    rows = tabulate(trace.kernels(), by)
    whole_s = sum(kernel.seconds for kernel in trace.kernels())
    assert sum(row.total_s for row in rows) == pytest.approx(whole_s)
    # of the cores' shares of a kernel the longest counts
    assert whole_s <= trace.device_s and (name == "cpu.txt" or whole_s == pytest.approx(trace.device_s))
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert sum(row.launches for row in rows) == sum(line.num_kernels for line in trace.lines)
    assert all(row.average_s * row.dispatches == pytest.approx(row.total_s) for row in rows)
    assert [row.total_s for row in rows] == sorted((row.total_s for row in rows), reverse=True)


def test_kernels_of_the_cpu_are_named_by_what_they_do() -> None:
    kernels = parse_trace(read("cpu.txt")).kernels(last_steps=1)
    # a prompt of 20 in two cores: a share of every layer on each, the sampler on one
    assert {kernel.label for kernel in kernels} >= {"layer 0 · qkv", "layer 1 · down", "head", "sample", "embed"}
    assert [kernel.shares for kernel in kernels if kernel.label == "layer 1 · attention"] == [2]
    assert all(kernel.shares == 1 for kernel in kernels if kernel.operation == "sample")
    assert not any(kernel.layer for kernel in kernels if kernel.operation in ("head", "sample", "embed"))


def test_kernels_of_a_gpu_are_named_by_what_they_do() -> None:
    kernels = parse_trace(read("metal_simulated.txt")).kernels(last_steps=1)
    labels = [kernel.label for kernel in kernels]
    assert [label for label in labels if "qkv" in label] == ["layer 0 · qkv", "layer 1 · qkv"]
    assert {"layer 0 · gate up", "layer 1 · attention out", "layer 1 · kv write", "head"} <= set(labels)


def test_a_graph_counts_as_its_kernels() -> None:
    trace = parse_trace(read("metal_graphs_simulated.txt"))
    graphs = [line for line in trace.lines if line.num_kernels > 1]
    assert graphs and {row.label for row in tabulate(trace.kernels())} >= {
        f"graph of {line.num_kernels} kernels" for line in graphs
    }


def test_a_step_is_found_from_its_embedding_on() -> None:
    trace = parse_trace(read("cpu.txt"))
    one, two = trace.kernels(last_steps=1), trace.kernels(last_steps=2)
    assert two[-len(one) :] == one and len(one) < len(two) < len(trace.kernels())
    assert one[0].operation == "embed" and one[-1].operation == "sample"
    assert trace.kernels(last_steps=10_000) == trace.kernels()


HEAD = "*** CUDA    14 r_512  arg  5 mem 3.13 GB tm "


@pytest.mark.parametrize(
    ("text", "seconds", "flops_per_s", "bytes_per_s"),
    [
        (HEAD + " 10.98us/ 106.58ms ( 1081 GFLOPS  192|3893   GB/s)", 10.98e-6, 1.081e12, 192e9),
        (HEAD + "  1.50ms/ 106.58ms (  120 TFLOPS    3|15     TB/s)", 1.5e-3, 120e12, 3e12),
        (HEAD + "  2.50s / 106.58ms (    0 GFLOPS    3|15     GB/s)", 2.5, 0, 3e9),
        # earlier versions of tinygrad
        ("*** METAL  copy   131.07 MB tm  87206.75us/    87.21ms (    1.50 GB/s)", 87206.75e-6, None, 1.5e9),
        ("*** METAL       6 arg 2 mem    0.00 GB tm      6.96us/     6.34ms", 6.96e-6, None, None),
        ("*** METAL  14 arg 9 mem    0.04 GB tm  2292.58us  100.00 GFLOPS  8.98 GB/s", 2292.58e-6, 100e9, 8.98e9),
    ],
)
def test_units_are_what_they_say(
    text: str, seconds: float, flops_per_s: float | None, bytes_per_s: float | None
) -> None:
    (line,) = parse_trace(text).lines
    assert line.seconds == pytest.approx(seconds)
    assert line.flops_per_s == (None if flops_per_s is None else pytest.approx(flops_per_s))
    assert line.bytes_per_s == (None if bytes_per_s is None else pytest.approx(bytes_per_s))


def test_scheduling_and_copies_are_kept_apart() -> None:
    trace = parse_trace(
        " *** scheduled  23 kernels in   2.13 ms ***\n*** CPU   1 copy  1.2M, CPU <- DISK  arg  2 mem 0.1 GB"
    )
    assert trace.num_scheduled == 23
    assert trace.scheduling_s == pytest.approx(2.13e-3)
    (line,) = trace.lines
    assert line.is_copy and line.seconds is None and not line.is_cut


def test_a_line_that_is_cut_never_gives_a_wrong_figure() -> None:
    whole_text = read("cpu.txt").splitlines()[-1]
    (whole,) = parse_trace(whole_text).lines
    for end in range(len(whole_text)):
        for line in parse_trace(whole_text[:end]).lines:
            assert line.seconds in (None, whole.seconds)
            assert line.flops_per_s in (None, whole.flops_per_s)
            assert line.bytes_per_s in (None, whole.bytes_per_s)
            assert line.num_args in (None, whole.num_args)
            assert line.is_cut or line.bytes_per_s == whole.bytes_per_s or line.seconds is None


def test_other_output_in_between_changes_nothing() -> None:
    text = read("cl.txt")
    rng = random.Random(3)
    noisy = "\n".join(
        rng.choice(["", "compiling r_4:  50%|#####     |\r", "INFO engine: *** ready ***\n", "\x1b[2K"]) + line
        for line in text.splitlines()
    )
    assert parse_trace(noisy).lines == parse_trace(text).lines


def test_two_kernels_on_one_line_are_two() -> None:
    first, second = read("cl.txt").splitlines()[-2:]
    assert parse_trace(first + second).lines == parse_trace(f"{first}\n{second}").lines


PIECES = ("*** ", "CPU", "METAL:1 ", "arg ", "tm ", "12.5us/", "mem 0.1 GB", "GFLOPS", "1|2 GB/s")
SCRAPS = (*PIECES, "batched 9 ", "\x1b[3", "7", " ", "\n", "scheduled", "\r")


@given(st.one_of(st.text(), st.lists(st.sampled_from(SCRAPS), max_size=30).map("".join)))
def test_no_text_makes_it_fail(text: str) -> None:
    trace = parse_trace(text)
    for by in GROUPINGS:
        rows = tabulate(trace.kernels(last_steps=1), by)
        assert sum(row.share for row in rows) == pytest.approx(1.0) or not any(row.total_s for row in rows)
    assert sum(row.total_s for row in tabulate(trace.kernels())) == pytest.approx(trace.device_s)


@given(st.data())
def test_a_real_trace_cut_anywhere_loses_one_line_at_most(data: st.DataObject) -> None:
    text = read("cpu.txt")
    cut = text[: data.draw(st.integers(0, len(text)))]
    lines = parse_trace(cut).lines
    whole = parse_trace(text).lines
    assert lines[:-1] == whole[: max(0, len(lines) - 1)]
