"""Quantized keys and values in the prefill kernel on CUDA: units of 16 bytes of codes, which become float16 in
threadgroup memory. A thread loads the units of the next tile before the current one is used, and converts them
after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.config import KVFormat
from tinyvllm.ops.gpu.attention_prefill_inputs import PrefillSpec
from tinyvllm.ops.gpu.kv_codes import NIBBLES, QUAD, StoredHeads, quad_pairs
from tinyvllm.ops.kernel.body import F16, U32
from tinyvllm.ops.kernel.tiles import PIECE

UNIT_WORDS = 4


def unit_dims(form: KVFormat) -> int:
    """Dimensions of a unit: of 4 bits a group of 32, of 8 bits half of one."""
    return UNIT_WORDS * 32 // form.bits


@dataclass(frozen=True)
class Unit:
    """The codes of neighboring dimensions, from `dim` on, of a key or a value."""

    form: KVFormat
    dim: UOp
    words: list[UOp]
    scale: UOp | None

    @property
    def loaded(self) -> list[UOp]:
        return self.words if self.scale is None else [*self.words, self.scale]


def load_unit(heads: StoredHeads, slot: UOp, head: UOp | int, dim: UOp, wanted: UOp | None) -> Unit:
    """A unit; one of zeros if not `wanted` (None: always wanted)."""
    place = heads.head(slot, head)
    words, scale = heads.words(place, dim, UNIT_WORDS), heads.scale(place, dim)
    if wanted is not None and scale is not None:
        scale = wanted.where(scale, UOp.const(0.0, F16))
    elif wanted is not None:
        words = [wanted.where(word, UOp.const(0, U32)) for word in words]
    return Unit(heads.form, dim, words, scale)


def unit_pieces(spec: PrefillSpec, unit: Unit) -> list[tuple[UOp, list[UOp]]]:
    """(first of eight dimensions, four words of two float16) of each part of a unit."""
    quads, factor = unit.words, None if unit.scale is None else spec.mma.both(unit.scale)
    if unit.form.bits == 4:
        quads = [word & NIBBLES for word in quads] + [word >> 4 & NIBBLES for word in quads]
    pairs = [word for quad in quads for (word,) in quad_pairs(unit.form, quad, factor, spec.lanes, spec.mma)]
    return [(unit.dim + i * PIECE, pairs[i * QUAD : (i + 1) * QUAD]) for i in range(len(pairs) // QUAD)]


def hold(values: Sequence[UOp], *after: UOp) -> UOp:
    """A statement after which the values have been loaded."""
    return UOp(Ops.CUSTOM, dtypes.void, src=(*values, *after), arg="")
