"""Products whose weights wgmma takes from registers: the tokens' order, the memory that kernels say, and which products
take them. What they compute is compared with the reference's on a Hopper GPU:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_quantized_wgmma.py tests/ops/gpu/test_fused.py"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp
from tinygrad.codegen import to_program

from tests.ops.builders import make_host, normal
from tests.ops.gpu.products import require_hopper
from tests.ops.rendering import check_limits, kernels_of, make_renderer, rendered
from tests.sweeps import swept
from tinyvllm.arrays import to_float32
from tinyvllm.device.handle import open_device
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.formats.matrix import Matrix, pack
from tinyvllm.ops.gpu import quantized_wgmma
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.gpu.product import plane_sizes
from tinyvllm.ops.gpu.quantized_wgmma import MAX_TOKENS, QuantizedWgmmaSpec, paired_row, quantized_wgmma_kernel
from tinyvllm.ops.gpu.token_order import (
    CHUNK_COLS,
    order_rows_kernel,
    ordered_col,
    ordered_place,
    token_cols,
    token_place,
)
from tinyvllm.ops.kernel.body import F16, F32, empty, run_kernel
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, declared_bytes
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates

FORMATS = ("Q4_K", "Q6_K", "Q4_0", "MXFP4-e8m0", "affine4_g64-float16", "Q8_0", "Q5_0")
SHAPES = ((6144, 4096), (4096, 14336), (2560, 9728), (96, 512))


@cache
def small_matrix(fmt: str) -> Matrix:
    return pack(make_host(fmt, 32, 512), "row", None, open_device().name)


def quantized(fmt: str, tokens: int, rows: int, cols: int, **more: Any) -> QuantizedWgmmaSpec:
    matrix = small_matrix(fmt)
    shape: dict[str, Any] = dict(name="test", format=matrix.format, num_tokens=tokens, num_rows=rows, num_cols=cols)
    shape |= dict(lanes=Lanes("CUDA", (F16,), is_chained=True), mma=Mma("CUDA", F16), planes=plane_sizes(matrix))
    return QuantizedWgmmaSpec(**shape, **more)


def test_each_column_has_a_place_of_its_own() -> None:
    assert [ordered_place(ordered_col(place)) for place in range(CHUNK_COLS)] == list(range(CHUNK_COLS))
    places = {token_place(token, col, 16) for token in range(16) for col in range(3 * CHUNK_COLS)}
    assert places == set(range(16 * 3 * CHUNK_COLS))


def test_an_instruction_takes_columns_of_runs_whose_codes_share_a_word() -> None:
    """Of a lane's four values of an instruction, two neighbors are in the halves of a word."""
    for step in range(CHUNK_COLS // 16):
        for lane in range(4):
            cols = [ordered_col(step * 16 + lane * 2 + i) for i in (0, 1, 8, 9)]
            first = min(cols)
            assert [col - first for col in cols] == [0, 2, 1, 3] and first % 4 == 0 and first // 32 == lane


def test_results_that_a_lane_stores_at_once_are_neighbors() -> None:
    """A warp's rows of two blocks are 32 bytes of each token."""
    assert sorted(map(paired_row, range(CHUNK_COLS))) == list(range(CHUNK_COLS))
    for group in range(2):
        for warp in range(4):
            slots = [((group * 2 + block) * 4 + warp) * 8 + row for row in range(8) for block in range(2)]
            places = [ordered_place(paired_row(slot)) for slot in slots]
            assert places == [*range(places[0], places[0] + 16)] and places[0] % 16 == 0


@pytest.mark.parametrize(("fmt", "tokens"), [("Q4_K", 512), ("Q6_K", 9), ("Q4_0", 64), ("MXFP4-e8m0", 33)])
def test_a_ring_holds_each_stage_and_its_scales_until_they_are_read(fmt: str, tokens: int) -> None:
    for rows, cols in SHAPES:
        for spec in filter(QuantizedWgmmaSpec.is_possible, candidates(quantized(fmt, tokens, rows, cols))):
            assert spec.steps * spec.splits * spec.stage_cols == cols
            assert spec.row_groups * spec.out_tile >= spec.out_rows
            for copy in (*spec.codes, *spec.scales):
                assert copy.size % copy.piece == 0 and copy.row_bytes % copy.piece == 0
                assert copy.pitch >= copy.size and copy.pitch % 16 == 0
            # stage n is copied once stage n - stages is read: until then, spans in memory have slots of their own
            turns = -(-spec.num_tiles // spec.units)
            for last in range(spec.stages - 1, min(turns * spec.steps, 2 * spec.steps + spec.stages)):
                neighbors = (last - spec.stages + 1, last)
                first, end = (n // spec.steps * spec.spans + n % spec.steps // spec.span_steps for n in neighbors)
                assert end - first < spec.slots
            assert spec.shared_bytes <= HOPPER_SHARED_BYTES


def render(spec: QuantizedWgmmaSpec) -> UOp:
    sizes = [(spec.splits * spec.all_tokens * spec.out_rows, F16 if spec.activation else F32)]
    sizes += [(int(spec.num_rows * spec.num_cols * size) // dtype.itemsize, dtype) for dtype, size in spec.planes]
    sizes.append((spec.all_tokens * spec.num_cols, F16))
    return quantized_wgmma_kernel(spec)(
        *[UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    )


KERNELS = [
    ("Q4_K", 64, 4096, 14336, None),
    ("Q6_K", 13, 6144, 4096, "silu"),
    ("Q8_0", 40, 512, 4096, "silu"),
    ("Q4_K", 500, 28672, 4096, "silu"),
]


@pytest.mark.parametrize(
    ("fmt", "tokens", "rows", "cols", "activation"),
    swept(KERNELS, [KERNELS[0], KERNELS[2]]),
)
def test_kernels_have_the_memory_that_they_say(
    fmt: str, tokens: int, rows: int, cols: int, activation: str | None
) -> None:
    spec = quantized(fmt, tokens, rows, cols, activation=activation, orders_result=activation is not None)
    kernel = render(spec)
    check_limits(kernel, "CUDA sm_90")
    source = to_program(kernel, make_renderer("CUDA sm_90")).src[2].arg
    assert declared_bytes(source.encode()) == spec.shared_bytes <= HOPPER_SHARED_BYTES
    assert source.count("{") == source.count("}")
    assert f"wgmma.mma_async.sync.aligned.m64n{spec.token_cols}k16" in source


@pytest.mark.parametrize(("tokens", "rows"), swept([(512, 4096), (512, 6144), (128, 4096), (40, 4096)], [(40, 4096)]))
def test_only_the_warps_that_multiply_reach_the_products(tokens: int, rows: int) -> None:
    """Also where a threadgroup has one tile (512 x 4,096): the warps that copy would wait for their own copies."""
    spec = quantized("Q4_K", tokens, rows, 4096)
    source = to_program(render(spec), make_renderer("CUDA sm_90")).src[2].arg
    before = source[: source.index("wgmma.mma_async")]
    assert f"<{spec.multipliers})?" in before
    # only ranges that begin after the condition are open there
    loops = [line for line in before[: before.index(f"<{spec.multipliers})?")].splitlines() if "for (int Ridx" in line]
    assert not loops, loops


def test_large_matrices_of_some_rows_take_them() -> None:
    assert [quantized("Q4_K", tokens, 4096, 14336).is_wanted for tokens in (8, 9, 64)] == [False, True, True]
    assert [quantized("Q4_K", tokens, 4096, 4096).is_wanted for tokens in (16, 17)] == [False, True]
    assert [quantized("Q4_K", tokens, 4096, 4096).is_wanted for tokens in (64, 65, MAX_TOKENS)] == [True] * 3
    assert [quantized("Q4_K", tokens, 8192, 768).is_wanted for tokens in (64, 65, MAX_TOKENS)] == [True, False, False]
    assert not quantized("Q4_K", MAX_TOKENS + 1, 4096, 4096).is_possible()
    assert not quantized("Q4_K", 64, 4096, 4096 + 32).is_possible()


def names(backend: FusedGpuBackend, fmt: str, tokens: int, down_fmt: str = "") -> list[str]:
    """The kernels of a feed-forward of two products, without their shapes."""
    x = Tensor.empty(tokens * 1024, dtype=backend.float, device=backend.device.name)
    gate_up = backend.gate_up(make_host(fmt, 512, 1024), make_host(fmt, 512, 1024))
    (down,) = backend.stacked([make_host(down_fmt or fmt, 1024, 512)])
    norm = Norm(Tensor.empty(1024, device=backend.device.name), 1e-5)
    (hidden,) = backend.linear("gate_up", x, [gate_up], tokens, norm, Epilogue(activation="silu"))
    (out,) = backend.linear("down", hidden, [down], tokens, epilogue=Epilogue(residual=x))
    return [kernel.arg.name.rsplit("_", 1)[0] for kernel in kernels_of([backend.whole(out)])]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_put_in_order_by_what_writes_them(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Quantized weights are multiplied by float16 rows in bfloat16 models, too, by the same kernels."""
    backend = rendered("CUDA", dtype, is_chained=True)
    backend.has_wgmma = True
    assert names(backend, "Q4_K", 64) == ["sum0_norm", "gate_up_Q4_K", "down_Q4_K", "sum2"]  # too small
    monkeypatch.setattr(quantized_wgmma, "MIN_CODES", 0)
    assert names(backend, "Q4_K", 64) == ["sum0_norm", "gate_up_Q4_K", "down_Q4_K", "sum1"]
    monkeypatch.setattr(quantized_wgmma, "MIN_CODES_OF_FEW", 1 << 20)  # gate and up are large enough, but not down
    assert names(backend, "Q4_K", 16) == ["sum0_norm", "gate_up_Q4_K", "down_Q4_K", "sum2"]


def test_a_bfloat16_model_converts_where_some_weights_are_not_quantized() -> None:
    backend = rendered("CUDA", "bfloat16")
    assert names(backend, "Q4_K", 8, "bfloat16") == ["sum0_norm", "gate_up_Q4_K", "test", "down_bfloat16", "sum1"]
    assert names(backend, "bfloat16", 8, "Q4_K") == ["sum0_norm", "gate_up_bfloat16", "test", "down_Q4_K", "sum2"]


def test_rows_in_another_order_are_put_back_for_what_else_reads_them() -> None:
    backend = rendered("CUDA", is_chained=True)
    x = Tensor.empty(16 * 512, dtype=F16, device=backend.device.name)
    ordered = backend._held(x, 16, is_ordered=True)
    assert [kernel.arg.name for kernel in kernels_of([backend.whole(ordered)])] == ["restore_16x512"]


# -- on the device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "cols"),
    [(64, 512, 2048), (13, 416, 3072), (40, 20000, 1024), (128, 512, 2048), (500, 768, 1024)],
)
def test_products_are_those_of_the_reference(fmt: str, tokens: int, rows: int, cols: int) -> None:
    device = require_hopper(open_device())
    host = make_host(fmt, rows, cols, seed=1)
    matrix, x = pack(host, "row", None, device.name), normal(tokens, cols, seed=2).astype(np.float16)
    lanes = Lanes("CUDA", (F16,))
    ordered = empty(token_cols(tokens) * cols, F16, device.name)
    (ordered,) = run_kernel(order_rows_kernel(lanes, tokens, cols, False), [ordered], [device.upload(x.reshape(-1))])
    want = x.astype(np.float64) @ to_float32(host).astype(np.float64).T
    for chosen in candidates(replace(quantized(fmt, tokens, rows, cols), lanes=lanes)):
        out = empty(chosen.splits * tokens * rows, F32, device.name)
        (out,) = run_kernel(quantized_wgmma_kernel(chosen), [out], [*matrix.planes, ordered])
        got = out.numpy().reshape(chosen.splits, tokens, rows).astype(np.float64).sum(0)
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max(), chosen.chosen


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 500])
def test_hidden_values_are_those_of_the_reference(tokens: int) -> None:
    """Gate and up, with the result in the order in which the next product reads it."""
    device, rows, cols = require_hopper(open_device()), 768, 1024
    host, lanes = make_host("Q4_K", rows, cols, seed=1), Lanes("CUDA", (F16,))
    matrix, x = pack(host, "row", None, device.name), normal(tokens, cols, seed=2).astype(np.float16)
    ordered = empty(token_cols(tokens) * cols, F16, device.name)
    (ordered,) = run_kernel(order_rows_kernel(lanes, tokens, cols, False), [ordered], [device.upload(x.reshape(-1))])
    gate, up = np.split(x.astype(np.float64) @ to_float32(host).astype(np.float64).T, 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    spec = quantized("Q4_K", tokens, rows, cols, activation="silu", orders_result=True)
    for chosen in candidates(replace(spec, lanes=lanes)):
        out = empty(chosen.all_tokens * chosen.out_rows, F16, device.name)
        (out,) = run_kernel(quantized_wgmma_kernel(chosen), [out], [*matrix.planes, ordered])
        plain = empty(tokens * chosen.out_rows, F16, device.name)
        (plain,) = run_kernel(order_rows_kernel(lanes, tokens, chosen.out_rows, True), [plain], [out])
        got = plain.numpy().reshape(tokens, chosen.out_rows).astype(np.float64)
        assert np.abs(got - want).max() <= 3e-3 * np.abs(want).max(), chosen.chosen
