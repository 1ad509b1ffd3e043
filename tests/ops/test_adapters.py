"""What adapters add to products, against the plain reference. On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.ops.builders import largest_difference, make_host, make_step, make_step_of, normal
from tests.sweeps import swept
from tinyvllm.config import LayerKind
from tinyvllm.device.handle import open_device
from tinyvllm.ops.adapter_spec import AdapterSite, Block, SiteShape, SiteValues, SiteWriter
from tinyvllm.ops.backend import Backend, Epilogue, Norm, Step
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

HIDDEN, HEADS, KV_HEADS, DIM, FFN = 128, 4, 2, 32, 96
SLOTS, MOST = 3, 16
Run = Callable[[Backend, int], np.ndarray]
QKV = (Block(0, HEADS * DIM), Block(1, KV_HEADS * DIM), Block(2, KV_HEADS * DIM))


def make_values(shape: SiteShape, ranks: list[int], seed: int) -> SiteValues:
    """An adapter's matrices, of these ranks in the shape's sections; 0: none."""
    a = [normal(rank, shape.num_cols, seed=seed + i) / 8 if rank else None for i, rank in enumerate(ranks)]
    b = [
        normal(block.num_rows, ranks[block.section], seed=seed + 10 + i) if ranks[block.section] else None
        for i, block in enumerate(shape.blocks)
    ]
    return SiteValues(tuple(a), tuple(b))


def make_site_of(ops: Backend, shape: SiteShape, by_slot: list[list[int]]) -> AdapterSite:
    site = ops.adapter_site(shape)
    writer = SiteWriter(site)
    for slot, ranks in enumerate(by_slot, 1):
        writer.write(slot, make_values(shape, [MOST] * shape.num_sections, seed=77))  # what is overwritten
        writer.write(slot, make_values(shape, ranks, seed=slot))
    return site


def step_of(ops: Backend, tokens: int) -> Step:
    """A step whose rows have adapters in turn, and every fourth none."""
    layout = StepLayout(tokens, tokens, 1, 8, has_adapters=True)
    buffer = make_step(layout, [])
    layout.views(buffer)["adapter_slots"][:] = np.arange(1, tokens + 1) % (SLOTS + 1)
    return make_step_of(ops, layout, buffer)


def read(ops: Backend, x: Any, tokens: int) -> np.ndarray:
    return np.concatenate([part.float().numpy().reshape(tokens, -1) for part in ops.parts_of(x)], axis=1)


def run_qkv(ops: Backend, tokens: int, kv_heads: int | None = KV_HEADS) -> np.ndarray:
    """q, k and v of normed rows, of which one adapter changes q and v, one all with different ranks, one nothing.
    Columns of the cores in the order in which one core has them."""
    shape = SiteShape(HIDDEN, QKV, MOST, SLOTS, num_kv_heads=kv_heads)
    site = make_site_of(ops, shape, [[8, 0, 8], [0, 0, 0], [16, 3, 1]])
    matrices = ops.stacked([make_host("float32", block.num_rows, HIDDEN, seed=9 + i) for i, block in enumerate(QKV)], 2)
    x, norm = ops.device.upload(normal(tokens, HIDDEN, seed=1)), Norm(ops.device.upload(normal(HIDDEN, seed=2)), 1e-5)
    step = step_of(ops, tokens)
    outs = ops.linear("qkv", x, matrices, tokens, norm)
    out = read(ops, ops.adapt(x, outs, site, step, norm)[0], tokens)
    if len(getattr(ops, "cores", ())) == 2:  # each has a KV head: its query heads, key and value
        per_core = out.reshape(tokens, 2, -1)
        parts = np.split(per_core, [2 * DIM, 3 * DIM], axis=2)
        out = np.concatenate([part.reshape(tokens, -1) for part in parts], axis=1)
    return out


def run_residual(ops: Backend, tokens: int) -> np.ndarray:
    """A residual with what adapters add to a product that it is added to, and then the product."""
    shape = SiteShape(FFN, (Block(0, HIDDEN),), MOST, SLOTS)
    site = make_site_of(ops, shape, [[16], [5], [0]])
    up = ops.matrix(make_host("float32", FFN, HIDDEN, seed=3))
    start = ops.matrix(make_host("float32", HIDDEN, HIDDEN, seed=4))
    down = ops.matrix(make_host("float32", HIDDEN, FFN, seed=5))
    x = ops.device.upload(normal(tokens, HIDDEN, seed=1))
    (residual,), (hidden,) = (ops.linear("test", x, [matrix], tokens) for matrix in (start, up))
    (residual,) = ops.adapt(hidden, [residual], site, step_of(ops, tokens), scale=0.3)
    return read(ops, ops.linear("down", hidden, [down], tokens, None, Epilogue(residual=residual))[0], tokens)


def run_gated(ops: Backend, tokens: int) -> np.ndarray:
    shape = SiteShape(HIDDEN, (Block(0, FFN), Block(1, FFN)), MOST, SLOTS)
    site = make_site_of(ops, shape, [[16, 16], [0, 8], [0, 0]])
    matrix = ops.gate_up(make_host("float32", FFN, HIDDEN, seed=3), make_host("float32", FFN, HIDDEN, seed=4))
    x, norm = ops.device.upload(normal(tokens, HIDDEN, seed=1)), Norm(ops.device.upload(normal(HIDDEN, seed=2)), 1e-5)
    bias = ops.device.upload(normal(2 * FFN, seed=6)) if tokens > 1 else None
    (product,) = ops.linear("gate_up", x, [matrix], tokens, norm)
    return read(ops, ops.adapt_gated(x, product, site, step_of(ops, tokens), norm, "silu", bias), tokens)


@pytest.mark.parametrize(
    ("run", "tokens"),
    swept(product((run_qkv, run_residual, run_gated), (1, 9)), [(run_residual, 1)]),
)
def test_what_adapters_add_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, run: Run, tokens: int
) -> None:
    assert largest_difference(run(backend, tokens), run(reference, tokens)) < 1e-5


@pytest.mark.parametrize("run", swept((run_qkv, run_residual, run_gated), [run_qkv]))  # whose heads are divided, too
def test_cores_divide_a_site(reference: ReferenceBackend, run: Run) -> None:
    two = CpuBackend(open_device(2), None, [LayerKind(HEADS, KV_HEADS, DIM)])
    assert len(two.cores) == 2
    assert largest_difference(run(two, 5), run(reference, 5)) < 1e-5
