"""The demo's table: the final numbers of all runs of a problem, as text."""

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import Problem

COLUMNS = ("lr", "damping", "train loss", "test loss", "test acc.", "seconds", "ms/step")


def table(problem: Problem, runs: list[dict], epochs: int) -> str:
    title = f"{problem.title}: {epochs} epochs of {problem.steps} steps"
    losses = f"losses in {problem.unit}, means over {sampled(problem, 'train')} and {sampled(problem, 'test')}"
    return "\n".join([title, losses, line("optimizer", COLUMNS), *map(row, runs)])


def sampled(problem: Problem, split: str) -> str:
    """What is evaluated of a split: "all 500 test samples" or "5,000 of 10,000 test samples"."""
    probed, samples = len(problem.probed(split)[0]), len(getattr(problem, split)[0])
    share = f"all {samples:,}" if probed == samples else f"{probed:,} of {samples:,}"
    return f"{share} {split} samples"


def row(run: dict) -> str:
    """A run's line: its numbers, or why it has none."""
    label, options = OPTIMIZERS[run["optimizer"]].label, run["options"]
    if not run["history"]:
        return f"{label:22}   {run['note']}"
    settings = [number(options.get("lr")), number(options.get("damping"))]
    if run["note"]:
        return f"{line(label, settings)}   {run['note']}"
    last = run["history"][-1]
    results = [number(last.get(name)) for name in ("train_loss", "test_loss", "test_accuracy")]
    return line(label, [*settings, *results, f"{last['seconds']:.1f}", f"{run['step_ms']:.2f}"])


def line(label: str, cells: list[str]) -> str:
    return f"{label:22}" + "".join(f"{cell:>11}" for cell in cells)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
