"""A long generation leaves no object of Metal's behind: one per layer and token ended other engines after some
thousand tokens, with every count of bytes flat. 20,000 steps of one token, and a million tokens in steps of 64:
python -m pytest -m slow tests/metal/test_live_objects.py"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest

from tests.builders import without_logits_processing
from tests.engine.test_live_buffers import EACH, TINY, generate, generate_batches
from tests.metal.scenarios import SCENARIOS
from tests.metal.simulator import Settings, live_objects, where_nothing_runs

pytestmark = pytest.mark.timeout(1800)


def objects_now() -> Counter[str]:
    from tinygrad import Device

    Device["METAL"].synchronize()
    gc.collect()
    return live_objects()


@pytest.mark.parametrize("num_tokens", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_long_generation_leaves_no_objects_behind(simulator: Settings, tmp_path: Path, num_tokens: int) -> None:
    """Objects are the host's: what kernels compute changes nothing of them, so that none runs. Each token is 0."""
    from tinyvllm import LLM

    scenario = SCENARIOS["float16"]  # whose programs test_engine.py needs, too
    files = scenario.write(tmp_path / "model")
    with where_nothing_runs(simulator), without_logits_processing():
        llm = LLM(str(files.path), **scenario.engine)
        generate(llm, 120, each=50)
        before, runs = objects_now(), simulator.num_graph_runs
        generate(llm, num_tokens, each=50)
        assert simulator.num_graph_runs - runs >= num_tokens, "a step is a graph's run"
        assert objects_now() == before
        llm.close()


@pytest.mark.slow
def test_a_million_tokens_in_batches_leave_no_objects_behind(simulator: Settings, tmp_path: Path) -> None:
    """As above, with 64 requests at once."""
    from tests.builders import write_tiny_hf_llama
    from tinyvllm import LLM

    files = write_tiny_hf_llama(tmp_path / "model", **TINY)
    with where_nothing_runs(simulator):
        llm = LLM(str(files.path), max_model_len=128, max_num_seqs=64, max_num_batched_tokens=64, warm_up="background")
        generate_batches(llm, 64 * EACH)
        before, done = objects_now(), 0
        for _ in range(20):
            done += generate_batches(llm, 50_000)
            print(f"{done} tokens", flush=True)
            assert objects_now() == before, done
        llm.close()
