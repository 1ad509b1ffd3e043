"""Counts of what METAL's kernels issue, and what they argue of prompts: they bind, since no Mac is here to measure."""

from __future__ import annotations

import os

import pytest

from tests.sweeps import swept
from tinyvllm.bench.shapes import find_shape
from tinyvllm.device.kinds.metal import Metal
from tinyvllm.execution.metal_steps import count_attention, count_products, counts_all
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.formats.matrix import planes_of
from tinyvllm.ops.gpu.attention_decode import decode_kernel
from tinyvllm.ops.gpu.attention_decode_row import DecodeSpec
from tinyvllm.ops.gpu.gemm import METAL_TILES
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, quantized_vector_kernel
from tinyvllm.ops.kernel.body import F16, F32, I32, Body, balanced, finish
from tinyvllm.ops.kernel.lanes import SHARED_BYTES, Lanes, Mma, carry, hold
from tinyvllm.ops.kernel.metal_counts import MetalCounts, count_kernel
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.profiling.apple import PUBLISHED, REST, issue_cycles, step_arithmetic
from tinyvllm.profiling.chips import CHIPS
from tinyvllm.profiling.predict import predict

from tinygrad import Tensor, UOp, dtypes  # isort: skip  (tinyvllm makes its settings first)
from tinygrad.dtype import _from_np_dtype  # isort: skip


def counted(make: object, *sizes: int) -> MetalCounts:
    buffers = [UOp.placeholder((size,), F32, slot) for slot, size in enumerate(sizes)]
    return count_kernel(make(*buffers))[0]  # type: ignore[operator]


def test_instructions_are_counted_as_often_as_their_loops_run() -> None:
    def kernel(out: UOp, x: UOp) -> UOp:
        body = Body()
        lane, loop = body.threads(64), body.loop(10)
        at = (lane * 10 + loop) * 4
        stores = [out[at + i].store(x[at + i].load().exp2() * 3.0 + 1.0) for i in range(4)]
        return finish(UOp.group(*stores).end(loop, lane), "tested")

    before = os.environ.get("DMC")
    counts = counted(kernel, 2560, 2560)
    assert os.environ.get("DMC") == before
    assert (counts.device_loads, counts.device_load_bytes, counts.device_stores) == (10, 160, 10)  # vectors of four
    assert counts.complex_instructions >= 40 and counts.complex_cycles >= 160  # exponentials
    assert 40 <= counts.arithmetic <= 90  # fused products, addresses and the loop
    assert (counts.simdgroups, counts.groups, counts.products, counts.barriers) == (2, 1, 0, 0)


def test_what_is_unpacked_in_threadgroup_memory_waits_at_a_barrier() -> None:
    def kernel(out: UOp, x: UOp) -> UOp:
        body = Body()
        lane = body.threads(32)
        shared = body.shared(128)
        shared = shared.after(UOp.group(*[shared[lane * 4 + i].store(x[lane * 4 + i].load()) for i in range(4)]))
        return finish(out[lane].store(shared[lane].load()).end(lane), "tested")

    counts = counted(kernel, 32, 128)
    assert (counts.shared_stores, counts.shared_store_bytes) == (1, 16)
    assert (counts.shared_loads, counts.shared_load_bytes, counts.barriers) == (1, 4, 1)
    assert counts.threadgroup_bytes == 512 and 4 <= counts.registers <= 12
    assert counts.moves == 0  # a loaded vector is stored as it is


@pytest.mark.parametrize("kind", ["Q4_K", pytest.param("float16", marks=pytest.mark.sweep)])
def test_the_products_of_a_prompt_reach_three_quarters_of_the_peak(kind: str) -> None:
    """By counts, times what llama.cpp's kernel keeps of its own counts on an M1 Max: see `PUBLISHED`."""
    products = count_products(find_shape("llama-3.1-8b"), kind, 512)
    assert {kernel.name for kernel in products} == {"gate_up", "qkv, attention_out, down"}
    for kernel in products:
        counts = kernel.issued
        assert kernel.shares[0] > 0.85  # up to the M2
        assert kernel.shares[1] > 0.9
        assert counts.shared_loads <= 0.13 * counts.products  # a load serves eight products
        assert counts.beside <= 1.6 * counts.products
        assert counts.products >= 60 * counts.barriers
        assert counts.registers <= 128  # otherwise Apple's compiler spills
        assert kernel.resident >= 8  # two simdgroups for each of a core's schedulers
    for chip in ("m1", "m4"):
        arithmetic = step_arithmetic(products, CHIPS[chip])
        assert arithmetic.products >= 0.75
    assert any("is left in a whole prompt" in line for line in arithmetic.lines)


@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    swept([("Q4_K", 8), ("Q4_K", 64), ("Q6_K", 16), ("float16", 8), ("bfloat16", 32), ("Q8_0", 2)], [("Q4_K", 8)]),
)
def test_the_products_of_few_rows_stay_within_a_threads_registers(kind: str, num_tokens: int) -> None:
    for kernel in count_products(find_shape("llama-3.1-8b"), kind, num_tokens):
        assert kernel.issued.registers <= 128 and kernel.resident >= 12
        least = 0.7 * num_tokens / next(tile for tile in METAL_TILES if tile >= num_tokens)
        assert kernel.shares[1] > least, "of the peak, from the M3 on; a tile's other rows are lost"


@pytest.mark.parametrize(
    ("kind", "most_cycles"), swept([("Q4_K", 4), ("Q4_0", 4), ("Q8_0", 4), ("Q6_K", 8)], [("Q4_K", 4)])
)
def test_a_quantized_row_takes_fewer_cycles_than_its_bytes(kind: str, most_cycles: float) -> None:
    """An M1 Max has 9.4 cycles of a lane for each weight of 4.5 bits while it arrives at 79 % of its bandwidth."""
    fmt, planes = planes_of(RandomWeights(kind, 0).take("matrix", (32, 256)), "row")
    rows, cols = 28672, 4096
    lanes, mma = Lanes("METAL", (dtypes.half,)), Mma("METAL", dtypes.half)
    spec = QuantizedVectorSpec(
        name="row", lanes=lanes, format=fmt, num_rows=rows, num_cols=cols, activation="silu", mma=mma
    )
    sizes = [(rows // 2, F16), *((p.size * rows * cols // 8192, _from_np_dtype(p.dtype)) for p in planes), (cols, F16)]
    (counts,) = count_kernel(
        quantized_vector_kernel(spec)(*[UOp.placeholder((size,), dtype, i) for i, (size, dtype) in enumerate(sizes)])
    )
    assert counts.products == 0 and counts.registers <= 112 and 32 * counts.simdgroups <= Metal.safe_threads
    assert max(issue_cycles(counts)) * counts.simdgroups * counts.groups * 32 <= most_cycles * rows * cols


@pytest.mark.parametrize("shape", swept(("llama-3.1-8b", "llama-3.2-1b", "gemma-3-4b"), []))  # products: above
def test_the_attention_of_a_prompt_reaches_three_quarters_of_the_peak_by_counts(shape: str) -> None:
    for kernel in count_attention(find_shape(shape), 512):  # heads of 128, 64 and 256
        assert kernel.shares[0] > 0.75 and kernel.shares[1] > 0.8
        assert kernel.issued.registers <= 128
        assert kernel.resident >= 8


DECODING = [  # heads of 128, 64 and 256, rows, partial sums of qkv
    ("llama-3.1-8b", 8, 8),
    ("llama-3.1-8b", 1, 1),
    ("llama-3.2-1b", 64, 1),
    ("llama-3.2-1b", 8, 2),
    ("gemma-3-4b", 1, 1),
    ("gemma-3-4b", 8, 2),
]


@pytest.mark.parametrize(("shape", "num_rows", "partials"), swept(DECODING, DECODING[:1]))
def test_the_attention_of_a_decode_step_stays_within_a_threads_registers(
    shape: str, num_rows: int, partials: int
) -> None:
    layer, layout = find_shape(shape).layers[0], StepLayout(num_rows, num_rows, 128, 16)
    num_blocks, cols = num_rows * layout.max_blocks + 1, layer.q_size + 2 * layer.kv_size
    rope = Tensor.empty(2048 * layer.head_dim, dtype=F32, device="CPU")
    stands, lanes = AttentionLayer(0, layer, (cols,), rope=rope), Lanes("METAL", (dtypes.half,))
    own = {"lanes": lanes, "mma": Mma("METAL", dtypes.half), "qkv_partials": (partials,)}
    spec = DecodeSpec.of(stands, layout, num_blocks, **own)
    out, pool = num_rows * layer.q_size, (num_blocks * layout.block_size * spec.slot_elements, F16)
    splits = [(spec.num_splits * size, F32) for size in (out, num_rows * layer.num_heads)]
    sizes = [*(splits if spec.is_split else [(out, F16)]), pool, pool, (layout.size, I32)]
    sizes += [(2048 * spec.rope_cols, F32), (partials * num_rows * cols, F32)]
    placeholders = [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
    (counts,) = count_kernel(decode_kernel(spec)(*placeholders))
    assert counts.registers <= 128
    assert counts.threadgroup_bytes <= SHARED_BYTES and 32 * counts.simdgroups <= Metal.safe_threads


def test_declared_registers_hold_values_from_a_store_to_the_last_load() -> None:
    """One value is loaded into the registers in each iteration and used in it; the sum lives throughout."""

    def kernel(out: UOp, x: UOp) -> UOp:
        body = Body()
        lane = body.threads(32)

        def add(i: UOp | int, old: list[UOp]) -> list[UOp]:
            values = [x[(i * 32 + lane) * 16 + j].load() for j in range(16)]
            held, _ = hold(body, values)
            return [old[0] + balanced(held)]

        (total,) = carry(body, [UOp.const(0.0, F32)], 4, (lane,), add)
        return finish(out[lane].store(total).end(lane), "tested")

    assert 17 <= counted(kernel, 32, 2048).registers <= 24  # 16 values, the sum, and places


def test_the_rule_is_taken_from_a_published_speed_and_says_what_it_makes_of_others() -> None:
    assert pytest.approx(PUBLISHED[0].share / PUBLISHED[0].counted, abs=0.01) == REST
    for published in PUBLISHED:
        assert 0.7 < published.counted < 0.95 and 0.5 < published.share < 0.9
        assert abs(published.counted * REST / published.share - 1) < 0.25


def test_weights_arrive_while_the_products_of_few_rows_are_computed() -> None:
    shape, chip = find_shape("llama-3.1-8b"), CHIPS["m4"]
    arithmetic = step_arithmetic(count_products(shape, "Q4_K", 8), chip)
    one, eight = predict(shape, "Q4_K", chip, 1, 128), predict(shape, "Q4_K", chip, 8, 128, arithmetic=arithmetic)
    assert eight.step_s < 1.2 * one.step_s
    assert eight.step_s > one.step_s
    assert any("the longer of the two counts" in line for line in eight.assumptions)


@pytest.mark.parametrize(
    ("shape", "is_counted"),
    [("llama-3.1-8b", True), ("gemma-3-4b", True), ("qwen3-30b-a3b", False), ("qwen3.5-0.8b", False)],
)
def test_steps_with_other_products_are_not_predicted_from_counts(shape: str, *, is_counted: bool) -> None:
    assert counts_all(find_shape(shape)) == is_counted
