"""The backend of CUDA and METAL: fused kernels, five in each layer for one token row and seven for more.

Some tensors that operations return are lazy (`Pending`): they are described but not computed. The next operation often
computes them on the way: partial products are added up where the sum is normed or attended to, and the splits of an
attention are combined where the result is projected. An operation that cannot do so first has them written
(`FusedGpuBackend.whole`). What the fused kernels do not cover runs in the general form of ops/gpu/backend.py, and the
log says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import HostMatrix
from tinyvllm.config import FLOAT16_KV, LayerKind
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.activation import rounded, scaled
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import PLAIN, Epilogue, KVPool, Norm, Step
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.formats.runs import covers
from tinyvllm.ops.gpu.attention_decode import decode_kernel
from tinyvllm.ops.gpu.attention_decode_hopper import (
    STREAMED_CONTEXT,
    StreamedAttentionSpec,
    attend_streamed,
    streams_one_row,
)
from tinyvllm.ops.gpu.attention_decode_row import GROUPS_WANTED, DecodeSpec, short_contexts
from tinyvllm.ops.gpu.attention_prefill import attend_tiles, store_rows
from tinyvllm.ops.gpu.attention_prefill_inputs import PrefillSpec
from tinyvllm.ops.gpu.attention_split import SplitHeads, combine_kernel
from tinyvllm.ops.gpu.backend import GpuBackend, embed_kernel
from tinyvllm.ops.gpu.experts import FusedRouting, ManyRows, OneRow, run_route, uncovered_layer
from tinyvllm.ops.gpu.experts_route import uncovered_kind
from tinyvllm.ops.gpu.gemm import MIN_TOKENS, GemmSpec, multiply_rows, round_rows, takes_tiles
from tinyvllm.ops.gpu.latent_attention import store_latents_kernel
from tinyvllm.ops.gpu.latent_fused import FusedLatentSpec, combine_latents_kernel, fused_latent_kernel
from tinyvllm.ops.gpu.matrix import MatrixSpec, fits_matrix_unit, matrix_kernel
from tinyvllm.ops.gpu.plane_ring import is_worth_streaming, is_worth_streaming_row
from tinyvllm.ops.gpu.product import plane_sizes
from tinyvllm.ops.gpu.quantized_cluster import MAX_TOKENS as CLUSTER_TOKENS
from tinyvllm.ops.gpu.quantized_cluster import ClusteredMatrixSpec, clustered_matrix_kernel, make_maps, takes_clusters
from tinyvllm.ops.gpu.quantized_stream import StreamedVectorSpec, streamed_vector_kernel
from tinyvllm.ops.gpu.quantized_stream_floats import StreamedFloatSpec, streamed_float_kernel
from tinyvllm.ops.gpu.quantized_stream_rows import MAX_TOKENS as STREAMED_TOKENS
from tinyvllm.ops.gpu.quantized_stream_rows import StreamedMatrixSpec, streamed_matrix_kernel
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, fits_quantized_vector, quantized_vector_kernel
from tinyvllm.ops.gpu.quantized_wgmma import QuantizedWgmmaSpec, quantized_wgmma_kernel, reads_runs
from tinyvllm.ops.gpu.recurrent import recur_by_rows
from tinyvllm.ops.gpu.recurrent_chunks import MIN_ROWS, recur_by_chunks
from tinyvllm.ops.gpu.recurrent_decode import DecodeStateSpec, recur_rows
from tinyvllm.ops.gpu.recurrent_rows import GpuRecurrentSpec
from tinyvllm.ops.gpu.recurrent_solve import ChunkSpec
from tinyvllm.ops.gpu.row_sum import RUN_COLS, EmbedSpec, SumSpec, sum_kernel
from tinyvllm.ops.gpu.stream_hopper import MAP_SIZE, NUM_MAPS, StreamSpec, stream_kernel
from tinyvllm.ops.gpu.stream_hopper_codes import CodeStreamSpec, code_stream_kernel, reads_codes
from tinyvllm.ops.gpu.token_order import order_rows_kernel, token_cols
from tinyvllm.ops.gpu.vector import NormedSum, VectorSpec, vector_kernel
from tinyvllm.ops.kernel.body import F32, empty, run_kernel
from tinyvllm.ops.kernel.hopper import allows_wgmma
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import choose
from tinyvllm.ops.latent_spec import LatentLayer
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.step_inputs import StepLayout

# measured on an H200: chaining gains 5 % at 8 rows and loses 2 % at 64; with quantized weights it gains 10 % at 32, and
# with products that stream their weights 5 % at 64
MAX_CHAINED_TOKENS, MAX_CHAINED_QUANTIZED, MAX_CHAINED_STREAMS = 16, 32, 64
# Rows of a matrix, as a multiple of its columns, up to which one row's product computes a normed sum that it reads:
# each of its threadgroups reads all operands of the sum, so with more rows a kernel of its own costs less. Of products
# that stream their matrix there are never more threadgroups than multiprocessors: they compute it in any case (NVIDIA
# H200, a step of gemma-3-4b in Q4_K, 7 layers: 351 us instead of 354)
MOST_ROWS_WITH_SUM = 4
# The fewest rows that are worth a kernel which rounds them to bfloat16 before a product whose x is not normed
ROUND_TOKENS = 32
# What experts pass on in float16, in bfloat16 models, is multiplied by this: that of two numbers may exceed float16's
# range. It leaves 4,194,240, and what is below 0.004 loses bits, but keeps an error below 2e-6
HALF_FACTORS = {"clamped_swiglu": 1.0}  # at most 7 * 8
HALF_FACTOR = 1 / 64


class Pending(Tensor):
    """A lazy tensor: a buffer to which nothing is written yet, with a description of its values. `is_written` turns
    true when a kernel has computed them into the buffer; from then on it is an ordinary tensor."""

    is_written = False


class Summed(Pending):
    """A lazy sum: the epilogue of `num_partials` partial products (S, T, N), which lie one after another in
    `partials`. Computed by `sum_kernel`, or by the attention kernel that reads it as qkv."""

    partials: Tensor
    num_partials: int  # S
    num_tokens: int  # T
    epilogue: Epilogue
    weights: Tensor | None = None  # (T, S), of partial products (T, S, N): those of each token's experts
    has_bfloat_bits: bool = False  # as in SumSpec
    factor: float = 1.0  # as in SumSpec

    @property
    def is_normed_sum(self) -> bool:
        """Whether it is a `NormedSum` that is still to be computed: one row's product can do so as it reads it."""
        end = self.epilogue
        is_one = self.num_partials == self.num_tokens == 1 and self.weights is None
        has_all = is_one and end.post_norm is not None and end.residual is not None
        return has_all and not self.is_written and end.bias is None and end.softcap is None

    @property
    def operands(self) -> list[Tensor]:
        """What `sum_kernel` reads."""
        norm = self.epilogue.post_norm
        epilogue = self.epilogue
        norm_weight = None if norm is None else norm.weight
        rest = (epilogue.residual, epilogue.bias, norm_weight, epilogue.out_scale, self.weights)
        return [self.partials, *[tensor for tensor in rest if tensor is not None]]

    def spec(self, lanes: Lanes, num_cols: int, norm_eps: float | None) -> SumSpec:
        """The kernel that computes it, and with `norm_eps` its RMSNorm too."""
        epilogue = self.epilogue
        return SumSpec(
            lanes=lanes,
            num_tokens=self.num_tokens,
            num_cols=num_cols,
            num_partials=self.num_partials,
            has_residual=epilogue.residual is not None,
            norm_eps=norm_eps,
            has_bias=epilogue.bias is not None,
            post_norm_eps=None if epilogue.post_norm is None else epilogue.post_norm.eps,
            scale=epilogue.scale,
            has_out_scale=epilogue.out_scale is not None,
            softcap=epilogue.softcap,
            is_weighted=self.weights is not None,
            has_bfloat_bits=self.has_bfloat_bits,
            factor=self.factor,
        )


class Embedded(Pending):
    """Lazy rows of an embedding table, which the first norm reads. `sources`: the step's inputs[, the previous step's
    output], and the table's planes."""

    spec: EmbedSpec
    table: Matrix
    num_tokens: int
    sources: list[Tensor]


@dataclass(frozen=True)
class _Passed:
    """How a gated product passes its results on: by which activation, in which dtype, and as in Halves."""

    activation: str | None
    dtype: DType
    factor: float = 1.0
    has_bits: bool = False


class Split(Pending):
    """One row's lazy attention: the splits of its context (SplitHeads), still to be combined."""

    values: Tensor
    sums: Tensor
    inputs: Tensor
    split: SplitHeads


class Halves(Pending):
    """Lazy rows (T, K), which products read from `halves`: in float16, times `factor`, perhaps in another order
    (token_order.py); or in bfloat16, as its bits."""

    halves: Tensor
    num_tokens: int  # T
    factor: float = 1.0
    is_ordered: bool = False
    has_bits: bool = False


def _uncovered_pool(pool: KVPool) -> str:
    """Why the fused kernels of attention do not read this pool, in words; "" if they do."""
    covers_all = all(form.is_quantized or form.name == "float16" for form in (pool.formats.keys, pool.formats.values))
    return "" if covers_all else f"a pool in {pool.formats.name}"


DENSE_NAMES = {dtypes.half: "float16", dtypes.bfloat16: "bfloat16"}  # formats, by the matrix unit's dtype
ProductSpec = MatrixSpec | GemmSpec | StreamSpec | StreamedMatrixSpec | ClusteredMatrixSpec


class FusedGpuBackend(GpuBackend):
    """Activations are in float16, or in float32 where the weights are wider than float16 or exceed its range."""

    def __init__(self, device: DeviceHandle, dtype: str, lanes: Lanes, *, dequantize: bool = False) -> None:
        super().__init__(device, dtype, dequantize=dequantize)
        self.lanes = lanes
        self.float = dtypes.half if dtype == "float16" else dtypes.float
        self.mma = self._mma(FLOATS[dtype])
        self.has_wgmma = allows_wgmma(device.name)
        self.has_quantized = False  # whether any matrix so far is quantized, and not streamed as float16 is
        self.arrivals = device.zeros(GROUPS_WANTED, dtypes.int)  # of threadgroups that share a context
        # where products that stream their weights describe their operands, in turn (NUM_MAPS). The memory of a step's
        # other scratch may still be read then
        size = MAP_SIZE if lanes.kind == "CUDA" else 1
        self.maps = [device.zeros(size, dtypes.uint) for _ in range(NUM_MAPS)]

    def _mma(self, dtype: DType) -> Mma | None:
        usable = dtype != dtypes.float and dtype in self.lanes.matrix_dtypes
        return Mma(self.lanes.kind, dtype, self.lanes.has_float8) if usable else None

    # -- weights and pool ---------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        matrix = super().matrix(host)
        mma = self._unit([matrix])
        takes_runs = mma is not None and mma.dtype == dtypes.half and reads_runs(matrix.format)
        is_streamed = self.has_wgmma and (takes_runs or reads_codes(matrix.format))
        self.has_quantized |= matrix.format.is_quantized and not is_streamed
        return self.with_maps(matrix)

    def with_maps(self, matrix: Matrix) -> Matrix:
        """The matrix with the tensor maps of its planes, if a kernel reads them by such."""
        mma = self._unit([matrix])
        if not self.has_wgmma or mma is None or not takes_clusters(matrix.format):
            return matrix
        spec = ClusteredMatrixSpec.of("", self.lanes, mma, matrix, CLUSTER_TOKENS)
        return replace(matrix, maps=make_maps(spec, matrix)) if spec.is_wanted and spec.is_possible() else matrix

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 unless another dtype is requested, or float32 if the activations are. Not bfloat16, which cannot be
        loaded in vectors."""
        if wanted != "auto":
            return super().kv_dtype(wanted, stored)
        return "float32" if self.dtype == "float32" else "float16"

    # -- operations ---------------------------------------------------------------------------------------------------

    def short_contexts(self, layers: Sequence[LayerKind], num_rows: int, verifies: bool) -> tuple[int, ...]:
        """On CUDA alone: METAL's kernels for one row are the same for all contexts."""
        attending = [layer for layer in layers if layer.state is None and layer.latent is None]
        if self.lanes.kind != "CUDA" or not attending:
            return ()
        # a layer with a window never attends to so many tokens
        far = [layer for layer in attending if layer.window is None or layer.window >= STREAMED_CONTEXT]
        is_streamed = self.has_wgmma and any(streams_one_row(layer.head_dim) for layer in far)
        return short_contexts(num_rows, verifies, longest=STREAMED_CONTEXT // 2 if is_streamed else 0)

    def embed(self, table: Matrix, step: Step, scale: float = 1.0, ids: str = "token_ids") -> Tensor:
        if step.num_tokens == 1 or table.num_cols % RUN_COLS:
            return super().embed(table, step, scale, ids)
        previous = step.previous_output
        result = Embedded(self._empty(step.num_tokens * table.num_cols).uop)
        at = step.layout.offset(ids)
        result.spec = EmbedSpec(table.format, table.used_rows, at, previous is not None, scale)
        result.table, result.num_tokens = table, step.num_tokens
        result.sources = [step.inputs, *([] if previous is None else [previous]), *table.planes]
        return result

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        if reason := self._uncovered_product(matrices, num_tokens, epilogue):
            self.coverage.take_general(f"{name}: a product", reason)
            if epilogue.residual is not None:
                epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
            return super().linear(name, self.whole(x), matrices, num_tokens, norm, epilogue)
        if num_tokens == 1:
            return [self._one_row(name, x, matrix, norm, epilogue) for matrix in matrices]
        is_float16 = isinstance(x, Halves) and not x.is_written and not x.has_bits
        mma = self._unit(matrices) if norm is not None or is_float16 else self.mma
        assert mma is not None
        if norm is not None and mma == self.mma and self._takes_words(matrices, num_tokens):
            x = self._normed_rows(x, norm, num_tokens, dtypes.half, rounds_to_bfloat=True)
        elif norm is not None:
            orders = self._takes_order(name, matrices, num_tokens, epilogue, mma)
            x = self._normed_rows(x, norm, num_tokens, self._rows_of(mma), orders=orders)
        return [self._many_rows(name, x, matrix, num_tokens, epilogue, mma) for matrix in matrices]

    def route(self, x: Tensor, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        if reason := uncovered_kind(layer.kind):
            self.coverage.take_general("a router", reason, layer.index)
            return super().route(self.whole(x), layer, num_tokens, norm)
        memory, mma = {}, self.mma
        if num_tokens > 1 and norm is not None:
            # of a normed x, float16 keeps three bits more than bfloat16, and a near choice depends on them
            mma = self._mma(dtypes.half) or mma
            normed = self._normed_rows(x, norm, num_tokens, self._expert_types(layer, norm)[1])
            memory, x, norm = dict(x=x, norm=norm, normed=normed), normed, None
        if num_tokens > 1 and not self._uncovered_product([layer.router], num_tokens, PLAIN):
            logits = self._many_rows("router", self.whole(x), layer.router, num_tokens, PLAIN, mma)
        else:
            (logits,) = self.linear("router", x, [layer.router], num_tokens, norm)
        count = 1
        if isinstance(logits, Summed) and not logits.is_written:
            logits, count = logits.partials, logits.num_partials
        return run_route(self._lanes(num_tokens), layer, logits, num_tokens, count, memory)

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
        if reason := uncovered_layer(layer, num_tokens, self.mma, self.dtype):
            self.coverage.take_general("experts", reason, layer.index)
            return super().experts(self.whole(x), routing, layer, num_tokens, norm, epilogue)
        if num_tokens == 1:
            return self._experts_of_one(x, routing, layer, norm, epilogue)
        mma, dtype = self._expert_types(layer, norm)
        assert mma is not None
        is_narrowed = mma != self.mma
        may_exceed = self.dtype == "bfloat16"  # float16's range
        rows = ManyRows(
            lanes=self._lanes(num_tokens),
            mma=mma,
            layer=layer,
            num_tokens=num_tokens,
            has_wgmma=self.has_wgmma,
            rounds_to_bfloat=may_exceed,
            factor=HALF_FACTORS.get(layer.kind.activation, HALF_FACTOR) if is_narrowed else 1.0,
        )
        normed = routing.normed_rows(x, norm) if isinstance(routing, FusedRouting) else None
        if normed is None:
            normed = self.whole(x) if norm is None else self._normed_rows(x, norm, num_tokens, dtype)
        order = rows.sort(routing)
        partials = rows.down(rows.gate_up(normed, order, dtype), order, self.float)
        result = self._pending_sum(partials, layer.num_chosen, num_tokens, epilogue)
        result.weights, result.has_bfloat_bits = routing.weights, rows.has_bfloat_bits
        return result

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        qkv, layer = self._with_whole_norm(qkv, layer, step)
        counts, parts = self._as_partials(qkv)
        by_rows = step.is_decode or step.verifies
        kind = DecodeSpec if by_rows else PrefillSpec
        pool_reason = _uncovered_pool(step.pool)
        mma = None if pool_reason else self._mma(dtypes.half)
        reason = pool_reason or "no matrix unit for float16"
        if mma is not None:
            lanes = self._lanes_between(step.num_tokens) if by_rows else self.lanes
            own = dict(lanes=lanes, mma=mma, qkv_partials=counts, kv=step.pool.formats)
            spec = kind.of(layer, step.layout, step.pool.num_blocks[layer.pool_layer], **own)
            reason = spec.uncovered_shape()
        if mma is None or reason:
            self.coverage.take_general("attention", reason, layer.index)
            return super().attend([self.whole(part) for part in qkv], layer, step)
        pool = step.pool.tensors_of(layer.pool_layer)
        out, has_bits = self._heads(layer, step.num_tokens, spec.num_heads * spec.head_dim)
        own["has_bfloat_results"], spec = has_bits, replace(spec, has_bfloat_results=has_bits)
        if by_rows and self.has_wgmma:
            stream = StreamedAttentionSpec.of(
                layer,
                step.layout,
                step.pool.num_blocks[layer.pool_layer],
                has_wgmma=True,
                shares_keys=step.verifies,
                **own,
            )
            if stream.is_worthwhile and not stream.uncovered_shape():
                rows = attend_streamed(choose(stream), out, pool, layer, step, parts)
                return self._held(rows, step.num_tokens, has_bits=has_bits)
        if isinstance(spec, PrefillSpec):
            rows = attend_tiles(spec, out, pool, layer, step, parts)
            return self._held(rows, step.num_tokens, has_bits=has_bits)
        if step.verifies and spec.writes_kv:
            store = PrefillSpec.of(layer, step.layout, step.pool.num_blocks[layer.pool_layer], **own)
            if reason := store.uncovered_shape():
                self.coverage.take_general("attention that verifies drafts", reason, layer.index)
                return super().attend([self.whole(part) for part in qkv], layer, step)
            pool = store_rows(store, pool, layer, step, parts)
            spec, parts = replace(spec, reads_own=True), parts[spec.query_parts]
        return self._decode(choose(spec), out, pool, [step.inputs, *layer.tables, *parts], step)

    def recur(self, projections: Sequence[Tensor], layer: RecurrentLayer, step: Step) -> Tensor:
        counts, parts = self._as_partials(projections)
        slots, out = step.pool.num_state_slots, self._empty(step.num_tokens * layer.kind.value_size)
        own: dict[str, Any] = dict(lanes=self._lanes(step.num_tokens), partials=counts)
        if step.is_decode:
            spec = DecodeStateSpec.of(layer, step.layout, slots, is_decode=True, **own)
            if not (reason := spec.uncovered_shape()):
                return recur_rows(choose(spec), out, layer, step, parts)
            self.coverage.take_general("recurrence", reason, layer.index)
        half = self._mma(dtypes.half)
        if half is not None and self.dtype != "float32" and step.num_tokens >= MIN_ROWS:
            chunks = ChunkSpec.of(layer, step.layout, slots, step.is_decode, mma=half, **own)
            if not (reason := chunks.uncovered_shape()):
                return recur_by_chunks(choose(chunks), out, layer, step, parts)
            self.coverage.take_general("a recurrence over prompts", reason, layer.index)
        walk = GpuRecurrentSpec.of(layer, step.layout, slots, step.is_decode, **own)
        return recur_by_rows(walk, out, layer, step, parts)

    def _heads(self, layer: AttentionLayer, num_tokens: int, num_cols: int) -> tuple[Tensor, bool]:
        """(a buffer for what attention returns, whether it is for bfloat16's bits). In a bfloat16 model it is in
        float16 if a product in float16 reads it (it is a mean of values, which the pool holds in float16)."""
        dtype, has_bits, reader = self.float, False, layer.reader
        if reader is not None and num_tokens > 1 and self._half_unit() is not None:
            has_bits = not reader.format.is_quantized and self._takes_bits(reader, num_tokens)
            dtype = dtypes.half if has_bits or reader.format.is_quantized else dtype
        return empty(num_tokens * num_cols, dtype, self.device.name), has_bits

    def _held(
        self, rows: Tensor, num_tokens: int, factor: float = 1.0, *, is_ordered: bool = False, has_bits: bool = False
    ) -> Tensor:
        """Rows of 16 bits, which are lazy unless the activations are in float16, too."""
        if rows.dtype == self.float and not is_ordered:
            return rows
        size = int(rows.numel()) // token_cols(num_tokens) * num_tokens if is_ordered else int(rows.numel())
        result = Halves(self._empty(size).uop)
        result.halves, result.num_tokens, result.factor = rows, num_tokens, factor
        result.is_ordered, result.has_bits = is_ordered, has_bits
        return result

    def _decode(self, spec: DecodeSpec, out: Tensor, pool: list[Tensor], read: list[Tensor], step: Step) -> Tensor:
        """Attention of rows that are each the last token of their sequence."""
        split = spec.split
        written, read = ([*pool], read) if spec.adds_own else ([], [*pool, *read])
        if not spec.is_split:
            (rows,) = run_kernel(decode_kernel(spec), [out, *written], read)[:1]
            return self._held(rows, step.num_tokens, has_bits=spec.has_bfloat_results)
        rows = split.num_splits * step.num_tokens
        outs = [self._floats(rows * split.num_cols), self._floats(rows * split.num_heads)]
        if spec.combines_splits:
            outs = [out, *outs, self.arrivals]
            (heads,) = run_kernel(decode_kernel(spec), [*outs, *written], read)[:1]
            return self._held(heads, step.num_tokens, has_bits=spec.has_bfloat_results)
        values, sums, *_ = run_kernel(decode_kernel(spec), [*outs, *written], read)
        result = Split(self._empty(split.num_cols).uop)
        result.values, result.sums, result.inputs, result.split = values, sums, step.inputs, split
        return result

    def finish(self, x: Tensor, num_tokens: int, epilogue: Epilogue) -> Tensor:
        return self._pending_sum(self.whole(x), 1, num_tokens, epilogue)

    def attend_latent(self, queries: Tensor, latents: Tensor, layer: LatentLayer, step: Step) -> Tensor:
        queries, latents = self.whole(queries), self.whole(latents)
        mma, tokens = self._mma(dtypes.half), step.num_tokens
        pool_reason = "" if step.pool.formats == FLOAT16_KV else f"a pool in {step.pool.formats.name}"
        reason = pool_reason or "no matrix unit for float16"
        if mma is not None and not pool_reason:
            own = dict(lanes=self._lanes(tokens), mma=mma)
            spec = FusedLatentSpec.of(layer, step.layout, step.pool.num_blocks[layer.index], **own)
            reason = spec.uncovered_shape() or self._uncovered_product([layer.key_up, layer.value_up], tokens, PLAIN)
        if reason:
            self.coverage.take_general("latent attention", reason, layer.index)
            return super().attend_latent(queries, latents, layer, step)
        pool = step.pool.keys[layer.index]
        assert isinstance(pool, Tensor)
        store = store_latents_kernel(spec, int(latents.numel()) // tokens, spec.lanes)
        (pool,) = run_kernel(store, [pool], [step.inputs, layer.norm, layer.rope, latents])
        absorbed = self._by_head_fused("key_up", queries, layer.key_up, spec)
        attended = self._attend_latents(spec, [pool, step.inputs, layer.rope, absorbed, queries])
        return self._by_head_fused("value_up", attended, layer.value_up, spec)

    def _attend_latents(self, spec: FusedLatentSpec, read: list[Tensor]) -> Tensor:
        """(T * H * rank,): attention in the latents' space."""
        split, tokens = spec.split, spec.layout.num_tokens
        out = self._empty(tokens * split.num_cols)
        if split.num_splits == 1:
            return run_kernel(fused_latent_kernel(spec), [out], read)[0]
        rows = split.num_splits * tokens
        parts = [self._floats(rows * split.num_cols), self._floats(rows * split.num_heads)]
        parts = run_kernel(fused_latent_kernel(spec), parts, read)
        return run_kernel(combine_latents_kernel(spec), [out], [*parts, read[1]])[0]

    def _by_head_fused(self, name: str, x: Tensor, matrix: Matrix, spec: FusedLatentSpec) -> Tensor:
        """A block-diagonal product: (T * rows,), of each head's columns of x and its rows of the matrix."""
        tokens = spec.layout.num_tokens
        block_rows, block_stride = matrix.num_rows // spec.num_heads, int(x.numel()) // tokens // spec.num_heads
        out = self._empty(tokens * matrix.num_rows)
        if tokens == 1:
            row = VectorSpec(
                name=name,
                lanes=self.lanes,
                format=matrix.format,
                num_rows=matrix.num_rows,
                num_cols=matrix.num_cols,
                block_rows=block_rows,
                block_stride=block_stride,
            )
            return run_kernel(vector_kernel(choose(row)), [out], [*matrix.planes, x])[0]
        assert self.mma is not None
        rows = MatrixSpec(
            name=name,
            lanes=spec.lanes,
            mma=self.mma,
            format=matrix.format,
            num_tokens=tokens,
            num_rows=matrix.num_rows,
            num_cols=matrix.num_cols,
            block_rows=block_rows,
            block_stride=block_stride,
        )
        return run_kernel(matrix_kernel(choose(rows)), [out], [*matrix.planes, x])[0]

    def take_rows(self, x: Tensor, step: Step, num_cols: int, num_rows: int | None = None) -> Tensor:
        return super().take_rows(self.whole(x), step, num_cols, num_rows)

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        return [self.whole(x)]

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        return self.whole(logits)

    def whole(self, x: Tensor) -> Tensor:
        """x as an ordinary tensor: computed now if it is lazy."""
        if not isinstance(x, Pending) or x.is_written:
            return x
        out = [Tensor(x.uop)]
        if isinstance(x, Embedded):
            spec, table = x.spec, x.table
            shape = (x.num_tokens, table.used_rows, table.num_cols)
            fn = embed_kernel(spec.format, *shape, spec.token_offset, spec.is_fed, spec.scale)
            out = run_kernel(fn, out, x.sources)
        elif isinstance(x, Summed):
            added = x.spec(self._lanes_between(x.num_tokens), x.numel() // x.num_tokens, None)
            out = run_kernel(sum_kernel(added), out, x.operands)
        elif isinstance(x, Halves):
            halves = self._in_rows(x)
            halves = halves.bitcast(dtypes.bfloat16) if x.has_bits else halves
            out = [halves]
            if halves.dtype != self.float:
                out = [(halves.cast(self.float) * (1.0 / x.factor)).contiguous()]
        elif isinstance(x, Split):
            out = run_kernel(combine_kernel(x.split), out, [x.values, x.sums, x.inputs])
        return self._written(x, out[0])

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _in_rows(self, x: Halves) -> Tensor:
        """Its values in float16, times their factor, in the order of (T, K)."""
        if not x.is_ordered:
            return x.halves
        size = int(x.numel())
        fn = order_rows_kernel(self._lanes_between(x.num_tokens), x.num_tokens, size // x.num_tokens, True)
        return run_kernel(fn, [empty(size, dtypes.half, self.device.name)], [x.halves])[0]

    def _half_unit(self) -> Mma | None:
        """The matrix unit in which products of several rows with quantized weights compute in a bfloat16 model, if it
        is another one: float16's, because quantized weights become float16 in half the instructions."""
        half = self._mma(dtypes.half)
        return half if self.dtype == "bfloat16" else None

    def _unit(self, matrices: Sequence[Matrix]) -> Mma | None:
        """The matrix unit of products of several rows with these, if x is in float16's range."""
        half = self._half_unit()
        return half if half is not None and all(matrix.format.is_quantized for matrix in matrices) else self.mma

    def _rows_of(self, mma: Mma) -> DType:
        """In which dtype a matrix unit's products read rows."""
        return dtypes.half if mma.dtype == dtypes.half else self.float

    def _lanes(self, num_tokens: int, most: int = 0) -> Lanes:
        """The lanes for a step's kernels: chained only in small steps, where waiting costs more than computing. `most`:
        rows up to which these kernels are chained in any case."""
        if num_tokens > max(most, MAX_CHAINED_QUANTIZED if self.has_quantized else MAX_CHAINED_TOKENS):
            return replace(self.lanes, is_chained=False)
        return self.lanes

    def _lanes_between(self, num_tokens: int) -> Lanes:
        """The lanes for the kernels between products."""
        return self._lanes(num_tokens, MAX_CHAINED_STREAMS if self.has_wgmma and not self.has_quantized else 0)

    def _floats(self, size: int) -> Tensor:
        return empty(size, F32, self.device.name)

    def _uncovered_product(self, matrices: Sequence[Matrix], num_tokens: int, epilogue: Epilogue) -> str:
        """Why the fused kernels do not cover the product, in words; "" if they do."""
        is_gated = epilogue.activation is not None
        if is_gated and (rest := epilogue.uncovered() or ("a residual" if epilogue.residual is not None else "")):
            return f"{rest} after an activation"
        if unread := [matrix.format.name for matrix in matrices if not covers(matrix.format)]:
            return f"weights in {unread[0]}"
        if num_tokens == 1:
            return ""
        if self.mma is None:
            return f"several rows, and no matrix unit for {self.dtype}"
        odd = [m.num_rows for m in matrices if not fits_matrix_unit(self.mma, m.num_rows, is_gated=is_gated)]
        return f"{odd[0]} rows of a matrix, which do not fill the matrix unit's tiles" if odd else ""

    def _one_row(self, name: str, x: Tensor, matrix: Matrix, norm: Norm | None, epilogue: Epilogue) -> Tensor:
        """One row's product and its epilogue. A norm after the product is left to the next operation."""
        has_few_groups = matrix.num_rows <= MOST_ROWS_WITH_SUM * matrix.num_cols or self._streams_row(matrix)
        is_sum = isinstance(x, Summed) and x.is_normed_sum and has_few_groups
        is_normed = norm is not None
        if isinstance(x, Summed) and not x.is_written and norm is not None and not is_sum:
            x, norm = self._normed_rows(x, norm, 1), None
        elif not is_sum and not isinstance(x, Split):
            x = self.whole(x)
        product = epilogue if epilogue.post_norm is None and epilogue.out_scale is None else PLAIN
        is_float = product.residual is None and product.activation is None
        out_dtype = F32 if is_float else self.float
        result = self._vector(name, x, matrix, out_dtype, norm, product, is_normed=is_normed)
        return result if product is epilogue else self._pending_sum(result, 1, 1, epilogue)

    def _expert_types(self, layer: ExpertLayer, norm: Norm | None) -> tuple[Mma | None, DType]:
        """(the matrix unit of several rows' experts, the dtype of their input and of what they pass on): float16 also
        in a bfloat16 model if x is normed, because quantized weights become float16 in half the instructions."""
        is_packed = layer.gate_up.format.is_quantized and layer.down.format.is_quantized
        half = self._half_unit()
        if norm is not None and is_packed and half is not None:
            return half, dtypes.half
        return self.mma, self.float

    def _experts_of_one(
        self, x: Tensor, routing: Routing, layer: ExpertLayer, norm: Norm | None, epilogue: Epilogue
    ) -> Tensor:
        """One row's experts. A norm after them, and what follows it, is left to the next operation."""
        is_float = self.dtype == "float32"
        row = OneRow(self.lanes, None if is_float else self._mma(dtypes.half), layer, routing)
        may_exceed = self.dtype == "bfloat16"  # float16's range
        states = row.gate_up(self.whole(x), norm, self.float, rescales_input=may_exceed and norm is None)
        if epilogue.uncovered():
            result = row.down(states, None, F32, rescales_input=may_exceed)
            return self._pending_sum(result, 1, 1, epilogue)
        return row.down(states, epilogue.residual, self.float, rescales_input=may_exceed)

    def _vector(
        self,
        name: str,
        x: Tensor,
        matrix: Matrix,
        dtype: DType,
        norm: Norm | None,
        epilogue: Epilogue,
        *,
        is_normed: bool,
    ) -> Tensor:
        """One row's product. `is_normed`: x is the result of a norm, or will be."""
        source, normed_sum = self._row_source(x)
        fields: dict[str, Any] = dict(
            name=name,
            lanes=self.lanes,
            format=matrix.format,
            num_rows=matrix.num_rows,
            num_cols=matrix.num_cols,
            norm_eps=norm.eps if norm is not None else None,
            activation=epilogue.activation,
            has_bias=epilogue.bias is not None,
            scale=epilogue.scale,
            has_residual=epilogue.residual is not None,
            softcap=epilogue.softcap,
            split=x.split if isinstance(x, Split) else None,
            sum=normed_sum,
        )
        rest = (None if norm is None else norm.weight, epilogue.bias, epilogue.residual)
        read = [*matrix.planes, *source, *[self.whole(tensor) for tensor in rest if tensor is not None]]
        spec = self._row_spec(matrix, fields, is_normed=is_normed)
        if isinstance(spec, StreamedFloatSpec):
            fn = streamed_float_kernel(spec)
        elif isinstance(spec, StreamedVectorSpec):
            fn = streamed_vector_kernel(spec)
        else:
            fn = vector_kernel(spec) if isinstance(spec, VectorSpec) else quantized_vector_kernel(spec)
        outs = [empty(spec.out_rows, dtype, self.device.name)]
        if normed_sum is None or not isinstance(x, Summed):
            return run_kernel(fn, outs, read)[0]
        out, value = run_kernel(fn, [*outs, self._empty(matrix.num_cols)], read)
        self._written(x, value)
        return out

    def _row_spec(self, matrix: Matrix, fields: dict[str, Any], *, is_normed: bool) -> VectorSpec | QuantizedVectorSpec:
        """The spec of one row's product. The kernel for quantized matrices converts x to float16, which is too coarse
        for float32 models; in bfloat16 models, x may exceed float16's range unless it is normed."""
        half = self._mma(dtypes.half)
        if matrix.format.is_quantized and half is not None and self.dtype != "float32":
            packing: dict[str, Any] = dict(mma=half, rescales_input=self.dtype == "bfloat16" and not is_normed)
            kind = StreamedFloatSpec if matrix.format.is_float8 else StreamedVectorSpec
            streamed = kind(planes=plane_sizes(matrix), **packing, **fields)
            if self._streams_row(matrix) and streamed.is_possible():
                return choose(streamed)
            packed = QuantizedVectorSpec(**packing, **fields)
            if fits_quantized_vector(packed):
                return choose(packed)
        return choose(VectorSpec(**fields))

    @staticmethod
    def _row_source(x: Tensor) -> tuple[list[Tensor], NormedSum | None]:
        """(what one row's product reads as x, the sum that x is if it is not written yet)."""
        if isinstance(x, Split):
            return [x.values, x.sums, x.inputs], None
        if not isinstance(x, Summed) or x.is_written:
            return [x], None
        norm, residual = x.epilogue.post_norm, x.epilogue.residual
        assert norm is not None and residual is not None
        out_scale = [] if x.epilogue.out_scale is None else [x.epilogue.out_scale]
        return [x.partials, residual, norm.weight, *out_scale], NormedSum(norm.eps, x.epilogue.scale, bool(out_scale))

    def _many_rows(
        self, name: str, x: Tensor, matrix: Matrix, num_tokens: int, epilogue: Epilogue, mma: Mma | None = None
    ) -> Tensor:
        """The product of several rows. Its epilogue is left to `sum_kernel`, unless it is an activation. `mma`: instead
        of the backend's."""
        mma = mma or self.mma
        assert mma is not None
        held = self._readable(x, matrix, num_tokens, mma)
        passed, factor = self._passed_on(epilogue.activation, matrix, num_tokens, mma), 1.0
        x_dtype = x.dtype if held is None else dtypes.half
        spec = self._matrix_spec(name, mma, matrix, num_tokens, passed.activation, x_dtype)
        if isinstance(spec, QuantizedWgmmaSpec):
            return self._ordered_product(spec, x, matrix, epilogue, passed)
        if held is not None and self.float != dtypes.half:
            x, factor = self._in_rows(held), held.factor
        x = self.whole(x)
        if isinstance(spec, StreamSpec) and x.dtype != dtypes.half:
            x = round_rows(x, num_tokens, matrix.num_cols)
        elif isinstance(spec, MatrixSpec) and mma == self.mma and self._takes_words([matrix], num_tokens):
            if x.dtype != dtypes.half and num_tokens >= ROUND_TOKENS:
                x = round_rows(x, num_tokens, matrix.num_cols)
            spec = replace(spec, has_words=x.dtype == dtypes.half)
        if epilogue.activation is not None:
            out = empty(num_tokens * spec.out_rows, passed.dtype, self.device.name)
            rows = self._multiply(spec, out, matrix, x)
            return self._held(rows, num_tokens, passed.factor, has_bits=passed.has_bits)
        size = num_tokens * spec.num_rows
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
            is_added = spec.splits == 1 and not epilogue.uncovered() and factor == 1.0
            if isinstance(spec, GemmSpec | StreamSpec) and is_added:
                return self._multiply(spec, self._empty(size), matrix, x, epilogue.residual)
        partials = self._multiply(spec, self._floats(spec.splits * size), matrix, x)
        return self._summed(partials, spec.splits, num_tokens, epilogue, factor)

    def _readable(self, x: Tensor, matrix: Matrix, num_tokens: int, mma: Mma) -> Halves | None:
        """x, if it is held as the product of several rows reads it."""
        if not isinstance(x, Halves) or x.is_written:
            return None
        if x.has_bits:
            return x if mma == self.mma and self._takes_bits(matrix, num_tokens) else None
        return x if mma.dtype == dtypes.half else None

    def _passed_on(self, activation: str | None, matrix: Matrix, num_tokens: int, mma: Mma) -> _Passed:
        """How the results of an activation are passed on. What may exceed float16's range in a bfloat16 model is
        scaled; bfloat16 is for a product that takes its bits, back to as many columns as x has."""
        if activation is None:
            return _Passed(None, self.float)
        if mma != self.mma:
            factor = HALF_FACTORS.get(activation, HALF_FACTOR)
            return _Passed(scaled(activation, factor), dtypes.half, factor)
        back = replace(matrix, num_rows=matrix.num_cols, num_cols=matrix.num_rows // 2)
        if self._takes_bits(back, num_tokens):
            return _Passed(rounded(activation), dtypes.half, has_bits=True)
        return _Passed(activation, self.float)

    def _summed(
        self, partials: Tensor, num_partials: int, num_tokens: int, epilogue: Epilogue, factor: float
    ) -> Tensor:
        """Partial products, or their lazy sum if something is left to do. `factor`: of x, and so of them."""
        if num_partials == 1 and epilogue.is_plain and factor == 1.0:
            return partials
        result = self._pending_sum(partials, num_partials, num_tokens, epilogue)
        result.factor = factor
        return result

    def _ordered_product(
        self, spec: QuantizedWgmmaSpec, x: Tensor, matrix: Matrix, epilogue: Epilogue, passed: _Passed
    ) -> Tensor:
        """As `_many_rows`, of rows in the order of token_order.py. Hidden values stay in it if `down` takes them so."""
        tokens, rows = spec.num_tokens, spec.all_tokens
        held = self._readable(x, matrix, tokens, spec.mma)
        if held is not None and held.is_ordered:
            ordered = held.halves
        else:
            source = self.whole(x) if held is None else held.halves
            order = order_rows_kernel(spec.lanes, tokens, spec.num_cols, False)
            out = empty(rows * spec.num_cols, dtypes.half, self.device.name)
            (ordered,) = run_kernel(order, [out], [source])
        spec = replace(spec, orders_result=spec.is_gated and spec.next_takes_order)
        fn, read = quantized_wgmma_kernel(spec), [*matrix.planes, ordered]
        if spec.is_gated:
            size = (rows if spec.orders_result else tokens) * spec.out_rows
            (out,) = run_kernel(fn, [empty(size, passed.dtype, self.device.name)], read)
            return self._held(out, tokens, passed.factor, is_ordered=spec.orders_result)
        (partials,) = run_kernel(fn, [self._floats(spec.splits * tokens * spec.num_rows)], read)
        return self._summed(partials, spec.splits, tokens, epilogue, 1.0 if held is None else held.factor)

    def _takes_order(
        self, name: str, matrices: Sequence[Matrix], num_tokens: int, epilogue: Epilogue, mma: Mma
    ) -> bool:
        """Whether the products of several rows all take x in the order of token_order.py."""
        own = (num_tokens, epilogue.activation, self._rows_of(mma))
        specs = [self._matrix_spec(name, mma, matrix, *own) for matrix in matrices]
        return all(isinstance(spec, QuantizedWgmmaSpec) for spec in specs)

    def _multiply(
        self, spec: ProductSpec, out: Tensor, matrix: Matrix, x: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """The product of several rows, written to `out`; `residual`: what it is added to."""
        if isinstance(spec, GemmSpec):
            return multiply_rows(spec, out, matrix.planes, x, residual)
        if isinstance(spec, MatrixSpec):
            return run_kernel(matrix_kernel(spec), [out], [*matrix.planes, x])[0]
        if isinstance(spec, StreamedMatrixSpec):
            return run_kernel(streamed_matrix_kernel(spec), [out], [*matrix.planes, x])[0]
        if isinstance(spec, ClusteredMatrixSpec):
            assert matrix.maps is not None
            return run_kernel(clustered_matrix_kernel(spec), [out], [matrix.maps, *matrix.planes, x])[0]
        self.maps.append(self.maps.pop(0))
        rest = [] if residual is None else [residual]
        spec = replace(spec, adds_residual=residual is not None)
        fn = code_stream_kernel(spec) if isinstance(spec, CodeStreamSpec) else stream_kernel(spec)
        return run_kernel(fn, [out, self.maps[0]], [*matrix.planes, x, *rest])[0]

    def _takes_words(self, matrices: Sequence[Matrix], num_tokens: int) -> bool:
        """Whether the products of several rows take x as bfloat16 in a float16 buffer (which is loaded in vectors)."""
        if self.mma is None or self.mma.dtype != dtypes.bfloat16:
            return False
        if self.mma.kind == "METAL":
            return takes_tiles(self.mma, num_tokens)
        are_words = [matrix.format.name == "bfloat16" for matrix in matrices]
        if num_tokens < MIN_TOKENS and all(are_words):
            return True
        if not all(is_word or reads_codes(m.format) for is_word, m in zip(are_words, matrices, strict=True)):
            return False
        specs = [self._matrix_spec("", self.mma, matrix, num_tokens, None, dtypes.half) for matrix in matrices]
        return all(isinstance(spec, StreamSpec) or (isinstance(spec, GemmSpec) and spec.uses_wgmma) for spec in specs)

    def _takes_bits(self, matrix: Matrix, num_tokens: int) -> bool:
        """The same of what attention or a gate writes: METAL's write numbers."""
        return self.lanes.kind == "CUDA" and self._takes_words([matrix], num_tokens)

    def _pending_sum(self, partials: Tensor, num_partials: int, num_tokens: int, epilogue: Epilogue) -> Summed:
        """The lazy sum of partial products: in float32 if it is qkv or logits, which nothing is added to, otherwise in
        the activations' dtype."""
        size = partials.numel() // num_partials
        in_floats = epilogue.residual is None and epilogue.post_norm is None
        result = Summed((self._floats(size) if in_floats else self._empty(size)).uop)
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
        result.partials, result.num_partials = partials, num_partials
        result.num_tokens, result.epilogue = num_tokens, epilogue
        return result

    def _matrix_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None, x_dtype: DType
    ) -> ProductSpec | QuantizedWgmmaSpec:
        """`x_dtype`: of the rows, which in a bfloat16 model are rounded first if there are many."""
        size = (num_tokens, matrix.num_rows, matrix.num_cols)
        if stream := self._stream_spec(name, mma, matrix, num_tokens, activation, x_dtype):
            return stream
        if unpacked := self._unpacked_spec(name, mma, matrix, num_tokens, activation, x_dtype):
            return unpacked
        if takes_tiles(mma, num_tokens):
            shape = (num_tokens, matrix.num_rows, matrix.num_cols, activation, self.has_wgmma)
            return choose(GemmSpec(name, mma, matrix.format, self._rows_of(mma), *shape))
        if few := self._few_spec(name, mma, matrix, num_tokens, activation, x_dtype):
            return few
        return choose(MatrixSpec(name, self._lanes(num_tokens), mma, matrix.format, *size, activation))

    def _few_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None, x_dtype: DType
    ) -> ClusteredMatrixSpec | StreamedMatrixSpec | None:
        """The spec of a kernel that streams codes through threadgroup memory past a few tokens (Hopper); None if
        another one is faster."""
        if not self.has_wgmma or x_dtype != dtypes.half or num_tokens > STREAMED_TOKENS:
            return None
        shared = (name, self._lanes(num_tokens), mma, matrix, num_tokens, activation)
        clustered, streamed = ClusteredMatrixSpec.of(*shared), StreamedMatrixSpec.of(*shared)
        if matrix.maps is not None and clustered.is_wanted and clustered.is_possible():
            return choose(clustered)
        is_worth = is_worth_streaming(matrix.format, matrix.num_rows, matrix.num_cols)
        return choose(streamed) if is_worth and streamed.is_possible() else None

    def _unpacked_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None, x_dtype: DType
    ) -> QuantizedWgmmaSpec | None:
        """The spec of the kernel that unpacks codes into the matrix unit's registers (Hopper), if it is one for it."""
        if not self.has_wgmma or x_dtype != dtypes.half or not reads_runs(matrix.format):
            return None
        lanes = self._lanes(num_tokens, MAX_CHAINED_STREAMS)
        spec = QuantizedWgmmaSpec.of(name, lanes, mma, matrix, num_tokens, activation)
        return choose(spec) if spec.is_wanted and spec.is_possible() else None

    def _stream_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None, x_dtype: DType
    ) -> StreamSpec | None:
        """The spec of the kernel that streams the weights past all tokens (Hopper); None if another one is faster."""
        lanes = self._lanes(num_tokens, MAX_CHAINED_STREAMS)
        shape = (name, lanes, mma, num_tokens, matrix.num_rows, matrix.num_cols, activation)
        spec: StreamSpec | None = None
        is_rounded = mma.dtype == dtypes.bfloat16
        if reads_codes(matrix.format) and (x_dtype == dtypes.half or is_rounded):
            spec = CodeStreamSpec(*shape, format=matrix.format)
        elif matrix.format.name == DENSE_NAMES[mma.dtype]:
            is_rounded &= num_tokens >= ROUND_TOKENS
            spec = StreamSpec(*shape) if x_dtype == dtypes.half or is_rounded else None
        if spec is None or not self.has_wgmma or not spec.is_wanted:
            return None
        spec = choose(spec)
        return spec if spec.is_possible() else None

    def _streams_row(self, matrix: Matrix) -> bool:
        """Whether a product of one row streams the matrix through threadgroup memory, if it can."""
        return self.has_wgmma and is_worth_streaming_row(matrix.format, matrix.num_rows, matrix.num_cols)

    def _as_partials(self, products: Sequence[Tensor]) -> tuple[tuple[int, ...], list[Tensor]]:
        """(the number of partial products of each, the partial products), for kernels that add them up, and compute no
        epilogue. A product that has an epilogue is computed first, and counts as one."""
        is_bare = [
            isinstance(x, Summed) and not x.is_written and x.epilogue.is_plain and x.factor == 1.0 for x in products
        ]
        sums = [x if bare else None for x, bare in zip(products, is_bare, strict=True)]
        counts = tuple(1 if lazy is None else lazy.num_partials for lazy in sums)
        return counts, [
            self.whole(x) if lazy is None else lazy.partials for x, lazy in zip(products, sums, strict=True)
        ]

    def _written(self, x: Pending, value: Tensor) -> Tensor:
        """x, whose values a kernel has written to `value`."""
        x.replace(value)
        x.is_written = True
        return x

    def _normed_rows(
        self,
        x: Tensor,
        norm: Norm,
        num_tokens: int,
        dtype: DType | None = None,
        *,
        rounds_to_bfloat: bool = False,
        orders: bool = False,
    ) -> Tensor:
        """RMSNorm of rows, in the activations' dtype unless another one is given, or as bfloat16 in a float16 buffer;
        or in the order of token_order.py. If x is a lazy sum or lazy rows of a table, the same kernel computes and
        writes it."""
        cols, weight = norm.weight.shape[0], norm.weight
        rows = token_cols(num_tokens) if orders else num_tokens
        normed = empty(rows * cols, dtype or self.float, self.device.name)
        lanes, outs = self._lanes_between(num_tokens), [self._empty(num_tokens * cols), normed]
        given = SumSpec(
            lanes=lanes, num_tokens=num_tokens, num_cols=cols, num_partials=0, has_residual=False, norm_eps=norm.eps
        )
        given = replace(given, rounds_norm=rounds_to_bfloat, orders_norm=orders)
        if isinstance(x, Embedded) and not x.is_written:
            value, normed = run_kernel(sum_kernel(replace(given, embed=x.spec)), outs, [*x.sources, weight])
        elif isinstance(x, Summed) and not x.is_written:
            spec = replace(x.spec(lanes, cols, norm.eps), rounds_norm=rounds_to_bfloat, orders_norm=orders)
            value, normed = run_kernel(sum_kernel(spec), outs, [*x.operands, weight])
        else:
            (normed,) = run_kernel(sum_kernel(given), [normed], [x, weight])
            return self._held(normed, num_tokens, is_ordered=True) if orders else normed
        self._written(x, value)
        return self._held(normed, num_tokens, is_ordered=True) if orders else normed
