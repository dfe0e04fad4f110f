"""Tune one optimizer and record every trial: python -m benchmarks.tune --problem curves --optimizer kfac

What is tuned (the learning rate, and for most a damping) is walked over the grid {1, 3} x 10^k, from the method's own
defaults: a step to a neighbour that ends with a lower loss is taken and tried again, until no neighbour is better or
the trials are used up. All optimizers get the same number of trials, seed, batches and epochs. Plain MBF has none: it
takes Adam's learning rate.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.train import train
from benchmarks.tuned import FILE, load

BUDGET = 12  # trials
FAIR_SHARE = 0.6  # of the best trial's progress, log(fresh / loss); less after a fifth of the epochs ends a trial
LITTLE = 0.1  # of progress: below, a trial has failed, or a dead network would do better than a live one that diverges
MANTISSAS = (1, 3)

Place = tuple[int, ...]  # on the grid, a number for each option


def value(place: int) -> float:
    exponent, index = divmod(place, len(MANTISSAS))
    return float(f"{MANTISSAS[index]}e{exponent}")


def place_of(wanted: float) -> int:
    return min(range(-20, 5), key=lambda place: abs(math.log(value(place) / wanted)))


def moves(dimensions: int) -> list[Place]:
    """Along one option; then along a diagonal."""
    if dimensions == 1:
        return [(1,), (-1,)]
    return [(1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def retreats(dimensions: int) -> Iterator[Place]:
    """To shorter steps and more damping in turn."""
    return cycle([(-1,)] if dimensions == 1 else [(-1, 0), (0, 1)])


def walk(start: Place, loss_at: Callable[[Place], float], budget: int) -> None:
    """Downhill over the grid, straight on first; a start that fails is retreated from until one does not. Calls
    ``loss_at`` for at most ``budget`` places, for each once."""
    here, tried, order, back = start, {start: loss_at(start)}, moves(len(start)), retreats(len(start))
    while tried[here] == math.inf and len(tried) < budget:
        here = _moved(here, next(back))
        tried[here] = loss_at(here)
    while (better := next(_better(here, tried, order, loss_at, budget), None)) is not None:
        there, move = better
        here, order = there, [move] + [other for other in order if other != move]


def _better(
    here: Place, tried: dict[Place, float], order: list[Place], loss_at: Callable[[Place], float], budget: int
) -> Iterator[tuple[Place, Place]]:
    for move in order:
        there = _moved(here, move)
        if there in tried:
            continue
        if len(tried) == budget:
            return
        tried[there] = loss_at(there)
        if tried[there] < tried[here]:
            yield there, move


def _moved(place: Place, move: Place) -> Place:
    return tuple(a + b for a, b in zip(place, move, strict=True))


class Trials:
    """Of one optimizer on one problem; each is recorded in tuned.json as soon as it ends."""

    def __init__(self, problem: Problem, optimizer: str):
        self._problem, self._optimizer = problem, optimizer
        self._names = list(OPTIMIZERS[optimizer].start)
        self._trials: list[dict] = []
        self._best: list[dict] = []  # the history of the best trial

    def loss_at(self, place: Place) -> float:
        options = dict(zip(self._names, map(value, place), strict=True))
        note, loss = self._refused(options), math.inf
        if not note:
            how = {"epochs": self._problem.epochs, "hopeless": partial(behind, self._best)}
            run = train(self._problem, self._optimizer, options, **how)
            note = run["note"] or ("learned nothing" if _progress(run["history"], -1) < LITTLE else "")
            loss = math.inf if note else run["history"][-1][self._problem.judge]
        if loss < min((trial["loss"] for trial in self._trials if trial["loss"] is not None), default=math.inf):
            self._best[:] = run["history"]
        self._trials.append({"options": options, "loss": None if note else loss, "note": note})
        record(self._problem.name, self._optimizer, self._trials)
        return loss

    def _refused(self, options: dict) -> str:
        """Why the optimizer does not take these options; empty if it does."""
        try:
            OPTIMIZERS[self._optimizer].make(self._problem.model(seed=0), **options)
        except ValueError as reason:
            return f"refused: {reason}"
        return ""


def behind(best: list[dict], history: list[dict]) -> bool:
    """Whether a trial, after a fifth of the epochs or more, has come too little of the best one's way: by then, or in
    all if the best one lost ground later."""
    epoch = len(history) - 1
    if not best or epoch < (len(best) - 1) / 5:
        return False
    return _progress(history, epoch) < FAIR_SHARE * min(_progress(best, epoch), _progress(best, -1))


def _progress(history: list[dict], epoch: int) -> float:
    return math.log(history[0]["train_loss"] / history[epoch]["train_loss"])


def record(problem: str, optimizer: str, trials: list[dict]) -> None:
    """Replace this entry of tuned.json."""
    tuned = load()
    tuned.setdefault(problem, {})[optimizer] = trials
    FILE.write_text(json.dumps(tuned, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, required=True)
    parser.add_argument("--optimizer", choices=[name for name in OPTIMIZERS if name != "mbf"], required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trials = Trials(PROBLEMS[args.problem](), args.optimizer)
    start = tuple(place_of(wanted) for wanted in OPTIMIZERS[args.optimizer].start.values())
    walk(start, trials.loss_at, BUDGET)


if __name__ == "__main__":
    main()
