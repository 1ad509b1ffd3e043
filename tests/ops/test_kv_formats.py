"""Attention over quantized keys and values against the plain reference, and what cannot be quantized."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.ops.attention import FEATURES, Case, attend, decode_pieces, make_history, make_layer, mixed_pieces
from tests.ops.builders import Piece, make_pool, make_step, make_step_of, normal
from tests.sweeps import swept
from tinyvllm.config import KVFormats, LatentKind, LayerKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.backend import Backend, check_formats, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

DECODE = Case(9, 3, 64, StepLayout(3, 3, 8, 16), True, widths=(12, 3))
NORMED = Case(5, 1, 128, StepLayout(2, 2, 4, 8), True, normed=True)  # more queries than one pass adds up
MIXED = Case(4, 2, 32, StepLayout(16, 3, 6, 16), False)
ALL = Case(4, 2, 64, StepLayout(12, 3, 4, 8), False, features=FEATURES["all"])
FORMATS = ("fp8_e4m3", "q8_0", "q4_0", "q8_0/q4_0", "float16/q8_0")
CASES = [
    *(replace(DECODE, dtype=name) for name in FORMATS),
    *(replace(MIXED, dtype=name) for name in FORMATS[:3]),
    replace(NORMED, dtype="q4_0/fp8_e4m3"),
    replace(ALL, dtype="q8_0"),
    Case(4, 2, 40, StepLayout(3, 3, 4, 16), True, "fp8_e4m3"),  # any heads
]


@pytest.mark.parametrize("case", swept(CASES, [CASES[5]]), ids=lambda case: case.name)
def test_attention_over_quantized_keys_and_values_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, case: Case
) -> None:
    """By default a prompt: the test below decodes."""
    for seed, pieces in enumerate((decode_pieces if case.is_decode else mixed_pieces)(case)[:2]):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        got, expected = attend(backend, case, buffer, history), attend(reference, case, buffer, history)
        live, size = sum(piece.count for piece in pieces), case.layout.block_size
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        flips = 0  # elements in the middle between two codes, which rounding in another order moves to the other one
        for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
            flips += int((np.abs(now[slots] - wanted[slots]) > 1e-3 * np.abs(wanted[slots]).max()).sum())
            np.testing.assert_array_equal(now[others], then[others])  # padding wrote to the dummy block alone
        difference = np.abs(got.out[:live] - expected.out[:live]).max()
        assert flips <= 2 and difference < 2e-5 + 0.1 * flips, (difference, flips)


def test_a_layer_reads_the_quantized_keys_of_another(backend: Backend, reference: ReferenceBackend) -> None:
    case = Case(4, 2, 32, StepLayout(2, 2, 4, 8), True, "q8_0/q4_0", widths=(4, 4))
    buffer, history, outs = make_step(case.layout, [Piece(9), Piece(20)]), make_history(case), []
    for ops in (backend, reference):
        pool = make_pool(ops, case.kind, 8, case.dtype, *history)
        qkv = normal(2, sum(case.parts), seed=3)
        parts = [ops.device.upload(part) for part in np.split(qkv, np.cumsum(case.parts)[:-1], axis=1)]
        step = make_step_of(ops, case.layout, buffer, pool, is_decode=True)
        writer = make_layer(ops, case)
        reader = replace(writer, index=1, kind=replace(case.kind, kv_layer=0), qkv_cols=case.parts[:1])
        both = [ops.attend(parts, writer, step).numpy(), ops.attend(parts[:1], reader, step).numpy()]
        np.testing.assert_allclose(both[1], both[0], atol=1e-6)
        outs.append(both[0].reshape(-1))
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-5)


@pytest.mark.parametrize(
    ("case", "bad"),
    swept(product((CASES[1], CASES[5], CASES[7]), (math.nan, math.inf)), [(CASES[5], math.nan)]),
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_another_request_left_in_a_block_is_not_read(backend: Backend, case: Case, bad: float) -> None:
    pieces = [Piece(9)] if case.is_decode else [Piece(9, 5)]
    buffer, history = make_step(case.layout, pieces), make_history(case)
    clean = attend(backend, case, buffer, history)
    count, size = pieces[0].count, case.layout.block_size
    table = case.layout.views(buffer)["block_tables"][0, 0]
    own = [table[p // size] * size + p % size for p in range(9 + count)]
    for plain in history:
        plain[np.setdiff1d(np.arange(size, len(history[0])), own)] = bad
    np.testing.assert_array_equal(attend(backend, case, buffer, history).out[:count], clean.out[:count])


def test_a_pool_takes_the_bytes_that_its_formats_say(device: DeviceHandle) -> None:
    groups, sizes = pool_groups([LayerKind(4, 2, 64), LayerKind(4, 1, 128, window=32)]), {}
    for name in ("float16", "fp8", "q8_0", "q4_0"):
        pool = CpuBackend(device, None).make_pool(groups, 5, 16, name)
        sizes[name] = sum(tensor.nbytes() for tensor in pool.tensors)
        assert sizes[name] == 5 * 16 * sum(group.token_bytes(KVFormats.of(name)) for group in groups)
    assert [sizes["float16"] / size for size in sizes.values()] == [1, 2, 2 / 1.0625, 2 / 0.5625]


def test_what_cannot_be_quantized_is_refused_by_name(device: DeviceHandle) -> None:
    odd = pool_groups([LayerKind(4, 2, 64), LayerKind(4, 2, 80)])
    with pytest.raises(UnsupportedModelError, match="q8_0, but layer 1 has heads of 80 dim"):
        check_formats(odd, KVFormats.of("q8_0"))
    check_formats(odd, KVFormats.of("fp8", "float16"))
    latents = pool_groups([LayerKind(4, 4, 192, latent=LatentKind(32, 16, 16, 16))])
    with pytest.raises(UnsupportedModelError, match=r"fp8_e4m3, but layer 0 stores latents \(MLA\)"):
        check_formats(latents, KVFormats.of("fp8"))
    with pytest.raises(DeviceError, match="CPU device does not have"):
        CpuBackend(device, None).kv_dtype("bfloat16", "float16")
