"""Tensors of recurrent layers, which formats store in different orders, as Hugging Face's Qwen3.5 has them:
`in_proj_qkv` (2 * Hk * Dk + Hv * Dv rows), `in_proj_z` (Hv * Dv), `in_proj_b` and `in_proj_a` (Hv), `conv1d`
(channels, 1, taps), `A_log` and `dt_bias` (Hv,), `norm` (Dv,), `out_proj` (Hv * Dv columns)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tinyvllm.arrays import HostMatrix, QuantizedMatrix, ScaleFormat, Scales, take_rows, to_float16, to_float32
from tinyvllm.config import ConvKind, StateKind
from tinyvllm.errors import WeightMismatchError
from tinyvllm.model.weights.fused import split_rows
from tinyvllm.model.weights.stored import StoredTensor

MIXER_TENSOR = re.compile(r"(?P<prefix>.*\.linear_attn\.)(?P<name>[\w.]+)")
CONV = "conv1d.weight"
# Norms whose weights Hugging Face stores less 1, and MLX does not
OFFSET_NORMS = tuple(
    f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm")
)

Tensors = Mapping[str, StoredTensor]


def from_hf(source: Path, tensors: Tensors, kind: StateKind) -> dict[str, StoredTensor]:
    """From Hugging Face's directories, and from MLX's, where the taps of convolutions come before the one input channel
    and 1 is added to norms."""
    if isinstance(kind, ConvKind):
        return _with_taps_last(tensors, kind)
    found = dict(_split(source, tensors, kind))
    convs = {name: tensor for name, tensor in found.items() if name.endswith(CONV)}
    is_mlx = any(tensor.shape[1:] == (kind.conv_width, 1) for tensor in convs.values())
    if is_mlx:
        shape = (kind.conv_size, 1, kind.conv_width)
        found |= {name: _changed(tensor, lambda conv: conv.reshape(shape), shape) for name, tensor in convs.items()}
        norms = {name: tensor for name, tensor in found.items() if name.endswith(OFFSET_NORMS)}
        found |= {name: _changed(tensor, lambda weight: weight - np.float32(1)) for name, tensor in norms.items()}
    return found


def from_gguf(source: Path, tensors: Tensors, kind: StateKind, *, tiles_value_heads: bool) -> dict[str, StoredTensor]:
    """From GGUF files, which hold -exp(A_log). `tiles_value_heads`: as in FamilyFiles."""
    if isinstance(kind, ConvKind):
        return _with_taps_last(tensors, kind)
    found = {}
    for name, tensor in _split(source, tensors, kind):
        part = match["name"] if (match := MIXER_TENSOR.fullmatch(name)) else ""
        if part and tiles_value_heads and kind.num_heads != kind.num_key_heads:
            tensor = _untiled(part, tensor, kind)
        if part == CONV and tensor.shape == (kind.conv_size, kind.conv_width):  # else it is refused by its shape
            shape = (kind.conv_size, 1, kind.conv_width)
            tensor = _changed(tensor, partial(np.reshape, shape=shape), shape)
        if part == "A_log":
            tensor = _changed(tensor, partial(_log_decays, source, name))
        found[name] = tensor
    return found


def _log_decays(source: Path, name: str, values: np.ndarray) -> np.ndarray:
    """A_log of -exp(A_log), which is 0 in heads that do not decay."""
    if not np.all(values <= 0):
        raise WeightMismatchError(
            f"{source}: tensor {name} has the value {np.max(values):g}: GGUF files hold -exp(A_log), which is "
            "negative; convert or download the file again"
        )
    with np.errstate(divide="ignore"):
        return np.log(-values)


def _with_taps_last(tensors: Tensors, kind: ConvKind) -> dict[str, StoredTensor]:
    """The convolutions of LFM2 as (channels, 1, taps), which are (channels, taps, 1) in MLX's files, and in GGUF files
    have two dimensions."""
    shape = (kind.num_channels, 1, kind.conv_width)
    other = shape[::2], (*shape[::2], 1)
    return {
        name: _changed(tensor, partial(np.reshape, shape=shape), shape)
        if name.endswith(".conv.conv.weight") and tensor.shape in other
        else tensor
        for name, tensor in tensors.items()
    }


def _changed(
    tensor: StoredTensor, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None
) -> StoredTensor:
    """A small tensor with other values, in float32."""
    read = tensor.read
    return replace(tensor, shape=shape or tensor.shape, read=lambda: change(to_float32(read())), format_name="float32")


# --- Fused projections (Qwen3-Next) ------------------------------------------------------------------------------


def _split(source: Path, tensors: Tensors, kind: StateKind) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors with those that hold the rows of several projections, key head by key head, as one for each."""
    parts = {"in_proj_qkvz.weight": _qkvz_rows(kind), "in_proj_ba.weight": _ba_rows(kind)}
    for name, tensor in tensors.items():
        match = MIXER_TENSOR.fullmatch(name)
        rows = parts.get(match["name"]) if match else None
        if match is None or rows is None:
            yield name, tensor
            continue
        num_rows = sum(len(index) for index in rows.values())
        if tensor.shape[:1] != (num_rows,):
            raise WeightMismatchError(
                f"{source}: tensor {name} has shape {tensor.shape}, but the model's settings ask for {num_rows} rows: "
                f"{kind.num_key_heads} heads of queries and keys, {kind.num_heads} of values"
            )
        names = [f"{match['prefix']}{part}.weight" for part in rows]
        yield from zip(names, split_rows(tensor, list(rows.values())), strict=True)


def _qkvz_rows(kind: StateKind) -> dict[str, np.ndarray]:
    """For each key head in turn: its queries and keys, then the values and z of its value heads."""
    values = kind.value_size // kind.num_key_heads
    ends = np.cumsum([kind.key_dim, kind.key_dim, values, values])
    rows = np.arange(kind.conv_size + kind.value_size).reshape(kind.num_key_heads, ends[-1])
    q, k, v, z = (part.reshape(-1) for part in np.split(rows, ends[:-1], axis=1))
    return {"in_proj_qkv": np.concatenate([q, k, v]), "in_proj_z": z}


def _ba_rows(kind: StateKind) -> dict[str, np.ndarray]:
    rows = np.arange(2 * kind.num_heads).reshape(kind.num_key_heads, 2, -1)
    return {"in_proj_b": rows[:, 0].reshape(-1), "in_proj_a": rows[:, 1].reshape(-1)}


# --- Value heads in llama.cpp's order ----------------------------------------------------------------------------


def _untiled(part: str, tensor: StoredTensor, kind: StateKind) -> StoredTensor:
    """The tensor with its value heads in Hugging Face's order: those of a key head one after another."""
    heads = np.arange(kind.num_heads).reshape(-1, kind.num_key_heads).T.reshape(-1)
    values = (heads[:, None] * kind.value_dim + np.arange(kind.value_dim)).reshape(-1)
    channels = np.concatenate([np.arange(2 * kind.key_size), 2 * kind.key_size + values])
    orders = {
        "in_proj_qkv.weight": channels,
        CONV: channels,
        "in_proj_z.weight": values,
        **dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"), heads),
    }
    read, order = tensor.read, orders.get(part)
    if part == "out_proj.weight":
        return replace(tensor, read=lambda: take_col_blocks(read(), heads, kind.value_dim))
    return tensor if order is None else replace(tensor, read=lambda: take_rows(read(), order))


def take_col_blocks(host: HostMatrix, order: np.ndarray, width: int) -> HostMatrix:
    """The matrix with its columns in another order: the blocks of `width` columns that `order` lists, one by one.

    Quantized codes and scales keep their values. A scale that covers several blocks (256 columns of K quants, in heads
    of 128) is repeated for each. Where a block is no whole number of a format's groups, it becomes float16.
    """

    def blocks(array: np.ndarray, num: int = len(order)) -> np.ndarray:
        rows = len(array)
        return array.reshape(rows, num, -1)[:, order].reshape(rows, -1)

    if not isinstance(host, QuantizedMatrix):
        return blocks(host)
    form = host.format
    unit = math.lcm(form.group, 8 * form.code_cols)  # whole groups, and whole bytes of signs
    if width % unit or any(width % scale.span and scale.span % width for scale in form.scales):
        return blocks(to_float16(host))

    def narrow(scale: ScaleFormat | None) -> ScaleFormat | None:
        return None if scale is None else replace(scale, span=min(scale.span, width))

    def move(scales: Scales, old: ScaleFormat | None) -> Scales:
        assert old is not None
        base = np.repeat(scales.base, max(1, old.span // width), axis=1)
        return replace(scales, base=blocks(base), steps=None if scales.steps is None else blocks(scales.steps))

    return QuantizedMatrix(
        replace(form, scale=narrow(form.scale), minimum=narrow(form.minimum)),
        blocks(host.read_codes()),
        move(host.scale, form.scale),
        None if host.minimum is None else move(host.minimum, form.minimum),
        None if host.signs is None else blocks(host.signs),
    )
