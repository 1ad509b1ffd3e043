"""GET /engine/state: the engine's counts and latest steps, small enough to be polled every second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from tinyvllm import __version__
from tinyvllm.errors import EngineDeadError
from tinyvllm.server.memory import memory_by_kind

if TYPE_CHECKING:
    from tinyvllm.engine.step_history import CompletedStep
    from tinyvllm.server.state import ServerState

MAX_CELLS = 1024  # of a pool snapshot; a larger pool has several blocks per cell
MAX_STEPS = 60


class LiveLimits(BaseModel):
    """Of all engines together, but for the sizes of one prompt and one step."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_dtype: str
    num_blocks: int  # of all groups of layers, without block 0, which is for padding


class LiveCounts(BaseModel):
    """Current counts, and totals since start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_failed_steps: int
    num_captures_to_come: int  # graphs still to be captured between steps
    num_live_states: int  # slots of recurrent states that sequences own
    num_checkpoints: int  # slots that hold a checkpoint
    num_checkpoint_hits: int
    num_draft_tokens: int  # verified
    num_accepted_tokens: int  # of these


class Quantiles(BaseModel):
    """Of the latest measurements, in seconds. None while there are none."""

    p50: float | None = None
    p95: float | None = None


class LiveStep(BaseModel):
    """One step, with the milliseconds that each stage took."""

    number: int
    age_s: float
    schedule_ms: float
    pack_ms: float
    device_ms: float
    commit_ms: float
    num_tokens: int
    num_seqs: int


class PoolSnapshot(BaseModel):
    """The KV pool as cells of `blocks_per_cell` blocks each; the last may have fewer.

    `held` and `cached` have one digit per cell, from 0 for none to 9 for all: the share of its blocks that requests
    hold, and the share that is free but still cached for prompts with the same prefix.
    """

    blocks_per_cell: int
    held: str
    cached: str
    num_held: int
    num_cached: int
    num_shared: int  # held by several requests


class EngineState(BaseModel):
    status: Literal["unloaded", "loading", "ready", "draining", "dead"]
    model: str
    version: str
    uptime_s: float
    can_chat: bool = False
    limits: LiveLimits | None = None
    counts: LiveCounts | None = None
    ttft_s: Quantiles = Quantiles()
    itl_s: Quantiles = Quantiles()
    steps: list[LiveStep] = []
    pool: PoolSnapshot | None = None
    memory: dict[str, int] = {}  # bytes by kind, as in the metric tinyvllm:memory_bytes


async def engine_state(state: ServerState) -> EngineState:
    engine = state.engine
    shown = EngineState(
        status="loading",
        model=engine.served_model_name,
        version=__version__,
        uptime_s=time.monotonic() - state.start_s,
    )
    if engine.error is not None:
        shown.status = "dead"
        return shown
    if not engine.is_ready:
        return shown
    shown.status = "draining" if state.drain.has_begun else "ready"
    capacity, board = engine.capacity, state.board
    shown.can_chat = engine.chat_template is not None
    shown.limits = LiveLimits(
        max_model_len=capacity.max_model_len,
        max_num_seqs=capacity.max_num_seqs * engine.num_engines,
        max_num_batched_tokens=capacity.max_num_batched_tokens,
        block_size=capacity.block_size,
        kv_cache_dtype=capacity.kv_cache_dtype,
        num_blocks=capacity.num_usable_blocks * engine.num_engines,
    )
    shown.counts = _counts(state)
    shown.memory = memory_by_kind(capacity, engine.stats(), engine.num_engines)
    shown.ttft_s, shown.itl_s = quantiles(board.recent_ttft_s()), quantiles(board.recent_itl_s())
    try:
        steps = sorted((step for each in await engine.latest_steps() for step in each), key=lambda step: step.end_s)
        states = b"".join(await engine.pool_states())
        now_s = time.monotonic()
        shown.steps = [_step(step, now_s) for step in steps[-MAX_STEPS:]]
        shown.pool = pool_snapshot(states)
    except EngineDeadError:
        if engine.error is not None:
            shown.status = "dead"
        elif not engine.is_ready:
            shown.status = "draining"
    return shown


def _counts(state: ServerState) -> LiveCounts:
    stats, totals = state.engine.stats(), state.metrics.totals
    return LiveCounts(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_free_blocks=stats.num_free_blocks,
        num_prompt_tokens=totals.num_prompt_tokens,
        num_cached_tokens=totals.num_cached_tokens,
        num_output_tokens=totals.num_output_tokens,
        num_preemptions=stats.num_preemptions,
        num_failed_steps=int(stats.extra.get("num_failed_steps", 0)),
        num_captures_to_come=stats.num_captures_to_come,
        num_live_states=stats.num_live_states,
        num_checkpoints=stats.num_checkpoints,
        num_checkpoint_hits=stats.num_checkpoint_hits,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
    )


def _step(step: CompletedStep, now_s: float) -> LiveStep:
    stats = step.stats
    return LiveStep(
        number=step.number,
        age_s=round(now_s - step.end_s, 3),
        schedule_ms=_milliseconds(stats.schedule_s),
        pack_ms=_milliseconds(stats.pack_s),
        device_ms=_milliseconds(stats.device_s),
        commit_ms=_milliseconds(stats.commit_s),
        num_tokens=stats.num_tokens,
        num_seqs=stats.num_seqs,
    )


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def quantiles(values: Sequence[float]) -> Quantiles:
    """The median and the 95th percentile, with linear interpolation."""
    if not values:
        return Quantiles()
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Quantiles(p50=at(0.5), p95=at(0.95))


def pool_snapshot(states: bytes) -> PoolSnapshot:
    """The pool between two steps, from its blocks' states: . free, c cached, h held, s shared."""
    size = -(-len(states) // MAX_CELLS)
    cells = [states[start : start + size] for start in range(0, len(states), size)]
    num_shared = states.count(b"s")
    return PoolSnapshot(
        blocks_per_cell=size,
        held="".join(_digit(len(cell) - cell.count(b".") - cell.count(b"c"), len(cell)) for cell in cells),
        cached="".join(_digit(cell.count(b"c"), len(cell)) for cell in cells),
        num_held=states.count(b"h") + num_shared,
        num_cached=states.count(b"c"),
        num_shared=num_shared,
    )


def _digit(count: int, size: int) -> str:
    """count / size as a digit, rounded up: 0 is none, 9 is all."""
    return str(-(-9 * count // size))
