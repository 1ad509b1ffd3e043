"""A long generation leaves no object of Metal's behind: one a layer and token has ended other engines after some
thousand tokens, with every count of bytes flat. 20,000 tokens:
python -m pytest -m slow tests/metal/test_live_objects.py"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest

from tests.metal.simulator import Settings, live_objects

pytestmark = pytest.mark.timeout(1800)

CONTEXT = 128


def objects_now() -> Counter[str]:
    from tinygrad import Device

    Device["METAL"].synchronize()
    gc.collect()
    return live_objects()


@pytest.mark.parametrize("num_tokens", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_long_generation_leaves_no_objects_behind(simulator: Settings, tmp_path: Path, num_tokens: int) -> None:
    from tests.builders import write_tiny_hf_llama
    from tinyvllm import LLM, SamplingParams

    files = write_tiny_hf_llama(tmp_path / "model", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=32)
    llm = LLM(str(files.path), max_model_len=CONTEXT, max_num_seqs=1, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=CONTEXT - 8, ignore_eos=True, temperature=1.0, seed=1)

    def generate(count: int) -> None:
        for start in range(0, count, CONTEXT - 8):
            (output,) = llm.generate([f"{start:05}"], params)
            assert len(output.outputs[0].token_ids) == CONTEXT - 8

    generate(1)
    before, steps = objects_now(), simulator.num_graph_runs
    generate(num_tokens)
    assert simulator.num_graph_runs - steps >= num_tokens, "a step is a graph's run"
    assert objects_now() == before
    llm.close()
