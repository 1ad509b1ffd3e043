"""The backend of CUDA and METAL: fused kernels, five a layer for one token row and seven for more.

What one operation leaves to be done, the next does on the way: a product's partial sums are added where they are
normalised or attended to, and the parts of a split context where they are projected. So some tensors that operations
return are not written yet (`Pending`): who knows them reads what they are made of, and for the others they are written
(`FusedGpuBackend.whole`). What a shape does not fit goes the general way of gpu.py, and the log says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import HostMatrix
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import PLAIN, Epilogue, Norm, Step
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.formats.runs import covers
from tinyvllm.ops.gpu.attention_decode import GROUPS_WANTED, DecodeSpec, decode_kernel
from tinyvllm.ops.gpu.attention_prefill import PrefillSpec, attend_tiles
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

# measured on an H200: 5 % at 8 rows, a loss of 2 % at 64; of quantised weights 10 % at 32
MAX_CHAINED_TOKENS, MAX_CHAINED_QUANTIZED = 16, 32


class Pending(Tensor):
    """A tensor that nobody has written yet."""

    is_written = False


class Summed(Pending):
    """What an epilogue makes of the sum of `num_parts` products of `num_tokens` rows, side by side in `parts`."""

    parts: Tensor
    num_parts: int
    num_tokens: int
    epilogue: Epilogue

    @property
    def operands(self) -> list[Tensor]:
        """What `sum_kernel` reads for it."""
        norm = self.epilogue.post_norm
        rest = (self.epilogue.residual, self.epilogue.bias, None if norm is None else norm.weight)
        return [self.parts, *[tensor for tensor in rest if tensor is not None]]

    def spec(self, lanes: Lanes, num_cols: int, norm_eps: float | None) -> SumSpec:
        """The kernel that writes it, and its RMSNorm where there is one."""
        epilogue = self.epilogue
        return SumSpec(
            lanes=lanes,
            num_tokens=self.num_tokens,
            num_cols=num_cols,
            num_parts=self.num_parts,
            has_residual=epilogue.residual is not None,
            norm_eps=norm_eps,
            has_bias=epilogue.bias is not None,
            post_norm_eps=None if epilogue.post_norm is None else epilogue.post_norm.eps,
            scale=epilogue.scale,
            softcap=epilogue.softcap,
        )


class Embedded(Pending):
    """Rows of an embedding table, which the first norm reads. `sources`: the step's inputs, and the table's planes."""

    spec: EmbedSpec
    table: Matrix
    num_tokens: int
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
        self.arrivals = device.zeros(GROUPS_WANTED, dtypes.int)  # of threadgroups that share a context

    def _mma(self, dtype: DType) -> Mma | None:
        usable = dtype != dtypes.float and dtype in self.lanes.matrix_dtypes
        return Mma(self.lanes.kind, dtype) if usable else None

    # -- weights and pool ---------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        matrix = super().matrix(host)
        self.has_quantized |= matrix.format.is_quantized
        return matrix

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 unless told, or float32 with activations wanted so: bfloat16 cannot be read in vectors."""
        if wanted != "auto":
            return wanted
        return "float32" if self.dtype == "float32" else "float16"

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, step: Step, scale: float = 1.0) -> Tensor:
        if step.num_tokens == 1 or table.num_cols % RUN_COLS:
            return super().embed(table, step, scale)
        previous = step.previous_output
        result = Embedded(self._empty(step.num_tokens * table.num_cols).uop)
        at = step.layout.offset("token_ids")
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
        if norm is not None:
            x = self._normed_rows(x, norm, num_tokens)
        return [self._many_rows(name, self.whole(x), matrix, num_tokens, epilogue) for matrix in matrices]

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        counts = tuple(part.num_parts if isinstance(part, Summed) else 1 for part in qkv)
        parts = [part.parts if isinstance(part, Summed) else part for part in qkv]
        kind = DecodeSpec if step.is_decode else PrefillSpec
        mma = self._mma(dtypes.half) if step.pool.dtype == "float16" else None
        reason = f"a pool in {step.pool.dtype}"
        if mma is not None:
            lanes = self._lanes(step.num_tokens) if step.is_decode else self.lanes
            own = dict(lanes=lanes, mma=mma, qkv_parts=counts)
            spec = kind.of(layer, step.layout, step.pool.num_blocks, **own)
            reason = spec.uncovered_shape()
        if mma is None or reason:
            self.coverage.take_general("attention", reason, layer.index)
            return super().attend([self.whole(part) for part in qkv], layer, step)
        pool = (step.pool.keys[layer.pool_layer], step.pool.values[layer.pool_layer])
        if isinstance(spec, PrefillSpec):
            rows = self._empty(step.num_tokens * spec.num_heads * spec.head_dim)
            return attend_tiles(spec, rows, pool, layer, step, parts)
        return self._decode(spec, pool, [step.inputs, *layer.tables, *parts], step)

    def _decode(self, spec: DecodeSpec, pool: tuple[Tensor, Tensor], read: list[Tensor], step: Step) -> Tensor:
        """Attention of rows that are the last of their sequences."""
        split = spec.split
        if split.num_parts == 1:
            out = self._empty(step.num_tokens * split.num_cols)
            return run_kernel(decode_kernel(spec), [out, *pool], read)[0]
        rows = split.num_parts * step.num_tokens
        outs = [self._floats(rows * split.num_cols), self._floats(rows * split.num_heads)]
        if spec.is_joined:
            outs = [self._empty(step.num_tokens * split.num_cols), *outs, self.arrivals]
            return run_kernel(decode_kernel(spec), [*outs, *pool], read)[0]
        values, sums, *_ = run_kernel(decode_kernel(spec), [*outs, *pool], read)
        result = Split(self._empty(split.num_cols).uop)
        result.values, result.sums, result.inputs, result.split = values, sums, step.inputs, split
        return result

    def take_rows(self, x: Tensor, step: Step, num_cols: int) -> Tensor:
        return super().take_rows(self.whole(x), step, num_cols)

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
            shape = (x.num_tokens, table.used_rows, table.num_cols)
            fn = embed_kernel(spec.format, *shape, spec.token_offset, spec.is_fed, spec.scale)
            out = run_kernel(fn, out, x.sources)
        elif isinstance(x, Summed):
            added = x.spec(self._lanes(x.num_tokens), x.numel() // x.num_tokens, None)
            out = run_kernel(sum_kernel(added), out, x.operands)
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

    def _uncovered_product(self, matrices: Sequence[Matrix], num_tokens: int, epilogue: Epilogue) -> str:
        """Why the fused kernels cannot multiply, in words; "" where they can."""
        is_gated = epilogue.activation is not None
        if is_gated and (rest := epilogue.uncovered()):
            return f"{rest} behind an activation"
        if unread := [matrix.format.name for matrix in matrices if not covers(matrix.format)]:
            return f"weights in {unread[0]}"
        if num_tokens == 1:
            return ""
        if self.mma is None:
            return f"several rows, and no matrix unit for {self.dtype}"
        odd = [m.num_rows for m in matrices if not fits_matrix_unit(self.mma, m.num_rows, is_gated=is_gated)]
        return f"{odd[0]} rows of a matrix, which do not fill the matrix unit's tiles" if odd else ""

    def _one_row(self, name: str, x: Tensor, matrix: Matrix, norm: Norm | None, epilogue: Epilogue) -> Tensor:
        """One row's product and its epilogue; what the product's kernel does not do of it is left to `sum_kernel`."""
        if not isinstance(x, Split):
            x = self.whole(x)
        if not epilogue.uncovered():
            dtype = F32 if epilogue.is_plain else self.float
            return self._vector(name, x, matrix, dtype, norm, epilogue)
        product = self._vector(name, x, matrix, F32, norm, PLAIN)
        return self._pending_sum(product, 1, 1, epilogue)

    def _vector(
        self, name: str, x: Tensor, matrix: Matrix, dtype: DType, norm: Norm | None, epilogue: Epilogue
    ) -> Tensor:
        """One row's product."""
        fields: dict[str, Any] = dict(
            name=name,
            lanes=self.lanes,
            format=matrix.format,
            num_rows=matrix.num_rows,
            num_cols=matrix.num_cols,
            norm_eps=norm.eps if norm is not None else None,
            activation=epilogue.activation,
            has_residual=epilogue.residual is not None,
            split=x.split if isinstance(x, Split) else None,
        )
        spec: VectorSpec | QuantizedVectorSpec = VectorSpec(**fields)
        fn = vector_kernel(spec)
        # its activations pass through float16, whose range another dtype was chosen to exceed
        if matrix.format.is_quantized and self.mma is not None and self.float == self.mma.dtype == dtypes.half:
            packed = QuantizedVectorSpec(mma=self.mma, **fields)
            if fits_quantized_vector(packed):
                packed = choose(packed)
                spec, fn = packed, quantized_vector_kernel(packed)
        source = [x.values, x.sums, x.inputs] if isinstance(x, Split) else [x]
        weight = [norm.weight] if norm is not None else []
        rest = [] if epilogue.residual is None else [self.whole(epilogue.residual)]
        out = empty(spec.out_rows, dtype, self.device.name)
        return run_kernel(fn, [out], [*matrix.planes, *source, *weight, *rest])[0]

    def _many_rows(self, name: str, x: Tensor, matrix: Matrix, num_tokens: int, epilogue: Epilogue) -> Tensor:
        """The product of several rows and its epilogue, which `sum_kernel` is left with unless it is an activation."""
        assert self.mma is not None
        spec = self._matrix_spec(name, self.mma, matrix, num_tokens, epilogue.activation)
        if epilogue.activation is not None:
            return multiply(spec, self._empty(num_tokens * spec.out_rows), matrix, x)
        size = num_tokens * spec.num_rows
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
            if isinstance(spec, GemmSpec) and spec.splits == 1 and not epilogue.uncovered():
                return multiply_rows(spec, self._empty(size), matrix.planes, x, epilogue.residual)
        parts = multiply(spec, self._floats(spec.splits * size), matrix, x)
        if spec.splits == 1 and epilogue.is_plain:
            return parts
        return self._pending_sum(parts, spec.splits, num_tokens, epilogue)

    def _pending_sum(self, parts: Tensor, num_parts: int, num_tokens: int, epilogue: Epilogue) -> Summed:
        """Logits and qkv, which are read in float32, or an activation."""
        size = parts.numel() // num_parts
        in_floats = epilogue.residual is None and epilogue.post_norm is None
        result = Summed((self._floats(size) if in_floats else self._empty(size)).uop)
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self.whole(epilogue.residual))
        result.parts, result.num_parts, result.num_tokens, result.epilogue = parts, num_parts, num_tokens, epilogue
        return result

    def _matrix_spec(
        self, name: str, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None
    ) -> MatrixSpec | GemmSpec:
        if num_tokens >= MIN_TOKENS:
            shape = (num_tokens, matrix.num_rows, matrix.num_cols, activation, self.has_wgmma)
            return choose(GemmSpec(name, mma, matrix.format, self.float, *shape))
        size = (num_tokens, matrix.num_rows, matrix.num_cols)
        return choose(MatrixSpec(name, self._lanes(num_tokens), mma, matrix.format, *size, activation))

    def _written(self, x: Pending, value: Tensor) -> Tensor:
        """x, now that `value` holds it."""
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
            value, normed = run_kernel(sum_kernel(x.spec(lanes, cols, norm.eps)), outs, [*x.operands, weight])
        else:
            spec = SumSpec(lanes, num_tokens, cols, 0, False, norm.eps)
            return run_kernel(sum_kernel(spec), [normed], [x, weight])[0]
        self._written(x, value)
        return normed
