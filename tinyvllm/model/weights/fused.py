"""Tensors that hold the rows of several modules (Phi's qkv_proj and gate_up_proj), as one tensor for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np

from tinyvllm.arrays import HostMatrix, take_rows
from tinyvllm.config import ModelConfig
from tinyvllm.model.weights.stored import StoredTensor


def split_fused(
    tensors: Mapping[str, StoredTensor], fused: Mapping[str, tuple[str, ...]], config: ModelConfig
) -> dict[str, StoredTensor]:
    """`fused`: as in FamilyFiles. Rows that are left over are the last module's, whose shape is then refused."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        whole = next((key for key in fused if module.endswith("." + key)), None)
        if whole is None or not tensor.shape:  # a single number is refused later, as a tensor of no module
            found[name] = tensor
            continue
        prefix, parts = module.removesuffix(whole), fused[whole]
        names = [f"{prefix}{part}.{suffix}" for part in parts]
        slices = _slices(tensor.shape[0], [_num_rows(part, config) for part in parts])
        found |= dict(zip(names, split_rows(tensor, slices), strict=True))
    return found


def _num_rows(module: str, config: ModelConfig) -> int:
    name = module.rpartition(".")[2]
    sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return sizes.get(name, config.ffn_size)


def _slices(num_rows: int, counts: Sequence[int]) -> list[slice]:
    """`counts` rows at a time, the last one's up to the end."""
    *starts, last, _ = accumulate(counts, initial=0)
    return [*map(slice, starts, [*starts[1:], last]), slice(last, max(last, num_rows))]


def split_rows(tensor: StoredTensor, parts: Sequence[slice | np.ndarray]) -> list[StoredTensor]:
    """A tensor for each of the parts, which say what its rows are. The values are decoded once for all of them."""
    source, found = _Source(tensor.read, len(parts)), []
    for rows in parts:
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        num_bytes = tensor.num_bytes * count // max(tensor.shape[0], 1)
        shape, read = (count, *tensor.shape[1:]), partial(source.rows, rows)
        found.append(replace(tensor, shape=shape, read=read, num_bytes=num_bytes))
    return found


class _Source:
    """Owns a fused tensor's values from the first read of a part to the last, so that they are decoded once."""

    def __init__(self, read: Callable[[], HostMatrix], num_parts: int) -> None:
        self._read, self._num_parts = read, num_parts
        self._num_left = num_parts
        self._values: HostMatrix | None = None

    def rows(self, rows: slice | np.ndarray) -> HostMatrix:
        values = self._read() if self._values is None else self._values
        self._num_left -= 1
        self._values = values if self._num_left else None
        if not self._num_left:
            self._num_left = self._num_parts
        return take_rows(values, rows)
