"""Requests run by hand, without a scheduler: each owns its blocks from the start; the test says how they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.builders import GGUFTweaks, write_tiny_gguf
from tinyvllm.config import Capacity, EngineConfig, ModelFiles, SamplingParams
from tinyvllm.device.handle import open_device
from tinyvllm.execution.buckets import Bucket, choose_bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.execution.runner import make_output
from tinyvllm.model.registry import complete_config, make_model
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.ops.backend import Step
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.sampling.sample import OUT_WIDTH
from tinyvllm.scheduling.block_manager import fixed_states
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan
from tinyvllm.scheduling.request import Request, TokenLogprobs
from tinyvllm.storage.model_config import read_model_config

GREEDY = {"temperature": 0.0}
# One row and several, a small and a larger budget of tokens. What needs no other sizes takes these: programs are
# compiled once in a run.
FOUR_GRAPHS = EngineConfig(
    "tiny",
    max_model_len=96,
    max_num_seqs=4,
    max_num_batched_tokens=24,
    num_gpu_blocks_override=49,
    block_size=8,
    decode_buckets=(1, 4),
    token_buckets=(8, 24),
    kv_cache_dtype="float32",
)
# of starts that are compared: few graphs, and small ones
TINY = EngineConfig(
    "tiny",
    max_model_len=96,
    max_num_seqs=2,
    max_num_batched_tokens=8,
    num_gpu_blocks_override=33,
    block_size=8,
)


def write_mixed_gguf(path: Path) -> ModelFiles:
    """Q, K and V in two formats, so that attention's inputs come in parts."""
    return write_tiny_gguf(path, quant="Q4_1", tweaks=GGUFTweaks(quant_of={"attn_v": "Q8_0"}), tie=False)


class Runner(Protocol):
    """What runs plans."""

    capacity: Capacity

    def execute(self, plan: StepPlan) -> StepOutput: ...


def make_request(
    prompt_ids: list[int], *, name: str = "a", eos: frozenset[int] = frozenset(), **params: Any
) -> Request:
    """A request of `params` (SamplingParams' fields; greedy unless told), of a seed as the engine resolves it."""
    sampling = SamplingParams(**{**GREEDY, "max_tokens": None, **params})
    return Request(name, list(prompt_ids), sampling, eos_ids=eos, seed=sampling.seed or 0)


def give_blocks(requests: list[Request], num_tokens: int, capacity: Capacity, *, first: int = 1) -> None:
    """Blocks of every group for `num_tokens` tokens each, none shared, in no order."""
    each = -(-num_tokens // capacity.block_size)
    ids = (first + np.random.default_rng(each).permutation(len(requests) * each)).tolist()
    states = fixed_states(capacity, len(requests))
    for index, request in enumerate(requests):
        request.state = states[index]
        request.tables = [ids[index * each : (index + 1) * each]] * len(capacity.groups)


def generate(
    runner: Runner, requests: list[Request], num_tokens: int, *, chunk: int = 1 << 30
) -> list[list[TokenLogprobs | None]]:
    """Run all requests together until each has `num_tokens` of output, a prompt in pieces of at most `chunk` tokens.
    Returns each one's logprobs; the tokens are in its output_ids."""
    longest = max(len(request.prompt_ids) for request in requests) + num_tokens
    give_blocks(requests, longest, runner.capacity)
    logprobs: list[list[TokenLogprobs | None]] = [[] for _ in requests]
    while True:
        budget, entries = runner.capacity.max_num_batched_tokens, []
        for request in requests:
            count = min(request.num_pending, chunk, budget)
            if len(request.output_ids) < num_tokens and count:
                entries.append(Scheduled(request, request.num_computed, count))
                budget -= count
        if not entries:
            return logprobs
        plan = StepPlan(tuple(entries))
        output = runner.execute(plan)
        sampled = plan.sampled  # before the requests grow
        for entry in entries:
            entry.request.num_computed += entry.count
        for entry, token_id, logprob in zip(sampled, output.token_ids, output.logprobs, strict=True):
            entry.request.output_ids.append(token_id)
            logprobs[requests.index(entry.request)].append(logprob)


class EagerRunner:
    """The plain reference of a runner: no graph, no kernels, a step in NumPy."""

    def __init__(self, files: ModelFiles, capacity: Capacity, buckets: list[Bucket]) -> None:
        config = complete_config(read_model_config(files))
        self.capacity, self._buckets = capacity, buckets
        self._backend = ReferenceBackend(open_device())
        checkpoint = open_checkpoint(files, config)
        self._model = make_model(config, checkpoint, self._backend, capacity.max_model_len, lambda done, total: None)
        counts = [group.num_blocks for group in capacity.groups]
        self._pool = self._backend.make_pool(
            self._model.pool_groups, counts, capacity.block_size, "float32", config.states, capacity.num_state_slots
        )

    def execute(self, plan: StepPlan) -> StepOutput:
        layout = choose_bucket(self._buckets, plan).layout(self.capacity)
        buffer = np.zeros(layout.size, np.int32)
        InputPacker(layout, buffer).pack(plan)
        inputs = self._backend.device.upload(buffer)
        logits = self._model(Step(layout, inputs, self._pool, plan.is_decode))
        out = self._backend.sample(logits, self._model.config.vocab_size, self._model.logit_stride, inputs, layout)
        return make_output(plan, out.numpy().reshape(-1, OUT_WIDTH), pack_s=0.0, device_s=0.0)
