"""Steps that are traced before the weights are loaded are those that would be traced afterwards."""

from __future__ import annotations

import inspect
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tests.execution.driver import TINY, generate, make_request
from tests.ops.builders import make_host
from tests.ops.rendering import rendered
from tests.patience import wait_for
from tests.sweeps import swept
from tinyvllm.config import CACHE_DIR_VARIABLE, Limits, ModelConfig, ModelFiles
from tinyvllm.device.compile_workers import Job
from tinyvllm.device.compiling import Pending
from tinyvllm.device.handle import upload
from tinyvllm.errors import EngineDeadError
from tinyvllm.execution import early_traces, pending_steps, tracing
from tinyvllm.execution.buckets import first_buckets, make_buckets
from tinyvllm.execution.early_traces import EarlyTraces
from tinyvllm.execution.runner import ModelRunner, load_random_runner, load_runner
from tinyvllm.execution.setting import Setting
from tinyvllm.model.weights.quant import decompose
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.formats.matrix import pack
from tinyvllm.storage.gguf_types import BLOCK_SIZES
from tinyvllm.storage.model_config import read_model_config

pytestmark = pytest.mark.usefixtures("shared_compiling_processes")


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """They are compiled once for all tests here; every step is traced."""
    with mock.patch.dict("tinygrad.codegen.to_program_cache", clear=True):
        yield


@pytest.fixture(autouse=True)
def traced_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(early_traces, "is_worth_it", lambda setting: True)


def tokens_of(runner: ModelRunner) -> list[int]:
    request = make_request(list(b"to be"), name="0")
    generate(runner, [request], 8, chunk=5)
    return list(request.output_ids)


def warm_up_without_tracing(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture the first graphs, of which neither this process nor another may trace one now."""
    early = runner.captures._early
    assert early is not None
    wait_for(lambda: all(trace._pending.is_done for trace in early.traces.values()))

    def trace(*_: object) -> None:
        raise AssertionError("this step's early trace was not taken")

    with monkeypatch.context() as patch:
        for module, name in (
            (pending_steps, "trace_forward"),
            (pending_steps, "trace_sampling"),
            (tracing, "begin_elsewhere"),
        ):
            patch.setattr(module, name, trace)
        runner.warm_up_first()
    assert set(runner.captures.graphs) == set(first_buckets(runner.buckets))


@pytest.mark.parametrize("kind", swept(["gguf", "hf", "random"], ["gguf"]))
def test_the_first_graphs_are_traced_without_the_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are the same, so that they are taken, and they give the same tokens."""
    config = replace(TINY, compile_cache=False)
    files = write_tiny_gguf(tmp_path / "tiny.gguf") if kind == "gguf" else write_tiny_hf_llama(tmp_path / "hf")

    def load() -> ModelRunner:
        return load_random_runner(_shape(files), "Q4_1", config) if kind == "random" else load_runner(files, config)

    runner = load()
    warm_up_without_tracing(runner, monkeypatch)
    monkeypatch.setattr(early_traces, "is_worth_it", lambda setting: False)
    alone = load()
    alone.warm_up_first()
    assert tokens_of(runner) == tokens_of(alone)


def load_before_any_trace(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelRunner, EarlyTraces]:
    """A load that ends first: nothing is ready until then, and all of it thereafter."""
    monkeypatch.setattr(early_traces, "MANY_WORKERS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(EarlyTraces, "advance", lambda self: None)
        runner = load_runner(files, replace(TINY, compile_cache=False))
    early = runner.captures._early
    assert early is not None and len(early.traces) == 2 and len(early._parts) == 4
    pending = [*early._parts, *[trace._pending for trace in early.traces.values()]]
    wait_for(lambda: all(one.is_done for one in pending))
    return runner, early


def test_parts_of_steps_launch_kernels_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is compiled first is used: a few layers have all kernels of equal ones."""
    _, early = load_before_any_trace(write_tiny_gguf(tmp_path / "tiny.gguf"), monkeypatch)
    whole = [trace.wait() for trace in early.traces.values()]
    kernels = {key for trace in whole if trace is not None for key in trace.kernels}
    found = [set(part.wait()) for part in early._parts]
    assert all(found) and set.union(*found) == kernels


@pytest.mark.sweep  # the parts that are compiled: above; that a load does not wait for what is late: below
def test_parts_that_the_load_overtakes_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the whole steps are traced. What is not ready then is withdrawn."""
    runner, early = load_before_any_trace(write_tiny_gguf(tmp_path / "tiny.gguf"), monkeypatch)
    parts, late = list(early._parts), mock.Mock(spec=Pending, is_done=False)
    early._parts.append(late)
    begun, begin = [], early.compiler.begin_packed

    def begin_packed(kernels: dict[object, object], urgency: int) -> list[Pending]:
        begun.append(set(kernels))
        return begin(kernels, urgency)  # type: ignore[arg-type]

    monkeypatch.setattr(early.compiler, "begin_packed", begin_packed)
    runner.warm_up_first()
    assert begun[:4] == [set(part.wait()) for part in parts], "before the whole steps, which are larger"
    late.withdraw.assert_called_once_with()
    assert not early._parts and runner.captures._early is None


def test_what_no_process_has_begun_is_traced_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its early trace is withdrawn, which is no failure of a process."""
    runner, early = load_before_any_trace(write_tiny_gguf(tmp_path / "tiny.gguf"), monkeypatch)
    for trace in early.traces.values():
        trace._pending = Pending(Job(str, None), "a job that no process begins")
    with mock.patch.object(pending_steps, "trace_forward", wraps=tracing.trace_forward) as traced:
        runner.warm_up_first()
    assert traced.call_count == 2 and runner.captures._early is None
    assert "compiling process" not in caplog.text


def test_a_load_that_fails_takes_back_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no process has begun: here all of them."""
    jobs: list[Job] = []

    def begin(function: Callable[[Any], Any], argument: object, what: str, urgency: int) -> Pending:
        jobs.append(Job(function, argument))
        return Pending(jobs[-1], what)

    def fail(stage: str, done: int, total: int) -> None:
        assert not any(job.is_done() for job in jobs)
        raise EngineDeadError("the engine was shut down")

    monkeypatch.setattr(early_traces, "begin_elsewhere", begin)
    monkeypatch.setattr(early_traces, "MANY_WORKERS", 1)
    with pytest.raises(EngineDeadError):
        load_runner(write_tiny_gguf(tmp_path / "tiny.gguf"), replace(TINY, compile_cache=False), fail)
    assert len(jobs) == 6 and all(job.answer.cancelled() for job in jobs)


def _shape(files: ModelFiles) -> ModelConfig:
    return read_model_config(files)


def test_an_early_trace_of_another_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the device had more memory than the other process was told: this process traces the steps again."""
    files, config = write_tiny_gguf(tmp_path / "tiny.gguf"), replace(TINY, compile_cache=False)
    begin = early_traces.begin_early_traces

    def begin_wrongly(setting: Setting, *others: Any, **facts: Any) -> EarlyTraces | None:
        wrong = replace(setting.config, num_gpu_blocks_override=65)
        return begin(replace(setting, config=wrong), *others, **facts)

    with monkeypatch.context() as patch:
        patch.setattr("tinyvllm.execution.runner.begin_early_traces", begin_wrongly)
        runner = load_runner(files, config)
    early, first = runner.captures._early, first_buckets(runner.buckets)
    assert early is not None and set(early.traces) == set(first)
    names = [(trace._pending.wait() or ("lost", None))[0] for trace in early.traces.values()]
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(tracing, "can_trace_elsewhere", lambda: False)
        with mock.patch.object(pending_steps, "trace_forward", wraps=tracing.trace_forward) as traced:
            runner.warm_up_first()
    assert traced.call_count == len(first)
    for bucket, name in zip(early.traces, names, strict=True):
        assert f"{bucket.name} is traced again: what was traced early is {name}, not " in caplog.text
    monkeypatch.setattr(early_traces, "is_worth_it", lambda setting: False)
    alone = load_runner(files, config)
    alone.warm_up_first()
    assert tokens_of(runner) == tokens_of(alone)


@pytest.mark.parametrize(
    ("gigabytes", "hidden_size", "ffn_size", "num_heads", "num_jobs", "num_quantized"),
    [
        pytest.param(32, 4096, 14336, 32, 6, 6, id="8B beside 32 GB"),
        pytest.param(16, 4096, 14336, 32, 2, 6, id="8B beside 16 GB"),
        pytest.param(8, 4096, 14336, 32, 0, 2, id="8B beside 8 GB"),
        pytest.param(4, 4096, 14336, 32, 0, 0, id="8B beside 4 GB"),
        pytest.param(32, 8192, 28672, 64, 2, 6, id="70B beside 32 GB"),
        pytest.param(64, 8192, 28672, 64, 2, 6, id="70B beside 64 GB"),
        pytest.param(80, 8192, 28672, 64, 6, 6, id="70B beside 80 GB"),
    ],
)
def test_early_traces_leave_half_of_the_host_memory_to_the_load(
    gigabytes: int,
    hidden_size: int,
    ffn_size: int,
    num_heads: int,
    num_jobs: int,
    num_quantized: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = replace(
        _shape(write_tiny_gguf(tmp_path / "tiny.gguf")),
        num_layers=32,
        vocab_size=128256,
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        dtype="float16",
    )
    setting = mock.Mock(model_config=shape, config=TINY, buckets=make_buckets(Limits(2, 8), TINY))
    started: list[str] = []

    def begin_elsewhere(function: Callable[..., object], task: object, what: str, urgency: int) -> Pending:
        started.append(what)
        return mock.Mock(spec=Pending)

    monkeypatch.setattr(early_traces, "available_bytes", lambda: gigabytes * 10**9)
    for name, value in (("num_workers", 16), ("can_trace_elsewhere", True), ("renderers_of", {})):
        monkeypatch.setattr(early_traces, name, lambda *_, value=value: value)
    monkeypatch.setattr("tinyvllm.device.meta.dump", lambda value: b"")
    monkeypatch.setattr(early_traces, "begin_elsewhere", begin_elsewhere)
    for is_quantized, expected in ((False, num_jobs), (True, num_quantized)):
        started.clear()
        early = early_traces.begin_early_traces(setting, mock.Mock(), None, is_quantized=is_quantized)
        assert len(started) == expected and (early is None) == (not expected)


def test_every_loader_of_a_backend_packs_equal_matrices_once() -> None:
    methods = inspect.getmembers(Backend, inspect.isfunction)
    loaders = {
        name
        for name, method in methods
        if any("HostMatrix" in str(one.annotation) for one in inspect.signature(method).parameters.values())
    }
    assert loaders == set(early_traces._LOADING)


def test_alike_matrices_have_maps_of_their_own() -> None:
    matrix = replace(pack(make_host("Q4_0", 64, 64), "row", None, "CPU"), maps=upload(np.zeros(64, np.uint32), "CPU"))
    like = early_traces._like(matrix)
    assert matrix.maps is not None and like.maps is not None
    assert like.maps.uop.base.buffer is not matrix.maps.uop.base.buffer and like.maps.shape == matrix.maps.shape
    assert early_traces._like(replace(matrix, maps=None)).maps is None


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_packing_takes_no_more_memory_than_is_counted_for_an_early_trace(name: str) -> None:
    rows, cols, pieces_bytes = 4096, 4096, 12 << 20  # some steps go piece by piece
    block_size, block_bytes = BLOCK_SIZES[name]
    raw = np.zeros((rows, cols // block_size, block_bytes), np.uint8)
    for count, each_bytes in ((1, early_traces.ALONE_BYTES), (2, early_traces.STACKED_BYTES)):
        backend = rendered("CUDA")
        tracemalloc.start()
        try:
            hosts = [decompose(name, raw, (rows, cols)) for _ in range(count)]
            backend.matrix(hosts[0]) if count == 1 else backend.gate_up(*hosts)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        num_weights = rows * cols * count
        assert num_weights < peak < each_bytes * num_weights + pieces_bytes, peak / num_weights
