"""One token row times a matrix of e4m3 codes on Hopper, which stream as in quantized_stream.py.

An instruction makes two float16 of two codes, and the matrix unit multiplies them by x in float16. A run of a slot is
multiplied by the token with the slot's number, and by zeros of the others, as in quantized_vector.py. Both sums that a
lane holds of a row are those of neighboring runs, which have one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.pairs import read_pairs
from tinyvllm.ops.formats.runs import group_of, group_scale
from tinyvllm.ops.gpu.plane_ring import SLOTS, RingWalk, Stage, number
from tinyvllm.ops.gpu.quantized_stream import StreamedRow, StreamedVectorSpec, row_kernel
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, RowPlace, StagedRow, stage_row
from tinyvllm.ops.gpu.vector import RowOperands
from tinyvllm.ops.kernel.body import KernelFn, cached_kernel
from tinyvllm.ops.kernel.lanes import load_cuda_words, zeros


@dataclass(frozen=True, kw_only=True)
class StreamedFloatSpec(StreamedVectorSpec):
    """A product of one row whose e4m3 codes stream through threadgroup memory."""

    @property
    def takes_format(self) -> bool:
        fmt = self.format
        has_plain_scale = fmt.scale is not None and not fmt.scale.has_steps and not fmt.scale.has_multiplier
        return fmt.is_float8 and has_plain_scale and fmt.minimum is None and fmt.group % (2 * PANEL) == 0

    @property
    def block(self) -> int:
        return self.knob("block", 1)

    @property
    def stages_ahead(self) -> int:
        """(NVIDIA H200, a step of Llama-3.1-8B, 8 layers: two 621 us, one 628.)"""
        return self.knob("stages_ahead", 2)

    def _shared_bytes(self, staged_run: int) -> int:
        return QuantizedVectorSpec._shared_bytes(self, staged_run)


@cached_kernel
def streamed_float_kernel(spec: StreamedFloatSpec) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands)."""

    def begin(place: RowPlace, walk: RingWalk, operands: RowOperands, x_out: UOp | None) -> _FloatRow:
        return _FloatRow(spec, place, walk, stage_row(spec, place, operands, x_out, [walk.begun], walk.hurry))

    return row_kernel(spec, begin)


class _FloatRow(StreamedRow[StagedRow]):
    """The product of codes as float16."""

    def _add_block(self, stage: Stage, block: UOp | int, old: list[UOp]) -> list[UOp]:
        spec, lane, new = self.spec, self.place.lane, list(old)
        rows = [self.walk.planes(stage, lane // 4 + 8 * half) for half in range(2)]
        for i in range(spec.block):
            local = block * spec.block + i
            sides = [self._multiply_runs(stage, rows, local, side) for side in range(2)]
            group = group_of(spec.format, number(local * SLOTS + lane % 4 * 2), 0)
            for half, planes in enumerate(rows):
                scale = group_scale(planes.scale, number(0), group, spec.format, spec.num_cols)
                scale = scale if spec.form.unit == 1.0 else scale * spec.form.unit
                first, second = (a + b for a, b in zip(*[sums[2 * half : 2 * half + 2] for sums in sides], strict=True))
                new[half] = new[half] + (first + second) * scale
        return new

    def _multiply_runs(self, stage: Stage, rows: list[Planes], local: UOp, side: int) -> list[UOp]:
        """A tile's sums of four of a chunk's runs, by the token with a run's number in the chunk."""
        spec, lane = self.spec, self.place.lane
        slot = lane % 4 + 4 * side
        codes = [read_pairs(planes, number(0), number(local * SLOTS + slot), 0, spec.mma) for planes in rows]
        after = () if spec.holds_x else (stage.waited,)
        run = (local + stage.part * spec.part_chunks) * SLOTS + slot
        at = (lane // 4).eq(slot).where(run, spec.num_runs) * spec.staged_run
        x = load_cuda_words(self.staged.x, at, PANEL // 2, *after)
        return spec.mma.multiply_words(self.place.body, codes, [x], zeros(4))
