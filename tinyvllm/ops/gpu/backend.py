"""The backend of devices with threadgroups (METAL, CUDA, OpenCL): products by tinygrad's own kernels over matrices in
row layout, unpacked inside them; attention, KV write, embedding and sampling by kernels of ours."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import Tensor, UOp, dtypes

from tinyvllm.arrays import HostMatrix, stack_rows
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.backend import AttentionShape, KVPool, Norm, gate_over_up, head_tables, sample_rows
from tinyvllm.ops.formats.matrix import Format, Matrix, Planes, pack, unpack
from tinyvllm.ops.gpu.attention import THREADS, GpuAttentionSpec, attention_kernel, take_rows_kernel, write_kv_kernel
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.token_ids import token_id
from tinyvllm.ops.step_inputs import StepLayout

MAX_HEAD_DIM = 256  # threads of an attention threadgroup


class GpuBackend:
    """Activations and dense matrices have `dtype`; products and norms accumulate in float32."""

    def __init__(self, device: DeviceHandle, dtype: str, *, dequantize: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.dequantize = dequantize
        self.float = FLOATS[dtype]

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return pack(host, "row", self.dtype, self.device.name, dequantize=self.dequantize)

    def stacked(self, hosts: Sequence[HostMatrix]) -> tuple[Matrix, ...]:
        return tuple(self.matrix(host) for host in stack_rows(hosts))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Gate rows, then up rows."""
        return self.matrix(gate_over_up(gate, up))

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        if shape.head_dim > MAX_HEAD_DIM or shape.head_dim % 8:
            raise UnsupportedModelError(f"head_dim {shape.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
        size = num_blocks * block_size * shape.num_kv_heads * shape.head_dim
        keys = [self.device.zeros(size, FLOATS[dtype]) for _ in range(num_layers)]
        values = [self.device.zeros(size, FLOATS[dtype]) for _ in range(num_layers)]
        return KVPool(keys, values, num_blocks, dtype)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """That of the activations unless told."""
        return self.dtype if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout, newest: Tensor | None = None) -> Tensor:
        rows, cols, at = table.used_rows, table.num_cols, layout.offset("token_ids")
        fn = embed_kernel(table.format, layout.num_tokens, rows, cols, at, newest is not None)
        sources = [inputs] if newest is None else [inputs, newest]
        return run_kernel(fn, [self._empty(layout.num_tokens * cols)], [*sources, *table.planes])[0]

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        normed = self._normed(x, norm, num_tokens)
        return [self._product(normed, matrix).reshape(-1).contiguous() for matrix in matrices]

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        both = self._product(self._normed(x, norm, num_tokens), matrix)  # (T, 2 * ffn)
        half = matrix.num_rows // 2
        return (both[:, :half].silu() * both[:, half:]).cast(self.float).reshape(-1).contiguous()

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        out = self._product(x.reshape(num_tokens, -1), matrix).reshape(-1)
        # the product first: a residual that is more than a Tensor (gpu_fused) adds to its own kind alone
        return (out + residual.cast(dtypes.float)).cast(self.float).contiguous()

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
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        tables, eps = head_tables(rope, head_norm)
        spec = GpuAttentionSpec(layout, *heads, pool.num_blocks, tuple(widths), eps)
        written = [inputs, *tables, *qkv[spec.kv_parts]]
        keys, values = run_kernel(write_kv_kernel(spec), [pool.keys[layer], pool.values[layer]], written)
        out = self._empty(layout.num_tokens * shape.num_heads * shape.head_dim)
        read = [keys, values, inputs, *tables, *qkv[spec.query_parts]]
        return run_kernel(attention_kernel(spec), [out], read)[0]

    def take_rows(self, x: Tensor, inputs: Tensor, layout: StepLayout, num_cols: int) -> Tensor:
        fn = take_rows_kernel(layout, num_cols)
        return run_kernel(fn, [self._empty(layout.num_seqs * num_cols)], [x, inputs])[0]

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
        return sample_rows(self.device, logits, vocab_size, stride, inputs, layout, out, state)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _empty(self, size: int) -> Tensor:
        return empty(size, self.float, self.device.name)

    def _normed(self, x: Tensor, norm: Norm, num_tokens: int) -> Tensor:
        """RMSNorm in float32, (T, K) in the activations' dtype."""
        rows = x.reshape(num_tokens, -1).cast(dtypes.float)
        scale = (rows.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return (rows * scale * norm.weight).cast(self.float).contiguous()

    def _product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x (T, K) @ matrix.T -> (T, N) float32. The unpacking is part of the product's kernel."""
        return x.matmul(unpack(matrix, self.float).T, dtype=dtypes.float)


@cached_kernel
def embed_kernel(
    fmt: Format, num_tokens: int, num_rows: int, num_cols: int, token_offset: int, is_fed: bool
) -> KernelFn:
    """fn(out (T, K), inputs, *[newest], *planes): rows of a table in row layout. A token id beyond it reads the last
    row; is_fed: one below 0 names a row of `newest`."""

    def kernel(out: UOp, inputs: UOp, *rest: UOp) -> UOp:
        newest, planes = (rest[0], rest[1:]) if is_fed else (None, rest)
        body, table = Body(), Planes(fmt, planes)
        threads = next(count for count in (256, 128, 64, THREADS) if num_cols % count == 0)
        token, chunk, thread = body.grid(num_tokens), body.grid(num_cols // threads), body.threads(threads)
        col = chunk * threads + thread
        row = token_id(inputs[token_offset + token].load(), newest, num_rows)
        store = out[token * num_cols + col].store(table.value(row, col, num_cols, "row").cast(out.dtype))
        name = f"embed_{fmt.name}_{num_tokens}x{num_cols}"
        return finish(store.end(thread, chunk, token), name, nbytes=num_tokens * num_cols * 4)

    return kernel
