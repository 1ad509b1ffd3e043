"""One token row's experts: where their rows lie in the matrix of all experts, inside the kernels of vector.py and
quantized_vector.py."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel.body import balanced, clamp


@dataclass(frozen=True)
class ChosenExperts:
    """The product of one row with k of E experts. Hashable: part of the key of a kernel.

    Either the products lie side by side, out (k, N), each times the weight of its expert; or they are added up: then x
    is (k, K) and has been multiplied by the weights.
    """

    num_experts: int  # E
    count: int  # k
    num_cols: int  # K of an expert
    adds_up: bool
    has_bias: bool = False  # (E, rows)


@dataclass(frozen=True)
class ChosenRows:
    """The same inside a kernel. `slot`: which of the k experts a threadgroup has, unless it adds them up."""

    spec: ChosenExperts
    num_rows: int  # of an expert's matrix
    slot: UOp | int
    ids: UOp
    weights: UOp
    biases: UOp | None

    def locate(self, row: UOp, run: UOp, cols: int) -> tuple[UOp, UOp]:
        """(row of the whole matrix, run in it) of a run of `cols` columns of x."""
        if not self.spec.adds_up:
            return self._row(row, self.slot), run
        per_expert = self.spec.num_cols // cols
        return self._row(row, run // per_expert), run % per_expert

    def _row(self, row: UOp, slot: UOp | int) -> UOp:
        return row + clamp(self.ids[slot].load(), 0, self.spec.num_experts - 1) * self.num_rows

    def biased(self, value: UOp, row: UOp) -> UOp:
        """A row's product and its bias; of several experts the sum of their biases by weight."""
        if self.biases is None:
            return value
        if not self.spec.adds_up:
            return value + self.biases[self._row(row, self.slot)].load()
        slots = range(self.spec.count)
        return value + balanced(
            self.biases[self._row(row, UOp.const(slot, row.dtype))].load() * self.weights[slot].load() for slot in slots
        )

    def weighted(self, value: UOp) -> UOp:
        """A result of the threadgroup's expert, by its weight."""
        return value * self.weights[self.slot].load()

    def target(self, row: UOp, out_rows: int) -> UOp:
        """The place of a row's result."""
        return row if self.spec.adds_up else self.slot * out_rows + row
