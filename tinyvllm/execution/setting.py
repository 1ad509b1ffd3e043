"""What an engine's model is placed on a device with: settings that are known before its weights are, and what follows
from them, its pool above all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from tinyvllm.config import Capacity, EngineConfig, KVFormats, Limits, ModelConfig
from tinyvllm.execution.adapters import AdapterTable
from tinyvllm.execution.buckets import Bucket, max_verify_rows
from tinyvllm.execution.capacity import (
    DraftMemory,
    KVGroup,
    MemoryFacts,
    jit_scratch_bytes,
    plan_capacity,
    scratch_bytes,
)
from tinyvllm.execution.cost import weight_facts
from tinyvllm.model.adapters import attach_adapters
from tinyvllm.model.registry import Model, make_model
from tinyvllm.model.weights.checkpoint import WeightSource
from tinyvllm.ops.backend import Backend, KVPool
from tinyvllm.ops.sampling.logits_processing import state_bytes

logger = logging.getLogger(__name__)

ROW_STEP = 64  # rows of outputs and sampling state are a multiple of this, so that saved steps fit other --max-num-seqs


@dataclass(frozen=True)
class Setting:
    """What is known before the weights are loaded. free_bytes: of the device's memory. share: fraction of free_bytes
    that the engine may use."""

    config: EngineConfig
    model_config: ModelConfig
    backend: Backend
    formats: KVFormats
    limits: Limits
    buckets: tuple[Bucket, ...]
    num_instances: int
    capture: str
    free_bytes: int
    share: float
    draft: DraftMemory

    @property
    def num_rows(self) -> int:
        """Rows of outputs and of sampling state."""
        return padded_rows(max(self.limits.max_num_seqs, max_verify_rows(self.limits, self.config)))


@dataclass(frozen=True)
class Placed:
    """A model with its pool on a device."""

    model: Model
    adapters: AdapterTable | None
    pool: KVPool
    capacity: Capacity


def place(setting: Setting, source: WeightSource, progress: Callable[[int, int], None]) -> Placed:
    """Load the weights and create the pool. Raises ModelError, CapacityError, DeviceError."""
    config, limits, backend = setting.config, setting.limits, setting.backend
    positions = _num_positions(config, setting.model_config)
    model = make_model(setting.model_config, source, backend, positions, progress)
    adapters = load_adapters(config, model, backend)
    model.keep_hidden(max(bucket.num_tokens for bucket in setting.buckets), limits.max_num_seqs)
    capacity = plan_capacity(config, limits, setting.model_config, _memory(setting, model, adapters))
    counts = [group.num_blocks for group in capacity.groups]
    states, num_slots = setting.model_config.states, capacity.num_state_slots
    pool = backend.make_pool(model.pool_groups, counts, capacity.block_size, setting.formats, states, num_slots)
    return Placed(model, adapters, pool, capacity)


def _memory(setting: Setting, model: Model, adapters: AdapterTable | None) -> MemoryFacts:
    model_config, limits, num_rows = setting.model_config, setting.limits, setting.num_rows
    return MemoryFacts(
        free_bytes=setting.free_bytes,
        share=setting.share,
        max_share=setting.backend.device.max_share,
        weight_bytes=_kept_bytes(model, num_rows) + (0 if adapters is None else adapters.device_bytes),
        scratch_bytes=max(scratch_bytes(limits, model_config), scratch_bytes(Limits(num_rows, num_rows), model_config))
        if setting.capture == "replay"
        else jit_scratch_bytes(setting.buckets, setting.num_instances, model_config),
        kv_groups=tuple(KVGroup(group.token_bytes(setting.formats), group.window) for group in model.pool_groups),
        state_bytes=model_config.state_bytes,
        draft=setting.draft,
        kv_cache_dtype=setting.formats.name,
    )


def load_adapters(config: EngineConfig, model: Model, backend: Backend) -> AdapterTable | None:
    """Slots for adapters, if they are on, and those of --lora-modules in host memory. Raises ModelError."""
    if not config.enable_lora:
        return None
    sites = attach_adapters(model, backend, config.max_loras, config.max_lora_rank)
    table = AdapterTable(sites, model.config, config.max_lora_rank, config.max_cpu_loras or config.max_loras)
    for module in config.lora_modules:
        table.add(module.name, module.path, table.read(module.path))
    return table


def _kept_bytes(model: Model, num_rows: int) -> int:
    """What is there throughout besides the pool: weights, each row's state of logits processing, and hidden states."""
    hidden = 0 if model.hidden is None else model.hidden.nbytes
    return weight_facts(model).nbytes + state_bytes(num_rows, model.config.vocab_size) + hidden


def _num_positions(config: EngineConfig, model_config: ModelConfig) -> int:
    """Rows of the rope tables."""
    positions = min(config.max_model_len or model_config.usual_context, model_config.max_position)
    if config.max_model_len is None and positions < model_config.max_position:
        logger.info(
            "contexts are limited to %d tokens; --max-model-len up to %d turns to longrope's factors for long contexts",
            positions,
            model_config.max_position,
        )
    return positions


def padded_rows(num_logit_rows: int) -> int:
    """Rows of a step's output and of the sampling state for so many rows of logits."""
    return -(-num_logit_rows // ROW_STEP) * ROW_STEP
