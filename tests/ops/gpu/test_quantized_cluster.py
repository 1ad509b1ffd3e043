"""Products of few rows by clusters of threadgroups: the places of what they fetch and send, the kernel's text, and
which products take it. What they compute is compared with the reference's on a Hopper GPU:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_quantized_cluster.py"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp
from tinygrad.codegen import to_program

from tests.ops.builders import make_host, normal
from tests.ops.gpu.products import require_hopper
from tests.ops.gpu.test_quantized_stream import small_matrix
from tests.ops.rendering import check_limits, make_renderer, rendered, unwritten
from tests.sweeps import swept
from tinyvllm.arrays import to_float32
from tinyvllm.device.handle import open_device
from tinyvllm.ops.formats.matrix import Matrix, pack
from tinyvllm.ops.gpu import quantized_cluster
from tinyvllm.ops.gpu.plane_ring import CHUNK_COLS, LEAST_BYTES, TILE_ROWS
from tinyvllm.ops.gpu.product import plane_sizes
from tinyvllm.ops.gpu.quantized_cluster import (
    ALIGNED,
    FLOATS,
    MAX_TOKENS,
    ClusteredMatrixSpec,
    clustered_matrix_kernel,
    make_maps,
    sum_place,
    takes_clusters,
)
from tinyvllm.ops.kernel.body import F16, F32, U32, empty, run_kernel
from tinyvllm.ops.kernel.hopper import (
    HOPPER_SHARED_BYTES,
    MAP_WORDS,
    Box,
    HopperRenderer,
    declared_bytes,
)
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import Chosen, candidates

TAKEN = ("Q4_K", "affine4_g64-float16", "Q4_0", "FP8-float32")
CHOICES: tuple[Chosen, ...] = ((), (("early", 2), ("stages", 3), ("teams", 1)))
SHAPES = ((28672, 4096), (4096, 14336), (7168, 5120), (37888, 3584), (2048, 8192))


def clustered(fmt: str, tokens: int, rows: int, cols: int, **more: Any) -> ClusteredMatrixSpec:
    matrix = small_matrix(fmt)
    return ClusteredMatrixSpec(
        name="test",
        lanes=Lanes("CUDA", (F16,), is_chained=True, has_float8=True),
        mma=Mma("CUDA", F16, has_float8=True),
        format=matrix.format,
        num_tokens=tokens,
        num_rows=rows,
        num_cols=cols,
        planes=plane_sizes(matrix),
        **more,
    )


def test_formats_of_whole_runs_take_clusters() -> None:
    for fmt in TAKEN:
        assert takes_clusters(small_matrix(fmt).format), fmt
    for fmt in ("Q6_K", "Q2_K-float16", "Q8_0", "IQ4_NL-float16", "MXFP4-e8m0", "NVFP4-e4m3"):
        assert not takes_clusters(small_matrix(fmt).format), fmt


@pytest.mark.parametrize("fmt", TAKEN)
def test_a_share_of_the_columns_is_in_the_box_that_is_fetched(fmt: str) -> None:
    """A copy begins at a multiple of 16 bytes, in device memory as well."""
    for rows, cols in SHAPES:
        for spec in candidates(clustered(fmt, MAX_TOKENS, rows, cols)):
            ends = 0
            for box in spec.boxes:
                assert box.place >= ends and box.place % 128 == 0
                ends = box.place + box.size
                share = box.chunk_bytes * spec.chunks
                assert share * spec.cluster == box.row_bytes
                if box.is_whole:
                    assert box.bytes == box.row_bytes and TILE_ROWS // 2 * box.row_bytes % ALIGNED == 0
                    continue
                for rank in range(spec.cluster):
                    begin = rank * share // ALIGNED * ALIGNED
                    assert begin <= rank * share and rank * share + share <= begin + box.bytes
            assert ends <= spec.stage_bytes and spec.stage_bytes % 1024 == 0


@pytest.mark.parametrize("fmt", TAKEN)
@pytest.mark.parametrize("tokens", [2, 8])
def test_places_in_threadgroup_memory_follow_each_other(fmt: str, tokens: int) -> None:
    for rows, cols in SHAPES:
        for spec in candidates(clustered(fmt, tokens, rows, cols)):
            slots = spec.teams * quantized_cluster.SLOT_TILES * spec.parts * spec.slot_bytes
            assert spec.slots_at == spec.teams * spec.stages * spec.stage_bytes
            assert spec.x_at == spec.slots_at + slots and spec.slots_at % 16 == spec.x_at % 16 == 0
            assert spec.barriers_at == spec.x_at + tokens * spec.x_stride and spec.barriers_at % 8 == 0
            assert spec.counts_at == spec.barriers_at + 8 * (spec.teams * (spec.stages + 2) + 1)
            ends = spec.counts_at + 4 * spec.teams * spec.stages
            assert max(LEAST_BYTES, ends) == spec.dynamic_bytes <= HOPPER_SHARED_BYTES
            assert spec.clusters * spec.teams <= spec.num_tiles  # so that each team has a tile
            assert spec.parts * spec.slot_bytes * spec.cluster == spec.parts * FLOATS * 4


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_threadgroups_share_a_tiles_sums(cluster: int) -> None:
    places = [sum_place(cluster, rank, place) for rank in range(cluster) for place in range(FLOATS // cluster)]
    assert {(row + 8 * half, token) for row, token, half in places} == set(np.ndindex(TILE_ROWS, MAX_TOKENS))
    assert len(places) == FLOATS


def render(spec: ClusteredMatrixSpec) -> UOp:
    sizes = [(spec.num_tokens * spec.out_rows, F16 if spec.activation else F32), (len(spec.planes) * MAP_WORDS, U32)]
    sizes += [(int(spec.num_rows * spec.num_cols * size) // dtype.itemsize, dtype) for dtype, size in spec.planes]
    sizes.append((spec.num_tokens * spec.num_cols, F16))
    buffers = [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    return clustered_matrix_kernel(spec)(*buffers)


KERNELS = [
    ("Q4_K", 8, 28672, 4096, "silu"),
    ("affine4_g64-float16", 3, 4096, 14336, None),
    ("FP8-float32", 8, 6144, 4096, None),
]


@pytest.mark.parametrize(("fmt", "tokens", "rows", "cols", "activation"), swept(KERNELS, [KERNELS[0], KERNELS[2]]))
def test_kernels_have_the_memory_and_the_clusters_that_they_say(
    fmt: str, tokens: int, rows: int, cols: int, activation: str | None
) -> None:
    spec = clustered(fmt, tokens, rows, cols, activation=activation)
    assert spec.is_possible()
    kernel = render(spec)
    check_limits(kernel, "CUDA sm_90")
    source = to_program(kernel, make_renderer("CUDA sm_90")).src[2].arg
    assert declared_bytes(source.encode()) == spec.dynamic_bytes
    assert source.count("{") == source.count("}")
    assert source.count("cp.async.bulk.tensor") == sum(not box.is_whole for box in spec.boxes)
    renderer = HopperRenderer.__new__(HopperRenderer)
    renderer.__dict__ |= make_renderer("CUDA sm_90").__dict__
    assert (
        f"__cluster_dims__({spec.cluster}) __launch_bounds__({spec.warps * 32}, 1)"
        in to_program(kernel, renderer).src[2].arg
    )


@pytest.mark.parametrize("rows", [28672, 4096])
def test_a_copy_takes_as_many_rows_of_each_half(rows: int) -> None:
    """So that a map serves a gated product and another one. Bytes that begin at no multiple of 16 in each row have no
    map."""
    spec = clustered("Q4_K", MAX_TOKENS, rows, 4096)
    codes, *scales = (spec.map_boxes[i] for i in range(len(spec.planes)))
    assert codes == Box((64, rows // 2, 2, 16), (2048, 2048 * rows // 2, 128), (64, 8, 2, 8))
    assert scales[0] == Box((16, rows // 2, 2), (32, 32 * rows // 2), (8, 8, 2), is_swizzled=False)
    assert {*clustered("Q4_K", MAX_TOKENS, rows, 5120).map_boxes} == {0, 2, 4}  # 40 bytes of scales


def test_a_matrix_has_maps_if_clusters_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = rendered("CUDA", is_chained=True)
    matrix = pack(make_host("Q4_0", 64, 16 * CHUNK_COLS), "row", None, "CPU")
    backend.has_wgmma = True
    assert backend.with_maps(matrix).maps is None  # too small
    for name in ("FEWEST_CODES", "FEWEST_CHUNKS", "LEAST_SIDE", "LEAST_SIDE_OF_FLOATS"):
        monkeypatch.setattr(quantized_cluster, name, 0)
    maps = backend.with_maps(matrix).maps
    assert maps is not None and maps.shape == (2 * MAP_WORDS,)
    backend.has_wgmma = False
    assert backend.with_maps(matrix).maps is None


def test_products_that_clusters_cover_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True

    def kinds(fmt: str, rows: int, cols: int) -> list[str]:
        small = small_matrix(fmt)
        scale = rows * cols // (small.num_rows * small.num_cols)
        planes = [unwritten(backend, plane.numel() * scale, plane.dtype) for plane in small.planes]
        large = replace(small, num_rows=rows, num_cols=cols, used_rows=rows, planes=tuple(planes))
        matrix = backend.with_maps(large)
        tokens = (2, MAX_TOKENS, MAX_TOKENS + 1)
        return [type(backend._matrix_spec("x", Mma("CUDA", F16), matrix, t, None, F16)).__name__ for t in tokens]

    assert kinds("Q4_0", 64, 16 * CHUNK_COLS) == ["MatrixSpec"] * 3  # too small
    for name in ("FEWEST_CODES", "FEWEST_FLOATS", "LEAST_SIDE", "LEAST_SIDE_OF_FLOATS"):
        monkeypatch.setattr(quantized_cluster, name, 0)
    for fmt in TAKEN:
        few, many, more = kinds(fmt, 2112, 16 * CHUNK_COLS)
        assert few == many == "ClusteredMatrixSpec" != more, fmt
    assert kinds("Q4_0", 2112, 20 * CHUNK_COLS)[1] == "ClusteredMatrixSpec"
    assert kinds("FP8-float32", 2112, 20 * CHUNK_COLS)[1] == "MatrixSpec"  # e4m3: multiples of 2,048 columns
    assert kinds("Q4_0", 2112, 3 * CHUNK_COLS)[1] == "MatrixSpec"  # no equal shares
    assert kinds("Q4_0", 2112, 72 * CHUNK_COLS)[1] == "MatrixSpec"  # too many columns for four threadgroups
    assert kinds("Q6_K", 2112, 16 * CHUNK_COLS)[1] == "MatrixSpec"
    backend.has_wgmma = False
    assert kinds("Q4_0", 2112, 16 * CHUNK_COLS)[1] == "MatrixSpec"


def test_clusters_take_the_large_matrices_of_models() -> None:
    """As measured, from 2 rows on: those of Llama-3.1-8B and 70B, and in 4 bits of Qwen3-14B and Qwen2.5-7B."""
    eight = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    more = {"qkv": (7168, 5120), "out": (5120, 5120), "gate_up": (34816, 5120), "down": (5120, 17408)}

    def taken(fmt: str, shapes: dict[str, tuple[int, int]], tokens: int = MAX_TOKENS) -> set[str]:
        specs = {name: clustered(fmt, tokens, *shape) for name, shape in shapes.items()}
        return {name for name, spec in specs.items() if spec.is_wanted and spec.is_possible()}

    assert taken("Q4_K", eight) == taken("Q4_0", eight) == taken("affine4_g64-float16", eight) == {*eight} - {"out"}
    assert taken("FP8-float32", eight) == {*eight}
    assert taken("Q4_K", more) == taken("affine4_g64-float16", more) == {*more}
    assert clustered("Q4_0", MAX_TOKENS, 5120, 17408).warps == 17
    seven = {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
    assert taken("Q4_K", seven) == taken("affine4_g64-float16", seven) == {"gate_up"}
    four = {"qkv": (6144, 2560), "out": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)}
    assert taken("affine4_g64-float16", four) == {"gate_up"} and taken("Q4_K", four) == set()
    assert (
        taken("Q4_K", {"3 chunks": (16384, 3072)}) == taken("affine4_g64-float16", {"3 chunks": (16384, 3072)}) == set()
    )
    assert taken("FP8-float32", more) == taken("FP8-float32", seven) == taken("Q4_K", eight, tokens=1) == set()
    assert taken("Q4_K", eight, tokens=2) == {*eight} - {"out"} and taken("FP8-float32", eight, tokens=2) == {*eight}
    large = {"qkv": (10240, 8192), "out": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
    assert taken("Q4_K", large) == taken("affine4_g64-float16", large) == {*large}
    assert taken("FP8-float32", large) == taken("Q4_0", {"clusters of 8": (8192, 6144)}) == set()  # not measured
    assert not clustered("Q4_0", MAX_TOKENS, 16384, 2048).is_wanted


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 3, 8])
@pytest.mark.parametrize("fmt", TAKEN)
def test_clusters_compute_what_the_values_give(fmt: str, tokens: int) -> None:
    """In Q4_K by several choices of the knobs; a row's result does not depend on the others."""
    device = require_hopper(open_device())
    shapes = ((4096, 4096, None), (8192, 2048, "silu"), (2048, 14336, None), (5120, 5120, "silu"), (4096, 3584, None))
    for rows, cols, activation in shapes:
        host = make_host(fmt, rows, cols)
        matrix, x = pack(host, "row", None, device.name), normal(tokens, cols, seed=1).astype(np.float16)
        expected = x.astype(np.float64) @ to_float32(host).T.astype(np.float64)
        if activation:
            gate, up = expected[:, : rows // 2], expected[:, rows // 2 :]
            expected = gate / (1 + np.exp(-gate)) * up
        rule = replace(clustered(fmt, tokens, rows, cols, activation=activation), format=matrix.format)
        assert rule.is_possible()
        for chosen in CHOICES if fmt == "Q4_K" else CHOICES[:1]:
            spec = replace(rule, chosen=chosen)
            if not spec.is_possible():
                continue
            result = product(spec, matrix, x)
            limit = 2e-3 if activation else 1e-5  # results of a gated product are float16
            np.testing.assert_allclose(result, expected, atol=limit * np.abs(expected).max())
            changed = x.copy()
            changed[1:] = 3 * x[:0:-1] - 1
            np.testing.assert_array_equal(product(spec, matrix, changed)[0], result[0])


def product(spec: ClusteredMatrixSpec, matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """(T, N)."""
    device = open_device()
    out = empty(spec.num_tokens * spec.out_rows, F16 if spec.activation else F32, device.name)
    operands: list[Tensor] = [*matrix.planes, device.upload(x).reshape(-1)]
    result, *_ = run_kernel(clustered_matrix_kernel(spec), [out], [make_maps(spec, matrix), *operands])
    return result.float().numpy().reshape(spec.num_tokens, -1)
