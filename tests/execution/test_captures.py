"""Graphs that come one after another while others serve: the same tokens, one memory, errors that end nothing."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from tests.execution.driver import FOUR_GRAPHS, generate, make_request, write_mixed_gguf
from tests.patience import PATIENCE_S
from tinyvllm.config import CACHE_DIR_VARIABLE, Limits, ModelFiles
from tinyvllm.device.recording import Call
from tinyvllm.execution import captures as captures_module
from tinyvllm.execution.buckets import Bucket, first_buckets
from tinyvllm.execution.capacity import scratch_bytes
from tinyvllm.execution.captures import Captures
from tinyvllm.execution.graphs import Graph, PendingGraph
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.scheduling.plan import StepOutput, StepPlan

from tinygrad.helpers import Context  # isort: skip  (tinyvllm makes its settings first)

CONFIG = FOUR_GRAPHS
PROMPTS = [list(b"to be"), list(b"or not to be, that is the question:"), [7], list(b"whether 'tis nobler")]


pytestmark = pytest.mark.usefixtures("shared_compiling_processes")  # which `advance` takes graphs from


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_mixed_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def whole(files: ModelFiles) -> ModelRunner:
    """With all graphs from the start. Traced and compiled here: processes would have to start for it."""
    with Context(PARALLEL=0):
        runner = load_runner(files, CONFIG)
        runner.warm_up()
    return runner


@pytest.fixture
def kept_runner(files: ModelFiles, whole: ModelRunner) -> ModelRunner:
    """With those that serve everything. The steps of all are kept."""
    runner = load_runner(files, CONFIG)
    runner.warm_up_first()
    return runner


@pytest.fixture
def runner(kept_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """The same, but a plan waits for no graph, as on a GPU or where nothing is kept."""
    monkeypatch.setattr(Captures, "_restored", lambda captures, bucket: None)
    return kept_runner


def tokens_of(runner: ModelRunner, prompts: list[list[int]] = PROMPTS, *, chunk: int = 5) -> list[list[int]]:
    requests = [make_request(prompt, temperature=0.7 * (index % 2)) for index, prompt in enumerate(prompts)]
    generate(runner, requests, 6, chunk=chunk)
    return [request.output_ids for request in requests]


def capture_one(captures: Captures) -> None:
    """Go on until a graph is there or given up."""
    before, end_s = captures.num_to_come, time.monotonic() + PATIENCE_S
    while captures.num_to_come == before and time.monotonic() < end_s:
        captures.advance()
        time.sleep(0.01)  # the processes that trace are nicer than this one
    assert captures.num_to_come == before - 1


def test_the_first_graphs_serve_everything_with_the_same_tokens(runner: ModelRunner, whole: ModelRunner) -> None:
    assert list(runner.captures.graphs) == first_buckets(runner.buckets)
    assert (runner.num_captures, runner.captures.num_to_come) == (2, 2)
    expected = tokens_of(whole)
    assert tokens_of(runner) == expected
    while runner.captures.num_to_come:
        capture_one(runner.captures)
        assert tokens_of(runner) == expected
    assert (runner.num_captures, set(runner.captures.graphs)) == (4, set(whole.buckets))
    runner.captures.advance()
    assert runner.num_captures == 4, "there is nothing left to do"


def test_a_graph_whose_steps_are_kept_is_captured_for_its_plan(
    kept_runner: ModelRunner, whole: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Captures, "advance", lambda captures: pytest.fail("the plan must not wait for it"))
    captures = kept_runner.captures
    assert kept_runner.num_captures == 2
    generate(kept_runner, [make_request([1, 2, 3])], 1)
    assert [bucket.name for bucket in captures.graphs][2:] == ["prefill 8"]
    assert tokens_of(kept_runner) == tokens_of(whole)
    assert (kept_runner.num_captures, captures.num_to_come) == (4, 0)


def test_a_graph_that_is_not_kept_is_looked_for_once(
    files: ModelFiles, whole: ModelRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    with Context(PARALLEL=0):
        runner = load_runner(files, CONFIG)
        runner.warm_up_first()
        begun: list[Bucket] = []
        monkeypatch.setattr(
            captures_module, "PendingGraph", lambda bucket, *rest, **options: _noted(begun, bucket, rest, options)
        )
        assert tokens_of(runner) == tokens_of(whole)
        assert [bucket.name for bucket in begun] == ["prefill 8", "decode 1"]
        assert (runner.num_captures, runner.captures.num_to_come) == (2, 2)


def _noted(begun: list[Bucket], bucket: Bucket, rest: tuple[Any, ...], options: dict[str, Any]) -> PendingGraph:
    begun.append(bucket)
    return PendingGraph(bucket, *rest, **options)


def test_the_most_requested_graph_is_captured_next(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without requests it would be the smallest one, decode 1."""
    monkeypatch.setattr(captures_module, "MAX_PENDING", 1)
    tokens_of(runner, PROMPTS[:2], chunk=2)  # pieces of both prompts, 4 tokens per step: prefill 8, many times
    capture_one(runner.captures)
    assert list(runner.captures.graphs)[-1].name == "prefill 8"
    capture_one(runner.captures)
    assert list(runner.captures.graphs)[-1].name == "decode 1"


def test_a_plan_runs_in_the_smallest_graph_that_is_there(runner: ModelRunner) -> None:
    def ran_in(prompt: list[int]) -> list[int]:
        sizes: list[int] = []
        execute = runner.execute

        def watch(plan: StepPlan) -> StepOutput:
            out = execute(plan)
            sizes.append(out.num_rows)
            return out

        runner.execute = watch  # type: ignore[method-assign]
        generate(runner, [make_request(prompt)], 2)
        del runner.execute
        return sizes

    assert ran_in([1, 2, 3]) == [24, 4]
    while runner.captures.num_to_come:
        capture_one(runner.captures)
    assert ran_in([1, 2, 3]) == [8, 1]


def test_sequences_that_outgrow_a_graph_for_short_contexts_go_on_in_the_other(
    files: ModelFiles, whole: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, and the graph changes exactly where the longest sequence no longer fits."""
    limit, num_tokens, prompts = 24, 12, [PROMPTS[0] * 3, PROMPTS[0]]
    monkeypatch.setattr(
        CpuBackend, "short_contexts", lambda self, layers, num_rows, verifies: (limit,) * (num_rows == 4)
    )
    runner, took = load_runner(files, CONFIG), []
    runner.warm_up()
    assert set(runner.buckets) == {*whole.buckets, Bucket.decode(4, limit)}
    graph_for = runner.captures.graph_for

    def watch(plan: StepPlan) -> Graph:
        graph = graph_for(plan)
        if plan.is_decode:
            took.append((plan.longest, graph.bucket.max_context))
        return graph

    monkeypatch.setattr(runner.captures, "graph_for", watch)
    found = [make_request(prompt, temperature=0.7) for prompt in prompts]
    generate(runner, found, num_tokens)
    longest = max(map(len, prompts))
    assert longest < limit < longest + num_tokens
    assert took == [(n, limit if n <= limit else None) for n in range(longest + 1, longest + num_tokens)]
    expected = [make_request(prompt, temperature=0.7) for prompt in prompts]
    generate(whole, expected, num_tokens)
    assert [one.output_ids for one in found] == [one.output_ids for one in expected]


def test_a_graph_that_cannot_be_made_is_said_once_and_the_others_go_on(
    runner: ModelRunner, whole: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finish = PendingGraph.finish

    def fail(pending: PendingGraph) -> object:
        if pending.bucket == Bucket.decode(1):
            raise RuntimeError("out of everything")
        return finish(pending)

    monkeypatch.setattr(PendingGraph, "finish", fail)
    with caplog.at_level(logging.DEBUG, captures_module.__name__):
        while runner.captures.num_to_come:
            capture_one(runner.captures)
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage() == "graph decode 1 cannot be captured: larger ones take its place"
    assert error.exc_info is not None and str(error.exc_info[1]) == "out of everything"
    assert (runner.captures.num_failed, runner.num_captures) == (1, 3)
    assert "captured prefill 8 in" in caplog.text and "0 to come" in caplog.text
    assert "3 graphs are captured: nothing is left to compile" in caplog.text
    assert tokens_of(runner) == tokens_of(whole)


def test_all_graphs_share_the_place_of_the_largest(files: ModelFiles, whole: ModelRunner) -> None:
    """And a plan of the memory that counts on it counts enough."""
    sizes = {}
    for bucket in whole.buckets:
        if not bucket.is_decode:
            alone = load_runner(files, CONFIG)
            alone.captures.remake(bucket)
            sizes[bucket] = alone.captures.scratch_bytes
    largest = whole.buckets[-1]
    assert whole.captures.scratch_bytes == sizes[largest] == max(sizes.values())
    limits = Limits(CONFIG.max_num_seqs or 0, CONFIG.max_num_batched_tokens or 0)
    assert sizes[largest] < scratch_bytes(limits, whole.model_config) < 4 * sizes[largest]


def test_a_step_is_traced_without_tinygrads_scheduler(
    files: ModelFiles, whole: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which took most of a start: a graph of hundreds of kernels whose order is known."""
    runner = load_runner(files, dataclasses.replace(CONFIG, compile_cache=False))

    def schedule(*tensors: object) -> None:
        raise AssertionError("tinygrad's scheduler was asked")

    monkeypatch.setattr("tinygrad.Tensor.linear_with_vars", schedule)
    runner.warm_up()
    assert runner.num_captures == len(runner.buckets)


def test_buckets_of_any_number_of_sequences_sample_by_the_same_programs(whole: ModelRunner) -> None:
    """Which are half of the work of compiling. They differ in the number of rows that they are launched for."""
    for bucket, graph in whole.captures.graphs.items():
        steps = graph.calls[graph.instances[0].step.cut :], graph.instances[0].processed.calls
        for call in [call for calls in steps for call in calls]:
            assert call.target.arg.global_size == (bucket.num_seqs, 1, 1), call.target.arg.name
    graphs = whole.captures.graphs.values()
    assert {graph.bucket.num_seqs for graph in graphs} == {1, 4}
    sampling = [binaries(graph.calls[graph.instances[0].step.cut :]) for graph in graphs]
    processed = [binaries(graph.instances[0].processed.calls) for graph in graphs]
    assert all(found == sampling[0] for found in sampling) and all(found == processed[0] for found in processed)


def binaries(calls: tuple[Call, ...]) -> list[bytes]:
    return [uop.arg for call in calls for uop in call.target.src if uop.op.name == "BINARY"]
