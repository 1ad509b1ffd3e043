"""Codes two at a time, in float16, as the matrix units of METAL and CUDA take them: by every format, against the values
of `to_float32`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import UOp, dtypes

from tests.ops.formats import cuda_source
from tests.ops.formats.drawn import FORMATS, NF4, affine, any_format, draw_matrix
from tinyvllm.arrays import Format, QuantizedMatrix, to_float32
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.ops.formats.matrix import PANEL, Matrix, Planes, pack
from tinyvllm.ops.formats.pairs import code_order, pair_form, pair_forms, read_halves, read_pairs, read_quarter
from tinyvllm.ops.formats.runs import covers
from tinyvllm.ops.kernel.body import Body, KernelFn, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import Mma

ROWS, COLS = 32, 256
RUNS, WORDS = ROWS * COLS // PANEL, ROWS * COLS // 2
CUDA, METAL = Mma("CUDA", dtypes.half), Mma("METAL", dtypes.half)
CONVERTING = Mma("CUDA", dtypes.half, has_float8=True)
FAST = ("Q4_0", "Q6_K", "NVFP4", "FP8", "nf4", "IQ3_S")  # a plane, two, small floats, floats, a table, a grid
KNOWN = [*(kind.format for kind in QUANTIZED_KINDS.values()), *FORMATS, affine(4, 16), affine(8, 32)]
KNOWN = list(dict.fromkeys(KNOWN))
every = pytest.mark.parametrize(
    "fmt",
    [pytest.param(fmt, marks=() if fmt.name in FAST else pytest.mark.sweep) for fmt in KNOWN],
    ids=lambda fmt: f"{fmt.name}-{fmt.scale.dtype}",
)


def pairs_kernel(fmt: Format, mma: Mma, name: str) -> KernelFn:
    """fn(words, *planes): every run's `read_pairs`."""

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        run = body.loop(RUNS)
        row, column = run // (COLS // PANEL), run % (COLS // PANEL)
        words = read_pairs(Planes(fmt, planes), row, column, COLS // PANEL, mma)
        stores = [out[run * (PANEL // 2) + i].store(word) for i, word in enumerate(words)]
        return finish(UOp.group(*stores).end(run), name)

    return kernel


def quarters_kernel(fmt: Format, mma: Mma, name: str) -> KernelFn:
    """fn(words, *planes): the same, by quarters."""

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        quarter = body.loop(RUNS * 4)
        words = read_quarter(Planes(fmt, planes), quarter // 4, quarter % 4, mma)
        stores = [out[quarter * 4 + i].store(word) for i, word in enumerate(words)]
        return finish(UOp.group(*stores).end(quarter), name)

    return kernel


def halves_kernel(fmt: Format, mma: Mma, name: str) -> KernelFn:
    """fn(words, or halves on METAL, *planes): every run's `read_halves`."""

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        run = body.loop(RUNS)
        row, column = run // (COLS // PANEL), run % (COLS // PANEL)
        values = read_halves(Planes(fmt, planes), row, column, COLS, mma)
        stores = [out[run * len(values) + i].store(value) for i, value in enumerate(values)]
        return finish(UOp.group(*stores).end(run), name)

    return kernel


def assert_pairs(words: np.ndarray, host: QuantizedMatrix, mma: Mma, *, in_place: bool = False) -> None:
    """Codes are exact; values of a codebook that float16 does not hold are rounded."""
    forms = pair_forms(host.format, mma) if in_place else [pair_form(host.format, mma)] * 2
    units, excesses = ([getattr(forms[i // 4 % 2], name) for i in range(PANEL)] for name in ("unit", "excess"))
    codes = np.empty((RUNS, PANEL), np.float32)
    # the column of each half of `read_pairs` in its run
    order = [4 * (i // 2 + i % 2 * 4) + code for i in range(PANEL // 4) for code in code_order(host.format, mma)]
    codes[:, order] = words.view(np.float16).astype(np.float32).reshape(RUNS, PANEL) * units - excesses
    expected = host.code_values
    if host.format == NF4:
        expected = expected.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(codes.reshape(ROWS, COLS), expected)


def assert_halves(halves: np.ndarray, host: QuantizedMatrix) -> None:
    """Rounded once: the scale, its product with the code, and the sum with the minimum."""
    expected = to_float32(host)
    values, size = halves.astype(np.float32).reshape(ROWS, COLS), np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=1.5e-3 * size)


def on_metal(make: Callable[[Format, Mma, str], KernelFn], matrix: Matrix, dtype: type) -> np.ndarray:
    """What METAL's reader gives, which is plain arithmetic."""
    out = empty(WORDS * (2 if dtype is np.float16 else 1), dtypes.half if dtype is np.float16 else dtypes.uint)
    return run_kernel(make(matrix.format, METAL, "read"), [out], matrix.planes)[0].numpy()


@every
def test_pairs_hold_the_codes_of_every_format(fmt: Format) -> None:
    host = draw_matrix(fmt, ROWS, COLS)
    matrix = pack(host, "row", None, "CPU")
    assert_pairs(on_metal(pairs_kernel, matrix, np.uint32), host, METAL)
    assert_halves(on_metal(halves_kernel, matrix, np.float16), host)


@cache
def cuda_words(is_fast: bool) -> dict[tuple[Format, str, Mma], np.ndarray]:
    """What CUDA's readers give for the formats of the default run, or for the others, compiled together: also with the
    instruction that converts e4m3."""
    formats = [fmt for fmt in KNOWN if (fmt.name in FAST) == is_fast]
    makers = {"pairs": pairs_kernel, "halves": halves_kernel, "quarters": quarters_kernel}
    cases = [
        (fmt, which, mma)
        for fmt in formats
        for which in makers
        if fmt.grid is None or which != "quarters"
        for mma in ((CUDA, CONVERTING) if fmt.is_float8 else (CUDA,))
    ]
    matrices = [pack(draw_matrix(fmt, ROWS, COLS), "row", None, "CPU") for fmt, *_ in cases]
    names = [f"{which}_{i}" for i, (_, which, _) in enumerate(cases)]
    sources = [
        cuda_source.render(makers[which](fmt, mma, name), WORDS, matrix)
        for (fmt, which, mma), name, matrix in zip(cases, names, matrices, strict=True)
    ]
    return dict(zip(cases, cuda_source.run(sources, names, WORDS, matrices), strict=True))


@every
def test_cuda_reads_the_same_by_its_own_instructions(fmt: Format) -> None:
    host = draw_matrix(fmt, ROWS, COLS)
    words = cuda_words(fmt.name in FAST)
    for mma in (CUDA, CONVERTING) if fmt.is_float8 else (CUDA,):
        assert_pairs(words[fmt, "pairs", mma], host, mma)
        assert_halves(words[fmt, "halves", mma].view(np.float16), host)
        if fmt.grid is None:
            assert_pairs(words[fmt, "quarters", mma], host, mma, in_place=True)


@pytest.mark.sweep
@settings(max_examples=60, deadline=None)
@given(fmt=any_format().filter(covers), seed=st.integers(0, 99))
def test_pairs_hold_the_codes_of_any_format(fmt: Format, seed: int) -> None:
    """pytest -m sweep tests/ops/formats/test_pairs.py"""
    host = draw_matrix(fmt, ROWS, COLS, seed)
    assert_pairs(on_metal(pairs_kernel, pack(host, "row", None, "CPU"), np.uint32), host, METAL)
