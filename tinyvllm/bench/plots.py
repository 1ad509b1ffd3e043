"""Plots of runs from their JSON: where the time goes, kernels under the roofline, latency against batch or load.

Bars and points have their numbers as SVG titles, which browsers show under the pointer. matplotlib comes with the extra
`plot`, and is imported here only.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.bench.stages import DEVICE_STAGES, STAGES
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
NUM_NAMED_KERNELS = 8
GB = 1e9
LABELED_SHARE = 0.06  # of an axis' width: a shorter bar has no room for its number
RESIDUAL, REST_COLOR = "residual", "#bbbbbb"
PHASES = {"prefill": "prefill_kernels", "decode": "kernels"}  # their kernels in a case's JSON
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ margin: 1rem auto; padding: 0 1rem; max-width: 75rem; font: 1rem system-ui }}
svg {{ width: 100%; height: auto }}
svg g:has(> title):hover {{ opacity: 0.6; cursor: default }}
#tip {{ position: fixed; display: none; padding: 0.3rem 0.6rem; background: #222; color: #fff; border-radius: 0.3rem;
       font-size: 0.9rem; white-space: pre; pointer-events: none }}
</style>
<h1>{title}</h1>
{svg}
<div id="tip"></div>
<script>
const tip = document.getElementById("tip");
document.addEventListener("mousemove", event => {{
  const named = event.target.closest("g:has(> title)");
  tip.style.display = named ? "block" : "none";
  if (!named) return;
  tip.textContent = named.querySelector("title").textContent;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 14 + "px";
}});
</script>
</html>
"""


class _Hover:
    """Hover texts of artists, by each one's id in the SVG."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def name(self, artist: Artist, text: str) -> None:
        gid = f"hover-{len(self.texts)}"
        artist.set_gid(gid)
        self.texts[gid] = text

    def insert(self, svg: str) -> str:
        """The SVG with the texts as titles of their groups."""
        for gid, text in self.texts.items():
            opening = f'<g id="{gid}">'
            svg = svg.replace(opening, f"{opening}<title>{html.escape(text)}</title>", 1)
        return svg


def check_plot(path: str) -> None:
    """Raises TinyvllmError for an unsupported file type, or without matplotlib. Call it before measuring."""
    if Path(path).suffix not in SUFFIXES:
        raise TinyvllmError(f"--plot is {path}: its name must end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TinyvllmError('--plot needs matplotlib, which is not installed: pip install "tinyvllm[plot]"') from error


def draw_breakdown(figures: dict[str, Any], path: str) -> None:
    """Draw stages, rooflines and latencies from a breakdown's JSON. Raises TinyvllmError if the file cannot be
    written."""
    from matplotlib.figure import Figure

    hover, cases = _Hover(), figures["cases"]
    height = 1.2 + 0.35 * len(cases)
    figure = Figure(figsize=(11, 2 * height + 8.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["stages"] * 2, ["host"] * 2, ["prefill", "decode"], ["batches"] * 2], height_ratios=[height, height, 4.5, 3.5]
    )
    _draw_stages(axes["stages"], cases, [*STAGES, RESIDUAL], hover)
    axes["stages"].set(xlabel="% of the wall time", xlim=(0, 100), title="stages")
    host = [name for name in (*STAGES, RESIDUAL) if name not in ("prefill", "decode")]
    widest = _draw_stages(axes["host"], cases, host, hover)
    axes["host"].set(
        xlabel="% of the wall time, enlarged", xlim=(0, 1.02 * widest or 1), title="without prefill and decode"
    )
    handles, names = axes["stages"].get_legend_handles_labels()
    axes["host"].legend(handles, names, ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25))
    main = next(case for case in cases if case["name"] == figures["main_case"])
    for phase, key in PHASES.items():
        _draw_roofline(axes[phase], figures["roofline"].get(phase), main.get(key, []), phase, hover)
    _draw_batches(axes["batches"], cases, hover)
    _save(figure, path, f"{figures['model']}, {figures['dtype']}, on {figures['device']}", hover)


def draw_load(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw two panels from `bench serve`'s JSON: latencies and tokens per second, against the load."""
    from matplotlib.figure import Figure

    hover, figure = _Hover(), Figure(figsize=(11, 9), layout="constrained")
    latency, rate = figure.subplots(2, 1)
    loads = [row["rate"] if row["rate"] is not None else row["concurrency"] for row in rows]
    unit = "requests per second" if rows[0]["rate"] is not None else "requests at once"
    for name, label in (("ttft_ms", "first token"), ("tpot_ms", "per token"), ("itl_ms", "between tokens")):
        for percent, style in (("median", "-"), ("p99", ":")):
            points = [(load, row[name][percent]) for load, row in zip(loads, rows, strict=True) if row[name]]
            if points:
                _line(latency, points, f"{label}, {percent}", f"{unit}: {{0:g}}\n{{1:,.2f}} ms", hover, style)
    latency.set(xlabel=unit, ylabel="ms", yscale="log", title="latency against load")
    points = [(load, row["output_tok_s"]) for load, row in zip(loads, rows, strict=True)]
    _line(rate, points, "output tokens per second", f"{unit}: {{0:g}}\n{{1:,.1f}} tokens/s", hover)
    rate.set(xlabel=unit, ylabel="tokens per second", ylim=(0, None), title="throughput against load")
    for axes in (latency, rate):
        _tick(axes, loads)
        axes.legend(fontsize="small")
    _save(figure, path, f"{rows[0]['model']} at {rows[0]['url']}", hover)


def _draw_stages(axes: Axes, cases: Sequence[dict[str, Any]], names: Sequence[str], hover: _Hover) -> float:
    """One bar per case of these stages. Returns the length of the longest bar, in percent."""
    colors = _colors()
    rows = [f"{case['name']}" for case in cases]
    shares = {name: [100 * _share(case, name) for case in cases] for name in names}
    widest = max(sum(values[row] for values in shares.values()) for row in range(len(cases)))
    left = [0.0] * len(cases)
    for name in names:
        bars = axes.barh(rows, shares[name], left=left, label=name, color=colors[name], height=0.7)
        for bar, case, share in zip(bars, cases, shares[name], strict=True):
            hover.name(bar, _describe_stage(case, name, share))
            if share > LABELED_SHARE * widest:
                middle = (bar.get_x() + share / 2, bar.get_y() + bar.get_height() / 2)
                axes.annotate(f"{name} {share:.2g}%", middle, ha="center", va="center", fontsize=8, color="white")
        left = [start + share for start, share in zip(left, shares[name], strict=True)]
    axes.invert_yaxis()
    return widest


def _share(case: Mapping[str, Any], name: str) -> float:
    return float(max(0.0, case["residual_share"]) if name == RESIDUAL else case["stages"][name]["share"])


def _describe_stage(case: Mapping[str, Any], name: str, share: float) -> str:
    """What is shown under the pointer."""
    text = f"{case['name']}\n{name}: {share:.3g}% of the wall time"
    stage = case["stages"].get(name)
    if stage and stage["count"]:
        text += f"\n{stage['count']} x {1e3 * stage['mean_s']:,.3f} ms (median {1e3 * stage['median_s']:,.3f} ms)"
        if "cpu_mean_s" in stage:
            text += f"\nprocessor time {1e3 * stage['cpu_mean_s']:,.3f} ms"
    return text


def _colors() -> dict[str, Any]:
    """A color for each stage, the same in all panels; device stages are the darkest."""
    from matplotlib import colormaps

    device = dict(zip(DEVICE_STAGES, ("#264653", "#2a6f97", "#5e548e"), strict=True))
    others = [name for name in STAGES if name not in DEVICE_STAGES]
    palette = colormaps["Dark2"].colors  # type: ignore[attr-defined]
    return device | {name: palette[index % len(palette)] for index, name in enumerate(others)} | {RESIDUAL: REST_COLOR}


def _draw_roofline(
    axes: Axes, roof: Mapping[str, Any] | None, kernels: Sequence[Mapping[str, Any]], phase: str, hover: _Hover
) -> None:
    """The chip's roofline with a step and its kernels: operations per second against operations per byte."""
    if roof is None:
        axes.set_axis_off()
        return
    known = [row for row in kernels if row["flops"] and row["bytes"]][:NUM_NAMED_KERNELS]
    points = [(row["label"], row["flops"] / row["bytes"], row["flops"] / row["total_s"] / 1e9, row) for row in known]
    places = [place for _, place, *_ in points] + [roof["intensity"], roof["knee"]]
    span = [min(places) / 4, max(places) * 4]
    grid = [span[0] * (span[1] / span[0]) ** (step / 100) for step in range(101)]
    peak, bandwidth = roof["half_tflops"] * 1e3, roof["bandwidth_gbps"]  # GFLOP/s, GB/s
    axes.plot(grid, [min(peak, bandwidth * place) for place in grid], "k-", label=f"roof of {roof['chip']}")
    for label, place, speed, row in points:
        (line,) = axes.plot([place], [speed], "o", label=label)
        share = "" if row["roof_share"] is None else f", {row['roof_share']:.0%} of the roof"
        rates = f"{speed:,.1f} GFLOP/s, {row['bytes'] / row['total_s'] / GB:,.1f} GB/s{share}"
        hover.name(line, f"{label}: {1e3 * row['total_s']:,.3f} ms a step\n{rates}\n{place:,.2f} operations per byte")
    (line,) = axes.plot(
        [roof["intensity"]], [roof["achieved_tflops"] * 1e3], "k*", markersize=13, label=f"{phase} step"
    )
    hover.name(
        line,
        f"{phase} step\n{roof['achieved_tflops'] * 1e3:,.1f} GFLOP/s, {roof['intensity']:,.2f} operations per byte",
    )
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=f"roofline of a {phase} step"
    )
    axes.legend(fontsize="x-small")


def _draw_batches(axes: Axes, cases: Sequence[dict[str, Any]], hover: _Hover) -> None:
    """Time per token for each prompt length, against the number of concurrent requests."""
    groups: dict[str, list[tuple[int, float, float]]] = {}
    for case in cases:
        prompt = case["name"].rpartition(", batch")[0]
        groups.setdefault(prompt, []).append((case["batch"], case["tpot_s"]["mean"] * 1e3, case["tpot_s"]["std"] * 1e3))
    for prompt, group in groups.items():
        batches, means, deviations = zip(*sorted(group), strict=True)
        axes.errorbar(batches, means, yerr=deviations, fmt="none", capsize=3, ecolor="grey")
        _line(
            axes, list(zip(batches, means, strict=True)), prompt, "{0:g} requests at once\n{1:,.3f} ms a token", hover
        )
    _tick(axes, [case["batch"] for case in cases])
    axes.set(xlabel="requests at once", ylabel="ms per output token", ylim=(0, None), title="latency against batch")
    axes.legend(fontsize="small")


def _line(
    axes: Axes, points: Sequence[tuple[float, float]], label: str, text: str, hover: _Hover, style: str = "-"
) -> None:
    """A line whose points each have a text: `text` with x and y."""
    (line,) = axes.plot(*zip(*points, strict=True), style, label=label)
    for x, y in points:
        (point,) = axes.plot([x], [y], "o", color=line.get_color())
        hover.name(point, f"{label}\n{text.format(x, y)}")


def _tick(axes: Axes, places: Sequence[float]) -> None:
    """Ticks at the measured loads, which are whole numbers of requests or rates, and no others."""
    ticks = sorted(set(places))
    if len(ticks) > 1 and ticks[0] > 0 and ticks[-1] / ticks[0] > 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axes.minorticks_off()
    if len(ticks) == 1:
        axes.set_xlim(0, 2 * ticks[0])


def _save(figure: Figure, path: str, title: str, hover: _Hover) -> None:
    """A page has the title as its heading; a picture has it at the top."""
    is_page = Path(path).suffix == ".html"
    if not is_page:
        figure.suptitle(title)
    try:
        if is_page or Path(path).suffix == ".svg":
            text = io.StringIO()
            figure.savefig(text, format="svg")
            svg = hover.insert(text.getvalue())
            page = PAGE.format(title=html.escape(title), svg=svg[svg.index("<svg") :]) if is_page else svg
            Path(path).write_text(page, encoding="utf-8")
        else:
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be written: {error.strerror}") from error
