"""Quantized keys and values of the CPU's attention: how they are written, and how a block of them is read.

Codes have the order of ops/cpu/attention.py, with bytes in place of elements: `[kv head][bytes of a head][block_size]`
of keys and `[kv head][block_size][bytes of a head]` of values. The scales of both are
`[kv head][groups][block_size]`, so that a block's tokens are vector lanes: a group's products with a key are added up
before they are scaled, and of values it is the weights that are scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from tinygrad import UOp, dtypes

from tinyvllm.config import KVFormat
from tinyvllm.ops.kernel.body import F32, I32, Body, fill
from tinyvllm.ops.kernel.kv_format import (
    E4M3_UNIT,
    Q4_ZERO,
    e4m3_code,
    e4m3_half,
    group_code,
    group_extreme,
    group_inverse,
    group_scale,
)

SUMS_AT_ONCE = 4  # groups of 32 sums that are added to in one pass over a block's values: 8 registers of AVX-512
PLAIN_GROUP = 32  # elements that are handled together in a format without groups


def group_size(form: KVFormat, dim: int) -> int:
    """Elements of a head that are handled together: those that share a scale."""
    return form.group or gcd(dim, PLAIN_GROUP)


def unit_of(form: KVFormat) -> float:
    """What `decode`'s values are multiplied by, besides their scale."""
    return 1.0 if form.group else E4M3_UNIT


def decode(form: KVFormat, code: UOp) -> list[UOp]:
    """The elements of a byte, float32, without their scale: one, or two that are half a group apart."""
    if form.name == "fp8_e4m3":
        return [e4m3_half(code.bitcast(dtypes.int8)).cast(F32)]
    if form.name == "q8_0":
        return [code.bitcast(dtypes.int8).cast(F32)]
    return [(half.cast(dtypes.int) - Q4_ZERO).cast(F32) for half in (code & 15, code >> 4)]


@dataclass(frozen=True)
class HeadPlace:
    """Where one head of a token goes in a block of keys or values: byte i of its codes to start + i * stride, the scale
    of group i to scale_start + i * block_size."""

    start: UOp
    stride: int
    scale_start: UOp
    block_size: int


def store_head(
    body: Body, form: KVFormat, head: UOp, dim: int, planes: tuple[UOp, UOp | None], place: HeadPlace
) -> UOp:
    """Stores of a head in registers, quantized. `planes`: codes and scales."""
    codes, scales = planes
    if form.group == 0:
        d = body.loop(dim)
        return codes[place.start + d * place.stride].store(e4m3_code(head[d].load()).cast(dtypes.uint8)).end(d)
    assert scales is not None
    group = body.loop(dim // form.group)
    values = [head[group * form.group + i].load() for i in range(form.group)]
    extreme = group_extreme(form, values)
    inverse = group_inverse(form, extreme)
    all_codes = [group_code(form, value, inverse) for value in values]
    if form.bits == 4:
        half = form.group // 2
        all_codes = [low | (high << 4) for low, high in zip(all_codes[:half], all_codes[half:], strict=True)]
    start = place.start + group * (len(all_codes) * place.stride)
    stores = [codes[start + i * place.stride].store(code.cast(dtypes.uint8)) for i, code in enumerate(all_codes)]
    scale = scales[place.scale_start + group * place.block_size].store(group_scale(form, extreme))
    return UOp.group(*stores, scale).end(group)


@dataclass(frozen=True)
class QuantizedBlock:
    """A block's keys or values of one KV head. `base`: the block's number times the KV heads, plus the head."""

    form: KVFormat
    codes: UOp
    scales: UOp | None
    base: UOp
    dim: int
    size: int  # tokens of a block

    @property
    def codes_start(self) -> UOp:
        return self.base * (self.form.code_bytes(self.dim) * self.size)

    def scale(self, group: UOp, token: UOp) -> UOp | None:
        """The scale of a token's group; None if the format has none."""
        if self.scales is None:
            return None
        return self.scales[(self.base * self.form.num_scales(self.dim) + group) * self.size + token].load().cast(F32)

    def elements(self, code: UOp, group: UOp, token: UOp) -> list[UOp]:
        """Those of a byte of a token's group, scaled."""
        scale, values = self.scale(group, token), decode(self.form, code)
        return values if scale is None else [value * scale for value in values]


def multiply_keys(body: Body, block: QuantizedBlock, query: UOp, sums: UOp, num_queries: int) -> UOp:
    """`sums` [G][block_size] plus the products of queries [G][D] with a block's keys, without the factor `unit_of`."""
    form, dim, size = block.form, block.dim, block.size
    group = body.fold(dim // group_size(form, dim))
    partial = sums if block.scales is None else fill(body, body.registers(num_queries * size), 0.0, sums, group)
    row_bytes = form.code_bytes(group_size(form, dim))
    i = body.fold(row_bytes)
    inner = partial.after(group, i) if block.scales is None else partial.after(i)
    first = group * group_size(form, dim) + i
    queries = [
        [query[g * dim + first + half * row_bytes].load() for half in range(8 // form.bits)] for g in range(num_queries)
    ]
    x = body.loop(size)
    keys = decode(form, block.codes[block.codes_start + (group * row_bytes + i) * size + x].load())
    stores = []
    for g in range(num_queries):
        total = inner[g * size + x].load()
        for key, q in zip(keys, queries[g], strict=True):
            total = total + key * q
        stores.append(inner[g * size + x].store(total))
    done = UOp.group(*stores).end(x, i)
    if block.scales is None:
        return sums.after(done.end(group))
    partial, target = partial.after(done), sums.after(group)
    x = body.loop(size)
    scale = block.scale(group, x)
    stores = [
        target[g * size + x].store(target[g * size + x].load() + partial[g * size + x].load() * scale)
        for g in range(num_queries)
    ]
    return sums.after(UOp.group(*stores).end(x, group))


def stage_keys(body: Body, block: QuantizedBlock, staged: UOp, start: UOp) -> UOp:
    """The stores of a block's keys as float32 [D][block_size] from `start`, without the factor `unit_of`."""
    form, dim, size = block.form, block.dim, block.size
    unit = group_size(form, dim)
    row_bytes = form.code_bytes(unit)
    group, i, x = body.loop(dim // unit), body.loop(row_bytes), body.loop(size)
    code = block.codes[block.codes_start + (group * row_bytes + i) * size + x].load()
    first = start + (group * unit + i) * size + x
    stores = [
        staged[first + half * (row_bytes * size)].store(value)
        for half, value in enumerate(block.elements(code, group, x))
    ]
    return UOp.group(*stores).end(x, i, group)


def stage_values(body: Body, block: QuantizedBlock, staged: UOp, start: UOp, last: UOp) -> UOp:
    """The stores of a block's values as float32 [block_size][D] from `start`, without the factor `unit_of`. Tokens
    after `last` take its value."""
    form, dim, size = block.form, block.dim, block.size
    token, unit = body.loop(size), group_size(form, dim)
    own, row_bytes = token.cast(I32).minimum(last), form.code_bytes(unit)
    group, i = body.loop(dim // unit), body.loop(row_bytes)
    code = block.codes[block.codes_start + own * form.code_bytes(dim) + group * row_bytes + i].load()
    first = start + token * dim + group * unit + i
    stores = [
        staged[first + half * row_bytes].store(value) for half, value in enumerate(block.elements(code, group, own))
    ]
    return UOp.group(*stores).end(i, group, token)


def scale_weights(body: Body, block: QuantizedBlock, weights: UOp, last: UOp, num_queries: int, loop: UOp) -> UOp:
    """The weights [G][groups][block_size] of each group of a block's values, times its scale; of tokens after `last`,
    whose scales may be NaN, 0."""
    size, num_groups = block.size, block.form.num_scales(block.dim)
    scaled = body.registers(num_queries * num_groups * size)
    target = scaled.after(loop)
    group, x = body.loop(num_groups), body.loop(size)
    scale = (x <= last).where(block.scale(group, x), 0.0)
    stores = [
        target[(g * num_groups + group) * size + x].store(weights[g * size + x].load() * scale)
        for g in range(num_queries)
    ]
    return scaled.after(UOp.group(*stores).end(x, group))


def add_values(body: Body, block: QuantizedBlock, acc: UOp, weights: UOp, num_queries: int, done: UOp) -> UOp:
    """The stores that add a block's values to `acc` [G][D], after `done`, by weights [G][block_size], or those of
    `scale_weights`; without the factor `unit_of`."""
    num_groups = block.dim // group_size(block.form, block.dim)
    step = max(1, SUMS_AT_ONCE // num_queries)
    for first_query in range(0, num_queries, SUMS_AT_ONCE):
        queries = range(first_query, min(num_queries, first_query + SUMS_AT_ONCE))
        for first in range(0, num_groups, step):
            groups = range(first, min(num_groups, first + step))
            done = _add_groups(body, block, acc, weights, (queries, groups), done)
    return done


def _add_groups(
    body: Body,
    block: QuantizedBlock,
    acc: UOp,
    weights: UOp,
    part: tuple[Sequence[int], Sequence[int]],
    done: UOp,
) -> UOp:
    """`add_values` of some queries and groups."""
    form, size, unit = block.form, block.size, group_size(block.form, block.dim)
    (queries, groups), num_groups, row_bytes = part, block.dim // unit, form.code_bytes(unit)
    token = body.fold(size)
    inner, read = acc.after(done, token), weights.after(done)
    lane, stores = body.loop(row_bytes), []
    for group in groups:
        at = block.codes_start + token * form.code_bytes(block.dim) + group * row_bytes + lane
        values = decode(form, block.codes[at].load())
        for g in queries:
            place = (g * num_groups + group) * size + token if form.group else g * size + token
            weight = read[place].load()
            for half, value in enumerate(values):
                d = g * block.dim + group * unit + half * row_bytes + lane
                stores.append(inner[d].store(inner[d].load() + value * weight))
    return UOp.group(*stores).end(lane, token)
