"""The comparison as a picture: a column for each family of methods, the loss against epochs above, against seconds
below. Lines are medians over seeds, bands go from the least to the largest."""

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402

from benchmarks.optimizers import OPTIMIZERS  # noqa: E402
from benchmarks.problems import Problem  # noqa: E402

FAMILIES = {
    "first order": ("adam-eps", "sgd", "muon"),
    "mini-block Fisher": ("mbf-damped", "mbf-paper"),
    "K-FAC": ("kfac", "kfac-exact", "two-level", "two-level-additive"),
    "KPSVD": ("kpsvd", "deflation", "lanczos", "kfac-corrected"),
    "quasi-Newton, diagonal": ("kbfgs", "kbfgsl", "adafisher", "adafisher-paper", "adafisher-relative"),
}
EVERYWHERE = ("adam", "mbf")


def plot(problem: Problem, runs: list[dict], seconds: float, file: Path) -> None:
    figure, panels = pyplot.subplots(2, len(FAMILIES), figsize=(20, 9), sharey=True, layout="constrained")
    for column, (family, members) in zip(panels.T, FAMILIES.items(), strict=True):
        for panel, axis in zip(column, ("epoch", "seconds"), strict=True):
            for name in (*EVERYWHERE, *members):
                draw(panel, [run for run in runs if run["optimizer"] == name], axis, faint=name in EVERYWHERE)
            panel.set_xlim(0, problem.epochs if axis == "epoch" else seconds)
            panel.set_xlabel({"epoch": "epochs", "seconds": "seconds of training"}[axis])
            panel.grid(alpha=0.3, which="both")
        column[0].set_title(family)
        column[0].legend(fontsize="small")
    ends = [entry["train_loss"] for run in runs for entry in run["history"] if entry["train_loss"] is not None]
    fresh = max(run["history"][0]["train_loss"] for run in runs if run["history"])
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylim(0.9 * min(ends), 1.1 * fresh)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"training loss, {problem.unit}")
        panel.yaxis.set_major_formatter(LogFormatter())
    figure.suptitle(f"{problem.title}: medians of {len({run['seed'] for run in runs})} seeds, least to largest")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def draw(panel: pyplot.Axes, alike: list[dict], axis: str, faint: bool) -> None:
    histories = [run["history"] for run in alike if run["history"]]
    if not histories:
        return
    method, style = OPTIMIZERS[alike[0]["optimizer"]], {"ls": ":", "lw": 1.5} if faint else {"lw": 2}
    entries = list(zip(*histories, strict=False))  # of all seeds, as far as all went
    xs = [statistics.median(entry[axis] for entry in alike) for alike in entries]
    losses = [[_drawable(entry["train_loss"]) for entry in alike] for alike in entries]
    panel.plot(xs, [statistics.median(values) for values in losses], color=method.color, label=method.label, **style)
    if not faint:
        panel.fill_between(xs, list(map(min, losses)), list(map(max, losses)), color=method.color, alpha=0.15, lw=0)


def _drawable(loss: float | None) -> float:
    return math.nan if loss is None else loss
