"""Every operation of `Backend` in NumPy: it documents the kernels, and their tests compare against it.

Tensors are copied to the host and back. Written to be read, not to be fast: its cost depends on the pool and the
longest possible context, not on the step. Attention is in ops/attention_reference.py, recurrent layers in
ops/recurrent_reference.py, sampling in ops/sampling/reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from ml_dtypes import bfloat16
from tinygrad import Tensor

from tinyvllm.arrays import Format, HostMatrix, to_float32
from tinyvllm.config import KVFormat, KVFormats, LayerKind, StateKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.activation import gated_exact
from tinyvllm.ops.adapter_spec import AdapterSite, SiteShape, add_reference, make_site
from tinyvllm.ops.attention_reference import (
    AttentionTables,
    LatentTables,
    StoredHeads,
    attend_latent_reference,
    attend_reference,
)
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import NO_STATES, PLAIN, Epilogue, KVPool, Norm, PoolGroup, Step, Stored, zeroed_pool
from tinyvllm.ops.coverage import Coverage
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import PANEL, Matrix, check_shape
from tinyvllm.ops.latent_spec import LatentLayer
from tinyvllm.ops.recurrent_reference import RecurrentTables, convolve_reference, recur_reference
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.reference_forms import apply_epilogue, apply_norm, choose_experts, to_host
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.reference import HostState, sample_row
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH
from tinyvllm.ops.short_conv import ConvLayer
from tinyvllm.ops.step_inputs import StepLayout


@dataclass(frozen=True)
class PlainMatrix(Matrix):
    """A matrix whose `values` (N, K), float32, are on the host; it has no planes."""

    values: np.ndarray = field(kw_only=True)

    @property
    def of_experts(self) -> np.ndarray:
        """(E, rows, K)."""
        return self.values.reshape(self.num_experts, -1, self.num_cols)


class ReferenceBackend:
    """Activations are float32, and so are weights, whatever their format; the pool is `[slot][kv head][D]`."""

    def __init__(self, device: DeviceHandle) -> None:
        self.device = device
        self.coverage = Coverage()

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return plain_matrix([host])

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        return (plain_matrix(hosts),)

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Gate rows, then up rows."""
        return plain_matrix([gate, up])

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        return plain_matrix([host], num_experts)

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        """Each expert's gate rows, then its up rows."""
        halves = (to_float32(host).reshape(num_experts, -1, host.shape[1]) for host in (gate, up))
        return plain_matrix([np.concatenate([*halves], axis=1).reshape(-1, gate.shape[1])], num_experts)

    def make_rows(self, size: int) -> Tensor:
        return self._upload(np.zeros(size))

    def make_pool(
        self,
        groups: Sequence[PoolGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        formats: KVFormats | str,
        states: Mapping[int, StateKind] = NO_STATES,
        num_state_slots: int = 0,
    ) -> KVPool:
        return zeroed_pool(self.device, groups, num_blocks, block_size, formats, states, num_state_slots)

    def adapter_site(self, shape: SiteShape) -> AdapterSite:
        return make_site(shape, self.device, "float32")

    def kv_dtype(self, wanted: str, stored: str) -> str:
        return "float32" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def short_contexts(self, layers: Sequence[LayerKind], num_rows: int, verifies: bool) -> tuple[int, ...]:
        return ()

    def _upload(self, values: np.ndarray) -> Tensor:
        return self.device.upload(np.ascontiguousarray(values, np.float32))

    def embed(self, table: Matrix, step: Step, scale: float = 1.0, ids: str = "token_ids") -> Tensor:
        token_ids = _views(step)[ids]
        if step.previous_output is not None:
            tokens = step.previous_output.numpy().reshape(-1, OUT_WIDTH)[:, OUT_TOKEN]
            token_ids = np.where(token_ids < 0, tokens[np.clip(-1 - token_ids, 0, len(tokens) - 1)], token_ids)
        return self._upload(_values(table)[np.clip(token_ids, 0, table.used_rows - 1)] * np.float32(scale))

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        rows = apply_norm(to_host(x, num_tokens, -1), norm)
        return [self._upload(apply_epilogue(rows @ _values(matrix).T, epilogue)) for matrix in matrices]

    def adapt(
        self,
        x: Tensor,
        outs: Sequence[Tensor],
        site: AdapterSite,
        step: Step,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        rows = apply_norm(to_host(x, step.num_tokens, -1), norm)
        deltas = scale * add_reference(site, rows, _views(step)["adapter_slots"])
        (out,) = outs
        whole = to_host(out, step.num_tokens, -1).copy()
        whole[:, : deltas.shape[1]] += deltas
        return [self._upload(whole)]

    def adapt_gated(
        self,
        x: Tensor,
        product: Tensor,
        site: AdapterSite,
        step: Step,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
    ) -> Tensor:
        (added,) = self.adapt(x, [product], site, step, norm)
        both = to_host(added, step.num_tokens, 2, -1)
        if bias is not None:
            both = both + bias.numpy().reshape(2, -1)
        return self._upload(gated_exact(activation, both[:, 0], both[:, 1]))

    def route(self, x: Tensor, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        logits = apply_norm(to_host(x, num_tokens, -1), norm) @ _values(layer.router).T
        chosen = choose_experts(logits, layer)
        shared = None if chosen.shared is None else self._upload(chosen.shared)
        return Routing(self.device.upload(chosen.ids), self._upload(chosen.weights), shared)

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        rows = apply_norm(to_host(x, num_tokens, -1), norm)
        ids = routing.ids.numpy().reshape(num_tokens, -1)  # (T, k)
        gate_up, down = layer.gate_up, layer.down
        assert isinstance(gate_up, PlainMatrix) and isinstance(down, PlainMatrix)
        both = np.einsum("tknc,tc->tkn", gate_up.of_experts[ids], rows)
        if layer.gate_up_bias is not None:
            both = both + to_host(layer.gate_up_bias, gate_up.num_experts, -1)[ids]
        hidden = gated_exact(layer.kind.activation, *np.split(both, 2, axis=-1))  # (T, k, ffn)
        out = np.einsum("tknf,tkf->tkn", down.of_experts[ids], hidden)
        if layer.down_bias is not None:
            out = out + to_host(layer.down_bias, down.num_experts, -1)[ids]
        out = (out * to_host(routing.weights, num_tokens, -1, 1)).sum(axis=1)
        return self._upload(apply_epilogue(out, epilogue))

    def finish(self, x: Tensor, num_tokens: int, epilogue: Epilogue) -> Tensor:
        return self._upload(apply_epilogue(to_host(x, num_tokens, -1), epilogue))

    def scale_rows(self, x: Tensor, factors: Tensor, num_tokens: int) -> Tensor:
        return self._upload(to_host(x, num_tokens, -1) * to_host(factors, num_tokens, 1))

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        kind, views = layer.kind, _views(step)
        parts = [to_host(part, step.num_tokens, width) for part, width in zip(qkv, layer.qkv_cols, strict=True)]
        pool, of = step.pool, layer.pool_layer
        keys = _stored_heads(pool.formats.keys, pool.keys[of], pool.key_scales.get(of), kind)
        values = _stored_heads(pool.formats.values, pool.values[of], pool.value_scales.get(of), kind)
        out = attend_reference(
            np.concatenate(parts, axis=1),
            kind,
            AttentionTables(
                None if layer.rope is None else to_host(layer.rope, -1, _rope_cols(layer)),
                *(None if table is None else to_host(table) for table in (layer.head_norm, layer.bias, layer.sinks)),
            ),
            views["positions"],
            views["slots"][layer.pool_group],
            _context(views, layer.pool_group, step.layout),
            keys,
            values,
        )
        if kind.kv_layer is None:
            host = [keys.stored, values.stored, *[one.scales for one in (keys, values) if one.scales is not None]]
            for tensor, array in zip(pool.planes_of(of), host, strict=True):
                self._overwrite(tensor, array)
        return self._upload(out)

    def attend_latent(self, queries: Tensor, latents: Tensor, layer: LatentLayer, step: Step) -> Tensor:
        """Not absorbed: each head's keys and values are computed from the latents."""
        kind, latent, views, heads = layer.kind, layer.latent, _views(step), layer.kind.num_heads
        tables = LatentTables(
            _values(layer.key_up)[: layer.key_up.used_rows].reshape(heads, latent.rank, latent.nope_dim),
            _values(layer.value_up)[: layer.value_up.used_rows].reshape(heads, latent.value_dim, latent.rank),
            to_host(layer.norm),
            to_host(layer.rope, -1, latent.rope_dim),
        )
        stored = _stored(step.pool.keys[layer.index], step.pool.formats.keys).reshape(-1, latent.stored_dim)
        out = attend_latent_reference(
            to_host(queries, step.num_tokens, -1)[:, : kind.q_size],
            to_host(latents, step.num_tokens, -1),
            kind,
            tables,
            views["positions"],
            views["slots"][layer.pool_group],
            _context(views, layer.pool_group, step.layout),
            stored,
        )
        self._overwrite(step.pool.keys[layer.index], stored)
        return self._upload(out)

    def _overwrite(self, tensor: Tensor | tuple[Tensor, ...], values: np.ndarray) -> None:
        assert isinstance(tensor, Tensor)
        self.device.write(tensor, values)

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
        return self._upload(out)

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
        return self._upload(out)

    def norm_groups(self, x: Tensor, norm: Norm, num_tokens: int, addend: Tensor) -> Tensor:
        groups = to_host(x, -1, int(norm.weight.shape[0]))
        return self._upload(apply_norm(groups, norm) + to_host(addend, *groups.shape))

    def gate_columns(self, gate: Tensor, factors: Tensor, start: Tensor, num_tokens: int, activation: str) -> Tensor:
        first, rows = int(start.item()), to_host(gate, num_tokens, -1)
        columns = to_host(factors, num_tokens, -1)[:, first : first + rows.shape[1]]
        return self._upload(gated_exact(activation, rows, columns))

    def take_rows(self, x: Tensor, step: Step, num_cols: int, num_rows: int | None = None) -> Tensor:
        return self._upload(to_host(x, -1, num_cols)[_views(step)["logit_rows"]])

    def store_normed(self, x: Tensor, norm: Norm, num_tokens: int, out: Tensor, start: int, stride: int) -> Tensor:
        rows, values = apply_norm(to_host(x, num_tokens, -1), norm), to_host(out, 1, -1)[0].copy()
        places = start + stride * np.arange(num_tokens)[:, None] + np.arange(rows.shape[1])
        values[places] = rows
        self.device.write(out, values.astype(np.float32))
        return out

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


def plain_matrix(hosts: Sequence[HostMatrix], num_experts: int = 0) -> PlainMatrix:
    """The rows of all, one after the other, as float32. Raises UnsupportedModelError as `pack` does."""
    values = np.concatenate([to_float32(host) for host in hosts])
    for host in hosts:
        check_shape(host, num_experts)
    rows, cols = values.shape
    padded = np.pad(values, ((0, -rows % PANEL), (0, 0)))
    plain = Format("float32", 32)
    return PlainMatrix(plain, len(padded), cols, rows, "row", (), num_experts=num_experts, values=padded)


def _values(matrix: Matrix) -> np.ndarray:
    assert isinstance(matrix, PlainMatrix)
    return matrix.values


def _views(step: Step) -> dict[str, np.ndarray]:
    """The step's inputs by name."""
    return step.layout.views(step.inputs.numpy())


def _stored(tensor: Stored, form: KVFormat) -> np.ndarray:
    """A copy of a layer's part of the pool, in the pool's own dtype, to which what is stored there is rounded; of codes
    the bytes."""
    assert isinstance(tensor, Tensor)
    if form.is_quantized:
        return tensor.numpy().copy().view(np.uint8).reshape(-1)
    return np.array(tensor.numpy(), bfloat16 if form.name == "bfloat16" else form.name).reshape(-1)


def _stored_heads(form: KVFormat, stored: Stored, scales: Stored | None, kind: LayerKind) -> StoredHeads:
    """A copy of a layer's keys or values."""
    heads, dim = kind.num_kv_heads, kind.head_dim
    width = form.code_bytes(dim) if form.is_quantized else dim
    host_scales = None
    if scales is not None:
        assert isinstance(scales, Tensor)
        host_scales = scales.numpy().copy().reshape(-1, heads, form.num_scales(dim))
    return StoredHeads(form, _stored(stored, form).reshape(-1, heads, width), host_scales)


def _context(views: Mapping[str, np.ndarray], group: int, layout: StepLayout) -> np.ndarray:
    """Slots (T, C): every slot of each row's block table, in the order of positions."""
    blocks = views["block_tables"][group][views["seq_rows"]]  # (T, M)
    slots: np.ndarray = blocks[:, :, None] * layout.block_size + np.arange(layout.block_size)
    return slots.reshape(len(blocks), -1)


def _rope_cols(layer: AttentionLayer) -> int:
    kind = layer.kind
    assert kind.rope is not None
    return (kind.rope.num_dims or kind.head_dim) + (kind.query_scaling is not None)


def _read_state(state: SamplingState) -> HostState:
    """A copy on the host, whose counts sampling updates."""
    tensors = (state.counts, state.mask, state.bias)
    return HostState(*[tensor.numpy().reshape(state.num_rows, -1).copy() for tensor in tensors])
