"""Cases of recurrent layers: shapes, sequences, and steps of a backend over a pool of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from tests.ops.builders import largest_difference, make_step_of, normal
from tests.ops.rendering import unwritten
from tinyvllm.config import StateKind
from tinyvllm.ops.backend import Backend, KVPool, Step
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.sharded import Sharded
from tinyvllm.ops.recurrent_spec import RecurrentLayer, section_sizes
from tinyvllm.ops.step_inputs import StepLayout

NUM_SLOTS = 9


@dataclass(frozen=True)
class Turn:
    """Tokens [start, start + count) of one sequence, whose state is read from a slot and written to one."""

    start: int
    count: int
    read: int
    write: int


def make_kind(heads: int, key_heads: int, key_dim: int, value_dim: int, conv_width: int = 4) -> StateKind:
    return StateKind(heads, key_heads, key_dim, value_dim, conv_width, norm_eps=0.01)


def state_step(layout: StepLayout, turns: Sequence[Turn]) -> np.ndarray:
    """The input buffer of a step over `turns`. Rows after theirs are padding."""
    buffer = np.zeros(layout.size, np.int32)
    views, row = layout.views(buffer), 0
    views["seq_rows"][:] = layout.num_seqs
    for index, turn in enumerate(turns):
        rows = slice(row, row + turn.count)
        views["positions"][rows] = np.arange(turn.start, turn.start + turn.count)
        views["seq_rows"][rows] = index
        views["state_reads"][index], views["state_writes"][index] = turn.read, turn.write
        views["first_rows"][index] = row
        row += turn.count
    views["first_rows"][len(turns) :] = row
    assert row <= layout.num_tokens, f"{row} rows do not fit into {layout}"
    return buffer


class States:
    """A backend's recurrent layer with random tables, and its pool, whose slots hold random states.

    `widths`: the sections of the projections that each part holds; `padding`: columns after them, which hold NaN."""

    def __init__(
        self, backend: Backend, kind: StateKind, widths: tuple[int, ...] = (6,), *, padding: int = 0, seed: int = 0
    ) -> None:
        self.backend, self.kind, self.padding = backend, kind, padding
        upload = backend.device.upload
        sizes, ends = section_sizes(kind), np.cumsum(widths)
        self.cols = [sum(sizes[end - width : end]) for width, end in zip(widths, ends, strict=True)]
        self.cols[-1] += padding
        self.layer = RecurrentLayer(
            index=0,
            kind=kind,
            cols=tuple(self.cols),
            conv=upload(0.5 * normal(kind.conv_width * kind.conv_size, seed=seed)),
            log_decay=upload(0.5 * normal(kind.num_heads, seed=seed + 1) - 1),
            decay_bias=upload(normal(kind.num_heads, seed=seed + 2)),
            norm=upload(1 + 0.3 * normal(kind.value_dim, seed=seed + 3)),
        )
        self.pool: KVPool = backend.make_pool([], [], 16, "float16", {0: kind}, NUM_SLOTS)
        self.write(
            normal(NUM_SLOTS, kind.num_heads, kind.key_dim, kind.value_dim, seed=seed + 4),
            normal(NUM_SLOTS, kind.conv_width, kind.conv_size, seed=seed + 5),
        )

    def run(
        self, layout: StepLayout, turns: Sequence[Turn], rows: np.ndarray, *, is_decode: bool = False
    ) -> np.ndarray:
        """Outputs (T, Hv * Dv) of the projections `rows`, which lack padding."""
        step = make_step_of(self.backend, layout, state_step(layout, turns), self.pool, is_decode=is_decode)
        given = np.full((layout.num_tokens, sum(self.cols)), np.nan, np.float32)
        given[:, : given.shape[1] - self.padding] = 0
        given[: len(rows), : rows.shape[1]] = rows
        bounds = np.cumsum(self.cols)[:-1]
        parts = [self._activation(part) for part in np.split(given, bounds, axis=1)]
        out = self.backend.recur(parts, self.layer, step)
        found = [part.float().numpy().reshape(layout.num_tokens, -1) for part in self.backend.parts_of(out)]
        return np.concatenate(found, axis=1)

    def _activation(self, part: np.ndarray) -> Any:
        """Columns as the backend has them: on several cores, divided at a place that is no head's end."""
        upload = self.backend.device.upload
        if not isinstance(self.backend, CpuBackend) or len(self.backend.cores) == 1:
            return upload(np.ascontiguousarray(part))
        middle = part.shape[1] // 2
        halves = [np.ascontiguousarray(half) for half in (part[:, :middle], part[:, middle:])]
        return Sharded(tuple(map(upload, halves)), (middle, part.shape[1] - middle))

    def write(self, matrices: np.ndarray, convs: np.ndarray) -> None:
        """Overwrite all slots: (slots, Hv, Dk, Dv) and (slots, conv_width, conv_size)."""
        for stored, values in ((self.pool.matrices[0], [matrices]), (self.pool.convs[0], self._sections(convs))):
            tensors = stored if isinstance(stored, tuple) else (stored,)
            axis = 1 if stored is self.pool.matrices[0] else 2
            shares = [np.array_split(value, len(tensors), axis=axis) for value in values]
            for tensor, share in zip(tensors, zip(*shares, strict=True), strict=True):
                self.backend.device.write(tensor, np.concatenate(share, axis=axis))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All slots, as `write` takes them."""
        kind, found = self.kind, []
        for stored in (self.pool.matrices[0], self.pool.convs[0]):
            tensors = stored if isinstance(stored, tuple) else (stored,)
            found.append([tensor.numpy().reshape(NUM_SLOTS, -1) for tensor in tensors])
        matrices = np.concatenate(found[0], axis=1).reshape(NUM_SLOTS, kind.num_heads, kind.key_dim, kind.value_dim)
        shares = [part.reshape(NUM_SLOTS, kind.conv_width, -1) for part in found[1]]
        cuts = [np.cumsum([kind.key_size // len(shares)] * 2)] * len(shares)
        sections = zip(*(np.split(share, cut, axis=2) for share, cut in zip(shares, cuts, strict=True)), strict=True)
        return matrices, np.concatenate([part for section in sections for part in section], axis=2)

    def _sections(self, convs: np.ndarray) -> list[np.ndarray]:
        return np.split(convs, [self.kind.key_size, 2 * self.kind.key_size], axis=2)

    def state(self, slot: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """A sequence's matrices, and its inputs before position `end` that the next token's convolution reads; those
        before the sequence are zeros."""
        matrices, convs = self.read()
        positions = np.arange(end - self.kind.conv_width + 1, end)
        inputs = convs[slot][positions % self.kind.conv_width]
        return matrices[slot], np.where(positions[:, None] >= 0, inputs, 0)


def draw_rows(kind: StateKind, count: int, seed: int = 0) -> np.ndarray:
    """Projections (count, columns)."""
    return normal(count, sum(section_sizes(kind)), seed=seed)


def plan_recurrence(backend: Backend, kind: StateKind, layout: StepLayout, *, is_decode: bool = False) -> Tensor:
    """A recurrent layer of a step, on tensors that are never realized."""
    cols = sum(section_sizes(kind))
    sizes = (kind.conv_elements, kind.num_heads, kind.num_heads, kind.value_dim)
    layer = RecurrentLayer(0, kind, (cols,), *[unwritten(backend, size) for size in sizes])
    pool = backend.make_pool([], [], 16, "float16", {0: kind}, 3)
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode)
    return backend.recur([unwritten(backend, layout.num_tokens * cols)], layer, step)


def check_steps(
    expected: States, found: States, steps: Sequence[tuple[StepLayout, Sequence[Turn], bool]], tolerance: float
) -> None:
    """Run consecutive steps (layout, turns, is decode) by both, and compare outputs, the states of the slots that were
    written, and the others bit for bit. Differences are of the largest value."""
    kind, ends = found.kind, dict[int, int]()
    for number, (layout, turns, is_decode) in enumerate(steps):
        before = found.read()
        rows = draw_rows(kind, sum(turn.count for turn in turns), seed=number)
        wanted, outs = (states.run(layout, turns, rows, is_decode=is_decode) for states in (expected, found))
        assert largest_difference(outs, wanted) < tolerance
        assert not outs[len(rows) :].any(), "rows of padding are not zeros"
        ends.update({turn.write: turn.start + turn.count for turn in turns if turn.count})
        for slot, end in ends.items():
            for ours, theirs in zip(found.state(slot, end), expected.state(slot, end), strict=True):
                assert largest_difference(ours, theirs) < tolerance, f"the state in slot {slot}"
        written = {0, *(turn.write for turn in turns if turn.count)}
        kept = [slot for slot in range(NUM_SLOTS) if slot not in written]
        for old, new in zip(before, found.read(), strict=True):
            np.testing.assert_array_equal(new[kept], old[kept])
