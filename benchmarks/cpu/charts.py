"""The report's plots, as SVG: narrow, so that their text can be read on a phone."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from benchmarks.cpu.tables import step_us, timed  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402
from benchmarks.ops import FUSED, OPS  # noqa: E402

WIDTH = 4.4  # inches: 420 pixels
OURS = {"cpu": "mbf_kernels", "reference": "reference backend"}
NAMED = (1, 4, 16, 64)  # n whose points have their figure beside them
STYLE = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 8.5, "svg.hashsalt": "mbf", "lines.markersize": 5}


class Chart(NamedTuple):
    title: str
    caption: str
    svg: str


def charts(rows: list[dict]) -> list[Chart]:
    """Those whose rows were measured."""
    drawn = []
    for draw in (roofline, speedup, step_times, against_count, against_size):
        with pyplot.rc_context(STYLE):
            title, caption, figure = draw(rows)
            drawn.append(Chart(title, caption, as_svg(figure)))
    return drawn


def as_svg(figure: pyplot.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()


def fused_by(rows: list[dict]) -> dict[str, list[dict]]:
    """The fused op's rows in float32 by who measured, ours first, each by n."""
    chosen = sorted(timed(rows, part="kernels", op=FUSED, dtype="float32"), key=lambda row: row["n"])
    names = sorted({row["by"] for row in chosen}, key=lambda name: (name not in OURS, name))
    return {OURS.get(name, name): [row for row in chosen if row["by"] == name] for name in names}


def figure_and_panel(height: float, xlabel: str, ylabel: str) -> tuple[pyplot.Figure, pyplot.Axes]:
    figure, panel = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
    panel.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    panel.grid(alpha=0.3)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return figure, panel


def short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def legend(figure: pyplot.Figure, columns: int = 1) -> None:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)


def intensity(row: dict) -> float:
    """Flops per byte that must move."""
    return row["count"] * OPS[FUSED].flops(row["n"]) / row["bytes"]


def roofline(rows: list[dict]) -> tuple[str, str, pyplot.Figure]:
    figure, panel = figure_and_panel(5.4, "flops per byte that must move", "Gflop/s")
    (copy,) = timed(rows, part="roofs", what="copy")
    (product,) = timed(rows, part="roofs", what="matrix product", dtype="float32")
    by = fused_by(rows)
    ends = (0.2, max(20.0, 2 * product["gflops"] / copy["gbps"]))
    panel.plot(ends, [copy["gbps"] * end for end in ends], "k--", lw=1, label=f"copy, {copy['gbps']:.0f} GB/s")
    panel.axhline(product["gflops"], color="k", lw=1, label=f"matrix product, {product['gflops']:.0f} Gflop/s")
    for name, points in by.items():
        xs = [intensity(point) for point in points]
        ys = [OPS[FUSED].flops(point["n"]) / point["ns_per_block"] for point in points]
        ours = name == OURS["cpu"]
        panel.plot(xs, ys, "o-" if ours else ".-", lw=2 if ours else 0.8, label=name, color="tab:red" if ours else None)
        if ours:
            for x, y, point in zip(xs, ys, points, strict=True):
                if point["n"] in NAMED:
                    panel.annotate(
                        f"n={point['n']}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8
                    )
    panel.set_ylim(top=3 * product["gflops"])
    legend(figure)
    caption = (
        "Building, damping, factoring and solving a block in float32. Flops and bytes are those of the fused op, "
        "counted from n, for every contestant: who moves or computes more has a lower point."
    )
    return "Roofline", caption, figure


def speedup(rows: list[dict]) -> tuple[str, str, pyplot.Figure]:
    figure, panel = figure_and_panel(5.0, "n", "times faster than")
    by = fused_by(rows)
    ours = {point["n"]: point["ns_per_block"] for point in by.pop(OURS["cpu"], [])}
    for name, points in by.items():
        shared = [point for point in points if point["n"] in ours]
        panel.plot(
            [point["n"] for point in shared],
            [point["ns_per_block"] / ours[point["n"]] for point in shared],
            "o-",
            label=name,
        )
    panel.axhline(1, color="k", lw=1)
    ticks(panel, sorted(ours))
    legend(figure)
    return (
        "Times faster than others",
        "The fused op, float32: a contestant's time over ours. Below 1 we are slower.",
        figure,
    )


def ticks(panel: pyplot.Axes, sizes: list[int]) -> None:
    """At sizes that leave room for their figures on a logarithmic axis."""
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or kept[-1] >= 1.45 * size:
            kept.append(size)
    panel.set_xticks(kept, list(map(str, kept)))
    panel.set_xticks([], minor=True)


def step_times(rows: list[dict]) -> tuple[str, str, pyplot.Figure]:
    chosen = timed(rows, part="steps")
    networks = list(dict.fromkeys(row["what"] for row in chosen))
    figure, panel = figure_and_panel(2.6 + 0.42 * len(networks), "milliseconds per step", "")
    panel.set_yscale("linear")
    colors = pyplot.get_cmap("tab10")
    for index, (name, method) in enumerate(METHODS.items()):
        points = [(step_us(row) / 1e3, networks.index(row["what"])) for row in chosen if row["method"] == name]
        if points:
            ours = method.library == "mbf_optim"
            panel.plot(*zip(*points, strict=True), "D" if ours else "o", label=method.label, color=colors(index))
    panel.set_yticks(range(len(networks)), [wrapped(network) for network in networks], fontsize=8.5)
    panel.set_ylim(len(networks) - 0.5, -0.5)
    legend(figure, 2)
    caption = (
        "One step on all tensors of a network; where rare work comes every k-th step, the mean over whole periods."
    )
    return "Step time", caption, figure


def wrapped(text: str) -> str:
    """In two lines, broken at the space nearest the middle."""
    spaces = [place for place, letter in enumerate(text) if letter == " "]
    if len(text) < 16 or not spaces:
        return text
    middle = min(spaces, key=lambda place: abs(place - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def against_count(rows: list[dict]) -> tuple[str, str, pyplot.Figure]:
    figure, panel = figure_and_panel(4.4, "blocks", "ns per block")
    points = timed(rows, part="against count")
    most = max(point["threads"] for point in points)
    for index, n in enumerate(sorted({point["n"] for point in points})):
        for threads, style in {1: ":", most: "-"}.items():
            drawn = [point for point in points if (point["n"], point["threads"]) == (n, threads)]
            label = f"n = {n}" if threads == most else None
            panel.plot(*curve(drawn, "count"), style, color=f"C{index}", label=label)
    legend(figure, 3)
    many = f"Solid: {most} threads; dotted: one." if most > 1 else "One thread."
    return "Cost of a block against their number", f"The fused op, float32. {many}", figure


def against_size(rows: list[dict]) -> tuple[str, str, pyplot.Figure]:
    figure, panel = figure_and_panel(4.2, "n", "ns per block")
    points = timed(rows, part="against size")
    (copy,) = timed(rows, part="roofs", what="copy")
    (product,) = timed(rows, part="roofs", what="matrix product", dtype="float32")
    sizes = [point["n"] for point in points]
    panel.plot(*curve(points, "n"), ".-", color="tab:red", label="the fused op")
    panel.plot(sizes, [OPS[FUSED].moved(n, 4) / copy["gbps"] for n in sizes], "k--", lw=1, label="a copy of its bytes")
    panel.plot(
        sizes, [OPS[FUSED].flops(n) / product["gflops"] for n in sizes], "k-", lw=1, label="its flops at full rate"
    )
    ticks(panel, [1, 2, 4, 9, 16, 32, 64, 128])
    legend(figure, 2)
    caption = "float32. No kernel can be faster than the higher of the two black lines, but where data stay in a cache."
    return "Cost of a block against its size", caption, figure


def curve(points: Iterable[dict], x: str) -> tuple[list[float], list[float]]:
    points = list(points)
    return [point[x] for point in points], [point["ns_per_block"] for point in points]
