"""Which rows of x a threadgroup of a product reads, and which rows of the output it writes: neighbors, or rows of one
expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel.body import F32, clamp

TILE_WORDS = 4  # of the tile map, for each tile: expert, first and last place + 1 in the sorted rows, 1 if it is used


@dataclass(frozen=True)
class ExpertTiles:
    """Token rows of a product with experts: pairs of a token and a chosen expert, sorted by expert, in tiles that have
    one expert each (experts_order.py). Hashable: part of the key of a kernel.

    The first product reads x (T, K) by token and writes its rows in sorted order. The second one reads them in that
    order, and writes pair t * k + i to row t * k + i.
    """

    num_experts: int
    num_pairs: int  # T * k
    num_chosen: int  # k
    num_tiles: int  # of the map; those that are not used come last
    tile_rows: int
    is_first: bool
    is_gathered: bool = False  # the first product's x has been sorted before it
    has_bias: bool = False  # (E, N)
    factor: float = 1.0  # of the first product's results; the second one's are divided by it

    @property
    def work(self) -> tuple[int, int]:
        """(rows, experts' matrices that are read), at most."""
        return self.num_pairs, min(self.num_experts, self.num_pairs)


class TokenTile:
    """A tile of neighboring rows. After the last row come repetitions of it, which are not stored."""

    def __init__(self, first: UOp | int, size: int, num_tokens: int) -> None:
        self.first, self.end, self.is_ragged = first, num_tokens, num_tokens % size != 0

    def source(self, index: UOp) -> UOp:
        """The row of x of the tile's row `index`."""
        row = self.first + index
        return row.minimum(self.end - 1) if self.is_ragged else row

    def target(self, index: UOp) -> UOp:
        """Its row of the output."""
        return self.first + index

    def exists(self, index: UOp) -> UOp | None:
        """Whether it is to be stored; None: always."""
        return self.first + index < self.end if self.is_ragged else None

    def matrix_row(self, row: UOp) -> UOp:
        """The row of the whole matrix, from that of the tile's expert."""
        return row

    def bias(self, row: UOp) -> UOp | None:
        """What is added to the product of a row of the tile's expert; None: nothing."""
        return None

    def finished(self, value: UOp, row: UOp) -> UOp:
        """The product of a row of the tile's expert, from its sum: with the row's bias."""
        return value

    def passed_on(self, value: UOp) -> UOp:
        """A result as it is stored."""
        return value

    def turns(self, steps: int) -> int | UOp:
        """How often a loop of `steps` iterations runs."""
        return steps

    def turn(self, iteration: UOp | int, steps: int) -> UOp | int:
        """An iteration of it, bounded."""
        return iteration


class ExpertTile(TokenTile):
    """A tile of the map."""

    def __init__(self, spec: ExpertTiles, number: UOp, num_rows: int, operands: Sequence[UOp]) -> None:
        """`num_rows`: of an expert's matrix; `operands`: tile map, sorted pairs[, bias]."""
        self.spec, self.num_rows = spec, num_rows
        tiles, self.pairs, *bias = operands
        self.biases = bias[0] if spec.has_bias else None
        expert, first, end, self.used = (tiles[number * TILE_WORDS + i].load() for i in range(TILE_WORDS))
        self.expert = clamp(expert, 0, spec.num_experts - 1)
        self.first = clamp(first, 0, spec.num_pairs - 1)
        self.end = clamp(end, 0, spec.num_pairs)

    def _place(self, index: UOp) -> UOp:
        """Among the sorted rows."""
        return (self.first + index).minimum(self.end - 1).maximum(0)

    def _pair(self, index: UOp) -> UOp:
        return clamp(self.pairs[self._place(index)].load(), 0, self.spec.num_pairs - 1)

    def source(self, index: UOp) -> UOp:
        if self.spec.is_first and not self.spec.is_gathered:
            return self._pair(index) // self.spec.num_chosen
        return self._place(index)

    def target(self, index: UOp) -> UOp:
        return self.first + index if self.spec.is_first else self._pair(index)

    def exists(self, index: UOp) -> UOp:
        return self.first + index < self.end

    def matrix_row(self, row: UOp) -> UOp:
        return row + self.expert * self.num_rows

    def bias(self, row: UOp) -> UOp | None:
        return None if self.biases is None else self.biases[self.matrix_row(row)].load().cast(F32)

    def finished(self, value: UOp, row: UOp) -> UOp:
        bias = self.bias(row)
        value = value if self.spec.is_first or self.spec.factor == 1.0 else value * (1.0 / self.spec.factor)
        return value if bias is None else value + bias

    def passed_on(self, value: UOp) -> UOp:
        return value * self.spec.factor if self.spec.is_first and self.spec.factor != 1.0 else value

    def turns(self, steps: int) -> UOp:
        # loaded, so that tinygrad cannot prove that the loop is short: it would drop it
        return self.used * steps

    def turn(self, iteration: UOp | int, steps: int) -> UOp:
        return clamp(UOp.const(0, self.used.dtype) + iteration, 0, max(1, steps - 1))
