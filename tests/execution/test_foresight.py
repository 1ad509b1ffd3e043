"""Steps that are traced before the weights are loaded are those that would be traced afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tests.execution.driver import generate, make_request
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig, ModelConfig, ModelFiles
from tinyvllm.device.compiling import _end_pool
from tinyvllm.execution import foresight, pending_steps, tracing
from tinyvllm.execution.buckets import first_buckets
from tinyvllm.execution.foresight import Foresight
from tinyvllm.execution.runner import ModelRunner, load_random_runner, load_runner
from tinyvllm.execution.setting import Setting
from tinyvllm.storage.model_config import read_model_config

CONFIG = EngineConfig(
    "tiny",
    max_model_len=96,
    max_num_seqs=2,
    max_num_batched_tokens=8,
    num_gpu_blocks_override=33,
    block_size=8,
)

pytestmark = pytest.mark.usefixtures("compiling_processes")


@pytest.fixture(autouse=True)
def foreseeing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(foresight, "is_worth_it", lambda setting: True)
    with mock.patch.dict("tinygrad.codegen.to_program_cache", clear=True):
        yield
    _end_pool()


def tokens_of(runner: ModelRunner) -> list[int]:
    request = make_request(list(b"to be"), name="0")
    generate(runner, [request], 8, chunk=5)
    return list(request.output_ids)


def warm_up_without_tracing(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture the first graphs, of which neither this process nor another may trace one now."""

    while not all(one.is_done for one in runner.captures._tracer._foreseen.values()):
        time.sleep(0.01)

    def trace(*_: object) -> None:
        raise AssertionError("this step was not foreseen")

    with monkeypatch.context() as patch:
        for module, name in (
            (pending_steps, "trace_forward"),
            (pending_steps, "trace_sampling"),
            (tracing, "begin_elsewhere"),
        ):
            patch.setattr(module, name, trace)
        runner.warm_up_first()
    assert set(runner.captures.graphs) == set(first_buckets(runner.buckets))


@pytest.mark.parametrize("kind", ["gguf", "hf", "random"])
def test_the_first_graphs_are_traced_without_the_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are the same, so that they are taken, and they give the same tokens."""
    config = replace(CONFIG, compile_cache=False)
    files = write_tiny_gguf(tmp_path / "tiny.gguf") if kind == "gguf" else write_tiny_hf_llama(tmp_path / "hf")

    def load() -> ModelRunner:
        return load_random_runner(_shape(files), "Q4_0", config) if kind == "random" else load_runner(files, config)

    runner = load()
    with mock.patch("tinyvllm.execution.captures.MANY_LAYERS", 0):
        warm_up_without_tracing(runner, monkeypatch)
    monkeypatch.setattr(foresight, "is_worth_it", lambda setting: False)
    alone = load()
    alone.warm_up_first()
    assert tokens_of(runner) == tokens_of(alone)


def test_parts_of_steps_launch_kernels_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is compiled first is used: a few layers have all kernels of equal ones."""
    monkeypatch.setattr(foresight, "MANY_WORKERS", 1)
    made: list[Foresight] = []
    monkeypatch.setattr(Foresight, "advance", lambda self: made.append(self))
    load_runner(write_tiny_gguf(tmp_path / "tiny.gguf"), replace(CONFIG, compile_cache=False))
    seen = made[0]
    whole = [trace.read() for trace in seen.traces.values()]
    kernels = {key for trace in whole if trace is not None for key in trace.kernels}
    found = [set(part.wait()) for part in seen._parts]
    assert len(found) == 3
    assert all(found) and set.union(*found) == kernels


def _shape(files: ModelFiles) -> ModelConfig:
    return read_model_config(files)


def test_what_was_foreseen_wrongly_is_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device had more memory than the other process was told."""
    files, config = write_tiny_gguf(tmp_path / "tiny.gguf"), replace(CONFIG, compile_cache=False)
    begun = foresight.foresee

    def foresee(setting: Setting, *others: object) -> Foresight | None:
        wrong = replace(setting.config, num_gpu_blocks_override=65)
        return begun(replace(setting, config=wrong), *others)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("tinyvllm.execution.runner.foresee", foresee)
        runner = load_runner(files, config)
    with mock.patch("tinyvllm.execution.captures.MANY_LAYERS", 0):
        runner.warm_up_first()
    monkeypatch.setattr(foresight, "is_worth_it", lambda setting: False)
    alone = load_runner(files, config)
    alone.warm_up_first()
    assert tokens_of(runner) == tokens_of(alone)
