"""Gated short convolutions (LFM2), on every device by the same kernels: out = c * conv(b * x). One product gives b, c
and x of each token.

A decode step takes one kernel. Prompts take two, because a row's convolution reads inputs that the rows before it left
in the pool, and a later row overwrites: the first kernel convolves, the second gates and stores the last inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tinygrad import Tensor, UOp

from tinyvllm.config import ConvKind
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, empty, finish, run_kernel
from tinyvllm.ops.recurrent_spec import RecurrentSpec, Sequence, sequence_of

THREADS = 32  # of a threadgroup; channels are a multiple


@dataclass(frozen=True)
class ConvLayer:
    """One layer's table. `cols`: columns of the projection, which holds b, c and x one after another."""

    index: int  # the layer's number, and its place in the pool
    kind: ConvKind
    cols: int
    taps: Tensor  # (conv_width, channels) float32, flat: the oldest tap first


@dataclass(frozen=True, kw_only=True)
class ConvSpec(RecurrentSpec):
    """A core's part of a layer. `channels`: its own; `first`: their place among those of the table."""

    channels: int
    first: int
    table_channels: int
    has_threads: bool  # the device has threadgroups

    @property
    def width(self) -> int:
        return self.kind.conv_width

    @property
    def name(self) -> str:
        return f"{self.layout.num_tokens}x{self.channels}"

    def axes(self, body: Body) -> tuple[UOp, UOp, tuple[UOp, ...]]:
        """(row, channel, the axes that a store of them ends)."""
        if not self.has_threads:
            row, channel = body.loop(self.layout.num_tokens), body.loop(self.channels)
            return row, channel, (channel, row)
        row, chunk = body.grid(self.layout.num_tokens), body.grid(self.channels // THREADS)
        thread = body.threads(THREADS)
        return row, chunk * THREADS + thread, (thread, chunk, row)

    def address(self, slot: UOp, position: UOp, channel: UOp) -> UOp:
        """The index of an input in the core's part of the pool."""
        return (slot * self.width + position.maximum(0) % self.width) * self.channels + channel


def convolve(spec: ConvSpec, out: Tensor, convs: Tensor, taps: Tensor, inputs: Tensor, projected: Tensor) -> Tensor:
    """Write a core's outputs to `out`, and its last inputs to the pool."""
    if spec.is_decode:
        return run_kernel(step_kernel(spec), [out, convs], [inputs, taps, projected])[0]
    mixed = empty(spec.layout.num_tokens * spec.channels, F32, str(out.device))
    (mixed,) = run_kernel(convolve_kernel(spec), [mixed], [inputs, convs, taps, projected])
    return run_kernel(keep_kernel(spec), [out, convs], [inputs, mixed, projected])[0]


@dataclass(frozen=True)
class Row:
    """One row and channel inside a kernel."""

    spec: ConvSpec
    projected: UOp
    convs: UOp
    sequence: Sequence
    row: UOp
    channel: UOp

    def load(self, part: int, row: UOp | None = None) -> UOp:
        """b (0), c (1) or x (2)."""
        at = (self.row if row is None else row) * self.spec.cols[0] + part * self.spec.channels + self.channel
        return self.projected[at].load().cast(F32)

    def input(self, row: UOp | None = None) -> UOp:
        """b * x."""
        return self.load(0, row) * self.load(2, row)

    def kept(self, position: UOp) -> UOp:
        """The input at a position before the step; 0 before the sequence."""
        value = self.convs[self.spec.address(self.sequence.read_slot, position, self.channel)].load()
        return (position >= 0).where(value, 0.0)

    def keep(self, position: UOp, value: UOp, is_wanted: UOp) -> UOp:
        """Store an input in the sequence's slot, or in the dummy slot if it is not wanted."""
        slot = is_wanted.where(self.sequence.write_slot, 0)
        return self.convs[self.spec.address(slot, position, self.channel)].store(value)

    def weighted(self, taps: UOp, values: list[UOp]) -> UOp:
        """The convolution of the inputs, the latest first."""
        last, size, column = self.spec.width - 1, self.spec.table_channels, self.channel + self.spec.first
        return balanced(value * taps[(last - tap) * size + column].load() for tap, value in enumerate(values))


@cached_kernel
def step_kernel(spec: ConvSpec) -> KernelFn:
    """fn(out (T, channels), convs, inputs, taps, projected (T, 3 * channels)): row i of sequence i."""

    def kernel(out: UOp, convs: UOp, inputs: UOp, taps: UOp, projected: UOp) -> UOp:
        row, channel, ends = spec.axes(Body())
        sequence, is_real = sequence_of(spec, inputs, row)
        here = Row(spec, projected, convs, sequence, row, channel)
        own, position = here.input(), sequence.position
        old = [here.kept(position - tap) for tap in range(1, spec.width)]
        value = here.load(1) * here.weighted(taps, [own, *old])
        stores = [out[row * spec.channels + channel].store(is_real.where(value, 0.0).cast(out.dtype))]
        stores.append(here.keep(position, own, is_real))
        for tap, past in enumerate(old[:-1], 1):
            stores.append(here.keep(position - tap, past, is_real & sequence.is_moved & (position >= tap)))
        return _finish(spec, "short_conv", stores, ends)

    return kernel


@cached_kernel
def convolve_kernel(spec: ConvSpec) -> KernelFn:
    """fn(mixed (T, channels) float32, inputs, convs, taps, projected)."""

    def kernel(mixed: UOp, inputs: UOp, convs: UOp, taps: UOp, projected: UOp) -> UOp:
        row, channel, ends = spec.axes(Body())
        sequence, _ = sequence_of(spec, inputs, row)
        here = Row(spec, projected, convs, sequence, row, channel)
        offset, values = row - sequence.first_row, [here.input()]
        for tap in range(1, spec.width):
            before = clamp(row - tap, 0, spec.layout.num_tokens - 1)
            old = here.kept(sequence.position + offset - tap)
            values.append((offset >= tap).where(here.input(before), old))
        store = mixed[row * spec.channels + channel].store(here.weighted(taps, values))
        return _finish(spec, "convolve", [store], ends)

    return kernel


@cached_kernel
def keep_kernel(spec: ConvSpec) -> KernelFn:
    """fn(out (T, channels), convs, inputs, mixed, projected)."""

    def kernel(out: UOp, convs: UOp, inputs: UOp, mixed: UOp, projected: UOp) -> UOp:
        row, channel, ends = spec.axes(Body())
        sequence, is_real = sequence_of(spec, inputs, row)
        here = Row(spec, projected, convs, sequence, row, channel)
        at = row * spec.channels + channel
        value = here.load(1) * mixed[at].load()
        stores = [out[at].store(is_real.where(value, 0.0).cast(out.dtype)), *_kept_by(here, is_real)]
        return _finish(spec, "gate_conv", stores, ends)

    return kernel


def _kept_by(here: Row, is_real: UOp) -> Iterator[UOp]:
    """Stores of a row's input if it is among the last; the first row also stores earlier inputs that still are."""
    spec, sequence = here.spec, here.sequence
    offset = here.row - sequence.first_row
    is_last = sequence.count - offset < spec.width
    yield here.keep(sequence.position + offset, here.input(), is_real & is_last)
    for tap in range(1, spec.width - 1):
        position = sequence.position - tap
        is_needed = sequence.is_moved & offset.eq(0) & (position >= 0) & (sequence.count < spec.width - tap)
        yield here.keep(position, here.kept(position), is_real & is_needed)


def _finish(spec: ConvSpec, name: str, stores: list[UOp], ends: tuple[UOp, ...]) -> UOp:
    size = spec.layout.num_tokens * spec.channels
    return finish(UOp.group(*stores).end(*ends), f"{name}_{spec.name}", ops=8 * size, nbytes=16 * size)
