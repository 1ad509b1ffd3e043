"""Uploads to a CPU lie in mappings that they share."""

from __future__ import annotations

import gc
import mmap
import weakref
from itertools import pairwise

import numpy as np
import pytest
from tinygrad import Tensor

from tinyvllm.device import handle
from tinyvllm.device.chunks import CHUNK_BYTES, Chunks
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.transfer import copy_out_floats


def mapping_of(tensor: Tensor) -> object:
    return tensor.uop.base.buffer._buf.meta


def test_memory_is_zeroed_and_apart() -> None:
    chunks, sizes = Chunks(), (1, 4096, 4097, CHUNK_BYTES, 0, CHUNK_BYTES + 1, 8)
    taken = [chunks.take(nbytes) for nbytes in sizes]
    spans = sorted((address, address + nbytes) for (address, _), nbytes in zip(taken, sizes, strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(address % mmap.PAGESIZE == 0 and not any(mapping[:]) for address, mapping in taken)
    assert len({id(mapping) for _, mapping in taken[:3]}) == 1


def test_uploads_share_a_mapping_which_goes_with_the_last(
    device: DeviceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not device.is_cpu:
        return
    monkeypatch.setattr(handle, "_CHUNKS", Chunks())
    values = np.arange(3000, dtype=np.float32)
    first, second = device.upload(values), device.upload(values + 1)
    assert mapping_of(first) is mapping_of(second)
    mapping = weakref.ref(mapping_of(first))
    handle._CHUNKS.take(CHUNK_BYTES)  # the next chunk
    del first
    gc.collect()
    np.testing.assert_array_equal(copy_out_floats(second.uop.base.buffer, is_mapped=True), values + 1)
    del second
    gc.collect()
    assert mapping() is None
