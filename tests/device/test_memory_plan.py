"""Our memory plan gives every buffer the place that tinygrad's gives it."""

from __future__ import annotations

import random

import pytest
from tinygrad import UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import KernelInfo, Ops

from tinyvllm.device.memory_plan import Launch, plan_memory

DTYPES = (dtypes.float, dtypes.short, dtypes.int8)


def make_launches(rng: random.Random, num_buffers: int, *, copies: bool) -> tuple[list[UOp], list[Launch]]:
    """Launches on buffers of two devices, most of which are used for a short time."""
    buffers = [
        UOp.new_buffer(rng.choice(("CPU", "CPU:1")), rng.randrange(1, 5000), rng.choice(DTYPES))
        for _ in range(num_buffers)
    ]
    launches: list[Launch] = []
    for number in range(num_buffers):
        args = tuple(buffers[max(0, number - rng.randrange(4))] for _ in range(rng.randrange(1, 5)))
        kernel = UOp.sink(arg=KernelInfo(name=f"kernel_{number}"))
        is_copy = copies and rng.random() < 0.2
        launches.append((UOp(Ops.COPY, src=(args[0],), arg="CPU") if is_copy else kernel, args))
    return buffers, launches


def places_of(buffers: list[UOp], launches: list[Launch], held: set[UOp]) -> dict[UOp, tuple[str, int, int]]:
    """By tinygrad's plan: device, offset, and size of the arena."""
    calls = tuple(UOp(Ops.CALL, src=(target, *args)) for target, args in launches)
    planned = memory_plan_rewrite(UOp(Ops.LINEAR, src=calls), held)
    found: dict[UOp, tuple[str, int, int]] = {}
    for old, new in zip(calls, planned.src, strict=True):
        for buffer, arg in zip(old.src[1:], new.src[1:], strict=True):
            if arg is not buffer:
                view = arg.buffer
                assert isinstance(view, Buffer)
                assert (view.size, view.dtype) == (buffer.max_numel(), buffer.dtype)
                found[buffer] = view.device, view.offset, view.base.nbytes
    return found


@pytest.mark.parametrize("seed", range(6))
def test_every_buffer_has_the_place_of_tinygrads_plan(seed: int) -> None:
    rng = random.Random(seed)
    buffers, launches = make_launches(rng, 40, copies=seed % 2 == 1)
    held = set(rng.sample(buffers, 8))
    places = plan_memory(launches, held.__contains__)
    assert {buffer: (view.device, view.offset, view.base.nbytes) for buffer, view in places.items()} == places_of(
        buffers, launches, held
    )
    assert all((view.size, view.dtype) == (buffer.max_numel(), buffer.dtype) for buffer, view in places.items())


def test_buffers_in_use_at_the_same_time_do_not_overlap() -> None:
    buffers, launches = make_launches(random.Random(7), 60, copies=False)
    places = plan_memory(launches, lambda buffer: False)
    lives = {
        buffer: [number for number, (_, args) in enumerate(launches) if buffer in args]
        for buffer in buffers
        if buffer in places
    }
    for first, numbers in lives.items():
        for second, others in lives.items():
            if first is second or numbers[0] > others[-1] or others[0] > numbers[-1]:
                continue
            a, b = places[first], places[second]
            assert a.base is not b.base or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_a_buffer_of_which_a_launch_gets_a_view_keeps_its_memory() -> None:
    kernel = UOp.sink(arg=KernelInfo(name="kernel"))
    whole, other = (UOp.new_buffer("CPU", 64, dtypes.float) for _ in range(2))
    launches = [(kernel, (whole, other)), (kernel, (whole[8:16], other))]
    assert set(plan_memory(launches, lambda buffer: False)) == {other}
