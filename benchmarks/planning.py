"""`python -m benchmarks.planning`: writes the tables of docs/planning.md.

Nothing is run and nothing measured: the engines and optimizers are made of tensors without memory, in process groups
that send nothing. tests/test_planning.py holds what they say to what four processes send.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import ceil, prod
from pathlib import Path

import torch
from mbf_optim import MBF
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Adam, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import shampoo, traffic
from benchmarks.markdown import between, number, table
from benchmarks.shapes import Shapes, llama, resnet50
from benchmarks.traffic import Message, sent

PAGE = Path(__file__).resolve().parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- {}: written by `python -m benchmarks.planning` -->\n", "<!-- end of {} -->\n"
SHAMPOO = "Shampoo (documented)"
ENGINES = ("DDP", "ZeRO-1", "FSDP2")
COLUMNS = (
    "engine", "optimizer", "sent for gradients", "for parameters", "by the optimizer", "in messages", "optimizer state",
)  # fmt: skip
SEGMENTS = (16, 32, 64, 128)
SEGMENT_COLUMNS = ("network", "segment", "payload", "sent", "share, float32", "share, bfloat16")

Named = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Network:
    title: str
    shapes: Shapes
    unit: str  # pattern of the names of modules that ``fully_shard`` takes as one
    processes: int


@dataclass(frozen=True)
class Method:
    """An optimizer, and how it divides parameters into groups."""

    optimizer: Callable[..., Optimizer]
    groups: Callable[[Named], list[dict]]


@dataclass(frozen=True)
class Cost:
    """Of a step, on one process."""

    gradients: list[Message]
    parameters: list[Message]
    optimizer: list[Message]
    state: int  # bytes


def one_group(named: Named) -> list[dict]:
    return [{"params": list(named)}]


def rows_in_grids(segment: int, average: bool, named: Named) -> list[dict]:
    """Every output of a matrix in runs of ``segment`` inputs, as tiles of a grid: a group for every shape.

    What is no matrix, or not divided by ``segment``, is in the first group, with the default blocks.
    """
    groups: dict[tuple, dict] = {(): {"params": []}}
    for name, param in named:
        outputs, inputs = (*param.shape, 1)[:2]
        if param.ndim < 2 or prod(param.shape[2:]) > 1 or inputs % segment:
            groups[()]["params"].append((name, param))
        else:
            grid = (inputs // segment, outputs)
            options = {"params": [], "blocks": "grid", "grid": grid, "average": average}
            groups.setdefault(grid, options)["params"].append((name, param))
    return [group for group in groups.values() if group["params"]]


METHODS = {
    "Adam": Method(Adam, one_group),
    "MBF": Method(MBF, one_group),
    "MBF, rows of 64, averaged": Method(MBF, lambda named: rows_in_grids(64, True, named)),
    "MBF, rows of 8": Method(MBF, lambda named: rows_in_grids(8, False, named)),
}
NETWORKS = (
    Network("ResNet-50", resnet50(), r"stage\d\.\d+", 8),
    Network("Llama-like, 7 billion", llama(), r"layer\d+", 64),
)


@contextmanager
def processes(world_size: int, rank: int = 0) -> Iterator[None]:
    """A default process group of one process, this one, that sends nothing and waits for nobody."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def module_of(shapes: Shapes) -> nn.Module:
    """A tree of modules with these parameters, without memory."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def sharded(model: nn.Module, unit: str, world_size: int, **options) -> nn.Module:
    """By FSDP2: the modules of that name, and what is left at the root."""
    mesh = init_device_mesh("cpu", (world_size,))
    for name, module in model.named_modules():
        if re.fullmatch(unit, name):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def optimizer_of(method: Method, named: Named) -> Optimizer:
    return method.optimizer(method.groups(named), lr=1e-3)


def zero_of(method: Method, named: Named) -> ZeroRedundancyOptimizer:
    """It takes no names: biases join no weights."""
    groups = method.groups(named)
    unnamed = [group | {"params": [param for _, param in group["params"]]} for group in groups]
    return ZeroRedundancyOptimizer(unnamed, method.optimizer, lr=1e-3)


def cost(network: Network, engine: str, method: Method, rank: int = 0) -> Cost:
    world_size = network.processes
    with processes(world_size, rank):
        model = module_of(network.shapes)
        params = list(model.parameters())
        if engine == "ZeRO-1":
            state = traffic.state_bytes(zero_of(method, model.named_parameters()).optim)
            return Cost(traffic.summed_gradients(params), traffic.updated_parameters(params), [], state)
        gradients, parameters = traffic.summed_gradients(params), []
        if engine == "FSDP2":
            model = sharded(model, network.unit, world_size)
            gradients = traffic.scattered_gradients(model, world_size)
            parameters = traffic.gathered_parameters(model, world_size)
        optimizer = optimizer_of(method, model.named_parameters())
        messages = traffic.optimizer_messages(optimizer, world_size)
        return Cost(gradients, parameters, messages, traffic.state_bytes(optimizer))


def rows(network: Network) -> Iterator[tuple[str, ...]]:
    for engine in ENGINES:
        for name, method in METHODS.items():
            own = cost(network, engine, method)
            by_engine = sent_by_engine(network, engine, own)
            by_optimizer = sent(own.optimizer, network.processes), len(own.optimizer)
            yield (engine, name, *by_engine, *last_cells(*by_optimizer, most_state(network, engine, method)))
        for name, *counts in of_shampoo(network, engine):  # whoever uses it, the engine's are the same
            yield (engine, name, *by_engine, *last_cells(*counts))


def sent_by_engine(network: Network, engine: str, own: Cost) -> tuple[str, str]:
    """For gradients and parameters, in float32 and, where they may be, in bfloat16."""
    gradients, parameters = (sent(messages, network.processes) for messages in (own.gradients, own.parameters))
    return in_both(gradients), in_both(parameters) if engine == "FSDP2" else in_bytes(parameters)


def last_cells(bytes_sent: float, messages: int, state: float) -> tuple[str, str, str]:
    return in_bytes(bytes_sent), str(messages), in_bytes(state)


def most_state(network: Network, engine: str, method: Method) -> int:
    """Of any process: the first has the largest shards, but not always the most of what ZeRO deals out."""
    ranks = range(network.processes if engine == "ZeRO-1" else 1)
    return max(cost(network, engine, method, rank).state for rank in ranks)


def of_shampoo(network: Network, engine: str) -> Iterator[tuple[str, float, int, float]]:
    """Names, bytes sent, messages and bytes of state; nothing under ZeRO-1, whose place it takes itself."""
    shapes, count = network.shapes.values(), network.processes
    gather = sent([Message("all_gather", 4 * sum(map(prod, shapes)))], count)
    if engine == "DDP":
        yield SHAMPOO, gather, 1, shampoo.mean_state_bytes(shapes, count)
    if engine == "FSDP2":
        yield f"{SHAMPOO}, blocks of shards", 0, 0, shampoo.shard_state_bytes(shapes, count)
        messages = len(shapes) + ceil(len(shapes) / count)  # gathers of gradients; all-to-alls, each of W tensors
        yield f"{SHAMPOO}, lossless", gather + gather / count, messages, shampoo.mean_state_bytes(shapes, count)


def in_both(float32: float) -> str:
    return f"{in_bytes(float32)} / {in_bytes(float32 / 2)}"


def in_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{number(count / size)} {unit}"
    return str(round(count))


def segments(network: Network) -> Iterator[tuple[str, ...]]:
    """The message of the default form under FSDP2, by the length of its segments."""
    for segment in SEGMENTS:
        of_step = cost(network, "FSDP2", Method(partial(MBF, segment=segment), one_group))
        engine, own = (
            sent(messages, network.processes)
            for messages in (of_step.gradients + of_step.parameters, of_step.optimizer)
        )
        shares = (f"{100 * own / (engine * width):.2g} %" for width in (1, 1 / 2))
        payload = sum(message.bytes for message in of_step.optimizer)
        yield (network.title, str(segment), in_bytes(payload), in_bytes(own), *shares)


def with_tables(page: str) -> str:
    texts = {network.title: [summary(network), table(COLUMNS, rows(network))] for network in NETWORKS}
    texts["segments"] = [table(SEGMENT_COLUMNS, chain.from_iterable(map(segments, NETWORKS)))]
    for name, parts in texts.items():
        page = between(page, BEGIN.format(name), END.format(name), "\n\n".join(parts) + "\n")
    return page


def summary(network: Network) -> str:
    parameters = sum(map(prod, network.shapes.values()))
    return f"{parameters:,} parameters in {len(network.shapes)} tensors, {network.processes} processes."


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
