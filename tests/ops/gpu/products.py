"""Products of the fused kernels compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.ops.builders import make_epilogue, make_host, normal, run_product
from tests.ops.formats.drawn import BY_NAME
from tinyvllm.arrays import to_float32
from tinyvllm.device.cuda_graph import ChainReplay
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import record
from tinyvllm.ops.activation import gated_exact
from tinyvllm.ops.backend import Backend, Epilogue, Norm
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.gpu.stream_hopper import MAP_SIZE, NUM_MAPS, StreamSpec
from tinyvllm.ops.kernel.body import F16, F32, KernelFn, empty, run_kernel
from tinyvllm.ops.kernel.hopper import allows_wgmma

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of the largest value


def require_hopper(device: DeviceHandle) -> DeviceHandle:
    """The device, prepared for Hopper's instructions; skips the test if it has none."""
    if not allows_wgmma(device.name):
        pytest.skip("needs Hopper's instructions")
    return device


def upload(backend: Backend, values: np.ndarray) -> Tensor:
    tensor = backend.device.upload(values)
    return tensor.cast(backend.float).contiguous().realize() if isinstance(backend, FusedGpuBackend) else tensor


def read(backend: Backend, x: Tensor, tokens: int) -> np.ndarray:
    (whole,) = backend.parts_of(x)
    return whole.float().numpy().reshape(tokens, -1)


def multiply(backend: Backend, fmt: str, tokens: int, operation: str, rows: int, cols: int) -> np.ndarray:
    x, norm = upload(backend, normal(tokens, cols, seed=1)), Norm(backend.device.upload(normal(cols, seed=2)), 1e-5)
    if operation == "norm_gated":
        matrix = backend.gate_up(make_host(fmt, rows, cols, seed=3), make_host(fmt, rows, cols, seed=4))
        return read(backend, run_product(backend, x, matrix, tokens, norm, Epilogue(activation="silu")), tokens)
    (matrix,) = backend.stacked([make_host(fmt, rows, cols, seed=5)])
    if operation == "norm_linear":
        return read(backend, run_product(backend, x, matrix, tokens, norm), tokens)
    residual = upload(backend, normal(tokens, rows, seed=6))
    if operation.startswith("epilogue"):
        *_, has_residual, names = operation.split()
        epilogue = make_epilogue(backend, residual if has_residual == "+" else None, rows, names)
        return read(backend, run_product(backend, x, matrix, tokens, epilogue=epilogue), tokens)
    epilogue = Epilogue(residual=residual)
    if operation.startswith("normed_chain"):
        epilogue = make_epilogue(backend, residual, rows, "ns")
        if "unnormed" not in operation:
            epilogue = replace(epilogue, out_scale=backend.device.upload(np.full(1, 0.8, np.float32)))
    added = run_product(backend, x, matrix, tokens, epilogue=epilogue)
    if operation == "linear_add":
        return read(backend, added, tokens)
    # a sum that the next product or its norm computes, and that is read again after it
    is_wide, has_norm = operation.endswith("wide"), "unnormed" not in operation
    (second,) = backend.stacked([make_host(fmt, 8 * rows if is_wide else 64, rows, seed=7)])
    norm = Norm(backend.device.upload(normal(rows, seed=8)), 1e-5)
    out = run_product(backend, added, second, tokens, norm if has_norm else None)
    return np.concatenate([read(backend, tensor, tokens) for tensor in (out, added)], axis=1)


def wide_feed_forward(
    backend: FusedGpuBackend, fmt: str, down_fmt: str, tokens: int, cols: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the results (tokens, cols) of a feed-forward of which some hidden values exceed float16's range, the same in
    float64)."""
    hosts, down = [make_host(fmt, cols, cols, seed=i) for i in range(2)], make_host(down_fmt, cols, cols, seed=6)
    x, weight, last = normal(tokens, cols, seed=3), 300 * (1 + 0.3 * normal(cols, seed=4)), normal(cols, seed=5)
    norms = [Norm(backend.device.upload(values), 1e-5) for values in (weight, last)]
    rows, gate = upload(backend, x), Epilogue(activation="silu")
    (hidden,) = backend.linear("gate_up", rows, [backend.gate_up(*hosts)], tokens, norms[0], gate)
    epilogue = Epilogue(residual=rows, post_norm=norms[1])
    (out,) = backend.linear("down", hidden, [backend.matrix(down)], tokens, None, epilogue)

    def scale(values: np.ndarray) -> np.ndarray:
        return np.sqrt((values.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5)

    normed = x / scale(x) * weight
    want = gated_exact("silu", *[normed @ to_float32(host).astype(np.float64).T for host in hosts])
    assert np.abs(want).max() > 65504
    want = want @ to_float32(down).astype(np.float64).T
    return read(backend, out, tokens), want / scale(want) * last + x


def chained_products(
    device: DeviceHandle,
    kernel: Callable[[Any], KernelFn],
    specs: Sequence[StreamSpec],
    planes: Sequence[Tensor],
    x: np.ndarray,
) -> np.ndarray:
    """The results (T, N) of products of a matrix, given by its planes, and x (T, K), one after another in a chain. Each
    must equal the first one. Prepares the device for Hopper's instructions, and skips the test if it has none."""
    require_hopper(device)
    rows, size = device.upload(x.reshape(-1)), x.shape[0] * specs[0].out_rows
    maps = [device.zeros(MAP_SIZE, dtypes.uint) for _ in range(NUM_MAPS)]
    outs = [empty(spec.splits * size, F16 if spec.is_gated else F32, device.name).realize() for spec in specs]

    def trace() -> Any:
        for i, spec in enumerate(specs):
            result = run_kernel(kernel(spec), [outs[i], maps[i % NUM_MAPS]], [*planes, rows])[0]
        return result.realize()

    replay = ChainReplay(device.name, record(trace))
    for _ in range(3):
        replay()
    device.wait()
    pairs = zip(outs, specs, strict=True)
    sums = [out.numpy().astype(np.float64).reshape(spec.splits, size).sum(0) for out, spec in pairs]
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0], rtol=2e-3, atol=2e-3 * np.abs(sums[0]).max())
    return sums[0].reshape(x.shape[0], -1)


SHAPES = {"norm_linear": (96, 256), "norm_gated": (64, 512), "linear_add": (64, 1280), "chain": (256, 768)}
# see make_epilogue; the sums with norms are computed by the next product, or before it if that has many rows
EPILOGUES = ("epilogue + n", "epilogue + bns", "epilogue + bs", "epilogue - sc", "epilogue - b")
NORMED_CHAINS = ("normed_chain", "normed_chain wide", "normed_chain unnormed")
# a row on the vector units or the matrix unit, a few rows in pairs and one by one, and many rows
SOME_TOKENS = (1, 8, 40, 70)
ALL_FORMATS = [(name, tokens, operation) for name in BY_NAME for tokens in SOME_TOKENS for operation in SHAPES]
# each format in each kernel, by one operation
ROTATED = [case for i, case in enumerate(ALL_FORMATS) if i % len(SHAPES) == (i // len(SHAPES) + i // 16) % len(SHAPES)]
