"""docs/planning.md: what it says is sent is what four processes send, and its tables are those that are computed."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mbf_optim import MBF
from processes import run
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import planning, shampoo, traffic  # noqa: E402
from benchmarks.planning import ENGINES, METHODS, Cost, Method, Network  # noqa: E402
from benchmarks.traffic import Message  # noqa: E402

PROCESSES = 4
WAITS = ("wait_tensor", "_wrap_tensor_autograd")  # operators that send nothing
METHODS_HERE = METHODS | {  # mini-blocks that straddle shards: the step gathers whole tensors
    "MBF, columns": Method(partial(MBF, blocks="column"), planning.one_group),
    "MBF, columns, paper": Method(partial(MBF.paper, damping=0.1, blocks="column"), planning.one_group),
}


# ---- networks like those of the page, small; 50, 30 and 6 rows on four processes: uneven shards


class Bottleneck(nn.Module):
    def __init__(self, inputs, inner):
        super().__init__()
        outputs = 4 * inner
        self.reduce, self.norm1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.filter, self.norm2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.expand, self.norm3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.norm2(self.filter(self.norm1(self.reduce(x)).relu())).relu()
        return (self.norm3(self.expand(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    sample = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 7, padding=3, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Bottleneck(6, 16), Bottleneck(64, 16))
        self.head = nn.Linear(64, 30)

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


class Decoder(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (layer(y)[:, None] for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    sample = (2, 5)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.Sequential(Decoder(64, 72), Decoder(64, 72))  # 72: a run of 64 and one of 8
        self.norm, self.head = nn.RMSNorm(64), nn.Linear(64, 50, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x.abs().mul(9).long()))))


MODELS = {"ResNet": ResNet, "Llama": Llama}


def network(model):
    shapes = {name: tuple(param.shape) for name, param in MODELS[model]().named_parameters()}
    return Network(model, shapes, r"blocks\.\d+", PROCESSES)


# ---- what is sent


class Calls(TorchDispatchMode):
    """Counts collective calls, with what is summed, copied or gathered, whole."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it says what it sends, as plain tensors
        result = op(*args, **(kwargs or {}))
        library, name = op.name().split(".")[0].split("::")
        if "c10d" in library and name not in WAITS:
            self.messages.append(self._message(name, args, result))
        return result

    @staticmethod
    def _message(name, args, result):
        if name in ("allreduce_", "broadcast_"):
            return Message({"allreduce_": "all_reduce"}.get(name, "broadcast"), sum(t.nbytes for t in args[0]))
        if name == "_allgather_base_":
            return Message("all_gather", args[0].nbytes)
        if name == "all_gather_into_tensor":
            return Message("all_gather", result.nbytes)
        assert name == "_reduce_scatter_base_", name
        return Message("reduce_scatter", args[1].nbytes)


def measured(model, engine, method, sixteen_bits=False):
    """Cost of the second step: engines have settled, and Adam has its state."""
    torch.manual_seed(0)
    model, method = MODELS[model](), METHODS_HERE[method]
    x, module = torch.randn(model.sample), model
    if engine == "FSDP2":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if sixteen_bits else MixedPrecisionPolicy()
        module = planning.sharded(model, network(type(model).__name__).unit, PROCESSES, mp_policy=policy)
    else:
        module = DistributedDataParallel(model)
        if sixteen_bits:  # gloo has no bfloat16 hook
            module.register_comm_hook(None, fp16_compress_hook)
    make = planning.zero_of if engine == "ZeRO-1" else planning.optimizer_of
    optimizer = make(method, model.named_parameters())
    for _ in range(2):
        optimizer.zero_grad()
        with Calls() as forward:
            loss = module(x).square().mean()
        with Calls() as backward:
            loss.backward()
        with Calls() as step:
            optimizer.step()
    gathers = [message for message in forward.messages + backward.messages if message.collective == "all_gather"]
    gradients = [message for message in backward.messages if message.collective != "all_gather"]
    own = step.messages
    if engine == "ZeRO-1":
        gathers, own, optimizer = own, [], optimizer.optim
    return Cost(gradients, gathers, own, held(optimizer))


def held(optimizer):
    """Bytes of state, Adam's counted too."""
    if isinstance(optimizer, torch.optim.Adam):
        entries = [value for state in optimizer.state.values() for value in state.values()]
        return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in entries)
    return traffic.state_bytes(optimizer)


def all_measured():
    costs = {
        (model, engine, method): measured(model, engine, method)
        for model in MODELS
        for engine in ENGINES
        for method in METHODS_HERE
    }
    return costs, {engine: measured("Llama", engine, "MBF", sixteen_bits=True) for engine in ENGINES}


@pytest.fixture(scope="module")
def of_ranks():
    return run(PROCESSES, all_measured, timeout=300)


def test_four_processes_send_what_is_computed(of_ranks):
    for rank, (found, _) in enumerate(of_ranks):
        for (model, engine, method), cost in found.items():
            expected = planning.cost(network(model), engine, METHODS_HERE[method], rank)
            for part in ("parameters", "optimizer"):
                assert sorted(getattr(cost, part)) == sorted(getattr(expected, part)), (model, engine, method, part)
            assert total(cost.gradients) == total(expected.gradients), (model, engine, method)
            assert cost.state == expected.state, (model, engine, method, rank)


def test_sixteen_bits_halve_what_engines_send_and_nothing_else(of_ranks):
    for _, found in of_ranks:
        for engine, cost in found.items():
            expected = planning.cost(network("Llama"), engine, METHODS["MBF"])
            assert 2 * sum(total(cost.gradients).values()) == sum(total(expected.gradients).values()), engine
            part = 2 if engine == "FSDP2" else 1
            assert part * sum(total(cost.parameters).values()) == sum(total(expected.parameters).values()), engine
            assert cost.optimizer == expected.optimizer, engine


def total(messages):
    """By collective: DDP chooses its buckets."""
    totals = {}
    for message in messages:
        totals[message.collective] = totals.get(message.collective, 0) + message.bytes
    return totals


@pytest.mark.parametrize("count", [2, 4, 8])
def test_bytes_sent_in_rings(count):
    """Step by step, in chunks that are ``count``-ths of the payload: each process sends one to the next in a round."""
    chunk, payload = 10, 10 * count
    scatter = gather = sum(chunk for _ in range(count - 1))
    passed_on = sum(payload for _ in range(count - 1)) / count  # a broadcast: the last one sends to nobody
    expected = {"reduce_scatter": scatter, "all_gather": gather, "all_reduce": scatter + gather, "broadcast": passed_on}
    for collective, number in expected.items():
        assert traffic.sent([Message(collective, payload)], count) == number


def test_the_large_transformer_by_hand():
    """Runs of 64 inputs: in a layer 64 of each of six matrices and 172 of one; embedding and head."""
    (large,) = (network for network in planning.NETWORKS if "Llama" in network.title)
    runs = 32 * (6 * 64 + 172) + 2 * 64
    found = planning.cost(large, "FSDP2", METHODS["MBF"])
    assert found.optimizer == [Message("all_reduce", 4 * runs * 64 * 65 // 2)]
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert total(found.gradients) == {"reduce_scatter": 4 * weights}  # 64 processes divide everything


def test_shampoo_by_hand():
    """A matrix of two blocks and one of two smaller ones, a filter whose dimensions merge, a vector."""
    shapes = {
        (2048, 1024): 2 * 2048 * 1024 + 2 * 2 * (1024**2 + 1024**2),
        (10, 1030): 2 * 10300 + 2 * (10**2 + 1024**2 + 10**2 + 6**2),
        (1025, 4, 3, 3): 2 * 36900 + 2 * (1024**2 + 36**2 + 1 + 36**2),
        (50,): 100 + 2 * 50**2,
    }
    for shape, numbers in shapes.items():
        assert shampoo.state_bytes([shape]) == 4 * numbers


def test_the_page_says_what_is_computed():
    page = planning.PAGE.read_text()
    assert page == planning.with_tables(page)
    assert not distributed.is_initialized()
