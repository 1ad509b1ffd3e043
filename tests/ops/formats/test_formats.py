"""Formats by their properties: whatever `Format` allows is read the same by every reader, and what a kernel cannot read
is an error by name. In this file METAL's and CUDA's backends run on the CPU, as far as they take general products."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, UOp, dtypes

from tests.ops.builders import largest_difference, make_host, normal
from tests.ops.formats.drawn import BY_NAME, FORMATS, affine, any_format, draw_matrix
from tests.ops.rendering import rendered
from tests.sweeps import examples, swept
from tinyvllm.arrays import (
    DENSE_BITS,
    E2M1,
    Format,
    Grid,
    QuantizedMatrix,
    ScaleFormat,
    stack_rows,
    take_rows,
    to_float32,
)
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import trace_step
from tinyvllm.errors import InvariantError, UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.ops.backend import Backend, Epilogue, Norm
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.linear import LinearSpec, linear_kernel
from tinyvllm.ops.formats.matrix import Matrix, Planes, join_shards, pack, unpack
from tinyvllm.ops.formats.pairs import read_halves, read_pairs
from tinyvllm.ops.formats.runs import covers, group_sums, read_run, require_covered, run_cols
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.gpu.gemm import GemmSpec, gemm_kernel, unpack_kernel
from tinyvllm.ops.gpu.matrix import MatrixSpec, matrix_kernel
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, quantized_vector_kernel
from tinyvllm.ops.gpu.vector import VectorSpec, vector_kernel
from tinyvllm.ops.kernel.body import F32, Body, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.reference import ReferenceBackend

COLS = 256
LANES, HALVES = Lanes("CUDA"), Mma("CUDA", dtypes.half)
LAYOUTS = ("panel", "row")
# the default run unpacks every sixth; the products of CPUs read one of each kind
DEFAULT_FORMATS = [(i, fmt) for i, fmt in enumerate(FORMATS) if i % 6 == 0]


def read_values(matrix: Matrix) -> np.ndarray:
    """Every value, each read by `Planes.value` in a kernel."""
    rows, cols = matrix.num_rows, matrix.num_cols

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        row, col = body.loop(rows), body.loop(cols)
        value = Planes(matrix.format, planes).value(row, col, cols, matrix.layout)
        return finish(out[row * cols + col].store(value).end(col, row), "read_values")

    return run_kernel(kernel, [empty(rows * cols)], matrix.planes)[0].numpy().reshape(rows, cols)


def read_runs(matrix: Matrix) -> np.ndarray:
    """Every value, as the fused kernels of GPUs read them."""
    rows, cols = matrix.num_rows, matrix.num_cols
    size = run_cols(matrix.format, 8)

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        row, run = body.loop(rows), body.loop(cols // size)
        values = read_run(Planes(matrix.format, planes), row, run, cols, size).values(F32)
        stores = [out[row * cols + run * size + i].store(value) for i, value in enumerate(values)]
        return finish(UOp.group(*stores).end(run, row), "read_runs")

    return run_kernel(kernel, [empty(rows * cols)], matrix.planes)[0].numpy().reshape(rows, cols)


def assert_close(values: np.ndarray, host: QuantizedMatrix) -> None:
    """Equal up to the order in which a scale's factors are multiplied; padding is zero, or what E8M0 has for it."""
    expected = to_float32(host)
    rows = len(expected)
    np.testing.assert_allclose(values[:rows], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert (np.abs(values[rows:]) < 1e-30).all(), "rows after the used ones"


# -- every reader gives the values of `to_float32` ---------------------------------------------------------------------


@examples(2, 12)
@given(fmt=any_format(has_grids=False), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_any_format_is_unpacked_to_its_values(fmt: Format, layout: str, seed: int) -> None:
    host = draw_matrix(fmt, 40, COLS, seed)
    matrix = pack(host, layout, None, "CPU")
    assert len(matrix.planes) == Planes.count(fmt)
    assert_close(unpack(matrix).numpy(), host)


@examples(3, 16)
@given(fmt=any_format(), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_any_format_is_read_value_by_value(fmt: Format, layout: str, seed: int) -> None:
    host = draw_matrix(fmt, 40, COLS, seed)
    assert_close(read_values(pack(host, layout, None, "CPU")), host)


@pytest.mark.parametrize(
    ("fmt", "layout"),
    swept(
        [(fmt, LAYOUTS[i % 2]) for i, fmt in enumerate(FORMATS)], [(fmt, LAYOUTS[i % 2]) for i, fmt in DEFAULT_FORMATS]
    ),
    ids=[*BY_NAME],
)
def test_a_known_format_is_unpacked_to_its_values(fmt: Format, layout: str) -> None:
    host = draw_matrix(fmt, 40, COLS)
    assert_close(unpack(pack(host, layout, None, "CPU")).numpy(), host)


@examples(2, 12)
@given(fmt=any_format().filter(covers), seed=st.integers(0, 99))
def test_any_format_that_runs_cover_is_read_by_runs(fmt: Format, seed: int) -> None:
    host = draw_matrix(fmt, 32, COLS, seed)
    # a code lies in a mantissa between 1 and 2, so that a value is a difference of larger ones
    expected, size = to_float32(host), np.abs(to_float32(host)).max()
    np.testing.assert_allclose(read_runs(pack(host, "row", None, "CPU")), expected, rtol=0, atol=4e-5 * size)


def test_runs_cover_every_known_format() -> None:
    assert all(covers(fmt) for fmt in [*(kind.format for kind in QUANTIZED_KINDS.values()), *FORMATS])


# -- products ----------------------------------------------------------------------------------------------------------


def multiply(backend: Backend, host: Any, x: np.ndarray) -> np.ndarray:
    """norm(x) @ host.T, with a norm of ones."""
    norm = Norm(backend.device.upload(np.ones(x.shape[1], np.float32)), eps=1e-5)
    (matrix,) = backend.stacked([host])
    (out,) = backend.linear("test", backend.device.upload(x), [matrix], len(x), norm)
    return out.numpy().reshape(len(x), -1)


def expected_product(host: Any, x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    product: np.ndarray = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) @ to_float32(host).astype(float).T
    return product


# one of each kind, of which the test below has none: steps, a codebook, small scales, few bits, grids
KINDS = ("GPTQ", "nf4", "Q2_K", "NVFP4", "Q1_0", "TQ1_0", "IQ2_XXS", "IQ1_M", "affine8_g128")
MULTIPLIED = [(fmt, (1, 17)[i % 2]) for i, fmt in enumerate(FORMATS)]


@pytest.mark.parametrize(
    ("fmt", "tokens"), swept(MULTIPLIED, [case for case in MULTIPLIED if case[0].name in KINDS]), ids=[*BY_NAME]
)
def test_the_cpu_multiplies_by_every_format(device: DeviceHandle, fmt: Format, tokens: int) -> None:
    host, x = draw_matrix(fmt, 64, COLS), normal(tokens, COLS)
    assert largest_difference(multiply(CpuBackend(device, None), host, x), expected_product(host, x)) < 1e-5


FOLLOWED = ("affine4_g64-float16", "affine3_g64-float16", "MXFP4-e8m0", "FP8-float32")
OPERATIONS = ("residual", "gated")


@pytest.mark.parametrize(
    ("name", "operation"),
    swept(product(FOLLOWED, OPERATIONS), [(name, OPERATIONS[i % 2]) for i, name in enumerate(FOLLOWED)]),
)
def test_every_epilogue_takes_every_format(
    device: DeviceHandle, reference: ReferenceBackend, name: str, operation: str
) -> None:
    gate, up = (draw_matrix(BY_NAME[name], 64, COLS, seed) for seed in range(2))
    x, residual = normal(4, COLS), normal(4, 64, seed=1)

    def run(backend: Backend) -> np.ndarray:
        upload = backend.device.upload
        norm = Norm(upload(np.ones(COLS, np.float32)), eps=1e-5)
        if operation == "gated":
            out = backend.linear("test", upload(x), [backend.gate_up(gate, up)], 4, norm, Epilogue(activation="silu"))
        else:
            epilogue = Epilogue(residual=upload(residual))
            out = backend.linear("test", upload(x), [backend.matrix(gate)], 4, epilogue=epilogue)
        return out[0].numpy()

    assert largest_difference(run(CpuBackend(device, None)), run(reference)) < 1e-5


WIDTHS = ((96, 160), (32, 224), (128, 128))


@pytest.mark.parametrize(
    ("group", "widths"), swept(product((32, 64, 128), WIDTHS), [*zip((32, 64, 128), WIDTHS, strict=True)])
)
def test_cores_may_share_a_row_of_x_inside_a_group(group: int, widths: tuple[int, ...]) -> None:
    """Each core has whole panels of columns, which need not be whole groups. There are so many rows that they
    are not copied together first."""
    host, x = draw_matrix(affine(4, group), 32, COLS), normal(18, COLS)
    matrix = pack(host, "panel", None, "CPU")
    spec = LinearSpec("test", matrix.format, len(x), 32, COLS, x_cols=widths)
    parts = [Tensor(part.reshape(-1)).realize() for part in np.split(x, [widths[0]], axis=1)]
    out = run_kernel(linear_kernel(spec), [empty(len(x) * 32)], [*matrix.planes, *parts])[0].numpy()
    assert largest_difference(out.reshape(-1, 32), x @ to_float32(host).T) < 1e-5


@pytest.mark.parametrize("fmt", swept(FORMATS, [fmt for _, fmt in DEFAULT_FORMATS]), ids=BY_NAME)
def test_the_general_product_of_gpus_reads_every_format(device: DeviceHandle, fmt: Format) -> None:
    host, x = draw_matrix(fmt, 32, COLS), normal(2, COLS)
    assert largest_difference(multiply(GpuBackend(device, "float32"), host, x), expected_product(host, x)) < 1e-5


# -- what a fused kernel cannot read takes the general form, and never its own -----------------------------------------

UNREAD = [
    Format("far", 4, 32, offset=4096, scale=ScaleFormat(32)),
    Format("ternary", 2, 64, scale=ScaleFormat(64), codebook=(0.0, 1.0, -1.0, 0.5)),
]
unread = pytest.mark.parametrize("fmt", UNREAD, ids=lambda fmt: fmt.name)


@unread
def test_runs_refuse_by_name_what_they_do_not_cover(fmt: Format) -> None:
    """A large offset must not be rounded, nor a codebook be taken for integers."""
    matrix = pack(draw_matrix(fmt, 32, COLS), "row", None, "CPU")
    planes, zero = Planes(fmt, matrix.planes), UOp.const(0)
    readers: list[Callable[[], Any]] = [
        lambda: read_run(planes, zero, zero, COLS, 32),
        lambda: read_pairs(planes, zero, zero, COLS // 32, HALVES),
        lambda: read_halves(planes, zero, zero, COLS, HALVES),
        lambda: group_sums(fmt, [zero] * 32),
        lambda: run_cols(fmt, 8),
        lambda: require_covered(fmt),
    ]
    for read in readers:
        with pytest.raises(UnsupportedModelError, match=rf"format {fmt.name}, .* reads .*--dequantize"):
            read()


ONE_ROW: dict[str, Any] = dict(name="test", lanes=LANES, num_rows=64, num_cols=COLS)
FUSED: dict[str, Callable[[Format], tuple[Any, int]]] = {  # a kernel by its format, and the tokens of its input
    "one row": lambda fmt: (vector_kernel(VectorSpec(format=fmt, **ONE_ROW)), 1),
    "one row, packed": lambda fmt: (quantized_vector_kernel(QuantizedVectorSpec(format=fmt, mma=HALVES, **ONE_ROW)), 1),
    "some rows": lambda fmt: (matrix_kernel(MatrixSpec("test", LANES, HALVES, fmt, 8, 64, COLS)), 8),
    "many rows": lambda fmt: (gemm_kernel(GemmSpec("test", HALVES, fmt, dtypes.half, 256, 64, COLS)), 256),
    "unpacking": lambda fmt: (unpack_kernel(fmt, 64, COLS), 0),
}


@pytest.mark.parametrize("kernel", FUSED)
@unread
def test_no_fused_kernel_can_be_made_for_what_it_does_not_read(kernel: str, fmt: Format) -> None:
    matrix = pack(draw_matrix(fmt, 64, COLS), "row", None, "CPU")
    with pytest.raises(UnsupportedModelError, match=f"fused kernel was given weights in format {fmt.name}"):
        fn, tokens = FUSED[kernel](fmt)
        x = [empty(tokens * COLS, dtypes.half)] if tokens else []
        run_kernel(fn, [empty(256 * COLS, dtypes.half)], [*matrix.planes, *x])


@pytest.mark.parametrize(
    ("kind", "tokens", "fmt"),
    swept(
        product(("METAL", "CUDA"), (1, 3, 64), UNREAD),
        [("METAL", 1, UNREAD[0]), ("CUDA", 3, UNREAD[1])],
    ),
    ids=lambda value: getattr(value, "name", None),
)
def test_fused_backends_multiply_what_they_do_not_cover_by_the_general_product(
    kind: str, tokens: int, fmt: Format, caplog: pytest.LogCaptureFixture
) -> None:
    """These products run here, because they are not METAL's or CUDA's kernels. The log names the format."""
    host, x = draw_matrix(fmt, 64, COLS), normal(tokens, COLS)
    with caplog.at_level(logging.WARNING):
        backend = rendered(kind)
        out = multiply(backend, host, x)
    assert largest_difference(out, expected_product(host, x)) < 4e-3  # float16 activations
    said = f"test: a product with weights in {fmt.name} takes the general kernel"
    assert said in caplog.text
    assert backend.coverage.lines() == [said]


@pytest.mark.parametrize(("kind", "tokens"), swept(product(("METAL", "CUDA"), (1, 8)), [("CUDA", 8)]))
def test_a_product_reads_the_packed_planes_once_and_nothing_else_of_the_matrix(kind: str, tokens: int) -> None:
    """Whatever the format: no kernel reads or writes unpacked weights."""
    for name in BY_NAME:
        backend = rendered(kind)
        (matrix,) = backend.stacked([make_host(name, 512, 512)])
        x = Tensor.empty(tokens * 512, dtype=dtypes.half, device="CPU")
        traced = trace_step(lambda: backend.whole(backend.linear("test", x, [matrix], tokens)[0]).realize())  # noqa: B023
        planes = {id(plane.uop.base.buffer.base) for plane in matrix.own_planes}
        read = [buffer for _, buffers in traced.launches for buffer in buffers]
        packed = sum(buffer.nbytes for buffer in read if id(buffer.base) in planes)
        assert packed == matrix.nbytes, name
        others = [buffer.nbytes for buffer in read if id(buffer.base) not in planes]
        assert max(others) <= 4 * 16 * tokens * 512, f"{name}: {others}"


def scaled(**numbers: Any) -> ScaleFormat:
    return ScaleFormat(**({"span": 32} | numbers))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format("odd", 4, 24, scale=scaled(span=24)), "groups of 24 columns: supported are 16, 32, 64, 128"),
        (lambda: Format("odd", 4, 256, scale=scaled(span=256)), "groups of 256 columns"),
        (lambda: Format("odd", 7, 32, scale=scaled()), "codes of 7 bits: supported are 1, 2, 3, 4, 5, 6, 8"),
        (lambda: Format("odd", 4, 32), "groups without scales"),
        (lambda: Format("odd", 4, 64, scale=scaled(span=32)), "every 32 columns, .* whole groups of 64"),
        (lambda: Format("odd", 4, 32, scale=scaled(dtype="e5m2")), "scales in e5m2: supported are float32, .*e4m3"),
        (lambda: Format("odd", 4, 32, scale=scaled(), codebook=(0.0, 1.0)), "codebook of 2 values for codes of 4 bits"),
        (lambda: Format("odd", 5, 32, scale=scaled(), codebook=(0.0,) * 32), "codebook of 5 bits: .* up to 4"),
        (
            lambda: Format("odd", 4, 32, offset=8, scale=scaled(), codebook=E2M1),
            "offset of 8 to codes that are not int",
        ),
        (lambda: Format("odd", 4, 32, scale=scaled(), is_float8=True), "float8 codes of 4 bits"),
        (
            lambda: Format("odd", 8, 32, scale=scaled(), grid=Grid("IQ3_S", 9, 4, True)),
            "codes of 8 bits and a grid of 9",
        ),
        (
            lambda: Format("odd", 11, 32, scale=scaled(), grid=Grid("IQ1_S", 11, 8, False)),
            "a grid of 8 values and 11 bi",
        ),
        (lambda: Format("odd", 9, 32, 1, scaled(), grid=Grid("IQ3_S", 9, 4, True)), "a grid and another meaning"),
        (lambda: Format("odd", 16), "not a dense format: known are float32, float16, bfloat16"),
    ],
)
def test_a_format_that_nothing_reads_cannot_be_made(make: Callable[[], Format], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"format odd .*{message}"):
        make()


def test_a_width_that_cuts_a_scale_is_refused_with_the_remedy(device: DeviceHandle) -> None:
    host = draw_matrix(affine(4, 64), 32, 96)
    with pytest.raises(UnsupportedModelError, match=r"32 x 96 .* of 64, .* affine4_g64 covers: .*--dequantize"):
        pack(host, "row", None, device.name)


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [("IQ2_S-float16", "row"), ("MXFP4-e8m0", "row"), ("NVFP4-e4m3", "panel"), ("affine3_g64-float16", "panel")],
)
def test_an_expert_is_a_matrix_of_its_own_rows(name: str, layout: str) -> None:
    host = draw_matrix(BY_NAME[name], 3 * 64, COLS)
    matrix = pack(host, layout, None, "CPU", num_experts=3)
    assert (matrix.num_rows, matrix.num_experts) == (192, 3)
    for index in range(3):
        expert = matrix.expert(index)
        alone = pack(host.rows(slice(index * 64, index * 64 + 64)), layout, None, "CPU")
        assert replace(expert, planes=()) == replace(alone, planes=())
        for plane, wanted in zip(expert.planes, alone.planes, strict=True):
            np.testing.assert_array_equal(plane.numpy(), wanted.numpy())
    for index in (-1, 3):
        with pytest.raises(InvariantError, match=f"expert {index} of a matrix with 3"):
            matrix.expert(index)


def test_cores_share_out_the_rows_of_every_expert() -> None:
    host = make_host("Q4_0", 2 * 96, COLS)
    rows = np.arange(192).reshape(2, 96)
    shares = [take_rows(host, rows[:, a:b].reshape(-1)) for a, b in ((0, 32), (32, 96))]
    matrix = join_shards([pack(share, "panel", None, "CPU", num_experts=2) for share in shares])
    assert (matrix.num_rows, matrix.num_experts) == (192, 2)
    for index in range(2):
        expert = matrix.expert(index)
        assert (expert.num_rows, expert.num_experts) == (96, 0)
        values = np.concatenate([unpack(share).numpy() for share in expert.row_shards])
        np.testing.assert_allclose(values, to_float32(host)[rows[index]], rtol=0, atol=1e-7)


def test_experts_that_do_not_fill_panels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="96 rows are not 2 experts' of a multiple of 32 each"):
        pack(make_host("float32", 96, 32), "row", None, "CPU", num_experts=2)


# -- on the host -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(fmt=any_format(), seed=st.integers(0, 99))
def test_rows_may_be_stacked_and_taken_apart_again(fmt: Format, seed: int) -> None:
    a, b = draw_matrix(fmt, 32, COLS, seed), draw_matrix(fmt, 64, COLS, seed + 1)
    (stacked,) = stack_rows([a, b])
    np.testing.assert_array_equal(to_float32(stacked), np.concatenate([to_float32(a), to_float32(b)]))
    np.testing.assert_array_equal(to_float32(take_rows(stacked, slice(32, None))), to_float32(b))


def test_matrices_whose_scales_differ_are_not_stacked() -> None:
    hosts = [draw_matrix(fmt, 32, COLS) for fmt in (affine(4, 64), affine(4, 64, "bfloat16"), affine(4, 32))]
    assert len(stack_rows(hosts)) == 3
    assert len(stack_rows([*hosts, hosts[-1]])) == 3


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_every_format_with_its_size_and_readers() -> None:
    text = (Path(__file__).parents[3] / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    table = text[text.index("| format | read from") :].split("\n\n")[0].splitlines()[2:]
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)}
    dense = [Format(name, bits) for name, bits in DENSE_BITS.items()]
    loaded = [*dense, *(kind.format for kind in QUANTIZED_KINDS.values())]
    known = {fmt.name: fmt for fmt in [*reversed(FORMATS), *loaded]}
    assert rows.keys() == known.keys() - {"affine4_g16"}
    assert all(cells[1] for cells in rows.values()), "nothing reads a format"
    for name, (_, _, bits, group, *_, fused) in rows.items():
        fmt = known[name]
        host = draw_matrix(fmt, 32, 512) if fmt.is_quantized else make_host(name, 32, 512)
        assert pack(host, "row", None, "CPU").nbytes * 8 / (32 * 512) == float(bits), name
        assert (group or "0", fused) == (str(fmt.group), "yes" if covers(fmt) else "no"), name
