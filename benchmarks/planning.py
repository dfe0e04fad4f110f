"""`python -m benchmarks.planning`: writes the tables of docs/planning.md.

Nothing is run and nothing measured: the engines and optimizers are made of tensors without memory, in process groups
that send nothing. tests/test_planning.py holds what they say to what four processes send.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import torch
from mbf_optim import MBF
from torch import Tensor, distributed, nn
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

    optimizer: type[Optimizer]
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
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def sharded(model: nn.Module, unit: str, world_size: int) -> nn.Module:
    """By FSDP2: the modules of that name, and what is left at the root."""
    mesh = init_device_mesh("cpu", (world_size,))
    for name, module in model.named_modules():
        if re.fullmatch(unit, name):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
            state = max([own.state, *other_states(network, engine, method)])
            sends = sent(own.optimizer, network.processes)
            yield (engine, name, *sent_by(engine, network, own), in_bytes(sends), str(len(own.optimizer)), in_bytes(state))
        yield from rows_of_shampoo(network, engine, own)


def sent_by(engine: str, network: Network, of_step: Cost) -> tuple[str, str]:
    """For gradients and parameters; beside float32 what bfloat16 makes of it."""
    gradients, parameters = (sent(messages, network.processes) for messages in (of_step.gradients, of_step.parameters))
    gathered = both(parameters) if engine == "FSDP2" else in_bytes(parameters)
    return both(gradients), gathered


def both(float32: float) -> str:
    return f"{in_bytes(float32)} / {in_bytes(float32 / 2)}"


def other_states(network: Network, engine: str, method: Method) -> Iterator[int]:
    """Of other processes, where they may have more than the first."""
    for rank in range(1, network.processes if engine == "ZeRO-1" else 1):
        yield cost(network, engine, method, rank).state


def rows_of_shampoo(network: Network, engine: str, of_step: Cost) -> Iterator[tuple[str, ...]]:
    """From its documentation. It takes the place of ZeRO-1 itself."""
    shapes, count = network.shapes.values(), network.processes
    whole = 4 * sum(map(prod, shapes))
    gather = sent([Message("all_gather", whole)], count)
    dealt = in_bytes(shampoo.mean_state_bytes(shapes, count))
    cells = sent_by(engine, network, of_step)
    if engine == "DDP":
        yield (engine, SHAMPOO, *cells, in_bytes(gather), "1", dealt)
    if engine == "FSDP2":
        here = in_bytes(shampoo.shard_state_bytes(shapes, count))
        yield (engine, f"{SHAMPOO}, blocks of shards", *cells, "0", "0", here)
        back, messages = gather / count, len(shapes) + ceil(len(shapes) / count)
        yield (engine, f"{SHAMPOO}, lossless", *cells, in_bytes(gather + back), str(messages), dealt)


def in_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{number(count / size)} {unit}"
    return str(round(count))


def with_tables(page: str) -> str:
    for network in NETWORKS:
        name, parameters = network.title, sum(map(prod, network.shapes.values()))
        text = f"{parameters:,} parameters in {len(network.shapes)} tensors, {network.processes} processes:\n\n"
        text += table(COLUMNS, rows(network)) + "\n"
        page = between(page, BEGIN.format(name), END.format(name), text)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
