"""A step by layer, and by operation within each layer: which layer is slow, and which of its operations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.kernels import Kernel, KernelRow, tabulate

COLUMNS = ("layer", "dispatches", "total ms", "share", "GB/s", "GFLOP/s", "of roof")
UNEVEN = 1.25  # a layer that takes this much longer than the median is pointed out


@dataclass(frozen=True)
class LayerRow:
    """A layer, or an operation outside layers. `operations`: those of a layer, in order, with shares of the whole."""

    row: KernelRow
    layer: int | None
    operations: tuple[KernelRow, ...]

    def as_json(self) -> dict[str, Any]:
        return self.row.as_json() | {"operations": [one.as_json() for one in self.operations]}


def tabulate_layers(kernels: Sequence[Kernel], chip: Chip | None = None) -> list[LayerRow]:
    """One for each layer, and for each operation outside layers, in the order in which a step comes to them."""
    groups: dict[tuple[int | None, str], list[Kernel]] = {}
    for kernel in kernels:
        key = kernel.layer, kernel.operation if kernel.layer is None else f"layer {kernel.layer}"
        groups.setdefault(key, []).append(kernel)
    whole_s = sum(kernel.seconds for kernel in kernels)
    rows = []
    for (layer, name), group in groups.items():
        (row,) = tabulate([replace(kernel, operation=name, layer=None) for kernel in group], "operation", chip)
        order = list(dict.fromkeys(kernel.operation for kernel in group))
        inner = sorted(tabulate(group, "operation", chip), key=lambda one: order.index(one.label))
        shares = [replace(one, share=one.total_s / whole_s) for one in inner] if whole_s else inner
        share = row.total_s / whole_s if whole_s else 0.0
        rows.append(LayerRow(replace(row, share=share), layer, tuple(shares) if layer is not None else ()))
    return rows


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """One line for each row, with a column for each operation of layers, in microseconds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate((*COLUMNS, *(f"{name} us".replace(" ", "\n") for name in _operations(rows)))):
        table.add_column(column, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*_cells(row, _operations(rows)))
    return table


def layer_markdown(rows: Sequence[LayerRow]) -> str:
    """The same in Markdown."""
    names = _operations(rows)
    head = (*COLUMNS, *(f"{name} us" for name in names))
    lines = [head, ("---", *("---:" for _ in head[1:])), *(_cells(row, names) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe_layers(rows: Sequence[LayerRow]) -> list[str]:
    """How even the layers are, and which are much slower than the others."""
    layers = [row for row in rows if row.layer is not None]
    if not layers:
        return []
    times_s = [row.row.total_s for row in layers]
    median_s, whole_s = statistics.median(times_s), sum(row.row.total_s for row in rows)
    share = sum(times_s) / whole_s if whole_s else 0.0
    lines = [
        f"{len(layers)} layers take {share:.0%} of the time: {min(times_s) * 1e6:,.1f} to {max(times_s) * 1e6:,.1f} us "
        f"each, median {median_s * 1e6:,.1f}"
    ]
    slow = [row for row in layers if row.row.total_s > UNEVEN * median_s]
    if slow:
        named = ", ".join(f"{row.row.label} (+{row.row.total_s / median_s - 1:.0%})" for row in slow[:5])
        lines.append(f"slower than {UNEVEN:g} medians: {named}{', ...' if len(slow) > 5 else ''}")
    return lines


def _operations(rows: Sequence[LayerRow]) -> list[str]:
    return list(dict.fromkeys(one.label for row in rows for one in row.operations))


def _cells(one: LayerRow, names: Sequence[str]) -> tuple[str, ...]:
    row, inner = one.row, {operation.label: operation.total_s for operation in one.operations}
    rates = [f"{rate / 1e9:,.1f}" if rate else "-" for rate in (row.bytes_per_s, row.flops_per_s)]
    return (
        row.label,
        f"{row.dispatches:,}",
        f"{row.total_s * 1e3:,.3f}",
        f"{row.share:.1%}",
        *rates,
        "-" if row.roof_share is None else f"{row.roof_share:.0%}",
        *(f"{inner[name] * 1e6:,.1f}" if name in inner else "" for name in names),
    )
