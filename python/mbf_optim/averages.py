"""Matrices that mini-blocks of several processes share: the average over all of them, in one message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks

from .tasks import Task


def average_over_processes(tasks: Sequence[tuple[Task, float]]) -> None:
    """F <- decay F + (1 - decay) / S sum_s g_s g_s^T of every task with its decay, s over the mini-blocks of all
    processes.

    The sums of outer products are exact parts of the whole's, so that a sharded step is that of one process. A matrix
    whose new diagonal is not finite keeps its value. A collective: one all-reduce for the tasks of a mesh and dtype.
    """
    messages: dict[tuple, list[tuple[Task, float]]] = {}
    for task, decay in tasks:
        key = (task.averaged_over, task.fisher.dtype, task.fisher.device)
        messages.setdefault(key, []).append((task, decay))
    for (groups, dtype, device), alike in messages.items():
        sizes = [math.prod(task.blocks.packed_shape) for task, _ in alike]
        message = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = message.split(sizes)
        for (task, _), part in zip(alike, parts, strict=True):
            part.copy_(_sum_of_squares(task).flatten())
        for group in groups:
            torch.distributed.all_reduce(message, group=group)
        for (task, decay), part in zip(alike, parts, strict=True):
            _average(task, part, decay)


def _sum_of_squares(task: Task) -> Tensor:
    """sum_s g_s g_s^T over the mini-blocks here, packed [R, T]."""
    g = task.gradients()
    row, column = torch.tril_indices(task.blocks.size, task.blocks.size, device=g.device)
    return torch.bmm(g.permute(1, 2, 0), g.transpose(0, 1))[:, row, column]


def _average(task: Task, total: Tensor, decay: float) -> None:
    fisher, outputs = task.fisher, task.layer.weight.shape[0]
    old = fisher.to_packed()
    new = decay * old + (1 - decay) / (outputs * task.blocks.each) * total.view_as(old)
    finite = SymmetricBlocks.from_packed(new).diagonal().isfinite().all(1, keepdim=True)
    fisher.data.copy_(SymmetricBlocks.from_packed(torch.where(finite, new, old)).data)
