"""Quantized keys and values inside the kernels of GPUs: codes that become numbers as they are loaded, and numbers that
become codes as they are stored. ops/kernel/kv_format.py has the bits of the formats.

Codes are read four at a time, as a *quad*: a word whose bytes are the codes of four consecutive elements. One
instruction makes a code float16, as for weights (ops/formats/pairs.py): an integer becomes the lowest bits of the
mantissa of 1024, and Hopper converts e4m3 itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.config import KVFormat
from tinyvllm.ops.attention_spec import AttentionSpec, PoolPlanes
from tinyvllm.ops.kernel.body import F16, F32, I32, U32
from tinyvllm.ops.kernel.kv_format import (
    E4M3_UNIT,
    Q4_ZERO,
    e4m3_code,
    farthest,
    group_code,
    group_inverse,
    group_scale,
    largest,
)
from tinyvllm.ops.kernel.lanes import HALF_PAIR, Lanes, Mma, load_cuda_words

QUAD = 4  # codes of a quad
PIECE = 8  # elements of two quads
Q4_HALF = 16  # elements of a group of 4-bit codes that lie in the low halves of its bytes
NIBBLES = 0x0F0F0F0F
SIGNS = 0x80808080
IN_HALF = 1024  # a byte in the mantissa of this becomes this and the byte
CONVERT_E4M3 = (
    '[](unsigned short e){{{{ uint d; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(e)); return d; }}}}'
    "((unsigned short)({{0}} >> {0}))"
)

Pair = tuple[UOp, ...]  # two float16: on CUDA a word
LargestOf = Callable[[Callable[[UOp], UOp]], UOp]  # a function -> its largest value over the elements of a group


@dataclass(frozen=True)
class StoredHeads:
    """The keys, or the values, of a layer inside a kernel: (slots, K, D), as codes and perhaps scales."""

    form: KVFormat
    num_heads: int  # K
    head_dim: int  # D
    codes: UOp  # words; of a dtype, its numbers
    scales: UOp | None
    is_cuda: bool = False

    @classmethod
    def of(cls, spec: AttentionSpec, planes: PoolPlanes, lanes: Lanes | None = None) -> tuple[StoredHeads, StoredHeads]:
        """(keys, values)."""
        shape, is_cuda = (spec.num_kv_heads, spec.head_dim), lanes is not None and lanes.kind == "CUDA"
        return (
            cls(spec.kv.keys, *shape, planes.keys, planes.key_scales, is_cuda),
            cls(spec.kv.values, *shape, planes.values, planes.value_scales, is_cuda),
        )

    @property
    def planes(self) -> list[UOp]:
        return [self.codes] if self.scales is None else [self.codes, self.scales]

    def with_planes(self, planes: Sequence[UOp]) -> StoredHeads:
        """The same with other `planes`, such as these after some statement."""
        return replace(self, codes=planes[0], scales=planes[1] if len(planes) > 1 else None)

    def after(self, *done: UOp) -> StoredHeads:
        """The same, to be read after `done`."""
        return self.with_planes([plane.after(*done) for plane in self.planes])

    # -- places --------------------------------------------------------------------------------------------------------

    def element(self, slot: UOp, head: UOp | int, dim: UOp) -> UOp:
        """The index of an element of a pool in a dtype."""
        return slot * (self.num_heads * self.head_dim) + head * self.head_dim + dim

    def head(self, slot: UOp, head: UOp | int) -> UOp:
        """The number of a slot's head."""
        return slot * self.num_heads + head

    def word_at(self, head: UOp, dim: UOp | int) -> UOp:
        """The index of the word that holds element `dim` of a head (`head`) with the next ones: of 8 bits a multiple of
        4. Of 4 bits its low half holds the first 16 elements of a group, and its high half the others."""
        words = self.head_dim * self.form.bits // 32
        if self.form.bits == 8:
            return head * words + dim // QUAD
        return head * words + dim // self.form.group * QUAD + dim % Q4_HALF // QUAD

    def scale_at(self, head: UOp, dim: UOp | int) -> UOp:
        return head * (self.head_dim // self.form.group) + dim // self.form.group

    # -- loads ---------------------------------------------------------------------------------------------------------

    def words(self, head: UOp, dim: UOp | int, count: int) -> list[UOp]:
        """`count` words from the one of element `dim` on."""
        at = self.word_at(head, dim)
        if self.is_cuda:
            return load_cuda_words(self.codes, at, count)
        return [self.codes[at + i].load() for i in range(count)]

    def scale(self, head: UOp, dim: UOp | int) -> UOp | None:
        """The scale of the group of element `dim`, float16; None if the format has none."""
        return None if self.scales is None else self.scales[self.scale_at(head, dim)].load()

    def quads(self, head: UOp, dim: UOp, count: int) -> list[UOp]:
        """`count` quads, in neighboring words, from element `dim` on, which must all be in one half of a group."""
        words = self.words(head, dim, count)
        if self.form.bits == 8:
            return words
        shift = (dim // Q4_HALF % 2 * 4).cast(U32)
        return [word >> shift & NIBBLES for word in words]

    def floats(self, slot: UOp, head: UOp | int, dim: UOp, count: int) -> list[UOp]:
        """Elements [dim, dim + count) in float32: one, or quads."""
        if not self.form.is_quantized:
            return [self.codes[self.element(slot, head, dim) + i].load().cast(F32) for i in range(count)]
        place = self.head(slot, head)
        scale = self.scale(place, dim)
        wide = None if scale is None else scale.cast(F32)
        if count == 1:
            word = self.codes[self.word_at(place, dim)].load() >> (dim % QUAD * 8).cast(U32)
            word = word if self.form.bits == 8 else word >> (dim // Q4_HALF % 2 * 4).cast(U32) & NIBBLES
            return [_number(self.form, word, 0, wide)]
        quads = self.quads(place, dim, count // QUAD)
        return [_number(self.form, quad, i, wide) for quad in quads for i in range(QUAD)]

    def halves(self, slot: UOp, head: UOp | int, dim: UOp, lanes: Lanes, mma: Mma, count: int = PIECE) -> list[UOp]:
        """Elements [dim, dim + count) in float16, of a device whose pairs are two values (METAL)."""
        if not self.form.is_quantized:
            return [self.codes[self.element(slot, head, dim) + i].load() for i in range(count)]
        return [half for pair in self.pairs(slot, head, dim, lanes, mma, count) for half in pair]

    def pairs(self, slot: UOp, head: UOp | int, dim: UOp, lanes: Lanes, mma: Mma, count: int = PIECE) -> list[Pair]:
        """Elements [dim, dim + count), each and its neighbor as a pair. They are in one half of a group."""
        place = self.head(slot, head)
        scale = self.scale(place, dim)
        factor = None if scale is None else mma.both(scale)
        quads = self.quads(place, dim, count // QUAD)
        return [pair for quad in quads for pair in quad_pairs(self.form, quad, factor, lanes, mma)]


def _number(form: KVFormat, quad: UOp, index: int, scale: UOp | None) -> UOp:
    """The number, float32, of a quad's code."""
    byte = quad >> 8 * index if index else quad
    if scale is None:
        return e4m3_float(byte & 0xFF)
    if form.bits == 4:
        return ((byte & 0xF).cast(I32) - Q4_ZERO).cast(F32) * scale
    return (((byte & 0xFF) ^ 0x80).cast(I32) - 0x80).cast(F32) * scale


def e4m3_float(code: UOp) -> UOp:
    """The number, float32, of a code in the low byte of a word. Without subnormal float16, which OpenCL may lack."""
    size, mantissa = code & 0x7F, (code & 0x7).cast(I32).cast(F32)
    normal = ((size << 20) + (120 << 23)).bitcast(F32)
    number = (size < 8).where(mantissa * 2.0**-9, normal)
    return (code & 0x80).ne(0).where(number * -1.0, number)


# -- pairs -------------------------------------------------------------------------------------------------------------


def quad_pairs(form: KVFormat, quad: UOp, factor: UOp | None, lanes: Lanes, mma: Mma) -> list[Pair]:
    """A quad's numbers in float16: those of its low two bytes, and of its high ones. Without a scale the format is
    e4m3."""
    if factor is None:
        return e4m3_pairs(quad, lanes, mma)
    if form.bits == 8:
        quad = quad ^ SIGNS
    words = [mma.byte_pair(quad, which, HALF_PAIR >> 24) for which in range(2)]
    return [scaled_pair(mma.pair_of(word), zero_of(form), factor, mma) for word in words]


def zero_of(form: KVFormat) -> int:
    """What float16 of the codes of integers, in the mantissa of 1024, are for the number 0."""
    return IN_HALF + (Q4_ZERO if form.bits == 4 else 0x80)


def scaled_pair(pair: Pair, zero: int, factor: UOp, mma: Mma) -> Pair:
    """(pair - zero) * factor. The difference is exact."""
    return mma.fuse(mma.fuse(pair, mma.both(1.0), mma.both(-float(zero))), factor, None)


def e4m3_pairs(quad: UOp, lanes: Lanes, mma: Mma) -> list[Pair]:
    """The numbers, in float16, of four e4m3 codes."""
    if lanes.has_float8:
        return [(UOp(Ops.CUSTOM, U32, src=(quad,), arg=CONVERT_E4M3.format(shift)),) for shift in (0, 16)]
    pairs = []
    for which in range(2):
        word = mma.byte_pair(quad, which, 0)
        small = mma.pair_of((word & 0x00800080) << 8 | (word & 0x007F007F) << 7)
        pairs.append(mma.fuse(small, mma.both(E4M3_UNIT), None))
    return pairs


# -- stores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """Codes of some elements of a group."""

    form: KVFormat
    codes: list[UOp]  # uint32
    scale: UOp | None  # float16

    @property
    def numbers(self) -> list[UOp]:
        """What the codes stand for, in float16, as it is read back."""
        if self.scale is None:
            return [e4m3_float(code).cast(F16) for code in self.codes]
        zero = Q4_ZERO if self.form.bits == 4 else 0x80
        integers = self.codes if self.form.bits == 4 else [code ^ 0x80 for code in self.codes]
        return [(code.cast(I32) - zero).cast(F16) * self.scale for code in integers]

    def quads(self) -> list[UOp]:
        """The codes of each four elements as bytes of a word."""
        return [
            self.codes[i] | self.codes[i + 1] << 8 | self.codes[i + 2] << 16 | self.codes[i + 3] << 24
            for i in range(0, len(self.codes), QUAD)
        ]


def quantized(form: KVFormat, values: Sequence[UOp], largest_of: LargestOf | None = None) -> Codes:
    """Codes of elements of a group, float32. `largest_of`: the largest value of a function over the whole group, of
    which others may hold parts (None: nobody does)."""
    if not form.group:
        return Codes(form, [e4m3_code(value) for value in values], None)
    find = largest_of or (lambda fn: largest([fn(value) for value in values]))
    if form.bits == 8:
        extreme = find(lambda value: value.maximum(value * -1.0))
    else:
        extreme = farthest(find(lambda value: value), find(lambda value: value * -1.0) * -1.0)
    inverse = group_inverse(form, extreme)
    codes = [group_code(form, value, inverse).cast(U32) for value in values]
    return Codes(form, [code & 0xFF for code in codes] if form.bits == 8 else codes, group_scale(form, extreme))


def over_lanes(lanes: Lanes, values: Sequence[UOp], masks: Sequence[int]) -> LargestOf:
    """For `quantized`: the other elements of the group are in the lanes that `masks` connect."""
    return lambda fn: lanes.maximum(largest([fn(value) for value in values]), masks)


def exchange(lanes: Lanes, word: UOp, mask: int) -> UOp:
    """The word of the lane whose number differs in the bits of `mask`."""
    return lanes.shuffle(word.bitcast(F32), mask).bitcast(U32)


def store_run(
    lanes: Lanes, heads: StoredHeads, slot: UOp, head: UOp | int, dim: UOp, values: Sequence[UOp], wanted: UOp | None
) -> list[UOp]:
    """Stores of elements [dim, dim + 8) of a head, if `wanted` (None: always). Where they are quantized, lanes whose
    numbers differ in their lowest two bits must have the other parts of the group, in order."""
    form, place = heads.form, heads.head(slot, head)
    if not form.is_quantized:
        at = heads.element(slot, head, dim)
        places = [at + i if wanted is None else (at + i).valid(wanted) for i in range(len(values))]
        return [heads.codes[where].store(v.cast(heads.codes.dtype)) for where, v in zip(places, values, strict=True)]
    codes = quantized(form, values, over_lanes(lanes, values, (1, 2)))
    quads, is_writer = codes.quads(), wanted
    if form.bits == 4:
        quads = [quad | exchange(lanes, quad, 2) << 4 for quad in quads]
        is_low = (dim % form.group) < Q4_HALF
        is_writer = is_low if wanted is None else wanted & is_low
    at = heads.word_at(place, dim)
    places = [at + i if is_writer is None else (at + i).valid(is_writer) for i in range(len(quads))]
    stores = [heads.codes[where].store(quad) for where, quad in zip(places, quads, strict=True)]
    if codes.scale is not None and heads.scales is not None:
        leads = (dim % form.group).eq(0)
        leads = leads if wanted is None else wanted & leads
        stores.append(heads.scales[heads.scale_at(place, dim).valid(leads)].store(codes.scale))
    return stores
