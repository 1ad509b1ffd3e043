"""Latent attention, absorbed, against the reference, which computes each head's keys and values. On a GPU:
DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.builders import Piece, make_step
from tests.ops.latents import Case, attend, make_history
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

CASES = [
    Case(4, 32, 16, 32, 64, StepLayout(3, 3, 4, 8), True, "float16", "Q8_0", is_interleaved=False),
    Case(5, 96, 32, 64, 32, StepLayout(20, 3, 3, 16), False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_absorbed_attention_equals_the_reference(backend: Backend, reference: ReferenceBackend, case: Case) -> None:
    size, longest = case.layout.block_size, case.layout.max_blocks * case.layout.block_size
    pieces = [Piece(longest - 1), Piece(0), Piece(size)] if case.is_decode else [Piece(longest - 7, 7), Piece(0, 11)]
    pieces = pieces[: case.layout.num_seqs]
    buffer, history = make_step(case.layout, pieces), make_history(case)
    got, expected = attend(backend, case, buffer, history), attend(reference, case, buffer, history)
    live = sum(piece.count for piece in pieces)
    difference = np.abs(got.out[:live] - expected.out[:live]).max() / np.abs(expected.out[:live]).max()
    print(f"{case.name}: {difference:.1e}")
    # squares added up in another order may round a stored latent to its other neighbor
    assert difference < (1e-4 if case.dtype == "float16" else 2e-6)
    slots = case.layout.views(buffer)["slots"][0, :live]
    others = np.setdiff1d(np.arange(size, len(history)), slots)
    step = 1e-3 if case.dtype == "float16" else 1e-6
    np.testing.assert_allclose(got.latents[slots], expected.latents[slots], rtol=step, atol=step)
    np.testing.assert_array_equal(got.latents[others], history[others])  # padding wrote to the dummy block alone
