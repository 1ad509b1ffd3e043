"""Low-rank adapters (LoRA, Hu et al. 2021) beside a model's products, once for the kernels of all devices.

An adapter adds B A x to a product W x, with A of r rows and B of r columns (the scale alpha / r is part of B). Several
adapters are on the device at once, each in a slot. Each token row names its adapter's slot in the step's inputs; slot 0
stands for none. One kernel computes A x (the shrink) and one adds B times that (the expand). Both loop over the rank
that the row's slot has, which is 0 for rows without an adapter: they read no weights and write nothing.

A *site* is a product of the model with the modules that it consists of. Modules that read the same x have one site: q,
k and v, or gate and up. Each module has a *section* of A's rows, because it has an A of its own.

ranks (slots + 1, S) int32 · A (slots, S * R, K) · B (slots, R, N), in the dtype of `adapter_dtype`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from tinygrad import Tensor
from tinygrad.dtype import DType

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.row_writer import row_writer
from tinyvllm.ops.kernel.body import F16, F32, I32

RANK_STEP = 8  # what the largest rank is a multiple of


@dataclass(frozen=True)
class Block:
    """Rows of a product that come from one module: `num_rows` outputs, which add what section `section` shrinks to."""

    section: int
    num_rows: int


@dataclass(frozen=True)
class SiteShape:
    """The sizes of a site. Hashable: kernels are cached by it."""

    num_cols: int  # K
    blocks: tuple[Block, ...]  # the rows of the product, in order; the output of one module may be in two blocks
    max_rank: int  # R
    num_slots: int  # without slot 0
    num_kv_heads: int | None = None  # set if the product is of q, k and v: the number of KV heads

    @property
    def num_sections(self) -> int:
        """S."""
        return 1 + max(block.section for block in self.blocks)

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(block.num_rows for block in self.blocks)

    @property
    def num_shrunk(self) -> int:
        """Rows of A: S * R."""
        return self.num_sections * self.max_rank

    @property
    def starts(self) -> list[int]:
        """Where each block's rows begin."""
        return [0, *accumulate(block.num_rows for block in self.blocks[:-1])]

    def num_elements(self) -> int:
        """Of A and B in all slots."""
        return self.num_slots * (self.num_shrunk * self.num_cols + self.max_rank * self.num_rows)


@dataclass(frozen=True)
class SiteValues:
    """One adapter's matrices for a site, float32 on the host: A (r, K) of each section and B (rows, r) of each block,
    scaled. None where the adapter leaves a module as it is."""

    a: tuple[np.ndarray | None, ...]
    b: tuple[np.ndarray | None, ...]


@dataclass(frozen=True, eq=False)
class AdapterSite:
    """A site's slots on the device."""

    shape: SiteShape
    ranks: Tensor
    a: Tensor
    b: Tensor

    @property
    def operands(self) -> list[Tensor]:
        """What kernels read, besides the inputs."""
        return [self.ranks, self.a, self.b]

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.nbytes()) for tensor in self.operands)


def adapter_dtype(device: DeviceHandle, dtype: str | None) -> DType:
    """The dtype of A and B: float32 on a CPU and in float32 models, otherwise float16, which has more bits than
    bfloat16 and can be loaded in vectors. (A and B are small numbers, within its range.)"""
    return F32 if device.is_cpu or dtype == "float32" else F16


def make_site(shape: SiteShape, device: DeviceHandle, dtype: str | None) -> AdapterSite:
    """A site whose slots are empty."""
    float_type = adapter_dtype(device, dtype)
    return AdapterSite(
        shape=shape,
        ranks=device.zeros((shape.num_slots + 1) * shape.num_sections, I32),
        a=device.zeros(shape.num_slots * shape.num_shrunk * shape.num_cols, float_type),
        b=device.zeros(shape.num_slots * shape.max_rank * shape.num_rows, float_type),
    )


class SiteWriter:
    """Writes adapters into a site's slots. No step in flight may use a slot that is being written."""

    def __init__(self, site: AdapterSite) -> None:
        shape = self._shape = site.shape
        self._dtype = np.float32 if site.a.dtype == F32 else np.float16
        self._write_ranks = row_writer(site.ranks, shape.num_sections)
        self._write_a = row_writer(site.a, shape.num_shrunk * shape.num_cols)
        self._write_b = row_writer(site.b, shape.max_rank * shape.num_rows)

    def write(self, slot: int, values: SiteValues | None) -> None:
        """Put an adapter's matrices into a slot (1 to num_slots); None: it leaves this site as it is."""
        shape = self._shape
        ranks = np.zeros(shape.num_sections, np.int32)
        if values is not None and any(part is not None for part in values.a):
            a = np.zeros((shape.num_sections, shape.max_rank, shape.num_cols), self._dtype)
            b = np.zeros((shape.max_rank, shape.num_rows), self._dtype)
            for section, part in enumerate(values.a):
                if part is not None:
                    ranks[section] = len(part)
                    a[section, : len(part)] = part
            for start, block, part in zip(shape.starts, shape.blocks, values.b, strict=True):
                if part is not None:
                    b[: part.shape[1], start : start + block.num_rows] = part.T
            self._write_a(slot - 1, a.reshape(-1))
            self._write_b(slot - 1, b.reshape(-1))
        self._write_ranks(slot, ranks)


def add_reference(site: AdapterSite, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """(T, N) float32: what the adapters add, from x (T, K), normed if the product's is; slots (T,)."""
    shape = site.shape
    ranks = site.ranks.numpy().reshape(-1, shape.num_sections)
    a = site.a.numpy().astype(np.float32).reshape(shape.num_slots, shape.num_sections, shape.max_rank, -1)
    b = site.b.numpy().astype(np.float32).reshape(shape.num_slots, shape.max_rank, -1)
    deltas = np.zeros((len(rows), shape.num_rows), np.float32)
    for row, slot in enumerate(slots):
        for start, block in zip(shape.starts, shape.blocks, strict=True):
            rank = ranks[slot, block.section]
            if slot and rank:
                shrunk = a[slot - 1, block.section, :rank] @ rows[row]
                columns = slice(start, start + block.num_rows)
                deltas[row, columns] = shrunk @ b[slot - 1, :rank, columns]
    return deltas


@dataclass(frozen=True)
class ShrinkSpec:
    """A x of T rows, as far as `own_cols` columns of x go. Hashable: the key of its kernel."""

    shape: SiteShape
    num_tokens: int  # T
    slots_at: int  # where the rows' slots begin in the inputs
    norm_eps: float | None  # of an RMSNorm of x
    first_col: int = 0  # of the columns of x that the kernel has
    own_cols: int = 0

    @property
    def name(self) -> str:
        return f"adapter_shrink_{self.num_tokens}x{self.shape.num_shrunk}x{self.own_cols or self.shape.num_cols}"


@dataclass(frozen=True)
class ExpandSpec:
    """B s of T rows, added to some rows of a product (a part of it, in which it was sharded)."""

    shape: SiteShape
    num_tokens: int  # T
    slots_at: int
    num_cols: int  # of the part, those that pad it included
    first_block: int = 0  # the blocks that the part consists of
    end_block: int = 0
    scale: float = 1.0
    activation: str | None = None  # the part is gate and up: write activation(gate) * up
    has_bias: bool = False  # of gate and up, added before the activation

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return self.shape.blocks[self.first_block : self.end_block]

    @property
    def first_row(self) -> int:
        """Of B's rows, that of the part's first column."""
        return self.shape.starts[self.first_block]

    @property
    def used_cols(self) -> int:
        return sum(block.num_rows for block in self.blocks)

    @property
    def name(self) -> str:
        kind = "adapter_expand" if self.activation is None else f"adapter_{self.activation}"
        return f"{kind}_{self.num_tokens}x{self.num_cols}x{self.shape.max_rank}"


def blocks_of_parts(shape: SiteShape, part_rows: Sequence[int]) -> list[tuple[int, int]]:
    """[(first block, end)] of each part of a product. `part_rows`: its rows, those that pad it included. A part
    consists of whole blocks."""
    found, first = [], 0
    for rows in part_rows:
        end, total = first, 0
        while end < len(shape.blocks) and total + shape.blocks[end].num_rows <= rows:
            total += shape.blocks[end].num_rows
            end += 1
        found.append((first, end))
        first = end
    assert first == len(shape.blocks), f"parts of {part_rows} rows for {shape.blocks}"
    return found
