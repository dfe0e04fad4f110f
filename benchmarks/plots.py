"""One picture per problem: loss against epochs, and against seconds of training."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogFormatter, MaxNLocator  # noqa: E402

from benchmarks.optimizers import OPTIMIZERS  # noqa: E402
from benchmarks.problems import Problem  # noqa: E402


def plot(problem: Problem, runs: list[dict], file: Path) -> None:
    """Draw the runs that have a history; a diverged one ends where its loss is no longer finite."""
    drawn = [run for run in runs if run["history"]]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, panel in zip(("epoch", "seconds"), panels, strict=True):
        for run in drawn:
            draw(panel, run, axis)
        panel.set_xlabel({"epoch": "epochs", "seconds": "seconds of training (evaluation not counted)"}[axis])
        panel.grid(alpha=0.3, which="both")
        panel.xaxis.set_major_locator(MaxNLocator(integer=axis == "epoch"))
        panel.set_xlim(left=0)
    if problem.log:
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(LogFormatter())  # 200 rather than 2 x 10^2
        panels[0].yaxis.set_minor_formatter(LogFormatter())
    panels[0].set_ylim(top=1.1 * ceiling(problem, drawn))
    panels[0].set_ylabel(f"loss, {problem.unit}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(drawn) or 1)
    figure.suptitle(f"{problem.title} (solid: training, dashed: test)")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def ceiling(problem: Problem, runs: list[dict]) -> float:
    """The largest loss to draw: the fresh model's, so that an exploding run does not squeeze the others; on a linear
    axis the largest one after an epoch where that is less, so that the first drop does not."""
    fresh = max((run["history"][0]["train_loss"] for run in runs), default=1.0)
    later = [run["history"][1]["test_loss"] for run in runs if len(run["history"]) > 1]
    return fresh if problem.log else min(fresh, max(filter(math.isfinite, later), default=fresh))


def draw(panel: pyplot.Axes, run: dict, axis: str) -> None:
    """The training loss as a solid line and the test loss as a dashed one."""
    method = OPTIMIZERS[run["optimizer"]]
    label = f"{method.label}, lr {run['options']['lr']:g} {run['note']}"
    for split, style in (("train_loss", "-"), ("test_loss", "--")):
        entries = [entry for entry in run["history"] if math.isfinite(entry[split])]
        xs, ys = [entry[axis] for entry in entries], [entry[split] for entry in entries]
        solid = style == "-"
        panel.plot(xs, ys, style, color=method.color, label=label if solid else None, lw=2 if solid else 1)
