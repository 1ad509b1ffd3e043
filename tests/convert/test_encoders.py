"""Encoders against ggml's and MLX's own results (data/encoded.json, which write_references.py makes)."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from tests.convert.write_references import DATA, GGML_TYPES, MLX_CASES, make_matrix
from tinyvllm.arrays import to_float32
from tinyvllm.convert.affine import encode_affine
from tinyvllm.convert.dense import encode_dense
from tinyvllm.convert.float8 import BLOCK, encode_by_block, encode_by_channel
from tinyvllm.convert.ggml_blocks import ENCODERS, encode
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.quant import decompose
from tinyvllm.model.weights.stored import DENSE_DTYPES

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
VALUES = make_matrix()


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    assert read["sum"] == pytest.approx(float(np.abs(VALUES).sum())), "another matrix: write it again"
    return read


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


def rmse(ggml_type: str, raw: np.ndarray) -> float:
    found = to_float32(decompose(ggml_type, raw, VALUES.shape))
    assert np.isfinite(found).all()
    return float(np.sqrt(np.mean((found - VALUES) ** 2)))


@pytest.mark.parametrize("ggml_type", GGML_TYPES)
def test_blocks_are_ggmls(written: dict[str, Any], ggml_type: str) -> None:
    """Bit for bit in the simple types. In those with a search, sums in another order now and then choose another of two
    scales that are equally good, and Q6_K's codes in groups whose scale is zero are arbitrary."""
    expected, found = unpack(written["ggml"][ggml_type]), encode(ggml_type, VALUES).reshape(-1)
    block_bytes = GGML_TYPES[ggml_type][2]
    same = (expected.reshape(-1, block_bytes) == found.reshape(-1, block_bytes)).all(axis=1).mean()
    print(f"{ggml_type}: {same:.1%} of the blocks are equal; {rmse(ggml_type, found) / rmse(ggml_type, expected)=:.6f}")
    assert same == 1.0 if ggml_type in EXACT else same >= 0.75
    assert rmse(ggml_type, found) == pytest.approx(rmse(ggml_type, expected), rel=5e-3)


@pytest.mark.parametrize(("bits", "group", "dtype"), MLX_CASES)
def test_affine_codes_scales_and_biases_are_mlxs(written: dict[str, Any], bits: int, group: int, dtype: str) -> None:
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    found = encode_affine(VALUES, bits, group, DENSE_DTYPES[name])
    for ours, theirs in zip(found, written["mlx"][f"{bits}-{group}-{dtype}"], strict=True):
        assert np.ascontiguousarray(ours).reshape(-1).view(np.uint8).tolist() == unpack(theirs).tolist()


def test_every_encoder_is_compared() -> None:
    assert ENCODERS.keys() == GGML_TYPES.keys()
    with pytest.raises(UnsupportedModelError, match="no encoder for Q3_X; known: Q4_0"):
        encode("Q3_X", VALUES)


def test_fp8_is_within_half_a_step_of_e4m3() -> None:
    """A code has 3 bits after the first: the error is at most 1/16 of the value, or half the smallest step."""
    wide = np.concatenate([VALUES, VALUES[:, :77]], axis=1)  # the last block of columns is not full
    codes, scales = encode_by_channel(wide, DENSE_DTYPES["BF16"])
    by_row = codes.astype(np.float32) * scales.astype(np.float32)
    codes, block_scales = encode_by_block(np.tile(wide, (11, 1)))
    assert block_scales.shape == (2, 5)  # of 132 rows and 589 columns
    expanded = np.repeat(np.repeat(block_scales, BLOCK, axis=0)[:132], BLOCK, axis=1)[:, : wide.shape[1]]
    by_block = (codes.astype(np.float32) * expanded)[: len(wide)]
    steps = (scales.astype(np.float32), expanded[: len(wide)])
    for found, step in zip((by_row, by_block), steps, strict=True):
        assert (np.abs(found - wide) <= np.maximum(np.abs(wide) / 16, step * 2.0**-10) * 1.001).all()
    assert (by_row[0] == 0).all()


def test_a_value_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tensor w has values up to 70000, but float16 ends at 65504: use --to bf16"):
        encode_dense(np.array([1.0, 70000.0], np.float32), "F16", "w")
    assert np.isinf(encode_dense(np.array([np.inf], np.float32), "F16", "w")).all()
