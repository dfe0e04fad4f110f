"""The comparison in numbers: a table in Markdown for one problem."""

import statistics
from collections.abc import Iterable

from benchmarks import markdown
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import Problem
from benchmarks.tuned import load


def table(problem: Problem, runs: list[dict], seconds: float) -> str:
    """Losses are medians over seeds, with the least and the largest; sorted by the training loss after all epochs."""
    here = dict.fromkeys(run["optimizer"] for run in runs)
    grouped = [[run for run in runs if run["optimizer"] == name] for name in here]
    grouped.sort(key=lambda alike: score(problem, alike))
    columns = (
        "method", "options", "trials (failed)", "train loss untuned, seed 0", f"train loss, {problem.epochs} epochs",
        "test accuracy" if problem.accuracy else "test loss", f"train loss, {seconds:g} s", "its epochs",
        "ms per iteration",
    )  # fmt: skip
    lines = [row(problem, alike, seconds) for alike in grouped]
    return f"**{problem.title}**\n\n" + markdown.table(columns, lines)


def score(problem: Problem, alike: list[dict]) -> float:
    found = [entry["train_loss"] for run in alike if (entry := at_epochs(problem, run))]
    return statistics.median(found) if len(found) == len(alike) else float("inf")


def row(problem: Problem, alike: list[dict], seconds: float) -> tuple[str, ...]:
    name, notes = alike[0]["optimizer"], [run["note"] for run in alike if run["note"]]
    options = ", ".join(f"{option} {value:g}" for option, value in alike[0]["options"].items())
    cells = (OPTIMIZERS[name].label, options, trials(problem, name), untuned(problem, name))
    if notes:
        return (*cells, f"{len(notes)} of {len(alike)} seeds: {'; '.join(dict.fromkeys(notes))}", "", "", "", "")
    last = [at_epochs(problem, run) for run in alike]
    timely = [at_seconds(run, seconds) for run in alike]
    return (
        *cells,
        spread(entry["train_loss"] for entry in last),
        spread(entry["test_accuracy" if problem.accuracy else "test_loss"] for entry in last),
        spread(entry["train_loss"] for entry in timely),
        f"{statistics.median(entry['epoch'] for entry in timely):g}",
        markdown.number(statistics.median(run["iteration_ms"] for run in alike)),
    )


def trials(problem: Problem, name: str) -> str:
    tried = load().get(problem.name, {}).get(name, [])
    return f"{len(tried)} ({sum(trial['loss'] is None for trial in tried)})" if tried else "none"


def untuned(problem: Problem, name: str) -> str:
    """Of the trial that the walk starts from."""
    tried = load().get(problem.name, {}).get(name, [])
    losses = [trial["loss"] for trial in tried if trial["options"] == OPTIMIZERS[name].start]
    return "" if not losses else "failed" if losses[0] is None else f"{losses[0]:.4g}"


def at_epochs(problem: Problem, run: dict) -> dict | None:
    """The entry after the problem's epochs; None of a run that did not come so far."""
    history = [entry for entry in run["history"] if entry["train_loss"] is not None]
    return next((entry for entry in history if entry["epoch"] == problem.epochs), None)


def at_seconds(run: dict, seconds: float) -> dict:
    """The last entry by then."""
    return [entry for entry in run["history"] if entry["seconds"] <= seconds][-1]


def spread(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{statistics.median(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})"
