"""The CPU's backend with norms and epilogues in kernels of their own, to show what fusing them gains (`--unfused`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinyvllm.ops.backend import PLAIN, Epilogue, Norm
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.inputs import Inputs
from tinyvllm.ops.cpu.sharded import Activation
from tinyvllm.ops.formats.matrix import Matrix


class UnfusedCpuBackend(CpuBackend):
    """Products read x unchanged and write their sums, with bias and activation. A kernel before a product computes the
    norm, and one after it the scale, the residual sum and whatever else follows. Experts keep their norm."""

    def linear(
        self,
        name: str,
        x: Activation,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Activation]:
        before = Epilogue(bias=epilogue.bias, activation=epilogue.activation)
        products = super().linear(name, x, matrices, num_tokens, norm, before)
        after = replace(epilogue, bias=None, activation=None)
        if after.is_plain:
            return products
        columns = [matrix.num_rows // (1 if epilogue.activation is None else 2) for matrix in matrices]
        return [self._finish(y, count, num_tokens, after) for y, count in zip(products, columns, strict=True)]

    def _inputs(self, x: Activation, norm: Norm | None, shape: tuple[int, int]) -> Inputs:
        return Inputs(x, norm, shape, self.cores, x_bits=self.x_bits, norms_first=True)
