"""Attention over quantized keys and values on CUDA and METAL: rendered anywhere, and run on such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_quantized_kv.py"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import dtypes
from tinygrad.codegen import to_program

from tests.ops.attention import (
    Case,
    attend,
    decode_pieces,
    forget_before_windows,
    fused_case,
    make_history,
    mixed_pieces,
)
from tests.ops.builders import Piece, largest_difference, make_step
from tests.ops.rendering import KINDS, check_limits, kernels_of, make_renderer, plan_attention, rendered
from tests.sweeps import swept
from tinyvllm.config import KVFormats, LayerKind, Rope
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.gpu import attention_prefill
from tinyvllm.ops.gpu.attention_prefill_inputs import PrefillSpec
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, declared_bytes
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

TOLERANCE = 4e-3  # of the largest value: that of float16
FORMATS = ("fp8_e4m3", "q8_0", "q4_0", "q8_0/q4_0", "float16/q8_0", "q4_0/float16")
NAMES = {True: {"decode"}, False: {"tile", "store", "prefill"}}


def rendered_cases() -> list[tuple[str, str, int, bool]]:
    return [
        (kind, name, dim, decode)
        for kind in KINDS
        for name in FORMATS
        for dim in (64, 128, 256)
        for decode in (True, False)
    ]


@pytest.mark.parametrize(
    ("kind", "name", "dim", "is_decode"),
    swept(
        rendered_cases(),
        {("METAL", "q8_0/q4_0", 64, False)},  # tests/metal decodes, and a test below on CUDA
    ),
)
def test_a_step_over_quantized_keys_and_values_renders_within_the_limits(
    kind: str, name: str, dim: int, is_decode: bool
) -> None:
    """As many kernels as over float16."""
    layer = LayerKind(4, 2, dim, Rope(10000.0))
    kernels = kernels_of(plan_attention(rendered(kind), layer, name, is_decode=is_decode))
    assert {kernel.arg.name.split("_")[0] for kernel in kernels} == NAMES[is_decode]
    for kernel in kernels:
        check_limits(kernel, KINDS[kind])


@pytest.mark.sweep  # by default: over float16 in test_prefill.py, METAL's over codes above, and the memory below
def test_prompts_on_hopper_unpack_codes_in_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_prefill, "has_wgmma", lambda name: True)
    kernels = kernels_of(plan_attention(rendered("CUDA"), LayerKind(4, 2, 64, Rope(10000.0)), "q4_0/fp8_e4m3"))
    by_name = {kernel.arg.name.split("_")[0]: kernel for kernel in kernels}
    assert by_name.keys() == {"tile", "rotate", "prefill"}
    source = to_program(by_name["prefill"], make_renderer("CUDA sm_90")).src[2].arg
    assert "wgmma.mma_async" in source and "cp.async.cg" in source and source.count("cp.async.bulk.tensor") == 1
    assert 0 < declared_bytes(source.encode()) <= HOPPER_SHARED_BYTES


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "fp8_e4m3/q4_0"])
def test_hoppers_memory_holds_stages_and_codes(name: str, dim: int) -> None:
    layout = StepLayout(512, 4, 64, 16)
    shape: dict[str, Any] = dict(num_heads=16, num_kv_heads=4, head_dim=dim, num_blocks=9, qkv_cols=(24 * dim,))
    own: dict[str, Any] = dict(lanes=Lanes("CUDA"), mma=Mma("CUDA", dtypes.half), qkv_partials=(1,), has_wgmma=True)
    spec = PrefillSpec(layout=layout, kv=KVFormats.of(*name.split("/")), **shape, **own)
    assert spec.uses_wgmma and spec.is_possible()
    assert spec.shared_bytes <= HOPPER_SHARED_BYTES
    assert spec.groups * spec.registers + spec.fetcher_registers <= (spec.groups + 1) * spec.launch_registers


def test_hopper_converts_e4m3_by_its_instruction() -> None:
    backend, layer = rendered("CUDA"), LayerKind(4, 2, 64, Rope(10000.0))
    backend.lanes = replace(backend.lanes, has_float8=True)
    (kernel,) = kernels_of(plan_attention(backend, layer, "fp8_e4m3", is_decode=True))
    check_limits(kernel, "CUDA sm_90")
    assert "cvt.rn.f16x2.e4m3x2" in to_program(kernel, make_renderer("CUDA sm_90")).src[2].arg


CASES = [
    Case(8, 2, 64, StepLayout(3, 3, 12, 16), True),
    Case(4, 2, 64, StepLayout(3, 3, 200, 16), True, normed=True),  # on CUDA the last threadgroup joins the parts
    Case(16, 8, 128, StepLayout(1, 1, 40, 16), True, normed=True),
    Case(8, 2, 128, StepLayout(2, 2, 300, 16), True),
    Case(8, 2, 128, StepLayout(40, 40, 5, 32), True, widths=(8, 2, 2)),
    Case(4, 2, 256, StepLayout(3, 3, 8, 16), True),
    fused_case("all", StepLayout(3, 3, 12, 16), is_decode=True),
    fused_case("gpt-oss", StepLayout(3, 3, 12, 16), is_decode=True),
    Case(8, 2, 64, StepLayout(5, 2, 12, 16), False, verifies=True),
    Case(4, 2, 64, StepLayout(70, 3, 12, 16), False),
    Case(16, 2, 128, StepLayout(100, 3, 12, 16), False, normed=True),
    Case(4, 2, 256, StepLayout(40, 3, 8, 16), False),
    fused_case("all", StepLayout(70, 3, 12, 16), is_decode=False),
]
HERE = ("q8_0", "q4_0/fp8_e4m3")  # of the formats, those that the cases run by default


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "name"),
    swept([(c, n) for c in CASES for n in dict.fromkeys((*HERE, *FORMATS))], {(c, n) for c in CASES for n in HERE}),
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_attention_over_quantized_keys_and_values_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case, name: str
) -> None:
    backend, case = FusedGpuBackend(device, "float16", lanes), replace(case, dtype=name)
    size = case.layout.block_size
    for seed, pieces in enumerate((decode_pieces if case.is_decode else mixed_pieces)(case)[:2]):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        got, expected = (attend(ops, case, buffer, history) for ops in (backend, reference))
        assert not backend.coverage.lines()
        live = sum(piece.count for piece in pieces)
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        moved = 0.0  # a number next to the middle between two codes may become either
        for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
            np.testing.assert_array_equal(now[others], then[others])
            difference = np.abs(now[slots] - wanted[slots])
            assert (difference > 2e-3 + 2e-3 * np.abs(wanted[slots])).mean() < 5e-3
            moved = max(moved, float(difference.max()))
        assert largest_difference(got.out[:live], expected.out[:live]) < TOLERANCE + moved / 4


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_prompts_without_wgmma_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, dim: int
) -> None:
    """The kernel of other devices of CUDA, which Hopper takes where keys or values alone are quantized."""
    monkeypatch.setattr(attention_prefill, "has_wgmma", lambda name: False)
    case = Case(4, 2, dim, StepLayout(70, 3, 12, 16), False, "q8_0/q4_0")
    buffer, history = make_step(case.layout, [Piece(40, 50), Piece(150, 20)]), make_history(case)
    backend = FusedGpuBackend(device, "float16", lanes)
    got, expected = (attend(ops, case, buffer, history) for ops in (backend, reference))
    assert largest_difference(got.out, expected.out) < 2e-2 and not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "mixed"])
def test_blocks_before_the_window_are_not_read(device: DeviceHandle, lanes: Lanes, is_decode: bool) -> None:
    layout = StepLayout(*((3, 3, 12, 16) if is_decode else (40, 2, 12, 16)))
    case = Case(4, 2, 64, layout, is_decode, "fp8_e4m3/q8_0", features=(("window", 37),))
    pieces = [Piece(150), Piece(37), Piece(5)] if is_decode else [Piece(140, 39), Piece(100)]
    buffer, history = make_step(layout, pieces), make_history(case)
    backend = FusedGpuBackend(device, "float16", lanes)
    clean = attend(backend, case, buffer, history)
    spoiled = attend(backend, case, *forget_before_windows(case, buffer, pieces, history, bad=400.0))
    np.testing.assert_array_equal(spoiled.out, clean.out)


@pytest.mark.gpu
def test_heads_of_other_sizes_take_the_general_kernels(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend
) -> None:
    case = Case(4, 2, 96, StepLayout(3, 3, 4, 16), True, "q8_0")
    backend = FusedGpuBackend(device, "float16", lanes)
    buffer, history = make_step(case.layout, [Piece(40), Piece(3), Piece(16)]), make_history(case)
    got, expected = (attend(ops, case, buffer, history) for ops in (backend, reference))
    assert largest_difference(got.out, expected.out) < 3e-2
    assert any("heads of 96 in q8_0" in line for line in backend.coverage.lines())
