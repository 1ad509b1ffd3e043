"""Codes four at a time, as bytes: by every format that has them, against the values of `to_float32`."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tinygrad import UOp, dtypes

from tests.ops.formats import cuda_source
from tests.ops.formats.drawn import FORMATS, affine, draw_matrix
from tinyvllm.arrays import Format
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.ops.formats.code_bytes import byte_forms, read_bytes, takes_bytes
from tinyvllm.ops.formats.matrix import PANEL, Planes, pack
from tinyvllm.ops.kernel.body import Body, KernelFn, finish
from tinyvllm.ops.kernel.lanes import Mma

ROWS, COLS = 32, 256
RUNS = ROWS * COLS // PANEL
KNOWN = [*(kind.format for kind in QUANTIZED_KINDS.values()), *FORMATS, affine(4, 16), affine(8, 32)]
KNOWN = list(dict.fromkeys(KNOWN))
TAKEN = [fmt for fmt in KNOWN if takes_bytes(fmt)]


def bytes_kernel(fmt: Format, name: str) -> KernelFn:
    """fn(words, *planes): every run's `read_bytes`."""

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        run = body.loop(RUNS)
        words = read_bytes(Planes(fmt, planes), run, Mma("CUDA", dtypes.half))
        return finish(UOp.group(*[out[run * 8 + i].store(word) for i, word in enumerate(words)]).end(run), name)

    return kernel


@cache
def cuda_bytes() -> dict[Format, np.ndarray]:
    """Of all formats, compiled together."""
    names = [f"bytes_{i}" for i in range(len(TAKEN))]
    matrices = [pack(draw_matrix(fmt, ROWS, COLS), "row", None, "CPU") for fmt in TAKEN]
    sources = [
        cuda_source.render(bytes_kernel(fmt, name), RUNS * 8, matrix)
        for fmt, name, matrix in zip(TAKEN, names, matrices, strict=True)
    ]
    return dict(zip(TAKEN, cuda_source.run(sources, names, RUNS * 8, matrices), strict=True))


@pytest.mark.parametrize("fmt", TAKEN, ids=lambda fmt: f"{fmt.name}-{fmt.scale.dtype}")
def test_bytes_hold_the_codes_of_every_format_that_has_them(fmt: Format) -> None:
    host = draw_matrix(fmt, ROWS, COLS)
    read = cuda_bytes()[fmt].view(np.uint8).reshape(RUNS, 2, PANEL // 2).astype(np.float32)
    forms = byte_forms(fmt)
    values = np.stack([read[:, half] * forms[half].unit - forms[half].excess for half in range(2)], 1)
    np.testing.assert_array_equal(values.reshape(ROWS, COLS), host.code_values)


def test_formats_whose_codes_are_not_integers_have_no_bytes() -> None:
    taken = {fmt.name for fmt in TAKEN}
    assert {"Q4_K", "Q6_K", "Q4_0", "Q2_K", "Q3_K", "IQ4_NL", "Q8_0", "affine4_g64", "GPTQ"} <= taken
    assert not {"FP8", "nf4", "IQ3_S", "IQ2_XXS"} & taken
