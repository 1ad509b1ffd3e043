"""The real Gemma 3 270M: transformers' greedy tokens and logprobs, llama.cpp's token ids, and what a base model's chat
says. Expected: data/gemma3_270m.json, which write_gemma3_270m_reference.py makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sweeps import swept
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError
from tinyvllm.storage.resolve import resolve_model
from tinyvllm.text.chat import load_chat_template
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

NAME = "gemma-3-270m"
REFERENCE = json.loads((Path(__file__).parent / "data" / "gemma3_270m.json").read_text(encoding="utf-8"))
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 112,
    "max_num_seqs": 9,  # all at once: a step reads all the weights, however many sequences there are
    "max_num_batched_tokens": 32,  # prompts in chunks, in steps with others' decodes
    "num_gpu_blocks_override": 64,
    "decode_buckets": (9,),
    "token_buckets": (32,),
}


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    try:
        return resolve_model(NAME)
    except ModelError as error:
        pytest.fail(f"{error}\nscripts/test.sh fetches it; by hand: tinyvllm pull {NAME}", pytrace=False)


@pytest.fixture(scope="module")
def tokenizer(files: ModelFiles) -> Tokenizer:
    return load_tokenizer(files)


@pytest.mark.parametrize("longest", swept((8, None), []))
def test_tokens_and_logprobs_are_transformers(files: ModelFiles, longest: int | None) -> None:
    """Chat, prose, code, numbers and other scripts. A reference ends early where two tokens are nearly as likely."""
    cases = [case | {"tokens": case["tokens"][:longest], "top": case["top"][:longest]} for case in REFERENCE["cases"]]
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(case["tokens"]), ignore_eos=True, logprobs=3) for case in cases
    ]
    llm = LLM(str(files.path), **ENGINE)
    outputs = llm.generate([case["prompt"] for case in cases], params)
    llm.close()
    for output, case in zip(outputs, cases, strict=True):
        (choice,) = output.outputs
        assert choice.logprobs is not None
        assert list(choice.token_ids) == case["tokens"], case["name"]
        for found, expected in zip(choice.logprobs, case["top"], strict=True):
            assert {token: entry.logprob for token, entry in found.items()} == pytest.approx(dict(expected), abs=2e-3)


@pytest.mark.sweep  # by default: such vocabularies in tests/text, and the default model's against llama.cpp's
def test_token_ids_are_llama_cpps(tokenizer: Tokenizer) -> None:
    for text, parse_special, ids in REFERENCE["texts"]:
        assert tokenizer.encode(text, parse_special=parse_special) == ids, repr(text)
    for case in REFERENCE["cases"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"], case["name"]


@pytest.mark.sweep  # as above: its tokenizer takes seconds to read
def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for case in REFERENCE["cases"]:
        ids = case["prompt_ids"][1:]
        assert tokenizer.decode(ids, skip_special_tokens=False, is_continuation=True) == case["prompt"]


def test_the_base_model_has_no_chat_template(files: ModelFiles) -> None:
    assert load_chat_template(files) is None
