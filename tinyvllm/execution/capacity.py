"""The number of KV blocks that the device's memory holds, and the limits that follow."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tinyvllm.config import (
    FLOAT16_KV,
    BlockGroup,
    Capacity,
    ConvKind,
    EngineConfig,
    LayerKind,
    Limits,
    MemoryUse,
    ModelConfig,
)
from tinyvllm.errors import CapacityError, TinyvllmError
from tinyvllm.execution.buckets import Bucket, max_verify_rows

GIB = 1 << 30
MIB = 1 << 20
PLANNED_PREFIX = 4096  # tokens of the pool, for each of which there should be a checkpoint
PLANNED_TURN = 256  # the same if memory is left: a turn of a conversation, to which a client may go back
SEQUENCE_CHECKPOINTS = 2  # of one sequence while it decodes: at the end of its prompt, and at the latest border
FEWEST_CHECKPOINTS = 8  # for a few conversations that one user returns to
MIN_INTERVAL = 512  # tokens between a long prompt's checkpoints: shorter chunks would not use a GPU
STATE_SHARE = 2  # state slots take at most 1/2 of the memory for KV and states, if more cannot be left
PLANNED_WINDOWS = 4  # windows that a sequence is expected to be long, when memory is divided between groups


@dataclass(frozen=True)
class KVGroup:
    """What the size of a group of layers (`ops.backend.pool_groups`) depends on."""

    bytes_per_token: int  # keys and values of all of its layers
    window: int | None = None  # tokens; None: it keeps them all


@dataclass(frozen=True)
class DraftMemory:
    """Bytes of a draft model on the same device. Its pool has as many blocks as the model's first group."""

    fixed_bytes: int = 0  # weights, intermediate values and sampling state
    bytes_per_token: int = 0  # keys and values of all of its layers

    def num_bytes(self, num_tokens: int) -> int:
        """All of it, with a pool of so many tokens."""
        return self.fixed_bytes + num_tokens * self.bytes_per_token


NO_DRAFT = DraftMemory()


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes found on the device. `free_bytes`: before the weights were loaded."""

    free_bytes: int
    share: float  # of free_bytes that weights and KV may take together
    weight_bytes: int
    kv_groups: tuple[KVGroup, ...]
    scratch_bytes: int = 0  # intermediate values: of the largest step, or of all graphs together
    max_share: float = 1.0  # of free_bytes that weights and KV may take at most, whatever the user requests
    state_bytes: int = 0  # of one sequence's state in all recurrent layers; 0: there are none
    kv_cache_dtype: str = FLOAT16_KV.name  # the formats that `kv_groups` count
    draft: DraftMemory = NO_DRAFT

    @property
    def budget(self) -> int:
        """Bytes for weights, intermediate values and KV."""
        return int(self.free_bytes * self.share)


def plan_capacity(config: EngineConfig, limits: Limits, model: ModelConfig, memory: MemoryFacts) -> Capacity:
    """Size the pool: the memory left by the weights, but no more than all sequences of full length can use.

    Raises CapacityError, with the numbers, if one sequence of max_model_len or the requested blocks do not fit, and
    TinyvllmError if max_model_len exceeds the length that the model was trained for.
    """
    room = max(0, memory.budget - memory.weight_bytes - memory.scratch_bytes - memory.draft.fixed_bytes)
    split, by_memory = _split_for(config, limits, _longest(config, model), memory, room)
    num_blocks = config.num_gpu_blocks_override or min(by_memory, split.useful_blocks)
    if config.num_gpu_blocks_override:
        _check_override(split, num_blocks, memory)
    source = _explain(config, split, memory, by_memory, num_blocks)
    if not config.num_gpu_blocks_override and num_blocks < by_memory:  # memory is left
        split = split.with_more_besides(num_blocks, room)
    if num_blocks < 2:
        raise CapacityError(
            f"no room for KV blocks: {source}. "
            "Close other programs, raise --gpu-memory-utilization, or choose a smaller model"
        )
    first, *others = split.groups(num_blocks)
    capacity = Capacity(
        num_blocks=num_blocks,
        block_size=split.block_size,
        max_model_len=split.longest,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        window=first.window,
        other_groups=tuple(others),
        num_state_slots=split.num_state_slots(num_blocks),
        checkpoint_interval=split.checkpoint_interval,
        max_verify_rows=max_verify_rows(limits, config),
        has_drafting=model.has_drafting,
        memory=_memory_use(split, memory, num_blocks),
        kv_cache_dtype=memory.kv_cache_dtype,
    )
    max_model_len = min(split.longest, capacity.num_tokens)
    if config.max_model_len is not None and max_model_len < split.longest:
        raise CapacityError(
            f"one sequence of --max-model-len {split.longest} tokens needs {split.blocks_for(split.longest)} blocks, "
            f"but the pool has {num_blocks - 1} ({max_model_len} tokens): {source}. "
            f"Lower --max-model-len to {max_model_len}, or raise --gpu-memory-utilization or --num-gpu-blocks-override"
        )
    explanation = (
        source,
        f"{num_blocks - 1} blocks of {split.block_size} tokens hold {(num_blocks - 1) * split.block_size} tokens"
        + ("" if first.window is None else f", of which a sequence keeps a window of {first.window}")
        + f"; max_model_len {max_model_len}"
        + (f" (the model's {split.longest} do not fit)" if max_model_len < split.longest else ""),
        *([] if memory.kv_cache_dtype == FLOAT16_KV.name else [_formats_in_words(memory)]),
        *[split.explain(group, num_blocks) for group in range(1, len(split.kv_groups))],
        *([split.explain_states(num_blocks)] if split.state_bytes else []),
    )
    return replace(capacity, max_model_len=max_model_len, explanation=explanation)


@dataclass(frozen=True)
class PoolSplit:
    """How the pool is divided between groups of layers. All sizes follow from the first group's, which keeps the most
    tokens and takes what the others leave.

    A group with a window holds as many tokens as its layers need when sequences are four windows long (or as long as
    they may be, if that is shorter): a quarter of the first group's, times `share`. But it has room for at least one
    window and one step's tokens, and for at most what all sequences can use: their windows, as much again for prefixes
    of earlier requests, and one step's tokens. It has room for these if memory is left by a first group of the size
    that all sequences can use. It never holds more tokens than the first group.

    Recurrent states have a slot for each sequence that may run, and slots for checkpoints: two for each sequence, or
    FEWEST_CHECKPOINTS, or one for each PLANNED_PREFIX tokens of the first group, whichever is the most. But slots take
    at most half of the memory. If not even each sequence has one, fewer run at once. If memory is left by a first group
    of the size that all sequences can use, slots take what they can use of it, one for each PLANNED_TURN tokens.
    """

    block_size: int  # tokens
    longest: int  # tokens of the longest sequence
    limits: Limits
    kv_groups: tuple[KVGroup, ...]
    share: float = 1.0
    state_bytes: int = 0
    max_state_slots: int = 0  # by memory; the dummy counts
    makes_checkpoints: bool = True  # of states: not without prefix caching
    checkpoint_tokens: int = PLANNED_PREFIX  # of the first group, for each of which there should be a checkpoint
    draft: DraftMemory = NO_DRAFT

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def block_bytes(self, group: int) -> int:
        return self.block_size * self.kv_groups[group].bytes_per_token

    def num_bytes(self, num_blocks: int) -> int:
        """Bytes of all groups and states, and of a draft model's pool, if the first group has `num_blocks` blocks."""
        groups = enumerate(self.groups(num_blocks))
        of_groups = sum(group.num_blocks * self.block_bytes(number) for number, group in groups)
        of_groups += num_blocks * self.block_size * self.draft.bytes_per_token
        return of_groups + self.num_state_slots(num_blocks) * self.state_bytes

    def num_state_slots(self, num_blocks: int) -> int:
        """Slots of recurrent states, if the first group has `num_blocks` blocks."""
        if not self.state_bytes:
            return 0
        num_seqs = self.limits.max_num_seqs
        num_prefixes = num_blocks * self.block_size // self.checkpoint_tokens
        num_checkpoints = max(SEQUENCE_CHECKPOINTS * num_seqs, FEWEST_CHECKPOINTS, num_prefixes)
        return min(1 + num_seqs + self.makes_checkpoints * num_checkpoints, self.max_state_slots)

    @property
    def checkpoint_interval(self) -> int:
        """The blocks between the checkpoints of a long prompt: the least power of two (so that chunks fill their
        graphs) with which a prefix's states take no more than its keys and values, and at least MIN_INTERVAL tokens."""
        ratio = -(-self.state_bytes // sum(self.block_bytes(group) for group in range(len(self.kv_groups))))
        return int(max(MIN_INTERVAL // self.block_size, 1 << max(0, ratio - 1).bit_length()))

    def with_states_in(self, room: int) -> PoolSplit:
        """The same with state slots in at most half of `room` bytes, but one besides the dummy."""
        if not self.state_bytes:
            return self
        return replace(self, max_state_slots=max(2, _steady(room // STATE_SHARE // self.state_bytes)))

    def most_blocks(self, room: int) -> int:
        """The most blocks of the first group with which all groups fit into `room` bytes."""
        return bisect_right(range(room // self.block_bytes(0) + 1), room, lo=1, key=self.num_bytes) - 1

    @property
    def useful_blocks(self) -> int:
        """The most blocks of the first group that all sequences can use."""
        most = self.limits.max_num_seqs * self.blocks_for(self.longest) + 1
        window = self.kv_groups[0].window
        return most if window is None else min(most, self._most(window))

    def holds_longest(self, num_blocks: int) -> bool:
        """Whether a pool with `num_blocks` blocks in its first group holds one sequence of full length."""
        return self.kv_groups[0].window is not None or num_blocks > self.blocks_for(self.longest)

    @property
    def can_shrink(self) -> bool:
        return self.share > 0 or self.max_state_slots > 2

    def with_less_besides(self) -> PoolSplit:
        """The same with half the tokens for windows and half the state slots, or in the end with the least."""
        share = self.share / 2 if self.share > 1 / 64 else 0.0
        return replace(self, share=share, max_state_slots=max(min(2, self.max_state_slots), self.max_state_slots // 2))

    def with_more_besides(self, num_blocks: int, room: int) -> PoolSplit:
        """The same with all the tokens for windows, and all the states, that sequences can use, if they fit into `room`
        bytes; of the states, those that fit."""
        wide = replace(self, share=float(PLANNED_WINDOWS), max_state_slots=0, checkpoint_tokens=PLANNED_TURN)
        if self.state_bytes:
            left = max(0, room - wide.num_bytes(num_blocks)) // self.state_bytes
            wide = replace(wide, max_state_slots=max(self.max_state_slots, _steady(left)))
        return wide if wide.num_bytes(num_blocks) <= room else self

    def groups(self, num_blocks: int) -> tuple[BlockGroup, ...]:
        """All groups, if the first has `num_blocks` blocks."""
        first, *others = self.kv_groups
        sized = [BlockGroup(min(num_blocks, max(self._sizes(group, num_blocks))), group.window) for group in others]
        return (BlockGroup(num_blocks, first.window), *sized)

    def explain(self, group: int, num_blocks: int) -> str:
        """Why a group with a window has its size."""
        kv_group, found = self.kv_groups[group], self.groups(num_blocks)[group]
        by_share, least = self._sizes(kv_group, num_blocks)
        assert kv_group.window is not None
        if found.num_blocks == num_blocks:
            why = "as many as the others have"
        elif found.num_blocks == self._most(kv_group.window):
            why = f"the windows of {self.limits.max_num_seqs} sequences and of as many cached ones, and a step's tokens"
        elif by_share < least:
            why = "one window and a step's tokens"
        else:
            why = f"{found.num_blocks / num_blocks:.0%} of the others'"
        return (
            f"layers with a window of {kv_group.window} tokens: {found.num_blocks - 1} blocks of "
            f"{self.block_bytes(group) / 2**20:.2f} MiB, {why}"
        )

    def explain_states(self, num_blocks: int) -> str:
        """How many sequences and checkpoints the state slots are for."""
        usable, num_seqs = self.num_state_slots(num_blocks) - 1, self.limits.max_num_seqs
        text = f"{usable} state slots of {self.state_bytes / MIB:.2f} MiB for recurrent layers: "
        if usable == num_seqs:
            return text + "one for each sequence"
        if usable < num_seqs:
            return text + f"at most {usable} of {num_seqs} sequences run at once; checkpoints have what they leave"
        return text + (
            f"{num_seqs} for sequences and {usable - num_seqs} for checkpoints of cached prefixes, one for each "
            f"{self.checkpoint_interval} blocks of a long prompt"
        )

    def _sizes(self, group: KVGroup, num_blocks: int) -> tuple[int, int]:
        """The blocks that a group with a window should have, and the least."""
        assert group.window is not None, "only the first group keeps all tokens"
        window, chunk = self.blocks_for(group.window) + 1, self.blocks_for(self._chunk) + 2
        part = self.share * window / self.blocks_for(min(self.longest, PLANNED_WINDOWS * group.window))
        return min(self._most(group.window), math.ceil(num_blocks * part) + chunk), window + chunk

    def _most(self, window: int) -> int:
        """The blocks of a group with a window that all sequences can use. A window may begin and end within a block,
        and block 0 is a dummy."""
        windows = self.limits.max_num_seqs * (self.blocks_for(window) + 1)
        return 2 * windows + self.blocks_for(self._chunk) + 2

    @property
    def _chunk(self) -> int:
        """The most tokens of one sequence in one step."""
        return min(self.longest, self.limits.max_num_batched_tokens)


def _split_for(
    config: EngineConfig, limits: Limits, longest: int, memory: MemoryFacts, room: int
) -> tuple[PoolSplit, int]:
    """How `room` bytes are divided, and the blocks of the first group that they hold."""
    split = PoolSplit(
        block_size=config.block_size,
        longest=longest,
        limits=limits,
        kv_groups=memory.kv_groups,
        state_bytes=memory.state_bytes,
        makes_checkpoints=config.enable_prefix_caching,
        draft=memory.draft,
    ).with_states_in(room)
    num_blocks = _steady(split.most_blocks(room))
    if config.max_model_len is not None:  # it is wanted: shrink everything else until it fits
        while split.can_shrink and not config.num_gpu_blocks_override and not split.holds_longest(num_blocks):
            split = split.with_less_besides()
            num_blocks = _steady(split.most_blocks(room))
    return split, num_blocks


def _memory_use(split: PoolSplit, memory: MemoryFacts, num_blocks: int) -> MemoryUse:
    groups = enumerate(split.groups(num_blocks))
    return MemoryUse(
        weights=memory.weight_bytes,
        scratch=memory.scratch_bytes,
        kv_groups=tuple(group.num_blocks * split.block_bytes(number) for number, group in groups),
        state_slot=memory.state_bytes,
        draft=memory.draft.num_bytes(num_blocks * split.block_size),
    )


def _check_override(split: PoolSplit, num_blocks: int, memory: MemoryFacts) -> None:
    """Raise CapacityError for more blocks than memory can hold."""
    most = int(memory.free_bytes * memory.max_share) - memory.weight_bytes - memory.draft.fixed_bytes
    if split.num_bytes(num_blocks) > most:
        raise CapacityError(
            f"{_override(split, num_blocks)}, "
            f"{split.num_bytes(num_blocks) / GIB:.2f} GiB, but of {memory.free_bytes / GIB:.2f} GiB free at most "
            f"{memory.max_share:g} may be used, {memory.weight_bytes / GIB:.2f} GiB of it for weights: give at most "
            f"{split.most_blocks(max(0, most))} blocks"
        )


def _override(split: PoolSplit, num_blocks: int) -> str:
    return f"--num-gpu-blocks-override gives {_in_words(split, num_blocks)}"


def _in_words(split: PoolSplit, num_blocks: int) -> str:
    """The blocks of all groups."""
    text = f"{num_blocks} blocks of {split.block_bytes(0) / 2**20:.2f} MiB"
    for number, group in enumerate(split.groups(num_blocks)[1:], 1):
        size = split.block_bytes(number) / 2**20
        text += f", with {group.num_blocks} of {size:.2f} MiB for windows of {group.window} tokens"
    if split.state_bytes:
        text += f", and {split.num_state_slots(num_blocks)} state slots of {split.state_bytes / MIB:.2f} MiB"
    return text


def _formats_in_words(memory: MemoryFacts) -> str:
    kib = sum(group.bytes_per_token for group in memory.kv_groups) / 1024
    return f"KV cache in {memory.kv_cache_dtype}: {kib:.1f} KiB a token in all layers"


def _draft_in_words(draft: DraftMemory) -> str:
    if draft == NO_DRAFT:
        return ""
    return (
        f", {draft.fixed_bytes / GIB:.2f} GiB for a draft model and {draft.bytes_per_token / 1024:.1f} KiB for each "
        "token of its pool"
    )


def scratch_bytes(limits: Limits, model: ModelConfig) -> int:
    """An upper bound for the intermediate values of the largest step, all counted as float32.

    At once there are, per token: two states of its residual stream, its normed state, its last state and the experts
    that it chose, which are kept; and a layer's values, as input and as output of a kernel: q, k, v and the attended
    values, or gate and up, or what its experts read and write. Per sequence: its logits, raw and processed, and twice
    sampling's own values."""
    return _step_scratch_bytes(limits.max_num_batched_tokens, limits.max_num_seqs, model)


def jit_scratch_bytes(buckets: Iterable[Bucket], num_instances: int, model: ModelConfig) -> int:
    """`scratch_bytes` of graphs that TinyJit captured, which share nothing: each instance of each graph has its own."""
    return num_instances * sum(_step_scratch_bytes(one.num_tokens, one.num_seqs, model) for one in buckets)


def _step_scratch_bytes(num_tokens: int, num_seqs: int, model: ModelConfig) -> int:
    widest = max(2 * max(model.dense_sizes), _expert_values(model), *map(_attention_values, model.layers))
    routed = 0 if model.experts is None else len(model.sparse_layers) * (model.experts.top_k + 1)  # ids, which are kept
    per_layer = model.num_layers * model.per_layer_size  # of one token's embeddings: read, projected, and their sum
    by_token, by_sequence = 4 * model.hidden_size + 2 * widest + 3 * per_layer + routed, 4 * model.vocab_size
    return 4 * (num_tokens * by_token + num_seqs * by_sequence)


def _expert_values(model: ModelConfig) -> int:
    """Values of one token in a sparse feed-forward, as input or as output of a kernel: of each of its experts a row of
    its input or output, and its gate and up or what they give; where it is in the order of experts; the router's; and a
    shared expert's."""
    kind = model.experts
    if kind is None:
        return 0
    chosen = kind.top_k + kind.num_shared
    return chosen * (model.hidden_size + kind.ffn_size + 4) + kind.num_experts + kind.shared_size


def _attention_values(kind: LayerKind) -> int:
    """Values of one token in attention: q, k, v and the attended values, and perhaps their gate. Of latents, queries
    and attended values are there in the latents' space too. In a recurrent layer: its projections and its output."""
    if isinstance(kind.state, ConvKind):
        return 5 * kind.state.num_channels
    if (state := kind.state) is not None:
        return state.conv_size + 2 * state.value_size + 2 * state.num_heads
    if kind.latent is None:
        gates = 2 * kind.q_size if kind.has_output_gate else 0  # and the gated values
        return 2 * kind.q_size + 2 * kind.kv_size + gates
    latent = kind.latent
    return kind.num_heads * (kind.head_dim + 2 * latent.rank + latent.value_dim) + latent.stored_dim


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise TinyvllmError(
            f"--max-model-len is {config.max_model_len}, but the model was trained for {model.max_position} tokens: "
            f"give at most {model.max_position}"
        )
    return config.max_model_len or model.usual_context


def _explain(config: EngineConfig, split: PoolSplit, memory: MemoryFacts, by_memory: int, num_blocks: int) -> str:
    if config.num_gpu_blocks_override:
        return _override(split, num_blocks)
    text = (
        f"{memory.free_bytes / GIB:.2f} GiB free x {memory.share:.2f} = {memory.budget / GIB:.2f} GiB, "
        f"less {memory.weight_bytes / GIB:.2f} GiB of weights and {memory.scratch_bytes / GIB:.2f} GiB for a step's "
        f"intermediate values{_draft_in_words(memory.draft)}: "
        f"room for {_in_words(split, by_memory)}"
    )
    if split.useful_blocks < by_memory:
        text += f"; {split.limits.max_num_seqs} sequences can use {split.useful_blocks}"
    return text


def _steady(count: int) -> int:
    """`count` rounded down by at most 1/32, so that small changes of free memory give the same pool: kernels are
    compiled for its size, and a start finds only programs for a pool of the same size."""
    unit = 1 << max(0, count.bit_length() - 6)
    return count // unit * unit
