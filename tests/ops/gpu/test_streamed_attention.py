"""Decoding attention that Hopper's copy engine streams: its kernels are rendered anywhere, and run on such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_streamed_attention.py"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import dtypes
from tinygrad.codegen import to_program

from tests.ops.attention import Case, decode_pieces, forget_before_windows, make_history
from tests.ops.attention import attend as attend_and_read
from tests.ops.builders import Piece, largest_difference, make_step
from tests.ops.gpu.products import TOLERANCE
from tests.ops.gpu.test_fused import CASES, attend
from tests.ops.rendering import (
    check_limits,
    kernels_of,
    make_renderer,
    plan_attention,
    plan_attention_layer,
    rendered,
    unwritten,
)
from tests.sweeps import in_both, is_sweeping, swept
from tinyvllm.config import LayerKind, Rope
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.backend import Step, pool_groups
from tinyvllm.ops.gpu.attention_decode_hopper import MAX_SPLITS, StreamedAttentionSpec, piece_of
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, MULTIPROCESSORS, declared_bytes
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short contexts are streamed, too."""
    monkeypatch.setattr(StreamedAttentionSpec, "is_worthwhile", True)
    yield


def make_spec(rows: int, context: int, dim: int = 128) -> StreamedAttentionSpec:
    layout = StepLayout(rows, rows, context // 16, 16)
    shape: dict[str, Any] = dict(num_heads=32, num_kv_heads=8, head_dim=dim, num_blocks=99, qkv_cols=(48 * dim,))
    own: dict[str, Any] = dict(lanes=Lanes("CUDA"), mma=Mma("CUDA", dtypes.half), qkv_partials=(1,), has_wgmma=True)
    return StreamedAttentionSpec(layout=layout, **shape, **own)


STREAMED: list[tuple[int, dict[str, Any]]] = [(128, {}), (128, {"window": 40, "has_sinks": True}), (256, {"window": 9})]


@pytest.mark.parametrize(("dim", "features"), swept(STREAMED, STREAMED[1:2]))
def test_contexts_are_streamed_through_the_memory_that_the_kernel_says(
    always: None, dim: int, features: dict[str, Any]
) -> None:
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True
    kind = LayerKind(16, 2, dim, Rope(10000.0), **features)
    kernels = kernels_of(plan_attention(backend, kind, "float16", is_decode=True))
    assert [kernel.arg.name.split("_")[0] for kernel in kernels][:2] == ["rotate", "stream"]
    for kernel in kernels:
        check_limits(kernel, "CUDA sm_90")
    source = to_program(kernels[1], make_renderer("CUDA sm_90")).src[2].arg
    assert source.count("wgmma.mma_async") == dim // 16 + 64 // 16  # scores and sums
    for spec in candidates(make_spec(4, 1024, dim)):
        assert spec.shared_bytes * spec.units <= HOPPER_SHARED_BYTES
    assert 0 < declared_bytes(source.encode()) <= HOPPER_SHARED_BYTES


@pytest.mark.parametrize(("rows", "context"), [(1, 256), (1, 32768), (8, 8192), (33, 4096), (256, 256), (300, 16384)])
def test_every_piece_of_work_is_done_once_and_few_threadgroups_wait(rows: int, context: int) -> None:
    spec = make_spec(rows, context)
    numbers = [n for unit in range(spec.num_units) for n in range(unit, spec.num_pieces, spec.num_units)]
    expected = itertools.product(range(spec.num_splits), range(rows), range(8))
    assert sorted(piece_of(spec, number, rows) for number in numbers) == sorted(expected)
    assert 1 <= spec.num_splits <= MAX_SPLITS
    if spec.num_pieces > 4 * MULTIPROCESSORS:
        turns = -(-spec.num_pieces // spec.num_units)
        assert spec.num_pieces >= 0.8 * turns * spec.num_units


@pytest.mark.parametrize(("rows", "group", "most"), [(5, 4, 5), (16, 8, 8), (33, 16, 4), (64, 1, 64)])
def test_rows_of_a_sequence_that_share_keys_are_those_of_one_wgmma(rows: int, group: int, most: int) -> None:
    spec = replace(make_spec(rows, 8192), num_kv_heads=32 // group, shares_keys=True)
    assert spec.tokens == most and spec.query_bytes >= most * group * 128 * 2
    expected = itertools.product(range(spec.num_splits), range(3), range(spec.num_kv_heads))  # of three sequences
    assert sorted(piece_of(spec, n, 3) for n in range(spec.num_splits * 3 * spec.num_kv_heads)) == sorted(expected)
    assert spec.stages >= 2 and spec.shared_bytes * spec.units <= HOPPER_SHARED_BYTES


@pytest.mark.parametrize("renders_all", swept((False, True), [False]))
def test_verifying_rows_share_keys_where_contexts_may_be_long(renders_all: bool) -> None:
    """Rendered by default: what streams. The other kernels are above and in test_fused.py."""
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True
    for context, names in ((4096, ["tile", "rotate", "stream", "combine"]), (512, ["store", "decode"])):
        kind, layout = LayerKind(32, 8, 128, Rope(10000.0)), StepLayout(5, 5, context // 16, 16)
        pool = backend.make_pool(pool_groups([kind]), 5, 16, "float16")
        step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode=False, verifies=True)
        qkv = [unwritten(backend, 5 * 48 * 128, dtypes.half)]
        kernels = kernels_of([backend.attend(qkv, plan_attention_layer(backend, kind, [48 * 128]), step)])
        assert [kernel.arg.name.split("_")[0] for kernel in kernels] == names
        for kernel, name in zip(kernels, names, strict=True):
            if renders_all or name == "stream":
                check_limits(kernel, "CUDA sm_90")


@in_both
@pytest.mark.parametrize(
    ("context", "dim", "is_streamed"), [(16384, 128, True), (8192, 128, False), (32768, 64, False)]
)
def test_one_row_is_streamed_where_contexts_may_be_very_long(context: int, dim: int, is_streamed: bool) -> None:
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True
    kind, layout = LayerKind(32, 8, dim, Rope(10000.0)), StepLayout(1, 1, context // 16, 16)
    pool = backend.make_pool(pool_groups([kind]), 5, 16, "float16")
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode=True)
    qkv = [unwritten(backend, 48 * dim, dtypes.half)]
    kernels = kernels_of([backend.attend(qkv, plan_attention_layer(backend, kind, [48 * dim]), step)])
    names = ["rotate", "stream", "combine"] if is_streamed else ["decode"]
    assert [kernel.arg.name.split("_")[0] for kernel in kernels] == names
    for kernel in kernels if is_sweeping else ():  # by default: a stream above, and one row in test_fused.py
        check_limits(kernel, "CUDA sm_90")
    assert (max(backend.short_contexts([kind], 1, False)) == 8192) == (dim == 128), "so that shorter ones are not"
    assert max(backend.short_contexts([replace(kind, window=4096)], 1, False)) == 1024, "no context is very long"


VERIFYING = [
    Case(32, 8, 128, StepLayout(5, 5, 160, 16), False, "float16", verifies=True),
    Case(4, 4, 64, StepLayout(9, 9, 160, 16), False, "float16", verifies=True),
    Case(16, 2, 128, StepLayout(20, 20, 160, 16), False, "float16", (16, 2, 2), verifies=True),  # several groups
    Case(8, 4, 256, StepLayout(6, 6, 80, 32), False, "float16", verifies=True),
]
VERIFYING += [replace(VERIFYING[0], features=(("window", 700), ("has_sinks", True), ("softcap", 2.0)))]
VERIFYING += [replace(VERIFYING[2], features=(("window", 40),))]


@pytest.mark.gpu
@pytest.mark.parametrize("case", VERIFYING, ids=lambda case: case.name)
def test_rows_that_share_keys_equal_the_reference(
    always: None, device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case
) -> None:
    backend, tokens = FusedGpuBackend(device, "float16", lanes), case.layout.num_tokens
    size, longest = case.layout.block_size, case.layout.max_blocks * case.layout.block_size
    batches = [
        [Piece(longest - tokens, tokens)],
        [Piece(1500, tokens - 2), Piece(size - 1, 2)],
        [Piece(1022, 2), Piece(1), Piece(longest - 1)],
        [Piece(700 + 300 * i) for i in range(tokens if tokens < 6 else 5)],
    ]
    for seed, pieces in enumerate(batches):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        got, expected = (attend_and_read(ops, case, buffer, history) for ops in (backend, reference))
        live = sum(piece.count for piece in pieces)
        difference = largest_difference(got.out[:live], expected.out[:live])
        print(f"{case.name} {pieces}: {difference:.1e}")
        assert difference < TOLERANCE["float16"]
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        for now, then in zip(got.after, got.before, strict=True):
            np.testing.assert_array_equal(now[others], then[others])
        spoiled = attend_and_read(backend, case, *forget_before_windows(case, buffer, pieces, history))
        np.testing.assert_array_equal(spoiled.out[:live], got.out[:live])  # what others left behind is not attended


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.dim % 64 == 0], ids=lambda case: case.name)
def test_streamed_decoding_equals_the_reference_and_writes_its_slots_alone(
    always: None, device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case
) -> None:
    backend, size = FusedGpuBackend(device, "float16", lanes), case.layout.block_size
    for seed, pieces in enumerate(decode_pieces(case)):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        (got, _), (expected, _) = (attend(ops, case, buffer, history) for ops in (backend, reference))
        live = len(pieces)
        assert largest_difference(got.out[:live], expected.out[:live]) < TOLERANCE["float16"]
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
            np.testing.assert_allclose(now[slots], wanted[slots], rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(now[others], then[others])
        spoiled, _ = attend(backend, case, *forget_before_windows(case, buffer, pieces, history))
        np.testing.assert_array_equal(spoiled.out[:live], got.out[:live])  # what others left behind is not attended
