"""An optimizer's whole step on the tensors of real networks: time, memory, and the plain copy of the same bytes.

torch's optimizers and ours run interleaved on the same weights and gradients, with states of their own. Libraries whose
steps alter gradients run one by one on copies.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.cpu.copies import copies, name
from benchmarks.cpu.plan import Case, Plan
from benchmarks.memory import state_bytes, with_peak_bytes
from benchmarks.methods import METHODS, Method, check_first_steps, period_of, random_parameters, step_bytes
from benchmarks.optimizers import NotApplicable, Together
from benchmarks.peers import missing
from benchmarks.timing import race

TOGETHER = ("torch", "mbf_optim")  # the libraries whose steps leave gradients as they are
WARM_UP = 3  # steps that a race takes first
RARE = 10  # steps after the first, in which even MBF's matrices above 128 are refreshed


@dataclass
class Contestant:
    method: Method
    optimizer: Optimizer | Together
    period: int
    moved: int
    memory: dict


def rows(plan: Plan) -> Iterator[dict]:
    for what, case in plan.cases.items():
        alone = [[key] for key, method in METHODS.items() if method.library not in TOGETHER and case.libraries]
        for keys in ([key for key, method in METHODS.items() if method.library in TOGETHER], *alone):
            yield from rows_of_case(plan, what, case, keys)
            gc.collect()


def rows_of_case(plan: Plan, what: str, case: Case, keys: list[str]) -> Iterator[dict]:
    parameters = random_parameters(case.shapes, "cpu", case.layout)
    count = sum(parameter.numel() for parameter in parameters.values())
    facts = {"part": "steps", "what": what, "layout": case.layout, "tensors": len(parameters), "parameters": count}
    contestants: dict[str, Contestant] = {}
    for key in keys:
        try:
            contestants[key] = enter(plan, METHODS[key], parameters)
        except NotApplicable as reason:
            yield facts | {"method": key, "label": METHODS[key].label, "absent": str(reason)}
        except Exception as error:  # a library's own failure is a result
            if METHODS[key].library in TOGETHER:
                raise
            yield facts | {
                "method": key,
                "label": METHODS[key].label,
                "absent": f"{type(error).__name__}: {error}"[:200],
            }
    if not contestants:
        return
    calls = {key: contestant.optimizer.step for key, contestant in contestants.items()}
    periods = {key: contestant.period for key, contestant in contestants.items()}
    same_bytes = copies(contestant.moved for contestant in contestants.values())
    timings = race(calls | same_bytes, "cpu", 4 * plan.seconds, periods)
    for key, contestant in contestants.items():
        timing, copied = timings[key], timings[name(contestant.moved)]
        yield facts | {"method": key, "label": contestant.method.label} | timing.record(contestant.moved) | {
            "mean_us": timing.mean * 1e6,
            "worst_us": timing.worst * 1e6,
            "period": contestant.period,
            "times_copy": timing.mean / copied.median if contestant.period > 1 else timing.median / copied.median,
        } | contestant.memory  # fmt: skip


def enter(plan: Plan, method: Method, parameters: dict[str, Parameter]) -> Contestant:
    """Checks an optimizer's first steps, then measures the memory of another one, which goes on to be timed. Raises
    NotApplicable with the reason where it cannot take part."""
    if reason := missing(method.library):
        raise NotApplicable(reason)
    if method.library not in TOGETHER and cubes(parameters.values()) > plan.cubes:
        raise NotApplicable("left out: matrices too large for the time of this run")
    twins = {name: Parameter(parameter.data) for name, parameter in parameters.items()}  # the same storage
    for parameter, twin in zip(parameters.values(), twins.values(), strict=True):
        twin.grad = parameter.grad
    checked = method.make(list(twins.items()))
    check_first_steps(twins, method, checked)
    period, seconds = period_of(method, checked), max(timed(checked.step), timed(checked.step))
    profiled = 1 + min(period, RARE)
    needed = max(period, profiled) + WARM_UP + period
    if period > 1 and needed * seconds > plan.patience:
        raise NotApplicable(f"left out: a step takes {seconds:.1f} s, and {needed} are needed")
    del checked
    optimizer, peak = with_peak_bytes(lambda: method.make(list(twins.items())), profiled)
    for _ in range(period - profiled):  # MBF refreshes more often in its first period
        optimizer.step()
    steady, count = state_bytes(optimizer), sum(twin.numel() for twin in twins.values())
    memory = {"steady_bytes_per_parameter": steady / count, "peak_bytes_per_parameter": peak / count}
    return Contestant(method, optimizer, period, step_bytes(optimizer, twins.values()), memory)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cubes(parameters: Iterable[Tensor]) -> float:
    """What an eigendecomposition of the two sides of every matrix costs, but for a constant."""
    return float(sum(side**3 for parameter in parameters for side in parameter.shape if parameter.ndim > 1))
