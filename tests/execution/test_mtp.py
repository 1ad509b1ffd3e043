"""Drafts by a model's own layer against transformers' equations, and through the engine. Expected: data/mtp.json, which
write_mtp_reference.py makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.execution.driver import give_blocks, make_request
from tests.execution.write_mtp_reference import DATA, NUM_DRAFTS, NUM_STEPS, NUM_TOP
from tests.families.mtp import write_gguf_with_mtp, write_hf_with_mtp
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.families.write_references import weights_sum
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.errors import ModelError, TinyvllmError
from tinyvllm.execution import fed_steps
from tinyvllm.execution.mtp import MtpDrafter
from tinyvllm.execution.runner import load_runner
from tinyvllm.scheduling.plan import Scheduled, StepPlan

MTP: Any = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
CONFIG = EngineConfig(
    "tiny",
    dtype="float32",
    kv_cache_dtype="float32",
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=8,
    num_gpu_blocks_override=66,
    block_size=8,
    decode_buckets=(8,),  # one number of rows for all steps, as in tests/engine/test_drafts.py, which shares programs
    token_buckets=(8,),
    verify_buckets=(8,),
    speculative_config=MTP,
)
RECIPE = RECIPES["qwen3_5"]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    written = json.loads(DATA.read_text())
    assert written["weights_sum"] == pytest.approx(weights_sum(RECIPE), rel=1e-6), "other weights: write it again"
    found: list[dict[str, Any]] = written["cases"]
    return found


def check_drafts(files: ModelFiles, cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, both in a batch: tokens of the model, and after each of them drafts with their logprobs."""
    runner = load_runner(files, CONFIG)
    runner.warm_up()
    drafter = MtpDrafter(runner)
    drafter.warm_up()
    logprobs: list[Any] = []
    monkeypatch.setattr(fed_steps, "_unprocessed", lambda params: params)  # with logprobs
    collect = drafter.runner.collect

    def collect_and_note(flight: Any) -> Any:
        output = collect(flight)
        named = zip(flight.plan.sampled, output.logprobs, strict=True)
        logprobs.append({entry.request.request_id: values for entry, values in named})
        return output

    monkeypatch.setattr(drafter.runner, "collect", collect_and_note)
    requests = [
        make_request(list(case["prompt"].encode()), name=str(i), logprobs=NUM_TOP) for i, case in enumerate(cases)
    ]
    give_blocks(requests, 96, runner.capacity)
    for request in requests:
        request.room = 96
    while any(len(request.output_ids) < NUM_STEPS for request in requests):
        behind = [request for request in requests if len(request.output_ids) < NUM_STEPS]
        budget, entries = CONFIG.max_num_batched_tokens or 0, []
        for request in behind:
            count = min(request.num_pending, budget, 7)
            if count:
                entries.append(Scheduled(request, request.num_computed, count))
            budget -= count
        plan = StepPlan(tuple(entries))
        output = runner.execute(plan)
        for entry in entries:
            entry.request.num_computed += entry.count
        for entry, token_id in zip(plan.sampled, output.token_ids, strict=True):
            entry.request.output_ids.append(token_id)
        drafter.committed(plan, output)
        drawn = [entry.request for entry in plan.sampled]
        if not drawn:
            continue
        logprobs.clear()
        drafts = drafter.propose(drawn, [NUM_DRAFTS] * len(drawn))
        for request, ids in zip(drawn, drafts, strict=True):
            step = cases[int(request.request_id)]["steps"][len(request.output_ids) - 1]
            assert request.output_ids[-1] == step["token"]
            assert ids == [draft["token"] for draft in step["drafts"]], (request.request_id, len(request.output_ids))
            for place, draft in enumerate(step["drafts"]):
                top = [value for _, value in logprobs[place][request.request_id].top]
                assert top == pytest.approx(draft["top"], abs=2e-3)
    for request in requests:
        drafter.forget(request)
    runner.close()


def test_drafts_are_those_of_transformers_layer(
    tmp_path: Path, cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_drafts(write_hf_with_mtp(tmp_path / "tiny", RECIPE), cases, monkeypatch)


@pytest.mark.sweep
def test_gguf_files_have_the_same_layer(
    tmp_path: Path, cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_drafts(write_gguf_with_mtp(tmp_path / "tiny.gguf", RECIPE), cases, monkeypatch)


def test_models_without_the_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no layer that drafts tokens .* choose another method"):
        load_runner(write_hf(tmp_path / "without", RECIPE), CONFIG)
    with pytest.raises(TinyvllmError, match=r"architecture llama have no drafting layer, as those of qwen3_5, "):
        load_runner(write_tiny_hf_llama(tmp_path / "llama"), CONFIG)
