"""Products of every format against the plain reference. On a GPU: DEV=CL python -m pytest -m gpu tests/ops

All formats by all row counts by all operations: python -m pytest -m "sweep and not gpu" tests/ops
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from tinygrad import dtypes

from tests.ops.builders import FORMATS, largest_difference, make_epilogue, make_host, normal, run_product
from tests.sweeps import swept
from tinyvllm.arrays import to_float32
from tinyvllm.device.handle import DeviceHandle, has_half
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.backend import Backend, Epilogue, Norm
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend

ROWS, COLS = 64, 256
TOKENS = (1, 2, 3, 4, 16, 17, 64)
OPERATIONS = ("norm_linear", "linear_add", "norm_gated")
Case = tuple[str, int, str]


def chosen_cases() -> list[Case]:
    """Formats of each kind for one row, for some or for many, where the kernels differ, the operations in turn; and
    every operation at another row count. The rest of the product is swept: each case compiles a kernel."""
    # other formats: tests/ops/formats
    few = ("float32", "float16", "bfloat16", "Q4_1", "Q8_0", "Q6_K")
    cases = [(fmt, (1, 4, 1, 64)[i % 4], OPERATIONS[i % 3]) for i, fmt in enumerate(few)]
    return cases + [("Q5_1", tokens, operation) for tokens, operation in zip((2, 3, 17), OPERATIONS, strict=True)]


def other_cases() -> list[Case]:
    return [case for case in product(FORMATS, TOKENS, OPERATIONS) if case not in chosen_cases()]


def run(backend: Backend, fmt: str, tokens: int, operation: str) -> np.ndarray:
    """(tokens, columns) of an operation on seeded weights and inputs."""
    upload = backend.device.upload
    x, norm = upload(normal(tokens, COLS, seed=1)), Norm(upload(normal(COLS, seed=2)), eps=1e-5)
    if operation == "norm_gated":
        matrix = backend.gate_up(make_host(fmt, ROWS, COLS, seed=3), make_host(fmt, ROWS, COLS, seed=4))
        out = run_product(backend, x, matrix, tokens, norm, Epilogue(activation="silu"))
    else:
        (matrix,) = backend.stacked([make_host(fmt, ROWS, COLS, seed=5)])
        if operation == "norm_linear":
            out = run_product(backend, x, matrix, tokens, norm)
        else:
            residual = upload(normal(tokens, ROWS, seed=6))
            out = run_product(backend, x, matrix, tokens, epilogue=Epilogue(residual=residual))
    return out.numpy().reshape(tokens, ROWS)


def check(backend: Backend, reference: ReferenceBackend, case: Case) -> None:
    difference = largest_difference(run(backend, *case), run(reference, *case))
    print(f"{case}: {difference:.1e}")
    # tinygrad's emulation of float16 has no subnormal numbers
    lacks_small_values = case[0] == "float16" and not has_half(backend.device.name)
    assert difference < (1e-4 if lacks_small_values else 1e-5)


def name_of(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", chosen_cases(), ids=name_of)
def test_a_product_equals_the_reference(backend: Backend, reference: ReferenceBackend, case: Case) -> None:
    check(backend, reference, case)


@pytest.mark.parametrize(
    ("tokens", "names"),
    swept(product((1, 20), ("n", "bns", "sc", "s", "bsr")), [(1, "bns"), (20, "bns"), (1, "sc"), (20, "bsr")]),
)
def test_what_follows_a_product_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, tokens: int, names: str
) -> None:
    def run(ops: Backend) -> np.ndarray:
        x, residual = (ops.device.upload(normal(tokens, cols, seed=cols)) for cols in (COLS, ROWS))
        epilogue = make_epilogue(ops, residual if {"n", "r"} & set(names) else None, ROWS, names)
        matrix = ops.matrix(make_host("Q4_1", ROWS, COLS, seed=5))
        return run_product(ops, x, matrix, tokens, epilogue=epilogue).numpy()

    assert largest_difference(run(backend), run(reference)) < 1e-5


@pytest.mark.parametrize("activation", swept(("gelu_tanh", "clamped_swiglu"), ["clamped_swiglu"]))
def test_a_gate_with_biases_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, activation: str
) -> None:
    def run(ops: Backend) -> np.ndarray:
        matrix = ops.gate_up(make_host("Q8_0", ROWS, COLS, seed=3), make_host("Q8_0", ROWS, COLS, seed=4))
        epilogue = Epilogue(bias=ops.device.upload(normal(2 * ROWS, seed=5)), activation=activation)
        return run_product(ops, ops.device.upload(normal(3, COLS, seed=1)), matrix, 3, epilogue=epilogue).numpy()

    assert largest_difference(run(backend), run(reference)) < 1e-5


@pytest.mark.parametrize("names", ["", "s", "sc", "b"])
def test_a_general_product_of_logits_or_qkv_is_float32(device: DeviceHandle, names: str) -> None:
    """Sampling compares logits, whatever scales them: in float16 neighbors would become equal."""
    backend = GpuBackend(device, "float16")
    x, matrix = device.upload(normal(2, COLS)), backend.matrix(make_host("Q8_0", ROWS, COLS))
    out = run_product(backend, x, matrix, 2, epilogue=make_epilogue(backend, None, ROWS, names))
    assert out.dtype == dtypes.float


@pytest.mark.sweep
@pytest.mark.parametrize("case", other_cases(), ids=name_of)
def test_any_product_equals_the_reference(backend: Backend, reference: ReferenceBackend, case: Case) -> None:
    check(backend, reference, case)


def test_a_row_depends_on_no_other_row(backend: Backend) -> None:
    """The same row alone, among few and among many: what makes a batch equal to its members alone."""
    host, rows = make_host("Q4_1", ROWS, COLS), normal(64, COLS, seed=1)
    (matrix,) = backend.stacked([host])
    norm = Norm(backend.device.upload(np.ones(COLS, np.float32)), eps=1e-5)
    alone = [run_product(backend, backend.device.upload(row), matrix, 1, norm).numpy() for row in rows[:2]]
    for tokens in (2, 4, 16, 64):
        out = run_product(backend, backend.device.upload(rows[:tokens]), matrix, tokens, norm)
        np.testing.assert_allclose(out.numpy().reshape(tokens, ROWS)[:2], alone, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["float32", "Q4_K"])
def test_half_precision_activations_stay_close(device: DeviceHandle, fmt: str, dtype: str) -> None:
    half, whole = GpuBackend(device, dtype), ReferenceBackend(device)
    for operation in OPERATIONS:
        out = run(half, fmt, 4, operation)
        assert largest_difference(out, run(whole, fmt, 4, operation)) < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]


# -- matrices that do not fill their panels, or do not fit together --------------------------------------------------


def test_rows_after_the_used_ones_are_zero(backend: Backend) -> None:
    """A vocabulary is seldom a multiple of 32: the head is padded, and its padding cannot be the best logit of NaN."""
    host = make_host("Q8_0", 40, 64)
    matrix = backend.matrix(host)
    assert (matrix.num_rows, matrix.used_rows) == (64, 40)
    x, norm = normal(2, 64), Norm(backend.device.upload(np.ones(64, np.float32)), eps=1e-5)
    out = run_product(backend, backend.device.upload(x), matrix, 2, norm)
    rows = out.numpy().reshape(2, 64)
    expected = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) @ to_float32(host).T
    np.testing.assert_allclose(rows[:, :40], expected, atol=1e-5)
    assert (rows[:, 40:] == 0).all()


def test_matrices_of_one_format_are_stacked_and_others_kept_apart(backend: Backend) -> None:
    q, k, v = make_host("Q4_1", 64, 64), make_host("Q4_1", 32, 64, seed=1), make_host("Q8_0", 32, 64, seed=2)
    assert [matrix.num_rows for matrix in backend.stacked([q, k, v], 1)] == [96, 32]
    assert [matrix.num_rows for matrix in backend.stacked([q, k, q], 1)] == [160]


def test_gate_and_up_of_different_formats_are_fused_all_the_same(backend: Backend, reference: ReferenceBackend) -> None:
    gate, up, x = make_host("Q4_1", 32, 64), make_host("Q8_0", 32, 64, seed=1), normal(2, 64)

    def gated(ops: Backend) -> np.ndarray:
        norm = Norm(ops.device.upload(np.ones(64, np.float32)), eps=1e-5)
        gate_up = ops.gate_up(gate, up)
        return run_product(ops, ops.device.upload(x), gate_up, 2, norm, Epilogue(activation="silu")).numpy()

    assert largest_difference(gated(backend), gated(reference)) < 1e-3  # float16 holds both


@pytest.mark.parametrize("rows", [16, 48])
def test_a_feed_forward_that_does_not_fill_its_panels_is_refused(device: DeviceHandle, rows: int) -> None:
    host = make_host("float32", rows, 32)
    with pytest.raises(UnsupportedModelError, match=f"{rows} columns, which is not a multiple of 32"):
        CpuBackend(device, None).gate_up(host, host)


def test_rows_that_fill_no_panel_are_padded_after_the_last_alone(
    backend: Backend, reference: ReferenceBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """q, k and v of heads of 40: of one format, and of two, of which the first would be padded before v."""
    x = normal(2, 64)
    for name in ("Q4_1", "Q8_0"):
        hosts = [make_host("Q4_1", rows, 64, seed=rows) for rows in (160, 40)] + [make_host(name, 40, 64)]
        (matrix,) = backend.stacked(hosts, 1)
        out = run_product(backend, backend.device.upload(x), matrix, 2).numpy().reshape(2, 256)
        expected = x @ np.concatenate([to_float32(host) for host in hosts]).T
        np.testing.assert_allclose(out[:, :240], expected, rtol=1e-3, atol=1e-3)
        assert (out[:, 240:] == 0).all()
    assert "200, 40 rows of q, k and v in Q4_1, Q8_0 are not multiples of 32" in caplog.text


def test_a_width_that_is_no_multiple_of_32_is_refused(backend: Backend) -> None:
    with pytest.raises(UnsupportedModelError, match="matrix of 32 x 40 has a width that is not a multiple of 32"):
        backend.matrix(make_host("float32", 32, 40))
