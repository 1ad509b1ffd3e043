"""Decomposed blocks against the gguf package's dequantization, which follows ggml's reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import FLOAT16_FIELDS, random_k_rows, random_rows
from tinyvllm.arrays import SCALE_DTYPES, LazyCodes, QuantizedMatrix, grid_table, to_float16, to_float32
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights import quant
from tinyvllm.model.weights.blocks import float16, nibbles, uint16
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose
from tinyvllm.storage.gguf_types import BLOCK_SIZES


def wild_rows(kind: str, num_rows: int, blocks_per_row: int, seed: int) -> np.ndarray:
    """Random blocks whose half-precision fields have many orders of magnitude. (N, bytes of a row) uint8."""
    rng = np.random.default_rng(seed)
    block_size, block_bytes = BLOCK_SIZES[kind]
    blocks = random_rows(rng, kind, num_rows, blocks_per_row * block_size).reshape(-1, block_bytes)
    for begin in FLOAT16_FIELDS.get(kind, (0,)):
        numbers = rng.standard_normal(len(blocks)) * 10.0 ** rng.integers(-7, 4, len(blocks))
        blocks[:, begin : begin + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def reference(kind: str, raw: np.ndarray) -> np.ndarray:
    """The gguf package's values; ggml's own of the kinds that the package cannot dequantize."""
    if kind in ("Q1_0", "Q2_0"):
        blocks = raw.reshape(len(raw), -1, 18)
        width = int(kind[1])
        bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").reshape(*blocks.shape[:2], -1, width)
        codes = (bits * 2 ** np.arange(width)).sum(-1)
        values = 2.0 * codes - 1 if kind == "Q1_0" else codes - 1.0
        scales: np.ndarray = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        return (scales * values.astype(np.float32)).reshape(len(raw), -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, 5), blocks_per_row=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_decomposed_matrix_has_the_reference_values_exactly(
    kind: Any, num_rows: Any, blocks_per_row: Any, seed: Any
) -> None:
    raw = wild_rows(kind, num_rows, blocks_per_row, seed)
    expected = reference(kind, raw)
    np.testing.assert_array_equal(to_float32(decompose(kind, raw, expected.shape)), expected)


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
def test_decomposed_parts_have_the_promised_shapes_and_types(kind: Any) -> None:
    block_size, _ = BLOCK_SIZES[kind]
    shape = (3, 2 * block_size)
    matrix = decompose(kind, wild_rows(kind, 3, 2, seed=0), shape)
    assert (matrix.format.name, matrix.shape) == (kind, shape)
    stored = matrix.format
    if (grid := stored.grid) is not None:
        assert matrix.read_codes().shape == (3, shape[1] // grid.width) and matrix.read_codes().dtype == np.uint16
        assert grid_table(grid.name).shape == (1 << grid.bits, grid.width)
        assert (None if matrix.signs is None else matrix.signs.shape) == (
            (3, shape[1] // 8) if grid.has_signs else None
        )
    else:
        assert matrix.read_codes().dtype == (np.int8 if kind == "Q8_0" else np.uint8)
    if kind != "Q8_0" and grid is None:
        highest = 2 if kind == "TQ1_0" else 2**stored.bits - 1
        assert matrix.read_codes().max() == highest, "random bytes use every code"
    for scales, form in ((matrix.scale, stored.scale), (matrix.minimum, stored.minimum)):
        assert (scales is None) == (form is None)
        if scales is not None and form is not None:
            assert scales.base.dtype == SCALE_DTYPES[form.dtype]
            assert (scales.steps is not None, scales.multiplier is not None) == (form.has_steps, form.has_multiplier)
            assert scales.base.shape == (3, shape[1] // form.span)
            assert scales.expand(shape[1] // stored.group).shape == (3, shape[1] // stored.group)
    assert (matrix.minimum is not None) == (kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
def test_rows_may_be_reordered_before_or_after(kind: Any) -> Any:
    raw = wild_rows(kind, 6, 1, seed=3)
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
    with pytest.raises(UnsupportedModelError, match=r"Q8_K is not supported; known: Q4_0, .*Q6_K"):
        decompose("Q8_K", np.zeros(292, np.uint8), (1, 256))


@pytest.mark.parametrize("shape", [(1, 33), (2, 32), (32,)])
def test_bytes_that_are_not_of_the_shape_are_refused(shape: Any) -> None:
    with pytest.raises(ModelError, match="18 bytes are not a Q4_0 matrix"):
        decompose("Q4_0", np.zeros(18, np.uint8), shape)


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
def test_a_large_matrix_is_split_in_pieces_into_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block_size, block_bytes = BLOCK_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (70, 2 * block_bytes), np.uint8)
    whole = decompose(kind, raw, (70, 2 * block_size))
    monkeypatch.setattr(quant, "PIECE_WEIGHTS", 2 * block_size * 16)  # 16 rows: four pieces, and one of 6
    for lazy_weights in (quant.LAZY_WEIGHTS, 0):
        monkeypatch.setattr(quant, "LAZY_WEIGHTS", lazy_weights)
        pieces = decompose(kind, raw, (70, 2 * block_size))
        assert isinstance(pieces.codes, LazyCodes) == (lazy_weights == 0)
        found, expected = (quant._arrays(replace(matrix, codes=matrix.read_codes())) for matrix in (pieces, whole))
        for array, other in zip(found, expected, strict=True):
            assert (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes())


def test_values_beyond_float16_become_infinite_without_a_warning() -> None:
    values = to_float16(np.array([[1e6, -1e6, 1.5]], np.float32))
    assert values.dtype == np.float16 and values.tolist() == [[np.inf, -np.inf, 1.5]]


@pytest.mark.parametrize("place", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("stride", [17, 18, 20, 24])
def test_blocks_may_lie_anywhere_in_memory(place: int, stride: int) -> None:
    """They are read in pieces of one to eight bytes, as their places in the file allow."""
    memory = np.random.default_rng(0).integers(0, 256, 6 * stride + 64).astype(np.uint8)
    first = -memory.ctypes.data % 8 + place
    blocks = memory[first : first + 6 * stride].reshape(2, 3, stride)
    packed = blocks[..., :16]
    expected = np.concatenate([packed & 15, packed >> 4], axis=-1)
    np.testing.assert_array_equal(nibbles(packed, 32), expected)
    halves = packed.reshape(2, 3, 2, 8)
    np.testing.assert_array_equal(nibbles(packed, 16), np.stack([halves & 15, halves >> 4], axis=3).reshape(2, 3, 32))
    numbers = blocks[..., 1].astype(np.uint16) << 8 | blocks[..., 0]
    np.testing.assert_array_equal(uint16(blocks, 0), numbers)
    np.testing.assert_array_equal(float16(blocks, 0).view(np.uint16), numbers)
