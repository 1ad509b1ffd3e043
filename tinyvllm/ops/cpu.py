"""The CPU device's backend: packed panels, five fused kernels a layer when decoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor, UOp

from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.backend import AttentionShape, KVPool, Norm, sample_rows, stack_rows, take
from tinyvllm.ops.cpu_attention import AttentionSpec, attention_kernel, write_kv_kernel
from tinyvllm.ops.cpu_linear import STAGED_ROWS, LinearSpec, NormSpec, embed_kernel, linear_kernel, rms_norm_kernel
from tinyvllm.ops.device import FLOATS, DeviceHandle, has_many_registers
from tinyvllm.ops.kernel import Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.matrix import PANEL, Matrix, pack
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


class CpuBackend:
    """Activations are float32; dense matrices stay as stored unless `dtype` recasts them."""

    def __init__(self, device: DeviceHandle, dtype: str | None, *, dequantize: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.dequantize = dequantize
        self.tile_rows = 4 if has_many_registers() else 2

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        return pack(host, "panel", self.dtype, self.device.name, dequantize=self.dequantize)

    def stacked(self, hosts: Sequence[HostMatrix]) -> tuple[Matrix, ...]:
        for host in hosts:
            _require_panels(host)
        return tuple(self.matrix(host) for host in stack_rows(hosts))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Panels of 16 gate rows and the 16 up rows that belong to them."""
        _require_panels(gate)
        stacked = stack_rows([gate, up])
        if len(stacked) > 1:
            logger.warning("gate and up projections have different formats: both are kept as float16")
            stacked = stack_rows([to_float32(gate).astype(np.float16), to_float32(up).astype(np.float16)])
        half, rows = PANEL // 2, gate.shape[0]
        index = np.arange(rows).reshape(-1, 1, half)
        order = np.concatenate([index, index + rows], axis=1).reshape(-1)
        return self.matrix(take(stacked[0], order))

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        size = num_blocks * block_size * shape.num_kv_heads * shape.head_dim
        keys = [self.device.zeros(size, FLOATS[dtype]) for _ in range(num_layers)]
        values = [self.device.zeros(size, FLOATS[dtype]) for _ in range(num_layers)]
        return KVPool(keys, values, num_blocks, dtype)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 unless told: half the bytes of float32, which decoding at long contexts waits for.

        Raises DeviceError for bfloat16: not every C compiler has the type (clang 14 on x86 has not)."""
        if wanted == "bfloat16":
            raise DeviceError("--kv-cache-dtype is 'bfloat16', which the CPU device has not: give float16 or float32")
        return "float16" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout) -> Tensor:
        tokens, cols = layout.num_tokens, table.num_cols
        fn = embed_kernel(table.format, tokens, table.used_rows, cols, layout.offset("token_ids"))
        return run_kernel(fn, [self._empty(tokens * cols)], [inputs, *table.planes])[0]

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        x, eps, weight = self._normed(x, norm, matrices[0].num_cols, num_tokens)
        return [self._linear(name, x, matrix, num_tokens, eps, weight) for matrix in matrices]

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        x, eps, weight = self._normed(x, norm, matrix.num_cols, num_tokens)
        return self._linear(name, x, matrix, num_tokens, eps, weight, epilogue="silu")

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        return self._linear(name, x, matrix, num_tokens, None, [], epilogue="residual", residual=[residual])

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
    ) -> Tensor:
        spec = AttentionSpec(
            layout,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            pool.num_blocks,
            is_decode,
            tuple(widths),
            pool.dtype,
        )
        keys, values = pool.keys[layer], pool.values[layer]
        out = self._empty(layout.num_tokens * shape.num_heads * shape.head_dim)
        if is_decode:
            return run_kernel(attention_kernel(spec), [out, keys, values], [inputs, rope, *qkv])[0]
        keys, values = run_kernel(write_kv_kernel(spec), [keys, values], [inputs, rope, *qkv])
        return run_kernel(attention_kernel(spec), [out], [keys, values, inputs, rope, *qkv])[0]

    def take_rows(self, x: Tensor, inputs: Tensor, layout: StepLayout, num_cols: int) -> Tensor:
        fn = take_rows_kernel(layout, num_cols)
        return run_kernel(fn, [self._empty(layout.num_seqs * num_cols)], [x, inputs])[0]

    def sample(self, logits: Tensor, vocab_size: int, stride: int, inputs: Tensor, layout: StepLayout) -> Tensor:
        return sample_rows(self.device, logits, vocab_size, stride, inputs, layout)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _empty(self, size: int) -> Tensor:
        return empty(size, device=self.device.name)

    def _normed(self, x: Tensor, norm: Norm, cols: int, num_tokens: int) -> tuple[Tensor, float | None, list[Tensor]]:
        """Few rows: the product normalises them itself. Many: one pass before all products of the same input."""
        if num_tokens <= STAGED_ROWS:
            return x, norm.eps, [norm.weight]
        spec = NormSpec(num_tokens, cols, norm.eps)
        normed = run_kernel(rms_norm_kernel(spec), [self._empty(num_tokens * cols)], [x, norm.weight])[0]
        return normed, None, []

    def _linear(
        self,
        name: str,
        x: Tensor,
        matrix: Matrix,
        num_tokens: int,
        eps: float | None,
        weight: list[Tensor],
        *,
        epilogue: str = "none",
        residual: Sequence[Tensor] = (),
    ) -> Tensor:
        spec = LinearSpec(
            name, matrix.format, num_tokens, matrix.num_rows, matrix.num_cols, eps, epilogue, self.tile_rows
        )
        out = self._empty(num_tokens * spec.out_cols)
        return run_kernel(linear_kernel(spec), [out], [*matrix.planes, x, *weight, *residual])[0]


def _require_panels(host: HostMatrix) -> None:
    """Matrices whose rows feed another operation must fill their panels: only the head may be padded."""
    if host.shape[0] % PANEL:
        raise UnsupportedModelError(f"a projection has {host.shape[0]} rows, which is no multiple of {PANEL}")


@cached_kernel
def take_rows_kernel(layout: StepLayout, num_cols: int) -> KernelFn:
    """fn(out (R, columns), x (T, columns), inputs): rows logit_rows of x."""

    def kernel(out: UOp, x: UOp, inputs: UOp) -> UOp:
        body = Body()
        seq, col = body.loop(layout.num_seqs), body.loop(num_cols)
        row = inputs[layout.offset("logit_rows") + seq].load().maximum(0).minimum(layout.num_tokens - 1)
        store = out[seq * num_cols + col].store(x[row * num_cols + col].load())
        return finish(
            store.end(col, seq), f"take_rows_{layout.num_seqs}x{num_cols}", nbytes=8 * layout.num_seqs * num_cols
        )

    return kernel
