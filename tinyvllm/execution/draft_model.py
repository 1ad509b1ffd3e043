"""Drafts by a second, smaller model on the same device: it decodes a few tokens ahead of the model that is served.

The draft model is a whole `ModelRunner`, with weights, pool, block manager and graphs of its own. Each request of the
engine has a *follower* here: a request with the same prompt and settings, whose output is the engine's known tokens and
then the latest drafts. Keys and values of `[0, num_computed)` of a follower are in the draft model's pool; what was
computed for drafts that were not accepted is computed again.

A draft is sampled with the noise that the model itself will use for that token: the same seed, number of the draw,
temperature, top-k, top-p and min-p. So sampled drafts are accepted about as often as the two distributions allow
(Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding"). Penalties, biases and
masks are not applied to drafts: requests that have them are drafted from the draft model's own distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tinyvllm.config import Capacity, EngineConfig, ModelConfig, ModelFiles, SpeculativeConfig
from tinyvllm.device.handle import open_device
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.buckets import MOST_VERIFY_ROWS
from tinyvllm.execution.capacity import DraftMemory, scratch_bytes
from tinyvllm.execution.captures import Captures, Progress
from tinyvllm.execution.fed_steps import FedSteps, shadow, usable
from tinyvllm.execution.limits import resolve_limits
from tinyvllm.execution.model_check import examine_files
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.execution.setting import padded_rows
from tinyvllm.ops.sampling.logits_processing import state_bytes
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan
from tinyvllm.scheduling.request import Request
from tinyvllm.storage.model_config import read_model_config


def measure_draft(files: ModelFiles, config: EngineConfig) -> DraftMemory:
    """What a draft model takes on the device beside the model of `config`, by its files' headers. Raises ModelError."""
    device = open_device()
    report = examine_files(files, device.name, config.planned_kv)
    limits = resolve_limits(config, device)
    rows = state_bytes(padded_rows(limits.max_num_seqs), report.config.vocab_size)
    return DraftMemory(
        fixed_bytes=report.device_bytes + rows + scratch_bytes(limits, report.config),
        bytes_per_token=sum(one.bytes_per_token for one in report.kv),
    )


def load_draft_model(
    files: ModelFiles, config: EngineConfig, target: ModelRunner, progress: Progress | None = None
) -> DraftModel:
    """Load the draft model of `files` beside `target`, the runner of the model of `config`, with which it is closed.
    Call it on the same thread.

    Raises TinyvllmError if it cannot draft for that model, ModelError, CapacityError, DeviceError.
    """
    model = read_model_config(files)
    if model.state is not None:
        raise TinyvllmError(
            f"draft model {files.name} has recurrent layers, whose state cannot be set back when a draft is not "
            "accepted: choose a draft model of attention layers, or method mtp if the model has such a layer"
        )
    if not model.has_head:
        raise TinyvllmError(f"draft model {files.name} embeds texts and generates nothing: choose a causal model")
    own = draft_settings(config, target.capacity, model, str(files.path))
    runner = load_runner(files, own, progress)
    drafter = DraftModel(runner, target.model_config.vocab_size, enable_prefix_caching=config.enable_prefix_caching)
    target.closed_with.append(drafter)
    return drafter


def draft_settings(config: EngineConfig, capacity: Capacity, model: ModelConfig, path: str = "") -> EngineConfig:
    """The settings of a draft model beside a model of `config` that has this capacity. Steps of two rows for each
    sequence catch up on a call in which all drafts were accepted. Adapters are the model's alone: they fit no other."""
    num_usable = (capacity.num_blocks - 1) * capacity.block_size
    most = min(2 * capacity.max_num_seqs, MOST_VERIFY_ROWS, capacity.max_num_batched_tokens)
    sizes = {most, *(1 << power for power in range(1, most.bit_length()))}
    return replace(
        config,
        model=path,
        max_model_len=min(capacity.max_model_len, model.usual_context, num_usable),
        max_num_seqs=capacity.max_num_seqs,
        max_num_batched_tokens=capacity.max_num_batched_tokens,
        num_gpu_blocks_override=capacity.num_blocks,
        enable_lora=False,
        lora_modules=(),
        max_loras=EngineConfig.max_loras,
        max_lora_rank=EngineConfig.max_lora_rank,
        max_cpu_loras=EngineConfig.max_cpu_loras,
        speculative_config=SpeculativeConfig("ngram", 1) if most > 1 else None,
        verify_buckets=tuple(sorted(sizes)) if most > 1 else (),
    )


@dataclass(eq=False)
class Follower:
    """A request of the engine, and the draft model's own request for it. `num_known`: tokens of the draft's output that
    are the engine's; what follows them are drafts."""

    request: Request
    draft: Request
    num_known: int = 0

    def sync(self) -> None:
        """Take over the tokens that the engine has accepted or sampled since the last call."""
        own, known, place = self.draft.output_ids, self.request.output_ids, self.num_known
        while place < len(own) and place < len(known) and own[place] == known[place]:
            place += 1
        own[place:] = known[place:]
        self.num_known = len(known)
        num_valid = min(len(self.draft.prompt_ids) + place, self.draft.num_tokens - 1)  # one is computed, to sample
        self.draft.num_computed = min(self.draft.num_computed, num_valid)

    def is_foreign(self, vocab_size: int) -> bool:
        """Whether the newest tokens include an id that the draft model's embedding table has no row for."""
        new = self.draft.tokens(self.draft.num_computed, self.draft.num_tokens)
        return max(new) >= vocab_size

    @property
    def drafts(self) -> list[int]:
        return self.draft.output_ids[self.num_known :]


@dataclass
class _Lane:
    """A follower that drafts in the current call."""

    follower: Follower
    count: int  # drafts wanted

    @property
    def draft(self) -> Request:
        return self.follower.draft


@dataclass
class DraftWork:
    """What a draft model has computed since the start."""

    num_caught_up: int = 0  # tokens computed that are not drafts: prompts, and tokens of the engine
    num_evictions: int = 0  # followers that gave up their blocks


class DraftModel:
    """A `Drafter`. Owns the draft model's runner, its pool, and a follower of each request that it has drafted for.

    For the engine's thread. If the pool runs out of blocks, the follower that drafted least recently gives up its own,
    and is computed again when it drafts next.
    """

    is_free = False  # drafts take time on the device

    def __init__(self, runner: ModelRunner, num_ids: int, *, enable_prefix_caching: bool = True) -> None:
        """num_ids: rows of the other model's embedding table, which may be padded to another number."""
        self.runner = runner
        self._num_ids, self._vocab_size = num_ids, runner.model_config.vocab_size
        self.blocks = BlockManager.of(runner.capacity, enable_prefix_caching)
        self.work = DraftWork()
        self._followers: dict[str, Follower] = {}  # the least recently used first
        self._steps = FedSteps(runner)

    @property
    def name(self) -> str:
        return self.runner.model_config.name

    @property
    def capacity(self) -> Capacity:
        return self.runner.capacity

    @property
    def captures(self) -> Captures:
        """What makes the draft model's graphs."""
        return self.runner.captures

    def warm_up(self, progress: Progress | None = None) -> None:
        """Capture all of its graphs."""
        self.runner.warm_up(progress)

    def warm_up_first(self, progress: Progress | None = None) -> None:
        """Capture the graphs that can run every step; `captures.advance` captures the others."""
        self.runner.warm_up_first(progress)

    def close(self) -> None:
        """Free its memory on the device."""
        self._followers.clear()
        self.runner.close()

    # -- scheduling.drafts.Drafter -----------------------------------------------------------------------------------

    def expects(self, request: Request) -> bool:
        """It always has a guess, as far as its context reaches."""
        return request.num_tokens < self.capacity.max_model_len

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Up to counts[i] tokens that may follow the known tokens of requests[i]; [] where there are none.

        One call computes at most one step's tokens that are not drafts, so a request with a long new prompt gets its
        first drafts a few calls later. Raises DeviceError.
        """
        lanes = [self._lane(request, count) for request, count in zip(requests, counts, strict=True)]
        active = [lane for lane in lanes if lane is not None]
        if not active:
            return [[] for _ in lanes]
        try:
            drafting = self._catch_up(active)
            for place in range(1, max((lane.count for lane in drafting), default=0)):
                longer = [lane for lane in drafting if lane.count > place]
                self._steps.launch([Scheduled(lane.draft, lane.draft.num_computed, 1) for lane in longer])
            self._steps.finish()
        except Exception:
            self._give_up(active)
            raise
        return [[] if lane is None else usable(lane.follower.drafts, self._num_ids) for lane in lanes]

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """Nothing to note: a follower compares its drafts with the request's tokens."""

    def forget(self, request: Request) -> None:
        """Free the blocks of a request that has ended; they stay in the prefix cache."""
        follower = self._followers.pop(request.request_id, None)
        if follower is not None and follower.draft.tables:
            follower.sync()
            self.blocks.seal(follower.draft)
            self.blocks.free(follower.draft)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _lane(self, request: Request, count: int) -> _Lane | None:
        """A request's follower, up to date and most recently used. None if it can have no drafts now."""
        count = min(count, self.capacity.max_model_len + 1 - request.num_tokens)
        if count < 1 or request.num_in_flight:
            return None
        follower = self._followers.pop(request.request_id, None)
        if follower is None or follower.request is not request:
            follower = Follower(request, shadow(request, request.prompt_ids))
        self._followers[request.request_id] = follower
        follower.sync()
        if follower.is_foreign(self._vocab_size):
            return None
        if not follower.draft.tables:
            follower.draft.num_computed = self.blocks.match_prefix(follower.draft)
        self.blocks.seal(follower.draft)
        return _Lane(follower, count)

    def _catch_up(self, lanes: Sequence[_Lane]) -> list[_Lane]:
        """Compute tokens that the pool lacks, those of followers that lack the fewest first. Returns the lanes whose
        first draft this samples."""
        budget, entries, drafting = self.capacity.max_num_batched_tokens, [], []
        in_use = {lane.draft for lane in lanes}
        for lane in sorted(lanes, key=lambda lane: lane.draft.num_pending):
            draft, num_pending = lane.draft, lane.draft.num_pending
            count = min(num_pending, budget, self.capacity.max_chunk)
            is_whole = count == num_pending
            stop = draft.num_tokens + lane.count - 1 if is_whole else draft.num_computed + count
            if not count or not self._reserve(draft, stop, in_use):
                continue
            entries.append(Scheduled(draft, draft.num_computed, count))
            self.work.num_caught_up += count
            budget -= count
            if is_whole:
                drafting.append(lane)
        if entries:
            self._steps.launch(self._in_few_rows(entries))
        return drafting

    def _in_few_rows(self, entries: list[Scheduled]) -> list[Scheduled]:
        """The same step for a verify graph, if one has room for it and no entry has more than two tokens: the second
        one counts as a draft. Other graphs for several tokens of a sequence have many rows."""
        most = max(entry.count for entry in entries)
        if most != 2 or sum(entry.count for entry in entries) > self.capacity.max_verify_rows:
            return entries
        return [_with_last_as_draft(entry) if entry.count == 2 else entry for entry in entries]

    def _reserve(self, draft: Request, num_tokens: int, in_use: Iterable[Request]) -> bool:
        """Allocate a follower's blocks for its first `num_tokens` tokens, drafts included. False if there are too
        few, with those of followers that do not draft now."""
        if num_tokens > self.capacity.num_tokens:
            return False
        while not self.blocks.grow(draft, num_tokens):
            idle = (one.draft for one in self._followers.values() if one.draft.tables and one.draft not in in_use)
            victim = next(idle, None)
            if victim is None:
                return False
            self._drop_blocks(victim)
            self.work.num_evictions += 1
        return True

    def _give_up(self, lanes: Iterable[_Lane]) -> None:
        """After a failed step: forget what it may have written."""
        self._steps.clear()
        for lane in lanes:
            self._followers.pop(lane.follower.request.request_id, None)
            self._drop_blocks(lane.draft, keep=False)

    def _drop_blocks(self, draft: Request, *, keep: bool = True) -> None:
        if draft.tables:
            self.blocks.free(draft, keep)
        draft.num_computed = 0
        draft.num_preemptions += 1  # the packed tables are no longer its own


def _with_last_as_draft(entry: Scheduled) -> Scheduled:
    draft = entry.request
    return Scheduled(draft, entry.start, entry.count, (draft.output_ids.pop(),))
