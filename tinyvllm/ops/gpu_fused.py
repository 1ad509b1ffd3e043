"""The backend of CUDA and METAL: fused kernels, five a layer for one token row and seven for more.

What one operation leaves to be done, the next does on the way: a product's partial sums are added where they are
normalised or attended to, and the parts of a split context where they are projected. So some tensors that operations
return are more than their value (`Summed`, `Split`): who knows them reads their parts, and the value is never computed.
What a shape does not fit goes the general way of gpu.py, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.ops.backend import AttentionShape, KVPool, Norm
from tinyvllm.ops.device import FLOATS, DeviceHandle
from tinyvllm.ops.gpu import GpuBackend
from tinyvllm.ops.gpu_decode import DecodeSpec, decode_kernel, fits_decode
from tinyvllm.ops.gpu_gemm import MIN_TOKENS, GemmSpec, multiply_rows
from tinyvllm.ops.gpu_gemm_hopper import allow_wide
from tinyvllm.ops.gpu_kernel import Lanes, Mma
from tinyvllm.ops.gpu_linear import (
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
from tinyvllm.ops.gpu_prefill import PrefillSpec, attend_tiles, fits_prefill
from tinyvllm.ops.gpu_split import SplitHeads, combine_kernel
from tinyvllm.ops.gpu_vector import QuantizedVectorSpec, fits_quantized_vector, quantized_vector_kernel
from tinyvllm.ops.kernel import F32, empty, run_kernel
from tinyvllm.ops.matrix import Matrix
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.ops.tuning import choose

logger = logging.getLogger(__name__)

MAX_CHAINED_TOKENS = 16  # measured on an H200: 5 % at 8 rows, a loss of 2 % at 64


class Summed(Tensor):
    """residual + the sum of `num_parts` tensors side by side in `parts`."""

    parts: Tensor
    num_parts: int
    residual: Tensor | None


class Embedded(Tensor):
    """Rows of an embedding table, which the first norm reads. `sources`: the step's inputs, and the table's planes."""

    spec: EmbedSpec
    sources: list[Tensor]


class Split(Tensor):
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
        self.has_wide = allow_wide(device.name)
        if self.mma is None:
            logger.warning("products of more than one row take the general kernels: no matrix unit for %s", dtype)

    def _mma(self, dtype: DType) -> Mma | None:
        usable = dtype != dtypes.float and dtype in self.lanes.matrix_dtypes
        return Mma(self.lanes.kind, dtype) if usable else None

    # -- weights and pool ---------------------------------------------------------------------------------------------

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
        rows = super().embed(table, inputs, layout, newest)
        if layout.num_tokens == 1 or table.num_cols % RUN_COLS:
            return rows
        result = Embedded(rows.uop)
        result.spec = EmbedSpec(table.format, table.used_rows, layout.offset("token_ids"), newest is not None)
        result.sources = [inputs, *([] if newest is None else [newest]), *table.planes]
        return result

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        if num_tokens == 1:
            return [self._vector(name, x, matrix, F32, norm=norm) for matrix in matrices]
        mma = self.mma
        if mma is None or not all(fits_matrix_unit(mma, m.num_rows, is_gated=False) for m in matrices):
            return super().norm_linear(name, x, norm, matrices, num_tokens)
        normed = self._normed_rows(x, norm, num_tokens)
        return [self._summed(self._matrix_spec(name, mma, m, num_tokens), m, normed) for m in matrices]

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        if num_tokens == 1:
            return self._vector(name, x, matrix, self.float, norm=norm, epilogue="silu")
        if self.mma is None or not fits_matrix_unit(self.mma, matrix.num_rows, is_gated=True):
            return super().norm_gated(name, x, norm, matrix, num_tokens)
        spec = self._matrix_spec(name, self.mma, matrix, num_tokens, is_gated=True)
        normed = self._normed_rows(x, norm, num_tokens)
        return multiply(spec, self._empty(num_tokens * spec.out_rows), matrix, normed)

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        if num_tokens == 1:
            return self._vector(name, x, matrix, self.float, epilogue="residual", residual=residual)
        if self.mma is None or not fits_matrix_unit(self.mma, matrix.num_rows, is_gated=False):
            return super().linear_add(name, x, matrix, residual, num_tokens)
        return self._summed(self._matrix_spec(name, self.mma, matrix, num_tokens), matrix, x, residual)

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
        tables, eps = ([rope], None) if head_norm is None else ([rope, head_norm.weight], head_norm.eps)
        if not is_decode and mma is not None and fits_prefill(heads, kv_heads, dim, cols):
            tiled = PrefillSpec(layout, self.lanes, mma, heads, kv_heads, dim, pool.num_blocks, cols, counts, eps)
            rows = self._empty(layout.num_tokens * heads * dim)
            return attend_tiles(tiled, layer, rows, (pool.keys[layer], pool.values[layer]), inputs, tables, parts)
        if not is_decode or mma is None or not fits_decode(heads, kv_heads, dim, layout.block_size, cols):
            step = (inputs, rope, layout)
            return super().attend(qkv, widths, shape, pool, layer, *step, is_decode=is_decode, head_norm=head_norm)
        lanes = self._lanes(layout.num_tokens)
        spec = DecodeSpec(layout, lanes, mma, heads, kv_heads, dim, pool.num_blocks, cols, counts, eps)
        written = [pool.keys[layer], pool.values[layer]]
        split = spec.split
        if split.num_parts == 1:
            out = self._empty(layout.num_tokens * split.num_cols)
            return run_kernel(decode_kernel(spec), [out, *written], [inputs, *tables, *parts])[0]
        outs = [self._floats(split.num_parts * split.num_cols), self._floats(split.num_parts * split.num_heads)]
        values, sums, *_ = run_kernel(decode_kernel(spec), [*outs, *written], [inputs, *tables, *parts])
        whole = run_kernel(combine_kernel(split), [self._empty(split.num_cols)], [values, sums, inputs])[0]
        result = Split(whole.uop)
        result.values, result.sums, result.inputs, result.split = values, sums, inputs, split
        return result

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _lanes(self, num_tokens: int, *, is_packed: bool = False) -> Lanes:
        """The lanes of kernels that are worth chaining: not those that compute more than they wait."""
        if num_tokens > MAX_CHAINED_TOKENS or (is_packed and num_tokens > 1):
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

    def _matrix_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, *, is_gated: bool = False
    ) -> MatrixSpec | GemmSpec:
        if num_tokens >= MIN_TOKENS:
            shape = (num_tokens, matrix.num_rows, matrix.num_cols, is_gated, self.has_wide)
            return choose(GemmSpec(name, mma, matrix.format, self.float, *shape))
        lanes = self._lanes(num_tokens, is_packed=matrix.format.is_quantized)
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
        lanes = self._lanes(spec.num_tokens)
        add = SumSpec(lanes, spec.num_tokens, spec.num_rows, spec.splits, residual is not None, None)
        out = self._floats(size) if residual is None else self._empty(size)
        whole = run_kernel(sum_kernel(add), [out], [parts] if residual is None else [parts, residual])[0]
        result = Summed(whole.uop)
        result.parts, result.num_parts, result.residual = parts, spec.splits, residual
        return result

    def _normed_rows(self, x: Tensor, norm: Norm, num_tokens: int) -> Tensor:
        """RMSNorm of rows. Where x is still a sum, or rows of a table, it is computed here, and x is then its value."""
        cols, weight = norm.weight.shape[0], norm.weight
        normed = self._empty(num_tokens * cols)
        if isinstance(x, Embedded) and x.sources:
            spec = SumSpec(self._lanes(num_tokens), num_tokens, cols, 0, False, norm.eps, x.spec)
            outs = [self._empty(num_tokens * cols), normed]
            whole, normed = run_kernel(sum_kernel(spec), outs, [*x.sources, weight])
            x.replace(whole)
            x.sources = []
            return normed
        if not isinstance(x, Summed) or x.num_parts == 0:
            spec = SumSpec(self._lanes(num_tokens), num_tokens, cols, 0, False, norm.eps)
            return run_kernel(sum_kernel(spec), [normed], [x, weight])[0]
        spec = SumSpec(self._lanes(num_tokens), num_tokens, cols, x.num_parts, x.residual is not None, norm.eps)
        rest = [] if x.residual is None else [x.residual]
        outs = [self._empty(num_tokens * cols), normed]
        whole, normed = run_kernel(sum_kernel(spec), outs, [x.parts, *rest, weight])
        x.replace(whole)
        x.num_parts = 0
        return normed
