"""Numbers that are not finite end the request that has them, with its position; its neighbors, and whoever gets its
blocks next, answer as if it had never been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders import write_tiny_hf_llama
from tests.faults.test_device import NUM_BLOCKS, SHAPE, TINY
from tests.server.soak import SCHEMA
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import GrammarSpec
from tinyvllm.engine.llm import CompletionOutput

BAD, INFINITE = 200, 201  # tokens whose embeddings have a NaN, and an infinity
GOOD = [list(b"The first neighbor"), list(b"And another one, longer than a block of the pool")]
WHOLE = [list(b"y" * 140), list(b"z" * 140)]  # which with 16 more tokens each need most of the pool's blocks


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A tiny model with a head of its own, since no logits of a tied one would be finite."""
    files = write_tiny_hf_llama(tmp_path_factory.mktemp("nan") / "tiny", **TINY)
    path = Path(files.path) / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][[BAD, INFINITE], 3] = np.nan, np.inf
    save_file(weights, path, metadata={"format": "pt"})
    llm = LLM(str(files.path), **SHAPE, warm_up="background")
    yield llm
    llm.close()


def generate(llm: LLM, prompts: list[list[int]], **params: Any) -> list[CompletionOutput]:
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params})
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("token_id", [BAD, INFINITE])
def test_a_request_with_bad_numbers_ends_alone_and_leaves_nothing_in_its_blocks(llm: LLM, token_id: int) -> None:
    expected = [choice.token_ids for choice in generate(llm, [*GOOD, *WHOLE])]
    for position in (0, 20, 40):  # in the first block, in the second, and in the last, which is part full
        bad = list(b"x" * 41)
        bad[position] = token_id
        *good, failed = generate(llm, [*GOOD, bad])
        assert [choice.token_ids for choice in good] == expected[:2]
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert "no finite logits for the token at position 41" in str(failed.error) and "tiny" in str(failed.error)
        manager = llm._loaded.core.scheduler.block_manager
        manager.audit()
        assert manager.num_free == NUM_BLOCKS - 1
        assert [choice.token_ids for choice in generate(llm, WHOLE)] == expected[2:], (
            "the next holder of its blocks saw its numbers"
        )


def test_bad_numbers_beside_a_grammar_and_logprobs(llm: LLM) -> None:
    prompt = [65, BAD, 66]
    for params in ({"grammar": GrammarSpec("json_schema", json.dumps(SCHEMA))}, {"prompt_logprobs": 1, "logprobs": 2}):
        (choice,) = generate(llm, [prompt], **params)
        assert (choice.finish_reason, choice.token_ids) == ("error", []) and "no finite logits" in str(choice.error)
