"""Adapters beside fused kernels: what a recorded step reads after they have added to a product."""

from __future__ import annotations

import pytest
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tests.ops.builders import make_host
from tests.ops.rendering import plan_attention_layer, rendered, unwritten
from tinyvllm.config import LayerKind, Rope
from tinyvllm.device.recording import trace_step
from tinyvllm.ops.adapter_spec import Block, SiteShape
from tinyvllm.ops.backend import Norm, Step, pool_groups
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.step_inputs import StepLayout

HIDDEN = 2048


def attend_with_adapters(backend: FusedGpuBackend, tokens: int) -> Tensor:
    """Embedding, q, k and v with what adapters add, and attention, of decoding rows."""
    layout = StepLayout(tokens, tokens, 2, 16, has_adapters=True)
    kind, norm = LayerKind(8, 2, 64, Rope(10000.0)), Norm(unwritten(backend, HIDDEN), 1e-5)
    pool = backend.make_pool(pool_groups([kind]), 5, 16, "float16")
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode=True)
    qkv = backend.stacked([make_host("float16", rows, HIDDEN) for rows in (512, 128, 128)], 2)
    blocks = (Block(0, 512), Block(1, 128), Block(2, 128))
    site = backend.adapter_site(SiteShape(HIDDEN, blocks, 8, 1, num_kv_heads=2))
    x = backend.embed(backend.matrix(make_host("float16", 64, HIDDEN)), step)
    parts = backend.linear("qkv", x, qkv, tokens, norm)
    parts = backend.adapt(x, parts, site, step, norm)
    heads = backend.attend(parts, plan_attention_layer(backend, kind, [matrix.num_rows for matrix in qkv]), step)
    return backend.whole(heads)


@pytest.mark.parametrize("tokens", [1, 8])
def test_attention_reads_the_product_with_what_adapters_added(tokens: int) -> None:
    backend = rendered("CUDA")
    traced = trace_step(lambda: attend_with_adapters(backend, tokens).realize())
    launches = [(target.arg.name, args) for target, args in traced.launches if target.op is Ops.SINK]
    names = [name for name, _ in launches]
    assert tokens == 1 or any(name.startswith("sum") and "norm" not in name for name in names), names  # of partials
    (written,) = [args[0] for name, args in launches if name.startswith("adapter_expand")]
    read = [args for name, args in launches if "attention" in name or "decode" in name]
    places = {(id(buffer.base), buffer.offset) for buffer in read[0]}
    assert (id(written.base), written.offset) in places, names
