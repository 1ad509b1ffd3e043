"""Drafts through the whole engine: every method's output is that of no drafting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.families.mtp import write_hf_with_mtp
from tests.families.recipes import RECIPES
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles
from tinyvllm.execution.draft_model import DraftModel
from tinyvllm.scheduling.drafts import Speculator
from tinyvllm.scheduling.request import Request

ENGINE: dict[str, Any] = {
    "max_model_len": 160,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 25,  # 192 tokens, where the prompts and outputs of four need more: preemption
    "block_size": 8,
    "decode_buckets": (4,),
    "token_buckets": (32,),
    "verify_buckets": (4, 16),
}
PROMPTS = ["to be", "or not to be, that is the question: whether 'tis nobler in the mind", "ay, there's the rub"] * 2
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=48, logprobs=2),
    SamplingParams(temperature=1.1, top_p=0.8, seed=8, max_tokens=30, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, top_k=20, seed=9, max_tokens=48, min_tokens=20),
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, presence_penalty=0.5),
    SamplingParams(temperature=1.0, min_p=0.02, seed=10, max_tokens=33, stop=("q",)),
]


def generate(files: ModelFiles, **more: Any) -> tuple[list[Any], LLM]:
    llm = LLM(str(files.path), **ENGINE | more)
    return outputs_of(llm), llm


def outputs_of(llm: LLM) -> list[Any]:
    """Of all prompts, twice: again, where they are found in the prefix cache."""
    return [
        (output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].finish_reason)
        for _ in range(2)
        for output in llm.generate(PROMPTS, PARAMS)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "large", layers=3, seed=1)


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> list[Any]:
    outputs, llm = generate(files)
    llm.close()
    return outputs


# by default, a draft model's tokens are those of the model itself in tests/execution/test_draft_model.py, and an engine
# answers the same with right and wrong drafts in test_drafts.py
@pytest.mark.sweep
@pytest.mark.parametrize("draft", [{"layers": 3, "seed": 1}, {"layers": 1, "seed": 2}], ids=["itself", "another"])
def test_a_draft_model_changes_no_token(
    tmp_path: Path, files: ModelFiles, expected: list[Any], draft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself is right in every draft (of requests without penalties, which drafts do not know); another one
    seldom is. Sequences are preempted, and prompts cached."""
    wrong: list[Any] = []
    settled = Speculator.settled

    def settle(self: Speculator, request: Request, num_drafted: int, num_accepted: int) -> None:
        if num_accepted < num_drafted and not request.params.has_penalties and request.finish_reason is None:
            wrong.append((request.request_id, len(request.output_ids), num_drafted, num_accepted))
        settled(self, request, num_drafted, num_accepted)

    monkeypatch.setattr(Speculator, "settled", settle)
    draft_files = write_tiny_hf_llama(tmp_path / "draft", **draft)
    config = {"model": str(draft_files.path), "num_speculative_tokens": 3, "adaptive": False}
    outputs, llm = generate(files, speculative_config=config)
    assert outputs == expected
    speculator = llm._loaded.engine.core.scheduler.speculator
    assert speculator is not None and isinstance(speculator.drafter, DraftModel)
    counts, blocks = speculator.counts, speculator.drafter.blocks
    assert counts.num_draft_tokens > 100 and llm.stats.num_preemptions > 0, (counts, llm.stats)
    assert (draft["seed"] == 1) == (not wrong), wrong
    blocks.audit()
    assert not blocks.holders
    llm.close()
    assert not speculator.drafter.runner.pool.keys


@pytest.mark.sweep  # tests/execution/test_mtp.py has the layer by itself, test_drafts.py states that are set back
def test_a_models_own_layer_changes_no_token(tmp_path: Path) -> None:
    """Recurrent layers, whose states are set back; preempted sequences; prompts from the prefix cache."""
    files = write_hf_with_mtp(tmp_path / "tiny", RECIPES["qwen3_5"])
    config = {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}
    exact = {"dtype": "float32", "kv_cache_dtype": "float32", "verify_buckets": (16,)}
    outputs, llm = generate(files, speculative_config=config, **exact)
    scheduler = llm._loaded.engine.core.scheduler
    speculator, scheduler.speculator = scheduler.speculator, None
    assert speculator is not None
    assert speculator.counts.num_drafts > 200 and llm.stats.num_preemptions > 0, (speculator.counts, llm.stats)
    assert outputs_of(llm) == outputs
    llm.close()
