"""Tensors that hold the rows of several modules (Phi's qkv_proj and gate_up_proj), as one tensor for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

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
        if whole is None:
            found[name] = tensor
            continue
        prefix, parts = module.removesuffix(whole), fused[whole]
        names = [f"{prefix}{part}.{suffix}" for part in parts]
        found |= dict(zip(names, _parts(tensor, [_num_rows(part, config) for part in parts]), strict=True))
    return found


def _num_rows(module: str, config: ModelConfig) -> int:
    name = module.rpartition(".")[2]
    sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return sizes.get(name, config.ffn_size)


def _parts(tensor: StoredTensor, counts: Sequence[int]) -> list[StoredTensor]:
    """The tensor's rows, `counts` of them at a time."""
    source, parts, start = _Source(tensor.read, len(counts)), [], 0
    for index, count in enumerate(counts):
        end = start + count if index < len(counts) - 1 else max(start, tensor.shape[0])
        read = partial(source.rows, slice(start, end))
        num_bytes = tensor.num_bytes * (end - start) // max(tensor.shape[0], 1)
        parts.append(replace(tensor, shape=(end - start, *tensor.shape[1:]), read=read, num_bytes=num_bytes))
        start = end
    return parts


class _Source:
    """Owns a fused tensor's values from the first read of a part to the last, so that they are decoded once."""

    def __init__(self, read: Callable[[], HostMatrix], num_parts: int) -> None:
        self._read, self._num_parts = read, num_parts
        self._num_left = num_parts
        self._values: HostMatrix | None = None

    def rows(self, rows: slice) -> HostMatrix:
        values = self._read() if self._values is None else self._values
        self._num_left -= 1
        self._values = values if self._num_left else None
        if not self._num_left:
            self._num_left = self._num_parts
        return take_rows(values, rows)
