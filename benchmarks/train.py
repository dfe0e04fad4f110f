"""Train one problem with one optimizer: python -m benchmarks.train --problem curves --optimizer mbf"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.optimizers import OPTIMIZERS, Together
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.tuned import settings


def train(
    problem: Problem,
    optimizer: str,
    options: dict,
    *,
    epochs: int,
    seconds: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    hopeless: Callable[[list[dict]], bool] = lambda history: False,
) -> dict:
    """Train and return the history: one entry per epoch, and entry 0 for the fresh model.

    A run goes on for so many epochs, and for so many seconds. `seconds` in the history adds up the training steps:
    evaluation is outside. `iteration_ms` is the mean of all of them, `step_ms` the median of what the optimizer takes
    beside one forward and backward pass. A run whose loss is no longer finite, or whose history is `hopeless`, stops
    there and says so in its `note`.
    """
    model = problem.model(seed, device)
    method = OPTIMIZERS[optimizer]
    iterate = Iteration(problem.criterion, model, method.make(model, **options), method.closure, device)
    history, note, epoch = [measure(problem, model, epoch=0, seconds=0.0)], "", 0
    with tqdm(total=epochs * problem.steps, desc=f"{problem.name:7} {optimizer:10}", ncols=100) as bar:
        while not note and (epoch < epochs or iterate.seconds < seconds):
            epoch += 1
            for inputs, targets in problem.batches(seed, epoch):
                iterate(inputs, targets)
                bar.update()
            history.append(measure(problem, model, epoch=epoch, seconds=iterate.seconds))
            bar.set_postfix_str(f"loss {history[-1]['train_loss']:.4g}")
            if not math.isfinite(history[-1]["train_loss"]):
                note = f"diverged in epoch {epoch}"
            elif hopeless(history):
                note = f"given up in epoch {epoch}"
    return {
        "problem": problem.name,
        "optimizer": optimizer,
        "options": options,
        "seed": seed,
        "note": note,
        "iteration_ms": 1e3 * iterate.seconds / len(iterate.steps),
        "step_ms": 1e3 * statistics.median(iterate.steps),
        "history": history,
    }


class Iteration:
    """One step of training, timed."""

    def __init__(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        model: nn.Module,
        stepper: Optimizer | Together,
        closure: bool,
        device: str,
    ):
        self._criterion, self._model, self._stepper = criterion, model, stepper
        self._closure, self._device = closure, device
        self.seconds = 0.0  # of all so far
        self.steps: list[float] = []  # seconds of each but for one forward and backward pass

    def __call__(self, inputs: Tensor, targets: Tensor) -> None:
        passes = []

        def loss() -> Tensor:
            before = now(self._device)
            value = self._criterion(self._model(inputs), targets)
            self._stepper.zero_grad()
            value.backward()
            passes.append(now(self._device) - before)
            return value

        start = now(self._device)
        if self._closure:
            self._stepper.step(loss)
        else:
            loss()
            self._stepper.step()
        spent = now(self._device) - start
        self.seconds += spent
        self.steps.append(spent - passes[0])


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
