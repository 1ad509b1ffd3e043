"""RoPE, KV write and paged attention against the plain reference. On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.ops.attention import (
    DECODE,
    FEATURES,
    MIXED,
    Case,
    attend,
    decode_pieces,
    forget_before_windows,
    make_history,
    mixed_pieces,
)
from tests.ops.builders import Piece, make_step, normal
from tests.sweeps import swept
from tinyvllm.config import LayerKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.backend import Backend, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout


def check(ops: Backend, reference: ReferenceBackend, case: Case, pieces: list[Piece], seed: int) -> None:
    buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
    got, expected = attend(ops, case, buffer, history), attend(reference, case, buffer, history)
    live = sum(piece.count for piece in pieces)
    difference = np.abs(got.out[:live] - expected.out[:live]).max()
    print(f"{case.name} {pieces}: {difference:.1e}")
    # squares added up in another order may round a stored key to its other neighbor
    assert difference < (1e-4 if case.normed and case.dtype == "float16" else 1e-5)

    size = case.layout.block_size
    slots = case.layout.views(buffer)["slots"][0, :live]
    step = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]  # one rounding of a rotated key
    others = np.setdiff1d(np.arange(size, len(history[0])), slots)
    for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
        np.testing.assert_allclose(now[slots], wanted[slots], rtol=step, atol=step)
        np.testing.assert_array_equal(now[others], then[others])  # padding wrote to the dummy block alone


@pytest.mark.parametrize("case", swept(DECODE, [DECODE[0]]), ids=lambda case: case.name)
def test_decode_equals_the_reference_and_writes_its_slots_alone(
    backend: Backend, reference: ReferenceBackend, case: Case
) -> None:
    """Normed heads by default: among all that other families ask of attention, below."""
    for seed, pieces in enumerate(decode_pieces(case)):
        check(backend, reference, case, pieces, seed)


@pytest.mark.parametrize("case", swept(MIXED, [MIXED[0]]), ids=lambda case: case.name)
def test_mixed_steps_equal_the_reference_and_write_their_slots_alone(
    backend: Backend, reference: ReferenceBackend, case: Case
) -> None:
    for seed, pieces in enumerate(mixed_pieces(case)):
        check(backend, reference, case, pieces, seed)


@pytest.mark.parametrize("name", swept(FEATURES, ("scaled queries", "all")))
def test_what_other_families_ask_of_attention_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, name: str
) -> None:
    layout, is_normed = StepLayout(3, 3, 4, 8), name in ("all", "partial rope")
    decode = Case(4, 2, 16, layout, True, "float32", (4, 2, 2), normed=is_normed, features=FEATURES[name])
    mixed = replace(decode, layout=StepLayout(12, 3, 4, 8), is_decode=False, widths=())
    check(backend, reference, decode, [Piece(7), Piece(0), Piece(30)], seed=0)
    for seed, pieces in enumerate(mixed_pieces(mixed)[:2]):
        check(backend, reference, mixed, pieces, seed)


@pytest.mark.parametrize("name", swept(("whole norms", "all"), ["whole norms"]))
def test_columns_that_pad_qkv_are_not_read(backend: Backend, reference: ReferenceBackend, name: str) -> None:
    decode = Case(6, 3, 16, StepLayout(3, 3, 4, 8), True, features=FEATURES[name], padding=16)
    check(backend, reference, decode, [Piece(7), Piece(0), Piece(30)], seed=0)


@pytest.mark.parametrize("is_decode", [True, False])
def test_blocks_before_the_window_are_not_read(backend: Backend, is_decode: bool) -> None:
    layout = StepLayout(3 if is_decode else 12, 3, 8, 8)
    case = Case(4, 2, 16, layout, is_decode, features=FEATURES["gemma"])
    pieces = [Piece(60), Piece(16), Piece(3)] if is_decode else [Piece(50, 10), Piece(19), Piece(3)]
    buffer, history = make_step(layout, pieces), make_history(case)
    clean = attend(backend, case, buffer, history)
    spoiled = attend(backend, case, *forget_before_windows(case, buffer, pieces, history))
    np.testing.assert_array_equal(spoiled.out, clean.out)


@pytest.mark.sweep  # by default some of the cases above are normed
@pytest.mark.parametrize("seed", range(20))
def test_normed_heads_of_any_shape_equal_the_reference(
    backend: Backend, reference: ReferenceBackend, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kv_heads, dim = int(rng.integers(1, 4)), 8 * int(rng.integers(1, 17))
    heads = kv_heads * int(rng.integers(1, 5))
    seqs, blocks, size = int(rng.integers(2, 5)), int(rng.integers(2, 5)), int(rng.choice([8, 16, 32]))
    widths = ((heads, kv_heads, kv_heads), (heads + kv_heads, kv_heads), ())[int(rng.integers(3))]
    dtype = str(rng.choice(["float32", "float16"]))
    decode = Case(heads, kv_heads, dim, StepLayout(seqs, seqs, blocks, size), True, dtype, widths, normed=True)
    mixed = replace(decode, layout=StepLayout(8, seqs, blocks, size), is_decode=False)
    check(backend, reference, decode, decode_pieces(decode)[0], seed)
    check(backend, reference, mixed, mixed_pieces(mixed)[0], seed)


@pytest.mark.gpu
def test_a_gpu_keeps_a_bfloat16_pool(device: DeviceHandle, reference: ReferenceBackend) -> None:
    case = Case(6, 2, 16, StepLayout(8, 5, 3, 8), False, "bfloat16")
    check(GpuBackend(device, "float32"), reference, case, [Piece(8, 5), Piece(0, 2)], seed=0)


def test_the_cpu_says_that_it_has_no_bfloat16_pool(device: DeviceHandle) -> None:
    cpu = CpuBackend(device, None)
    with pytest.raises(DeviceError, match="CPU device does not have: give float16 or float32"):
        cpu.kv_dtype("bfloat16", "bfloat16")
    assert cpu.kv_dtype("auto", "bfloat16") == cpu.kv_dtype("float16", "bfloat16") == "float16"
    assert cpu.kv_dtype("float32", "bfloat16") == "float32"


@pytest.mark.parametrize("case", swept([DECODE[1], MIXED[2]], [DECODE[1]]), ids=lambda case: case.name)
def test_padded_rows_change_nothing(backend: Backend, case: Case) -> None:
    """The same sequences alone and with padding give the same bits."""
    tokens = case.layout.num_tokens
    pieces = [Piece(9), Piece(3)] if case.is_decode else [Piece(9, 5), Piece(3, 2)]
    live, history = sum(piece.count for piece in pieces), make_history(case)
    padded = make_step(case.layout, pieces)
    full = make_step(case.layout, [*pieces, Piece(1, tokens - live)])
    a, b = attend(backend, case, padded, history), attend(backend, case, full, history)
    np.testing.assert_array_equal(a.out[:live], b.out[:live])


@pytest.mark.parametrize(
    ("case", "bad"),
    swept(product((DECODE[1], MIXED[2]), (math.nan, math.inf)), [(MIXED[2], math.nan)]),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_another_request_left_in_a_block_is_not_read(backend: Backend, case: Case, bad: float) -> None:
    """A recycled block holds old numbers after the sequence's own: using them, a broken request would break others."""
    pieces = [Piece(9)] if case.is_decode else [Piece(9, 5)]
    buffer, history = make_step(case.layout, pieces), make_history(case)
    clean = attend(backend, case, buffer, history)
    count, size = pieces[0].count, case.layout.block_size
    table = case.layout.views(buffer)["block_tables"][0, 0]
    own = [table[p // size] * size + p % size for p in range(9 + count)]
    others = np.setdiff1d(np.arange(size, len(history[0])), own)
    for plain in history:
        plain[others] = bad
    np.testing.assert_array_equal(attend(backend, case, buffer, history).out[:count], clean.out[:count])


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_the_reference_is_textbook_attention(reference: ReferenceBackend, normed: bool) -> None:
    """One sequence from its first token, no cache: softmax(q k' / sqrt(D)) v with a causal mask, in NumPy."""
    case = Case(4, 2, 16, StepLayout(12, 1, 2, 8), False, normed=normed)
    history = make_history(case)
    out = attend(reference, case, make_step(case.layout, [Piece(0, 12)]), history).out
    qkv = normal(12, 8, 16, seed=3).reshape(12, 8, 16)
    if normed:
        weights = (1 + 0.3 * normal(32, seed=4)).reshape(2, 16).repeat([4, 2], axis=0)  # 4 heads of queries, 2 of keys
        qkv[:, :6] *= weights / np.sqrt((qkv[:, :6] ** 2).mean(-1, keepdims=True) + 0.05)
    turns = np.exp(1j * np.arange(12)[:, None] / 10000.0 ** (np.arange(8) / 8))[:, None]  # RoPE as complex numbers
    turned = (qkv[:, :6, :8] + 1j * qkv[:, :6, 8:]) * turns
    q, k = np.split(np.concatenate([turned.real, turned.imag], axis=-1), [4], axis=1)
    k, v = (np.repeat(heads, 2, axis=1) for heads in (k, qkv[:, 6:]))
    scores = np.einsum("thd,shd->hts", q, k) / 4 + np.where(np.tri(12), 0, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("hts,shd->thd", weights, v), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [12, 1024])
def test_head_sizes_that_threadgroups_cannot_serve_are_refused(device: DeviceHandle, dim: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"head_dim {dim} is not a multiple of 8 up to 512"):
        GpuBackend(device, "float32").make_pool(pool_groups([LayerKind(1, 1, dim)]), 2, 16, "float32")
