"""Every op at the boundary sizes of every mapping, checked against float64: what the sanitizers look at.

Inputs are made and results are checked on the CPU, so that the kernels are nearly all that runs on the device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

import mbf_kernels
from mbf_kernels import (
    SymmetricBlocks,
    accumulate_,
    accumulate_factor_solve_,
    factor,
    mbf_step_,
    native,
    rank_one_step_,
    solve,
)
from mbf_kernels.testing import RATIO, assert_below, assert_factors, assert_solves, randn, spd_blocks

SIZES = (1, 2, 9, 12, 13, 16, 20, 21, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 128)
COUNTS = (33, 1, 32, 31)  # the tile, its neighbours, and one
OUTPUTS = {33: 3, 32: 4, 31: 1, 1: 1}  # of a weight with so many blocks
DTYPES = (torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last")
MAPPINGS = {"thread": 20, "group": 64, "block": 128}  # the largest size that each serves
DOUBLE_THREAD = 12
DECAY, DAMPING = 0.9, 0.1

FORMS = {  # of mbf_step_
    "paper": {},
    "grafted": {"graft": "adam", "nesterov": True, "relative": True, "weight_decay": 0.1},
    "maximize": {"graft": "adam", "maximize": True},
    "kept": {"update": False, "nesterov": True},
    "cached": {"refactor": True, "relative": True},
    "from cache": {"refactor": False, "graft": "adam"},
}


def mappings(n: int, dtype: torch.dtype, forced: bool) -> list[str | None]:
    """Those that serve the size, where they can be forced at all."""
    if not forced:
        return [None]
    limits = MAPPINGS | ({"thread": DOUBLE_THREAD} if dtype == torch.float64 else {})
    return [name for name, largest in limits.items() if n <= largest]


def cases(sizes: tuple[int, ...], counts: tuple[int, ...], forced: bool) -> Iterator[tuple]:
    """(check, arguments, mapping), every size once before the next count or dtype: time may run out."""
    for count, dtype, n in product(counts, DTYPES, sizes):
        for mapping in mappings(n, dtype, forced):
            yield check_accumulate, (n, count, dtype), mapping
            yield check_factor_and_solve, (n, count, dtype), mapping
            for layout in LAYOUTS:
                yield check_fused, (n, count, dtype, layout), mapping
                for form in FORMS:
                    yield check_step, (n, count, dtype, layout, form), mapping
        for layout in LAYOUTS:
            yield check_rank_one, (n, count, dtype, layout), None


@lru_cache(maxsize=64)
def blocks(n: int, count: int, dtype: torch.dtype) -> Tensor:
    """[B, n, n] on the CPU, eigenvalues from 0.1 to 1."""
    return spd_blocks("well", count, n, dtype)


def accumulated(dense: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The new F in float64, and the bound on its rounding: six operations on each element."""
    eps = torch.finfo(dense.dtype).eps
    dense, g = dense.double(), g.double()
    outer = g[:, :, None] * g[:, None, :]
    return DECAY * dense + (1 - DECAY) * outer, 6 * eps * (DECAY * dense.abs() + (1 - DECAY) * outer.abs())


def damped(dense: Tensor) -> Tensor:
    return dense.double() + DAMPING * torch.eye(dense.shape[1], dtype=torch.float64)


def vectors(n: int, count: int, dtype: torch.dtype, layout: str, device: str, seed: int) -> Tensor:
    """[B, n]; channels_last: element after element of all blocks, as within one output of such a weight."""
    values = randn(count, n, dtype=dtype, seed=seed)
    return values.to(device) if layout == "contiguous" else values.mT.contiguous().to(device).mT


def check_accumulate(device: str, n: int, count: int, dtype: torch.dtype) -> None:
    fisher = SymmetricBlocks.from_dense(blocks(n, count, dtype)).to(device)
    g = vectors(n, count, dtype, "contiguous", device, seed=1)
    accumulate_(fisher, g, decay=DECAY)
    truth, bound = accumulated(blocks(n, count, dtype), g.cpu())
    assert_below((fisher.to("cpu").to_dense() - truth).abs(), bound, "error of F")


def check_factor_and_solve(device: str, n: int, count: int, dtype: torch.dtype) -> None:
    fisher = SymmetricBlocks.from_dense(blocks(n, count, dtype)).to(device)
    lower, info = factor(fisher, damping=DAMPING)
    assert not info.cpu().any(), "info is set for a good block"
    matrix = damped(blocks(n, count, dtype))
    assert_factors(matrix, lower.to("cpu").to_dense(), dtype)
    for columns in (1, 3):
        rhs = randn(count, n, columns, dtype=dtype, seed=2)
        assert_solves(matrix, solve(lower, rhs.to(device)).cpu(), rhs, dtype)


def check_fused(device: str, n: int, count: int, dtype: torch.dtype, layout: str) -> None:
    fisher = SymmetricBlocks.from_dense(blocks(n, count, dtype)).to(device)
    g, rhs = (vectors(n, count, dtype, layout, device, seed) for seed in (1, 2))
    x, info = accumulate_factor_solve_(fisher, g, rhs, decay=DECAY, damping=DAMPING)
    truth, bound = accumulated(blocks(n, count, dtype), g.cpu())
    assert not info.cpu().any(), "info is set for a good block"
    assert_below((fisher.to("cpu").to_dense() - truth).abs(), bound, "error of F")
    assert_solves(damped(truth), x.cpu(), rhs.cpu(), dtype)


class StepTensors:
    """What two tensors need for a step: a weight of `count` blocks and a smaller one beside it in the launch."""

    def __init__(self, device: str, n: int, count: int, dtype: torch.dtype, layout: str, values: torch.dtype):
        """`dtype`: as the step computes; `values`: what the numbers are rounded to before."""
        self.weights, self.grads, self.momenta, self.fishers, self.factors, self.skipped = ([] for _ in range(6))
        for seed, blocks_here in enumerate((count, 1)):
            shape = (OUTPUTS[blocks_here], blocks_here // OUTPUTS[blocks_here], n)
            for offset, group in enumerate((self.weights, self.grads, self.momenta)):
                group.append(laid_out(randn(*shape, dtype=values, seed=10 * seed + offset).to(dtype), layout, device))
            dense = blocks(n, blocks_here, values).to(dtype)
            self.fishers.append(SymmetricBlocks.from_dense(dense).to(device))
            lower = torch.linalg.cholesky(dense.double()).to(values).to(dtype).tril()
            self.factors.append(SymmetricBlocks.from_dense(lower + lower.tril(-1).mT).to(device))
            self.skipped.append(torch.zeros((), dtype=torch.int64, device=device))

    def step(self, form: str) -> list[Tensor]:
        options = FORMS[form]
        factors = self.factors if "refactor" in options else None
        return mbf_step_(
            self.weights, self.grads, self.momenta, self.fishers, lr=0.1, momentum=0.9, decay=DECAY, damping=DAMPING,
            momentum_weight=0.1, fisher_weight=0.5, factors=factors, skipped=self.skipped, **options,
        )  # fmt: skip


def laid_out(weight: Tensor, layout: str, device: str) -> Tensor:
    """[O, I, n] on the device; channels_last: with the inputs innermost in memory."""
    return weight.to(device) if layout == "contiguous" else weight.mT.contiguous().to(device).mT


def check_step(device: str, n: int, count: int, dtype: torch.dtype, layout: str, form: str) -> None:
    tensors, before = (StepTensors(device, n, count, dtype, layout, dtype) for _ in range(2))
    truth = StepTensors("cpu", n, count, torch.float64, "contiguous", dtype)
    infos = tensors.step(form)
    with mbf_kernels.use_backend("reference"):
        truth.step(form)
    assert not any(bool(info.cpu().any()) for info in infos), "info is set for a good block"
    assert not any(int(skipped) for skipped in tensors.skipped), "a good block was skipped"
    check_vectors(tensors, before, truth, condition(truth, form), dtype)
    eps = torch.finfo(dtype).eps
    for got, want in zip(tensors.fishers, truth.fishers, strict=True):
        # six roundings of two positive semidefinite terms, whose norms add up to sqrt(2) that of their sum at most
        assert_near(got.to("cpu").to_packed(), want.to_packed(), 12 * eps * norm(want.to_packed()), "F")
    for got, want in zip(tensors.factors, truth.factors, strict=True):
        bound = (RATIO * n + 6) * eps * condition(truth, form) * norm(want.to_packed())
        assert_near(got.to("cpu").to_packed(), want.to_packed(), bound, "the factors")


def condition(truth: StepTensors, form: str) -> float:
    """A bound on that of every matrix solved with: (trace + lambda) / lambda."""
    if "refactor" in FORMS[form] and not FORMS[form]["refactor"]:
        return 10.0  # the cached factors are of F as it was drawn
    traces = torch.cat([fisher.diagonal().sum(1) for fisher in truth.fishers])
    ridges = DAMPING * (traces / truth.fishers[0].size if FORMS[form].get("relative") else torch.ones_like(traces))
    return (traces / ridges + 1).max().item()


def check_vectors(
    tensors: StepTensors, before: StepTensors, truth: StepTensors, worst: float, dtype: torch.dtype
) -> None:
    """Block by block. M is two roundings away from its old value and g; W a solve, and the rounding of the sum."""
    eps, n = torch.finfo(dtype).eps, truth.fishers[0].size
    for got, want, start in zip(tensors.momenta, truth.momenta, before.momenta, strict=True):
        assert_near(got.cpu(), want, 4 * eps * (norm(want) + norm(start.cpu())), "the momenta")
    for got, want, start in zip(tensors.weights, truth.weights, before.weights, strict=True):
        moved = norm(want - start.cpu())
        assert_near(got.cpu(), want, (RATIO * n + 5) * eps * worst * moved + 4 * eps * norm(want), "the weights")


def check_rank_one(device: str, n: int, count: int, dtype: torch.dtype, layout: str) -> None:
    """B rows of 4 n elements. M is three roundings away from its old value and g, W a dozen from its old value and M,
    and F is lambda at least."""
    start = [randn(count, 4, n, dtype=dtype, seed=seed) for seed in range(3)]
    s, h = (randn(length, dtype=dtype, seed=length).square() for length in (count, 4 * n))
    tensors = [laid_out(tensor, layout, device) for tensor in start]
    truth = [tensor.double() for tensor in start]
    step = {"lr": 0.1, "momentum": 0.9, "damping": DAMPING}
    rank_one_step_(*([tensor] for tensor in tensors), [s.to(device)], [h.to(device)], **step)
    with mbf_kernels.use_backend("reference"):
        rank_one_step_(*([tensor] for tensor in truth), [s.double()], [h.double()], **step)
    eps, (w, g, m) = torch.finfo(dtype).eps, [tensor.double().abs() for tensor in start]
    bound = 4 * eps * (m + g)
    assert_below((tensors[2].cpu() - truth[2]).abs(), bound, "error of the momenta")
    bound = step["lr"] / DAMPING * (bound + 12 * eps * truth[2].abs()) + 4 * eps * w
    assert_below((tensors[0].cpu() - truth[0]).abs(), bound, "error of the weights")


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double(), dim=-1)


def assert_near(got: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    assert_below(norm(got.double() - want), bound, f"error of {what}")


def run(todo: list[tuple], device: str, until: float) -> tuple[int, int]:
    """Runs the cases until the time is up; returns how many were run and how many were wrong."""
    wrong = done = 0
    for done, (check, arguments, mapping) in enumerate(todo, 1):
        forced: Callable = native.cuda_mapping if mapping else nullcontext
        try:
            with forced(mapping):
                check(device, *arguments)
        except Exception as error:
            wrong += 1
            print(f"wrong: {check.__name__}{arguments} {mapping}: {type(error).__name__}: {error}", flush=True)
        if done % 100 == 0:
            print(f"cases {done} of {len(todo)}", flush=True)
        if time.time() > until or wrong >= 20:
            break
    print(f"cases {done} of {len(todo)}", flush=True)
    return done, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", default="0/1", help="this one of so many, counted from 0")
    parser.add_argument("--until", type=float, default=float("inf"), help="the time to stop at, in seconds since 1970")
    parser.add_argument("--rehearse", action="store_true", help="a few cases on the CPU")
    options = parser.parse_args(arguments)
    index, of = map(int, options.shard.split("/"))
    torch.set_num_threads(1)
    emulated = mbf_kernels.backends()["emulated"] == "available"
    sizes, counts = ((2, 9, 21), (33, 1)) if options.rehearse else (SIZES, COUNTS)
    todo = list(cases(sizes, counts, forced=emulated or not options.rehearse))[index::of]
    chosen = "cuda" if not options.rehearse else "emulated" if emulated else None
    with mbf_kernels.use_backend(chosen) if chosen else nullcontext():
        _, wrong = run(todo, "cpu" if options.rehearse else "cuda", options.until)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
