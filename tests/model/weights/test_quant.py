"""Decomposed blocks against the gguf package's dequantization, which follows ggml's reference."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import random_k_rows
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose

FLOAT16_FIELDS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}  # else at byte 0


def random_rows(kind: str, num_rows: int, blocks_per_row: int, seed: int) -> np.ndarray:
    """Random bytes, of which only the half-precision fields are drawn as finite numbers. (N, bytes of a row) uint8."""
    rng = np.random.default_rng(seed)
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (num_rows * blocks_per_row, block_bytes), np.uint8)
    for begin in FLOAT16_FIELDS.get(kind, (0,)):
        numbers = rng.standard_normal(len(blocks)) * 10.0 ** rng.integers(-7, 4, len(blocks))
        blocks[:, begin : begin + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def reference(kind: str, raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, 5), blocks_per_row=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_decomposed_matrix_has_the_reference_values_exactly(
    kind: Any, num_rows: Any, blocks_per_row: Any, seed: Any
) -> None:
    raw = random_rows(kind, num_rows, blocks_per_row, seed)
    expected = reference(kind, raw)
    np.testing.assert_array_equal(to_float32(decompose(kind, raw, expected.shape)), expected)


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
def test_decomposed_parts_have_the_promised_shapes_and_types(kind: Any) -> None:
    block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (3, 2 * block_size)
    matrix = decompose(kind, random_rows(kind, 3, 2, seed=0), shape)
    assert (matrix.format.name, matrix.shape) == (kind, shape)
    assert matrix.codes.dtype == (np.int8 if kind == "Q8_0" else np.uint8)
    if kind != "Q8_0":
        assert matrix.codes.max() == 2**matrix.format.bits - 1, "random bytes use every code"
    stored = matrix.format
    for scales, form in ((matrix.scale, stored.scale), (matrix.minimum, stored.minimum)):
        assert (scales is None) == (form is None)
        if scales is not None and form is not None:
            assert str(scales.base.dtype) == form.dtype == "float16"
            assert scales.base.shape == (3, shape[1] // form.span)
            assert scales.expand(shape[1] // stored.group).shape == (3, shape[1] // stored.group)
    assert (matrix.minimum is not None) == (kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"))


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
def test_rows_may_be_reordered_before_or_after(kind: Any) -> Any:
    raw = random_rows(kind, 6, 1, seed=3)
    order = np.array([3, 0, 5, 1, 4, 2])
    shape = reference(kind, raw).shape

    def values(matrix: QuantizedMatrix) -> np.ndarray:
        return to_float32(matrix)

    np.testing.assert_array_equal(
        values(decompose(kind, raw[order], shape)), values(decompose(kind, raw, shape).rows(order))
    )


def test_random_k_rows_of_the_builders_are_spread_like_weights() -> None:
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        values = reference(kind, random_k_rows(np.random.default_rng(0), kind, 64, 512))
        assert 0.5 < values.std() * 512**0.5 < 2, kind
        assert abs(values.mean()) < 0.1 * values.std(), kind


def test_unknown_kind_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"IQ4_XS is not supported; known: Q4_0, .*Q6_K"):
        decompose("IQ4_XS", np.zeros(136, np.uint8), (1, 256))


@pytest.mark.parametrize("shape", [(1, 33), (2, 32), (32,)])
def test_bytes_that_are_not_of_the_shape_are_refused(shape: Any) -> None:
    with pytest.raises(ModelError, match="18 bytes are not a Q4_0 matrix"):
        decompose("Q4_0", np.zeros(18, np.uint8), shape)
