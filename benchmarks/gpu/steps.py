"""Whole optimizer steps and training iterations, beside torch's optimizers on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter, functional

from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting
from benchmarks.methods import FORMATS, METHODS, check_first_steps, random_parameters, step_bytes
from benchmarks.models import ResNet18
from benchmarks.shapes import Shapes, filters, matrices, resnet50, transformer
from benchmarks.timing import measure, measure_graph, measure_host

MEASURED = ("adam", "mbf", "mbf-paper", *({"muon"} & set(METHODS)))


def rows(s: Setting) -> Iterator[Row]:
    """What matters most comes first: time may run out."""
    network = resnet50() if not s.rehearsal else resnet50(4, (1, 1), 4)
    linear = matrices(transformer() if not s.rehearsal else transformer(16, 1))
    modes = ("eager",) if s.rehearsal else ("eager", "graph")
    convolutions = partial(Step, s, "resnet50 3x3", filters(network))
    for layout in FORMATS:
        yield from (convolutions(name, layout).row() for name in ("adam", "mbf", "mbf-paper"))
    yield from (Step(s, "transformer", linear, name).row() for name in MEASURED if name != "mbf-paper")
    yield from (Training(s, name, True).row() for name in ("adam", "mbf"))
    for what, shapes in (("resnet50", network), ("resnet50 3x3", filters(network))):
        yield from (Step(s, what, shapes, name, mode="host").row() for name in ("adam", "mbf"))
    if "graph" in modes:
        for layout in FORMATS:
            yield from (convolutions(name, layout, mode="graph").row() for name in ("adam", "mbf", "mbf-paper"))
        yield from (Step(s, "transformer", linear, name, mode="graph").row() for name in ("adam", "mbf"))
    yield from (Step(s, "resnet50", network, name).row() for name in ("adam", "mbf"))
    yield from (Training(s, name, False).row() for name in ("adam", "mbf"))


@dataclass(frozen=True)
class Step:
    """`optimizer.step()` on tensors with random gradients: the device's time, a graph's, or the host's."""

    s: Setting
    what: str
    shapes: Shapes
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
        optimizer = make(list(params.items()))
        check_first_steps(params, method, optimizer)
        count = sum(param.numel() for param in params.values())
        if self.mode == "host":
            return measure_host(optimizer.step, self.s.device, 100).record() | {"parameters": count}
        clock = measure_graph if self.mode == "graph" else measure
        timing = clock([optimizer.step], self.s.device, self.s.seconds)
        return timing.record(step_bytes(optimizer, params.values())) | {"parameters": count}

    def parameters(self) -> dict[str, Parameter]:
        return random_parameters(self.shapes, self.s.device, self.layout)


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
