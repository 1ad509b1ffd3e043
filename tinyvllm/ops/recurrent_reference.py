"""Recurrent layers in NumPy, token by token: documents their kernels, and is what their tests compare against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tinyvllm.config import ConvKind, StateKind
from tinyvllm.ops.recurrent_spec import UNIT_EPS, section_sizes


@dataclass(frozen=True)
class RecurrentTables:
    """Those of a `RecurrentLayer`, on the host."""

    conv: np.ndarray  # (conv_width, conv_size)
    log_decay: np.ndarray  # (Hv,)
    decay_bias: np.ndarray  # (Hv,)
    norm: np.ndarray  # (Dv,)


def recur_reference(
    projections: np.ndarray,
    kind: StateKind,
    tables: RecurrentTables,
    views: Mapping[str, np.ndarray],
    matrices: np.ndarray,
    convs: np.ndarray,
    *,
    is_decode: bool,
) -> np.ndarray:
    """`Operations.recur` of projections (T, columns): (T, Hv * Dv) float32. `views`: those of the step's inputs.
    Overwrites slots of matrices (slots, Hv, Dk, Dv) and convs (slots, conv_width, conv_size)."""
    out = np.zeros((len(projections), kind.value_size), np.float32)
    reads, writes = views["state_reads"], views["state_writes"]
    old_matrices, old_convs = matrices[reads].copy(), convs[reads].copy()  # a slot may be read twice, and written
    for seq, (first, end) in enumerate(_rows(views, is_decode)):
        if end <= first or writes[seq] == 0:
            continue
        position = int(views["positions"][first])
        matrix, conv = old_matrices[seq], old_convs[seq]
        if position == 0:
            matrix, conv = np.zeros_like(matrix), np.zeros_like(conv)
        for row in range(first, end):
            conv[(position + row - first) % kind.conv_width] = projections[row, : kind.conv_size]
            ordered = np.roll(conv, -((position + row - first + 1) % kind.conv_width), axis=0)  # the oldest first
            mixed = silu((ordered * tables.conv).sum(0))
            matrix, out[row] = _step(mixed, projections[row, kind.conv_size :], matrix, kind, tables)
        matrices[writes[seq]], convs[writes[seq]] = matrix, conv
    return out


def convolve_reference(
    projected: np.ndarray,
    kind: ConvKind,
    taps: np.ndarray,
    views: Mapping[str, np.ndarray],
    convs: np.ndarray,
    *,
    is_decode: bool,
) -> np.ndarray:
    """`Operations.convolve` of a projection (T, 3 * channels): (T, channels). `taps` (conv_width, channels). Overwrites
    slots of convs (slots, conv_width, channels)."""
    b, c, x = np.split(projected[:, : 3 * kind.num_channels], 3, axis=1)
    out, old = np.zeros_like(c), convs[views["state_reads"]].copy()
    for seq, (first, end) in enumerate(_rows(views, is_decode)):
        if end <= first or views["state_writes"][seq] == 0:
            continue
        position = int(views["positions"][first])
        conv = np.zeros_like(old[seq]) if position == 0 else old[seq]
        for row in range(first, end):
            conv[(position + row - first) % kind.conv_width] = b[row] * x[row]
            ordered = np.roll(conv, -((position + row - first + 1) % kind.conv_width), axis=0)  # the oldest first
            out[row] = c[row] * (ordered * taps).sum(0)
        convs[views["state_writes"][seq]] = conv
    return out


def _rows(views: Mapping[str, np.ndarray], is_decode: bool) -> Sequence[tuple[int, int]]:
    """(first row, end) of each sequence."""
    if is_decode:
        return [(row, row + 1) for row in range(len(views["state_reads"]))]
    bounds = views["first_rows"].tolist()
    return list(pairwise(bounds))


def _step(
    mixed: np.ndarray, rest: np.ndarray, matrix: np.ndarray, kind: StateKind, tables: RecurrentTables
) -> tuple[np.ndarray, np.ndarray]:
    """(the matrices (Hv, Dk, Dv) after a token, its output (Hv * Dv,)). `mixed`: q, k, v; `rest`: z, b, a."""
    group = kind.num_heads // kind.num_key_heads
    q, k, v = np.split(mixed, [kind.key_size, 2 * kind.key_size])
    q, k = (np.repeat(unit(x.reshape(-1, kind.key_dim)), group, axis=0) for x in (q, k))  # (Hv, Dk)
    sizes = section_sizes(kind)[3:]
    z, b, a = np.split(rest[: sum(sizes)], np.cumsum(sizes)[:-1])
    decay = np.exp(-np.exp(tables.log_decay) * np.logaddexp(0, a + tables.decay_bias))[:, None, None]
    beta = 1 / (1 + np.exp(-b))[:, None]
    matrix = matrix * decay
    delta = beta * (v.reshape(-1, kind.value_dim) - np.einsum("hk,hkv->hv", k, matrix))
    matrix = matrix + k[:, :, None] * delta[:, None, :]
    o = np.einsum("hk,hkv->hv", q * kind.key_dim**-0.5, matrix)
    normed = o / np.sqrt((o * o).mean(-1, keepdims=True) + kind.norm_eps) * tables.norm
    return matrix, normed.reshape(-1) * silu(z)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows normed to length 1."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + UNIT_EPS)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
