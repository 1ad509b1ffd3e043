"""The number of KV blocks that the device's memory holds, and the limits that follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tinyvllm.config import Capacity, EngineConfig, Limits, ModelConfig
from tinyvllm.errors import CapacityError, TinyvllmError
from tinyvllm.execution.buckets import Bucket

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes found on the device. `free_bytes`: before the weights were loaded."""

    free_bytes: int
    share: float  # of free_bytes that weights and KV may take together
    weight_bytes: int
    kv_bytes_per_token: int
    scratch_bytes: int = 0  # intermediate values: of the largest step, or of all graphs together
    max_share: float = 1.0  # of free_bytes that weights and KV may take at most, whatever the user requests


def plan_capacity(config: EngineConfig, limits: Limits, model: ModelConfig, memory: MemoryFacts) -> Capacity:
    """Size the pool: the memory left by the weights, but no more than all sequences of full length can use.

    Raises CapacityError, with the numbers, if one sequence of max_model_len or the requested blocks do not fit, and
    TinyvllmError if max_model_len exceeds the length that the model was trained for.
    """
    size = config.block_size
    longest = _longest(config, model)
    block_bytes = size * memory.kv_bytes_per_token
    budget = int(memory.free_bytes * memory.share)
    by_memory = _steady(max(0, budget - memory.weight_bytes - memory.scratch_bytes) // block_bytes)
    useful = limits.max_num_seqs * _ceil_div(longest, size) + 1
    num_blocks = config.num_gpu_blocks_override or min(by_memory, useful)
    if config.num_gpu_blocks_override:
        _check_override(config.num_gpu_blocks_override, block_bytes, memory)
    source = _explain(config, limits, memory, budget, by_memory, useful, num_blocks, block_bytes)
    if num_blocks < 2:
        raise CapacityError(
            f"no room for KV blocks: {source}. "
            "Close other programs, raise --gpu-memory-utilization, or choose a smaller model"
        )
    fits = (num_blocks - 1) * size
    if config.max_model_len is not None and fits < longest:
        raise CapacityError(
            f"one sequence of --max-model-len {longest} tokens needs {_ceil_div(longest, size)} blocks, "
            f"but the pool has {num_blocks - 1} ({fits} tokens): {source}. "
            f"Lower --max-model-len to {fits}, or raise --gpu-memory-utilization or --num-gpu-blocks-override"
        )
    max_model_len = min(longest, fits)
    explanation = (
        source,
        f"{num_blocks - 1} blocks of {size} tokens hold {fits} tokens; "
        f"max_model_len {max_model_len}"
        + (f" (the model's {model.max_position} do not fit)" if max_model_len < longest else ""),
    )
    return Capacity(num_blocks, size, max_model_len, limits.max_num_seqs, limits.max_num_batched_tokens, explanation)


def _check_override(num_blocks: int, block_bytes: int, memory: MemoryFacts) -> None:
    """Raise CapacityError for more blocks than memory can hold."""
    most = int(memory.free_bytes * memory.max_share) - memory.weight_bytes
    if num_blocks * block_bytes > most:
        raise CapacityError(
            f"{_override(num_blocks, block_bytes)}, "
            f"{num_blocks * block_bytes / GIB:.2f} GiB, but of {memory.free_bytes / GIB:.2f} GiB free at most "
            f"{memory.max_share:g} may be used, {memory.weight_bytes / GIB:.2f} GiB of it for weights: give at most "
            f"{max(0, most) // block_bytes} blocks"
        )


def _override(num_blocks: int, block_bytes: int) -> str:
    return f"--num-gpu-blocks-override gives {num_blocks} blocks of {block_bytes / 2**20:.2f} MiB"


def scratch_bytes(limits: Limits, model: ModelConfig) -> int:
    """An upper bound for the intermediate values of the largest step, all counted as float32.

    At once there are, per token: two states of its residual stream, its normed state, and its last state, which is
    kept; and a layer's values, as input and as output of a kernel: q, k, v and the attended values, or gate and up. Per
    sequence: its logits, raw and processed, and twice sampling's own values."""
    return _step_scratch_bytes(limits.max_num_batched_tokens, limits.max_num_seqs, model)


def jit_scratch_bytes(buckets: Iterable[Bucket], num_instances: int, model: ModelConfig) -> int:
    """`scratch_bytes` of graphs that TinyJit captured, which share nothing: each instance of each graph has its own."""
    return num_instances * sum(_step_scratch_bytes(one.num_tokens, one.num_seqs, model) for one in buckets)


def _step_scratch_bytes(num_tokens: int, num_seqs: int, model: ModelConfig) -> int:
    widest = max(2 * max(model.ffn_sizes), *[2 * kind.q_size + 2 * kind.kv_size for kind in model.layers])
    per_layer = model.num_layers * model.per_layer_size  # of one token's embeddings: read, projected, and their sum
    by_token, by_sequence = 4 * model.hidden_size + 2 * widest + 3 * per_layer, 4 * model.vocab_size
    return 4 * (num_tokens * by_token + num_seqs * by_sequence)


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise TinyvllmError(
            f"--max-model-len is {config.max_model_len}, but the model was trained for {model.max_position} tokens: "
            f"give at most {model.max_position}"
        )
    return config.max_model_len or model.max_position


def _explain(
    config: EngineConfig,
    limits: Limits,
    memory: MemoryFacts,
    budget: int,
    by_memory: int,
    useful: int,
    num_blocks: int,
    block_bytes: int,
) -> str:
    if config.num_gpu_blocks_override:
        return _override(num_blocks, block_bytes)
    text = (
        f"{memory.free_bytes / GIB:.2f} GiB free x {memory.share:.2f} = {budget / GIB:.2f} GiB, "
        f"less {memory.weight_bytes / GIB:.2f} GiB of weights and {memory.scratch_bytes / GIB:.2f} GiB for a step's "
        f"intermediate values: "
        f"room for {by_memory} blocks of {block_bytes / 2**20:.2f} MiB"
    )
    if useful < by_memory:
        text += f"; {limits.max_num_seqs} sequences can use {useful}"
    return text


def _steady(count: int) -> int:
    """`count` rounded down by at most 1/32, so that small changes of free memory give the same pool: kernels are
    compiled for its size, and a start finds only programs for a pool of the same size."""
    unit = 1 << max(0, count.bit_length() - 6)
    return count // unit * unit


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
