"""One threadgroup's attention on Hopper: wgmma multiplies tiles in threadgroup memory."""

from __future__ import annotations

from typing import TypeVar

from tinygrad import UOp, dtypes

from tinyvllm.ops.gpu.attention_prefill_inputs import ROW_BYTES
from tinyvllm.ops.gpu.attention_prefill_tile import AttentionTile, Walk
from tinyvllm.ops.kernel.body import balanced
from tinyvllm.ops.kernel.hopper import (
    WGMMA_TOKENS,
    arrive_copies,
    copy_async,
    declare,
    multiply_wgmma,
    read_sums,
    store_words,
    weigh_wgmma,
)
from tinyvllm.ops.kernel.lanes import zeros
from tinyvllm.ops.kernel.tiles import PIECE, PTX_NAMES, commit, pack_words, quick_exp2, quick_maximum, together

Number = TypeVar("Number", int, UOp)


class HopperTile(AttentionTile):
    """The same with wgmma: two groups of four warps, each with 64 rows, whose scores and sums are in the registers of
    the instructions.

    Rows of queries, keys and values are 128 bytes, swizzled as the instructions expect them."""

    def attend(self) -> tuple[list[UOp], list[UOp]]:
        spec, body = self.spec, self.body
        memory = declare(spec.shared_bytes)
        begin = self.begin
        primed = (self._put_queries(memory), self._copy(begin % 2, self.key_slots(begin * spec.keys), memory))
        stats, sums = body.registers(4), body.registers(spec.head_dim // 8 * 4)  # two rows' maxima and totals
        init = self.initial_stats()
        stats = stats.after(UOp.group(*[stats.after(*self.axes)[i].store(value) for i, value in enumerate(init)]))
        zeroed = [sums.after(*self.axes)[i].store(value) for i, value in enumerate(zeros(sums.max_numel()))]
        sums = sums.after(UOp.group(*zeroed))
        for walk in self.walks():
            stats, sums = self._walk_wgmma(walk, stats, sums, primed)
        totals = [spec.lanes.sum(stats[2 + row].load(), spec.mma.row_masks) for row in range(2)]
        return totals, [sums[i].load() for i in range(sums.max_numel())]

    def _put_queries(self, memory: UOp) -> UOp:
        """The tile's queries, rotated and scaled, in threadgroup memory."""
        spec, half = self.spec, self.spec.head_dim // 2
        per_row, last = half // PIECE, memory
        for start in range(0, spec.rows * per_row, self.threads):
            item = start + self.thread
            row, dim = item // per_row, item % per_row * PIECE
            for run, at in zip(self.scaled_queries(row, dim), (dim, dim + half), strict=True):
                words = [pack_words(*run[i : i + 2]) for i in range(0, PIECE, 2)]
                last = store_words(swizzled_place(row, at // PIECE), words, last)
        return last

    def _copy(self, stage: UOp | int, slots: list[tuple[UOp, UOp]], *after: UOp) -> UOp:
        """Begin to copy a tile of keys and values to a stage, zeros outside the context."""
        spec, per_key, last = self.spec, self.spec.head_dim // PIECE, list(after)
        base = self._stage(stage)
        for start, (slot, wanted) in zip(range(0, spec.keys * per_key, self.threads), slots, strict=True):
            item = start + self.thread
            place, source = swizzled_place(item // per_key, item % per_key), self.source(slot, item % per_key * PIECE)
            last = [copy_async(base + place, self.keys[source], wanted, *last)]
            last = [copy_async(base + spec.keys * ROW_BYTES + place, self.values[source], wanted, *last)]
        return commit(*last)

    def _stage(self, stage: UOp | int) -> UOp | int:
        """The byte where a stage begins, after the queries."""
        return stage * (2 * self.spec.keys * ROW_BYTES) + self.spec.rows * ROW_BYTES

    def _walk_wgmma(self, walk: Walk, stats: UOp, sums: UOp, primed: tuple[UOp, ...]) -> tuple[UOp, UOp]:
        """(maxima and sums of weights, sums of values) after a walk."""
        spec, type_name = self.spec, PTX_NAMES[self.mma.mma.dtype]
        loop = self.body.fold_while(walk.count)
        step = (loop.cast(dtypes.weakint) + walk.first).minimum(self.step.positions // spec.keys)  # 32 bits wide
        first_key = step * spec.keys
        slots = self.key_slots(first_key + spec.keys)
        arrived = arrive_copies(loop, *primed, *[slot for slot, _ in slots])
        begun = self._copy((step + 1) % 2, slots, arrived)
        keys = self._stage(step % 2)
        scores = self.body.registers(spec.keys // 8 * 4)
        rows = self.warp // 4 * (WGMMA_TOKENS * ROW_BYTES)
        scored = multiply_wgmma(type_name, rows, keys, scores.after(loop), 0, arrived, begun, is_fresh=True)
        values = read_sums(scores, scored)
        values = [spec.score(value, lambda x: quick_exp2(x, self.mma)) for value in values]
        blocks = [values[i : i + 4] for i in range(0, len(values), 4)]
        if not walk.is_whole:
            blocks = [self._masked(block, 0, first_key + i * 8) for i, block in enumerate(blocks)]
        old = [stats.after(loop)[i].load() for i in range(4)]
        new, decays, weights = self._weigh_rows(blocks, old)
        scaled = [
            sums.after(loop)[i].store(sums.after(loop)[i].load() * decays[i % 4 // 2]) for i in range(sums.max_numel())
        ]
        pairs = [[pack_words(*block[e : e + 2]) for e in (0, 2)] for block in weights]
        words = [[*pairs[i], *pairs[i + 1]] for i in range(0, len(pairs), 2)]
        weighed = weigh_wgmma(type_name, words, keys + spec.keys * ROW_BYTES, sums.after(UOp.group(*scaled)), begun)
        kept = UOp.group(*[stats.after(loop)[i].store(value) for i, value in enumerate(new)])
        done = together(weighed, begun, kept).end(loop)
        return stats.after(done), sums.after(done)

    def _weigh_rows(self, scores: list[list[UOp]], old: list[UOp]) -> tuple[list[UOp], list[UOp], list[list[UOp]]]:
        """(the two rows' new maxima and sums of weights, factors by which earlier sums decay, the scores' weights)."""
        spec, mma = self.spec, self.mma
        best, decays, totals = [], [], []
        for row in range(2):
            values = [value for block in scores for value in block[2 * row : 2 * row + 2]]
            top = balanced(values, lambda a, b: quick_maximum(a, b, mma))
            best.append(old[row].maximum(spec.lanes.maximum(top, spec.mma.row_masks)))
            decays.append(quick_exp2(old[row] - best[row], mma))
        weights = [[quick_exp2(value - best[e // 2], mma) for e, value in enumerate(block)] for block in scores]
        for row in range(2):
            added = balanced([value for block in weights for value in block[2 * row : 2 * row + 2]])
            totals.append(old[2 + row] * decays[row] + added)
        return [*best, *totals], decays, weights


def swizzled_place(row: Number, piece: Number) -> Number:
    """The byte where a piece of 16 bytes of a row lies in one of Hopper's tiles."""
    return row * ROW_BYTES + (piece ^ (row % 8)) % 8 * (PIECE * 2)  # % 8: tinygrad does not know how large an xor gets
