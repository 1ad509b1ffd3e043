"""Loads a fake device into an engine process: it computes tokens by hashing, or spells an answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.engine.fakes import FakeModelRunner, make_loaded, say
from tinyvllm.config import EngineConfig
from tinyvllm.device.compile_workers import CompileWorkers
from tinyvllm.engine.loading import LoadedEngine

ANSWER = "Grüße, 世界! 👋"
STEP_S, DECODE_S = 0.02, 0.25


def _runner() -> FakeModelRunner:
    return FakeModelRunner(num_blocks=64, max_num_seqs=8)


def answering(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """Answers everything with ANSWER."""
    progress("load", 1, 1)
    runner = _runner()
    runner.choose = say(ANSWER, ANSWER)
    return make_loaded(runner)


def endless(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """Never samples EOS, and takes STEP_S for each step."""
    runner = _runner()
    runner.choose = lambda request, digest: 97 + digest % 26
    runner.before_step = lambda plan: time.sleep(STEP_S)
    return make_loaded(runner)


def slow(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """`endless`, and takes DECODE_S for a step without a prompt: what a test begins still runs when it goes on."""
    runner = _runner()
    runner.choose = lambda request, digest: 97 + digest % 26
    runner.before_step = lambda plan: time.sleep(DECODE_S if all(entry.start for entry in plan.entries) else STEP_S)
    return make_loaded(runner)


def compiling(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """Waits for a compiler that never ends, forked by a template."""
    _compile(2)
    return answering(config, progress)


def compiling_alone(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """The same without a template."""
    _compile(1)
    return answering(config, progress)


def _compile(size: int) -> None:
    CompileWorkers(size, f"{__name__}:begin").submit(time.sleep, 1000).result()


def stuck(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """Its first step waits for a compiler that never ends, forked by a template."""
    progress("load", 1, 1)
    runner = _runner()
    runner.before_step = lambda plan: _compile(2)
    return make_loaded(runner)


def begin() -> None:
    """Nothing to prepare in a compiling process."""
