"""Recurrent layers: the kernels of this run's device against the reference, which is token by token in NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.ops.builders import largest_difference
from tests.ops.recurrent import States, Turn, check_steps, draw_rows, make_kind, plan_recurrence
from tests.ops.rendering import KINDS as DEVICES
from tests.ops.rendering import check_limits, gpu_backend, kernels_of, rendered
from tests.sweeps import swept
from tinyvllm.config import LayerKind, StateKind
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.backends import make_backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

TOLERANCE = 1e-5  # of the largest value, where all of it is computed in float32
CHUNK_TOLERANCE = 2e-3  # of the chunked form, whose products have float16 operands, and outputs in float16
MIXED, DECODE = StepLayout(16, 4, 2, 16, has_states=True), StepLayout(4, 4, 2, 16, has_states=True)
LONG = StepLayout(256, 4, 2, 16, has_states=True)
KINDS = {"even": make_kind(4, 2, 32, 16), "odd": make_kind(6, 2, 16, 32, conv_width=3)}
# the turns of consecutive steps: new sequences, a decode among prompts, moved states, a slot that two read, one without
# rows, and steps that end in rows of padding
STEPS = [
    (MIXED, [Turn(0, 5, 3, 3), Turn(7, 1, 4, 5), Turn(16, 6, 4, 6)], False),
    (MIXED, [Turn(5, 2, 3, 3), Turn(2, 0, 4, 4), Turn(8, 9, 5, 1)], False),
    (DECODE, [Turn(7, 1, 3, 3), Turn(17, 1, 1, 2), Turn(0, 1, 7, 8)], True),
]
LONG_STEPS = [
    (LONG, [Turn(0, 70, 3, 3), Turn(7, 1, 4, 5), Turn(16, 133, 4, 6)], False),
    (LONG, [Turn(70, 32, 3, 3), Turn(2, 0, 4, 4), Turn(8, 165, 5, 1)], False),
    (DECODE, [Turn(102, 1, 3, 3), Turn(173, 1, 1, 2), Turn(0, 1, 7, 8)], True),
]


@pytest.fixture(scope="module")
def device() -> DeviceHandle:
    return open_device(2)


def make_general(device: DeviceHandle, layers: tuple[LayerKind, ...] = ()) -> Backend:
    """The backend of this run's device whose recurrent layers take any shape."""
    return CpuBackend(device, None, layers) if device.is_cpu else GpuBackend(device, "float32")


@pytest.mark.parametrize("name", swept(KINDS, ["even"]))  # the test below has the other
def test_steps_equal_the_reference(device: DeviceHandle, name: str) -> None:
    """On a CPU, the "even" kind is shared by two cores, whose shards of the projections end inside heads."""
    layers = (LayerKind(4, 2, 64),) if name == "even" else ()
    found = States(make_general(device, layers), KINDS[name], (1, 2, 3), padding=3)
    check_steps(States(ReferenceBackend(device), KINDS[name], padding=3), found, STEPS, TOLERANCE)


CUTS = [(16,), (3, 4), (1, 2, 3, 15)]


@pytest.mark.parametrize("cuts", swept([(cut,) for cut in CUTS], [(CUTS[-1],)]), ids=str)
def test_a_sequence_may_be_divided_into_any_steps(device: DeviceHandle, cuts: tuple[int, ...]) -> None:
    """Outputs and state are those of one step over the whole."""
    kind, count = KINDS["odd"], 20
    whole, parts = (States(make(device), kind) for make in (ReferenceBackend, make_general))
    rows = draw_rows(kind, count)
    layout = StepLayout(count, 1, 2, 16, has_states=True)
    expected = whole.run(layout, [Turn(0, count, 2, 2)], rows)
    found, slot = [], 1
    for start, end in pairwise([0, *cuts, count]):
        turn = Turn(start, end - start, slot, slot + start % 2)  # it moves now and then
        found.append(parts.run(MIXED, [turn], rows[start:end])[: turn.count])
        slot = turn.write
    assert largest_difference(np.concatenate(found), expected) < TOLERANCE
    for ours, theirs in zip(parts.state(slot, count), whole.state(2, count), strict=True):
        assert largest_difference(ours, theirs) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", [make_kind(6, 2, 128, 128), make_kind(2, 2, 32, 32), make_kind(2, 1, 64, 16)], ids=str)
def test_fused_forms_equal_the_reference(device: DeviceHandle, kind: StateKind, dtype: str) -> None:
    """Decoding, and prompts by chunks (float16) or by rows."""
    backend = make_backend(device, dtype, dtype, [LayerKind(4, 2, 64)], dequantize=False)
    found = States(backend, kind, (1, 2, 3), padding=3)
    tolerance = TOLERANCE if dtype == "float32" else CHUNK_TOLERANCE
    check_steps(States(ReferenceBackend(device), kind, padding=3), found, LONG_STEPS, tolerance)


@pytest.mark.parametrize("device_kind", swept(("METAL", "CUDA"), []))  # METAL's run in tests/metal
def test_fused_forms_render_within_the_limits(device_kind: str) -> None:
    """Of heads of 128, three value heads to each head of keys: Qwen3.5-27B's."""
    kind, backend = make_kind(6, 2, 128, 128), rendered(device_kind, is_chained=True)
    kernels = kernels_of([plan_recurrence(backend, kind, DECODE, is_decode=True), plan_recurrence(backend, kind, LONG)])
    names = {kernel.arg.name.rsplit("_", 1)[0] for kernel in kernels}
    assert names == {"decode_state", "mix_keys", "mix_values", "solve_chunks", "scan_chunks", "gate_heads"}
    for kernel in kernels:
        check_limits(kernel, DEVICES[device_kind])


def test_the_general_form_renders_within_the_limits() -> None:
    for kernel in kernels_of([plan_recurrence(gpu_backend("float16"), KINDS["odd"], MIXED)]):
        check_limits(kernel, "OpenCL")
