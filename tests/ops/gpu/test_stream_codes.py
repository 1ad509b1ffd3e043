"""Hopper's products of a few rows whose weights go into wgmma by registers: their tiles, rendered anywhere, and the
results, where there is such a device: DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_stream_codes.py"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import UOp, dtypes
from tinygrad.codegen import to_program

from tests.ops.builders import make_host, normal
from tests.ops.formats.drawn import BY_NAME
from tests.ops.gpu.products import chained_products
from tests.ops.gpu.test_stream import MATRICES
from tests.ops.rendering import make_renderer, rendered
from tests.sweeps import swept
from tinyvllm.arrays import to_float32
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.ops.formats.matrix import pack
from tinyvllm.ops.gpu.stream_hopper import MAP_SIZE
from tinyvllm.ops.gpu.stream_hopper_codes import (
    CODE_COLS,
    MAX_TOKENS,
    MIN_CODES,
    MIN_TOKENS,
    SCALED_TOKENS,
    WARP_ROWS,
    CodeStreamSpec,
    code_stream_kernel,
    reads_codes,
    row_of,
)
from tinyvllm.ops.kernel.body import F16, F32
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, MULTIPROCESSORS, declared_bytes
from tinyvllm.ops.kernel.lanes import LANES, Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates

FP8 = BY_NAME["FP8-float32"]


def stream(tokens: int, rows: int, cols: int, is_gated: bool = False, **knobs: int) -> CodeStreamSpec:
    lanes, mma = Lanes("CUDA", (F16,), is_chained=True), Mma("CUDA", F16, has_float8=True)
    spec = CodeStreamSpec("test", lanes, mma, tokens, rows, cols, "silu" if is_gated else None, format=FP8)
    return replace(spec, chosen=tuple(sorted(knobs.items())))


def render(spec: CodeStreamSpec) -> str:
    size = spec.num_rows * spec.num_cols
    sizes = [
        (spec.splits * spec.num_tokens * spec.out_rows, F16 if spec.is_gated else F32),
        (MAP_SIZE, dtypes.uint),
        (size // 4, dtypes.uint),
        (size // CODE_COLS, F32),
        (spec.num_tokens * spec.num_cols, F16),
    ]
    arguments = [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    source: str = to_program(code_stream_kernel(spec)(*arguments), make_renderer("CUDA sm_90")).src[2].arg
    return source


@pytest.mark.parametrize(
    ("tokens", "is_gated"), swept([(2, True), (64, False), (200, True)], [(64, False), (200, True)])
)
def test_a_stream_of_codes_has_one_loop_each_and_the_memory_that_it_says(tokens: int, is_gated: bool) -> None:
    spec = stream(tokens, 20480, 8192, is_gated, row_tile=64, splits=1)
    assert spec.num_tiles > spec.units and spec.steps > spec.early
    source = render(spec)
    loops = re.findall(r"for \(int (Ridx\d+)", source)
    assert len(loops) == len(set(loops)) == 7  # as of stream_kernel
    assert source.count("{") == source.count("}")
    assert declared_bytes(source.encode()) == spec.shared_bytes <= HOPPER_SHARED_BYTES
    assert source.index("cp.async.bulk.tensor") < source.index(AWAIT_PREVIOUS)  # weights
    assert ("L2::cache_hint" in source) == (spec.token_groups == 1)
    assert source.count("wgmma.mma_async") == CODE_COLS // 16
    assert source.count("cvt.rn.f16x2.e4m3x2") == 4 * CODE_COLS // 16


@pytest.mark.parametrize("tokens", swept([8, SCALED_TOKENS, 200, MAX_TOKENS], [8, 200]))
@pytest.mark.parametrize(("rows", "cols", "is_gated"), MATRICES)
def test_a_stream_of_codes_computes_every_row_once(tokens: int, rows: int, cols: int, is_gated: bool) -> None:
    for spec in candidates(stream(tokens, rows, cols, is_gated)):
        numbers = [turn * spec.units + unit for unit in range(spec.units) for turn in range(spec.turns_of(unit))]
        places = range(0, spec.out_rows, spec.out_tile), range(0, tokens, spec.token_rows)
        expected = itertools.product(range(spec.splits), *places)
        assert sorted(spec.tile_of(number) for number in numbers) == sorted(expected)
        assert spec.steps * spec.splits * CODE_COLS == cols
        assert spec.units <= MULTIPROCESSORS and spec.map_size <= MAP_SIZE
        assert spec.stages >= 2 and spec.shared_bytes <= HOPPER_SHARED_BYTES
        warps, halves = range(spec.row_tile // WARP_ROWS), range(1 if is_gated else 2)
        found = [row_of(spec, warp, half, lane) for warp in warps for half in halves for lane in range(0, LANES, 4)]
        assert sorted(found) == list(range(spec.out_tile))


def test_which_products_are_streams_of_codes() -> None:
    backend = rendered("CUDA", is_chained=True)
    mma = Mma("CUDA", F16, has_float8=True)
    backend.has_wgmma = True

    def kind(fmt: str, tokens: int, rows: int = 2048, cols: int = 2048) -> str:
        matrix = pack(make_host(fmt, rows, cols), "row", None, "CPU")
        return type(backend._matrix_spec("x", mma, matrix, tokens, None, F16)).__name__

    assert MIN_CODES == 2048 * 2048
    assert kind("FP8-float32", 64) == "CodeStreamSpec"
    assert kind("FP8-float32", 64, rows=2048 - 32) == "MatrixSpec"
    assert kind("FP8-float32", MIN_TOKENS - 1) == "MatrixSpec"
    assert kind("FP8-float32", MAX_TOKENS) == "CodeStreamSpec"
    assert kind("FP8-float32", MAX_TOKENS + 1) == "GemmSpec"
    assert kind("Q8_0", 64) == "QuantizedWgmmaSpec"
    assert not reads_codes(BY_NAME["NVFP4-e4m3"])
    backend.has_wgmma = False
    assert kind("FP8-float32", 64) == "MatrixSpec"


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("tokens", [2, 8, 33, 64, 100, 200])
def test_chained_streams_of_codes_equal_the_values(device: DeviceHandle, tokens: int, is_gated: bool) -> None:
    """By every choice of the knobs. For few tokens, sums are in float32, of exact weights: only a gated result is
    rounded."""
    host, x = make_host("FP8-float32", 1088, 2048), normal(tokens, 2048, seed=2).astype(np.float16)
    expected = x.astype(np.float64) @ to_float32(host).T.astype(np.float64)
    if is_gated:
        gate, up = expected[:, :544], expected[:, 544:]
        expected = gate / (1 + np.exp(-gate)) * up
    matrix = pack(host, "row", None, device.name)
    specs = list(candidates(stream(tokens, 1088, 2048, is_gated)))
    found = chained_products(device, code_stream_kernel, specs, matrix.planes, x)
    error = 1e-5 if tokens <= SCALED_TOKENS and not is_gated else 2e-3
    assert np.abs(found - expected).max() < error * np.abs(expected).max()
