"""Requests of every kind on a real runner, by an engine core of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tinyvllm.config import EngineConfig, ModelFiles, SamplingParams
from tinyvllm.engine.core import EngineCore
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.drafts import Speculator
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

SETTINGS: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "token_buckets": (8,),
    "decode_buckets": (1, 4),  # one row, and several
    "num_gpu_blocks_override": 12,  # four requests do not fit: some are preempted
    "block_size": 8,
}


def make_runner(files: ModelFiles, **settings: Any) -> ModelRunner:
    runner = load_runner(files, EngineConfig("tiny", **{**SETTINGS, **settings}))
    runner.warm_up()
    return runner


PROCESSING: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7, "presence_penalty": 0.5},
    {"frequency_penalty": 1.0, "logit_bias": {5: 3.0, 9: -100.0}},
    {"allowed_token_ids": tuple(range(1, 200, 3))},
    {"typical_p": 0.5},
]


class Alternate:
    """Even and odd ids in turn: what may come next depends on the previous token."""

    is_finished, error = False, None

    def __init__(self) -> None:
        self.ids: list[int] = []

    def fill_mask(self, out: np.ndarray, after: Sequence[int] = ()) -> None:
        ids = [*self.ids, *after]
        out.view(np.uint32)[:] = 0x55555555 << (len(ids) and 1 - ids[-1] % 2)

    def count_allowed(self, drafts: Sequence[int]) -> int:
        ids = [*self.ids[-1:], *drafts] if self.ids else [1, *drafts]
        return next((i for i, (a, b) in enumerate(pairwise(ids)) if a % 2 == b % 2), len(drafts))

    def accept(self, token_id: int) -> bool:
        self.ids.append(token_id)
        return True


def make_requests(num: int, is_processed: bool) -> list[Request]:
    rng = random.Random(7)
    requests = []
    for index in range(num):
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            logprobs=rng.choice([None, 2]),
            min_tokens=rng.choice([0, 4]),
            **(PROCESSING[index % len(PROCESSING)] if is_processed else {}),
        )
        prompt = [rng.randrange(200) for _ in range(rng.randrange(1, 24))]
        eos_ids = frozenset(range(0, 256, 16))  # so that some end early, unexpectedly
        request = Request(f"r{index}", prompt, params, eos_ids, max_tokens=rng.randrange(1, 20), seed=index)
        if is_processed and index % 4 == 0:
            request.constraint = Alternate()
        requests.append(request)
    return requests


def run(
    runner: ModelRunner, *, is_processed: bool = False, num: int = 12, speculator: Speculator | None = None
) -> tuple[list[list[int]], EngineCore]:
    requests = make_requests(num, is_processed)
    core = answer(runner, requests, speculator)
    assert all(request.finish_reason in ("stop", "length") for request in requests)
    for request in requests:
        if request.constraint is not None:
            assert all(a % 2 != b % 2 for a, b in pairwise(request.output_ids)), request.output_ids
        if request.params.allowed_token_ids is not None:
            assert set(request.output_ids) <= {*request.params.allowed_token_ids, *request.eos_ids}
    return [request.output_ids for request in requests], core


def answer(
    runner: ModelRunner,
    requests: Sequence[Request],
    speculator: Speculator | None = None,
    note: dict[str, list[float]] | None = None,
) -> EngineCore:
    """Run requests together, with the pools audited after every step. note: takes the tokens' logprobs."""
    scheduler = Scheduler(BlockManager.of(runner.capacity), runner.capacity, speculator=speculator)
    core = EngineCore(runner, scheduler)
    for request in requests:
        core.add(request)
    while core.has_work:
        for out in core.step():
            if note is not None and out.logprobs is not None:
                note.setdefault(out.request.request_id, []).append(out.logprobs.chosen)
        scheduler.audit()
    return core
