"""The backend of CUDA and METAL: fused kernels, five a layer for one token row and seven for more.

What one operation leaves to be done, the next does on the way: a product's partial sums are added where they are
normalised or attended to, and the parts of a split context where they are projected. So some tensors that operations
return are not written yet (`Pending`): who knows them reads what they are made of, and for the others they are written
(`FusedGpuBackend.whole`). What a shape does not fit goes the general way of gpu.py, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import HostMatrix
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.backend import AttentionShape, KVPool, Norm, head_tables
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.formats.runs import covers
from tinyvllm.ops.gpu.attention_decode import GROUPS_WANTED, DecodeSpec, decode_kernel, fits_decode
from tinyvllm.ops.gpu.attention_prefill import PrefillSpec, attend_tiles, fits_prefill
from tinyvllm.ops.gpu.attention_split import SplitHeads, combine_kernel
from tinyvllm.ops.gpu.backend import GpuBackend, embed_kernel
from tinyvllm.ops.gpu.gemm import MIN_TOKENS, GemmSpec, multiply_rows
from tinyvllm.ops.gpu.linear import (
    RUN_COLS,
    EmbedSpec,
    MatrixSpec,
    SumSpec,
    VectorSpec,
    fits_matrix_unit,
    matrix_kernel,
    sum_kernel,
    vector_kernel,
)
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, fits_quantized_vector, quantized_vector_kernel
from tinyvllm.ops.kernel.body import F32, empty, run_kernel
from tinyvllm.ops.kernel.hopper import allows_wgmma
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import choose
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)

# measured on an H200: 5 % at 8 rows, a loss of 2 % at 64; of quantised weights 10 % at 32
MAX_CHAINED_TOKENS, MAX_CHAINED_QUANTIZED = 16, 32


class Pending(Tensor):
    """A tensor that nobody has written yet."""

    is_written = False


class Summed(Pending):
    """residual + the sum of `num_parts` tensors of `num_tokens` rows side by side in `parts`."""

    parts: Tensor
    num_parts: int
    num_tokens: int
    residual: Tensor | None


class Embedded(Pending):
    """Rows of an embedding table, which the first norm reads. `sources`: the step's inputs, and the table's planes."""

    spec: EmbedSpec
    table: Matrix
    layout: StepLayout
    sources: list[Tensor]


class Split(Pending):
    """One row's attention, whose context was shared out: see gpu_split."""

    values: Tensor
    sums: Tensor
    inputs: Tensor
    split: SplitHeads


def multiply(spec: MatrixSpec | GemmSpec, out: Tensor, matrix: Matrix, x: Tensor) -> Tensor:
    """The product of several rows, in `out`."""
    if isinstance(spec, GemmSpec):
        return multiply_rows(spec, out, matrix.planes, x)
    return run_kernel(matrix_kernel(spec), [out], [*matrix.planes, x])[0]


class FusedGpuBackend(GpuBackend):
    """Activations are float16, or float32 where the weights are wider than float16 or have its exponents."""

    def __init__(self, device: DeviceHandle, dtype: str, lanes: Lanes, *, dequantize: bool = False) -> None:
        super().__init__(device, dtype, dequantize=dequantize)
        self.lanes = lanes
        self.float = dtypes.half if dtype == "float16" else dtypes.float
        self.mma = self._mma(FLOATS[dtype])
        self.has_wgmma = allows_wgmma(device.name)
        self.has_quantized = False  # among the matrices so far
        self.general_formats: tuple[str, ...] = ()  # of the matrices so far, those that no fused kernel reads
        self.arrivals = device.zeros(GROUPS_WANTED, dtypes.int)  # of threadgroups that share a context
        if self.mma is None:
            logger.warning("products of more than one row take the general kernels: no matrix unit for %s", dtype)

    def _mma(self, dtype: DType) -> Mma | None:
        usable = dtype != dtypes.float and dtype in self.lanes.matrix_dtypes
        return Mma(self.lanes.kind, dtype) if usable else None

    # -- weights and pool ---------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        matrix = super().matrix(host)
        fmt = matrix.format
        self.has_quantized |= fmt.is_quantized
        if not covers(fmt) and fmt.name not in self.general_formats:
            self.general_formats += (fmt.name,)
            logger.warning("products with weights in %s take the general kernels: no fused kernel reads them", fmt.name)
        return matrix

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        pool = super().make_pool(num_layers, num_blocks, block_size, shape, dtype)
        cols = ((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,)
        if self._decode_mma(dtype) is None or not fits_decode(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, block_size, cols
        ):
            logger.warning(
                "decoding takes the general attention kernels: %d over %d heads of %d, blocks of %d tokens in %s",
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                block_size,
                dtype,
            )
        return pool

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 unless told, or float32 with activations wanted so: bfloat16 cannot be read in vectors."""
        if wanted != "auto":
            return wanted
        return "float32" if self.dtype == "float32" else "float16"

    def _decode_mma(self, dtype: str) -> Mma | None:
        return self._mma(dtypes.half) if dtype == "float16" else None

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout, newest: Tensor | None = None) -> Tensor:
        if layout.num_tokens == 1 or table.num_cols % RUN_COLS:
            return super().embed(table, inputs, layout, newest)
        result = Embedded(self._empty(layout.num_tokens * table.num_cols).uop)
        result.spec = EmbedSpec(table.format, table.used_rows, layout.offset("token_ids"), newest is not None)
        result.table, result.layout = table, layout
        result.sources = [inputs, *([] if newest is None else [newest]), *table.planes]
        return result

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        if not all(self._is_fused(matrix, num_tokens) for matrix in matrices):
            return super().norm_linear(name, self.whole(x), norm, matrices, num_tokens)
        if num_tokens == 1:
            return [self._vector(name, x, matrix, F32, norm=norm) for matrix in matrices]
        normed = self._normed_rows(x, norm, num_tokens)
        return [self._summed(self._matrix_spec(name, m, num_tokens), m, normed) for m in matrices]

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        if not self._is_fused(matrix, num_tokens, is_gated=True):
            return super().norm_gated(name, self.whole(x), norm, matrix, num_tokens)
        if num_tokens == 1:
            return self._vector(name, x, matrix, self.float, norm=norm, epilogue="silu")
        spec = self._matrix_spec(name, matrix, num_tokens, is_gated=True)
        normed = self._normed_rows(x, norm, num_tokens)
        return multiply(spec, self._empty(num_tokens * spec.out_rows), matrix, normed)

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        if not self._is_fused(matrix, num_tokens):
            return super().linear_add(name, self.whole(x), matrix, self.whole(residual), num_tokens)
        if num_tokens == 1:
            return self._vector(name, x, matrix, self.float, epilogue="residual", residual=residual)
        return self._summed(self._matrix_spec(name, matrix, num_tokens), matrix, x, self.whole(residual))

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
        heads, kv_heads, dim, cols = shape.num_heads, shape.num_kv_heads, shape.head_dim, tuple(widths)
        mma = self._decode_mma(pool.dtype)
        counts = tuple(part.num_parts if isinstance(part, Summed) else 1 for part in qkv)
        parts = [part.parts if isinstance(part, Summed) else part for part in qkv]
        tables, eps = head_tables(rope, head_norm)
        if not is_decode and mma is not None and fits_prefill(heads, kv_heads, dim, cols):
            tiled = PrefillSpec(layout, self.lanes, mma, heads, kv_heads, dim, pool.num_blocks, cols, counts, eps)
            rows = self._empty(layout.num_tokens * heads * dim)
            return attend_tiles(tiled, layer, rows, (pool.keys[layer], pool.values[layer]), inputs, tables, parts)
        if not is_decode or mma is None or not fits_decode(heads, kv_heads, dim, layout.block_size, cols):
            step = (inputs, rope, layout)
            qkv = [self.whole(part) for part in qkv]
            return super().attend(qkv, widths, shape, pool, layer, *step, is_decode=is_decode, head_norm=head_norm)
        lanes = self._lanes(layout.num_tokens)
        spec = DecodeSpec(layout, lanes, mma, heads, kv_heads, dim, pool.num_blocks, cols, counts, eps)
        written = [pool.keys[layer], pool.values[layer]]
        split = spec.split
        if split.num_parts == 1:
            out = self._empty(layout.num_tokens * split.num_cols)
            return run_kernel(decode_kernel(spec), [out, *written], [inputs, *tables, *parts])[0]
        rows = split.num_parts * layout.num_tokens
        outs = [self._floats(rows * split.num_cols), self._floats(rows * split.num_heads)]
        if spec.is_joined:
            outs = [self._empty(layout.num_tokens * split.num_cols), *outs, self.arrivals]
            return run_kernel(decode_kernel(spec), [*outs, *written], [inputs, *tables, *parts])[0]
        values, sums, *_ = run_kernel(decode_kernel(spec), [*outs, *written], [inputs, *tables, *parts])
        result = Split(self._empty(split.num_cols).uop)
        result.values, result.sums, result.inputs, result.split = values, sums, inputs, split
        return result

    def take_rows(self, x: Tensor, inputs: Tensor, layout: StepLayout, num_cols: int) -> Tensor:
        return super().take_rows(self.whole(x), inputs, layout, num_cols)

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        return [self.whole(x)]

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        return self.whole(logits)

    def whole(self, x: Tensor) -> Tensor:
        """x, written if it was not."""
        if not isinstance(x, Pending) or x.is_written:
            return x
        out = [Tensor(x.uop)]
        if isinstance(x, Embedded):
            spec, table = x.spec, x.table
            shape = (x.layout.num_tokens, table.used_rows, table.num_cols)
            out = run_kernel(embed_kernel(spec.format, *shape, spec.token_offset, spec.is_fed), out, x.sources)
        elif isinstance(x, Summed):
            cols = x.numel() // x.num_tokens
            add = SumSpec(self._lanes(x.num_tokens), x.num_tokens, cols, x.num_parts, x.residual is not None, None)
            out = run_kernel(sum_kernel(add), out, [x.parts] if x.residual is None else [x.parts, x.residual])
        elif isinstance(x, Split):
            out = run_kernel(combine_kernel(x.split), out, [x.values, x.sums, x.inputs])
        return self._written(x, out[0])

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _lanes(self, num_tokens: int) -> Lanes:
        """The lanes of kernels that are worth chaining: not those of steps that compute more than they wait."""
        if num_tokens > (MAX_CHAINED_QUANTIZED if self.has_quantized else MAX_CHAINED_TOKENS):
            return replace(self.lanes, is_chained=False)
        return self.lanes

    def _floats(self, size: int) -> Tensor:
        return empty(size, F32, self.device.name)

    def _vector(
        self,
        name: str,
        x: Tensor,
        matrix: Matrix,
        dtype: DType,
        *,
        norm: Norm | None = None,
        epilogue: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """One row's product."""
        split = x.split if isinstance(x, Split) else None
        eps = norm.eps if norm is not None else None
        shape = (matrix.format, matrix.num_rows, matrix.num_cols, eps, epilogue, split)
        spec: VectorSpec | QuantizedVectorSpec = VectorSpec(name, self.lanes, *shape)
        fn = vector_kernel(spec)
        # its activations pass through float16, whose range another dtype was chosen to exceed
        if matrix.format.is_quantized and self.mma is not None and self.float == self.mma.dtype == dtypes.half:
            packed = QuantizedVectorSpec(name, self.lanes, self.mma, *shape)
            if fits_quantized_vector(packed):
                packed = choose(packed)
                spec, fn = packed, quantized_vector_kernel(packed)
        source = [x.values, x.sums, x.inputs] if isinstance(x, Split) else [x]
        weight = [norm.weight] if norm is not None else []
        rest = [residual] if residual is not None else []
        out = empty(spec.out_rows, dtype, self.device.name)
        return run_kernel(fn, [out], [*matrix.planes, *source, *weight, *rest])[0]

    def _is_fused(self, matrix: Matrix, num_tokens: int, *, is_gated: bool = False) -> bool:
        """Whether fused kernels multiply so many rows: they read the format, and have a matrix unit for several."""
        if not covers(matrix.format):
            return False
        return num_tokens == 1 or (
            self.mma is not None and fits_matrix_unit(self.mma, matrix.num_rows, is_gated=is_gated)
        )

    def _matrix_spec(
        self, name: str, matrix: Matrix, num_tokens: int, *, is_gated: bool = False
    ) -> MatrixSpec | GemmSpec:
        mma = self.mma
        assert mma is not None, "_is_fused said so"
        if num_tokens >= MIN_TOKENS:
            shape = (num_tokens, matrix.num_rows, matrix.num_cols, is_gated, self.has_wgmma)
            return choose(GemmSpec(name, mma, matrix.format, self.float, *shape))
        lanes = self._lanes(num_tokens)
        size = (num_tokens, matrix.num_rows, matrix.num_cols)
        return choose(MatrixSpec(name, lanes, mma, matrix.format, *size, is_gated))

    def _summed(self, spec: MatrixSpec | GemmSpec, matrix: Matrix, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """A product of many rows, and the residual where there is one."""
        size = spec.num_tokens * spec.num_rows
        if isinstance(spec, GemmSpec) and residual is not None and spec.splits == 1:
            return multiply_rows(spec, self._empty(size), matrix.planes, x, residual)
        parts = multiply(spec, self._floats(spec.splits * size), matrix, x)
        if spec.splits == 1 and residual is None:
            return parts
        result = Summed((self._floats(size) if residual is None else self._empty(size)).uop)
        result.parts, result.num_parts, result.num_tokens = parts, spec.splits, spec.num_tokens
        result.residual = residual
        return result

    def _written(self, x: Pending, value: Tensor) -> Tensor:
        """x, of which `value` is what it was written as."""
        x.replace(value)
        x.is_written = True
        return x

    def _normed_rows(self, x: Tensor, norm: Norm, num_tokens: int) -> Tensor:
        """RMSNorm of rows. Where x is still a sum, or rows of a table, it is computed here, and x is then its value."""
        cols, weight = norm.weight.shape[0], norm.weight
        normed = self._empty(num_tokens * cols)
        lanes, outs = self._lanes(num_tokens), [self._empty(num_tokens * cols), normed]
        if isinstance(x, Embedded) and not x.is_written:
            spec = SumSpec(lanes, num_tokens, cols, 0, False, norm.eps, x.spec)
            value, normed = run_kernel(sum_kernel(spec), outs, [*x.sources, weight])
        elif isinstance(x, Summed) and not x.is_written:
            spec = SumSpec(lanes, num_tokens, cols, x.num_parts, x.residual is not None, norm.eps)
            rest = [] if x.residual is None else [x.residual]
            value, normed = run_kernel(sum_kernel(spec), outs, [x.parts, *rest, weight])
        else:
            spec = SumSpec(lanes, num_tokens, cols, 0, False, norm.eps)
            return run_kernel(sum_kernel(spec), [normed], [x, weight])[0]
        self._written(x, value)
        return normed
