"""A site's adapters on the cores of the CPU device: which core computes which columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinygrad import Tensor

from tinyvllm.ops.adapter_spec import AdapterSite, Block, SiteShape, blocks_of_parts
from tinyvllm.ops.backend import Norm, Step
from tinyvllm.ops.cpu.adapters import (
    ActivateSpec,
    CpuExpandSpec,
    CpuShrinkSpec,
    Segment,
    activate_kernel,
    expand_kernel,
    gate_up_runs,
    runs_of,
    shrink_kernel,
)
from tinyvllm.ops.cpu.cores import Team, share
from tinyvllm.ops.cpu.sharded import Activation, sharded, tensors_of, widths_of
from tinyvllm.ops.formats.matrix import PANEL
from tinyvllm.ops.kernel.body import empty, run_kernel

Run = tuple[int, int, int]  # (section, first row of B, count)
Segments = tuple[tuple[Segment, ...], int]  # and how many columns of a run are computed side by side


class SiteOnCores:
    """One step of a site."""

    def __init__(self, site: AdapterSite, step: Step, norm: Norm | None) -> None:
        self._site, self._step, self._norm = site, step, norm
        self._slots_at = step.layout.offset("adapter_slots")
        self._partials: list[Tensor] = []

    def shrink(self, x: Activation) -> None:
        """A x, by each core the part of its own columns."""
        site, norm, tokens, first = self._site, self._norm, self._step.num_tokens, 0
        for tensor, cols in zip(tensors_of(x), widths_of(x, site.shape.num_cols), strict=True):
            spec = CpuShrinkSpec(
                shape=site.shape,
                num_tokens=tokens,
                slots_at=self._slots_at,
                norm_eps=None if norm is None else norm.eps,
                first_col=first,
                own_cols=cols,
            )
            out = empty(tokens * spec.num_cols, device=str(tensor.device))
            read = [tensor, site.ranks, site.a, self._step.inputs, *([] if norm is None else [norm.weight])]
            self._partials += run_kernel(shrink_kernel(spec), [out], read)
            first += cols

    def add(self, outs: Sequence[Activation], teams: Sequence[Team], scale: float) -> list[Activation]:
        """The parts of a product, with what the adapters add. `teams`: the cores of its KV heads, if it has them."""
        tokens, shape = self._step.num_tokens, self._site.shape
        sizes = [sum(int(tensor.numel()) for tensor in tensors_of(out)) // tokens for out in outs]
        results = []
        for out, blocks in zip(outs, blocks_of_parts(shape, sizes), strict=True):
            shards = _runs_of_heads(shape, blocks, teams) if teams else _runs_of_widths(shape, blocks, out, tokens)
            results.append(self._expand(out, [runs_of(runs) for runs in shards], blocks, scale))
        return results

    def add_gated(
        self, y: Activation, bounds: Sequence[tuple[tuple[int, int], str]], activation: str, bias: Tensor | None
    ) -> Activation:
        """activation(gate) * up of y, gate and up in panels, with what the adapters add to both. `bounds`: each core's
        panels of the result."""
        tokens, size = self._step.num_tokens, self._site.shape.blocks[0].num_rows
        panels = [(a * PANEL, (b - a) * PANEL) for (a, b), _ in bounds]
        y = self._expand(y, [gate_up_runs(first, count, size) for first, count in panels], (0, 2), 1.0)
        outs = []
        for tensor, (first, count) in zip(tensors_of(y), panels, strict=True):
            starts = None if bias is None else (first, size + first)
            out = empty(tokens * count, device=str(tensor.device))
            read = [tensor, *([] if bias is None else [bias])]
            outs += run_kernel(activate_kernel(ActivateSpec(tokens, count, activation, starts)), [out], read)
        return sharded(outs, [count for _, count in panels])

    def _expand(
        self, out: Activation, segments: Sequence[Segments], blocks: tuple[int, int], scale: float
    ) -> Activation:
        """Add to each core's columns of a part of the product."""
        site, tokens, results, widths = self._site, self._step.num_tokens, [], []
        for tensor, (own, lanes) in zip(tensors_of(out), segments, strict=True):
            widths.append(int(tensor.numel()) // tokens)
            spec = CpuExpandSpec(
                shape=site.shape,
                num_tokens=tokens,
                slots_at=self._slots_at,
                num_cols=widths[-1],
                first_block=blocks[0],
                end_block=blocks[1],
                scale=scale,
                segments=own,
                lanes=lanes,
                num_partials=len(self._partials),
                norm_eps=None if self._norm is None else self._norm.eps,
            )
            results += run_kernel(
                expand_kernel(spec), [tensor], [site.ranks, site.b, self._step.inputs, *self._partials]
            )
        return sharded(results, widths)


def _runs_of_widths(shape: SiteShape, blocks: tuple[int, int], out: Activation, tokens: int) -> list[list[Run]]:
    """Each core's columns, where cores divide a part one after another."""
    runs = [(block.section, start, block.num_rows) for start, block in _placed(shape, blocks)]
    return _cut(runs, [int(tensor.numel()) // tokens for tensor in tensors_of(out)])


def _runs_of_heads(shape: SiteShape, blocks: tuple[int, int], teams: Sequence[Team]) -> list[list[Run]]:
    """Each core's columns, where each team of cores has the rows of its KV heads."""
    assert shape.num_kv_heads is not None
    found = []
    for (a, b), cores in teams:
        runs = []
        for start, block in _placed(shape, blocks):
            unit = block.num_rows // shape.num_kv_heads
            runs.append((block.section, start + a * unit, (b - a) * unit))
        rows = sum(count for _, _, count in runs)
        found += _cut(runs, [(last - first) * PANEL for (first, last), _ in share(-(-rows // PANEL), cores)])
    return found


def _placed(shape: SiteShape, blocks: tuple[int, int]) -> Iterator[tuple[int, Block]]:
    yield from list(zip(shape.starts, shape.blocks, strict=True))[slice(*blocks)]


def _cut(runs: Sequence[Run], sizes: Sequence[int]) -> list[list[Run]]:
    """Runs of rows divided between cores, which take `sizes` of them, or what is left."""
    rest, found = list(runs), []
    for size in sizes:
        mine: list[Run] = []
        while rest and size:
            section, first, count = rest.pop(0)
            taken = min(count, size)
            mine.append((section, first, taken))
            size -= taken
            if taken < count:
                rest.insert(0, (section, first + taken, count - taken))
        found.append(mine)
    return found
