"""kv_b_proj in each form that files have: whole, whole and quantized, and split by head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.ops.builders import make_host
from tinyvllm.arrays import HostMatrix, QuantizedMatrix, to_float32
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import LatentKind
from tinyvllm.model.weights.latents import split_latents
from tinyvllm.model.weights.stored import StoredTensor

HEADS, LATENT = 3, LatentKind(rank=64, rope_dim=16, nope_dim=32, value_dim=96)
CONFIG = replace(find_shape("glm-4.7-flash"), num_heads=HEADS, latent=LATENT)
PREFIX = "model.layers.1.self_attn."


def stored(values: HostMatrix, shape: tuple[int, ...], format_name: str) -> StoredTensor:
    return StoredTensor(shape, lambda: values, format_name, 1000)


@pytest.mark.parametrize("fmt", ["float16", "Q8_0"])
def test_a_whole_matrix_is_split_by_head(fmt: str) -> None:
    shape = (HEADS * (32 + 96), 64)
    whole = make_host(fmt, *shape)
    found = split_latents({f"{PREFIX}kv_b_proj.weight": stored(whole, shape, fmt)}, CONFIG)
    assert found.keys() == {f"{PREFIX}{letter}_b_proj.weight" for letter in "kv"}
    keys, values = (found[f"{PREFIX}{letter}_b_proj.weight"] for letter in "kv")
    assert (keys.shape, values.shape) == ((HEADS * 64, 32), (HEADS * 96, 64))
    by_head = to_float32(whole).reshape(HEADS, 32 + 96, 64)
    read = keys.read()
    assert isinstance(read, np.ndarray) and read.dtype == np.float16
    np.testing.assert_array_equal(read.reshape(HEADS, 64, 32), by_head[:, :32].swapaxes(1, 2).astype(np.float16))
    np.testing.assert_array_equal(to_float32(values.read()).reshape(HEADS, 96, 64), by_head[:, 32:])
    assert isinstance(values.read(), QuantizedMatrix) == (fmt == "Q8_0")  # rows keep their groups
    assert (keys.is_converted, values.is_converted) == (fmt == "Q8_0", False)


@pytest.mark.parametrize("names", [("k_b_proj", "v_b_proj"), ("embed_q", "unembed_out")])
def test_heads_become_rows_of_one_matrix(names: tuple[str, str]) -> None:
    shapes = ((HEADS, 64, 32), (HEADS, 96, 64))
    tensors = {
        f"{PREFIX}{name}.weight": stored(np.ones(shape, np.float16), shape, "float16")
        for name, shape in zip(names, shapes, strict=True)
    }
    found = split_latents(tensors, CONFIG)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        f"{PREFIX}k_b_proj.weight": (HEADS * 64, 32),
        f"{PREFIX}v_b_proj.weight": (HEADS * 96, 64),
    }
    assert all(tensor.read().shape == tensor.shape for tensor in found.values())
