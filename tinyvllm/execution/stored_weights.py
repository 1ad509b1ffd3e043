"""The formats of a model's matrices, in its files or of random weights, without reading values."""

from __future__ import annotations

import math
from collections import Counter

from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.errors import ProfilingError
from tinyvllm.execution.model_check import bytes_per_weight
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.model.weights.names import EMBEDDING_NAME, HEAD_NAME
from tinyvllm.model.weights.random import FILE_FORMATS, RANDOM_KINDS
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.profiling.roofline import BYTES_PER_WEIGHT, WeightBytes
from tinyvllm.storage.gguf_types import BLOCK_SIZES


def stored_weights(files: ModelFiles, config: ModelConfig) -> WeightBytes:
    """Bytes per weight once they are on the device. Raises ModelError."""
    tensors = {name: one for name, one in open_checkpoint(files, config).tensors.items() if len(one.shape) > 1}
    table = {name: one for name, one in tensors.items() if name in (EMBEDDING_NAME, HEAD_NAME)}
    layers = {name: one for name, one in tensors.items() if name not in table}
    names = [_main_format(part) for part in (layers, table)]
    name = names[0] if names[0] == names[1] else f"{names[0]}, embedding and head {names[1]}"
    return WeightBytes(name, _mean_bytes(layers), _mean_bytes(table))


def weights_of_kind(kind: str) -> WeightBytes:
    """All matrices in one of RANDOM_KINDS, upper or lower case. Raises ProfilingError for another."""
    name = kind if kind in RANDOM_KINDS else {one.lower(): one for one in RANDOM_KINDS}.get(kind.lower())
    if name is None:
        raise ProfilingError(
            f"--weights is {kind!r}, but a prediction knows only one format of all matrices: {', '.join(RANDOM_KINDS)}"
        )
    if name in FILE_FORMATS:
        size = bytes_per_weight(FILE_FORMATS[name])
    else:  # ggml's, as in a file unless they are unpacked
        count, num_bytes = BLOCK_SIZES.get(name, (1, 0))
        size = BYTES_PER_WEIGHT.get(name, num_bytes / count)
    return WeightBytes(name, size, size)


def _main_format(tensors: dict[str, StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.format_name] += tensor.num_bytes
    return sizes.most_common(1)[0][0]


def _mean_bytes(tensors: dict[str, StoredTensor]) -> float:
    counts = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    return sum(_bytes_on_device(tensors[name], count) for name, count in counts.items()) / sum(counts.values())


def _bytes_on_device(tensor: StoredTensor, count: int) -> float:
    """Those of its format, or as in the file if the format's size depends on its groups."""
    if tensor.is_converted:
        return count * BYTES_PER_WEIGHT["float16"]
    size = BYTES_PER_WEIGHT.get(tensor.format_name)
    return tensor.num_bytes if size is None else count * size
