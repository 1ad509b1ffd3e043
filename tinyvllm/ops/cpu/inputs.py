"""What products read of an activation: its columns as they are, normed, or rounded to integers (fixed_rows.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygrad import Tensor, dtypes

from tinyvllm.ops.backend import Norm
from tinyvllm.ops.cpu.fixed_rows import RowForm, fix_rows_kernel, run_in_blocks
from tinyvllm.ops.cpu.linear import rms_norm_kernel
from tinyvllm.ops.cpu.product import STAGED_ROWS, NormSpec
from tinyvllm.ops.cpu.sharded import Activation, tensors_of, widths_of
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import KernelFn, empty, run_row_kernel


@dataclass(frozen=True)
class ProductInput:
    """The operands of one core's product that come from x and its norm."""

    tensors: tuple[Tensor, ...]
    x_cols: tuple[int, ...]  # as in LinearSpec
    norm: Norm | None = None  # that the product applies


class Inputs:
    """x (T, K) for products of the same rows. A few rows are normed and rounded by each product; many are here, once on
    each core for all of them. `norms_first`: a few rows are normed here too."""

    def __init__(
        self,
        x: Activation,
        norm: Norm | None,
        shape: tuple[int, int],
        cores: tuple[str, ...],
        *,
        x_bits: int = 16,
        norms_first: bool = False,
    ) -> None:
        """`shape`: (T, K). `x_bits`: of the integers that x is rounded to."""
        self._x, self._norm, self._shape, self._cores = x, norm, shape, cores
        self._x_bits = x_bits
        self._has_few = shape[0] <= STAGED_ROWS
        self._norms_first = norms_first or not self._has_few
        # by core, and by form and core. (No cached methods: they would refer to this object, which refers to them, and
        # until such a cycle is collected, the memory of x is given to nothing else.)
        self._normed: dict[int, tuple[Tensor, ...]] = {}
        self._rounded: dict[tuple[RowForm, int], tuple[Tensor, ...]] = {}

    def of(self, matrix: Matrix, core: int) -> ProductInput:
        """Of a core's product with a matrix."""
        cols = self._shape[1]
        if matrix.layout == "dot" and not self._has_few:
            key = (RowForm.of(matrix.format, self._x_bits), core)
            if key not in self._rounded:
                self._rounded[key] = self._round(*key)
            return ProductInput(self._rounded[key], (cols,))
        if self._norm is not None and self._norms_first:
            if core not in self._normed:
                self._normed[core] = self._norm_rows(core)
            return ProductInput(self._normed[core], (cols,))
        return ProductInput(tensors_of(self._x), widths_of(self._x, cols), self._norm)

    def _spec(self) -> NormSpec:
        tokens, cols = self._shape
        return NormSpec(tokens, cols, 0.0 if self._norm is None else self._norm.eps, widths_of(self._x, cols))

    def _read(self) -> list[Tensor]:
        return [*tensors_of(self._x), *([] if self._norm is None else [self._norm.weight])]

    def _round(self, form: RowForm, core: int) -> tuple[Tensor, ...]:
        groups, name = self._shape[0] * self._shape[1] // form.group, self._cores[core]
        outs = [empty(groups * form.words, dtypes.short, name), empty(groups * 2, device=name)]
        spec, read = self._spec(), self._read()

        def make(num_rows: int) -> KernelFn:
            return fix_rows_kernel(replace(spec, num_tokens=num_rows), form, self._norm is not None)

        shared = [] if self._norm is None else read[-1:]
        return tuple(run_in_blocks(make, spec.num_tokens, outs, read, shared))

    def _norm_rows(self, core: int) -> tuple[Tensor, ...]:
        out = empty(self._shape[0] * self._shape[1], device=self._cores[core])
        spec, read = self._spec(), self._read()

        def make(num_rows: int) -> KernelFn:
            return rms_norm_kernel(replace(spec, num_tokens=num_rows))

        return tuple(run_row_kernel(make, spec.num_tokens, [out], read, shared=read[-1:]))
