"""A kernel over groups of an activation's columns, one for each layer, for devices with threadgroups."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.activation import gated
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, cached_kernel, clamp, finish

THREADS = 32


@dataclass(frozen=True)
class GateSpec:
    """activation(gate (T, N)) * the N columns of factors (T, M) from a start that is data: layers share the kernel."""

    num_tokens: int  # T
    num_cols: int  # N, a multiple of 32
    factor_cols: int  # M
    activation: str


@cached_kernel
def gate_columns_kernel(spec: GateSpec) -> KernelFn:
    """fn(out (T, N), gate (T, N), factors (T, M), start (1,) int32)."""

    def kernel(out: UOp, gate: UOp, factors: UOp, start: UOp) -> UOp:
        body = Body()
        token, chunk, thread = body.grid(spec.num_tokens), body.grid(spec.num_cols // THREADS), body.threads(THREADS)
        col = chunk * THREADS + thread
        at = token * spec.factor_cols + clamp(start[0].load(), 0, spec.factor_cols - spec.num_cols) + col
        index = token * spec.num_cols + col
        (value,) = gated(spec.activation, [gate[index].load().cast(F32)], [factors[at].load().cast(F32)])
        store = out[index].store(value.cast(out.dtype)).end(thread, chunk, token)
        size = spec.num_tokens * spec.num_cols
        return finish(store, f"gate_columns_{spec.num_tokens}x{spec.num_cols}", ops=8 * size, nbytes=6 * size)

    return kernel
