"""A draft model's tokens against what the model itself would have generated, however its work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.execution.driver import FOUR_GRAPHS, generate, make_request, write_mixed_gguf
from tinyvllm.config import LoraModule, ModelFiles
from tinyvllm.execution.capacity import GIB
from tinyvllm.execution.draft_model import DraftModel, draft_settings, load_draft_model, measure_draft
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.scheduling.request import Request

CONFIG = replace(FOUR_GRAPHS, decode_buckets=(4,), token_buckets=(24,))
PROMPTS = [list(b"to be"), list(b"or not to be, that is the question:"), [7], list(b"whether 'tis nobler")]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "top_p": 0.7, "top_k": 20, "seed": 4, "min_tokens": 3},
    {"temperature": 1.0, "min_p": 0.05, "seed": 5},
]
LENGTH = 20  # tokens of output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_mixed_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def target(files: ModelFiles) -> Iterator[ModelRunner]:
    runner = load_runner(files, CONFIG, draft=measure_draft(files, CONFIG))
    runner.warm_up()
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=[False, True], ids=["one step", "two in flight"])
def drafter(request: pytest.FixtureRequest, files: ModelFiles, target: ModelRunner) -> Iterator[DraftModel]:
    """The target's own model."""
    drafter = load_draft_model(files, replace(CONFIG, async_scheduling=request.param), target)
    drafter.warm_up()
    yield drafter
    drafter.close()


@pytest.fixture(scope="module")
def expected(target: ModelRunner) -> list[list[int]]:
    """What the model generates for each prompt by its settings."""
    requests = [make_request(prompt, **settings) for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)]
    generate(target, requests, LENGTH)
    return [request.output_ids for request in requests]


def new_requests() -> list[Request]:
    return [
        make_request(prompt, name=str(index), **settings)
        for index, (prompt, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]


def forget(drafter: DraftModel, requests: list[Request]) -> None:
    for request in requests:
        drafter.forget(request)
    drafter.blocks.audit()
    assert not drafter.blocks.holders


def test_drafts_of_the_same_model_are_the_models_tokens(drafter: DraftModel, expected: list[list[int]]) -> None:
    """Greedy or sampled, with whatever number of drafts accepted: all, some or none."""
    requests = new_requests()
    accepted = [[1, 4, 0, 2, 3], [4, 4, 4, 1, 0], [0, 0, 3, 3, 4], [2, 1, 4, 4, 4]]
    num_late = 0
    for step in range(5):
        counts = [4, 3, 4, 4] if step else [4, 4, 4, 4]
        drafts = drafter.propose(requests, counts)
        for request, own, count, output, accepting in zip(requests, drafts, counts, expected, accepted, strict=True):
            place = len(request.output_ids)
            assert own in ([], output[place : place + count]), (step, request.request_id)
            num_late += not own
            # then the engine accepts some drafts, and samples one more token
            request.output_ids += output[place : place + min(accepting[step], len(own)) + 1]
    assert num_late <= 6  # prompts of 60 tokens, in calls of 24
    forget(drafter, requests)


def test_tokens_that_differ_from_the_drafts_are_taken_over(drafter: DraftModel, target: ModelRunner) -> None:
    """After rejected drafts, the next ones follow the engine's tokens."""
    [request] = requests = [make_request(PROMPTS[0], name="other")]
    drafter.propose(requests, [4])
    request.output_ids += [17, 18, 19]
    [drafts] = drafter.propose(requests, [4])
    alone = make_request([*PROMPTS[0], 17, 18, 19])
    generate(target, [alone], 4)
    assert drafts == alone.output_ids
    forget(drafter, requests)


def test_a_repeated_prompt_is_found_in_the_draft_models_own_cache(drafter: DraftModel) -> None:
    prompt = list(b"thirty-two tokens of a prompt..!")
    for again in range(2):
        request, before = make_request(prompt, name=f"cached {again}"), drafter.work.num_caught_up
        while not drafter.propose([request], [2])[0]:
            pass
        assert drafter.work.num_caught_up - before == (8 if again else 32)
        forget(drafter, [request])


def test_followers_give_way_when_the_pool_is_full(files: ModelFiles, target: ModelRunner) -> None:
    """Sequences that draft in turn share a pool that holds one of them; none is lost for good."""
    small = load_runner(files, replace(CONFIG, num_gpu_blocks_override=8, max_model_len=56))
    small.warm_up()
    drafter = DraftModel(small, small.model_config.vocab_size)
    first, second = (make_request(list(bytes([at]) * 30), name=str(at)) for at in (1, 2))
    outputs = []
    for request in (first, second):
        alone = make_request(request.prompt_ids)
        generate(target, [alone], 6)
        outputs.append(alone.output_ids)
    for _ in range(3):
        for request, output in zip((first, second), outputs, strict=True):
            for _ in range(3):
                drafts = drafter.propose([request], [3])
            place = len(request.output_ids)
            assert drafts == [output[place : place + 3]]
            request.output_ids.append(output[place])
        drafter.blocks.audit()
    assert drafter.work.num_evictions == 5
    assert drafter.propose([first, second], [3, 3])[0] == []  # the second has blocks, which it uses
    assert drafter.propose([make_request([5] * 60)], [3]) == [[]]  # never fits
    forget(drafter, [first, second])
    drafter.close()


def test_no_drafts_beyond_the_longest_context(drafter: DraftModel) -> None:
    request = make_request([3] * 96, name="long")
    for _ in range(4):
        assert len(drafter.propose([request], [4])[0]) <= 1
    request.output_ids.append(1)
    assert drafter.propose([request], [4]) == [[]]
    forget(drafter, [request])


def test_a_failed_step_leaves_nothing_behind(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = new_requests()
    while not all(drafter.propose(requests, [3] * 4)):
        pass

    def fail(flight: Any) -> Any:
        raise RuntimeError("no power")

    with monkeypatch.context() as broken:
        broken.setattr(drafter.runner, "collect", fail)
        with pytest.raises(RuntimeError, match="no power"):
            drafter.propose(requests, [3] * 4)
    drafter.runner.wait()
    assert not drafter.blocks.holders
    drafter.propose(requests, [3] * 4)
    forget(drafter, requests)


def test_adapters_are_not_loaded_for_a_draft_model(target: ModelRunner) -> None:
    config = replace(CONFIG, enable_lora=True, lora_modules=(LoraModule("a", "/nowhere"),), max_loras=2)
    own = draft_settings(config, target.capacity, target.model_config)
    assert (own.enable_lora, own.lora_modules, own.verify_buckets) == (False, (), (2, 4, 8))


def test_memory_is_planned_for_both(files: ModelFiles) -> None:
    """The pool is smaller by what the draft model takes, block by block."""
    free = replace(CONFIG, num_gpu_blocks_override=None, max_model_len=None, gpu_memory_utilization=0.0005)
    need = measure_draft(files, free)
    alone, beside = load_runner(files, free), load_runner(files, free, draft=need)
    assert beside.capacity.num_blocks <= alone.capacity.num_blocks
    assert beside.capacity.memory.draft == need.fixed_bytes + beside.capacity.num_blocks * 8 * need.bytes_per_token
    assert "for a draft model" in beside.capacity.explanation[0] and need.fixed_bytes < GIB
    alone.close()
    beside.close()
