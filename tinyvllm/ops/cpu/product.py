"""The inner loops of the CPU's products: rows of x against panels of 32 rows of a matrix, in any format.

Each lane adds up its products in the order of k, so a row's result depends on neither its neighbors nor the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import arithmetic
from tinyvllm.ops.cpu.shuffle import LookedUp, look_up_run, lookup_of
from tinyvllm.ops.formats.matrix import PANEL, Planes, code_lanes, high_bits, panel_unit
from tinyvllm.ops.kernel.body import Body, balanced, exp2, fill

STAGED_ROWS = 16  # up to this many input rows are copied to the kernel's stack and normalized there; more by rms_norm
NORM_LANES = 16
CPU_ARITHMETIC = arithmetic(exp2)


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm of T rows of K columns."""

    num_tokens: int  # T
    num_cols: int  # K
    eps: float
    x_cols: tuple[int, ...] = ()  # as in LinearSpec


@dataclass(frozen=True)
class Shard:
    """Columns [start, start + width) of an input, (T, width) in a buffer: those of one core."""

    buffer: UOp
    start: int
    width: int
    stride: int = 0  # columns of the buffer's rows, if they are more than `width`
    first: UOp | int = 0  # the column of the buffer's rows at which these begin

    def at(self, row: UOp, col: UOp) -> UOp:
        """Index of a column counted from `start`."""
        return row * (self.stride or self.width) + self.first + col


def take_shards(operands: list[UOp], x_cols: tuple[int, ...], num_cols: int) -> list[Shard]:
    """An input's shards, removed from the front of the operands."""
    shards, start = [], 0
    for width in x_cols or (num_cols,):
        shards.append(Shard(operands.pop(0), start, width))
        start += width
    return shards


def stage_rows(body: Body, x: list[Shard], num_tokens: int, norm: NormSpec | None, norm_weight: UOp | None) -> Shard:
    """Copy x (T, K) to the stack, normed if there is a norm: x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019)."""
    tokens, cols = num_tokens, sum(shard.width for shard in x)
    staged = body.registers(tokens * cols)
    copies = []
    for shard in x:
        row, col = body.loop(tokens), body.loop(shard.width)
        value = shard.buffer[shard.at(row, col)].load()
        copies.append(staged[row * cols + shard.start + col].store(value).end(col, row))
    staged = staged.after(UOp.group(*copies))
    if norm is None or norm_weight is None:
        return Shard(staged, 0, cols)
    token = body.loop(tokens)
    scale = rms_scale(body, [Shard(staged, 0, cols)], token, norm)
    col = body.loop(cols)
    target = staged.after(scale)
    normed = target[token * cols + col] * scale[0] * norm_weight[col]
    return Shard(staged.after(target[token * cols + col].store(normed).end(col).end(token)), 0, cols)


def rms_scale(body: Body, x: list[Shard], token: UOp, spec: NormSpec, loop: UOp | None = None) -> UOp:
    """A register with 1 / sqrt(mean(x[token]^2) + eps). `loop`: the one around it, if it is not `token`."""
    around = token if loop is None else loop
    sums = fill(body, body.registers(NORM_LANES), 0.0, around, *[shard.buffer for shard in x])
    for shard in x:
        k = body.fold(shard.width // NORM_LANES)
        inner = sums.after(k)
        values = [shard.buffer[shard.at(token, k * NORM_LANES + lane)].load() for lane in range(NORM_LANES)]
        sums = sums.after(UOp.group(*[inner[i].store(inner[i] + v * v) for i, v in enumerate(values)]).end(k))
    total = balanced(sums[i].load() for i in range(NORM_LANES))
    scale = body.registers(1)
    return scale.after(scale.after(around)[0].store((total * (1.0 / spec.num_cols) + spec.eps).sqrt().reciprocal()))


@dataclass(frozen=True)
class Product:
    """Some rows of x times a panel: 32 sums for each row. Weights are unpacked in registers and used at once."""

    body: Body
    format: Format
    num_cols: int  # K of the matrix
    planes: Planes
    panel: UOp
    rows: Sequence[UOp]  # of x

    def add_shards(self, acc: UOp, x: Sequence[Shard]) -> UOp:
        """The registers `acc` [rows][32], after the product of all shards of x was added to them."""
        for shard in x:
            acc = acc.after(self.add_shard(acc, shard))
        return acc

    def add_shard(self, acc: UOp, x: Shard) -> UOp:
        """Add the product of a shard of x."""
        return self._add_groups(acc, x) if self.format.is_quantized else self._add(acc, x)

    def _add(self, acc: UOp, x: Shard) -> UOp:
        """Add the product of a shard of x with dense weights."""
        k = self.body.fold(x.width)
        return self._multiply(acc.after(k), x, k).end(k)

    def _add_groups(self, acc: UOp, x: Shard) -> UOp:
        """The same with quantized weights: first the codes' products by group, which are then scaled. So a weight costs
        one multiply-add, and its scale 1 / group."""
        body, fmt, rows, width = self.body, self.format, len(self.rows), self.format.code_cols
        size = math.gcd(fmt.group, x.start, x.width)  # less than a group if a shard of x ends inside one
        step = body.fold(x.width // size)
        group = step + x.start // size if size == fmt.group else (step * size + x.start) // fmt.group
        dots = fill(body, body.registers(rows * PANEL), 0.0, acc, step)
        k = body.fold(size // width)
        col = step * size + k * width
        multiply = self._multiply if fmt.grid is None else self._multiply_vectors
        stores = [multiply(dots.after(k), x, col)]
        total = body.registers(rows)  # the sum of x over the group
        if fmt.needs_input_sum:
            total = fill(body, total, 0.0, acc, step)
            inner = total.after(k)
            for r, row in enumerate(self.rows):
                values = [x.buffer[x.at(row, col + i)].load() for i in range(width)]
                stores.append(inner[r].store(sum(values, inner[r].load())))
        done = UOp.group(*stores).end(k)
        return self._add_scaled(acc.after(step, done), dots.after(done), total.after(done), group, step)

    def _add_scaled(self, acc: UOp, dots: UOp, total: UOp, group: UOp, step: UOp) -> UOp:
        """acc += scale * (dots - offset * total) + minimum * total; ends the loop `step`."""
        fmt = self.format
        lane = self.body.loop(PANEL)
        scale = self.planes.panel_factor("scale", self.panel, group, lane, self.num_cols)
        lookup = lookup_of(fmt)
        unit = panel_unit(fmt) if lookup is None else lookup.unit
        scale = scale if unit == 1.0 else scale * unit
        minimum = None
        if self.planes.minimum is not None:
            minimum = self.planes.panel_factor("minimum", self.panel, group, lane, self.num_cols)
        stores = []
        for r in range(len(self.rows)):
            dot = dots[r * PANEL + lane].load()
            if fmt.offset:
                dot = dot - total[r].load() * float(fmt.offset)
            dot = dot * scale
            if minimum is not None:
                dot = dot + total[r].load() * minimum
            stores.append(acc[r * PANEL + lane].store(acc[r * PANEL + lane].load() + dot))
        return UOp.group(*stores).end(lane, step)

    def _multiply(self, acc: UOp, x: Shard, col: UOp) -> UOp:
        """acc[r][lane] += code[lane] * x[r] for one column, counted from the shard's start."""
        values = [x.buffer[x.at(row, col)].load() for row in self.rows]
        lanes = code_lanes(self.format)
        looked_up = self._looked_up(acc, col + x.start)
        if looked_up is not None:
            lanes = PANEL
        lane = self.body.loop(lanes)
        stores = []
        for part in range(PANEL // lanes):
            if looked_up is None:
                code = self.planes.panel_code(self.panel, col + x.start, lane, self.num_cols, part)
            else:
                code = looked_up[lane]
            for r, value in enumerate(values):
                at = r * PANEL + part * lanes + lane
                stores.append(acc[at].store(acc[at].load() + code * value))
        return UOp.group(*stores).end(lane)

    def _looked_up(self, acc: UOp, col: UOp) -> LookedUp | None:
        """What one column's codes stand for, if a shuffle can look them up."""
        lookup = lookup_of(self.format)
        if lookup is None:
            return None
        run = (self.panel * self.num_cols + col) * code_lanes(self.format)
        return look_up_run(self.body.registers(PANEL).after(acc), lookup, self.planes.codes[run])

    def _multiply_vectors(self, acc: UOp, x: Shard, col: UOp) -> UOp:
        """The same for the columns of one code of a grid, by parts of the lanes whose codes' high bits share a word."""
        body, parts = self.body, max(1, high_bits(self.format))
        width, lane = self.format.code_cols, body.loop(PANEL // parts)
        vector = (col + x.start) // width
        stores = []
        for part in range(parts):
            place = lane + part * (PANEL // parts)
            weights = self.planes.panel_vector(self.panel, vector, place, self.num_cols)
            for r, row in enumerate(self.rows):
                total = acc[r * PANEL + place].load()
                for i in range(width):
                    total = total + weights[i] * x.buffer[x.at(row, col + i)].load()
                stores.append(acc[r * PANEL + place].store(total))
        return UOp.group(*stores).end(lane)
