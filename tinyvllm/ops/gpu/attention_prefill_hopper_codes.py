"""Prompts over quantized keys and values on Hopper: four warps unpack codes into the stages that the others multiply.

The same as attention_prefill_hopper.py, but for who fills the stages. A thread that unpacks copies its codes to a place
of its own in threadgroup memory, a tile ahead, so that it waits for nobody; then it stores them as float16 where the
copy engine would have, swizzled. A tile of 128 keys and as many values is 256 numbers for each of 128 threads, about
700 instructions of a warp in the 3,100 cycles that the tile's products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu.attention_prefill_codes import UNIT_WORDS, Unit, unit_dims, unit_pieces
from tinyvllm.ops.gpu.attention_prefill_hopper import HopperTile, swizzled_place
from tinyvllm.ops.gpu.attention_prefill_inputs import ROW_BYTES, PrefillSpec
from tinyvllm.ops.gpu.kv_codes import StoredHeads
from tinyvllm.ops.kernel.body import F16, I32, U32
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    WGMMA_COLS,
    arrive,
    publish_stores,
    statement,
    store_words,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, WORDS
from tinyvllm.ops.kernel.tiles import PIECE, commit
from tinyvllm.ops.kernel.tiles import WAIT as ARRIVED

UNIT_BYTES = UNIT_WORDS * 4
THREADS = GROUP_WARPS * LANES  # that unpack
COPY_UNIT = (
    'asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared + {0}), "l"({1}), "r"({2}) : "memory");'
)
READ_UNIT = (
    '[&]{{ uint4 r; asm volatile("ld.shared.v4.u32 {{%0, %1, %2, %3}}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), '
    '"=r"(r.w) : "r"(shared + {0}) : "memory"); return r; }}()'
)


class UnpackingTile(HopperTile):
    """Keys and values are both quantized, perhaps in different formats."""

    num_described: ClassVar[int] = 1  # the queries

    def __init__(
        self,
        spec: PrefillSpec,
        pool: tuple[StoredHeads, StoredHeads],
        maps: UOp,
        tiles: UOp,
        order: UOp,
        inputs: UOp,
        operands: Sequence[UOp],
    ) -> None:
        """`operands`: perhaps the sinks, and then the queries."""
        super().__init__(spec, maps, tiles, order, inputs, operands)
        self.pool = pool
        self.unpacker = self.thread % THREADS

    @property
    def fillers(self) -> int:
        return GROUP_WARPS

    def described_places(self) -> list[UOp]:
        return [*super().described_places(), *[plane[0] for heads in self.pool for plane in heads.planes]]

    # -- places --------------------------------------------------------------------------------------------------------

    def _units(self, is_value: int) -> list[tuple[UOp, UOp]]:
        """(key of the tile, dimension) of each of the thread's units of a tile. Eight neighboring threads store to
        different banks."""
        spec, dims = self.spec, unit_dims(self.pool[is_value].form)
        per_row, units = WGMMA_COLS // dims, []
        count = spec.keys * spec.head_dim // dims
        for start in range(0, count, THREADS):
            item = start + self.unpacker
            if start + THREADS > count:  # some threads do the last ones again
                item = item.minimum(count - 1)
            row, tile = item // per_row % spec.keys, item // (per_row * spec.keys)
            units.append((row, tile * WGMMA_COLS + item % per_row * dims))
        return units

    def _staged(self, is_value: int, index: int) -> UOp:
        """Where the thread's codes of a unit are, in bytes."""
        spec = self.spec
        before = len(self._units(0)) if is_value else 0
        start = spec.shared_bytes - spec.staging_bytes
        return self.unpacker * UNIT_BYTES + (start + (before + index) * (THREADS * UNIT_BYTES))

    # -- the warps that unpack -----------------------------------------------------------------------------------------

    @property
    def _fetches(self) -> UOp:
        return uniform((self.role < self.spec.num_warps).where(UOp.const(0, I32), 1))

    def _fetch_tiles(self, ready: UOp) -> UOp:
        """Unpack all tiles of keys and values in order, each as soon as its stage is empty."""
        ended = statement(ARRIVED % 0, ready)  # the copies ahead of the piece before, to the same places
        begun = self._copy(1, 0, self._copy(0, 0, ended))
        loop, last = self._loop_tiles(uniform(self.steps), begun)
        for is_value in range(2):
            last = self._unpack(is_value, loop, last)
            last = self._copy(is_value, loop + 1, last)
        return last.end(loop)

    def _slot(self, step: UOp | int, row: UOp) -> tuple[UOp, UOp]:
        return self.key_slot((self.begin + step) * self.spec.keys + row)

    def _copy(self, is_value: int, step: UOp | int, last: UOp) -> UOp:
        """Start to copy the thread's codes of a tile; zeros outside the context and the window."""
        heads = self.pool[is_value]
        for i, (row, dim) in enumerate(self._units(is_value)):
            slot, wanted = self._slot(step, row)
            source = heads.codes[heads.word_at(heads.head(slot, self.kv_head), dim)]
            size = wanted.where(UOp.const(UNIT_BYTES, I32), 0)
            last = statement(COPY_UNIT, self._staged(is_value, i), source, size, UOp.const(0.0, F16), last)
        return commit(last)

    def _unpack(self, is_value: int, step: UOp, last: UOp) -> UOp:
        """Convert the thread's codes of a tile into its stage."""
        spec, heads, units = self.spec, self.pool[is_value], self._units(is_value)
        scales = [self._scale(heads, step, *unit) for unit in units] if heads.form.group else [None] * len(units)
        place, full, empty, parity = self._stage(step, is_value)
        arrived = statement(ARRIVED % 1, last, *[scale for scale in scales if scale is not None])
        last = wait(empty, 1 - parity, arrived)
        read = [UOp(Ops.CUSTOM, WORDS, src=(self._staged(is_value, i), last), arg=READ_UNIT) for i in range(len(units))]
        for (row, dim), four, scale in zip(units, read, scales, strict=True):
            words = [UOp(Ops.CUSTOMI, U32, src=(four,), arg=f"{{0}}.{name}") for name in "xyzw"]
            for at, piece in unit_pieces(spec, Unit(heads.form, dim, words, scale)):
                target = place + at // WGMMA_COLS * (spec.keys * ROW_BYTES)
                target = target + swizzled_place(row, at % WGMMA_COLS // PIECE)
                last = store_words(target, piece, last)
        return arrive(full, self.lane.eq(0), publish_stores(last))

    def _scale(self, heads: StoredHeads, step: UOp, row: UOp, dim: UOp) -> UOp:
        """A unit's scale; 0 outside the context and the window."""
        slot, wanted = self._slot(step, row)
        scale = heads.scale(heads.head(slot, self.kv_head), dim)
        assert scale is not None
        return wanted.where(scale, UOp.const(0.0, F16))

    def clear_outside(self, values: UOp, last: UOp, here: UOp) -> UOp:
        """Nothing is to be cleared: what lies outside the context was unpacked as zeros."""
        return here
