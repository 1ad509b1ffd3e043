"""A token row's heads in threadgroup memory, for the decode kernel: its query heads, its key and its value.

All threads share the work: each loads, norms, rotates and rounds some runs of eight dimensions. If each warp did so for
itself, as many instructions would precede its scores as follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES
from tinyvllm.ops.gpu.attention_decode_row import Buffers, DecodeSpec, Row
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.kernel.body import F16, F32, balanced
from tinyvllm.ops.kernel.lanes import LANES, load_cuda_floats, load_cuda_vectors, load_floats, words_of_vectors
from tinyvllm.ops.kernel.tiles import pack_words, store_vector, together


@dataclass(frozen=True)
class StagedHeads:
    """The heads, float16, as runs that the matrix unit takes: queries, then the key and the value."""

    spec: DecodeSpec
    memory: UOp

    def words(self, head: UOp | int, dim: UOp) -> list[UOp]:
        """Four words of dimensions [dim, dim + 8) of a head."""
        return words_of_vectors(load_cuda_vectors(self.memory, head * self.spec.staged_stride + dim, RUN))

    def value(self, dim: UOp) -> UOp:
        """A dimension of the row's value."""
        return self.memory[(self.spec.tile_heads + 1) * self.spec.staged_stride + dim].load().cast(F32)


class HeadStage:
    """The thread's runs of the row's heads."""

    def __init__(self, row: Row) -> None:
        self.row, self.spec, spec = row, row.spec, row.spec
        self.heads = spec.tile_heads + (2 if spec.adds_own else 0)
        per_head, threads = spec.head_dim // RUN, spec.num_warps * LANES
        count = self.heads * per_head
        self.runs = []
        for start in range(0, count, threads):
            index = row.group.thread + start
            inside = index < count
            index = inside.where(index, 0)
            self.runs.append(_Run(row, index // per_head, index % per_head * RUN, inside))

    @property
    def ahead(self) -> list[UOp]:
        """What may be loaded before the wait."""
        return [value for run in self.runs for value in run.ahead]

    def store(self, buffers: Buffers) -> StagedHeads:
        """The heads, after the wait; the row's key and value are written to the pool, too."""
        spec, stores = self.spec, []
        memory = self.row.group.body.shared(self.heads * spec.staged_stride, F16)
        for run in self.runs:
            values = run.values()
            words = [pack_words(values[i], values[i + 1]) for i in range(0, RUN, 2)]
            stores.append(store_vector(memory[run.head * spec.staged_stride + run.dim], words, run.inside))
            if spec.adds_own:
                stores += run.writes(buffers, words)
        return StagedHeads(spec, memory.after(UOp(Ops.BARRIER, src=(together(*stores),))))


class _Run:
    """Dimensions [dim, dim + 8) of one of the heads."""

    def __init__(self, row: Row, head: UOp, dim: UOp, inside: UOp) -> None:
        self.row, self.spec, self.head, self.dim, self.inside = row, row.spec, head, dim, inside
        count = row.spec.tile_heads
        self.is_query, self.is_value = head < count, head.eq(count + 1)
        self.sections = [QUERIES, *([KEYS, VALUES] if row.spec.adds_own else [])]

    def _is_in(self, section: int) -> UOp:
        return (self.is_query, self.head.eq(self.spec.tile_heads), self.is_value)[section]

    def _chosen(self, by_section: dict[int, UOp]) -> UOp:
        """The value of the run's section; if it has none, that of another one."""
        sections = list(by_section)
        found = by_section[sections[0]]
        for section in sections[1:]:
            found = self._is_in(section).where(by_section[section], found)
        return found

    def _head_in(self, section: int) -> UOp | int:
        """The number of the head in its section."""
        row, count = self.row, self.spec.tile_heads
        return row.group.heads * count + self.head % count if section == QUERIES else row.group.kv_head

    def _loaded(self, dim: UOp) -> list[UOp]:
        """Eight dimensions of the head, with their biases."""
        spec, row = self.spec, self.row
        parts: dict[int, dict[int, UOp]] = {}
        for section in self.sections:
            part, start = spec.section(section)
            parts.setdefault(part, {})[section] = start + self._head_in(section) * spec.head_dim + dim
        found = []
        for part, columns in parts.items():
            at, cols, tokens = self._chosen(columns), spec.qkv_cols[part], spec.layout.num_tokens
            partials = [
                load_cuda_floats(row.qkv[part], (row.group.row + s * tokens) * cols + at, RUN)
                for s in range(spec.qkv_partials[part])
            ]
            found.append((list(columns), [balanced(column) for column in zip(*partials, strict=True)]))
        values = [
            self._chosen({section: loaded[i] for sections, loaded in found for section in sections}) for i in range(RUN)
        ]
        biases = self._biases(dim)
        return values if biases is None else [a + b for a, b in zip(values, biases, strict=True)]

    def _biases(self, dim: UOp) -> list[UOp] | None:
        bias, spec = self.row.tables.bias, self.spec
        if bias is None:
            return None
        starts = {s: spec.bias_start(s) + self._head_in(s) * spec.head_dim + dim for s in self.sections}
        return load_floats(bias, self._chosen(starts), RUN)

    def _norm_weights(self, dim: UOp) -> list[UOp] | None:
        norm = self.row.tables.head_norm
        if norm is None:
            return None
        return load_floats(norm, self.is_query.where(QUERIES, KEYS) * self.spec.head_dim + dim, RUN)

    def _factor(self, values: Sequence[UOp], eps: float) -> UOp:
        total = balanced(value * value for value in values)
        masks = [1 << i for i in range((self.spec.head_dim // RUN).bit_length() - 1)]
        return (self.spec.lanes.sum(total, masks) * (1.0 / self.spec.head_dim) + eps).sqrt().reciprocal()

    @property
    def ahead(self) -> list[UOp]:
        """What may be loaded before the wait."""
        found: list[UOp] = []
        dims = [self.dim]
        if self.row.tables.rope is not None:
            factors = self.spec.rope_factors(self.row.tables.rope, self.row.past, self.dim)
            found += [factor for values in factors for factor in values]
            if (partner := self.spec.partner_dim(self.dim)) is not None:
                dims.append(partner)
        for dim in dims:
            found += [*(self._biases(dim) or []), *(self._norm_weights(dim) or [])]
        return found

    def values(self) -> list[UOp]:
        """Float32: queries and keys normed and rotated, values normed, if the model does so."""
        spec, plain = self.spec, self._loaded(self.dim)
        factor = None if spec.head_eps is None else self._factor(plain, spec.head_eps)

        def normed(dim: UOp) -> list[UOp]:
            loaded, weights = plain if dim is self.dim else self._loaded(dim), self._norm_weights(dim)
            if factor is None or weights is None:
                return loaded
            return [value * factor * weight for value, weight in zip(loaded, weights, strict=True)]

        rope = self.row.tables.rope
        found = normed(self.dim) if rope is None else spec.rotated_run(rope, self.row.past, self.dim, normed)
        if not spec.adds_own:
            return found
        if spec.value_eps is not None:
            factor = self._factor(plain, spec.value_eps)
            plain = [value * factor for value in plain]
        return [self.is_value.where(value, other) for value, other in zip(plain, found, strict=True)]

    def writes(self, buffers: Buffers, words: Sequence[UOp]) -> list[UOp]:
        """Stores of a key's run and of a value's."""
        is_writer, place = self.inside & self.row.group.writes_own, self.row.own_start + self.dim
        return [
            store_vector(heads.codes[place], words, is_writer & self._is_in(section))
            for section, heads in ((KEYS, buffers.keys), (VALUES, buffers.values))
        ]
