"""What the optimizers that look at layers cost in training: whole iterations on real networks, beside Adam's.

They do three kinds of steps: most apply what they have, some update the statistics (with a backward pass of drawn
targets), few refresh the inverses too. Each kind is timed, all methods in turn; the average is that of the intervals
that are the library's defaults.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import mbf_optim
import torch
from mbf_optim.layerwise import EARLY
from torch.optim import Optimizer

from benchmarks.cpu.plan import Plan
from benchmarks.cpu.steps import timed as seconds
from benchmarks.memory import state_bytes
from benchmarks.methods import step_bytes
from benchmarks.problems import PROBLEMS, Problem

LR = 1e-6  # the weights stay where they are, so that all steps do the same work
KINDS = {"every": 1, "statistics": 2, "inverses": 0}  # a step of that kind, of every four
INTERVALS = {"update_interval": 2, "factor_interval": 4}


@dataclass(frozen=True)
class Entrant:
    label: str
    make: Callable[..., Optimizer]  # of a model
    library: str = ""  # the class of mbf_optim whose default intervals count
    closure: bool = False

    def average(self, times: dict[str, float]) -> float:
        """Of the times of the three kinds of iterations."""
        updates, refreshes = (self._every(interval) for interval in INTERVALS)
        plain, statistics, inverses = (times[kind] for kind in KINDS)
        return plain + (statistics - plain) / updates + (inverses - statistics) / refreshes

    def _every(self, interval: str) -> float:
        parameters = inspect.signature(getattr(mbf_optim, self.library)).parameters if self.library else {}
        return parameters[interval].default if interval in parameters else math.inf


def torch_optimizer(name: str, **options) -> Callable[..., Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=LR, fused=True, **options)


def looking(name: str, label: str, **options) -> Entrant:
    """At layers: with both intervals, and drawn targets."""

    def make(model: torch.nn.Module) -> Optimizer:
        return getattr(mbf_optim, name)(model, lr=LR, distribution=model.distribution, **INTERVALS, **options)

    return Entrant(label, make, name)


def quasi_newton(name: str, label: str) -> Entrant:
    return Entrant(label, lambda model: getattr(mbf_optim, name)(model, lr=LR), name, closure=True)


ENTRANTS = {
    "sgd": Entrant("SGD, momentum (fused)", torch_optimizer("SGD", momentum=0.9)),
    "adam": Entrant("Adam (fused)", torch_optimizer("Adam")),
    "mbf": Entrant("MBF", lambda model: mbf_optim.MBF(model.named_parameters(), lr=LR)),
    "adafisher": Entrant("AdaFisher", lambda model: mbf_optim.AdaFisher(model, lr=LR, update_interval=2), "AdaFisher"),
    "kfac": looking("KFAC", "K-FAC"),
    "kfac-exact": looking("KFAC", "K-FAC, exact damping", damping_form="exact"),
    "two-level": looking("TwoLevelKFAC", "two-level K-FAC"),
    "two-level-additive": looking("TwoLevelKFAC", "two-level K-FAC, additive", form="additive"),
    "kpsvd": looking("KPSVD", "KPSVD"),
    "deflation": looking("KPSVD", "KPSVD, deflation", method="deflation"),
    "lanczos": looking("KPSVD", "KPSVD, Lanczos", method="lanczos"),
    "kfac-corrected": looking("KPSVD", "KPSVD, K-FAC corrected", method="kfac_corrected"),
    "kbfgs": quasi_newton("KBFGS", "K-BFGS"),
    "kbfgsl": quasi_newton("KBFGSL", "K-BFGS(L)"),
}


class Training:
    """A network and its optimizer; a step is a whole iteration."""

    def __init__(self, problem: Problem, entrant: Entrant):
        self._problem, self._closure = problem, entrant.closure
        self.model = problem.model(seed=0)
        self.optimizer = entrant.make(self.model)
        self._batches = cycle(list(problem.batches(seed=0, epoch=1))[:8])

    def step(self) -> None:
        inputs, targets = next(self._batches)

        def loss() -> torch.Tensor:
            self.optimizer.zero_grad()
            value = self._problem.criterion(self.model(inputs), targets)
            value.backward()
            return value

        if self._closure:
            self.optimizer.step(loss)
        else:
            loss()
            self.optimizer.step()


def rows(plan: Plan) -> Iterator[dict]:
    for name in plan.problems:
        yield from rows_of_problem(PROBLEMS[name](), plan.rounds)


def rows_of_problem(problem: Problem, rounds: int) -> Iterator[dict]:
    trainings = {key: Training(problem, entrant) for key, entrant in ENTRANTS.items()}
    times = timed(trainings, rounds)
    for key, training in trainings.items():
        entrant, count = ENTRANTS[key], sum(parameter.numel() for parameter in training.model.parameters())
        yield {
            "part": "iterations",
            "what": problem.title,
            "parameters": count,
            "batch": problem.batch,
            "method": key,
            "label": entrant.label,
            "median_us": entrant.average(times[key]),
            **{f"{kind}_us": microseconds for kind, microseconds in times[key].items()},
            "state_bytes_per_parameter": state_bytes(training.optimizer) / count,
            "step_bytes_per_parameter": step_bytes(training.optimizer, training.model.parameters()) / count,
        }


def timed(trainings: dict[str, Training], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of an iteration, by kind: medians over so many rounds of four, all methods in turn."""
    cycle_length = INTERVALS["factor_interval"]
    for training in trainings.values():
        for _ in range(EARLY + cycle_length):
            training.step()
    found = {key: {kind: [] for kind in KINDS} for key in trainings}
    for _ in range(rounds):
        for key, training in trainings.items():
            elapsed = [seconds(training.step) for _ in range(cycle_length)]
            for kind, index in KINDS.items():
                found[key][kind].append(1e6 * elapsed[index])
    return {key: {kind: statistics.median(times) for kind, times in kinds.items()} for key, kinds in found.items()}
