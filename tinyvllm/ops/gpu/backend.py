"""The general backend of devices with threadgroups (METAL, CUDA, OpenCL). Products are tinygrad's own kernels, which
unpack matrices in row layout; attention, KV write, embedding and sampling are our kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tinygrad import Tensor, UOp, dtypes

from tinyvllm.arrays import Format, HostMatrix
from tinyvllm.config import KVFormats, LayerKind, StateKind
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.adapter_spec import (
    AdapterSite,
    ExpandSpec,
    ShrinkSpec,
    SiteShape,
    blocks_of_parts,
    make_site,
)
from tinyvllm.ops.attention_spec import AttentionLayer, AttentionSpec
from tinyvllm.ops.backend import (
    NO_STATES,
    PLAIN,
    DeviceSampling,
    Epilogue,
    KVPool,
    Norm,
    PoolGroup,
    Step,
    expert_gate_over_up,
    gate_over_up,
    latent_layers,
    stack_qkv,
    zeroed_pool,
)
from tinyvllm.ops.coverage import Coverage
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import Matrix, Planes, pack, unpack
from tinyvllm.ops.gpu.adapters import expand_kernel, gated_expand_kernel, shrink_kernel
from tinyvllm.ops.gpu.attention import THREADS, attention_kernel, store_rows_kernel, take_rows_kernel, write_kv_kernel
from tinyvllm.ops.gpu.columns import GateSpec, gate_columns_kernel
from tinyvllm.ops.gpu.expert_rows import ExpertRowsSpec, expert_rows_kernel
from tinyvllm.ops.gpu.latent_attention import latent_attention_kernel, store_latents_kernel
from tinyvllm.ops.gpu.recurrent import recur_by_rows
from tinyvllm.ops.gpu.recurrent_rows import GpuRecurrentSpec
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.latent_spec import LatentLayer, LatentSpec
from tinyvllm.ops.plain import norm_whole_sections, plain_epilogue, plain_routing, rms_norm
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.sampling.token_ids import token_id
from tinyvllm.ops.short_conv import ConvLayer, ConvSpec, convolve

MAX_HEAD_DIM = 512  # threads of an attention threadgroup


class GpuBackend(DeviceSampling):
    """Activations and dense matrices have `dtype`; products and norms accumulate in float32."""

    def __init__(self, device: DeviceHandle, dtype: str, *, dequantize: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.dequantize = dequantize
        self.float = FLOATS[dtype]
        self.coverage = Coverage()

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return pack(host, "row", self.dtype, self.device.name, dequantize=self.dequantize)

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        return tuple(self.matrix(host) for host in stack_qkv(hosts))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Gate rows, then up rows."""
        return self.matrix(gate_over_up(gate, up))

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        return pack(host, "row", self.dtype, self.device.name, dequantize=self.dequantize, num_experts=num_experts)

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        """Each expert's gate rows, then its up rows."""
        return self.expert_matrix(expert_gate_over_up(gate, up, num_experts), num_experts)

    def make_rows(self, size: int) -> Tensor:
        return self.device.zeros(size, self.float)

    def make_pool(
        self,
        groups: Sequence[PoolGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        formats: KVFormats | str,
        states: Mapping[int, StateKind] = NO_STATES,
        num_state_slots: int = 0,
    ) -> KVPool:
        latents = latent_layers(groups)
        shapes = [(layer, shape) for group in groups for layer, shape in group.shapes.items()]
        for head_dim in {head_dim for layer, (_, head_dim) in shapes if layer not in latents}:
            if head_dim > MAX_HEAD_DIM or head_dim % 8:
                raise UnsupportedModelError(f"head_dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
        return zeroed_pool(self.device, groups, num_blocks, block_size, formats, states, num_state_slots)

    def adapter_site(self, shape: SiteShape) -> AdapterSite:
        return make_site(shape, self.device, self.dtype)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """That of the activations for "auto"."""
        return self.dtype if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def short_contexts(self, layers: Sequence[LayerKind], num_rows: int, verifies: bool) -> tuple[int, ...]:
        return ()

    def embed(self, table: Matrix, step: Step, scale: float = 1.0, ids: str = "token_ids") -> Tensor:
        rows, cols, at = table.used_rows, table.num_cols, step.layout.offset(ids)
        previous = step.previous_output
        fn = embed_kernel(table.format, step.num_tokens, rows, cols, at, previous is not None, scale)
        sources = [step.inputs] if previous is None else [step.inputs, previous]
        return run_kernel(fn, [self._empty(step.num_tokens * cols)], [*sources, *table.planes])[0]

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        rows = x.reshape(num_tokens, -1) if norm is None else self._normed(x, norm, num_tokens)
        return [self._product(rows, matrix, epilogue) for matrix in matrices]

    def route(self, x: Tensor, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        """In Tensor arithmetic, from the router's products in float32."""
        (logits,) = self.linear("router", x, [layer.router], num_tokens, norm)
        found = plain_routing(self.parts_of(logits)[0].reshape(num_tokens, -1), layer)
        shared = None if found.shared is None else found.shared.contiguous()
        return Routing(found.ids.contiguous(), found.weights.contiguous(), shared)

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        x = self.parts_of(x)[0]
        rows = x.reshape(-1) if norm is None else self._normed(x, norm, num_tokens).reshape(-1)
        hidden = self._expert_rows(rows, routing, layer, num_tokens, is_gate=True)
        out = self._expert_rows(hidden, routing, layer, num_tokens, is_gate=False)
        out = out.reshape(num_tokens, layer.num_chosen, -1) * routing.weights.reshape(num_tokens, -1, 1)
        # written before it is normed, as in _product
        total = out.sum(1) if epilogue.post_norm is None else out.sum(1).contiguous()
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.parts_of(epilogue.residual)[0].cast(dtypes.float))
        return plain_epilogue(total, epilogue).cast(self.float).reshape(-1).contiguous()

    def finish(self, x: Tensor, num_tokens: int, epilogue: Epilogue) -> Tensor:
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.parts_of(epilogue.residual)[0].cast(dtypes.float))
        rows = self.parts_of(x)[0].reshape(num_tokens, -1).cast(dtypes.float)
        return plain_epilogue(rows, epilogue).cast(self.float).reshape(-1).contiguous()

    def scale_rows(self, x: Tensor, factors: Tensor, num_tokens: int) -> Tensor:
        rows = self.parts_of(x)[0].reshape(num_tokens, -1).cast(dtypes.float)
        return (rows * factors.reshape(-1, 1)).cast(self.float).reshape(-1).contiguous()

    def adapt(
        self,
        x: Tensor,
        outs: Sequence[Tensor],
        site: AdapterSite,
        step: Step,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        shrunk, tokens = self._shrink(x, site, step, norm), step.num_tokens
        parts = [self.parts_of(out)[0] for out in outs]
        cols, results = [int(part.numel()) // tokens for part in parts], []
        for part, num_cols, (first, end) in zip(parts, cols, blocks_of_parts(site.shape, cols), strict=True):
            spec = ExpandSpec(
                shape=site.shape,
                num_tokens=tokens,
                slots_at=step.layout.offset("adapter_slots"),
                num_cols=num_cols,
                first_block=first,
                end_block=end,
                scale=scale,
            )
            results += run_kernel(expand_kernel(spec), [part], [site.ranks, site.b, step.inputs, shrunk])
        return results

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
        shrunk, tokens, product = self._shrink(x, site, step, norm), step.num_tokens, self.parts_of(product)[0]
        spec = ExpandSpec(
            shape=site.shape,
            num_tokens=tokens,
            slots_at=step.layout.offset("adapter_slots"),
            num_cols=int(product.numel()) // tokens,
            end_block=2,
            activation=activation,
            has_bias=bias is not None,
        )
        read = [product, site.ranks, site.b, step.inputs, shrunk, *([] if bias is None else [bias])]
        out = self._empty(tokens * site.shape.blocks[0].num_rows)
        return run_kernel(gated_expand_kernel(spec), [out], read)[0]

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        qkv, layer = self._with_whole_norm(qkv, layer, step)
        pool, stored = step.pool, layer.pool_layer
        spec = AttentionSpec.of(layer, step.layout, pool.num_blocks[stored], kv=pool.formats)
        planes = pool.tensors_of(stored)
        if spec.writes_kv:
            written = [step.inputs, *layer.key_tables, *qkv[spec.kv_parts]]
            planes = run_kernel(write_kv_kernel(spec), planes, written)
        out = self._empty(step.num_tokens * spec.num_heads * spec.head_dim)
        read = [*planes, step.inputs, *layer.tables, *qkv[spec.query_parts]]
        return run_kernel(attention_kernel(spec), [out], read)[0]

    def attend_latent(self, queries: Tensor, latents: Tensor, layer: LatentLayer, step: Step) -> Tensor:
        tokens, pool = step.num_tokens, step.pool.keys[layer.index]
        assert isinstance(pool, Tensor)
        spec = LatentSpec.of(layer, step.layout, step.pool.num_blocks[layer.index])
        store = store_latents_kernel(spec, int(latents.numel()) // tokens)
        (pool,) = run_kernel(store, [pool], [step.inputs, layer.norm, layer.rope, latents])
        nope = queries.reshape(tokens, spec.num_heads, -1)[:, :, : spec.nope_dim]
        absorbed = self._by_head(nope, layer.key_up)
        out = self._empty(tokens * spec.num_heads * spec.rank)
        read = [pool, step.inputs, layer.rope, absorbed, queries]
        (out,) = run_kernel(latent_attention_kernel(spec), [out], read)
        return self._by_head(out.reshape(tokens, spec.num_heads, -1), layer.value_up)

    def recur(self, projections: Sequence[Tensor], layer: RecurrentLayer, step: Step) -> Tensor:
        slots, partials = step.pool.num_state_slots, (1,) * len(projections)
        spec = GpuRecurrentSpec.of(layer, step.layout, slots, step.is_decode, partials=partials)
        out = self._empty(step.num_tokens * layer.kind.value_size)
        return recur_by_rows(spec, out, layer, step, [self.parts_of(part)[0] for part in projections])

    def convolve(self, projected: Tensor, layer: ConvLayer, step: Step) -> Tensor:
        channels, convs = layer.kind.num_channels, step.pool.convs[layer.index]
        assert isinstance(convs, Tensor)
        spec = ConvSpec(
            layout=step.layout,
            kind=layer.kind,
            cols=(layer.cols,),
            num_slots=step.pool.num_state_slots,
            is_decode=step.is_decode,
            channels=channels,
            first=0,
            table_channels=channels,
            has_threads=True,
        )
        out = self._empty(step.num_tokens * channels)
        return convolve(spec, out, convs, layer.taps, step.inputs, self.parts_of(projected)[0])

    def norm_groups(self, x: Tensor, norm: Norm, num_tokens: int, addend: Tensor) -> Tensor:
        groups, addend = (self.parts_of(value)[0].cast(dtypes.float) for value in (x, addend))
        normed = rms_norm(groups.reshape(-1, norm.weight.shape[0]), norm).reshape(-1)
        return (normed + addend).cast(self.float).contiguous()

    def gate_columns(self, gate: Tensor, factors: Tensor, start: Tensor, num_tokens: int, activation: str) -> Tensor:
        size, read = int(gate.numel()), [self.parts_of(x)[0] for x in (gate, factors)]
        spec = GateSpec(num_tokens, size // num_tokens, int(factors.numel()) // num_tokens, activation)
        return run_kernel(gate_columns_kernel(spec), [self._empty(size)], [*read, start])[0]

    def store_normed(self, x: Tensor, norm: Norm, num_tokens: int, out: Tensor, start: int, stride: int) -> Tensor:
        rows = self._normed(self.parts_of(x)[0], norm, num_tokens).reshape(-1)
        fn = store_rows_kernel(num_tokens, int(rows.numel()) // num_tokens, start, stride)
        return run_kernel(fn, [out], [rows])[0]

    def take_rows(self, x: Tensor, step: Step, num_cols: int, num_rows: int | None = None) -> Tensor:
        fn = take_rows_kernel(step.layout, num_cols, num_rows)
        return run_kernel(fn, [self._empty(step.layout.num_seqs * num_cols)], [x, step.inputs])[0]

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        return [x]

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _shrink(self, x: Tensor, site: AdapterSite, step: Step, norm: Norm | None) -> Tensor:
        """(T * S * R,) float32: A norm(x) of each row's adapter."""
        spec = ShrinkSpec(
            shape=site.shape,
            num_tokens=step.num_tokens,
            slots_at=step.layout.offset("adapter_slots"),
            norm_eps=None if norm is None else norm.eps,
        )
        out = empty(step.num_tokens * site.shape.num_shrunk, dtypes.float, self.device.name)
        read = [self.parts_of(x)[0], site.ranks, site.a, step.inputs, *([] if norm is None else [norm.weight])]
        return run_kernel(shrink_kernel(spec), [out], read)[0]

    def _empty(self, size: int) -> Tensor:
        return empty(size, self.float, self.device.name)

    def _with_whole_norm(
        self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step
    ) -> tuple[Sequence[Tensor], AttentionLayer]:
        """qkv with the layer's norm of whole queries and keys, if it has one, and the rest of the layer."""
        if not layer.kind.head_norm_is_whole:
            return qkv, layer
        self.coverage.take_general("attention", "a norm of whole queries and keys", layer.index)
        parts = [self.parts_of(part)[0] for part in qkv]
        return [norm_whole_sections(parts, layer, step.num_tokens).contiguous()], layer.without_whole_norm()

    def _expert_rows(
        self, x: Tensor, routing: Routing, layer: ExpertLayer, num_tokens: int, *, is_gate: bool
    ) -> Tensor:
        """One of the two products of each token's experts, with its bias: the gated hidden values (T * k, ffn), or the
        outputs (T * k, hidden) in float32."""
        matrix, bias = (layer.gate_up, layer.gate_up_bias) if is_gate else (layer.down, layer.down_bias)
        rows = matrix.expert_size
        spec = ExpertRowsSpec(
            format=matrix.format,
            num_tokens=num_tokens,
            num_chosen=layer.num_chosen,
            num_experts=matrix.num_experts,
            num_rows=rows // 2 if is_gate else rows,
            num_cols=matrix.num_cols,
            x_has_pairs=not is_gate,
            activation=layer.kind.activation if is_gate else None,
            has_bias=bias is not None,
        )
        size = num_tokens * spec.num_chosen * spec.num_rows
        out = self._empty(size) if is_gate else empty(size, dtypes.float, self.device.name)
        operands = [routing.ids, x, *matrix.planes, *([] if bias is None else [bias])]
        return run_kernel(expert_rows_kernel(spec), [out], operands)[0]

    def _normed(self, x: Tensor, norm: Norm, num_tokens: int) -> Tensor:
        """RMSNorm in float32, (T, K) in the activations' dtype."""
        rows = x.reshape(num_tokens, -1).cast(dtypes.float)
        scale = (rows.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return (rows * scale * norm.weight).cast(self.float).contiguous()

    def _by_head(self, x: Tensor, matrix: Matrix) -> Tensor:
        """A block-diagonal product: (T * rows,), of each head's columns x (T, H, K) and its rows of the matrix."""
        by_head = unpack(matrix, self.float).reshape(x.shape[1], -1, matrix.num_cols)
        out = x.cast(self.float).transpose(0, 1).matmul(by_head.transpose(1, 2), dtype=dtypes.float)
        return out.transpose(0, 1).cast(self.float).reshape(-1).contiguous()

    def _product(self, x: Tensor, matrix: Matrix, epilogue: Epilogue) -> Tensor:
        """epilogue(x (T, K) @ matrix.T), flat: in float32 if it is qkv or logits, which no activation, norm or
        residual follows, otherwise in the activations' dtype. The product's kernel unpacks the matrix."""
        out = x.matmul(unpack(matrix, self.float).T, dtype=dtypes.float)
        residual = epilogue.residual
        if epilogue.activation is None and epilogue.post_norm is None and residual is None:
            return plain_epilogue(out, epilogue).reshape(-1).contiguous()
        # written before it is normed: the passes over its rows would otherwise multiply again
        if epilogue.post_norm is not None:
            out = out.contiguous()
        if residual is not None:
            epilogue = replace(epilogue, residual=residual.cast(dtypes.float))
        return plain_epilogue(out, epilogue).cast(self.float).reshape(-1).contiguous()


@cached_kernel
def embed_kernel(
    fmt: Format, num_tokens: int, num_rows: int, num_cols: int, token_offset: int, is_fed: bool, scale: float
) -> KernelFn:
    """fn(out (T, K), inputs[, previous_output], *planes): rows of a table in row layout, times `scale`. A token id
    beyond it reads the last row. `is_fed`: one below 0 names a row of the previous step's output."""

    def kernel(out: UOp, inputs: UOp, *rest: UOp) -> UOp:
        previous, planes = (rest[0], rest[1:]) if is_fed else (None, rest)
        body, table = Body(), Planes(fmt, planes)
        threads = next(count for count in (256, 128, 64, THREADS) if num_cols % count == 0)
        token, chunk, thread = body.grid(num_tokens), body.grid(num_cols // threads), body.threads(threads)
        col = chunk * threads + thread
        row = token_id(inputs[token_offset + token].load(), previous, num_rows)
        value = table.value(row, col, num_cols, "row")
        value = value if scale == 1.0 else value * scale
        store = out[token * num_cols + col].store(value.cast(out.dtype))
        name = f"embed_{fmt.name}_{num_tokens}x{num_cols}"
        return finish(store.end(thread, chunk, token), name, nbytes=num_tokens * num_cols * 4)

    return kernel
