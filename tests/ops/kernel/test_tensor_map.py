"""Tensor maps by the driver: what it is asked for. What copies fetch by them is compared on a GPU, in
tests/ops/gpu/test_quantized_cluster.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinygrad import dtypes
from tinygrad.device import Buffer
from tinygrad.runtime.autogen import cuda

from tinyvllm.ops.kernel import tensor_map
from tinyvllm.ops.kernel.hopper import MAP_WORDS, Box
from tinyvllm.ops.kernel.tensor_map import MAP_ALIGNED, encode_map

BOX = Box((64, 32, 2, 8), (1024, 32768, 128), (64, 8, 2, 4))


def on_cuda(address: int) -> Any:
    """A buffer of which only the address is known."""
    memory = SimpleNamespace(_buf=cuda.CUdeviceptr_v2(address))
    return SimpleNamespace(device="CUDA", ensure_allocated=lambda: memory)


def test_the_driver_is_asked_for_a_matrix_and_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def encode(target: Any, *rest: Any) -> int:
        asked.extend(rest)
        words = np.frombuffer(target, np.uint32)
        assert words.ctypes.data % MAP_ALIGNED == 0
        words[:] = np.arange(MAP_WORDS)
        return 0

    monkeypatch.setattr(cuda, "cuTensorMapEncodeTiled", encode)
    monkeypatch.setattr(tensor_map, "has_memory", lambda device: True)
    np.testing.assert_array_equal(encode_map(on_cuda(1 << 40), BOX), np.arange(MAP_WORDS))
    kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill = asked
    assert (kind, rank, address) == (cuda.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, 1 << 40)
    assert [*sizes] == [64, 32, 2, 8] and [*strides] == [1024, 32768, 128]
    assert [*box] == [64, 8, 2, 4] and [*steps] == [1] * 4
    assert swizzle == cuda.CU_TENSOR_MAP_SWIZZLE_128B and interleave == promotion == fill == 0


def test_what_has_no_address_has_an_empty_map() -> None:
    assert not encode_map(Buffer("CPU", 4096, dtypes.uint), BOX).any()
