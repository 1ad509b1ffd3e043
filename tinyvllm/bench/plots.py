"""Plots of runs from their JSON: where the time goes, kernels under the roofline, latency against batch or load.

matplotlib comes with the extra `plot`, and is imported here only.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.bench.stages import STAGES
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
NUM_NAMED_KERNELS = 8
GB = 1e9
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ margin: 1rem auto; max-width: 75rem; font: 1rem system-ui }} svg {{ width: 100%; height: auto }}</style>
<h1>{title}</h1>
{svg}
</html>
"""


def check_plot(path: str) -> None:
    """Raises TinyvllmError for an unsupported file type, or without matplotlib. Call it before measuring."""
    if Path(path).suffix not in SUFFIXES:
        raise TinyvllmError(f"--plot is {path}: its name must end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TinyvllmError('--plot needs matplotlib, which is not installed: pip install "tinyvllm[plot]"') from error


def draw_breakdown(figures: dict[str, Any], path: str) -> None:
    """Draw three panels from a breakdown's JSON. Raises TinyvllmError if the file cannot be written."""
    figure, (stages, roof, batches) = _panels(3)
    _draw_stages(stages, figures["cases"])
    _draw_roofline(roof, figures)
    _draw_batches(batches, figures["cases"])
    _save(figure, path, f"{figures['model']}, {figures['dtype']}, on {figures['device']}")


def draw_load(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw two panels from `bench serve`'s JSON: latencies and tokens per second, against the load."""
    figure, (latency, rate) = _panels(2)
    loads = [row["rate"] if row["rate"] is not None else row["concurrency"] for row in rows]
    unit = "requests per second" if rows[0]["rate"] is not None else "requests at once"
    for name, label in (("ttft_ms", "first token"), ("tpot_ms", "per token"), ("itl_ms", "between tokens")):
        for percent, style in (("median", "-"), ("p99", ":")):
            points = [(load, row[name][percent]) for load, row in zip(loads, rows, strict=True) if row[name]]
            if points:
                latency.plot(*zip(*points, strict=True), style, marker="o", label=f"{label}, {percent}")
    latency.set(xlabel=unit, ylabel="ms", yscale="log", title="latency against load")
    latency.legend(fontsize="small")
    rate.plot(loads, [row["output_tok_s"] for row in rows], marker="o", label="output tokens per second")
    rate.set(xlabel=unit, ylabel="tokens per second", ylim=(0, None), title="throughput against load")
    rate.legend(fontsize="small")
    _save(figure, path, f"{rows[0]['model']} at {rows[0]['url']}")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)
    return figure, list(axes[:, 0])


def _draw_stages(axes: Axes, cases: Sequence[dict[str, Any]]) -> None:
    """One bar per case, with its stages and its residual."""
    names = [case["name"] for case in cases]
    left = [0.0] * len(cases)
    for stage in STAGES:
        shares = [100 * case["stages"][stage]["share"] for case in cases]
        axes.barh(names, shares, left=left, label=stage)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.barh(names, [100 * case["residual_share"] for case in cases], left=left, label="residual", color="lightgrey")
    axes.invert_yaxis()
    axes.set(xlabel="% of the wall time", xlim=(0, 100), title="stages")
    axes.legend(ncols=5, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_roofline(axes: Axes, figures: dict[str, Any]) -> None:
    """The chip's roofline with a decode step and its kernels: operations per second against operations per byte."""
    roof = figures["roofline"]["decode"]
    kernels = next(case for case in figures["cases"] if case["name"] == figures["main_case"])["kernels"]
    points = [
        (row["label"], row["flops"] / row["bytes"], row["flops"] / row["total_s"]) for row in kernels if row["flops"]
    ]
    points = points[:NUM_NAMED_KERNELS]
    places = [place for _, place, _ in points] + [roof["intensity"], roof["knee"]]
    span = [min(places) / 4, max(places) * 4]
    grid = [span[0] * (span[1] / span[0]) ** (step / 100) for step in range(101)]
    peak, bandwidth = roof["half_tflops"] * 1e12, roof["bandwidth_gbps"] * GB
    axes.plot(grid, [min(peak, bandwidth * place) / 1e9 for place in grid], "k-", label=f"roof of {roof['chip']}")
    for label, place, speed in points:
        axes.plot([place], [speed / 1e9], "o", label=label)
    step_s = roof["achieved_tflops"] * 1e3
    axes.plot([roof["intensity"]], [step_s], "*", markersize=14, label="decode step")
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title="roofline of a decode step"
    )
    axes.legend(fontsize="small")


def _draw_batches(axes: Axes, cases: Sequence[dict[str, Any]]) -> None:
    """Time per token for each prompt length, against the number of concurrent requests."""
    groups: dict[str, list[tuple[int, float, float]]] = {}
    for case in cases:
        prompt = case["name"].rpartition(", batch")[0]
        groups.setdefault(prompt, []).append((case["batch"], case["tpot_s"]["mean"] * 1e3, case["tpot_s"]["std"] * 1e3))
    for prompt, points in groups.items():
        batches, means, deviations = zip(*sorted(points), strict=True)
        axes.errorbar(batches, means, yerr=deviations, marker="o", capsize=3, label=prompt)
    axes.set(xlabel="requests at once", ylabel="ms per output token", ylim=(0, None), title="latency against batch")
    axes.legend(fontsize="small")


def _save(figure: Figure, path: str, title: str) -> None:
    figure.suptitle(title)
    try:
        if Path(path).suffix == ".html":
            text = io.StringIO()
            figure.savefig(text, format="svg")
            svg = text.getvalue()
            Path(path).write_text(PAGE.format(title=title, svg=svg[svg.index("<svg") :]), encoding="utf-8")
        else:
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be written: {error.strerror}") from error
