"""Packing loses nothing: what comes out of either layout is what went in, and embedding rows are rows of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.builders import encode_floats
from tests.ops.builders import DENSE, FORMATS, QUANTIZED, make_host, make_step, make_step_of, normal
from tests.sweeps import swept
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.device.handle import DeviceHandle, has_half
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.model.weights.random import FILE_FORMATS, RandomWeights
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.formats import matrix as matrices
from tinyvllm.ops.formats.matrix import Planes, pack, unpack
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH
from tinyvllm.ops.step_inputs import StepLayout

LAYOUTS = ("panel", "row")


@pytest.mark.parametrize(
    ("fmt", "layout"),
    swept(
        product(FORMATS, LAYOUTS),
        [(fmt, LAYOUTS[i % 2]) for i, fmt in enumerate(FORMATS) if i % 3 == 0],  # all of them are embedded, below
    ),
)
def test_packing_and_unpacking_gives_the_same_values(device: DeviceHandle, kind: str, fmt: str, layout: str) -> None:
    host = make_host(fmt, 40, 512)
    matrix = pack(host, layout, None, device.name)
    values = unpack(matrix).numpy()
    tolerance = 0.0 if fmt in DENSE else 1e-7  # a fused multiply-add may leave out one of ggml's roundings
    if fmt == "float16" and not has_half(device.name):
        tolerance = 6.2e-5  # tinygrad's emulation has no subnormal numbers
    np.testing.assert_allclose(values[:40], to_float32(host), rtol=0, atol=tolerance)
    assert (values[40:] == 0).all(), "rows after the used ones"


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantized_matrices_keep_the_size_of_their_blocks(device: DeviceHandle, fmt: str) -> None:
    """ggml's bits per weight; the 6-bit steps of Q4_K and Q5_K take a byte here."""
    bits = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.5625}
    matrix = pack(make_host(fmt, 64, 512), "panel", None, device.name)
    assert matrix.nbytes * 8 / (64 * 512) == bits[fmt]
    assert len(matrix.planes) == Planes.count(matrix.format)


@pytest.mark.parametrize("layout", ["panel", "row"])
def test_packing_some_rows_at_a_time_gives_the_same_planes(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    host = make_host("Q5_K", 200, 256)
    whole = [plane.numpy() for plane in pack(host, layout, None, "CPU").planes]
    dense = pack(host, layout, "float32", "CPU", dequantize=True).planes[0].numpy()
    monkeypatch.setattr(matrices, "CHUNK_WEIGHTS", 64 * 256)
    for plane, expected in zip(pack(host, layout, None, "CPU").planes, whole, strict=True):
        np.testing.assert_array_equal(plane.numpy(), expected)
    np.testing.assert_array_equal(pack(host, layout, "float32", "CPU", dequantize=True).planes[0].numpy(), dense)


@pytest.mark.parametrize("layout", [*LAYOUTS, "dot"])
@pytest.mark.parametrize("kind", [*QUANTIZED_KINDS, *FILE_FORMATS])
def test_planes_that_nobody_reads_have_the_same_sizes(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a step that is traced without memory is the one that is traced with it."""
    host = RandomWeights(kind, 0).take("w", (200, 512))
    monkeypatch.setattr(matrices, "CHUNK_WEIGHTS", 64 * 512)
    (fmt, planes), (same, unread) = (matrices.planes_of(host, layout, are_read=are_read) for are_read in (True, False))
    assert fmt == same and len(planes) == len(unread) > 1
    for plane, other in zip(planes, unread, strict=True):
        assert plane.shape == other.shape and plane.dtype == other.dtype


@pytest.mark.parametrize("fmt", [*DENSE, "Q4_K"])
@pytest.mark.parametrize("dtype", DENSE)
def test_dense_values_are_recast_and_codes_only_when_dequantized(device: DeviceHandle, fmt: str, dtype: str) -> None:
    host = make_host(fmt, 32, 256)
    if fmt == "Q4_K":
        assert pack(host, "panel", dtype, device.name).format.name == "Q4_K"
    matrix = pack(host, "panel", dtype, device.name, dequantize=True)
    assert matrix.format.name == dtype
    expected = encode_floats(to_float32(host), dtype).astype(np.float32)
    np.testing.assert_array_equal(unpack(matrix).numpy(), expected)


def test_dequantized_matrices_are_float16_unless_told(device: DeviceHandle) -> None:
    assert pack(make_host("Q8_0", 32, 32), "panel", None, device.name, dequantize=True).format.name == "float16"


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even(device: DeviceHandle) -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-9], np.float32)
    matrix = pack(np.resize(values, (32, 160)), "row", "bfloat16", device.name)
    np.testing.assert_array_equal(
        unpack(matrix).numpy()[0, :5], np.array([1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7, -1.0], np.float32)
    )


def test_a_hosts_codes_are_not_changed_by_packing(device: DeviceHandle) -> None:
    host = make_host("Q5_K", 32, 256)
    assert isinstance(host, QuantizedMatrix)
    before = host.read_codes().copy()
    pack(host, "panel", None, device.name)
    np.testing.assert_array_equal(host.read_codes(), before)


# -- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_reads_rows_of_the_table(backend: Backend, fmt: str) -> None:
    host = make_host(fmt, 72, 256)
    layout = StepLayout(5, 2, 1, 8)
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = [0, 71, 33, 16, 33]
    out = backend.embed(backend.matrix(host), make_step_of(backend, layout, buffer)).numpy().reshape(5, 256)
    np.testing.assert_allclose(out, to_float32(host)[[0, 71, 33, 16, 33]], rtol=0, atol=1e-7)


def test_a_token_id_beyond_the_table_reads_its_last_row(backend: Backend, reference: ReferenceBackend) -> None:
    """Never memory beyond it. The engine does not send such ids; a kernel must not rely on that."""
    host: Any = make_host("float32", 40, 32)
    layout = StepLayout(3, 1, 1, 8)
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = [40, 2**31 - 1, -7]
    for ops in (backend, reference):
        out = ops.embed(ops.matrix(host), make_step_of(ops, layout, buffer)).numpy().reshape(3, 32)
        np.testing.assert_array_equal(out, host[[39, 39, 0]])


@pytest.mark.parametrize("fmt", ["float16", "Q4_K"])
def test_a_token_id_below_zero_names_a_row_of_the_output_before(
    backend: Backend, reference: ReferenceBackend, fmt: str
) -> None:
    """Beyond the last row it is the last one's; a token of -1, of a row without finite logits, reads the first."""
    host, layout = make_host(fmt, 72, 256), StepLayout(6, 4, 1, 8)
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = [-1, 7, -3, -2, -4, -(2**31)]
    newest = np.full((4, OUT_WIDTH), 99, np.int32)
    newest[:, OUT_TOKEN] = [71, 12, 30, -1]
    for ops in (backend, reference):
        inputs, output = ops.device.upload(buffer), ops.device.upload(newest.reshape(-1))
        out = (
            ops.embed(ops.matrix(host), make_step_of(ops, layout, inputs, previous_output=output))
            .numpy()
            .reshape(6, 256)
        )
        np.testing.assert_allclose(out, to_float32(host)[[71, 7, 30, 12, 0, 0]], rtol=0, atol=1e-7)


def test_taken_rows_are_those_of_the_logit_rows(backend: Backend, reference: ReferenceBackend) -> None:
    x, layout = normal(6, 64), StepLayout(6, 3, 1, 8)
    buffer = make_step(layout, [])
    layout.views(buffer)["logit_rows"][:] = [5, 0, 2]
    for ops in (backend, reference):
        out = ops.take_rows(ops.device.upload(x), make_step_of(ops, layout, buffer), 64).numpy()
        np.testing.assert_array_equal(out.reshape(3, 64), x[[5, 0, 2]])
