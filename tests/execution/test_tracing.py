"""Another process traces what this one would, so that no stream waits for a trace. Events are counted, not timed."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.builders import write_tiny_gguf
from tests.execution.driver import TINY, generate, make_request
from tinyvllm.config import CACHE_DIR_VARIABLE, ModelFiles
from tinyvllm.device.compiling import Pending, _end_pool, key_of
from tinyvllm.device.recording import SavedStep
from tinyvllm.execution import pending_steps, tracing
from tinyvllm.execution.buckets import first_buckets
from tinyvllm.execution.captures import Captures
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.faults import VARIABLE, Fault, Plan

PROMPTS = [list(b"to be"), list(b"or not to be, that is the question:")]

pytestmark = pytest.mark.usefixtures("shared_compiling_processes")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def without_steps(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs are compiled once for all tests here; every step is traced."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(root))
    for path in steps_in(root):
        path.unlink()
    with mock.patch.dict("tinygrad.codegen.to_program_cache", clear=True):
        yield


def steps_in(root: Path) -> list[Path]:
    return sorted(root.glob("programs/*/step-*"))


def tokens_of(runner: ModelRunner) -> list[list[int]]:
    requests = [make_request(prompt, name=str(index)) for index, prompt in enumerate(PROMPTS)]
    generate(runner, requests, 8, chunk=5)
    return [request.output_ids for request in requests]


def capture_all(captures: Captures) -> None:
    while captures.num_to_come:
        captures.advance()
        time.sleep(0.01)
    assert not captures.failed and set(captures.graphs) == set(captures.buckets)


def test_no_step_of_a_stream_waits_for_a_trace_or_a_compiler(
    files: ModelFiles, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first graphs, this process traces nothing, and it takes only what is ready. A later start that traces
    everything itself gives the same tokens, and leaves the same steps on the disk."""
    runner = load_runner(files, TINY)
    runner.warm_up_first()
    assert set(runner.captures.graphs) == set(first_buckets(runner.buckets)) != set(runner.buckets)
    expected, events, waited = tokens_of(runner), [], Pending.wait

    def trace(code: object, *others: object) -> None:
        raise AssertionError("this process traces")

    def wait(pending: Pending) -> object:
        events.append("ready" if pending.is_done else "waits")
        return waited(pending)

    with monkeypatch.context() as patch:
        patch.setattr(pending_steps, "trace_forward", trace)
        patch.setattr(pending_steps, "trace_sampling", trace)
        patch.setattr(Pending, "wait", wait)
        rounds = 0
        while runner.captures.num_to_come:
            runner.captures.advance()
            generate(runner, [make_request(PROMPTS[0], name=f"r{rounds}")], 1)
            rounds += 1
            time.sleep(0.01)  # without it this process would take the core from those that trace, which are nicer
    assert rounds > 2 and "ready" in events and "waits" not in events
    assert set(runner.captures.graphs) == set(runner.buckets) and not runner.captures.failed
    assert tokens_of(runner) == expected

    assert runner.store is not None
    stored = {path.name: runner.store.read_step(path.name.removeprefix("step-")) for path in steps_in(root)}
    for path in steps_in(root):
        path.unlink()
    monkeypatch.setattr(tracing, "can_trace_elsewhere", lambda: False)
    alone = load_runner(files, TINY)
    alone.warm_up()
    assert tokens_of(alone) == expected
    assert {path.name for path in steps_in(root)} == set(stored) and len(stored) == 2 * len(runner.buckets)
    for name, step in stored.items():
        assert facts(runner.store.read_step(name.removeprefix("step-"))) == facts(step), name


def facts(step: object) -> tuple[SavedStep, list[bytes]]:
    """A step and its programs by content: tinygrad compares nodes by identity."""
    assert isinstance(step, SavedStep)
    return dataclasses.replace(step, programs=()), [program.key for program in step.programs]


@pytest.mark.sweep  # the test above compares the steps that both leave on the disk
def test_another_process_traces_what_this_one_would(files: ModelFiles) -> None:
    """The same calls on the same named buffers, and kernels with the same keys."""
    runner = load_runner(files, TINY)
    begun = [runner.captures._tracer.begin(bucket, 0, "") for bucket in runner.buckets]
    for bucket, pending in zip(runner.buckets, begun, strict=True):
        here = tracing.trace_both(tracing.code_of(bucket, runner.captures._context))
        there = pending.wait() if pending is not None else None
        assert there is not None and all(len(step.calls) > 3 for step in here.steps)
        assert there.steps == here.steps, bucket.name
        assert there.keys == here.keys and set(there.kernels) == set(here.kernels), bucket.name
        for key, kernel in there.kernels.items():
            assert key_of(kernel.unpack()) == key, kernel.name


@pytest.mark.sweep  # by default, in an engine whose processes that compile and trace die: tests/faults/test_device.py
def test_what_another_process_loses_is_traced_here(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, Plan([Fault("trace.worker", "exit")], str(tmp_path)).encode())
    _end_pool()  # the processes that run have no plan
    runner = load_runner(files, TINY)
    with caplog.at_level(logging.WARNING):
        runner.captures.make_first()
        capture_all(runner.captures)
    assert "a compiling process lost the trace of " in caplog.text and "which is done here" in caplog.text
    _end_pool()
