"""The fused kernels of CUDA and METAL: counted and rendered anywhere, run where there is such a device:
DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_fused.py"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import Ops

from tests import sweeps
from tests.ops.attention import (
    DECODE,
    FEATURES,
    FUSED,
    Case,
    Result,
    decode_pieces,
    forget_before_windows,
    fused_case,
    make_history,
    make_layer,
    random_case,
)
from tests.ops.attention import attend as attend_and_read
from tests.ops.builders import (
    QUANTIZED,
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
from tests.ops.gpu.products import (
    ALL_FORMATS,
    EPILOGUES,
    NORMED_CHAINS,
    ROTATED,
    SHAPES,
    TOLERANCE,
    multiply,
    read,
    upload,
    wide_feed_forward,
)
from tests.ops.rendering import (
    KINDS,
    check_limits,
    kernels_of,
    make_renderer,
    plan_attention,
    plan_attention_layer,
    plan_layer,
    rendered,
    threadgroup_bytes,
    unwritten,
    written_bytes,
)
from tests.sweeps import in_both, swept
from tinyvllm.arrays import Format, to_float32
from tinyvllm.config import LayerKind, Rope, StateKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import AWAIT_PREVIOUS, record, trace_step
from tinyvllm.device.replay import make_replay
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue, Norm, Step, pool_groups
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.gpu.attention_decode import existing_tile
from tinyvllm.ops.gpu.attention_decode_hopper import StreamedAttentionSpec
from tinyvllm.ops.gpu.attention_decode_row import DecodeSpec, short_contexts
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.gpu.attention_split import SHORTEST_SPAN
from tinyvllm.ops.gpu.fused import FusedGpuBackend, Halves, Summed
from tinyvllm.ops.gpu.matrix import MatrixSpec
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, fits_quantized_vector
from tinyvllm.ops.kernel.hopper import MULTIPROCESSORS
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import candidates, current
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

# -- counts and limits -------------------------------------------------------------------------------------------------


LAYER_KERNELS = [(1, 5, 5), (2, 7, 6), (64, 7, 6)]


@pytest.mark.parametrize(
    ("counts", "kind", "normed"),
    swept(
        product(LAYER_KERNELS, KINDS, (False, True)),
        {(LAYER_KERNELS[0], "CUDA", False), (LAYER_KERNELS[1], "METAL", True)},
    ),
)
def test_a_layer_takes_five_kernels_for_one_row_and_seven_for_more(
    counts: tuple[int, int, int], kind: str, normed: bool
) -> None:
    """One of those outside comes from the tiny vocabulary: its product is split, and another kernel adds them up."""
    tokens, inside, outside = counts
    layout = StepLayout(tokens, tokens, 2, 16)
    outputs = plan_layer(rendered(kind), layout, ("float16", "float16"), is_decode=True, normed=normed)
    assert len(Tensor.schedule_linear(*outputs).src) <= inside + outside


@pytest.mark.parametrize("kind", swept(KINDS, ["CUDA"]))
@pytest.mark.parametrize(("tokens", "inside", "outside"), [(1, 5, 5), (2, 7, 6)])
def test_a_recorded_layer_launches_nothing_that_nobody_reads(kind: str, tokens: int, inside: int, outside: int) -> None:
    """While a step is recorded, what is called is launched."""
    backend, layout = rendered(kind), StepLayout(tokens, tokens, 2, 16)
    traced = trace_step(lambda: plan_layer(backend, layout, ("float16", "float16"), is_decode=True)[0].realize())
    ours = [target for target, _ in traced.launches if target.op is Ops.SINK and target.tag == 1]
    assert 0 < len(ours) <= inside + outside


@in_both
@pytest.mark.parametrize("kind", [pytest.param("METAL", marks=pytest.mark.sweep), "CUDA"])
def test_a_layer_that_verifies_drafts_takes_one_kernel_more_than_one_that_decodes(kind: str) -> None:
    """It writes all keys and values before. Once a step, the rows with logits are gathered, and then normed."""
    backend, layout = rendered(kind), StepLayout(5, 5, 200, 16)
    same: dict[str, Any] = {"layout": layout, "formats": ("float16", "float16")}
    decode = kernels_of(plan_layer(backend, is_decode=True, **same))
    verify = kernels_of(plan_layer(backend, is_decode=False, verifies=True, **same))
    assert len(verify) == len(decode) + 1 + 2
    own = {kernel.arg.name.split("_5")[0]: kernel for kernel in verify}
    # attention over several rows: test_decoding_with_many_heads_renders_within_the_limits
    for name in ("store_kv", "take_rows", *(("decode_attention",) if sweeps.is_sweeping else ())):
        check_limits(own[name], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 8, 17, 33, 64])
def test_warps_that_share_columns_keep_each_sum_once(kind: str, tokens: int) -> None:
    spec = MatrixSpec("test", Lanes(kind), Mma(kind, dtypes.half), Format("float16", 16), tokens, 2048, 8192)
    for candidate in candidates(spec):
        sums = candidate.token_tiles * candidate.mma.elements
        share = max(1, sums // candidate.warps)
        kept = [warp * share + i for warp in range(candidate.warps) for i in range(share) if warp * share < sums]
        assert kept == list(range(sums)), candidate.chosen


DECODING = [(1, ("Q4_K", "Q6_K")), (1, ("bfloat16", "Q4_K")), (3, ("Q8_0", "Q5_0")), (3, ("float16", "bfloat16"))]


@pytest.mark.parametrize(
    ("kind", "case"),
    swept(
        product(KINDS, DECODING),
        [],  # by default: a chained step below, and METAL's run in tests/metal
    ),
)
def test_a_decoding_step_renders_within_the_limits(kind: str, case: tuple[int, tuple[str, str]]) -> None:
    tokens, formats = case
    backend = rendered(kind, "bfloat16" if "bfloat16" in formats else "float16")
    layout = StepLayout(tokens, tokens, 2, 16)
    kernels = kernels_of(plan_layer(backend, layout, formats, is_decode=True, samples=False, normed=tokens == 3))
    assert "decode" in {kernel.arg.name.split("_")[0] for kernel in kernels}
    for kernel in kernels:
        check_limits(kernel, KINDS[kind])


@pytest.mark.parametrize(("kind", "dim"), swept(product(KINDS, (64, 256)), [("CUDA", 64)]))
def test_decoding_with_many_heads_renders_within_the_limits(kind: str, dim: int) -> None:
    """Two threadgroups serve the sixteen heads that share a KV head."""
    layer = LayerKind(32, 2, dim, Rope(10000.0), has_sinks=True, window=40)
    kernels = kernels_of(plan_attention(rendered(kind), layer, "float16", is_decode=True))
    assert [kernel.arg.name for kernel in kernels] == [f"decode_attention_4x32x{dim}"]
    check_limits(kernels[0], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_of_wide_heads_shares_no_more_than_there_is(kind: str) -> None:
    layer = LayerKind(32, 2, 256, Rope(10000.0), has_sinks=True, window=40)
    (kernel,) = kernels_of(plan_attention(rendered(kind), layer, "float16", is_decode=True))
    assert 0 < written_bytes(kernel, AddrSpace.LOCAL) <= threadgroup_bytes(KINDS[kind])


@pytest.mark.parametrize("kind", swept(KINDS, []))  # tests/metal multiplies, and test_prefill.py has the others
def test_a_mixed_step_renders_within_the_limits(kind: str) -> None:
    layout = StepLayout(18, 3, 2, 16)
    outputs = plan_layer(rendered(kind), layout, ("Q4_1", "Q4_1"), is_decode=False, samples=False, normed=True)
    for kernel in kernels_of(outputs):
        if not kernel.arg.name.startswith("prefill"):  # test_prefill.py has attention
            check_limits(kernel, KINDS[kind])


CHAINED = [(1, ("Q4_0", "float16")), (2, ("float16", "float16"))]


@pytest.mark.parametrize(
    ("tokens", "formats", "has_post_norm"),
    swept([(*case, normed) for case in CHAINED for normed in (False, True)], [(*CHAINED[0], True)]),
)
def test_a_chained_kernel_waits_before_it_touches_what_the_step_writes(
    tokens: int, formats: tuple[str, str], has_post_norm: bool
) -> None:
    """It may begin while kernels before it still run. Before it waits it writes nothing, and reads what no kernel of
    the step wrote before it: weights, the host's words, and the pool, where only a row's own tokens are new."""
    layout = StepLayout(tokens, tokens, 2, 16)
    backend = rendered("CUDA", is_chained=True)
    epilogue = Epilogue(post_norm=Norm(unwritten(backend, 256), 1e-5)) if has_post_norm else PLAIN
    outputs = plan_layer(backend, layout, formats, is_decode=True, samples=False, normed=True, epilogue=epilogue)
    calls = [call for call in Tensor.schedule_linear(*outputs).src if call.src[0].op is Ops.SINK]
    programs = [to_program(call.src[0], make_renderer("CUDA sm_90")) for call in calls]
    written: set[UOp] = set()
    chained = 0
    for call, program in zip(calls, programs, strict=True):
        check_limits(call.src[0], "CUDA sm_90")
        source = program.src[2].arg
        body = source[source.index("__global__") :].split("{", 1)[1]
        early, wait, _ = body.partition(AWAIT_PREVIOUS)
        buffers = [argument.buf_uop for argument in call.src[1:]]
        if wait:
            chained += 1
            assert not re.search(r"^ *\*\(.*data\d+_.* = ", early, re.MULTILINE), f"{call.src[0].arg.name} writes early"
            for slot, buffer in enumerate(buffers):
                if buffer in written:
                    assert f"(data{slot}_" not in early, f"{call.src[0].arg.name} touches argument {slot} early"
        written |= {buffers[slot] for slot in program.arg.outs}
    assert chained > (5 if tokens == 1 else 7)  # a layer's, and the head's


def test_what_takes_the_general_kernels_says_so(caplog: pytest.LogCaptureFixture) -> None:
    formats = ("float16", "float16")
    with caplog.at_level(logging.WARNING):
        backend = rendered("CUDA")
        plan_layer(backend, StepLayout(3, 3, 2, 16), formats, is_decode=True)
        assert not caplog.messages and not backend.coverage.lines() and backend.coverage.count == 0
        plan_layer(backend, StepLayout(3, 3, 4, 8), formats, is_decode=True)
        plan_layer(backend, StepLayout(3, 3, 2, 16), formats, is_decode=True, features=FEATURES["all"])
        rope = (("rope", Rope(10000.0, num_dims=24)),)
        plan_layer(backend, StepLayout(3, 3, 2, 16), formats, is_decode=True, features=rope)
        plan_layer(rendered("CUDA", "float32"), StepLayout(3, 3, 2, 16), formats, is_decode=True)
        old = FusedGpuBackend(backend.device, "float16", Lanes("CUDA"))  # before sm_80
        plan_layer(old, StepLayout(3, 3, 2, 16), formats, is_decode=True)
    assert old.coverage.lines()[1] == "layer 0: attention with no matrix unit for float16 takes the general kernel"
    assert backend.coverage.lines() == [
        "layer 0: attention with blocks of 8 tokens takes the general kernel",
        "layer 0: attention with rope of 24 dimensions takes the general kernel",
    ]
    assert backend.coverage.count == 2
    assert "qkv: a product with several rows, and no matrix unit for float32 takes the general kernel" in str(
        caplog.messages
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_residual_after_an_activation_is_not_left_out(tokens: int) -> None:
    """The fused kernels of gate and up add no residual."""
    backend = rendered("CUDA")
    x, residual = (upload(backend, normal(tokens, cols)) for cols in (256, 64))
    gate_up = backend.gate_up(make_host("float16", 64, 256), make_host("float16", 64, 256))
    run_product(backend, x, gate_up, tokens, epilogue=Epilogue(activation="silu", residual=residual))
    assert backend.coverage.lines() == ["test: a product with a residual after an activation takes the general kernel"]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 9), (128, 9), (128, 16), (128, 17), (256, 250), (128, 256)])
def test_a_split_without_tokens_reads_a_whole_tile_of_the_context(low: int, high: int) -> None:
    """Keys are loaded before it is known that none are needed: from the last slot of the pool on, beyond its end."""
    first = existing_tile(UOp.const(low), UOp.const(high))
    assert isinstance(first, UOp)
    start = first.simplify().arg
    assert start % 16 == 0 and start < max(1, high)
    assert start == low or low >= high


def decode_spec(heads: int, kv_heads: int, dim: int, context: int, tokens: int = 1) -> DecodeSpec:
    layout, mma = StepLayout(tokens, tokens, context // 16, 16), Mma("CUDA", dtypes.half)
    shape: dict[str, Any] = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, num_blocks=9)
    own: dict[str, Any] = dict(qkv_cols=((heads + 2 * kv_heads) * dim,), qkv_partials=(1,))
    return DecodeSpec(lanes=Lanes("CUDA", (dtypes.half,), True), mma=mma, layout=layout, **shape, **own)


@pytest.mark.parametrize("context", [1024, 32768])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (28, 4), (8, 4), (32, 32), (64, 8), (128, 128)])
def test_the_parts_of_a_rows_context_take_one_turn(heads: int, kv_heads: int, context: int) -> None:
    spec = decode_spec(heads, kv_heads, 128, context)
    assert 1 <= spec.num_splits * spec.head_groups <= MULTIPROCESSORS
    assert 2 * spec.num_splits * spec.head_groups > MULTIPROCESSORS or spec.num_splits == (8 if context == 1024 else 32)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (32, 8, 64), (28, 4, 128), (32, 32, 128)])
def test_graphs_for_short_contexts_have_no_splits_that_are_always_idle(heads: int, kv_heads: int, dim: int) -> None:
    whole = decode_spec(heads, kv_heads, dim, 8192)
    assert whole.is_long and whole.fetches_ahead
    for limit in short_contexts(1, False, longest=0):
        spec = decode_spec(heads, kv_heads, dim, limit)
        assert not spec.fetches_ahead and spec.num_splits <= whole.num_splits
        assert spec.num_splits * SHORTEST_SPAN <= limit
    for rows in (2, 5, 8):
        (limit,) = short_contexts(rows, True, longest=0)
        spec = replace(decode_spec(heads, kv_heads, dim, limit, rows), reads_own=True)
        assert not spec.is_split and not spec.fetches_ahead
        (limit,) = short_contexts(rows, False, longest=0)
        assert not decode_spec(heads, kv_heads, dim, limit, rows).is_split


def test_only_cuda_has_graphs_for_short_contexts() -> None:
    llama, small = (LayerKind(32, 8, dim, Rope(10000.0)) for dim in (128, 64))
    hopper, older, metal = rendered("CUDA"), rendered("CUDA"), rendered("METAL")
    hopper.has_wgmma = True
    found = [backend.short_contexts([llama], 1, False) for backend in (hopper, older, metal)]
    assert found == [(512, 1024, 8192), (512, 1024), ()]
    assert hopper.short_contexts([small], 1, False) == (512, 1024)
    assert [hopper.short_contexts([llama], rows, rows == 5) for rows in (2, 5, 8, 9)] == [(256,), (1024,), (256,), ()]
    recurrent = replace(llama, state=StateKind(2, 2, 16, 16, 4, 1e-6))
    assert hopper.short_contexts([recurrent], 1, False) == ()
    own: dict[str, Any] = dict(lanes=Lanes("METAL"), mma=Mma("METAL", dtypes.half))
    kinds = [replace(decode_spec(32, 8, 128, longest), **own) for longest in (512, 8192)]
    assert len({(spec.num_splits, spec.num_warps, spec.tiles_ahead, spec.fetches_ahead) for spec in kinds}) == 1


@pytest.mark.parametrize(
    ("dim", "context", "is_ahead"),
    [(64, 4096, True), (128, 4096, True), (128, 1024, False), (96, 4096, False), (256, 4096, False)],
)
def test_keys_of_long_contexts_are_fetched_a_pass_ahead(dim: int, context: int, is_ahead: bool) -> None:
    spec = decode_spec(8, 2, dim, context)
    assert spec.fetches_ahead == is_ahead and spec.in_words(spec.kv.keys) == (dim != 96)
    assert spec.knobs().get("fetches_ahead", (0,)) == ((0,) if dim in (96, 256) else (0, 1))
    for one in candidates(spec):
        assert one.shared_bytes <= one.lanes.shared_bytes


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lanes_store_and_load_heads_in_different_banks(dim: int) -> None:
    """Of eight banks of 16 bytes: sixteen lanes store 16 bytes each in two turns, eight load in one."""
    spec = decode_spec(32, 8, dim, 512)
    lanes = [(head, slot) for head in range(spec.tile_heads) for slot in range(4)]

    def state_at(head: int, column: int, index: int) -> int:
        place = spec.state_place(spec.value_dim(UOp.const(column, dtypes.weakint), index)).simplify()
        return head * spec.state_stride + int(place.arg)

    for span, start in product(range(2), range(0, dim // RUN, 4)):
        banks = Counter(state_at(head, 2 * slot + span, start) // 4 % 8 for head, slot in lanes)
        assert max(banks.values()) == 2
    for chunk in range(spec.chunks if spec.stages_heads else 0):
        places = [head * spec.staged_stride + chunk * spec.chunk_dims + slot * RUN for head, slot in lanes[:8]]
        assert len({place // RUN % 8 for place in places}) == 8


@pytest.mark.parametrize(
    ("rows", "kv_heads", "dim", "is_streamed"),
    [
        (1, 8, 128, False),
        (8, 8, 128, False),
        (63, 8, 128, False),
        (64, 8, 128, True),
        (256, 8, 64, False),
        (8, 4, 256, True),
    ],
)
def test_many_threadgroups_or_wide_heads_stream_long_contexts(
    rows: int, kv_heads: int, dim: int, is_streamed: bool
) -> None:
    spec = decode_spec(4 * kv_heads, kv_heads, dim, 8192, rows)
    fields = ("lanes", "mma", "layout", "num_heads", "num_kv_heads", "head_dim", "num_blocks", "qkv_cols")
    stream = StreamedAttentionSpec(qkv_partials=(1,), **{name: getattr(spec, name) for name in fields})
    assert stream.is_worthwhile == is_streamed
    longer = replace(stream, layout=StepLayout(rows, rows, 1024, 16))
    assert rows > 1 or longer.is_worthwhile, "one row only where contexts may be longer"
    assert spec.fetches_ahead == (rows <= 64 and dim < 256)
    assert not replace(stream, layout=StepLayout(rows, rows, 64, 16)).is_worthwhile


def test_attention_reads_qkv_after_its_epilogue() -> None:
    """The attention kernel adds up partial products, but does not know of what follows them, such as a bias."""
    backend, layout, cols = rendered("CUDA"), StepLayout(3, 3, 2, 16), 12 * 64
    kind = LayerKind(8, 2, 64, Rope(10000.0))
    pool = backend.make_pool(pool_groups([kind]), 5, layout.block_size, "float16")
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode=True)
    x, matrix = unwritten(backend, 3 * 256, dtypes.half), backend.matrix(make_host("float16", cols, 256))

    def kernels(epilogue: Epilogue) -> list[str]:
        qkv = backend.linear("qkv", x, [matrix], 3, None, epilogue)
        heads = backend.attend(qkv, plan_attention_layer(backend, kind, [cols]), step)
        return [kernel.arg.name.partition("_")[0] for kernel in kernels_of([heads])]

    plain = kernels(PLAIN)
    assert plain[-1] == "decode" and not any(name.startswith("sum") for name in plain)
    biased = kernels(Epilogue(bias=unwritten(backend, cols)))
    assert len(biased) == len(plain) + 1 and biased[-2].startswith("sum") and biased[-1] == "decode"


@pytest.mark.parametrize(("kind", "cols"), [("METAL", 14336), ("CUDA", 14336), ("CUDA", 18944)])
def test_long_rows_of_4_bits_stay_in_the_quantized_kernel(kind: str, cols: int) -> None:
    """The feed-forward's last product of 7B and 8B models: with gaps between its runs, x would not fit."""
    fields: dict[str, Any] = dict(
        name="down", lanes=Lanes(kind), mma=Mma(kind, dtypes.half), num_rows=4096, num_cols=cols
    )
    for fmt in ("Q4_0", "Q4_K"):
        spec = QuantizedVectorSpec(format=QUANTIZED_KINDS[fmt].format, **fields)
        assert fits_quantized_vector(spec)
        assert spec.shared_bytes <= spec.lanes.shared_bytes


def test_a_quantized_row_is_rescaled_where_it_may_exceed_float16() -> None:
    """With bfloat16 activations, unless it is normed. Products in float32 keep their precision, in another kernel."""
    wanted: dict[str, dict[str, bool]] = {
        "float16": {"qkv": False, "attention_out": False, "gate_up": False, "down": False, "lm_head": False},
        "bfloat16": {"qkv": False, "attention_out": True, "gate_up": False, "down": True, "lm_head": False},
        "float32": {},
    }
    for dtype, rescaled in wanted.items():
        with current.watching() as asked:
            plan_layer(rendered("CUDA", dtype), StepLayout(1, 1, 2, 16), ("Q4_K", "Q6_K"), is_decode=True)
        packed = [spec for spec in asked.values() if isinstance(spec, QuantizedVectorSpec)]
        assert {spec.name: spec.rescales_input for spec in packed} == rescaled


@pytest.mark.parametrize("kind", swept(KINDS, ["CUDA"]))  # METAL's run in tests/metal
def test_a_few_rows_of_bfloat16_models_are_rounded_where_they_are_written(kind: str) -> None:
    """CUDA's products read them as they are stored; METAL's unit takes values, which each threadgroup rounds."""
    backend = rendered(kind, "bfloat16")
    (matrix,) = backend.stacked([make_host("bfloat16", 32, 256)])
    norm = Norm(unwritten(backend, 256), 1e-5)
    (out,) = backend.linear("qkv", unwritten(backend, 16 * 256), [matrix], 16, norm)
    kernel = kernels_of([out.partials if isinstance(out, Summed) else out])[-1]
    source = to_program(kernel, make_renderer(KINDS[kind])).src[2].arg
    before, _, arguments = source.partition("void __launch_bounds__" if kind == "CUDA" else "kernel void")
    assert f"{'half' if kind == 'CUDA' else 'float'}* data2_" in arguments
    assert ("f32.bf16.bf16.f32 {%0" in arguments) == (kind == "CUDA")
    assert kind != "CUDA" or "cuda_fp16.h" in before  # which declares half


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("operation", SHAPES)
@pytest.mark.parametrize("fmt", ["float32", *QUANTIZED])
def test_a_row_of_float32_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, operation: str
) -> None:
    case = (fmt, 1, operation, *SHAPES[operation])
    difference = largest_difference(
        multiply(FusedGpuBackend(device, "float32", lanes), *case), multiply(reference, *case)
    )
    assert difference < TOLERANCE["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("operation", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 33, 64, 70])
@pytest.mark.parametrize("fmt", ["float16", "bfloat16", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0"])
def test_rows_in_half_precision_equal_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int, operation: str
) -> None:
    dtype = "bfloat16" if fmt == "bfloat16" else "float16"
    case = (fmt, tokens, operation, *SHAPES[operation])
    difference = largest_difference(multiply(FusedGpuBackend(device, dtype, lanes), *case), multiply(reference, *case))
    print(f"{case}: {difference:.1e}")
    assert difference < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "cols"), [("linear_add", 14336), ("linear_add", 18944), ("norm_linear", 4096)])
@pytest.mark.parametrize("fmt", ["float16", "Q4_0", "Q4_K"])
def test_a_row_of_many_columns_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, operation: str, cols: int
) -> None:
    case, backend = (fmt, 1, operation, 96, cols), FusedGpuBackend(device, "float16", lanes)
    assert largest_difference(multiply(backend, *case), multiply(reference, *case)) < TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "tokens", "operation"),
    [pytest.param(*case, marks=() if case in ROTATED else pytest.mark.sweep) for case in ALL_FORMATS],
)
def test_every_format_is_read_by_every_kernel(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int, operation: str
) -> None:
    """All of them: DEV=CUDA python -m pytest -m gpu tests/ops/gpu/test_fused.py; `-m "gpu and not sweep"`: one
    operation of each."""
    case, backend = (fmt, tokens, operation, *SHAPES[operation]), FusedGpuBackend(device, "float16", lanes)
    difference = largest_difference(multiply(backend, *case), multiply(reference, *case))
    print(f"{case}: {difference:.1e}")
    assert difference < TOLERANCE["float16"]
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fmt", ["affine4_g64-bfloat16", "W4A16-bfloat16", "MXFP4-e8m0", "FP8-float32"])
def test_formats_beside_bfloat16_activations_equal_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int
) -> None:
    case, backend = (fmt, tokens, "norm_linear", *SHAPES["norm_linear"]), FusedGpuBackend(device, "bfloat16", lanes)
    difference = largest_difference(multiply(backend, *case), multiply(reference, *case))
    assert difference < TOLERANCE["bfloat16"]
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [1280, 10240])
@pytest.mark.parametrize("fmt", ["Q4_K", "Q8_0", "affine4_g64-bfloat16"])
def test_a_row_that_exceeds_float16_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, cols: int
) -> None:
    """No norm limits what attention_out and down read. One column is larger than all others."""
    backend, hosts = FusedGpuBackend(device, "bfloat16", lanes), [make_host(fmt, 64, cols, seed=i) for i in range(2)]
    for size in (1e6, 1.0, 1e-6):
        x, bias = normal(1, cols, seed=3) * size, normal(64, seed=4) * size
        x[0, 77] = 30 * size

        def run(ops: Backend, epilogue: Epilogue, x: np.ndarray = x) -> np.ndarray:
            matrix = ops.gate_up(*hosts) if epilogue.activation is not None else ops.stacked(hosts[:1])[0]
            return read(ops, run_product(ops, upload(ops, x), matrix, 1, epilogue=epilogue), 1)

        def added(ops: Backend, bias: np.ndarray = bias) -> Epilogue:
            return Epilogue(residual=upload(ops, bias), bias=ops.device.upload(bias), scale=0.7)

        for make in (added, lambda ops: Epilogue(activation="silu")):
            got, expected = (run(ops, make(ops)) for ops in (backend, reference))
            assert largest_difference(got, expected) < TOLERANCE["float16"], size
        zero = np.zeros_like(x)  # whose RMS is 0
        got, expected = run(backend, added(backend), zero), run(reference, added(reference), zero)
        np.testing.assert_allclose(got, expected, rtol=1e-6)  # a device may multiply and add at once
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 8, 16, 64, 700])
@pytest.mark.parametrize(
    ("fmt", "down_fmt"), [("Q4_K", "Q4_K"), ("affine4_g64-bfloat16", "Q6_K"), ("Q8_0", "bfloat16")]
)
def test_hidden_values_of_a_bfloat16_model_may_exceed_float16(
    device: DeviceHandle, lanes: Lanes, fmt: str, down_fmt: str, tokens: int
) -> None:
    """Products with quantized weights compute in float16 there, as exactly as in a float16 model."""
    backend = FusedGpuBackend(device, "bfloat16", lanes)
    difference = largest_difference(*wide_feed_forward(backend, fmt, down_fmt, tokens, 4096))
    print(f"{fmt} {down_fmt} {tokens}: {difference:.1e}")
    assert difference < TOLERANCE["bfloat16" if down_fmt == "bfloat16" else "float16"]
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", EPILOGUES)
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("fmt", ["float16", "Q4_K"])
def test_what_follows_a_product_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, tokens: int, operation: str
) -> None:
    case, backend = (fmt, tokens, operation, 96, 512), FusedGpuBackend(device, "float16", lanes)
    assert largest_difference(multiply(backend, *case), multiply(reference, *case)) < TOLERANCE["float16"]
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", NORMED_CHAINS)
@pytest.mark.parametrize(("fmt", "dtype"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("Q4_K", "bfloat16")])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_a_norm_after_a_product_equals_the_reference(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str, dtype: str, tokens: int, operation: str
) -> None:
    case, backend = (fmt, tokens, operation, 768, 512), FusedGpuBackend(device, dtype, lanes)
    assert largest_difference(multiply(backend, *case), multiply(reference, *case)) < TOLERANCE[dtype]
    assert not backend.coverage.lines()


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["float16", "Q4_K"])
def test_rows_of_a_table_are_normed_as_they_are_read(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, fmt: str
) -> None:
    layout, table = StepLayout(5, 5, 1, 16), make_host(fmt, 96, 768, seed=1)
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = [3, 95, 0, 96, 17]  # one is beyond the table

    def run(backend: Backend) -> np.ndarray:
        norm = Norm(backend.device.upload(normal(768, seed=2)), 1e-5)
        x = backend.embed(backend.matrix(table), make_step_of(backend, layout, buffer))
        out = run_product(backend, x, backend.matrix(make_host(fmt, 64, 768, seed=3)), 5, norm)
        return np.concatenate([read(backend, tensor, 5) for tensor in (out, x)], axis=1)

    difference = largest_difference(run(FusedGpuBackend(device, "float16", lanes)), run(reference))
    assert difference < TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_replayed_chain_of_kernels_equals_the_same_kernels_one_by_one(
    device: DeviceHandle, lanes: Lanes, tokens: int
) -> None:
    """Many layers, so that a kernel which did not wait for the one before would read what an earlier one left."""
    backend = FusedGpuBackend(device, "float16", lanes)
    x, norm = upload(backend, normal(tokens, 512, seed=1)), Norm(device.upload(normal(512, seed=2)), 1e-5)
    layers = [
        (
            backend.gate_up(make_host("Q4_0", 1024, 512, seed=i), make_host("Q4_0", 1024, 512, seed=i + 50)),
            backend.stacked([make_host("float16", 512, 1024, seed=i + 100)])[0],
        )
        for i in range(8)
    ]

    def trace() -> Tensor:
        out = x
        for gate_up, down in layers:
            states = run_product(backend, out, gate_up, tokens, norm, Epilogue(activation="silu"))
            out = run_product(backend, states, down, tokens, epilogue=Epilogue(residual=out))
        return backend.whole(out).contiguous().realize()

    expected = trace().numpy()
    step = record(trace)
    run = make_replay(device, step)
    for _ in range(20):
        run()
    device.wait()
    np.testing.assert_array_equal(step.output.numpy(), expected)


# -- attention ---------------------------------------------------------------------------------------------------------

CASES = [
    DECODE[0],
    Case(8, 2, 64, StepLayout(1, 1, 200, 16), True, "float16"),  # the context in parts, all of them in use
    Case(32, 8, 64, StepLayout(3, 3, 40, 16), True, "float16"),
    Case(8, 2, 64, StepLayout(3, 3, 200, 16), True, "float16"),  # on CUDA the last threadgroup joins the parts
    Case(16, 8, 128, StepLayout(2, 2, 300, 16), True, "float16"),
    Case(8, 1, 128, StepLayout(2, 2, 4, 32), True, "float16", (8, 2)),
    Case(4, 4, 64, StepLayout(40, 40, 5, 16), True, "float16", (4, 4, 4)),
    Case(16, 2, 128, StepLayout(1, 1, 40, 16), True, "float16"),
    Case(16, 8, 128, StepLayout(1, 1, 40, 16), True, "float16", normed=True),  # Qwen3's
    Case(16, 8, 128, StepLayout(5, 5, 9, 16), True, "float16", normed=True),
    Case(6, 2, 64, StepLayout(36, 36, 5, 16), True, "float16", (6, 2, 2), normed=True),
]


CASES += [random_case(seed, is_decode=True) for seed in range(3)]
WINDOW, ALL = (("window", 37), ("score_scale", 0.3)), (("window", 700), ("softcap", 2.0), ("has_bias", True))
CASES += [
    Case(8, 2, 64, StepLayout(1, 1, 200, 16), True, "float16", features=WINDOW),  # parts, and few of them in use
    Case(32, 8, 64, StepLayout(3, 3, 40, 16), True, "float16", normed=True, features=WINDOW),
    Case(8, 2, 64, StepLayout(3, 3, 200, 16), True, "float16", (8, 2, 2), features=ALL),
    Case(16, 8, 128, StepLayout(2, 2, 300, 16), True, "float16", features=(("window", 3000), ("has_bias", True))),
    Case(4, 4, 64, StepLayout(40, 40, 5, 16), True, "float16", features=(("rope", None), ("softcap", 1.5))),
]
CASES += [fused_case(name, StepLayout(3, 3, 12, 16), is_decode=True) for name in FUSED]
CASES += [fused_case(name, StepLayout(1, 1, 40, 16), is_decode=True) for name in ("gemma 3", "glm 4", "all")]
CASES.append(fused_case("gpt-oss", StepLayout(2, 2, 200, 16), is_decode=True))  # on CUDA the last threadgroup joins
CASES.append(Case(4, 2, 80, StepLayout(3, 3, 12, 16), True, "float16", (4, 2, 2)))


def attend(
    backend: Backend,
    case: Case,
    buffer: np.ndarray,
    history: tuple[np.ndarray, np.ndarray],
    *,
    reader: Matrix | None = None,
) -> tuple[Result, Tensor]:
    size = case.layout.block_size
    pool = make_pool(backend, case.kind, size, case.dtype, *history)
    before = read_pool(backend, case.kind, size, pool)
    qkv = normal(case.layout.num_tokens, sum(case.parts), seed=3)
    parts = [backend.device.upload(part) for part in np.split(qkv, np.cumsum(case.parts)[:-1], axis=1)]
    step = make_step_of(backend, case.layout, buffer, pool, is_decode=case.is_decode)
    out = backend.attend(parts, replace(make_layer(backend, case), reader=reader), step)
    rows = read(backend, out, case.layout.num_tokens).reshape(-1, case.heads, case.dim)
    return Result(rows, before, read_pool(backend, case.kind, size, pool)), out


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoding_equals_the_reference_and_writes_its_slots_alone(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case
) -> None:
    backend, size = FusedGpuBackend(device, "float16", lanes), case.layout.block_size
    for seed, pieces in enumerate(decode_pieces(case)):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        (got, out), (expected, _) = (attend(ops, case, buffer, history) for ops in (backend, reference))
        assert not backend.coverage.lines()
        live = len(pieces)
        assert largest_difference(got.out[:live], expected.out[:live]) < TOLERANCE["float16"]
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
            np.testing.assert_allclose(now[slots], wanted[slots], rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(now[others], then[others])  # padding wrote to the dummy block alone
        if case.layout.num_tokens == 1:  # the projection reads the parts
            host = make_host("float16", 64, case.heads * case.dim, seed=5)
            zero = upload(backend, np.zeros(64, np.float32))
            projected = run_product(backend, out, backend.matrix(host), 1, epilogue=Epilogue(residual=zero))
            assert (
                largest_difference(read(backend, projected, 1)[0], to_float32(host) @ expected.out.reshape(-1))
                < TOLERANCE["float16"]
            )


@pytest.mark.gpu
def test_a_quantized_product_beside_bfloat16_reads_the_parts_of_a_context(device: DeviceHandle, lanes: Lanes) -> None:
    case, backend = CASES[1], FusedGpuBackend(device, "bfloat16", lanes)
    host, residual = make_host("Q4_K", 64, case.heads * case.dim, seed=5), upload(backend, np.zeros(64, np.float32))
    for seed, pieces in enumerate(decode_pieces(case)):
        got, out = attend(backend, case, make_step(case.layout, pieces, seed=seed), make_history(case))
        projected = run_product(backend, out, backend.matrix(host), 1, epilogue=Epilogue(residual=residual))
        expected = to_float32(host) @ got.out.reshape(-1)
        assert largest_difference(read(backend, projected, 1)[0], expected) < TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("is_decode", [True, False])
def test_attention_beside_bfloat16_returns_what_its_reader_takes(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, is_decode: bool
) -> None:
    case = Case(32, 8, 128, StepLayout(8, 8, 12, 16) if is_decode else StepLayout(64, 2, 12, 16), is_decode, "float16")
    backend = FusedGpuBackend(device, "bfloat16", lanes)
    pieces = [Piece(40), Piece(9)] if is_decode else [Piece(20, 30), Piece(8, 4)]
    buffer, history, live = make_step(case.layout, pieces), make_history(case), sum(piece.count for piece in pieces)
    readers = [backend.matrix(make_host(fmt, 64, 4096, seed=5)) for fmt in ("Q4_K", "bfloat16")]
    expected, _ = attend(reference, case, buffer, history)
    for reader, tolerance in zip((None, *readers), ("float16", "float16", "bfloat16"), strict=True):
        got, out = attend(backend, case, buffer, history, reader=reader)
        assert isinstance(out, Halves) == (reader is not None)
        assert largest_difference(got.out[:live], expected.out[:live]) < TOLERANCE[tolerance]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.kind.window], ids=lambda case: case.name)
def test_blocks_before_the_window_are_not_read(device: DeviceHandle, lanes: Lanes, case: Case) -> None:
    backend, history = FusedGpuBackend(device, "float16", lanes), make_history(case)
    for seed, pieces in enumerate(decode_pieces(case)):
        buffer = make_step(case.layout, pieces, seed=seed)
        clean, _ = attend(backend, case, buffer, history)
        spoiled, _ = attend(backend, case, *forget_before_windows(case, buffer, pieces, history))
        np.testing.assert_array_equal(spoiled.out[: len(pieces)], clean.out[: len(pieces)])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_layer_reads_the_keys_of_another(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, tokens: int, window: int | None
) -> None:
    """Its own token's are among them, written by the same step."""
    is_decode = tokens < 40
    layout = StepLayout(tokens, min(tokens, 3), 200 if tokens == 1 else 6, 16)
    case = Case(4, 2, 64, layout, is_decode, "float16", (4, 2, 2), features=(("window", window),))
    pieces = [Piece(40), Piece(0), Piece(95)][: layout.num_seqs] if is_decode else [Piece(20, 30), Piece(0, 8)]
    buffer, history = make_step(layout, pieces), make_history(case)
    backend, found = FusedGpuBackend(device, "float16", lanes), []
    for ops in (backend, reference):
        pool = make_pool(ops, case.kind, layout.block_size, "float16", *history)
        step = make_step_of(ops, layout, buffer, pool, is_decode=is_decode)
        writer = make_layer(ops, case)
        qkv = normal(tokens, sum(case.parts), seed=3)
        parts = [ops.device.upload(part) for part in np.split(qkv, np.cumsum(case.parts)[:-1], axis=1)]
        read(ops, ops.attend(parts, writer, step), tokens)
        reader = replace(writer, index=1, kind=replace(case.kind, kv_layer=0), qkv_cols=case.parts[:1])
        query = ops.device.upload(normal(tokens, case.parts[0], seed=7))
        found.append(read(ops, ops.attend([query], reader, step), tokens)[: sum(piece.count for piece in pieces)])
    assert not backend.coverage.lines()
    assert largest_difference(*found) < TOLERANCE["float16"]


VERIFYING = [
    Case(9, 3, 64, StepLayout(4, 4, 12, 16), False, "float16", (12, 3)),
    Case(8, 2, 64, StepLayout(5, 5, 200, 16), False, "float16", (8, 2, 2)),  # split on CUDA
    Case(16, 8, 128, StepLayout(6, 6, 12, 32), False, "float16", normed=True),
    Case(32, 8, 128, StepLayout(4, 4, 64, 16), False, "float16"),
    *[fused_case(name, StepLayout(4, 4, 12, 16), is_decode=False) for name in ("gemma 3", "glm 4", "all")],
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [replace(case, verifies=True) for case in VERIFYING], ids=lambda case: case.name)
def test_rows_that_verify_drafts_attend_to_each_other(
    device: DeviceHandle, lanes: Lanes, reference: ReferenceBackend, case: Case
) -> None:
    """Across a block's border, beside another sequence, and alone; their slots alone are written."""
    backend, size, tokens = FusedGpuBackend(device, "float16", lanes), case.layout.block_size, case.layout.num_tokens
    longest = case.layout.max_blocks * size
    batches = [[Piece(size - 2, tokens - 1), Piece(70)], [Piece(longest - tokens, tokens)], [Piece(0, 2), Piece(90)]]
    for seed, pieces in enumerate(batches):
        buffer, history = make_step(case.layout, pieces, seed=seed), make_history(case)
        got, expected = (attend_and_read(ops, case, buffer, history) for ops in (backend, reference))
        assert not backend.coverage.lines()
        live = sum(piece.count for piece in pieces)
        assert largest_difference(got.out[:live], expected.out[:live]) < TOLERANCE["float16"]
        slots = case.layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(size, len(history[0])), slots)
        for now, then, wanted in zip(got.after, got.before, expected.after, strict=True):
            np.testing.assert_allclose(now[slots], wanted[slots], rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(now[others], then[others])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_another_request_left_behind_is_not_read(device: DeviceHandle, lanes: Lanes, bad: float) -> None:
    case, backend = CASES[2], FusedGpuBackend(device, "float16", lanes)
    buffer, history = make_step(case.layout, [Piece(9), Piece(40)]), make_history(case)
    clean, _ = attend(backend, case, buffer, history)
    size, tables = case.layout.block_size, case.layout.views(buffer)["block_tables"][0]
    own = [tables[i][p // size] * size + p % size for i, end in ((0, 10), (1, 41)) for p in range(end)]
    for plain in history:
        plain[np.setdiff1d(np.arange(size, len(plain)), own)] = bad
    dirty, _ = attend(backend, case, buffer, history)
    np.testing.assert_array_equal(dirty.out[:2], clean.out[:2])
