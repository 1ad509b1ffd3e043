"""Hopper's products of a few rows: their tiles, rendered anywhere, and the results, where there is such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_stream.py"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import UOp, dtypes
from tinygrad.codegen import to_program

from tests.ops.builders import largest_difference, normal
from tests.ops.gpu.products import TOLERANCE, chained_products, multiply
from tests.ops.rendering import make_renderer
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.gpu.stream_hopper import MAP_SIZE, NUM_MAPS, StreamSpec, row_of, stream_kernel
from tinyvllm.ops.kernel.body import F16, F32
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, MULTIPROCESSORS, WGMMA_COLS, Box, declared_bytes
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates
from tinyvllm.ops.reference import ReferenceBackend

# (rows, columns, gated): matrices of Llama 3.1 8B, Phi 3.5, Llama 3.2 1B and Qwen 2.5 32B
MATRICES = [
    (6144, 4096, False),
    (4096, 4096, False),
    (28672, 4096, True),
    (4096, 14336, False),
    (32064, 3072, False),
    (2048, 8192, False),
    (55296, 5120, True),
    (5120, 27648, False),
]


def stream(tokens: int, rows: int, cols: int, is_gated: bool = False, **knobs: int) -> StreamSpec:
    lanes = Lanes("CUDA", (dtypes.half,), is_chained=True)
    spec = StreamSpec("test", lanes, Mma("CUDA", dtypes.half), tokens, rows, cols, "silu" if is_gated else None)
    return replace(spec, chosen=tuple(sorted(knobs.items())))


def render(spec: StreamSpec) -> Any:
    out_type = F16 if spec.is_gated or spec.adds_residual else F32
    outs = spec.num_tokens * spec.out_rows
    sizes = [
        (spec.splits * outs, out_type),
        (MAP_SIZE, dtypes.uint),
        (spec.num_rows * spec.num_cols, F16),
        (spec.num_tokens * spec.num_cols, F16),
        *([(outs, F16)] if spec.adds_residual else []),
    ]
    arguments = [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    return to_program(stream_kernel(spec)(*arguments), make_renderer("CUDA sm_90"))


@pytest.mark.parametrize(
    ("tokens", "is_gated", "adds_residual"), [(2, True, False), (9, False, True), (64, False, False)]
)
def test_a_stream_has_one_loop_each_and_the_memory_that_it_says(
    tokens: int, is_gated: bool, adds_residual: bool
) -> None:
    """Conditional stores must not split the loop that they are in."""
    spec = replace(stream(tokens, 20480, 2048, is_gated, row_tile=64, splits=1), adds_residual=adds_residual)
    assert spec.num_tiles > spec.units and spec.steps > spec.early
    source = render(spec).src[2].arg
    loops = re.findall(r"for \(int (Ridx\d+)", source)
    # of the warp that fetches: early weights, early tokens, the first tile's other stages, other tiles and their
    # stages; of those that multiply: tiles and stages
    assert len(loops) == len(set(loops)) == 7
    assert source.count("{") == source.count("}")
    assert declared_bytes(source.encode()) == spec.shared_bytes <= HOPPER_SHARED_BYTES


def test_kernels_that_may_run_at_once_describe_their_operands_in_different_places() -> None:
    """All of them wait for the first one's end, so that their threadgroups would all have to be there."""
    for tokens, (rows, cols, is_gated) in itertools.product((2, 64), MATRICES):
        for spec in candidates(stream(tokens, rows, cols, is_gated)):
            assert spec.shared_bytes > HOPPER_SHARED_BYTES // 2  # one threadgroup on a multiprocessor
            assert (NUM_MAPS - 1) * spec.units + 1 > MULTIPROCESSORS


def test_a_stream_fetches_weights_before_it_waits_and_tokens_after() -> None:
    source = render(stream(8, 1024, 2048)).src[2].arg
    awaited = source.index(AWAIT_PREVIOUS)
    assert source.index("griddepcontrol.launch_dependents") < awaited
    weights, tokens = source.index("cp.async.bulk.tensor.5d"), source.index("cp.async.bulk.tensor.2d")
    assert weights < awaited < tokens
    # only weights leave the L2 cache first, and only if no other threadgroup reads them
    assert source[:awaited].count("L2::cache_hint") == source.count("L2::cache_hint") > 0
    assert "L2::cache_hint" not in source[tokens : source.index(";", tokens)]
    unchained = replace(stream(8, 1024, 2048), lanes=Lanes("CUDA", (dtypes.half,)))
    assert AWAIT_PREVIOUS not in render(unchained).src[2].arg


@pytest.mark.parametrize("tokens", [8, 128])
@pytest.mark.parametrize(("rows", "cols", "is_gated"), MATRICES)
def test_a_stream_computes_every_row_once(tokens: int, rows: int, cols: int, is_gated: bool) -> None:
    for spec in candidates(stream(tokens, rows, cols, is_gated)):
        numbers = [turn * spec.units + unit for unit in range(spec.units) for turn in range(spec.turns_of(unit))]
        tiles = [spec.tile_of(number) for number in numbers]
        expected = itertools.product(range(spec.splits), range(0, spec.out_rows, spec.out_tile), [0])
        assert sorted(tiles) == sorted(expected)
        assert spec.steps * spec.splits * spec.panels * WGMMA_COLS == cols
        assert spec.units <= MULTIPROCESSORS
        assert spec.map_size <= MAP_SIZE
        assert spec.stages >= 2 and spec.shared_bytes <= HOPPER_SHARED_BYTES


def rows_of(box: Box) -> list[int]:
    """The rows of a matrix in the order in which a copy of a box lays them down."""
    row, *steps = (stride // box.strides[0] for stride in box.strides)
    dims = [range(0, taken * step, step) for taken, step in zip(box.box[1:], (row, *steps), strict=True)]
    return [sum(place) for place in itertools.product(*reversed(dims))]


@pytest.mark.parametrize(("is_gated", "adds_residual"), [(True, False), (False, True), (False, False)])
def test_a_streams_results_are_stored_as_the_rows_that_were_fetched(is_gated: bool, adds_residual: bool) -> None:
    for turned in candidates(stream(64, 3072, 2048, is_gated)):
        spec = replace(turned, adds_residual=adds_residual)
        box, share = spec.row_box, spec.row_tile // spec.boxes
        assert math.prod(box.box[1:]) == share
        fetched = [row + i * share for i in range(spec.boxes) for row in rows_of(box)]
        for lane, block, element in itertools.product(range(32), range(spec.out_tile // 8), range(4)):
            assert row_of(spec, block, element, lane) == fetched[block * 8 + lane % 4 * 2 + element % 2]


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("tokens", [2, 8, 33, 64, 100])
def test_chained_streams_equal_the_reference(device: DeviceHandle, tokens: int, is_gated: bool) -> None:
    w, x = normal(1024, 2048, seed=1).astype(np.float16), normal(tokens, 2048, seed=2).astype(np.float16)
    product = x.astype(np.float64) @ w.astype(np.float64).T
    if is_gated:
        gate, up = product[:, :512], product[:, 512:]
        product = gate / (1 + np.exp(-gate)) * up
    specs = list(candidates(stream(tokens, 1024, 2048, is_gated)))
    found = chained_products(device, stream_kernel, specs, [device.upload(w.reshape(-1))], x)
    assert np.abs(found - product).max() < 4e-3 * np.abs(product).max()


# of at least 24 MB of float16: smaller ones take another kernel in a step of 8 rows
SHAPES = {"norm_linear": (6144, 2048), "norm_gated": (3072, 2048), "linear_add": (4096, 3072)}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", SHAPES)
@pytest.mark.parametrize("tokens", [8, 40, 100])
@pytest.mark.parametrize("fmt", ["float16", "bfloat16"])
def test_products_of_a_few_rows_equal_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int, operation: str
) -> None:
    case = (fmt, tokens, operation, *SHAPES[operation])
    difference = largest_difference(multiply(FusedGpuBackend(device, fmt, lanes), *case), multiply(reference, *case))
    assert difference < TOLERANCE[fmt]
