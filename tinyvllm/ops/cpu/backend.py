"""The CPU device's backend: packed panels, five fused kernels in each layer when decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp

from tinyvllm.arrays import HostMatrix
from tinyvllm.arrays import take_rows as take_host_rows
from tinyvllm.config import ConvKind, KVFormats, LayerKind, StateKind
from tinyvllm.device.handle import FLOATS, DeviceHandle, has_dot_instructions, has_many_registers, upload
from tinyvllm.device.recording import Share
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.adapter_spec import AdapterSite, SiteShape, make_site
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import (
    NO_STATES,
    PLAIN,
    DeviceSampling,
    Epilogue,
    KVPool,
    Norm,
    PoolGroup,
    Step,
    Stored,
    as_formats,
    blocks_by_layer,
    check_formats,
    gate_over_up,
    latent_layers,
    stack_qkv,
    zeroed_plane,
)
from tinyvllm.ops.coverage import Coverage
from tinyvllm.ops.cpu.adapter_layers import SiteOnCores
from tinyvllm.ops.cpu.attention import CpuAttentionSpec, attention_kernel, write_kv_kernel
from tinyvllm.ops.cpu.attention_tiles import tile_attention_kernel, tile_rows
from tinyvllm.ops.cpu.columns import GateSpec, GroupNormSpec, gate_columns_kernel, norm_groups_kernel
from tinyvllm.ops.cpu.cores import Team, count_cores, share
from tinyvllm.ops.cpu.dots import DOT_ROWS, FEW_DOT_ROWS
from tinyvllm.ops.cpu.expert_layers import ExpertProducts, route_rows, scale_activation
from tinyvllm.ops.cpu.fixed_rows import run_in_blocks
from tinyvllm.ops.cpu.inputs import Inputs
from tinyvllm.ops.cpu.latent_attention import latent_attention_kernel, write_latents_kernel
from tinyvllm.ops.cpu.linear import (
    EmbedSpec,
    FinishSpec,
    LinearSpec,
    embed_kernel,
    finish_kernel,
    join_kernel,
    linear_kernel,
)
from tinyvllm.ops.cpu.product import STAGED_ROWS
from tinyvllm.ops.cpu.recurrent import CpuRecurrentSpec, recur_on_core
from tinyvllm.ops.cpu.sharded import Activation, Sharded, sharded, tensors_of, widths_of
from tinyvllm.ops.cpu.whole_norm import WholeNormSpec, whole_norm_kernel
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import HALF, PANEL, Matrix, join_shards, pack, reads_dots
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, empty, finish, run_kernel, run_row_kernel
from tinyvllm.ops.kernel.tuning import choose
from tinyvllm.ops.latent_spec import LatentLayer, LatentSpec
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.short_conv import ConvLayer, ConvSpec, convolve
from tinyvllm.ops.step_inputs import StepLayout

MOST_PLANES = 48  # that a kernel reads: it takes up to 63 buffers (tinygrad's MAX_ARGS)


class CpuBackend(DeviceSampling):
    """Activations are float32; dense matrices stay as stored unless `dtype` recasts them.

    With several cores, each is a device of tinygrad. It owns some rows of every matrix, and whole KV heads with their
    keys and values in the pool; it writes its own columns of every activation. A kernel runs on the core of its first
    output, and reads the other cores' columns in place.
    """

    def __init__(
        self,
        device: DeviceHandle,
        dtype: str | None,
        layers: Sequence[LayerKind] = (),
        *,
        dequantize: bool = False,
        x_bits: int | None = None,
    ) -> None:
        """`layers`: those of the model; without any, one core computes everything. `x_bits`: those to which products
        with quantized matrices round rows of x, 16 or 8, where the processor multiplies integers faster (dots.py);
        None: they multiply floats."""
        self.device = device
        self.dtype = dtype
        self.dequantize = dequantize
        self.coverage = Coverage()
        self.has_dots = x_bits is not None and has_dot_instructions()
        self.x_bits = x_bits or 16
        self.tile_rows = 4 if has_many_registers() else 2
        self._first_columns: dict[tuple[int, str], Tensor] = {}  # by the first panel and the core
        # (1,) int32: the panels or KV heads of a core whose share of some is smaller or larger than another's
        self._counts: dict[tuple[int, str], Tensor] = {}
        self.cores = device.cores[: count_cores(len(device.cores), layers)] or (device.name,)

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        """Sharded by panels of rows."""
        for (a, _), core in self._bounds(host.shape[1] // PANEL):  # now, because tracing may be in another process
            if (a, core) not in self._first_columns:
                self._first_columns[a, core] = upload(np.array([a * PANEL], np.int32), core)
        return self._join(self._pack_panels(host, self.cores))

    def _pack_panels(self, host: HostMatrix, cores: tuple[str, ...], *, by_head: bool = False) -> list[Matrix]:
        """A matrix's rows, shared by cores."""
        rows = host.shape[0]
        shards = [(slice(a * PANEL, min(b * PANEL, rows)), core) for (a, b), core in share(-(-rows // PANEL), cores)]
        return [self._pack(take_host_rows(host, part), core, by_head=by_head) for part, core in shards]

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        """q, k and v are sharded by KV heads, so that each core, or the cores that share a head, attend on their own;
        other matrices by panels."""
        if num_kv_heads is None:
            return tuple(self.matrix(host) for host in stack_qkv(hosts))
        by_matrix: list[list[Matrix]] = []
        for (a, b), cores in self._teams(num_kv_heads):
            mine = stack_qkv([_take_shard(host, a, b, num_kv_heads) for host in hosts])
            by_matrix = by_matrix or [[] for _ in mine]
            for shards, host in zip(by_matrix, mine, strict=True):
                shards += self._pack_panels(host, cores, by_head=len(hosts) == 1)
        return tuple(map(self._join, by_matrix))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Panels of 16 gate rows and the 16 corresponding up rows, sharded by 32 output columns."""
        _require_panels(gate.shape[0])
        both, rows, shards = gate_over_up(gate, up), gate.shape[0], []
        for (a, b), core in self._bounds(rows // PANEL):
            index = np.arange(a * PANEL, b * PANEL).reshape(-1, 1, HALF)
            order = np.concatenate([index, index + rows], axis=1).reshape(-1)
            shards.append(self._pack(take_host_rows(both, order), core))
        return self._join(shards)

    def _join(self, shards: list[Matrix]) -> Matrix:
        self._note_counts([(shard.num_rows // PANEL, str(shard.planes[0].device)) for shard in shards])
        return join_shards(shards)

    def _note_counts(self, counts: Sequence[tuple[int, str]]) -> None:
        """Place each core's share on the core, if they differ: now, because tracing may be in another process."""
        if len({count for count, _ in counts}) > 1:
            for count, core in counts:
                if (count, core) not in self._counts:
                    self._counts[count, core] = upload(np.array([count], np.int32), core)

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        """Each core has the same rows of every expert: those that it would have of a matrix of one expert's size."""
        rows, shards = host.shape[0] // num_experts, []
        starts = np.arange(num_experts).reshape(-1, 1) * rows
        for (a, b), core in self._bounds(-(-rows // PANEL)):
            index = starts + np.arange(a * PANEL, min(b * PANEL, rows))
            shards.append(self._pack(take_host_rows(host, index.reshape(-1)), core, num_experts))
        return join_shards(shards)

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        both, size, shards = gate_over_up(gate, up), gate.shape[0] // num_experts, []
        _require_panels(size)
        starts = np.arange(num_experts).reshape(-1, 1, 1, 1) * size
        for (a, b), core in self._bounds(size // PANEL):
            index = starts + np.arange(a * PANEL, b * PANEL).reshape(-1, 1, HALF)
            order = np.concatenate([index, index + gate.shape[0]], axis=2).reshape(-1)
            shards.append(self._pack(take_host_rows(both, order), core, num_experts))
        return join_shards(shards)

    def make_rows(self, size: int) -> Tensor:
        return self.device.zeros(size, FLOATS["float32"])

    def make_pool(
        self,
        groups: Sequence[PoolGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        formats: KVFormats | str,
        states: Mapping[int, StateKind] = NO_STATES,
        num_state_slots: int = 0,
    ) -> KVPool:
        """A pool in which each core's KV heads, and its heads of recurrent layers, have their own tensors. All cores
        read the first one's latents."""
        formats = as_formats(formats)
        check_formats(groups, formats)
        pool = KVPool({}, {}, blocks_by_layer(groups, num_blocks), formats, num_state_slots=num_state_slots)
        for layer, state in states.items():
            if isinstance(state, ConvKind):
                parts = [((b - a) * PANEL * state.conv_width, core) for (a, b), core in self._channels(state)]
                pool.convs[layer] = self._states(parts, num_state_slots)
                continue
            owned = [(_heads_of(state, b - a), core) for (a, b), core in self._bounds(state.num_key_heads)]
            pool.matrices[layer] = self._states([(kind.matrix_elements, core) for kind, core in owned], num_state_slots)
            pool.convs[layer] = self._states([(kind.conv_elements, core) for kind, core in owned], num_state_slots)
        shapes = {layer: shape for group in groups for layer, shape in group.shapes.items()}
        planes = ((formats.keys, pool.keys, pool.key_scales), (formats.values, pool.values, pool.value_scales))
        for layer, count in pool.num_blocks.items():
            num_kv_heads, head_dim = shapes[layer]
            self._note_counts([(b - a, cores[0]) for (a, b), cores in self._teams(num_kv_heads)])
            sizes = [((b - a) * count * block_size * head_dim, cores[0]) for (a, b), cores in self._teams(num_kv_heads)]
            for form, codes, scales in planes[: 1 if layer in latent_layers(groups) else 2]:
                codes[layer] = _stored([zeroed_plane(self.device, form, size, core) for size, core in sizes])
                if form.group:
                    own = [(form.num_scales(size), core) for size, core in sizes]
                    scales[layer] = _stored([self.device.zeros(count, FLOATS["float16"], core) for count, core in own])
        return pool

    def adapter_site(self, shape: SiteShape) -> AdapterSite:
        """All cores read the first one's."""
        return make_site(shape, self.device, self.dtype)

    def _channels(self, kind: ConvKind) -> list[tuple[tuple[int, int], str]]:
        """Each core's channels of a short convolution, in panels."""
        return self._bounds(kind.num_channels // PANEL)

    def _states(self, sizes: Sequence[tuple[int, str]], num_slots: int) -> Stored:
        """Each core's part of the slots of a recurrent layer. `sizes`: its elements of a slot."""
        return _stored([self.device.zeros(num_slots * size, FLOATS["float32"], core) for size, core in sizes])

    def _bounds(self, count: int) -> list[tuple[tuple[int, int], str]]:
        """[((first, end), core)]: `count` units divided between the cores as evenly as possible."""
        return share(count, self.cores)

    def _teams(self, num_kv_heads: int) -> list[Team]:
        """[((first, end), cores)]: the KV heads of a core, or the one of several cores that divide its query heads."""
        size = len(self.cores) // num_kv_heads
        if size < 2:
            return [(heads, (core,)) for heads, core in self._bounds(num_kv_heads)]
        return [((i, i + 1), self.cores[i * size : (i + 1) * size]) for i in range(num_kv_heads)]

    def _pack(self, host: HostMatrix, core: str, num_experts: int = 0, *, by_head: bool = False) -> Matrix:
        """Experts and matrices by head have panels: their kernels multiply floats."""
        has_dots = self.has_dots and not (num_experts or by_head or self.dequantize) and reads_dots(host)
        layout = "dot" if has_dots else "panel"
        return pack(host, layout, self.dtype, core, dequantize=self.dequantize, num_experts=num_experts)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 for "auto": half the bytes of float32, and at long contexts decoding is bound by them.

        Raises DeviceError for bfloat16, which not every C compiler has (clang 14 on x86 does not)."""
        if wanted == "bfloat16":
            raise DeviceError(
                "--kv-cache-dtype is 'bfloat16', which the CPU device does not have: give float16 or float32"
            )
        return "float16" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def short_contexts(self, layers: Sequence[LayerKind], num_rows: int, verifies: bool) -> tuple[int, ...]:
        return ()

    def embed(self, table: Matrix, step: Step, scale: float = 1.0, ids: str = "token_ids") -> Activation:
        tokens, previous = step.num_tokens, step.previous_output
        sources = [step.inputs] if previous is None else [step.inputs, previous]
        outs, widths = [], []
        for (a, b), core in self._bounds(table.num_cols // PANEL):
            cols = (b - a) * PANEL
            spec = EmbedSpec(
                format=table.format,
                num_tokens=tokens,
                shard_rows=tuple(shard.used_rows for shard in table.shards),
                shards=(0, len(table.shards)),
                table_cols=table.num_cols,
                num_cols=cols,
                token_offset=step.layout.offset(ids),
                is_fed=previous is not None,
                scale=scale,
                layout=table.layout,
            )
            begins = [self._first_columns[a, core]] if spec.has_part else []
            outs.append(self._embed(spec, core, [*begins, *sources], table))
            widths.append(cols)
        return sharded(outs, widths)

    def _embed(self, spec: EmbedSpec, core: str, sources: list[Tensor], table: Matrix) -> Tensor:
        """One core's columns, by as many kernels as the table's shards have too many planes for one."""
        at_once, out = max(1, MOST_PLANES // len(table.shards[0].planes)), None
        for first in range(0, len(table.shards), at_once):
            shards = table.shards[first : first + at_once]
            own = replace(spec, shards=(first, first + len(shards)))
            read = [*sources, *([] if out is None else [out]), *[plane for shard in shards for plane in shard.planes]]
            new = empty(own.num_tokens * own.num_cols, device=core)
            shared = [tensor for tensor in read if tensor is not out]
            (out,) = run_row_kernel(partial(_embed_rows, own), own.num_tokens, [new], read, shared)
        assert out is not None
        return out

    def linear(
        self,
        name: str,
        x: Activation,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Activation]:
        inputs = self._inputs(x, norm, (num_tokens, matrices[0].num_cols))
        if epilogue.post_norm is None:
            return [self._linear(name, inputs, matrix, num_tokens, epilogue) for matrix in matrices]
        before = Epilogue(bias=epilogue.bias, activation=epilogue.activation)
        results = [self._linear(name, inputs, matrix, num_tokens, before) for matrix in matrices]
        return [
            self._finish(result, matrix.num_rows // (1 if epilogue.activation is None else 2), num_tokens, epilogue)
            for result, matrix in zip(results, matrices, strict=True)
        ]

    def route(self, x: Activation, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        """On one core, which reads the products of all cores' rows of the router."""
        (logits,) = self.linear("router", x, [layer.router], num_tokens, norm)
        return route_rows(logits, layer, num_tokens, self.cores[0], self.tile_rows)

    def experts(
        self,
        x: Activation,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Activation:
        products = ExpertProducts(routing, layer, num_tokens, self.cores)
        hidden = products.gate_up(x, norm)
        if epilogue.post_norm is None:
            return products.down(hidden, epilogue)
        return self._finish(products.down(hidden, PLAIN), layer.down.expert_size, num_tokens, epilogue)

    def finish(self, x: Activation, num_tokens: int, epilogue: Epilogue) -> Activation:
        num_cols = sum(int(tensor.numel()) for tensor in tensors_of(x)) // num_tokens
        return self._finish(x, num_cols, num_tokens, epilogue)

    def scale_rows(self, x: Activation, factors: Tensor, num_tokens: int) -> Activation:
        return scale_activation(x, factors, num_tokens)

    def adapt(
        self,
        x: Activation,
        outs: Sequence[Activation],
        site: AdapterSite,
        step: Step,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> list[Activation]:
        found = SiteOnCores(site, step, norm)
        found.shrink(x)
        kv_heads = site.shape.num_kv_heads
        return found.add(outs, () if kv_heads is None else self._teams(kv_heads), scale)

    def adapt_gated(
        self,
        x: Activation,
        product: Activation,
        site: AdapterSite,
        step: Step,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
    ) -> Activation:
        found = SiteOnCores(site, step, norm)
        found.shrink(x)
        return found.add_gated(product, self._bounds(site.shape.blocks[0].num_rows // PANEL), activation, bias)

    def attend(self, qkv: Sequence[Activation], layer: AttentionLayer, step: Step) -> Activation:
        if layer.kind.head_norm_is_whole:
            qkv, layer = [self._norm_whole(qkv, layer, step.num_tokens)], layer.without_whole_norm()
        kind, pool = layer.kind, step.pool
        outs, widths = [], []
        planes = [tensors_of(plane) for plane in pool.planes_of(layer.pool_layer)]
        group = kind.num_heads // kind.num_kv_heads
        teams = self._teams(kind.num_kv_heads)
        counts = {b - a for (a, b), _ in teams}
        for i, ((a, b), cores) in enumerate(teams):
            mine: list[Tensor] = []
            cols: list[int] = []
            for part, part_cols in zip(qkv, layer.qkv_cols, strict=True):
                size = len(tensors_of(part)) // len(teams)
                mine += tensors_of(part)[i * size : (i + 1) * size]
                cols += widths_of(part, part_cols)[i * size : (i + 1) * size]
            is_shard = kind.has_bias or kind.has_sinks
            any_kv_heads = len(counts) > 1 and len(cols) == 1 and not is_shard
            own, heads = b - a, max(counts) if any_kv_heads else b - a
            spec = CpuAttentionSpec.of(
                layer,
                step.layout.widest,
                pool.num_blocks[layer.pool_layer],
                num_heads=heads * group,
                num_kv_heads=heads,
                qkv_cols=(cols[0] // own * heads,) if any_kv_heads else tuple(cols),
                shard=(a, kind.num_heads, kind.num_kv_heads) if is_shard else None,
                fused_write=step.is_decode and kind.kv_layer is None and len(cores) == 1,
                kv=pool.formats,
                any_kv_heads=any_kv_heads,
            )
            for out, heads in self._attend(spec, own, cores, [plane[i] for plane in planes], layer, step, mine):
                outs.append(out)
                widths.append(heads * kind.head_dim)
        return sharded(outs, widths)

    def attend_latent(self, queries: Activation, latents: Activation, layer: LatentLayer, step: Step) -> Activation:
        spec = LatentSpec.of(layer, step.layout, step.pool.num_blocks[layer.index])
        (pool,) = tensors_of(step.pool.keys[layer.index])
        cols = tuple(int(part.numel()) // step.num_tokens for part in tensors_of(latents))
        write = write_latents_kernel(spec, cols)
        (pool,) = run_kernel(write, [pool], [step.inputs, layer.norm, layer.rope, *tensors_of(latents)])
        outs, widths = [], []
        for i, ((a, b), core) in enumerate(self._bounds(spec.num_heads)):
            mine, q = replace(spec, num_heads=b - a), tensors_of(queries)[i]
            absorbed = self._by_head("key_up", q, layer.key_up.shards[i], step.num_tokens, mine)
            out = empty(step.num_tokens * mine.num_heads * mine.rank, device=core)
            (out,) = run_kernel(latent_attention_kernel(mine), [out], [pool, step.inputs, layer.rope, absorbed, q])
            outs.append(self._by_head("value_up", out, layer.value_up.shards[i], step.num_tokens, mine))
            widths.append(layer.value_up.shards[i].num_rows)
        return sharded(outs, widths)

    def _by_head(self, name: str, x: Tensor, shard: Matrix, num_tokens: int, spec: LatentSpec) -> Tensor:
        """A core's heads of a block-diagonal product: (T, rows)."""
        fields = LinearSpec(
            name=name,
            format=shard.format,
            num_tokens=num_tokens,
            num_rows=shard.num_rows,
            num_cols=shard.num_cols,
            block_rows=shard.num_rows // spec.num_heads,
            block_stride=int(x.numel()) // num_tokens // spec.num_heads,
            tile_rows=self.tile_rows,
        )
        out = empty(num_tokens * shard.num_rows, device=str(x.device))
        return run_kernel(linear_kernel(choose(fields)), [out], [*shard.planes, x])[0]

    def _norm_whole(self, qkv: Sequence[Activation], layer: AttentionLayer, num_tokens: int) -> Activation:
        """qkv in one part, its queries and its keys normed over all heads. Each core writes its own heads."""
        kind = layer.kind
        bounds = self._bounds(kind.num_kv_heads)
        sizes = [kind.q_size // kind.num_kv_heads, kind.head_dim, kind.head_dim]  # columns for each KV head
        widths = [widths_of(part, cols) for part, cols in zip(qkv, layer.qkv_cols, strict=True)]
        spec = WholeNormSpec(
            num_tokens=num_tokens,
            eps=kind.head_norm_eps or 0.0,
            parts=tuple(zip(*widths, strict=True)),
            sections=tuple((sizes[0] * (b - a), sizes[1] * (b - a), sizes[2] * (b - a)) for (a, b), _ in bounds),
            core=0,
            has_bias=layer.bias is not None,
        )
        read = [tensors_of(part)[core] for core in range(len(bounds)) for part in qkv]
        read += [table for table in (layer.head_norm, layer.bias) if table is not None]
        outs, cols = [], []
        for core, (_, name) in enumerate(bounds):
            mine = replace(spec, core=core)
            outs += run_kernel(whole_norm_kernel(mine), [empty(num_tokens * mine.num_cols, device=name)], read)
            cols.append(mine.num_cols)
        return sharded(outs, cols)

    def recur(self, projections: Sequence[Activation], layer: RecurrentLayer, step: Step) -> Activation:
        shards = [tensor for part in projections for tensor in tensors_of(part)]
        cols = [width for part, own in zip(projections, layer.cols, strict=True) for width in widths_of(part, own)]
        matrices, convs = (tensors_of(stored[layer.index]) for stored in (step.pool.matrices, step.pool.convs))
        outs, widths = [], []
        for i, ((a, b), core) in enumerate(self._bounds(layer.kind.num_key_heads)):
            kind = _heads_of(layer.kind, b - a)
            own: dict[str, Any] = dict(kind=kind, layer_kind=layer.kind, first=a, cols=tuple(cols))
            spec = CpuRecurrentSpec.of(layer, step.layout, step.pool.num_state_slots, step.is_decode, **own)
            out = empty(step.num_tokens * kind.value_size, device=core)
            outs.append(recur_on_core(spec, out, (matrices[i], convs[i]), layer, step.inputs, shards))
            widths.append(kind.value_size)
        return sharded(outs, widths)

    def convolve(self, projected: Activation, layer: ConvLayer, step: Step) -> Activation:
        shards, convs = tensors_of(projected), tensors_of(step.pool.convs[layer.index])
        outs, widths = [], []
        for i, ((a, b), core) in enumerate(self._channels(layer.kind)):
            size = (b - a) * PANEL
            spec = ConvSpec(
                layout=step.layout,
                kind=layer.kind,
                cols=widths_of(projected, layer.cols)[i : i + 1],
                num_slots=step.pool.num_state_slots,
                is_decode=step.is_decode,
                channels=size,
                first=a * PANEL,
                table_channels=layer.kind.num_channels,
                has_threads=False,
            )
            out = empty(step.num_tokens * size, device=core)
            outs.append(convolve(spec, out, convs[i], layer.taps, step.inputs, shards[i]))
            widths.append(size)
        return sharded(outs, widths)

    def norm_groups(self, x: Activation, norm: Norm, num_tokens: int, addend: Activation) -> Activation:
        cols = sum(int(tensor.numel()) for tensor in tensors_of(x)) // num_tokens
        spec = GroupNormSpec(num_tokens, widths_of(x, cols), int(norm.weight.shape[0]), norm.eps)
        assert spec.x_cols == widths_of(addend, cols), f"{spec.x_cols} and {widths_of(addend, cols)}"
        out = empty(num_tokens * cols, device=self.cores[0])
        return run_kernel(norm_groups_kernel(spec), [out], [*tensors_of(x), *tensors_of(addend), norm.weight])[0]

    def gate_columns(
        self, gate: Activation, factors: Activation, start: Tensor, num_tokens: int, activation: str
    ) -> Activation:
        gates, own = tensors_of(gate), tensors_of(factors)
        is_shared = len(own) == 1  # else each core reads its own columns
        outs, first, widths = [], 0, []
        for tensor, factor in zip(gates, own * len(gates) if is_shared else own, strict=True):
            cols = int(tensor.numel()) // num_tokens
            spec = GateSpec(num_tokens, cols, first, int(factor.numel()) // num_tokens, activation)
            out = empty(num_tokens * cols, device=str(tensor.device))
            outs += run_kernel(gate_columns_kernel(spec), [out], [tensor, factor, start])
            widths.append(cols)
            first += cols if is_shared else 0
        return sharded(outs, widths)

    def store_normed(self, x: Activation, norm: Norm, num_tokens: int, out: Tensor, start: int, stride: int) -> Tensor:
        widths = widths_of(x, sum(int(tensor.numel()) for tensor in tensors_of(x)) // num_tokens)
        spec = GroupNormSpec(num_tokens, widths, sum(widths), norm.eps, has_addend=False, start=start, stride=stride)
        return run_kernel(norm_groups_kernel(spec), [out], [*tensors_of(x), norm.weight])[0]

    def take_rows(self, x: Activation, step: Step, num_cols: int, num_rows: int | None = None) -> Activation:
        layout, outs, widths = step.layout, [], widths_of(x, num_cols)
        for tensor, cols in zip(tensors_of(x), widths, strict=True):
            out = empty(layout.num_seqs * cols, device=str(tensor.device))
            outs += run_kernel(take_rows_kernel(layout, cols, num_rows), [out], [tensor, step.inputs])
        return sharded(outs, widths)

    def parts_of(self, x: Activation) -> Sequence[Tensor]:
        return tensors_of(x)

    def join(self, logits: Activation, stride: int, layout: StepLayout) -> Tensor:
        if not isinstance(logits, Sharded):
            return logits
        joined = empty(layout.num_seqs * stride, device=self.device.name)
        widths = logits.widths
        return run_row_kernel(lambda rows: join_kernel(rows, widths), layout.num_seqs, [joined], logits.tensors)[0]

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _inputs(self, x: Activation, norm: Norm | None, shape: tuple[int, int]) -> Inputs:
        """x (T, K) for products. `shape`: (T, K)."""
        return Inputs(x, norm, shape, self.cores, x_bits=self.x_bits)

    def _dot_rows(self, num_tokens: int) -> int:
        """Rows of x in a pass over a panel, in products of integers."""
        return FEW_DOT_ROWS if num_tokens <= STAGED_ROWS and has_many_registers() else DOT_ROWS

    def _linear(
        self,
        name: str,
        inputs: Inputs,
        matrix: Matrix,
        num_tokens: int,
        epilogue: Epilogue,
    ) -> Activation:
        """Each core's rows of the matrix, times its input."""
        outs: list[Tensor] = []
        widths: list[int] = []
        halves = 1 if epilogue.activation is None else 2  # rows of the matrix for each column of the result
        most = max(shard.num_rows for shard in matrix.shards)
        any_panels = epilogue.bias is None and any(shard.num_rows < most for shard in matrix.shards)
        for i, shard in enumerate(matrix.shards):
            core = str(shard.planes[0].device)
            x = inputs.of(matrix, self.cores.index(core))
            spec = LinearSpec(
                name=name,
                format=shard.format,
                num_tokens=num_tokens,
                num_rows=most if any_panels else shard.num_rows,
                num_cols=shard.num_cols,
                norm_eps=None if x.norm is None else x.norm.eps,
                activation=epilogue.activation,
                scale=epilogue.scale,
                has_residual=epilogue.residual is not None,
                has_out_scale=epilogue.out_scale is not None,
                softcap=epilogue.softcap,
                bias_starts=None if epilogue.bias is None else (sum(widths), matrix.num_rows // halves + sum(widths)),
                x_cols=x.x_cols,
                tile_rows=self.tile_rows if shard.layout == "panel" else self._dot_rows(num_tokens),
                layout=shard.layout,
                x_bits=self.x_bits,
                any_panels=any_panels,
            )
            spec = choose(spec)
            cols = shard.num_rows // halves
            out = empty(num_tokens * cols, device=core)
            operands = [*shard.planes, *x.tensors, *([] if x.norm is None else [x.norm.weight])]
            shared = list(shard.planes)
            if epilogue.bias is not None:
                operands.append(epilogue.bias)
                shared.append(epilogue.bias)
            residual = [] if epilogue.residual is None else [tensors_of(epilogue.residual)[i]]
            operands += residual
            if epilogue.out_scale is not None:
                operands.append(epilogue.out_scale)
                shared.append(epilogue.out_scale)
            share = None
            if any_panels:
                share = Share(shard.num_rows, most, (out, *shard.planes, *residual))
                operands.append(self._counts[shard.num_rows // PANEL, core])
                shared.append(operands[-1])
            outs += _run_product(spec, out, operands, shared, share)
            widths.append(cols)
        return sharded(outs, widths)

    def _finish(self, y: Activation, num_cols: int, num_tokens: int, epilogue: Epilogue) -> Activation:
        """An epilogue's norm and what follows it. Each core computes its own columns, from all cores' columns of y."""
        y_cols = widths_of(y, num_cols)
        norm, first, outs = epilogue.post_norm, 0, []
        weight = [] if norm is None else [norm.weight]
        out_scale = [] if epilogue.out_scale is None else [epilogue.out_scale]
        for i, (tensor, cols) in enumerate(zip(tensors_of(y), y_cols, strict=True)):
            spec = FinishSpec(
                num_tokens=num_tokens,
                y_cols=y_cols,
                first_col=first,
                num_cols=cols,
                norm_eps=None if norm is None else norm.eps,
                scale=epilogue.scale,
                has_residual=epilogue.residual is not None,
                has_out_scale=epilogue.out_scale is not None,
                softcap=epilogue.softcap,
            )
            residual = [] if epilogue.residual is None else [tensors_of(epilogue.residual)[i]]
            out = empty(num_tokens * cols, device=str(tensor.device))
            outs += run_kernel(finish_kernel(spec), [out], [*tensors_of(y), *weight, *residual, *out_scale])
            first += cols
        return sharded(outs, y_cols)

    def _attend(
        self,
        spec: CpuAttentionSpec,
        kv_heads: int,
        cores: tuple[str, ...],
        pool: list[Tensor],
        layer: AttentionLayer,
        step: Step,
        qkv: list[Tensor],
    ) -> list[tuple[Tensor, int]]:
        """The output of each core of a team, and its number of query heads. kv_heads: the team's."""
        inputs = [step.inputs, *([self._counts[kv_heads, cores[0]]] if spec.any_kv_heads else [])]
        read = [*inputs, *layer.tables]

        def output(heads: int, core: str) -> Tensor:
            return empty(step.num_tokens * heads * spec.head_dim, device=core)

        def share_with(*scaled: Tensor) -> Share | None:
            return Share(kv_heads, spec.num_kv_heads, scaled) if spec.any_kv_heads else None

        rows, tokens, all_heads = [*pool, *qkv], step.num_tokens, kv_heads * spec.group
        if spec.fused_write:
            out = output(all_heads, cores[0])
            outputs, make = [out, *pool], partial(attention_kernel, spec)
            shared = [*pool, *read]
            out = run_row_kernel(make, tokens, outputs, [*read, *qkv], shared, share=share_with(out, *rows))[0]
            return [(out, all_heads)]
        if spec.writes_kv:
            written = [*inputs, *layer.key_tables]
            make, shared = partial(write_kv_kernel, spec), [*pool, *written]
            operands = [*written, *qkv[spec.kv_parts]]
            pool = run_row_kernel(make, tokens, pool, operands, shared, share=share_with(*rows))
        outs = []
        for (first, end), core in share(all_heads, cores) if len(cores) > 1 else [((0, all_heads), cores[0])]:
            own = spec if len(cores) == 1 else spec.with_queries(first, end)
            kernel = attention_kernel if step.is_decode or tile_rows(own) == 1 else tile_attention_kernel
            out, shared = output(end - first, core), [*pool, *read]
            operands = [*shared, *qkv[own.query_parts]]
            (out,) = run_row_kernel(partial(kernel, own), tokens, [out], operands, shared, share=share_with(out, *rows))
            outs.append((out, end - first))
        return outs


def _stored(tensors: Sequence[Tensor]) -> Stored:
    """A layer's part of the pool, of which each core has a tensor."""
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def _heads_of(kind: StateKind, key_heads: int) -> StateKind:
    """`key_heads` heads of queries and keys, and the value heads that read them."""
    return replace(kind, num_key_heads=key_heads, num_heads=kind.num_heads // kind.num_key_heads * key_heads)


def _take_shard(host: HostMatrix, first: int, last: int, num_units: int) -> HostMatrix:
    """The rows of units [first, last) of `num_units` that the matrix consists of."""
    unit = host.shape[0] // num_units
    return take_host_rows(host, np.arange(first * unit, last * unit))


def _require_panels(num_rows: int) -> None:
    """The rows of gate and up are interleaved in halves of panels."""
    if num_rows % PANEL:
        raise UnsupportedModelError(f"the feed-forward has {num_rows} columns, which is not a multiple of {PANEL}")


def _run_product(
    spec: LinearSpec, out: Tensor, operands: list[Tensor], shared: list[Tensor], share: Share | None
) -> list[Tensor]:
    """shared: the operands whose size does not depend on the number of rows of x."""
    if not spec.has_fixed_rows:
        return run_kernel(linear_kernel(spec), [out], operands, share)

    def make(num_tokens: int) -> KernelFn:
        return linear_kernel(replace(spec, num_tokens=num_tokens))

    return run_in_blocks(make, spec.num_tokens, [out], operands, shared, share)


def _embed_rows(spec: EmbedSpec, num_tokens: int) -> KernelFn:
    return embed_kernel(replace(spec, num_tokens=num_tokens))


@cached_kernel
def take_rows_kernel(layout: StepLayout, num_cols: int, num_rows: int | None = None) -> KernelFn:
    """fn(out (R, columns), x (T or num_rows, columns), inputs): rows logit_rows of x."""
    last = (layout.num_tokens if num_rows is None else num_rows) - 1

    def kernel(out: UOp, x: UOp, inputs: UOp) -> UOp:
        body = Body()
        seq, col = body.loop(layout.num_seqs), body.loop(num_cols)
        row = inputs[layout.offset("logit_rows") + seq].load().maximum(0).minimum(last)
        store = out[seq * num_cols + col].store(x[row * num_cols + col].load())
        return finish(
            store.end(col, seq), f"take_rows_{layout.num_seqs}x{num_cols}", nbytes=8 * layout.num_seqs * num_cols
        )

    return kernel
