"""Recurrent layers: the kernels of this run's device against the reference, which is token by token in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.builders import largest_difference
from tests.ops.recurrent import NUM_SLOTS, States, Turn, draw_rows, make_kind
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

TOLERANCE = 1e-5  # of the largest value: all of it is computed in float32
MIXED, DECODE = StepLayout(16, 4, 2, 16, has_states=True), StepLayout(4, 4, 2, 16, has_states=True)
KINDS = {"even": make_kind(4, 2, 32, 16), "odd": make_kind(6, 2, 16, 32, conv_width=3)}
# the turns of consecutive steps: new sequences, a decode among prompts, moved states, a slot that two read, one without
# rows, and steps that end in rows of padding
STEPS = [
    (MIXED, [Turn(0, 5, 3, 3), Turn(7, 1, 4, 5), Turn(16, 6, 4, 6)]),
    (MIXED, [Turn(5, 2, 3, 3), Turn(2, 0, 4, 4), Turn(8, 9, 5, 1)]),
    (DECODE, [Turn(7, 1, 3, 3), Turn(17, 1, 1, 2), Turn(0, 1, 7, 8)]),
]


@pytest.fixture(scope="module")
def device() -> DeviceHandle:
    return open_device(2)


def make_backend(device: DeviceHandle) -> Backend:
    return CpuBackend(device, None) if device.is_cpu else GpuBackend(device, "float32")


def in_parts(device: DeviceHandle) -> tuple[int, ...]:
    """The sections in each part of the projections: several, and on several cores their shards end inside heads."""
    return (1, 2, 3) if device.has_threads else (4, 2)


@pytest.mark.parametrize("name", KINDS)
def test_steps_equal_the_reference(device: DeviceHandle, name: str) -> None:
    kind = KINDS[name]
    expected = States(ReferenceBackend(device), kind, padding=3)
    found = States(make_backend(device), kind, in_parts(device), padding=3)
    ends: dict[int, int] = {}
    for number, (layout, turns) in enumerate(STEPS):
        before = found.read()
        rows = draw_rows(kind, sum(turn.count for turn in turns), seed=number)
        outs = [states.run(layout, turns, rows, is_decode=layout is DECODE) for states in (expected, found)]
        assert largest_difference(outs[1], outs[0]) < TOLERANCE
        assert not outs[1][len(rows) :].any(), "rows of padding are not zeros"
        ends.update({turn.write: turn.start + turn.count for turn in turns if turn.count})
        for slot, end in ends.items():
            for a, b in zip(found.state(slot, end), expected.state(slot, end), strict=True):
                assert largest_difference(a, b) < TOLERANCE
        written = {0, *(turn.write for turn in turns if turn.count)}
        for old, new in zip(before, found.read(), strict=True):
            kept = [slot for slot in range(NUM_SLOTS) if slot not in written]
            np.testing.assert_array_equal(new[kept], old[kept])
