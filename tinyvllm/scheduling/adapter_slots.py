"""The loaded adapters, and which is in which of the device's slots. A request holds a slot while it runs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from tinyvllm.errors import InvariantError


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter."""

    name: str  # what requests call it
    path: str
    digest: str  # of its files
    rank: int
    base_model: str  # what its files call the model
    loaded_s: float  # wall clock

    @property
    def key(self) -> str:
        """What distinguishes its keys and values, and its place on the device, from those of any other adapter."""
        return f"{self.name}:{self.digest}"


@dataclass(frozen=True)
class SlotWrite:
    """An adapter that must be written to a slot before the step that uses it."""

    slot: int
    adapter: str


class HostAdapters(Protocol):
    """The part of execution.adapters.AdapterTable that the slots use."""

    def fetch(self, key: str, held: Collection[str]) -> bool:
        """Whether an adapter's matrices are in host memory. If not, begins to read them, unless that has begun. Those
        of the `held` adapters stay there."""


class AdapterSlots:
    """Owns the slots 1 to num_slots; slot 0 stands for no adapter. A slot that no running request holds keeps its
    adapter until another one needs it, the least recently used first."""

    def __init__(self, num_slots: int, host: HostAdapters | None = None) -> None:
        """host: where what is written to the slots comes from; None: all of it is there."""
        self._host = host
        self._free = list(range(num_slots, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # of adapters, the least recently used first
        self._holders: Counter[str] = Counter()  # running requests of each adapter
        self._writes: list[SlotWrite] = []
        self.num_slots = num_slots
        self.is_reading = False  # since `begin_step`, a request could not have a slot because its adapter is being read

    @property
    def held(self) -> dict[str, int]:
        """Running requests by adapter."""
        return dict(self._holders)

    def begin_step(self) -> None:
        self.is_reading = False

    def acquire(self, adapter: str) -> int | None:
        """The slot of a request's adapter, which the request holds until `release`. None if every slot is held by
        requests of other adapters, or while the adapter's files are being read."""
        slot = self._slots.get(adapter)
        if slot is None:
            if len(self._holders) == self.num_slots:
                return None
            if self._host is not None and not self._host.fetch(adapter, self._holders):
                self.is_reading = True
                return None
            slot = self._slots[adapter] = self._take()
            self._writes.append(SlotWrite(slot, adapter))
        self._slots.move_to_end(adapter)
        self._holders[adapter] += 1
        return slot

    def release(self, adapter: str) -> None:
        if not self._holders[adapter]:
            raise InvariantError(f"adapter {adapter} is released more often than it was acquired")
        self._holders[adapter] -= 1
        if not self._holders[adapter]:
            del self._holders[adapter]
            if any(write.adapter == adapter for write in self._writes):  # it was given back before a step was planned
                self._writes = [write for write in self._writes if write.adapter != adapter]
                self._free.append(self._slots.pop(adapter))

    def forget(self, adapter: str) -> None:
        """Free the slot of an adapter that was unloaded, unless a running request holds it."""
        if adapter in self._slots and adapter not in self._holders:
            self._free.append(self._slots.pop(adapter))

    def take_writes(self) -> tuple[SlotWrite, ...]:
        """What must be written before the next step, since the last call."""
        writes, self._writes = tuple(self._writes), []
        return writes

    def write_again(self) -> None:
        """After a step failed, it is not known what the slots hold: write those that running requests hold before the
        next step, and free the others, one of which may be why it failed."""
        for adapter in [adapter for adapter in self._slots if adapter not in self._holders]:
            self._free.append(self._slots.pop(adapter))
        self._writes = [SlotWrite(slot, adapter) for adapter, slot in self._slots.items()]

    def _take(self) -> int:
        """A free slot, or that of the least recently used adapter that nobody holds."""
        if self._free:
            return self._free.pop()
        return self._slots.pop(next(adapter for adapter in self._slots if adapter not in self._holders))
