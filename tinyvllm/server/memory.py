"""What device memory is used for, by kind: the same rows in /metrics and on the page."""

from __future__ import annotations

from tinyvllm.config import Capacity
from tinyvllm.engine.async_engine import StepStats


def memory_by_kind(capacity: Capacity, stats: StepStats, num_engines: int = 1) -> dict[str, int]:
    """Bytes of `num_engines` engines, whose summed stats are `stats`.

    Kinds: weights; scratch, a step's intermediate values at most; a draft model with its pool, if there is one; kv, of
    each group of layers by its window; and with recurrent layers the state slots that running sequences own, those that
    hold checkpoints, and those that are free.
    """
    memory = capacity.memory
    kinds = {"weights": memory.weights * num_engines, "scratch": memory.scratch * num_engines}
    if memory.draft:
        kinds["draft model"] = memory.draft * num_engines
    for group, num_bytes in zip(capacity.groups, memory.kv_groups, strict=False):
        kinds["kv" if group.window is None else f"kv window {group.window}"] = num_bytes * num_engines
    if capacity.num_state_slots:
        num_free = (capacity.num_state_slots - 1) * num_engines - stats.num_live_states - stats.num_checkpoints
        slots = {"live": stats.num_live_states, "checkpoints": stats.num_checkpoints, "free": num_free}
        kinds |= {f"states {name}": count * memory.state_slot for name, count in slots.items()}
    return kinds
