"""Steps with many rows on CUDA and METAL: their kernels are rendered anywhere, and run where there is such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_prefill.py"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes
from tinygrad.codegen import to_program

from tests.ops.attention import (
    FUSED,
    Case,
    Result,
    forget_before_windows,
    fused_case,
    make_history,
    make_layer,
    random_case,
)
from tests.ops.builders import (
    Piece,
    largest_difference,
    make_host,
    make_pool,
    make_step,
    make_step_of,
    normal,
    read_pool,
    run_product,
)
from tests.ops.gpu.products import SHAPES, TOLERANCE, multiply
from tests.ops.rendering import (
    KINDS,
    check_limits,
    kernels_of,
    make_renderer,
    plan_attention,
    plan_layer,
    rendered,
    unwritten,
)
from tests.sweeps import swept
from tinyvllm.arrays import Format
from tinyvllm.config import LayerKind, Rope
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue
from tinyvllm.ops.gpu import attention_prefill as gpu_prefill
from tinyvllm.ops.gpu.attention_prefill_hopper import swizzled_place
from tinyvllm.ops.gpu.attention_prefill_inputs import FETCHER_REGISTERS, PrefillSpec
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.gpu.gemm import DENSE, MIN_TOKENS, GemmSpec, multiply_rows
from tinyvllm.ops.gpu.gemm_hopper import (
    FETCHER,
    MIN_STEPS,
    TOKEN_TILE,
    UNPACKERS,
    WgmmaSpec,
    best_cut,
    row_of,
    tile_of,
    wgmma_kernel,
)
from tinyvllm.ops.gpu.gemm_hopper_unpack import unpacking_wgmma_kernel
from tinyvllm.ops.gpu.tile_map import tile_map_kernel, tile_order_kernel
from tinyvllm.ops.kernel.body import empty, run_kernel
from tinyvllm.ops.kernel.hopper import (
    HOPPER_SHARED_BYTES,
    MULTIPROCESSORS,
    WGMMA_COLS,
    WGMMA_TOKENS,
    Box,
    declared_bytes,
)
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "has_attention"),
    swept(
        itertools.product(KINDS, (False, True)),
        [("CUDA", False)],  # attention by default: Hopper's below, over codes in test_quantized_kv.py
    ),
)
def test_a_step_of_many_rows_renders_within_the_limits(kind: str, has_attention: bool) -> None:
    layout, formats = StepLayout(100, 3, 9, 16), ("float16", "float16")
    outputs = plan_layer(rendered(kind), layout, formats, is_decode=False, samples=False, normed=True)
    kernels = kernels_of(outputs)
    names = {kernel.arg.name for kernel in kernels}
    assert {"prefill", "tile", "store"} <= {name.split("_")[0] for name in names}
    for kernel in kernels:
        part = kernel.arg.name.split("_")[0]
        if part in ("embed", "store", "take", "tile") or (part == "prefill" and has_attention):  # below: products
            check_limits(kernel, KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "fmt"),
    swept(
        itertools.product(KINDS, ("bfloat16", "Q8_0", "Q5_0", "Q6_K")),
        [],  # METAL's: tests/ops/kernel/test_metal_counts.py; CUDA's reading of codes: tests/ops/formats/test_pairs.py
    ),
)
def test_products_of_every_way_to_store_weights_render_within_the_limits(kind: str, fmt: str) -> None:
    backend = rendered(kind, "bfloat16" if fmt == "bfloat16" else "float16")
    matrix = backend.matrix(make_host(fmt, 96, 256))
    spec = GemmSpec("test", Mma(kind, FLOATS[backend.dtype]), matrix.format, backend.float, 100, 96, 256)
    x = Tensor.empty(100 * 256, dtype=backend.float, device="CPU")
    out = empty(spec.splits * 100 * 96, dtypes.float, "CPU")
    (kernel,) = kernels_of([multiply_rows(spec, out, matrix.planes, x)])
    check_limits(kernel, KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "heads"),
    swept(
        itertools.product(KINDS, [(64, 8, 128), (9, 3, 64), (8, 4, 256), (6, 6, 96)]),
        [],  # by default: the step above, and in tests/metal
    ),
)
def test_tiled_attention_of_large_models_renders_within_the_limits(kind: str, heads: tuple[int, int, int]) -> None:
    layer = LayerKind(*heads, Rope(10000.0))
    kernels = kernels_of(plan_attention(rendered(kind), layer, "float16"))
    assert "prefill" in {kernel.arg.name.split("_")[0] for kernel in kernels}
    for kernel in kernels:
        check_limits(kernel, KINDS[kind])


ATTENTION: list[tuple[int, int, tuple[tuple[str, Any], ...]]] = [
    (32, 128, ()),
    (4, 256, (("window", 100), ("softcap", 2.0))),
    (8, 64, (("has_sinks", True), ("has_bias", True))),
]


@pytest.mark.parametrize(("heads", "dim", "features"), swept(ATTENTION, ATTENTION[2:]))
def test_hopper_attends_in_the_memory_that_it_says(
    monkeypatch: pytest.MonkeyPatch, heads: int, dim: int, features: tuple[tuple[str, Any], ...]
) -> None:
    monkeypatch.setattr(gpu_prefill, "has_wgmma", lambda name: True)
    specs: list[PrefillSpec] = []

    def remember(spec: PrefillSpec) -> PrefillSpec:
        specs.append(spec)
        return spec

    monkeypatch.setattr(gpu_prefill, "choose", remember)
    kind = replace(LayerKind(heads, heads // 4, dim, Rope(10000.0)), **dict(features))
    kernels = kernels_of(plan_attention(rendered("CUDA"), kind, "float16"))
    names = [re.split(r"_\d", kernel.arg.name)[0] for kernel in kernels]
    assert sorted(names) == ["prefill_attention", "rotate", "tile_map", "tile_order"]
    for kernel in kernels:
        check_limits(kernel, "CUDA sm_90")
    (spec,) = specs
    source = to_program(kernels[-1], make_renderer("CUDA sm_90")).src[2].arg
    walks = 1 if kind.window else 2  # besides the first tile's scores and the last one's sums
    assert source.count("wgmma.mma_async") == (walks + 1) * (dim // 16 + spec.keys // 16)
    assert declared_bytes(source.encode()) == spec.shared_bytes <= HOPPER_SHARED_BYTES
    for turned in candidates(spec):
        assert turned.rows == turned.groups * WGMMA_TOKENS
        given = (turned.groups + 1) * turned.launch_registers
        assert turned.groups * turned.registers + FETCHER_REGISTERS <= given
        assert turned.for_map.tokens == turned.tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hoppers_attention_stores_its_results_as_wide_as_their_buffer(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(gpu_prefill, "has_wgmma", lambda name: True)
    kernel = kernels_of(plan_attention(rendered("CUDA", dtype), LayerKind(8, 2, 64, Rope(10000.0)), "float16"))[-1]
    source = to_program(kernel, make_renderer("CUDA sm_90")).src[2].arg
    assert f"{'half' if dtype == 'float16' else 'float'}* data0_" in source
    assert ("make_uint4" in source) == (dtype == "float16")


def test_a_row_of_hoppers_tiles_lies_in_its_own_bytes() -> None:
    places = {swizzled_place(row, piece) for row in range(64) for piece in range(8)}
    assert places == set(range(0, 64 * 128, 16))
    for piece in range(8):  # eight rows' pieces, which are read at once, are in all banks
        assert len({swizzled_place(row, piece) % 128 for row in range(8)}) == 8


def test_too_few_tiles_share_out_the_columns() -> None:
    def spec(tokens: int, rows: int, cols: int) -> GemmSpec:
        return GemmSpec("test", Mma("CUDA", dtypes.half), Format("float16", 16), dtypes.half, tokens, rows, cols)

    assert spec(2048, 2048, 8192).splits == 1
    assert spec(128, 2048, 8192).splits > 1
    assert spec(128, 2048, 96).splits == 1  # a part would be too short
    for rows, cols in ((960, 576), (2048, 8192), (3072, 3072)):
        chosen = spec(128, rows, cols)
        assert chosen.steps * chosen.splits * 32 == cols


def hopper(tokens: int, rows: int, cols: int, *, is_gated: bool = False) -> GemmSpec:
    shape = (tokens, rows, cols, "silu" if is_gated else None)
    return GemmSpec("test", Mma("CUDA", dtypes.half), Format("float16", 16), dtypes.half, *shape, has_wgmma=True)


def render_wgmma(spec: WgmmaSpec) -> UOp:
    out_type = dtypes.half if spec.is_gated or spec.adds_residual else dtypes.float
    sizes = [
        (spec.splits * spec.num_tokens * spec.out_rows, out_type),
        (spec.map_size, dtypes.uint),
        (spec.num_rows * spec.num_cols, dtypes.half),
        (spec.num_tokens * spec.num_cols, dtypes.half),
    ]
    if spec.adds_residual:
        sizes.append((spec.num_tokens * spec.out_rows, dtypes.half))
    arguments = [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    return to_program(wgmma_kernel(spec)(*arguments), make_renderer("CUDA sm_90"))


def render_unpacking(fmt: str, tokens: int, rows: int, cols: int) -> UOp:
    """The kernel that unpacks weights in its stages."""
    matrix = rendered("CUDA").matrix(make_host(fmt, rows, cols))
    mma = Mma("CUDA", dtypes.half)
    cut = best_cut(tokens, rows, cols, False, matrix.format)
    spec = WgmmaSpec("test", mma, tokens, rows, cols, *cut, format=matrix.format)
    planes = [(plane.numel(), plane.dtype) for plane in matrix.planes]
    sizes = [(spec.splits * tokens * rows, dtypes.float), (spec.map_size, dtypes.uint), *planes]
    sizes.append((tokens * cols, dtypes.half))
    arguments = [UOp.placeholder((size,), kind, slot) for slot, (size, kind) in enumerate(sizes)]
    return to_program(unpacking_wgmma_kernel(spec)(*arguments), make_renderer("CUDA sm_90"))


@pytest.mark.parametrize(
    ("fmt", "tokens"),
    swept(itertools.product(("Q4_0", "Q4_K", "Q5_1", "Q6_K", "Q8_0"), (100, 200)), {("Q6_K", 200)}),
)
def test_hopper_unpacks_in_its_stages_within_the_limits(fmt: str, tokens: int) -> None:
    program = render_unpacking(fmt, tokens, 512, 1024)
    source = program.src[2].arg
    assert "wgmma.mma_async" in source and "st.shared.v4" in source
    assert ("cp.async.bulk.shared::cluster.shared::cta" in source) == (tokens > TOKEN_TILE)
    assert math.prod(program.arg.local_size) == 32 * (FETCHER + UNPACKERS)


WGMMA = [(100, 192, 64, True), (2048, 16384, 256, True), (2048, 3072, 192, False), (512, 2048, 128, False)]


@pytest.mark.parametrize(("tokens", "rows", "row_tile", "is_gated"), swept(WGMMA, [WGMMA[0]]))
def test_hopper_multiplies_in_the_memory_that_it_has(tokens: int, rows: int, row_tile: int, is_gated: bool) -> None:
    spec = replace(hopper(tokens, rows, 2048, is_gated=is_gated).wgmma, row_tile=row_tile, adds_residual=not is_gated)
    program = render_wgmma(spec)
    assert "wgmma.mma_async" in program.src[2].arg
    assert declared_bytes(program.src[2].arg.encode()) == spec.shared_bytes  # what a launch is told
    assert spec.shared_bytes <= HOPPER_SHARED_BYTES
    assert spec.stages >= 4
    assert program.arg.global_size[0] == spec.num_clusters * spec.cluster


RAGGED = (65, 96, 112, 128, 200, 960)
RAGGED_BY_DEFAULT = {(112, "float16")}  # codes, in tiles that are not full: above


@pytest.mark.parametrize(
    ("tokens", "fmt"),
    swept(itertools.product(RAGGED, ("float16", "Q4_K")), RAGGED_BY_DEFAULT),
)
def test_hoppers_tiles_that_are_not_full_have_the_loops_of_full_ones(tokens: int, fmt: str) -> None:
    """Conditional stores must not split the loop that they are in."""
    if fmt == "float16":
        source = render_wgmma(hopper(tokens, 512, 128).wgmma).src[2].arg
    else:
        source = render_unpacking(fmt, tokens, 512, 256).src[2].arg
    loops = re.findall(r"for \(int (Ridx\d+)", source)
    assert len(loops) == len(set(loops)) == 4  # tiles and stages, of the warps that fetch and of those that multiply
    assert source.count("{") == source.count("}")


@pytest.mark.parametrize("tokens", [65, 200, 512, 2048, 3000, 8192])
@pytest.mark.parametrize(("rows", "cols", "is_gated"), [(96, 256, False), (2048, 8192, False), (3072, 2048, True)])
def test_hoppers_threadgroups_compute_every_tile_once(tokens: int, rows: int, cols: int, is_gated: bool) -> None:
    for turned in candidates(hopper(tokens, rows, cols, is_gated=is_gated)):
        spec = turned.wgmma
        numbers = [n for unit in range(spec.num_clusters) for n in range(unit, spec.num_tiles, spec.num_clusters)]
        tiles = [tile_of(spec, number, rank) for number in numbers for rank in range(spec.cluster)]
        expected = itertools.product(
            range(spec.splits),
            range(0, spec.out_rows, spec.out_tile),
            range(0, spec.token_groups * spec.cluster * TOKEN_TILE, TOKEN_TILE),
        )
        assert sorted(tiles) == sorted(expected)
        assert spec.token_groups * spec.cluster * TOKEN_TILE >= tokens


def rows_of(box: Box) -> list[int]:
    """The rows of a matrix in the order in which a copy of a box lays them down."""
    row, *steps = (stride // box.strides[0] for stride in box.strides)
    dims = [range(0, taken * step, step) for taken, step in zip(box.box[1:], (row, *steps), strict=True)]
    return [sum(place) for place in itertools.product(*reversed(dims))]


@pytest.mark.parametrize(("is_gated", "adds_residual"), [(True, False), (False, True), (False, False)])
def test_hoppers_results_are_stored_as_the_rows_that_were_fetched(is_gated: bool, adds_residual: bool) -> None:
    for turned in candidates(hopper(512, 3072, 2048, is_gated=is_gated)):
        spec = replace(turned.wgmma, adds_residual=adds_residual)
        box, share = spec.row_box, spec.row_tile // spec.boxes
        assert math.prod(box.box[1:]) == share
        fetched = [row + i * share for i in range(spec.boxes) for row in rows_of(box)]
        for lane, block, element in itertools.product(range(32), range(spec.out_tile // 8), range(4)):
            tile_row = block * 8 + lane % 4 * 2 + element % 2  # whose result the lane holds
            assert row_of(spec, block, element, lane) == fetched[tile_row]
        runs = [row_of(spec, block, element, 1) for block in range(spec.run // 2) for element in range(2)]
        assert runs == list(range(runs[0], runs[0] + spec.run))


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(65, 96, 256), (520, 64, 768), (512, 2048, 2048)])
def test_a_cut_of_hoppers_is_whole(tokens: int, rows: int, cols: int) -> None:
    spec = hopper(tokens, rows, cols)
    for turned in candidates(spec):
        wgmma = turned.wgmma
        assert wgmma.splits == turned.splits
        assert wgmma.steps * wgmma.splits * WGMMA_COLS == cols
        assert wgmma.steps >= MIN_STEPS
        assert wgmma.num_clusters * wgmma.cluster <= MULTIPROCESSORS
    assert spec.wgmma.cycles == min(turned.wgmma.cycles for turned in candidates(spec))


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(512, 2048, 8192), (1024, 2048, 8192), (260, 3072, 2048)])
def test_a_product_of_unpacked_weights_fills_what_its_spec_asks_for(tokens: int, rows: int, cols: int) -> None:
    fmt = rendered("CUDA").matrix(make_host("Q4_0", 32, 256)).format
    spec = GemmSpec("test", Mma("CUDA", dtypes.half), fmt, dtypes.half, tokens, rows, cols, has_wgmma=True)
    assert spec.unpacks_first
    assert spec.wgmma == replace(spec, format=DENSE).wgmma
    assert spec.splits == spec.wgmma.splits


LARGEST = [(28672, 4096), (34816, 5120), (55296, 5120), (57344, 8192), (8192, 28672)]  # of 8B, 14B, 32B and 70B


@pytest.mark.parametrize(("rows", "cols"), LARGEST)
@pytest.mark.parametrize("tokens", [128, 2048])
def test_a_prompt_uses_hoppers_matrix_unit_whatever_the_size_of_the_quantized_matrix(
    tokens: int, rows: int, cols: int
) -> None:
    backend = rendered("CUDA")
    backend.has_wgmma = True
    small = backend.matrix(make_host("Q4_K", 32, 256))
    planes = [unwritten(backend, plane.numel() * rows * cols // (32 * 256), plane.dtype) for plane in small.planes]
    matrix = replace(small, num_rows=rows, num_cols=cols, used_rows=rows, planes=tuple(planes))
    x = unwritten(backend, tokens * cols, dtypes.half)
    epilogue = Epilogue(activation="silu") if rows > cols else PLAIN
    out = run_product(backend, x, matrix, tokens, epilogue=epilogue)
    names = [kernel.arg.name for kernel in kernels_of([backend.whole(out)])]
    in_registers = [f"order_{tokens}x{cols}", f"test_Q4_K_{tokens}x{rows}x{cols}"]
    first = [f"unpack_Q4_K_{rows}x{cols}", f"test_float16_{tokens}x{rows}x{cols}"]
    expected = in_registers if tokens == 128 else first
    assert names[: len(expected)] == expected


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("operation", SHAPES)
@pytest.mark.parametrize("tokens", [MIN_TOKENS, 200, 520])
@pytest.mark.parametrize("fmt", ["float16", "bfloat16", "Q4_0", "Q4_K", "Q5_1", "Q6_K", "Q8_0"])
def test_many_rows_equal_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int, operation: str
) -> None:
    dtype = "bfloat16" if fmt == "bfloat16" else "float16"
    case = (fmt, tokens, operation, *SHAPES[operation])
    difference = largest_difference(multiply(FusedGpuBackend(device, dtype, lanes), *case), multiply(reference, *case))
    print(f"{case}: {difference:.1e}")
    assert difference < TOLERANCE[dtype]


@pytest.mark.gpu
def test_threadgroups_that_multiply_several_tiles_equal_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend
) -> None:
    case = ("float16", 2100, "linear_add", 2048, 128)
    backend = FusedGpuBackend(device, "float16", lanes)
    assert largest_difference(multiply(backend, *case), multiply(reference, *case)) < TOLERANCE["float16"]


# -- attention ---------------------------------------------------------------------------------------------------------

CASES = [
    Case(32, 8, 64, StepLayout(300, 6, 20, 16), False, "float16"),
    Case(9, 3, 64, StepLayout(100, 3, 12, 16), False, "float16", (12, 3)),  # V in another format than Q and K
    Case(4, 4, 64, StepLayout(260, 2, 40, 8), False, "float16"),  # no grouping, blocks smaller than a tile's piece
    Case(16, 2, 128, StepLayout(150, 4, 10, 32), False, "float16", (16, 2, 2)),
    Case(5, 1, 64, StepLayout(33, 33, 5, 64), False, "float16"),  # a tile's rows are not a multiple of the group
    Case(16, 8, 128, StepLayout(150, 4, 10, 16), False, "float16", normed=True),  # Qwen3's
    Case(3, 1, 64, StepLayout(35, 3, 5, 16), False, "float16", (3, 1, 1), normed=True),  # pieces in part of a warp
]
CASES += [random_case(seed, is_decode=False) for seed in range(3)]
WINDOW, ALL = (("window", 37), ("score_scale", 0.3)), (("window", 100), ("softcap", 2.0), ("has_bias", True))
CASES += [
    Case(32, 8, 64, StepLayout(300, 6, 20, 16), False, "float16", features=WINDOW),
    Case(9, 3, 64, StepLayout(100, 3, 12, 16), False, "float16", (12, 3), normed=True, features=ALL),
    Case(16, 2, 128, StepLayout(150, 4, 10, 32), False, "float16", (16, 2, 2), features=ALL),
    Case(4, 4, 64, StepLayout(260, 2, 40, 8), False, "float16", features=(("rope", None), ("softcap", 1.5))),
]
CASES += [fused_case(name, StepLayout(100, 4, 14, 16), is_decode=False) for name in FUSED]
CASES += [  # several tiles of keys before a tile's own, of all sizes of heads
    Case(32, 8, 128, StepLayout(700, 3, 64, 16), False, "float16"),
    Case(8, 4, 128, StepLayout(500, 3, 16, 64), False, "float16", features=(("window", 200),)),
    Case(8, 4, 256, StepLayout(400, 3, 40, 32), False, "float16"),
    Case(12, 4, 64, StepLayout(700, 3, 64, 16), False, "float16"),
]


def ragged(case: Case, rng: np.random.Generator) -> list[Piece]:
    """Sequences of random shares of the step, at random places of their contexts; some rows are left as padding."""
    layout = case.layout
    longest, room = layout.max_blocks * layout.block_size, layout.num_tokens - int(rng.integers(0, 5))
    pieces: list[Piece] = []
    while room > 0 and len(pieces) < layout.num_seqs:
        last = len(pieces) == layout.num_seqs - 1
        count = 1 if rng.random() < 0.3 else int(rng.integers(1, room + 1))
        count = min(room if last else count, longest)
        pieces.append(Piece(int(rng.integers(0, longest - count + 1)), count))
        room -= count
    return pieces


def attend(backend: Backend, case: Case, buffer: np.ndarray, history: tuple[np.ndarray, np.ndarray]) -> Result:
    size = case.layout.block_size
    pool = make_pool(backend, case.kind, size, case.dtype, *history)
    before = read_pool(backend, case.kind, size, pool)
    qkv = normal(case.layout.num_tokens, sum(case.parts), seed=3)
    parts = [backend.device.upload(part) for part in np.split(qkv, np.cumsum(case.parts)[:-1], axis=1)]
    step = make_step_of(backend, case.layout, buffer, pool)
    out = backend.attend(parts, make_layer(backend, case), step)
    rows = out.float().numpy().reshape(-1, case.heads, case.dim)
    return Result(rows, before, read_pool(backend, case.kind, size, pool))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ragged_steps_equal_the_reference_and_write_their_slots_alone(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case, seed: int
) -> None:
    dtype = ("float16", "bfloat16", "float32", "float16")[seed]  # of what it returns
    backend, size = FusedGpuBackend(device, dtype, lanes), case.layout.block_size
    longest = case.layout.max_blocks * size
    pieces = ragged(case, np.random.default_rng(seed)) if seed else [Piece(0, min(longest, case.layout.num_tokens))]
    buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
    got, expected = (attend(ops, case, buffer, history) for ops in (backend, reference))
    live = sum(piece.count for piece in pieces)
    difference = largest_difference(got.out[:live], expected.out[:live])
    print(f"{case.name} {pieces}: {difference:.1e}")
    assert difference < TOLERANCE["float16"]
    slots = case.layout.views(buffer)["slots"][0, :live]
    others = np.setdiff1d(np.arange(size, len(history[0])), slots)
    for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
        np.testing.assert_allclose(now[slots], wanted[slots], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(now[others], then[others])  # padding wrote to the dummy block alone


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.kind.window], ids=lambda case: case.name)
def test_blocks_before_the_window_are_not_read(device: DeviceHandle, lanes: Lanes, case: Case) -> None:
    backend, history = FusedGpuBackend(device, "float16", lanes), make_history(case)
    longest = case.layout.max_blocks * case.layout.block_size
    pieces = [Piece(longest - 90, 90), Piece(longest - 1)]
    buffer = make_step(case.layout, pieces)
    clean = attend(backend, case, buffer, history)
    spoiled = attend(backend, case, *forget_before_windows(case, buffer, pieces, history))
    np.testing.assert_array_equal(spoiled.out[:91], clean.out[:91])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_another_request_left_behind_is_not_attended(device: DeviceHandle, lanes: Lanes, bad: float) -> None:
    case, backend = CASES[0], FusedGpuBackend(device, "float16", lanes)
    buffer, history = make_step(case.layout, [Piece(9, 70), Piece(40)]), make_history(case)
    clean = attend(backend, case, buffer, history)
    size, tables = case.layout.block_size, case.layout.views(buffer)["block_tables"][0]
    own = [tables[i][p // size] * size + p % size for i, end in ((0, 79), (1, 41)) for p in range(end)]
    for plain in history:
        plain[np.setdiff1d(np.arange(size, len(plain)), own)] = bad
    np.testing.assert_array_equal(attend(backend, case, buffer, history).out[:71], clean.out[:71])


# -- the map of tiles --------------------------------------------------------------------------------------------------


def expected_map(spec: PrefillSpec, views: dict[str, np.ndarray]) -> list[int]:
    """The first row of each tile, and the end."""
    firsts, end = [], int((views["seq_rows"] < spec.layout.num_seqs).sum())
    for row in range(end):
        is_other = row == 0 or views["seq_rows"][row] != views["seq_rows"][row - 1]
        is_next = spec.tokens < spec.layout.num_tokens and views["positions"][row] % spec.tokens == 0
        if is_other or is_next:
            firsts.append(row)
    return [*firsts, end]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tiles_begin_where_sequences_do_and_the_longest_go_first(device: DeviceHandle, case: Case) -> None:
    """By threadgroup memory alone: any device with threadgroups runs it."""
    for kind, seed in (("CUDA", 0), ("METAL", 1), ("CUDA", 2), ("METAL", 3)):
        spec = PrefillSpec(
            layout=case.layout,
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.dim,
            num_blocks=2,
            qkv_cols=case.parts,
            lanes=Lanes(kind),
            mma=Mma(kind, dtypes.half),
            qkv_partials=(1,) * len(case.parts),
        )
        buffer = make_step(case.layout, ragged(case, np.random.default_rng(seed)), seed=seed)
        tiles = empty(spec.map_size + 1, dtypes.int, device.name)
        inputs: Tensor = device.upload(buffer)
        got = run_kernel(tile_map_kernel(spec), [tiles], [inputs])[0].numpy()
        expected = expected_map(spec, case.layout.views(buffer))
        assert len(expected) <= spec.max_tiles + 1
        assert got[: len(expected)].tolist() == expected
        assert (got[len(expected) : -1] == expected[-1]).all()
        count = len(expected) - 1
        assert got[-1] == count
        order = empty(spec.map_size, dtypes.int, device.name)
        ranked = run_kernel(tile_order_kernel(spec), [order], [device.upload(got), inputs])[0].numpy()
        ends = [case.layout.views(buffer)["positions"][row - 1] for row in expected[1:]]
        assert ranked[:count].tolist() == sorted(range(count), key=lambda tile: (-ends[tile], -tile))
