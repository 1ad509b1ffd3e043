"""Every operation of `Backend` in plain Tensor arithmetic, for any device: the documentation of the kernels, and what
their tests compare against. Two are in NumPy: sampling (ops/sampling/reference.py), and recurrent layers
(ops/recurrent_reference.py). Written to be read, not to be fast: its cost depends on the pool and the longest possible
context, not on the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, stack_rows, to_float32
from tinyvllm.config import LayerKind, StateKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.activation import gated_plain
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import (
    NO_STATES,
    PLAIN,
    Epilogue,
    KVPool,
    Norm,
    PoolGroup,
    Step,
    expert_gate_over_up,
    stack_qkv,
    zeroed_pool,
)
from tinyvllm.ops.coverage import Coverage
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import Matrix, pack, unpack
from tinyvllm.ops.latent_spec import LatentLayer
from tinyvllm.ops.plain import norm_whole_sections, plain_epilogue, plain_routing, rms_norm, softcap, unit_norm
from tinyvllm.ops.recurrent_reference import RecurrentTables, convolve_reference, recur_reference
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.reference import HostState, sample_row
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH
from tinyvllm.ops.short_conv import ConvLayer
from tinyvllm.ops.step_inputs import StepLayout


class ReferenceBackend:
    """Activations are float32. Matrices keep their formats, in row layout; the pool is `[slot][kv head][D]`."""

    def __init__(self, device: DeviceHandle, *, dequantize: bool = False) -> None:
        self.device = device
        self.dequantize = dequantize
        self.coverage = Coverage()

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return pack(host, "row", None, self.device.name, dequantize=self.dequantize)

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        return tuple(self.matrix(host) for host in stack_qkv(hosts))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Gate rows, then up rows; in float32 if their formats differ."""
        stacked = stack_rows([gate, up])
        return self.matrix(stacked[0] if len(stacked) == 1 else np.concatenate([to_float32(gate), to_float32(up)]))

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        return pack(host, "row", None, self.device.name, dequantize=self.dequantize, num_experts=num_experts)

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        """Each expert's gate rows, then its up rows."""
        return self.expert_matrix(expert_gate_over_up(gate, up, num_experts), num_experts)

    def make_pool(
        self,
        groups: Sequence[PoolGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        dtype: str,
        states: Mapping[int, StateKind] = NO_STATES,
        num_state_slots: int = 0,
    ) -> KVPool:
        return zeroed_pool(self.device, groups, num_blocks, block_size, dtype, states, num_state_slots)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        return "float32" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, step: Step, scale: float = 1.0) -> Tensor:
        token_ids = _words(step.inputs, step.layout.offset("token_ids"), step.num_tokens)
        if step.previous_output is not None:
            tokens = step.previous_output.reshape(-1, OUT_WIDTH)[:, OUT_TOKEN]
            token_ids = (token_ids < 0).where(tokens[(-1 - token_ids).clip(0, tokens.shape[0] - 1)], token_ids)
        return unpack(table)[token_ids.clip(0, table.used_rows - 1)].reshape(-1) * scale

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        rows = x.reshape(num_tokens, -1)
        normed = rows if norm is None else rms_norm(rows, norm)
        return [plain_epilogue(normed @ unpack(matrix).T, epilogue).reshape(-1) for matrix in matrices]

    def route(self, x: Tensor, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        rows = x.reshape(num_tokens, -1)
        return plain_routing((rows if norm is None else rms_norm(rows, norm)) @ unpack(layer.router).T, layer)

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        rows = x.reshape(num_tokens, -1)
        rows = rows if norm is None else rms_norm(rows, norm)
        ids = routing.ids.reshape(num_tokens, -1)
        both = Tensor.einsum("tknc,tc->tkn", _of_experts(layer.gate_up, ids), rows)
        if layer.gate_up_bias is not None:
            both = both + layer.gate_up_bias.reshape(layer.gate_up.num_experts, -1)[ids]
        hidden = gated_plain(layer.kind.activation, *both.chunk(2, dim=-1))  # (T, k, ffn)
        out = Tensor.einsum("tknf,tkf->tkn", _of_experts(layer.down, ids), hidden)
        if layer.down_bias is not None:
            out = out + layer.down_bias.reshape(layer.down.num_experts, -1)[ids]
        out = (out * routing.weights.reshape(num_tokens, -1, 1)).sum(1)
        return plain_epilogue(out, epilogue).reshape(-1)

    def finish(self, x: Tensor, num_tokens: int, epilogue: Epilogue) -> Tensor:
        return plain_epilogue(x.reshape(num_tokens, -1), epilogue).reshape(-1)

    def scale_rows(self, x: Tensor, factors: Tensor, num_tokens: int) -> Tensor:
        return (x.reshape(num_tokens, -1) * factors.reshape(-1, 1)).reshape(-1)

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        kind, layout, tokens = layer.kind, step.layout, step.num_tokens
        heads, kv_heads, dim = kind.num_heads, kind.num_kv_heads, kind.head_dim
        positions = _words(step.inputs, layout.offset("positions"), tokens)
        if kind.head_norm_is_whole:
            qkv, layer = [norm_whole_sections(qkv, layer, tokens)], layer.without_whole_norm()
        parts = [part.reshape(tokens, width) for part, width in zip(qkv, layer.qkv_cols, strict=True)]
        num_cols = (heads if kind.kv_layer is not None else heads + 2 * kv_heads) * dim
        values = Tensor.cat(*parts, dim=1)[:, :num_cols]  # zeros may follow
        if layer.bias is not None:
            values = values + layer.bias
        sections = values.reshape(tokens, -1, dim).split(
            [heads, kv_heads, kv_heads] if kind.kv_layer is None else [heads], 1
        )
        weights = [None, None] if layer.head_norm is None else layer.head_norm.chunk(2)
        q = self._rotated(sections[0], weights[0], layer, positions)
        if layer.rope is not None and kind.query_scaling is not None:
            q = q * layer.rope.reshape(-1, _rope_cols(kind))[positions][:, -1:].unsqueeze(1)
        keys, values = self._pool(layer, step)
        if kind.kv_layer is None:
            slots = _words(step.inputs, layout.slots_offset(layer.pool_group), tokens)
            v = sections[2] if kind.value_norm_eps is None else unit_norm(sections[2], kind.value_norm_eps)
            keys[slots] = self._rotated(sections[1], weights[1], layer, positions).cast(keys.dtype)
            values[slots] = v.cast(values.dtype)
            keys.realize(values)  # now: a later layer that reads them has no other tie to this write

        context = self._context(layer.pool_group, step)
        near_k, near_v = keys[context].float(), values[context].float()  # (T, C, K, D)

        q = q.reshape(tokens, kv_heads, heads // kv_heads, dim)  # G query heads share a KV head
        scores = Tensor.einsum("tkgd,tckd->tkgc", q, near_k) * kind.scale
        weights = attention_weights(scores, positions, kind, layer.sinks)
        return Tensor.einsum("tkgc,tckd->tkgd", weights, near_v).reshape(-1)

    def attend_latent(self, queries: Tensor, latents: Tensor, layer: LatentLayer, step: Step) -> Tensor:
        """Not absorbed: each head's keys and values are computed from the latents."""
        kind, latent, layout, tokens = layer.kind, layer.latent, step.layout, step.num_tokens
        positions = _words(step.inputs, layout.offset("positions"), tokens)
        assert kind.rope is not None
        rotation = rotate_pairs if kind.rope.is_interleaved else rotate
        angles = layer.rope.reshape(-1, latent.rope_dim)[positions].unsqueeze(1)  # (T, 1, rope)
        rows = latents.reshape(tokens, -1)[:, : latent.stored_dim]  # zeros may follow
        normed = rms_norm(rows[:, : latent.rank], Norm(layer.norm, latent.norm_eps))
        rotated = rotation(rows[:, latent.rank :].unsqueeze(1), angles).squeeze(1)
        pool = step.pool.keys[layer.index]
        assert isinstance(pool, Tensor)
        stored = pool.reshape(-1, latent.stored_dim)
        slots = _words(step.inputs, layout.slots_offset(layer.pool_group), tokens)
        stored[slots] = normed.cat(rotated, dim=1).cast(stored.dtype)

        near = stored[self._context(layer.pool_group, step)].float()  # (T, C, rank + rope)
        key_up = unpack(layer.key_up)[: layer.key_up.used_rows].reshape(kind.num_heads, latent.rank, latent.nope_dim)
        value_up = unpack(layer.value_up)[: layer.value_up.used_rows]
        value_up = value_up.reshape(kind.num_heads, latent.value_dim, latent.rank)
        keys = Tensor.einsum("tcr,hrn->tchn", near[..., : latent.rank], key_up)
        values = Tensor.einsum("tcr,hvr->tchv", near[..., : latent.rank], value_up)
        q = queries.reshape(tokens, -1)[:, : kind.q_size].reshape(tokens, kind.num_heads, kind.head_dim)
        scores = Tensor.einsum("thn,tchn->thc", q[..., : latent.nope_dim], keys)
        turned = rotation(q[..., latent.nope_dim :], angles)
        scores = (scores + Tensor.einsum("thd,tcd->thc", turned, near[..., latent.rank :])) * kind.scale
        weights = attention_weights(scores.unsqueeze(2), positions, kind, None).squeeze(2)
        return Tensor.einsum("thc,tchv->thv", weights, values).reshape(-1)

    def _context(self, pool_group: int, step: Step) -> Tensor:
        """Slots (T, C): every slot of the row's block table, in the order of positions."""
        layout, tokens = step.layout, step.num_tokens
        tables = _words(step.inputs, layout.table_offset(pool_group), (layout.num_seqs + 1) * layout.max_blocks)
        seq_rows = _words(step.inputs, layout.offset("seq_rows"), tokens)
        blocks = tables.reshape(-1, layout.max_blocks)[seq_rows].unsqueeze(-1)  # (T, M, 1)
        return (blocks * layout.block_size + Tensor.arange(layout.block_size)).reshape(tokens, -1)

    def _rotated(self, x: Tensor, weight: Tensor | None, layer: AttentionLayer, positions: Tensor) -> Tensor:
        """Heads (T, heads, D) of queries or keys, with the layer's norm and rotation."""
        kind = layer.kind
        if weight is not None and kind.head_norm_eps is not None:
            x = rms_norm(x, Norm(weight, kind.head_norm_eps))
        if layer.rope is None or kind.rope is None:
            return x
        num_dims = kind.rope.num_dims or kind.head_dim
        rows = layer.rope.reshape(-1, _rope_cols(kind))[positions]
        angles = rows[:, :num_dims].unsqueeze(1)  # (T, 1, R): R/2 cosines, then R/2 sines
        rotation = rotate_pairs if kind.rope.is_interleaved else rotate
        rotated = rotation(x[..., :num_dims], angles)
        return rotated if num_dims == kind.head_dim else rotated.cat(x[..., num_dims:], dim=-1)

    def _pool(self, layer: AttentionLayer, step: Step) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, (slots, K, D)."""
        shape, stored = (-1, layer.kind.num_kv_heads, layer.kind.head_dim), layer.pool_layer
        keys, values = step.pool.keys[stored], step.pool.values[stored]
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        return keys.reshape(shape), values.reshape(shape)

    def recur(self, projections: Sequence[Tensor], layer: RecurrentLayer, step: Step) -> Tensor:
        kind, pool = layer.kind, step.pool
        parts = [part.numpy().reshape(step.num_tokens, -1) for part in projections]
        tables = [table.numpy() for table in (layer.conv, layer.log_decay, layer.decay_bias, layer.norm)]
        stored = [
            tensor for tensor in (pool.matrices[layer.index], pool.convs[layer.index]) if isinstance(tensor, Tensor)
        ]
        matrices, convs = (tensor.numpy().copy() for tensor in stored)
        out = recur_reference(
            np.concatenate(parts, axis=1),
            kind,
            RecurrentTables(tables[0].reshape(kind.conv_width, kind.conv_size), *tables[1:]),
            step.layout.views(step.inputs.numpy()),
            matrices.reshape(-1, kind.num_heads, kind.key_dim, kind.value_dim),
            convs.reshape(-1, kind.conv_width, kind.conv_size),
            is_decode=step.is_decode,
        )
        for tensor, values in zip(stored, (matrices, convs), strict=True):
            self.device.write(tensor, values)
        return Tensor(out.reshape(-1), device=self.device.name)

    def convolve(self, projected: Tensor, layer: ConvLayer, step: Step) -> Tensor:
        kind, stored = layer.kind, step.pool.convs[layer.index]
        assert isinstance(stored, Tensor)
        convs = stored.numpy().copy()
        out = convolve_reference(
            projected.numpy().reshape(step.num_tokens, -1),
            kind,
            layer.taps.numpy().reshape(kind.conv_width, -1),
            step.layout.views(step.inputs.numpy()),
            convs.reshape(-1, kind.conv_width, kind.num_channels),
            is_decode=step.is_decode,
        )
        self.device.write(stored, convs)
        return Tensor(out.reshape(-1), device=self.device.name)

    def norm_groups(self, x: Tensor, norm: Norm, num_tokens: int, addend: Tensor) -> Tensor:
        groups = x.reshape(-1, norm.weight.shape[0])
        return (rms_norm(groups, norm) + addend.reshape(groups.shape)).reshape(-1)

    def gate_columns(self, gate: Tensor, factors: Tensor, start: Tensor, num_tokens: int, activation: str) -> Tensor:
        first, rows = int(start.item()), gate.reshape(num_tokens, -1)
        columns = factors.reshape(num_tokens, -1)[:, first : first + int(rows.shape[1])]
        return gated_plain(activation, rows, columns).reshape(-1)

    def take_rows(self, x: Tensor, step: Step, num_cols: int) -> Tensor:
        rows = _words(step.inputs, step.layout.offset("logit_rows"), step.layout.num_seqs)
        return x.reshape(-1, num_cols)[rows].reshape(-1)

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


def _of_experts(matrix: Matrix, ids: Tensor) -> Tensor:
    """The matrices (T, k, rows, columns) of the experts `ids` (T, k)."""
    return unpack(matrix).reshape(matrix.num_experts, -1, matrix.num_cols)[ids]


def _rope_cols(kind: LayerKind) -> int:
    assert kind.rope is not None
    return (kind.rope.num_dims or kind.head_dim) + (kind.query_scaling is not None)


def _words(inputs: Tensor, start: int, count: int) -> Tensor:
    """Words [start, start + count) of a step's inputs, int32."""
    return inputs[start : start + count]


def attention_weights(scores: Tensor, positions: Tensor, kind: LayerKind, sinks: Tensor | None) -> Tensor:
    """Softmax of scores (T, K, G, C) over the tokens that each row attends to, and over a sink, which has no value."""
    if kind.softcap is not None:
        scores = softcap(scores, kind.softcap)
    tokens, kv_heads, group, num_keys = scores.shape
    distance = positions.unsqueeze(1) - Tensor.arange(num_keys)  # (T, C): from a key to the row
    seen = distance >= 0
    if kind.window is not None:
        seen = seen & (distance < kind.window)
    scores = seen.reshape(tokens, 1, 1, num_keys).where(scores, -float("inf"))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.reshape(1, kv_heads, group, 1).expand(tokens, kv_heads, group, 1)
    return scores.cat(column, dim=-1).softmax(-1)[..., :num_keys]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE with half-split pairs: elements i and i + R/2 of x (T, heads, R) rotate together (Su et al. 2021)."""
    (low, high), (cos, sin) = x.chunk(2, dim=-1), angles.chunk(2, dim=-1)
    return Tensor.cat(low * cos - high * sin, high * cos + low * sin, dim=-1)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE with interleaved pairs: elements 2i and 2i + 1 rotate together."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return (
        rotate(pairs[..., 0].cat(pairs[..., 1], dim=-1), angles)
        .reshape(*x.shape[:-1], 2, -1)
        .transpose(-1, -2)
        .reshape(x.shape)
    )


def _read_state(state: SamplingState) -> HostState:
    """A copy on the host, whose counts sampling updates."""
    tensors = (state.counts, state.mask, state.bias)
    return HostState(*[tensor.numpy().reshape(state.num_rows, -1).copy() for tensor in tensors])
