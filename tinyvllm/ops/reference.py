"""Every operation of `Backend` again, in plain Tensor arithmetic that any device runs: the kernels' documentation and
the oracle of their tests; sampling is NumPy's, in reference_sample.py. Written to be read; its cost follows the pool
and the longest context, not the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, stack_rows, to_float32
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.backend import AttentionShape, KVPool, Norm
from tinyvllm.ops.formats.matrix import Matrix, pack, unpack
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.reference import HostState, sample_row
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH
from tinyvllm.ops.step_inputs import StepLayout


class ReferenceBackend:
    """Activations are float32. Matrices keep their formats, in row layout; the pool is `[slot][kv head][D]`."""

    def __init__(self, device: DeviceHandle, *, dequantize: bool = False) -> None:
        self.device = device
        self.dequantize = dequantize

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return pack(host, "row", None, self.device.name, dequantize=self.dequantize)

    def stacked(self, hosts: Sequence[HostMatrix]) -> tuple[Matrix, ...]:
        return tuple(self.matrix(host) for host in stack_rows(hosts))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Gate rows, then up rows; float32 where their formats differ."""
        stacked = stack_rows([gate, up])
        return self.matrix(stacked[0] if len(stacked) == 1 else np.concatenate([to_float32(gate), to_float32(up)]))

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        size = num_blocks * block_size * shape.num_kv_heads * shape.head_dim
        keys, values = ([self.device.zeros(size, FLOATS[dtype]) for _ in range(num_layers)] for _ in range(2))
        return KVPool(keys, values, num_blocks, dtype)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        return "float32" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout, newest: Tensor | None = None) -> Tensor:
        token_ids = _words(inputs, layout, "token_ids", layout.num_tokens)
        if newest is not None:
            tokens = newest.reshape(-1, OUT_WIDTH)[:, OUT_TOKEN]
            token_ids = (token_ids < 0).where(tokens[(-1 - token_ids).clip(0, tokens.shape[0] - 1)], token_ids)
        return unpack(table)[token_ids.clip(0, table.used_rows - 1)].reshape(-1)

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        normed = rms_norm(x.reshape(num_tokens, -1), norm)
        return [(normed @ unpack(matrix).T).reshape(-1) for matrix in matrices]

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        return residual + (x.reshape(num_tokens, -1) @ unpack(matrix).T).reshape(-1)

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        both = rms_norm(x.reshape(num_tokens, -1), norm) @ unpack(matrix).T  # (T, 2 * ffn)
        gate, up = both.chunk(2, dim=1)
        return (gate * gate.sigmoid() * up).reshape(-1)

    def attend(
        self,
        qkv: Sequence[Tensor],
        widths: Sequence[int],
        shape: AttentionShape,
        pool: KVPool,
        layer: int,
        inputs: Tensor,
        rope: Tensor,
        layout: StepLayout,
        *,
        is_decode: bool,
        head_norm: Norm | None = None,
    ) -> Tensor:
        tokens, size = layout.num_tokens, layout.block_size
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        positions = _words(inputs, layout, "positions", tokens)
        slots = _words(inputs, layout, "slots", tokens)
        seq_rows = _words(inputs, layout, "seq_rows", tokens)
        tables = _words(inputs, layout, "block_tables", (layout.num_seqs + 1) * layout.max_blocks)

        parts = [part.reshape(tokens, width) for part, width in zip(qkv, widths, strict=True)]
        q, k, v = Tensor.cat(*parts, dim=1).reshape(tokens, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
        if head_norm is not None:
            q, k = (rms_norm(x, Norm(w, head_norm.eps)) for x, w in zip((q, k), head_norm.weight.chunk(2), strict=True))
        angles = rope.reshape(-1, dim)[positions].unsqueeze(1)  # (T, 1, D): D/2 cosines, then D/2 sines
        q, k = rotate(q, angles), rotate(k, angles)

        keys, values = (flat.reshape(-1, kv_heads, dim) for flat in (pool.keys[layer], pool.values[layer]))
        keys[slots] = k.cast(keys.dtype)
        values[slots] = v.cast(values.dtype)

        # context slots, (T, C): every slot of the row's block table, in the order of positions
        blocks = tables.reshape(-1, layout.max_blocks)[seq_rows].unsqueeze(-1)  # (T, M, 1)
        context = (blocks * size + Tensor.arange(size)).reshape(tokens, -1)
        near_k, near_v = keys[context].float(), values[context].float()  # (T, C, K, D)
        is_causal = Tensor.arange(context.shape[1]) <= positions.unsqueeze(1)  # (T, C)

        q = q.reshape(tokens, kv_heads, heads // kv_heads, dim)  # G query heads share a KV head
        scores = Tensor.einsum("tkgd,tckd->tkgc", q, near_k) / dim**0.5
        weights = is_causal.reshape(tokens, 1, 1, -1).where(scores, -float("inf")).softmax(-1)
        return Tensor.einsum("tkgc,tckd->tkgd", weights, near_v).reshape(-1)

    def take_rows(self, x: Tensor, inputs: Tensor, layout: StepLayout, num_cols: int) -> Tensor:
        return x.reshape(-1, num_cols)[_words(inputs, layout, "logit_rows", layout.num_seqs)].reshape(-1)

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        return [x]

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        return logits

    def sample(
        self,
        logits: Tensor,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        rows = logits.numpy().reshape(layout.num_seqs, stride)[:, :vocab_size]
        views = layout.views(inputs.numpy())
        host = None if state is None else _read_state(state)
        sampled = np.stack([sample_row(row, views, index, host) for index, row in enumerate(rows)]).reshape(-1)
        if state is not None and host is not None:
            self.device.write(state.counts, host.counts)
        if out is None:
            return Tensor(sampled, device=inputs.device)
        self.device.write(out, sampled)
        return out


def _words(inputs: Tensor, layout: StepLayout, name: str, count: int) -> Tensor:
    """The int32 words of one of a step's inputs, (count,)."""
    start = layout.offset(name)
    return inputs[start : start + count]


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x (..., K) / sqrt(mean of a row's squares + eps) * weight (Zhang & Sennrich 2019)."""
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE with half-split pairs: elements i and i + D/2 of x (T, heads, D) turn together (Su et al. 2021)."""
    (low, high), (cos, sin) = x.chunk(2, dim=-1), angles.chunk(2, dim=-1)
    return Tensor.cat(low * cos - high * sin, high * cos + low * sin, dim=-1)


def _read_state(state: SamplingState) -> HostState:
    """A copy, whose counts move on."""
    tensors = (state.counts, state.mask, state.bias)
    return HostState(*[tensor.numpy().reshape(state.num_rows, -1).copy() for tensor in tensors])
