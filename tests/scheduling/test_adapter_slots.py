"""Which adapter has which slot, and who waits for one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

import pytest

from tinyvllm.errors import InvariantError
from tinyvllm.scheduling.adapter_slots import AdapterSlots, SlotWrite


def test_a_slot_keeps_its_adapter_until_another_needs_it() -> None:
    slots = AdapterSlots(2)
    assert (slots.acquire("a"), slots.acquire("b"), slots.acquire("c")) == (1, 2, None)
    assert slots.take_writes() == (SlotWrite(1, "a"), SlotWrite(2, "b"))
    slots.release("b")
    slots.release("a")
    assert slots.acquire("b") == 2 and slots.take_writes() == ()  # it is still there
    assert slots.acquire("c") == 1 and slots.take_writes() == (SlotWrite(1, "c"),)  # in place of a
    slots.write_again()
    assert set(slots.take_writes()) == {SlotWrite(1, "c"), SlotWrite(2, "b")}
    slots.release("c")
    slots.write_again()  # nobody needs c, whose files may be gone
    assert slots.take_writes() == (SlotWrite(2, "b"),)
    assert slots.acquire("a") == 1 and slots.take_writes() == (SlotWrite(1, "a"),)


def test_an_unloaded_adapter_frees_its_slot_once_nobody_holds_it() -> None:
    slots = AdapterSlots(1)
    assert slots.acquire("a") == 1
    slots.forget("a")
    assert slots.acquire("b") is None
    slots.release("a")
    slots.forget("a")
    assert slots.acquire("b") == 1 and slots.take_writes() == (SlotWrite(1, "b"),)
    with pytest.raises(InvariantError, match="adapter a is released more often"):
        slots.release("a")


class SlowHost:
    """Host memory in which an adapter is once `arrived` has it."""

    def __init__(self) -> None:
        self.arrived: set[str] = set()
        self.asked: list[tuple[str, set[str]]] = []

    def fetch(self, key: str, held: Collection[str]) -> bool:
        self.asked.append((key, set(held)))
        return key in self.arrived


def test_a_slot_is_taken_once_its_adapter_has_been_read() -> None:
    host = SlowHost()
    slots = AdapterSlots(2, host)
    assert slots.acquire("a") is None and slots.is_reading and slots.take_writes() == () and not slots.held
    host.arrived.add("a")
    slots.begin_step()
    assert slots.acquire("a") == 1 and not slots.is_reading
    assert slots.acquire("b") is None and host.asked[-1] == ("b", {"a"})
    host.arrived |= {"b", "c"}
    assert slots.acquire("b") == 2
    slots.release("b")  # before it was written: its matrices may leave host memory now
    assert slots.take_writes() == (SlotWrite(1, "a"),)
    assert slots.acquire("c") == 2 and slots.take_writes() == (SlotWrite(2, "c"),)
    slots.begin_step()
    assert slots.acquire("d") is None and not slots.is_reading and host.asked[-1][0] == "c"  # all slots are held


def test_no_slot_is_written_while_it_is_held_and_each_use_follows_its_write() -> None:
    rng, slots = random.Random(0), AdapterSlots(3)
    held: list[str] = []
    content: dict[int, str] = {}
    for _ in range(3000):
        if held and rng.random() < 0.5:
            slots.release(held.pop(rng.randrange(len(held))))
            continue
        adapter = rng.choice("abcdefg")
        slot = slots.acquire(adapter)
        before = dict(content)
        content |= {write.slot: write.adapter for write in slots.take_writes()}
        changed = {content[slot] for slot in content if before.get(slot) not in (None, content[slot])}
        assert not changed & set(held)
        assert all(before.get(s) not in held or before[s] == content[s] for s in content)
        if slot is None:
            assert len(set(held)) == 3 and adapter not in held
        else:
            assert content[slot] == adapter
            held.append(adapter)
        assert slots.held == dict(Counter(held))
