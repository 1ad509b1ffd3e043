"""Every operation of the backend that the product chooses on METAL, against the reference on the CPU: random shapes,
ragged contexts, rows of padding. What tests/ops has for GPUs runs on the simulator too, in a quarter of an hour:
DEV=METAL python -m pytest -p tests.metal.plugin -m gpu tests/ops"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.metal.simulator import Settings, watching_device_memory
from tests.sweeps import swept

if TYPE_CHECKING:
    from tinyvllm.ops.backend import Backend

pytestmark = pytest.mark.timeout(600)

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of the largest value
DTYPE_OF = {"float32": "float32", "bfloat16": "bfloat16"}  # of activations, by a matrix's format: else float16
OPERATIONS = ("norm_linear", "norm_gated", "linear_add")
PRODUCTS = [
    (fmt, tokens, OPERATIONS[(index + place) % 3])
    for index, fmt in enumerate(("float16", "bfloat16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "float32"))
    for place, tokens in enumerate((1, 5) if fmt[0] == "Q" else (1, 3, 70))
]
# of every kind of codes; tests/ops/gpu has all formats
OTHERS = ("affine3_g64-float16", "MXFP4-e8m0", "NVFP4-e4m3", "FP8-float32", "IQ4_XS-float16", "W4A16-bfloat16")
PRODUCTS += [(fmt, 1 + index % 2, OPERATIONS[index % 3]) for index, fmt in enumerate(OTHERS)]
PRODUCTS += [("Q4_K", 70, "norm_gated"), ("MXFP4-e8m0", 70, "norm_linear")]
# of every size of METAL's tiles
PRODUCTS += [("Q4_K", 12, "norm_linear"), ("float16", 20, "linear_add"), ("bfloat16", 9, "norm_gated")]
PRODUCTS += [("Q6_K", 33, "linear_add"), ("Q8_0", 64, "norm_gated"), ("float32", 8, "norm_linear")]
# by default: one row, some and many; values, and codes (of a table: the experts below)
DEFAULT_PRODUCTS = [
    case for case in PRODUCTS if case[:2] in {("float16", 70), ("bfloat16", 3), ("float32", 1), ("Q4_0", 5)}
]


def backends(fmt: str, heads: tuple[int, int, int] = (4, 2, 64)) -> tuple[Backend, Backend]:
    """What the product takes on this device, and the reference."""
    from tinyvllm.config import LayerKind
    from tinyvllm.device.handle import DeviceHandle, open_device
    from tinyvllm.ops.backends import make_backend
    from tinyvllm.ops.reference import ReferenceBackend

    dtype = DTYPE_OF.get(fmt, "float16")
    chosen = make_backend(open_device(), dtype, dtype, [LayerKind(*heads)], dequantize=False)
    return chosen, ReferenceBackend(DeviceHandle("CPU", has_threads=False, is_unified=True, cores=("CPU",)))


def activations(backend: Any, values: np.ndarray) -> Any:
    """In the backend's own dtype."""
    tensor = backend.device.upload(values)
    return tensor.cast(backend.float).contiguous().realize() if hasattr(backend, "float") else tensor


def multiply(backend: Backend, fmt: str, tokens: int, operation: str, rows: int, cols: int) -> np.ndarray:
    from tests.ops.builders import make_host, normal, run_product
    from tinyvllm.ops.backend import Epilogue, Norm

    x = activations(backend, normal(tokens, cols, seed=1))
    norm = Norm(backend.device.upload(normal(cols, seed=2)), 1e-5)
    if operation == "norm_gated":
        matrix = backend.gate_up(make_host(fmt, rows, cols, seed=3), make_host(fmt, rows, cols, seed=4))
        out = run_product(backend, x, matrix, tokens, norm, Epilogue(activation="silu"))
    elif operation == "norm_linear":
        out = run_product(backend, x, backend.matrix(make_host(fmt, rows, cols, seed=5)), tokens, norm)
    else:
        residual = activations(backend, normal(tokens, rows, seed=6))
        matrix = backend.matrix(make_host(fmt, rows, cols, seed=5))
        out = run_product(backend, x, matrix, tokens, epilogue=Epilogue(residual=residual))
    (whole,) = backend.parts_of(out)
    return np.asarray(whole.float().numpy()).reshape(tokens, -1)


@pytest.mark.parametrize(("fmt", "tokens", "operation"), swept(PRODUCTS, DEFAULT_PRODUCTS), ids=str)
def test_products_equal_the_reference(fmt: str, tokens: int, operation: str) -> None:
    from tests.ops.builders import largest_difference

    rng = np.random.default_rng([tokens, *fmt.encode(), *operation.encode()])
    rows, cols = 32 * int(rng.integers(2, 9)), 256 * int(rng.integers(1, 4))
    found, expected = (multiply(ops, fmt, tokens, operation, rows, cols) for ops in backends(fmt))
    difference = largest_difference(found, expected)
    print(f"{fmt} {tokens}x{rows}x{cols}: {difference:.1e}")
    assert difference < TOLERANCE[DTYPE_OF.get(fmt, "float16")]


@pytest.mark.parametrize(
    ("fmt", "down_fmt", "tokens"),
    swept(
        [("Q4_K", "Q4_K", 3), ("affine4_g64-bfloat16", "Q6_K", 12), ("Q8_0", "bfloat16", 3), ("Q4_K", "Q4_K", 70)],
        [("affine4_g64-bfloat16", "Q6_K", 12)],
    ),
)
def test_hidden_values_of_a_bfloat16_model_may_exceed_float16(fmt: str, down_fmt: str, tokens: int) -> None:
    """Products with quantized weights compute in float16 there, as exactly as in a float16 model."""
    from tests.ops.builders import largest_difference
    from tests.ops.gpu.products import wide_feed_forward
    from tinyvllm.ops.gpu.fused import FusedGpuBackend

    backend, _ = backends("bfloat16")
    assert isinstance(backend, FusedGpuBackend)
    difference = largest_difference(*wide_feed_forward(backend, fmt, down_fmt, tokens, 512))
    assert difference < TOLERANCE["bfloat16" if down_fmt == "bfloat16" else "float16"]


@pytest.mark.parametrize("tokens", swept((5, 16), [5]))
def test_rows_are_put_in_order_and_back(tokens: int) -> None:
    """By the norm that writes them, and by kernels of their own: for products on other GPUs, which share both."""
    from tests.ops.builders import normal
    from tinyvllm.ops.backend import Norm
    from tinyvllm.ops.gpu.fused import FusedGpuBackend
    from tinyvllm.ops.gpu.token_order import order_rows_kernel, token_cols, token_place
    from tinyvllm.ops.kernel.body import run_kernel

    backend, cols = backends("float16")[0], 384
    assert isinstance(backend, FusedGpuBackend)
    x = activations(backend, normal(tokens, cols, seed=1))
    norm = Norm(backend.device.upload(normal(cols, seed=2)), 1e-5)
    plain = backend._normed_rows(x, norm, tokens)
    by_norm = backend._normed_rows(x, norm, tokens, orders=True)
    out = backend._empty(token_cols(tokens) * cols)
    (by_kernel,) = run_kernel(order_rows_kernel(backend.lanes, tokens, cols, False), [out], [plain])
    values = plain.numpy().reshape(tokens, cols)
    places = np.array([[token_place(t, col, token_cols(tokens)) for col in range(cols)] for t in range(tokens)])
    for ordered in (by_norm.halves, by_kernel):
        assert (ordered.numpy()[places] == values).all()
    assert (backend.whole(by_norm).numpy().reshape(tokens, cols) == values).all()


def test_recurrent_layers_equal_the_reference() -> None:
    """Prompts by chunks, among which others decode; then decoding."""
    from tests.ops.recurrent import States, Turn, check_steps, make_kind
    from tinyvllm.ops.step_inputs import StepLayout

    kind, (chosen, reference) = make_kind(2, 1, 32, 16, conv_width=2), backends("float16")
    mixed, decode = (StepLayout(tokens, seqs, 2, 16, has_states=True) for tokens, seqs in ((80, 3), (3, 3)))
    steps = [
        (mixed, [Turn(0, 40, 3, 3), Turn(7, 1, 4, 5), Turn(16, 36, 4, 6)], False),
        (decode, [Turn(40, 1, 3, 3), Turn(8, 1, 5, 7)], True),
    ]
    check_steps(States(reference, kind), States(chosen, kind, (1, 2, 3), padding=3), steps, TOLERANCE["float16"])


EXPERTS = [("float16", 1), ("MXFP4-e8m0", 3), ("float16", 70)]


@pytest.mark.parametrize(("fmt", "tokens"), swept(EXPERTS, EXPERTS[1:2]))
def test_experts_equal_the_reference(fmt: str, tokens: int) -> None:
    from tests.ops.builders import largest_difference, normal
    from tests.ops.experts import Case, make_kind, make_layer
    from tinyvllm.ops.backend import Epilogue, Norm

    kind = make_kind(activation="clamped_swiglu", has_router_bias=True, has_biases=True)
    case, found = Case(kind, fmt, tokens), []
    for ops in backends(fmt):
        x = activations(ops, normal(tokens, case.hidden, seed=1))
        norm, layer = Norm(ops.device.upload(normal(case.hidden, seed=2)), 1e-5), make_layer(ops, case)
        routing = ops.route(x, layer, tokens, norm)
        (out,) = ops.parts_of(ops.experts(x, routing, layer, tokens, norm, Epilogue(residual=x)))
        found.append((routing.ids.numpy().reshape(tokens, -1), out.float().numpy().reshape(tokens, -1)))
        assert not ops.coverage.lines()
    (ids, out), (expected_ids, expected) = found
    is_same = (ids == expected_ids).all(axis=1)  # a tie may fall on either side
    assert is_same.mean() > 0.9
    assert largest_difference(out[is_same], expected[is_same]) < 2 * TOLERANCE[DTYPE_OF.get(fmt, "float16")]


# (heads, kv heads, D), (T, R, M, block size), is decode, the pool's format
ATTENTION = [
    ((9, 3, 64), (1, 1, 8, 16), True, "float16"),
    ((9, 3, 64), (3, 3, 40, 16), True, "float16"),
    ((8, 1, 128), (2, 2, 4, 32), True, "float16"),
    ((4, 2, 256), (2, 2, 4, 16), True, "float16"),
    ((4, 2, 16), (3, 3, 5, 8), True, "float32"),
    ((9, 3, 64), (16, 3, 6, 16), False, "float16"),
    ((4, 2, 64), (70, 3, 6, 16), False, "float16"),
    ((4, 1, 32), (8, 2, 4, 8), False, "float32"),
    ((8, 1, 128), (2, 2, 4, 16), True, "q8_0/q4_0"),
    ((2, 1, 64), (2, 2, 4, 16), True, "q8_0/q4_0"),
    ((4, 2, 64), (20, 3, 6, 16), False, "q4_0/fp8_e4m3"),
]
NORMED = [  # the same with an RMSNorm of every head
    ((16, 8, 128), (1, 1, 8, 16), True, "float16"),  # Qwen3's
    ((6, 2, 64), (3, 3, 5, 16), True, "float16"),
    ((4, 2, 128), (35, 3, 4, 16), False, "float16"),
    ((4, 2, 24), (8, 3, 4, 8), False, "float32"),
]
CASES = [(*case, False) for case in ATTENTION] + [(*case, True) for case in NORMED]


# by default: prompts without matrix units, and normed; decoding quantized, and below with a window. The engine of
# test_engine.py has the others' kernels
DEFAULT_CASES = [CASES[i] for i in (9, 14)]


@pytest.mark.parametrize(("heads", "sizes", "is_decode", "dtype", "normed"), swept(CASES, DEFAULT_CASES), ids=str)
def test_attention_equals_the_reference_and_writes_its_slots_alone(
    simulator: Settings | None,
    heads: tuple[int, int, int],
    sizes: tuple[int, ...],
    is_decode: bool,
    dtype: str,
    normed: bool,
) -> None:
    """Where no row is padding, nobody reads what another thread of the same dispatch writes: padding may."""
    from tests.ops.attention import Case, attend, make_history
    from tests.ops.builders import Piece, largest_difference, make_step
    from tinyvllm.ops.step_inputs import StepLayout

    layout = StepLayout(*sizes)
    case = Case(*heads, layout, is_decode, dtype, normed=normed)
    rng = np.random.default_rng(sizes)
    longest, history = layout.max_blocks * layout.block_size, make_history(case)
    for is_full in (True, False):
        count = layout.num_seqs if is_full else max(1, layout.num_seqs - 1)
        lengths = np.ones(count, int)
        if not is_decode:
            lengths[0] = layout.num_tokens - count + 1 - (0 if is_full else 2)
        starts = [int(rng.integers(0, longest - length + 1)) for length in lengths]
        buffer = make_step(layout, [Piece(start, int(n)) for start, n in zip(starts, lengths, strict=True)], seed=count)
        chosen, reference = backends(dtype, heads)
        with watching_device_memory(simulator) if is_full else nullcontext():
            found = attend(chosen, case, buffer, history)
        expected = attend(reference, case, buffer, history)
        live = int(lengths.sum())
        tolerance = TOLERANCE.get(dtype, TOLERANCE["float16"])  # in float16, keys and values may be quantized
        assert largest_difference(found.out[:live], expected.out[:live]) < tolerance
        slots = layout.views(buffer)["slots"][0, :live]
        others = np.setdiff1d(np.arange(layout.block_size, len(history[0])), slots)  # block 0 is the dummy
        for now, then, wanted in zip(found.after, found.before, expected.after, strict=True):
            np.testing.assert_allclose(now[slots], wanted[slots], rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(now[others], then[others])


SUMMED = [((8, 2, 128), 2), ((8, 2, 128), 5), ((4, 2, 64), 3), ((2, 1, 256), 4)]


@pytest.mark.parametrize(("heads", "partials"), swept(SUMMED, SUMMED[1:2]), ids=str)
@pytest.mark.parametrize("normed", swept((False, True), (True,)))
def test_decoding_adds_up_the_partial_sums_of_qkv(heads: tuple[int, int, int], partials: int, normed: bool) -> None:
    from tests.ops.attention import Case, attend, make_history
    from tests.ops.builders import Piece, largest_difference, make_step
    from tinyvllm.ops.step_inputs import StepLayout

    layout = StepLayout(2, 2, 4, 16)
    case = Case(*heads, layout, True, "float16", normed=normed, partials=partials)
    buffer, history = make_step(layout, [Piece(37), Piece(5)]), make_history(case)
    found, expected = (attend(ops, case, buffer, history) for ops in backends("float16", heads))
    assert largest_difference(found.out, expected.out) < TOLERANCE["float16"]


WINDOWED = [((3, 3, 12, 16), True), ((40, 2, 12, 16), False)]


@pytest.mark.parametrize(("sizes", "is_decode"), swept(WINDOWED, WINDOWED[:1]), ids=str)
def test_blocks_before_the_window_are_not_read(sizes: tuple[int, ...], is_decode: bool) -> None:
    from tests.ops.attention import Case, attend, forget_before_windows, make_history
    from tests.ops.builders import Piece, make_step
    from tinyvllm.ops.step_inputs import StepLayout

    layout, heads = StepLayout(*sizes), (4, 2, 64)
    case = Case(*heads, layout, is_decode, "float16", features=(("window", 37),))
    pieces = [Piece(150), Piece(37), Piece(5)] if is_decode else [Piece(140, 39), Piece(100)]
    buffer, history = make_step(layout, pieces), make_history(case)
    chosen, _ = backends("float16", heads)
    clean = attend(chosen, case, buffer, history)
    spoiled = attend(chosen, case, *forget_before_windows(case, buffer, pieces, history))
    np.testing.assert_array_equal(spoiled.out, clean.out)


EMBEDDED = ("float16", "bfloat16", "Q4_0", "Q8_0", "Q6_K", *OTHERS[:4])


@pytest.mark.parametrize("fmt", swept(EMBEDDED, ("Q6_K", "MXFP4-e8m0")))
def test_rows_are_embedded_and_taken_as_by_the_reference(fmt: str) -> None:
    from tests.ops.builders import largest_difference, make_host, make_step, make_step_of
    from tinyvllm.ops.step_inputs import StepLayout

    layout, cols = StepLayout(6, 3, 2, 16), 256
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = [0, 99, 17, 5, 17, 1000]  # the last is beyond the table
    layout.views(buffer)["logit_rows"][:] = [4, 0, 2]
    out = []
    for ops in backends(fmt):
        step = make_step_of(ops, layout, buffer)
        rows = ops.embed(ops.matrix(make_host(fmt, 100, cols)), step)
        taken = ops.take_rows(rows, step, cols)
        out.append(np.concatenate([rows.float().numpy(), taken.float().numpy()]))
    assert largest_difference(*out) < TOLERANCE[DTYPE_OF.get(fmt, "float16")]


@pytest.mark.parametrize("vocab", swept((260, 5000), []))  # by default rendered, in tests/ops, and run in the engine
def test_sampled_tokens_and_logprobs_equal_the_reference(vocab: int) -> None:
    """Greedy, heated, each filter, held-back ids, logprobs asked for or not: a row of each in one step."""
    from tests.ops.builders import normal, sample

    logits = 3 * normal(8, vocab, seed=vocab)
    logits[5, 7] = np.nan
    columns: dict[str, Any] = {
        "temperature": [0.0, 1.0, 0.7, 1.3, 1.0, 0.0, 0.9, 1.0],
        "top_k": [0, 0, 20, 0, 0, 0, 5, 0],
        "top_p": [1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 0.9, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.01, 0.0],
        "num_logprobs": [5, -1, 0, 20, -1, -1, 3, 1],
        "draw": [0, 1, 2, 3, 4, 5, 6, 7],
    }
    suppressed_ids = [[int(logits[0].argmax())], *([] for _ in range(7))]
    got, expected = (sample(ops, logits, **columns, suppressed_ids=suppressed_ids) for ops in backends("float16"))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    for row, count in enumerate(columns["num_logprobs"]):
        if count >= 0:
            assert got.logprobs[row] == pytest.approx(expected.logprobs[row], abs=1e-4)
            np.testing.assert_array_equal(got.top_ids[row, :count], expected.top_ids[row, :count])
            np.testing.assert_allclose(got.top_logprobs[row, :count], expected.top_logprobs[row, :count], atol=1e-4)


def test_latent_attention_equals_the_reference(simulator: Settings | None) -> None:
    """A context in splits, heads that do not fill a tile, and blocks of half a tile."""
    from tests.ops.builders import Piece, largest_difference, make_step
    from tests.ops.latents import Case, attend, make_history
    from tinyvllm.ops.step_inputs import StepLayout

    case = Case(10, 32, 32, 32, 32, StepLayout(2, 2, 12, 8), True, "float16", "float16")
    buffer, history = make_step(case.layout, [Piece(94), Piece(0)]), make_history(case)
    chosen, reference = backends("float16")
    with watching_device_memory(simulator):
        found = attend(chosen, case, buffer, history)
    expected = attend(reference, case, buffer, history)
    assert not chosen.coverage.count
    difference = largest_difference(found.out, expected.out)
    print(f"{case.name}: {difference:.1e}")
    assert difference < TOLERANCE["float16"]
    np.testing.assert_allclose(found.latents, expected.latents, rtol=1e-3, atol=1e-3)
