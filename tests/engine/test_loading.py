from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from tests.engine.fakes import FakeCaptures, FakeModelRunner
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.engine import loading
from tinyvllm.engine.loading import load_engine
from tinyvllm.errors import ModelError, TinyvllmError


class WarmRunner(FakeModelRunner):
    """Stands in for a ModelRunner that reports its warm-up, or fails in it."""

    failure: BaseException | None = None
    adapters = None

    def warm_up(self, progress: Any) -> None:
        progress("warm-up", 1, 1)
        if self.failure is not None:
            raise self.failure

    def warm_up_first(self, progress: Any) -> None:
        self.captures = FakeCaptures(5)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> WarmRunner:
    """What execution.runner.load_runner will return, without a device."""
    runner, module = WarmRunner(), ModuleType("tinyvllm.execution.runner")
    monkeypatch.setattr(module, "load_runner", lambda files, config, progress: runner, raising=False)
    monkeypatch.setitem(sys.modules, "tinyvllm.execution.runner", module)
    return runner


def test_the_tokenizer_and_its_ends_come_from_the_models_files(tiny_hf_files: ModelFiles, runner: WarmRunner) -> None:
    seen = []
    config = EngineConfig(str(tiny_hf_files.path), enable_prefix_caching=False, scheduling_policy="priority", seed=3)
    loaded = load_engine(config, lambda *report: seen.append(report))
    assert seen == [("warm-up", 1, 1)]
    assert loaded.runner is runner and loaded.capacity is runner.capacity
    assert loaded.tokenizer.encode("hi") == list(b"hi")
    assert loaded.chat_template is not None
    assert loaded.factory.eos_ids >= loaded.tokenizer.eos_ids
    assert not loaded.engine.core.scheduler.block_manager.enable_prefix_caching


def test_graphs_come_in_the_background_where_that_is_asked_for(tiny_hf_files: ModelFiles, runner: WarmRunner) -> None:
    core = load_engine(EngineConfig(str(tiny_hf_files.path), warm_up="background")).engine.core
    assert core.has_captures_to_come and core.stats.num_captures_to_come == 5
    full = load_engine(EngineConfig(str(tiny_hf_files.path)), lambda *report: None)
    assert not full.engine.core.has_captures_to_come
    with pytest.raises(TinyvllmError, match="--warm-up is 'never': choose one of background, full, idle"):
        EngineConfig("tiny", warm_up="never")


def test_a_failed_warm_up_gives_the_device_back(tiny_hf_files: ModelFiles, runner: WarmRunner) -> None:
    runner.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_engine(EngineConfig(str(tiny_hf_files.path)), lambda *report: None)
    assert runner.is_closed


def test_a_failed_load_ends_the_processes_that_it_began_early(
    tiny_hf_files: ModelFiles, runner: WarmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    monkeypatch.setattr(loading, "begin_early", lambda config, num_layers: events.append("begin"))
    monkeypatch.setattr(loading, "end_early", lambda: events.append("end"))
    load_engine(EngineConfig(str(tiny_hf_files.path)))
    assert events == ["begin"]
    with pytest.raises(TinyvllmError):
        load_engine(EngineConfig(str(tiny_hf_files.path), tool_call_parser="herms"))
    assert events == ["begin", "begin", "end"]


def test_an_unknown_model_is_refused_before_anything_is_loaded(runner: WarmRunner) -> None:
    with pytest.raises(ModelError):
        load_engine(EngineConfig("./no/such/model"))


@pytest.mark.parametrize("setting", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused_before_anything_is_loaded(
    tiny_hf_files: ModelFiles, runner: WarmRunner, setting: str
) -> None:
    settings: dict[str, Any] = {setting: "herms"}
    with pytest.raises(TinyvllmError, match=f"--{setting.replace('_', '-')} is 'herms': choose from"):
        load_engine(EngineConfig(str(tiny_hf_files.path), **settings))
