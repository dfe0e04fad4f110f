"""Train one problem with one optimizer: python -m benchmarks.train --problem curves --optimizer mbf"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.tuned import settings


def train(problem: Problem, optimizer: str, options: dict, *, epochs: int, seed: int = 0, device: str = "cpu") -> dict:
    """Train and return the history: one entry per epoch, and entry 0 for the fresh model.

    `seconds` adds up the training steps, `step_ms` is the median of the optimizer's own step; evaluation is
    outside of both. A run whose loss is no longer finite stops there and says so in its `note`.
    """
    model = problem.model(seed, device)
    stepper = OPTIMIZERS[optimizer].make(model, **options)
    history, seconds, step_times = [measure(problem, model, epoch=0, seconds=0.0)], 0.0, []
    note = ""
    with tqdm(total=epochs * problem.steps, desc=f"{problem.name:7} {optimizer:10}", ncols=100) as bar:
        for epoch in range(1, epochs + 1):
            for inputs, targets in problem.batches(seed, epoch):
                start = now(device)
                loss = problem.criterion(model(inputs), targets)
                stepper.zero_grad()
                loss.backward()
                before_step = now(device)
                stepper.step()
                end = now(device)
                seconds += end - start
                step_times.append(end - before_step)
                bar.update()
            history.append(measure(problem, model, epoch=epoch, seconds=seconds))
            bar.set_postfix_str(f"loss {history[-1]['train_loss']:.4g}")
            if not math.isfinite(history[-1]["train_loss"]):
                note = f"diverged in epoch {epoch}"
                break
    return {
        "problem": problem.name,
        "optimizer": optimizer,
        "options": options,
        "seed": seed,
        "note": note,
        "step_ms": 1e3 * statistics.median(step_times),
        "history": history,
    }


def measure(problem: Problem, model: nn.Module, **entry) -> dict[str, float]:
    """An entry of the history: losses (and accuracies) over the training and the test split."""
    return entry | problem.evaluate(model, "train") | problem.evaluate(model, "test")


def now(device: str) -> float:
    """Seconds on a clock that waits for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--epochs", type=int, help="default: the problem's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lr", type=float, help="default: the tuned one")
    parser.add_argument("--damping", type=float, help="default: the tuned one, or the optimizer's own")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="any keyword")
    parser.add_argument("--out", help="write the history to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    problem = PROBLEMS[args.problem](args.device)
    options = settings(args.problem, args.optimizer)
    options |= {key: value for key in ("lr", "damping") if (value := getattr(args, key)) is not None}
    options |= {name: literal(value) for name, value in (option.split("=") for option in args.option)}
    epochs = args.epochs or problem.epochs
    run = train(problem, args.optimizer, options, epochs=epochs, seed=args.seed, device=args.device)
    for entry in run["history"]:
        print("  ".join(f"{name} {value:<10.5g}" for name, value in entry.items()))
    print(f"step {run['step_ms']:.2f} ms, options {options} {run['note']}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(run, file)


def literal(text: str):
    """A number, true, false or null as JSON writes it; else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
