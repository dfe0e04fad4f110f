"""Try a grid and record every trial: python -m benchmarks.tune --problem curves --optimizer adam

All optimizers get the same learning rates, seed, batches and epochs. The paper's form of MBF has a damping to
choose as well, so it gets more trials than the others, not fewer: its step at zero curvature is lr / damping,
which is taken from around the ratios that its authors settled on, 0.01 and 0.03.
"""

import argparse
import itertools
import json

import torch

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.train import train
from benchmarks.tuned import FILE, load

GRID = [float(f"{mantissa}e{exponent}") for exponent in range(-6, 0) for mantissa in (1, 3)]
RATES = GRID[4:]  # 1e-4 to 3e-1
DAMPINGS = range(GRID.index(1e-3), len(GRID))  # 1e-3 to 3e-1, as places on the grid
STEPS_DOWN = (2, 3, 4)  # from the damping to the learning rate: a ratio of 0.1, about 0.03, and 0.01


def grid(optimizer: str) -> list[dict[str, float]]:
    """The options of every trial."""
    if not OPTIMIZERS[optimizer].damped:
        return [{"lr": lr} for lr in RATES]
    pairs = itertools.product(DAMPINGS, STEPS_DOWN)
    return [{"lr": GRID[place - down], "damping": GRID[place]} for place, down in pairs]


def trial(problem: Problem, optimizer: str, options: dict) -> dict:
    """The options and the loss they end with; None if the run diverged."""
    run = train(problem, optimizer, options, epochs=problem.epochs)
    loss = run["history"][-1][problem.judge]
    return {"options": options, "loss": None if run["note"] else loss}


def record(problem: str, optimizer: str, trials: list[dict]) -> None:
    """Replace this entry of tuned.json."""
    tuned = load()
    tuned.setdefault(problem, {})[optimizer] = trials
    FILE.write_text(json.dumps(tuned, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = PROBLEMS[args.problem]()
    trials = []
    for options in grid(args.optimizer):
        trials.append(trial(problem, args.optimizer, options))
        record(args.problem, args.optimizer, trials)


if __name__ == "__main__":
    main()
