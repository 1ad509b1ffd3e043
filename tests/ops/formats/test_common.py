"""A common format of two matrices holds the values of both."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.ops.formats.drawn import BY_NAME, draw_matrix
from tinyvllm.arrays import Format, QuantizedMatrix, to_float32
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.ops.backend import gate_over_up
from tinyvllm.ops.formats.common import in_common_format

KNOWN: dict[str, Format] = {kind.format.name: kind.format for kind in QUANTIZED_KINDS.values()}
KNOWN |= {fmt.name: fmt for fmt in BY_NAME.values() if fmt.name not in KNOWN}


@pytest.mark.parametrize(
    ("gate", "up", "bits", "group", "has_minimum"),
    [
        ("Q4_0", "Q5_0", 5, 32, False),
        ("Q4_0", "Q8_0", 8, 32, False),
        ("Q4_K", "Q6_K", 6, 16, True),
        ("Q8_0", "Q4_K", 8, 32, True),
        ("affine4_g64", "affine6_g64", 6, 64, True),
        ("affine8_g128", "affine4_g64", 8, 64, True),
        ("W4A16", "GPTQ", 4, 64, True),
        ("Q2_K", "Q3_K", 3, 16, True),
    ],
)
def test_both_keep_their_values(gate: str, up: str, bits: int, group: int, has_minimum: bool) -> None:
    hosts = [draw_matrix(KNOWN[name], 32, 256, seed) for seed, name in enumerate((gate, up))]
    common = in_common_format(hosts)
    assert common is not None
    assert common[0].format == common[1].format
    fmt = common[0].format
    assert (fmt.name, fmt.bits, fmt.group, fmt.minimum is not None) == (f"{gate}+{up}", bits, group, has_minimum)
    for host, recast in zip(hosts, common, strict=True):
        expected = to_float32(host)
        np.testing.assert_allclose(to_float32(recast), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_gate_and_up_of_different_formats_stay_packed(caplog: pytest.LogCaptureFixture) -> None:
    gate, up = draw_matrix(KNOWN["Q4_0"], 64, 256), draw_matrix(KNOWN["Q5_0"], 64, 256)
    both = gate_over_up(gate, up)
    assert isinstance(both, QuantizedMatrix)
    np.testing.assert_array_equal(to_float32(both), np.concatenate([to_float32(gate), to_float32(up)]))
    assert not caplog.records


def test_codes_that_are_no_integers_become_float16_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gate, up = draw_matrix(KNOWN["Q4_0"], 64, 256), draw_matrix(KNOWN["MXFP4"], 64, 256)
    with caplog.at_level(logging.WARNING):
        both = gate_over_up(gate, up)
    assert isinstance(both, np.ndarray)
    assert both.dtype == np.float16
    assert "gate in Q4_0 and up projection in MXFP4 have no common format: both become float16, 0.1 MB" in caplog.text
