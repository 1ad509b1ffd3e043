"""The words of the `dot` layout, packed on the host."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvllm.ops.formats.dots import HALF_WORD, dot_cols, pack_dots


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_each_column_has_its_bits_in_a_word(width: int, dtype: type) -> None:
    """Those above a code's width count for nothing."""
    codes: np.ndarray = np.random.default_rng(width).integers(0, 256, (5, 96)).astype(np.uint8).view(dtype)
    words = pack_dots(codes, width)
    assert words.shape == (5, 96 // dot_cols(width)) and words.dtype == np.uint32
    for column in range(96):
        run, place = divmod(column, dot_cols(width))
        shift = place % 2 * HALF_WORD + place // 2 * width
        read = words[:, run] >> np.uint32(shift) & np.uint32((1 << width) - 1)
        np.testing.assert_array_equal(read, codes[:, column].view(np.uint8) & (1 << width) - 1)
    np.testing.assert_array_equal(pack_dots(codes[::2], width), words[::2])
