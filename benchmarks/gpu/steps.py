"""Whole optimizer steps and training iterations, beside torch's optimizers on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from mbf_optim import MBF
from torch.nn import Parameter, functional
from torch.optim import Adam, Optimizer

import mbf_kernels
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import Shape, filters, resnet50, transformer
from benchmarks.gpu.timing import measure, measure_graph, measure_host
from benchmarks.models import ResNet18
from mbf_kernels.testing import RATIO, assert_below

LR, STEPS = 1e-3, 2
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Method:
    make: Callable[..., Optimizer]
    bytes_per_parameter: int | None = None  # on 3x3 convolutions, what a step must move
    condition: float | None = None  # the bound on a damped block's over n, for the check; None: torch's own, unchecked


METHODS = {
    "adam": Method(partial(Adam, lr=LR, fused=True), 28),
    "mbf": Method(partial(MBF, lr=LR), 60, condition=1 / 0.3),
    # absolute damping, gradients of unit variance: F <= 0.19 |g|^2 after two steps, |g|^2 < 5 n
    "mbf-paper": Method(partial(MBF.paper, lr=LR, damping=0.1), 60, condition=0.19 * 5 / 0.1),
}
if hasattr(torch.optim, "Muon"):
    METHODS["muon"] = Method(partial(torch.optim.Muon, lr=LR))


def rows(s: Setting) -> Iterator[Row]:
    """What matters most comes first: time may run out."""
    network = resnet50() if not s.rehearsal else resnet50(4, (1, 1), 4)
    matrices = transformer() if not s.rehearsal else transformer(16, 1)
    modes = ("eager",) if s.rehearsal else ("eager", "graph")
    convolutions = partial(Step, s, "resnet50 3x3", filters(network))
    for layout in FORMATS:
        yield from (convolutions(name, layout).row() for name in ("adam", "mbf", "mbf-paper"))
    yield from (Step(s, "transformer", matrices, name).row() for name in METHODS if name != "mbf-paper")
    yield from (Training(s, name, True).row() for name in ("adam", "mbf"))
    for what, shapes in (("resnet50", network), ("resnet50 3x3", filters(network))):
        yield from (Step(s, what, shapes, name, mode="host").row() for name in ("adam", "mbf"))
    if "graph" in modes:
        for layout in FORMATS:
            yield from (convolutions(name, layout, mode="graph").row() for name in ("adam", "mbf", "mbf-paper"))
        yield from (Step(s, "transformer", matrices, name, mode="graph").row() for name in ("adam", "mbf"))
    yield from (Step(s, "resnet50", network, name).row() for name in ("adam", "mbf"))
    yield from (Training(s, name, False).row() for name in ("adam", "mbf"))


@dataclass(frozen=True)
class Step:
    """`optimizer.step()` on tensors with random gradients: the device's time, a graph's, or the host's."""

    s: Setting
    what: str
    shapes: list[Shape]
    method: str
    layout: str = "contiguous"
    mode: str = "eager"

    def row(self) -> Row:
        facts = {"op": "step", "what": self.what, "method": self.method, "layout": self.layout, "mode": self.mode}
        words = [f"step of {self.what}: {self.method} {self.layout}", self.mode if self.mode != "eager" else ""]
        return Row(" ".join(words).strip(), self.run, facts)

    def run(self) -> dict:
        params, method = self.parameters(), METHODS[self.method]
        make = partial(method.make, capturable=True) if self.mode == "graph" else method.make
        optimizer = make(params)
        self.check(params, optimizer, method)
        count = sum(param.numel() for param in params)
        moved = count * method.bytes_per_parameter if "3x3" in self.what else None
        if self.mode == "host":
            return measure_host(optimizer.step, self.s.device, 100).record() | {"parameters": count}
        clock = measure_graph if self.mode == "graph" else measure
        return clock([optimizer.step], self.s.device, self.s.seconds).record(moved) | {"parameters": count}

    def parameters(self) -> list[Parameter]:
        generator = torch.Generator(self.s.device).manual_seed(0)
        params = []
        for shape in self.shapes:
            weight, grad = torch.randn(2, *shape, generator=generator, device=self.s.device)
            if len(shape) == 4:
                weight, grad = (t.to(memory_format=FORMATS[self.layout]) for t in (weight, grad))
            params.append(Parameter(weight))
            params[-1].grad = grad
        return params

    def check(self, params: list[Parameter], optimizer: Optimizer, method: Method) -> None:
        """The first steps of two tensors, the smallest blocked one and the last, against the float64 reference."""
        blocked = [param for param in params if param.ndim > 1]
        chosen = [min(blocked, key=torch.numel), blocked[-1]]
        before = [param.detach().double() for param in chosen]
        twins = [Parameter(value.clone()) for value in before]
        for twin, param in zip(twins, chosen, strict=True):
            twin.grad = param.grad.double()
        for _ in range(STEPS):
            optimizer.step()
        assert all(bool(param.isfinite().all()) for param in params), "a weight is not finite"
        if method.condition is None:
            return
        with mbf_kernels.use_backend("reference"):
            reference = method.make(twins)
            for _ in range(STEPS):
                reference.step()
        for param, twin, start in zip(chosen, twins, before, strict=True):
            check_step(param.detach(), twin.detach(), start, method.condition)


def check_step(param: torch.Tensor, truth: torch.Tensor, start: torch.Tensor, condition: float) -> None:
    """The weights are as near the float64 ones as solves with a block's condition number allow.

    The solve has LAPACK's pass mark as its backward error, the matrix the rounding of a mean of as many outer products
    as there are outputs; each step rounds the weight once more.
    """
    n = 9 if param.ndim == 4 and param.shape[2] == 3 else 64
    eps = torch.finfo(param.dtype).eps
    relative = (RATIO * n + param.shape[0] + 4) * eps * (condition * n + 1)
    error = torch.linalg.vector_norm(param.double() - truth)
    bound = relative * torch.linalg.vector_norm(truth - start) + STEPS * eps * torch.linalg.vector_norm(truth)
    assert_below(error, bound, "error of the weights")


@dataclass(frozen=True)
class Training:
    """Forward, backward and step of ResNet-18 on random images."""

    s: Setting
    method: str
    mixed: bool  # bfloat16 convolutions on channels_last images; otherwise float32 as torch comes

    def row(self) -> Row:
        precision = "bfloat16" if self.mixed else "float32"
        facts = {"op": "training", "method": self.method, "precision": precision}
        return Row(f"training iteration of ResNet-18, {precision}: {self.method}", self.run, facts)

    def run(self) -> dict:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        width, batch, side = (64, 128, 224) if not self.s.rehearsal else (4, 2, 32)
        layout = torch.channels_last if self.mixed else torch.contiguous_format
        model = ResNet18(width).to(self.s.device, memory_format=layout)
        images = torch.randn(batch, 3, side, side, device=self.s.device).to(memory_format=layout)
        labels = torch.randint(0, 1000, (batch,), device=self.s.device)
        optimizer = METHODS[self.method].make(list(model.parameters()))
        losses: list[torch.Tensor] = []

        def iteration() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.s.device, torch.bfloat16, enabled=self.mixed):
                loss = functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        timing = measure([iteration], self.s.device, 8 * self.s.seconds)
        check_training(losses)
        return timing.record() | {"first_loss": losses[0].item(), "last_loss": losses[-1].item()}


def check_training(losses: Sequence[torch.Tensor]) -> None:
    """One batch again and again: it must be learnt, by any method."""
    losses = torch.stack(list(losses))
    assert bool(losses.isfinite().all()), "the loss is not finite"
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
