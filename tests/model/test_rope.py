"""The table of rotary angles against plain formulas, and against transformers' own functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.model.write_rope_references import CASES, DATA, HEAD_DIM, SIZES
from tinyvllm.config import Rope, RopeScaling
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.rope import RUN, inverse_frequencies, rope_table
from tinyvllm.storage.families import olmo3
from tinyvllm.storage.hf_rope import read_rope, read_rope_by_layer
from tinyvllm.storage.values import Values

LLAMA31 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
# some of the inverse frequencies that transformers 5.23.0 computes for Llama 3.1 (theta 500000, D 128), by index
LLAMA31_FREQUENCIES = {
    0: 1.0,
    20: 0.016560440883040428,
    28: 0.0032114461064338684,
    31: 0.0008567514596506953,
    34: 0.0001785077911335975,
    45: 1.2297638932067368e-05,
    63: 3.068925877869333e-07,
}


def test_the_table_holds_cosines_then_sines() -> None:
    table = rope_table(Rope(10000.0), 64, 300)
    assert table.shape == (300, 64)
    assert table.dtype == np.float32
    for position, i in ((0, 0), (1, 0), (17, 5), (299, 31)):
        angle = position * 10000.0 ** (-2 * i / 64)
        assert table[position, i] == pytest.approx(math.cos(angle), abs=1e-7)
        assert table[position, 32 + i] == pytest.approx(math.sin(angle), abs=1e-7)


def test_angles_of_far_positions_are_exact() -> None:
    """float32 angles would be off by 0.008 at position 131071."""
    assert rope_table(Rope(10000.0), 64, 131072)[-1, 0] == pytest.approx(math.cos(131071), abs=1e-7)


def test_every_position_has_its_own_angles() -> None:
    frequencies = inverse_frequencies(Rope(10000.0), 8)
    for num_positions in (1, RUN, 2 * RUN + 3):
        angles = np.arange(num_positions)[:, None] * frequencies
        table = rope_table(Rope(10000.0), 8, num_positions)
        np.testing.assert_allclose(table, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=6e-8)


def test_linear_scaling_divides_positions() -> None:
    scaled = inverse_frequencies(Rope(10000.0, RopeScaling("linear", 4.0)), 64)
    np.testing.assert_allclose(scaled, inverse_frequencies(Rope(10000.0), 64) / 4)


def test_llama3_scaling_by_wavelength() -> None:
    """Short waves stay, long ones are stretched by the factor, and those between are a mixture."""
    plain = inverse_frequencies(Rope(500000.0), 128)
    scaled = inverse_frequencies(Rope(500000.0, LLAMA31), 128)
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == before
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before)


def test_llama3_scaling_equals_transformers() -> None:
    scaled = inverse_frequencies(Rope(500000.0, LLAMA31), 128)
    np.testing.assert_allclose(scaled[list(LLAMA31_FREQUENCIES)], list(LLAMA31_FREQUENCIES.values()), rtol=1e-6)


def test_stored_divisors_divide() -> None:
    divisors = tuple(np.linspace(1, 8, 32))
    got = inverse_frequencies(Rope(10000.0, divisors=divisors), 64)
    np.testing.assert_allclose(got, inverse_frequencies(Rope(10000.0), 64) / divisors)


def test_an_unknown_scaling_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match="rope scaling 'xpos' is not known; known: linear, llama3"):
        inverse_frequencies(Rope(10000.0, RopeScaling("xpos", 4.0)), 64)


@pytest.mark.parametrize("name", CASES)
def test_config_json_means_what_it_means_to_transformers(name: str) -> None:
    class_name, settings, num_positions, layer_type = CASES[name]
    expected = json.loads(DATA.read_text(encoding="utf-8"))["cases"][name]
    defaults = {"Glm4Config": {"partial_rotary_factor": 0.5}, "Olmo3Config": olmo3.FILES.hf_defaults}
    values = Values(Path("config.json"), {**defaults.get(class_name, {}), **SIZES, **settings})
    if layer_type is None:
        rope = read_rope(values, HEAD_DIM, {"su": "longrope"} if class_name == "Phi3Config" else {})
    else:
        rope = read_rope_by_layer(values, HEAD_DIM, layer_type, None)
    frequencies = np.array(expected["frequencies"])
    np.testing.assert_allclose(inverse_frequencies(rope, HEAD_DIM, num_positions), frequencies, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(expected["attention_factor"], rel=1e-6)
    angles = np.arange(num_positions)[:, None] * frequencies
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * expected["attention_factor"]
    np.testing.assert_allclose(rope_table(rope, HEAD_DIM, num_positions)[:3], table[:3], atol=1e-6)
