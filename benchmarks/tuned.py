"""The chosen settings, from tuned.json: all that `benchmarks.tune` tried, by problem and optimizer."""

import json
from pathlib import Path

from benchmarks.optimizers import OPTIMIZERS

FILE = Path(__file__).with_name("tuned.json")


def settings(problem: str, optimizer: str) -> dict[str, float]:
    """The options of the best trial; where there is none, what tuning starts from. Plain MBF is not tuned: it takes
    exactly Adam's learning rate."""
    if optimizer == "mbf":
        return {"lr": settings(problem, "adam")["lr"]}
    finished = [trial for trial in load().get(problem, {}).get(optimizer, []) if trial["loss"] is not None]
    return dict(min(finished, key=lambda trial: trial["loss"])["options"] if finished else OPTIMIZERS[optimizer].start)


def load() -> dict[str, dict[str, list[dict]]]:
    """Trials by problem and optimizer; the loss of one that diverged or was given up is None."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}
