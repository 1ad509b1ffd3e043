"""A long generation leaves no buffer behind: one per layer and token ended other engines after some thousand tokens.
20,000 steps of one token: python -m pytest -m slow tests/engine/test_live_buffers.py
A million tokens, in steps of 64: python -m tests.engine.test_live_buffers 1000000"""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.engine.requests import SETTINGS
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles

pytestmark = pytest.mark.timeout(1800)

TINY: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn": 32}
EACH = 40  # tokens of a request


def generate(llm: LLM, num_tokens: int, each: int = EACH) -> None:
    """One request of `each` tokens after another, at least `num_tokens` tokens in all, each with its own prompt."""
    params = SamplingParams(max_tokens=each, ignore_eos=True, temperature=1.0, seed=1)
    for start in range(0, num_tokens, each):
        (output,) = llm.generate([f"{start:05}"], params)
        assert len(output.outputs[0].token_ids) == each


def counts() -> dict[str, int]:
    """What a leak would make grow: tinygrad's buffers and their bytes, nodes of its graphs, and tensors."""
    from tinygrad import Tensor, UOp
    from tinygrad.device import Buffer
    from tinygrad.helpers import GlobalCounters

    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return {"bytes": GlobalCounters.mem_used} | {kind.__name__: kinds.count(kind) for kind in (Buffer, Tensor, UOp)}


@pytest.mark.parametrize("num_tokens", [240, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_long_generation_leaves_no_buffer_behind(tiny_gguf_files: ModelFiles, num_tokens: int) -> None:
    llm = LLM(str(tiny_gguf_files.path), **SETTINGS)
    generate(llm, EACH)
    before = counts()
    assert before["Buffer"] > 10 and before["bytes"] > 0, before
    generate(llm, num_tokens)
    assert counts() == before
    llm.close()


def generate_batches(llm: LLM, num_tokens: int) -> int:
    """Batches of 64 requests, at least `num_tokens` tokens in all; returns how many there were."""
    params = SamplingParams(max_tokens=EACH, ignore_eos=True, temperature=1.0, seed=1)
    done = 0
    while done < num_tokens:
        outputs = llm.generate([f"{done + index:07}" for index in range(64)], params, use_tqdm=False)
        done += sum(len(output.outputs[0].token_ids) for output in outputs)
    return done


def main(num_tokens: int) -> None:
    """Print what is live before, and after each tenth of the tokens."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_tiny_hf_llama(Path(folder) / "model", **TINY)
        llm = LLM(str(files.path), max_model_len=128, max_num_seqs=64, max_num_batched_tokens=64, warm_up="background")
        done, start_s = generate_batches(llm, 64 * EACH), time.monotonic()
        before = counts()
        for _ in range(10):
            done += generate_batches(llm, num_tokens // 10)
            rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{done} tokens in {time.monotonic() - start_s:.0f} s: {counts()}, peak RSS {rss_mib:.0f} MiB",
                flush=True,
            )
        assert counts() == before, (before, counts())
        llm.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
