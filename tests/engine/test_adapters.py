"""Adapters through the whole engine give peft's greedy tokens and logprobs, alone and mixed in one batch.
Expected: data/adapter_reference.json, which write_adapter_reference.py makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import write_adapter
from tests.builders import TinyLlama, write_tiny_hf_llama
from tests.engine.write_adapter_reference import ADAPTERS, NUM_STEPS, NUM_TOP, OUTPUT
from tests.engine.write_qwen3_reference import NUMBERS
from tests.engine.write_qwen3_reference import OUTPUT as BASE_OUTPUT
from tests.patience import wait_for
from tinyvllm import LLM, LoRARequest, SamplingParams
from tinyvllm.errors import RequestError
from tinyvllm.execution.adapters import AdapterTable

ENGINE: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 8,  # prompts in chunks, in steps with others' decodes
    "num_gpu_blocks_override": 101,
    "block_size": 8,
    "decode_buckets": (8,),
    "token_buckets": (8,),
    "kv_cache_dtype": "float32",
    "enable_lora": True,
    "max_loras": 2,  # fewer than there are adapters
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True, logprobs=NUM_TOP)
BASE = ""  # the name of the model without an adapter, in the cases below


def read_cases() -> list[dict[str, Any]]:
    """peft's cases, and of the model itself as many tokens of transformers'."""
    cases = json.loads(OUTPUT.read_text(encoding="utf-8"))["cases"]
    for case in json.loads(BASE_OUTPUT.read_text(encoding="utf-8"))["cases"][:2]:
        top = [entries[:NUM_TOP] for entries in case["top"][:NUM_STEPS]]
        cases.append({"adapter": BASE, "prompt": case["prompt"], "tokens": case["tokens"][:NUM_STEPS], "top": top})
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for name, arguments in ADAPTERS.items():
        write_adapter(path / name, TinyLlama(**NUMBERS), **arguments)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    files = write_tiny_hf_llama(folder / "model", **NUMBERS)
    loaded = LLM(str(files.path), lora_modules=[f"attention={folder / 'attention'}"], **ENGINE)
    yield loaded
    loaded.close()


def check(output: Any, case: dict[str, Any]) -> None:
    (choice,) = output.outputs
    assert list(choice.token_ids) == case["tokens"], (case["adapter"], case["prompt"])
    for found, expected in zip(choice.logprobs, case["top"], strict=True):
        logprobs = {token: entry.logprob for token, entry in found.items()}
        assert {token: logprobs[token] for token, _ in expected} == pytest.approx(dict(expected), abs=1e-4)


def request_of(folder: Path, case: dict[str, Any]) -> LoRARequest | None:
    name = case["adapter"]
    return LoRARequest(name, 1, str(folder / name)) if name else None


def test_tokens_and_logprobs_are_pefts(llm: LLM, folder: Path) -> None:
    """In one batch of prompts of three adapters (one waits for a slot) and of none; and again, where the prompts are
    found in the cache, those of another adapter are not."""
    cases = read_cases()
    for is_again in (False, True):
        requests = [request_of(folder, case) for case in cases]
        outputs = llm.generate([case["prompt"] for case in cases], GREEDY, lora_request=requests)
        for output, case in zip(outputs, cases, strict=True):
            check(output, case)
        cached = [
            output.num_cached_tokens for output, case in zip(outputs, cases, strict=True) if len(case["prompt"]) > 30
        ]
        assert all(cached) if is_again else not any(cached)


def test_a_request_alone_gives_the_same_tokens(llm: LLM, folder: Path) -> None:
    for case in read_cases()[::3]:
        check(llm.generate(case["prompt"], GREEDY, lora_request=request_of(folder, case))[0], case)


def test_an_adapter_is_found_by_name_and_an_unknown_one_is_an_error(llm: LLM, folder: Path) -> None:
    case = read_cases()[0]
    check(llm.generate(case["prompt"], GREEDY, lora_request=LoRARequest("attention"))[0], case)
    with pytest.raises(RequestError, match=r"adapter 'other' is not loaded .*attention.*: give lora_path"):
        llm.generate("a", GREEDY, lora_request=LoRARequest("other"))
    with pytest.raises(RequestError, match=r"q_proj.lora_A.weight has rank 32, but --max-lora-rank is 16: raise it"):
        path = write_adapter(folder / "wide", TinyLlama(**NUMBERS), ("q_proj",), 32)
        llm.generate("a", GREEDY, lora_request=LoRARequest("wide", 1, str(path)))


def test_an_adapter_whose_files_are_gone_costs_nobody_else(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {case["adapter"]: case for case in read_cases()}
    first, *others = ADAPTERS
    for name in (first, *others):  # the first is no longer in host memory, which has room for two
        check(llm.generate(cases[name]["prompt"], GREEDY, lora_request=request_of(folder, cases[name]))[0], cases[name])
    (folder / first).rename(folder / "moved")
    with pytest.raises(RequestError, match="have changed since it was loaded, or are gone: load it again"):
        llm.generate("a", GREEDY, lora_request=LoRARequest(first))
    # they vanish after a request was taken: it ends, and its batch goes on
    monkeypatch.setattr("tinyvllm.execution.adapters.AdapterTable.require", lambda *_: None)
    num_failed = llm.stats.extra["num_failed_steps"]
    for _ in range(4):  # one more than the failures in a row that end an engine
        prompts, loras = ["a", cases[BASE]["prompt"]], [LoRARequest(first), None]
        failed, whole = llm.generate(prompts, GREEDY, lora_request=loras)
        assert failed.outputs[0].finish_reason == "error"
        check(whole, cases[BASE])
    assert llm.stats.extra["num_failed_steps"] == num_failed
    (folder / "moved").rename(folder / first)
    check(llm.generate(cases[first]["prompt"], GREEDY, lora_request=LoRARequest(first))[0], cases[first])


def test_steps_go_on_while_an_adapter_is_read_again(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {case["adapter"]: case for case in read_cases()}
    first, *others = ADAPTERS
    for name in (first, *others):  # the first is no longer in host memory
        check(llm.generate(cases[name]["prompt"], GREEDY, lora_request=request_of(folder, cases[name]))[0], cases[name])
    num_steps, read = llm.stats.extra["num_steps"], AdapterTable.read
    passed = []

    def read_slowly(table: AdapterTable, path: str) -> Any:
        wait_for(lambda: llm.stats.extra["num_steps"] >= num_steps + NUM_STEPS)
        passed.append(llm.stats.extra["num_steps"] - num_steps)
        return read(table, path)

    monkeypatch.setattr(AdapterTable, "read", read_slowly)
    chosen = [cases[first], cases[BASE]]
    loras = [LoRARequest(first), None]
    outputs = llm.generate([case["prompt"] for case in chosen], GREEDY, lora_request=loras)
    for output, case in zip(outputs, chosen, strict=True):
        check(output, case)
    assert passed == [NUM_STEPS]  # the other request ran to its end
