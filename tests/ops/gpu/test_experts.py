"""The fused experts of CUDA and METAL: rendered anywhere, run where there is such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_experts.py
DEV=METAL python -m pytest -p tests.metal.plugin -m gpu tests/ops/gpu/test_experts.py (on the simulator)"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.dtype import DType

from tests import sweeps
from tests.ops.builders import largest_difference, normal
from tests.ops.experts import Case, make_kind, make_layer
from tests.ops.gpu.products import TOLERANCE, read, upload
from tests.ops.rendering import KINDS, check_limits, kernels_of, make_renderer, rendered, unwritten
from tests.sweeps import swept
from tinyvllm.config import ExpertsKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue, Norm
from tinyvllm.ops.experts_spec import ExpertLayer
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.gpu.experts_order import OrderSpec, count_kernel, most_tiles, order_kernel
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.gpu.gemm_hopper import ExpertWgmmaSpec, wgmma_kernel
from tinyvllm.ops.gpu.token_tiles import TILE_WORDS, ExpertTiles
from tinyvllm.ops.kernel.body import I32, empty, run_kernel
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.reference import ReferenceBackend

HIDDEN = 256
QWEN = make_kind(renormalizes=True)
GPT_OSS = make_kind(activation="clamped_swiglu", has_router_bias=True, has_biases=True)
DEEPSEEK = make_kind(16, 3, score="sigmoid", has_choice_bias=True, scale=2.5)
GATED = make_kind(40, 4, renormalizes=False, shared_size=64, has_shared_gate=True, has_expert_scale=True)


def run(backend: Backend, layer: ExpertLayer, tokens: int, end: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, weights, result) of a layer whose epilogue has r(esidual), n(orm), s(cale)."""
    x = upload(backend, normal(tokens, HIDDEN, seed=10))
    norm = Norm(backend.device.upload(1 + 0.3 * normal(HIDDEN, seed=11)), 1e-5)
    routing = backend.route(x, layer, tokens, norm)
    epilogue = PLAIN
    if end:
        epilogue = Epilogue(
            post_norm=Norm(backend.device.upload(1 + 0.3 * normal(HIDDEN, seed=12)), 0.05) if "n" in end else None,
            scale=0.7 if "s" in end else 1.0,
            residual=x if "r" in end else None,
        )
    out = read(backend, backend.experts(x, routing, layer, tokens, norm, epilogue), tokens)
    ids, weights = (tensor.numpy().reshape(tokens, -1) for tensor in (routing.ids, routing.weights))
    order = ids.argsort(axis=1)  # two near experts may come in either order
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1), out


def make_reference(device: DeviceHandle) -> ReferenceBackend:
    """On the CPU, where the device is simulated."""
    on_cpu = DeviceHandle("CPU", has_threads=False, is_unified=True, cores=("CPU",))
    return ReferenceBackend(on_cpu if device.name.startswith("METAL") else device)


def compare(device: DeviceHandle, lanes: Lanes, case: Case, end: str, dtype: str | None = None) -> None:
    dtype = dtype or ("bfloat16" if case.fmt == "bfloat16" else "float16")
    fused = FusedGpuBackend(device, dtype, lanes)
    reference = make_reference(device)
    ids, weights, out = run(fused, make_layer(fused, case), case.num_tokens, end)
    assert not fused.coverage.lines()
    wanted_ids, wanted_weights, wanted = run(reference, make_layer(reference, case), case.num_tokens, end)
    is_same = (ids == wanted_ids).all(axis=1)
    assert is_same.mean() > 0.9, "a tie may fall on either side, but not often"
    assert largest_difference(weights[is_same], wanted_weights[is_same]) < TOLERANCE[dtype]
    assert largest_difference(out[is_same], wanted[is_same]) < 2 * TOLERANCE[dtype]


CASES = [
    (Case(QWEN, "float16", 1), "r"),
    (Case(QWEN, "float16", 5), "r"),
    (Case(QWEN, "float16", 70), ""),
    (Case(QWEN, "bfloat16", 1), ""),
    (Case(QWEN, "bfloat16", 6), "r"),
    (Case(GPT_OSS, "MXFP4-e8m0", 1), "r"),
    (Case(GPT_OSS, "MXFP4-e8m0", 3), "r"),
    (Case(replace(GPT_OSS, ffn_size=256), "Q4_K", 1), "n"),
    (Case(GPT_OSS, "float16", 90), "rns"),
    (Case(DEEPSEEK, "Q8_0", 4), "rns"),
    (Case(DEEPSEEK, "Q8_0", 1, stacks_shared=True), "r"),
    (Case(GATED, "float16", 2, stacks_shared=True), "r"),
    (Case(GATED, "float16", 3), "r"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "end"), CASES, ids=lambda value: getattr(value, "fmt", value))
def test_experts_match_the_reference(device: DeviceHandle, lanes: Lanes, case: Case, end: str) -> None:
    compare(device, lanes, case, end)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [GPT_OSS, replace(GPT_OSS, activation="silu")], ids=["clamped", "silu"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_packed_experts_of_a_bfloat16_model_match_the_reference(
    device: DeviceHandle, lanes: Lanes, tokens: int, kind: ExpertsKind
) -> None:
    compare(device, lanes, Case(kind, "MXFP4-e8m0", tokens), "r", "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_weights_of_experts_that_nobody_chose_are_not_read(device: DeviceHandle, lanes: Lanes, tokens: int) -> None:
    """They are NaN here, and 0 * NaN is NaN."""
    backend = FusedGpuBackend(device, "float16", lanes)
    layer = make_layer(backend, Case(make_kind(16, 2), "float16", tokens))
    ids, _, clean = run(backend, layer, tokens, "r")

    def spoiled(matrix: Matrix) -> Matrix:
        (values,) = (plane.numpy().reshape(matrix.num_experts, -1).copy() for plane in matrix.planes)
        values[np.setdiff1d(np.arange(matrix.num_experts), ids)] = np.nan
        return replace(matrix, planes=(device.upload(values.reshape(-1)),))

    layer = replace(layer, gate_up=spoiled(layer.gate_up), down=spoiled(layer.down))
    np.testing.assert_array_equal(run(backend, layer, tokens, "r")[2], clean)


def sort(spec: OrderSpec, ids: np.ndarray, device: DeviceHandle) -> tuple[np.ndarray, np.ndarray]:
    outs = [empty(spec.num_pairs, I32, device.name), empty(spec.map_size, I32, device.name)]
    read = [device.upload(ids.astype(np.int32))]
    if spec.parts > 1:
        read += run_kernel(count_kernel(spec), [empty(spec.counts_size, I32, device.name)], read)
    pairs, tiles = run_kernel(order_kernel(spec), outs, read)
    words = tiles.numpy()
    return pairs.numpy(), np.append(words[:-1].reshape(-1, TILE_WORDS), [[words[-1]] * TILE_WORDS], axis=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "pairs", "rows"), [(8, 14, 8), (128, 1500, 16), (40, 300, 8)])
def test_the_order_has_each_pair_once_and_tiles_of_one_expert(
    device: DeviceHandle, lanes: Lanes, experts: int, pairs: int, rows: int
) -> None:
    ids = np.random.default_rng(0).integers(0, experts, pairs) // 2
    found, tiles = sort(OrderSpec(lanes, experts, pairs, most_tiles(pairs, experts, rows), rows), ids, device)
    assert sorted(found) == list(range(pairs))
    assert (np.diff(ids[found]) >= 0).all()
    count, tiles = tiles[-1, 0], tiles[:-1]
    used = tiles[tiles[:, 3] == 1]
    assert count == len(used)
    assert (tiles[len(used) :] == 0).all() and len(used) == sum(-(-np.bincount(ids) // rows))
    covered = []
    for expert, first, end, _ in used:
        assert first < end <= first + rows and (ids[found[first:end]] == expert).all()
        covered += list(range(first, end))
    assert covered == list(range(pairs))


def plan(backend: FusedGpuBackend, case: Case) -> list[Tensor]:
    layer = make_layer(backend, case)
    x = unwritten(backend, case.num_tokens * case.hidden, backend.float)
    norm = Norm(unwritten(backend, case.hidden), 1e-5)
    routing = backend.route(x, layer, case.num_tokens, norm)
    out = backend.experts(x, routing, layer, case.num_tokens, norm, Epilogue(residual=x))
    return [backend.whole(out)]


LAYERS = [
    (fmt, kind, tokens, 4 if tokens == 1 else 7)
    for fmt in ("bfloat16", "MXFP4-e8m0")
    for kind in KINDS
    for tokens in (1, 8, 100)
]


@pytest.mark.parametrize(
    ("fmt", "kind", "tokens", "count"),
    swept(LAYERS, [("MXFP4-e8m0", "CUDA", 1, 4), ("MXFP4-e8m0", "CUDA", 8, 7)]),
)
def test_a_layer_of_experts_renders_within_the_limits(fmt: str, kind: str, tokens: int, count: int) -> None:
    """One row takes four kernels: router, route, gate and up, down. More take a norm before them, an order, and a
    sum: tests/metal runs three. Of several rows, the default run renders the experts' products alone."""
    backend = rendered(kind, "bfloat16" if fmt == "bfloat16" else "float16")
    kernels = kernels_of(plan(backend, Case(GPT_OSS, fmt, tokens)))
    assert len(kernels) == count and not backend.coverage.lines()
    for kernel in kernels:
        if tokens == 1 or kernel.arg.name.startswith("experts") or sweeps.is_sweeping:
            check_limits(kernel, KINDS[kind])


@pytest.mark.parametrize(("dtype", "is_first"), [(dtypes.half, True), (dtypes.bfloat16, False)])
def test_hoppers_tiles_of_experts_have_the_loops_of_others(dtype: DType, is_first: bool) -> None:
    """Conditions that are data must not split the loops that the stores are in."""
    tiles = ExpertTiles(8, 600, 2, most_tiles(600, 8, 128), 128, is_first=is_first, is_gathered=True, has_bias=True)
    mma, activation = Mma("CUDA", dtype), "clamped_swiglu" if is_first else None
    spec = ExpertWgmmaSpec(
        "test", mma, 600, 320, 128, 128, 1, activation, expert_tiles=tiles, has_bfloat_results=not is_first
    )
    types = [dtypes.half, dtypes.uint, dtypes.half, dtypes.half, I32, I32, dtypes.float]
    sizes = (600 * spec.out_rows, spec.map_size, 8 * 320 * 128, 600 * 128, tiles.num_tiles * TILE_WORDS + 1, 600, 2560)
    read = [UOp.placeholder((size,), kind, slot) for slot, (size, kind) in enumerate(zip(sizes, types, strict=True))]
    source = to_program(wgmma_kernel(spec)(*read), make_renderer("CUDA sm_90")).src[2].arg
    loops = re.findall(r"for \(int (Ridx\d+)", source)
    assert len(loops) == len(set(loops)) == 4  # tiles and stages, of the warps that fetch and of those that multiply
