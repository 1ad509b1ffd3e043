"""Latent attention on matrix units against the reference: splits of the context, heads that do not fill tiles."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.builders import Piece, make_step
from tests.ops.latents import Case, attend, make_history
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.kernel.lanes import Lanes
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

pytestmark = pytest.mark.gpu

CASES = {
    "one row in splits": Case(10, 128, 32, 32, 64, StepLayout(1, 1, 12, 16), True, "float16", "float16"),
    "rows": Case(20, 64, 32, 64, 32, StepLayout(3, 3, 5, 32), True, "float16", "Q8_0"),
    "a prompt": Case(8, 64, 32, 32, 32, StepLayout(20, 2, 7, 8), False, "float16", "float16"),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_latent_attention_equals_the_reference(device: DeviceHandle, lanes: Lanes, name: str) -> None:
    case, ops = CASES[name], FusedGpuBackend(device, "float16", lanes)
    size, longest = case.layout.block_size, case.layout.max_blocks * case.layout.block_size
    pieces = [Piece(longest - 2), Piece(0), Piece(size)] if case.is_decode else [Piece(longest - 7, 7), Piece(0, 11)]
    pieces = pieces[: case.layout.num_seqs]
    buffer, history = make_step(case.layout, pieces), make_history(case)
    got = attend(ops, case, buffer, history)
    assert not ops.coverage.count
    expected = attend(ReferenceBackend(device), case, buffer, history)
    live = sum(piece.count for piece in pieces)
    difference = np.abs(got.out[:live] - expected.out[:live]).max() / np.abs(expected.out[:live]).max()
    print(f"{name}: {difference:.1e}")
    assert difference < 4e-3
    slots = case.layout.views(buffer)["slots"][0, :live]
    others = np.setdiff1d(np.arange(size, len(history)), slots)
    np.testing.assert_allclose(got.latents[slots], expected.latents[slots], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(got.latents[others], history[others])
