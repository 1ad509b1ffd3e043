"""Steps that overlap on a real runner: the device feeds one with the tokens of the other, and nothing is different."""

from __future__ import annotations

import pytest

from tests.engine.requests import SETTINGS, make_runner, run
from tests.sweeps import swept
from tinyvllm.config import ModelFiles
from tinyvllm.engine.core import EngineCore


@pytest.fixture(scope="module")
def alternating(tiny_gguf_files: ModelFiles) -> tuple[list[list[int]], EngineCore]:
    runner = make_runner(tiny_gguf_files, async_scheduling=False)
    assert runner.max_in_flight == 1
    return run(runner)


@pytest.mark.parametrize("compile_cache", swept((False, True), [True]), ids=["traced", "from the cache"])
def test_overlapping_steps_give_the_tokens_of_alternating_ones(
    alternating: tuple[list[list[int]], EngineCore], tiny_gguf_files: ModelFiles, compile_cache: bool
) -> None:
    expected, core = alternating
    assert core.stats.num_preemptions > 0 and any(len(tokens) < 3 for tokens in expected)
    for _ in range(1 + compile_cache):  # the second time from what the first kept
        runner = make_runner(tiny_gguf_files, async_scheduling=True, compile_cache=compile_cache)
        assert runner.max_in_flight == 2
        tokens, core = run(runner)
        assert tokens == expected
        assert core.stats.num_free_blocks == SETTINGS["num_gpu_blocks_override"] - 1
    if compile_cache:
        assert runner.store is not None and runner.store.num_steps_read == 2 * runner.num_captures


def test_overlapping_logits_processing_gives_the_tokens_of_alternating_steps(tiny_gguf_files: ModelFiles) -> None:
    """Processed rows among plain ones, rows whose mask needs the token before, preemptions: the same either way."""
    results = []
    for overlaps in (False, True):
        tokens, core = run(make_runner(tiny_gguf_files, async_scheduling=overlaps), is_processed=True, num=20)
        assert core.stats.num_preemptions > 0
        results.append(tokens)
    assert results[0] == results[1]
    assert any(len(tokens) > 4 for tokens in results[0][::4])
