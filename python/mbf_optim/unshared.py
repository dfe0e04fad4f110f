"""The step of mini-blocks with a matrix each: one ``mbf_step_`` launch for all tensors of a block size."""

from __future__ import annotations

from mbf_kernels import SymmetricBlocks, mbf_step_

from .schedule import weights
from .tasks import Task


def unshared_step_(tasks: list[Task], group: dict) -> None:
    launches: dict[tuple, list[Task]] = {}
    for task in tasks:
        weight = task.tensors.weight
        key = (task.blocks.size, task.update, task.refactor, task.cached, weight.device, weight.dtype)
        launches.setdefault(key, []).append(task)
    for launch in launches.values():
        _launch(launch, group)


def _launch(tasks: list[Task], group: dict) -> None:
    first = tasks[0]
    momentum_weights, _, fisher_weights = zip(*(weights(task.state, group) for task in tasks), strict=True)
    for task in tasks if first.cached else ():
        if task.factor is None:
            task.factor = SymmetricBlocks.zeros(
                task.fisher.count, task.fisher.size, task.fisher.dtype, task.fisher.device
            )
    mbf_step_(
        [task.view("weight") for task in tasks],
        [task.view("grad") for task in tasks],
        [task.view("momentum") for task in tasks],
        [task.fisher for task in tasks],
        lr=group["lr"],
        momentum=group["momentum"],
        decay=group["decay"],
        damping=group["damping"],
        weight_decay=group["weight_decay"],
        relative=group["relative_damping"],
        graft=group["graft"],
        nesterov=group["nesterov"],
        eps=group["eps"],
        momentum_weight=momentum_weights,
        fisher_weight=fisher_weights,
        update=first.update,
        factors=[task.factor for task in tasks] if first.cached else None,
        refactor=first.refactor,
        skipped=[task.state["skipped"] for task in tasks],
    )
