"""Train three networks with MBF and its rivals, and compare: python -m benchmarks.demo [--fast]

Writes summary.json and one picture per problem into --out, and ends with a table. Every optimizer gets the
same initial weights, batches and number of epochs. Learning rates (and the damping of the paper's form) were
chosen on one grid, recorded in tuned.json; MBF takes exactly Adam's learning rate. --optimizer takes all other
methods by name too.
"""

import argparse
import json
import math
import time
import traceback
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.optimizers import OPTIMIZERS, NotApplicable
from benchmarks.plots import plot
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.table import table
from benchmarks.train import train
from benchmarks.tuned import settings

SHOWN = ("mbf", "mbf-paper", "adam", "muon", "sgd")

NOTE = """\
Every optimizer starts from the same weights and sees the same batches. Seconds are of training alone;
ms/step is the median of the optimizer's own step. For how the settings were chosen see benchmarks/tuned.json.
The CURVES-like images are our own re-creation of that data set: losses do not compare with published ones."""


def attempt(problem: Problem, optimizer: str, *, seed: int, **how) -> dict:
    """A run; one that cannot start or breaks gets a note instead of a history, and the others go on."""
    options = settings(problem.name, optimizer)
    blank = {"problem": problem.name, "optimizer": optimizer, "options": options, "history": [], "seed": seed}
    try:
        return train(problem, optimizer, options, seed=seed, **how)
    except NotApplicable as reason:
        return blank | {"note": f"does not apply: {reason}"}
    except Exception as error:
        traceback.print_exc()
        return blank | {"note": f"failed: {error}"}


def plain(value):
    """The same data without nan and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few epochs only: a look in less than a minute")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=list(PROBLEMS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=list(SHOWN))
    parser.add_argument("--epochs", type=int, help="default: each problem's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    start, runs, tables = time.perf_counter(), [], []
    for name in args.problem:
        problem = PROBLEMS[name](args.device)
        epochs = args.epochs or (problem.fast_epochs if args.fast else problem.epochs)
        how = {"epochs": epochs, "seed": args.seed, "device": args.device}
        batch = [attempt(problem, optimizer, **how) for optimizer in args.optimizer]
        plot(problem, batch, args.out / f"{name}.png")
        tables.append(table(problem, batch, epochs))
        runs += batch
    summary = {"environment": environment(args.device), "fast": args.fast, "seed": args.seed, "runs": runs}
    (args.out / "summary.json").write_text(json.dumps(plain(summary), indent=1, allow_nan=False) + "\n")
    print("\n" + "\n\n".join(tables), NOTE, sep="\n\n")
    print(f"\n{time.perf_counter() - start:.0f} s in all; curves and settings are in {args.out}/")
    if any(run["note"].startswith("failed") for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
