"""Gated short convolutions against the reference in NumPy: prompts in chunks, steps of decoding, and slots that are
kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ops.builders import largest_difference, make_step_of, normal
from tests.ops.recurrent import NUM_SLOTS, Turn, state_step
from tinyvllm.config import ConvKind, LayerKind
from tinyvllm.device.handle import open_device
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.sharded import Sharded
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.short_conv import ConvLayer
from tinyvllm.ops.step_inputs import StepLayout

KIND = ConvKind.of(64, conv_width=3)
PROMPT, DECODE = StepLayout(16, 4, 1, 16, has_states=True), StepLayout(4, 4, 1, 16, has_states=True)
# two new sequences, of which one has a single token, a chunk that follows a checkpoint, which is kept, and one in place
FIRST = [Turn(0, 5, 1, 1), Turn(0, 1, 2, 2), Turn(16, 2, 3, 4), Turn(9, 4, 5, 5)]
THEN = [Turn(5, 1, 1, 6), Turn(1, 1, 2, 2), Turn(18, 1, 4, 4)]  # the fourth row is padding


def run(backend: Backend, steps: Sequence[tuple[StepLayout, list[Turn], bool]]) -> list[np.ndarray]:
    """The outputs of each step, and all slots but the dummy at the end."""
    pool = backend.make_pool([], [], 16, "float16", {0: KIND}, NUM_SLOTS)
    stored = pool.convs[0] if isinstance(pool.convs[0], tuple) else (pool.convs[0],)
    filled = normal(NUM_SLOTS, KIND.conv_width, KIND.num_channels, seed=1)
    for tensor, share in zip(stored, np.split(filled, len(stored), axis=2), strict=True):
        backend.device.write(tensor, np.ascontiguousarray(share))
    taps = backend.device.upload(normal(KIND.conv_width * KIND.num_channels, seed=2))
    found = []
    for number, (layout, turns, is_decode) in enumerate(steps):
        step = make_step_of(backend, layout, state_step(layout, turns), pool, is_decode=is_decode)
        rows = normal(layout.num_tokens, 3, len(stored), KIND.num_channels // len(stored), seed=3 + number)
        parts = [backend.device.upload(np.ascontiguousarray(rows[:, :, core])) for core in range(len(stored))]
        cols = 3 * KIND.num_channels // len(stored)
        given = parts[0] if len(parts) == 1 else Sharded(tuple(parts), (cols,) * len(parts))
        out = backend.convolve(given, ConvLayer(0, KIND, cols * len(parts), taps), step)
        found.append(np.concatenate([p.numpy().reshape(layout.num_tokens, -1) for p in backend.parts_of(out)], axis=1))
    slots = [tensor.numpy().reshape(NUM_SLOTS, KIND.conv_width, -1) for tensor in stored]
    return [*found, np.concatenate(slots, axis=2)[1:]]


def check(backend: Backend, reference: ReferenceBackend) -> None:
    steps = [(PROMPT, FIRST, False), (DECODE, THEN, True)]
    *outputs, slots = run(backend, steps)
    *expected, right = run(reference, steps)
    for found, wanted in zip(outputs, expected, strict=True):
        assert largest_difference(found, wanted) < 1e-5
    # of a slot, what the next token reads: the inputs at the two positions before it
    for slot, end in ((1, 5), (2, 2), (3, 16), (4, 19), (5, 13), (6, 6)):
        rows = [position % KIND.conv_width for position in (end - 1, end - 2) if position >= 0]
        assert largest_difference(slots[slot - 1][rows], right[slot - 1][rows]) < 1e-5, slot


def test_steps_equal_the_reference(backend: Backend, reference: ReferenceBackend) -> None:
    check(backend, reference)


def test_cores_share_channels(reference: ReferenceBackend) -> None:
    two = CpuBackend(open_device(2), None, [LayerKind(4, 2, 32)])
    assert len(two.cores) == 2
    check(two, reference)
