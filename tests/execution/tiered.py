"""The device of integers with tiers below its pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.scheduling.fakes import FakeRunner, Flights
from tinyvllm.device.block_copies import Copy, Rows
from tinyvllm.execution.kv_tiers.disk_tier import DiskTier
from tinyvllm.execution.kv_tiers.host_tier import HostTier
from tinyvllm.execution.kv_tiers.tiers import KvTiers
from tinyvllm.faults import reach
from tinyvllm.scheduling.plan import StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.tiers import STATE

GIB = 1 << 30


class Arrived:
    """Copies that have arrived."""

    seconds = 1e-6

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...


class FakeCopies:
    """Copies blocks of a group, or slots of states, of a FakeRunner: 8 bytes a slot, or 16."""

    def __init__(self, runner: FakeRunner, kind: int, *, follows_steps: bool = True) -> None:
        self.runner, self.kind, self.follows_steps = runner, kind, follows_steps
        self.num_copied = 0

    def copy_out(self, copies: Sequence[Copy]) -> Arrived:
        reach("tier.copy_out")
        for copy in copies:
            copy.rows[copy.row].view(np.uint64)[:] = self._read(copy.block_id)
        self.num_copied += len(copies)
        return Arrived()

    def copy_in(self, copies: Sequence[Copy]) -> Arrived:
        reach("tier.copy_in")
        for copy in copies:
            self._write(copy.block_id, copy.rows[copy.row].view(np.uint64).tolist())
        self.num_copied += len(copies)
        return Arrived()

    def _read(self, block_id: int) -> list[int]:
        if self.kind == STATE:
            return list(self.runner.states[block_id])
        size, pool = self.runner.block_size, self.runner.pools[self.kind]
        return [pool[slot] for slot in range(block_id * size, (block_id + 1) * size)]

    def _write(self, block_id: int, values: list[int]) -> None:
        if self.kind == STATE:
            self.runner.states[block_id] = (values[0], values[1])
            return
        for slot, value in enumerate(values, block_id * self.runner.block_size):
            self.runner.pools[self.kind][slot] = value


class TieredRunner(FakeRunner):
    """Moves copies before each step, as the engine does."""

    tiers: KvTiers | None = None

    def execute(self, plan: StepPlan) -> StepOutput:
        assert self.tiers is not None
        self.tiers.before_step()
        output = super().execute(plan)
        self.tiers.launched()
        self.tiers.collected()
        return output


def make_rows(num_rows: int, nbytes: int) -> Rows:
    return np.full((num_rows, nbytes), 0xEE, np.uint8)


def make_tiers(
    runner: FakeRunner,
    *,
    num_rows: int = 100,
    has_states: bool = False,
    folder: Path | None = None,
    digest: bytes = b"d" * 16,
    max_disk_bytes: int = GIB,
    **fields: Any,
) -> KvTiers:
    """Tiers of a FakeRunner's pools. num_rows: blocks of each kind in host memory."""
    kinds = [*range(len(runner.pools)), *[STATE] * has_states]
    sizes = {kind: 16 if kind == STATE else 8 * runner.block_size for kind in kinds}
    host = HostTier(sizes, dict.fromkeys(kinds, num_rows), make_rows, ahead=False)
    disk = None if folder is None else DiskTier(folder, digest, max_disk_bytes, GIB)
    copies = {kind: FakeCopies(runner, kind) for kind in kinds}
    return KvTiers(copies, sizes, host, disk, **{"keeps_evicted": True, "wait": runner.wait, **fields})


class TieredFlights(Flights):
    """Waits for the disk as the engine does, if nothing else can be done."""

    def step(self) -> list[TokenOut]:
        assert isinstance(self.runner, TieredRunner) and self.runner.tiers is not None
        if self.scheduler.is_fetching:
            self.runner.tiers.poll(2e-3)
        return super().step()


def attach(scheduler: Scheduler, **fields: Any) -> TieredRunner:
    """A device with the scheduler's groups and tiers below its pool."""
    capacity = scheduler.capacity
    runner = TieredRunner(capacity.block_size, windows=[group.window for group in capacity.groups])
    runner.tiers = make_tiers(runner, has_states=capacity.num_state_slots > 0, **fields)
    scheduler.block_manager.attach(runner.tiers)
    return runner
