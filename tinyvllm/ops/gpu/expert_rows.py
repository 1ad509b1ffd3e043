"""Products of experts' matrices in the general form, for any device with threadgroups and any format: a thread for each
value of the result. A token's experts are read, and no others; each as often as tokens chose it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import Planes
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, cached_kernel, clamp, fill, finish

THREADS = 32


@dataclass(frozen=True)
class ExpertRowsSpec:
    """out (T * k, N) = x (T or T * k, K) @ w[expert].T + bias[expert], for the k experts of each token; or, with an
    activation, of both halves of w and the bias: activation(gate) * up."""

    format: Format
    num_tokens: int  # T
    num_chosen: int  # k
    num_experts: int  # E
    num_rows: int  # N of the result, a multiple of 32
    num_cols: int  # K
    x_has_pairs: bool  # x has a row for each of a token's experts
    activation: str | None = None
    has_bias: bool = False

    @property
    def matrix_rows(self) -> int:
        """Rows of one expert's matrix."""
        return self.num_rows if self.activation is None else 2 * self.num_rows


@cached_kernel
def expert_rows_kernel(spec: ExpertRowsSpec) -> KernelFn:
    """fn(out, ids (T * k,) int32, x, *planes[, bias (E, matrix rows)])."""

    def kernel(out: UOp, ids: UOp, x: UOp, *rest: UOp) -> UOp:
        count = Planes.count(spec.format)
        planes, bias = Planes(spec.format, rest[:count]), rest[count] if spec.has_bias else None
        body = Body()
        pair, chunk = body.grid(spec.num_tokens * spec.num_chosen), body.grid(spec.num_rows // THREADS)
        thread = body.threads(THREADS)
        row = chunk * THREADS + thread
        expert = clamp(ids[pair].load(), 0, spec.num_experts - 1) * spec.matrix_rows
        halves = 1 if spec.activation is None else 2
        rows = [expert + row + half * spec.num_rows for half in range(halves)]
        x_row = pair if spec.x_has_pairs else pair // spec.num_chosen
        values = _dot(body, lambda col: x[x_row * spec.num_cols + col].load().cast(F32), planes, rows, spec.num_cols)
        if bias is not None:
            values = [value + bias[at].load() for value, at in zip(values, rows, strict=True)]
        if spec.activation is not None:
            values = gated(spec.activation, values[:1], values[1:])
        store = out[pair * spec.num_rows + row].store(values[0].cast(out.dtype)).end(thread, chunk, pair)
        return _finish(spec, store)

    return kernel


def _dot(body: Body, x: Callable[[UOp], UOp], planes: Planes, rows: Sequence[UOp], num_cols: int) -> list[UOp]:
    """The products of rows of a matrix and the vector `x(column)`."""
    sums = fill(body, body.registers(len(rows)), 0.0, *rows)
    col = body.fold(num_cols)
    inner, value = sums.after(col), x(col)
    stores = [
        inner[i].store(inner[i].load() + planes.value(row, col, num_cols, "row") * value) for i, row in enumerate(rows)
    ]
    sums = sums.after(UOp.group(*stores).end(col))
    return [sums[i].load() for i in range(len(rows))]


def _finish(spec: ExpertRowsSpec, store: UOp) -> UOp:
    pairs, size = spec.num_tokens * spec.num_chosen, spec.matrix_rows * spec.num_cols
    name = f"expert_rows_{spec.format.name}_{pairs}x{spec.matrix_rows}x{spec.num_cols}"
    return finish(store, name, ops=2 * pairs * size, nbytes=int(pairs * size * spec.format.code_bits / 8))
