"""Trains for many steps and prints what the process holds: python soak.py 20000 float32 '{"capturable": true}'

Twenty lines of JSON: step, bytes of resident memory, live objects of Python's, tensors among them.
"""

import gc
import json
import os
import sys

import torch
from mbf_optim import MBF
from torch import nn

CYCLE = 100  # steps after which all that happens now and then has happened
PAGE = os.sysconf("SC_PAGE_SIZE")


def network():
    """Every kind of parameter, and mini-blocks of every kind; 11 + 1 inputs make a shorter last run."""
    return nn.Sequential(
        nn.Embedding(20, 6), nn.Unflatten(1, (3, 3)), Channels(), nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, 3),
    )  # fmt: skip


class Channels(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2)


def held(step):
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * PAGE
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    return {"step": step, "resident": resident, "objects": len(objects), "tensors": tensors}


def train(steps, dtype, options):
    torch.manual_seed(0)
    model = network().to(dtype)
    optimizer = MBF(model.named_parameters(), lr=1e-3, segment=8, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=CYCLE)
    group = optimizer.param_groups[0]

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(torch.randint(20, (4, 9))), torch.randint(3, (4,)))
        loss.backward()
        return loss

    for step in range(1, steps + 1):
        if step % 3:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        scheduler.step()
        now_and_then(step % CYCLE, model, optimizer, group)
        if step % (steps // 20) == 0:
            print(json.dumps(held(step)))


def now_and_then(at, model, optimizer, group):
    """What a long run does beside its steps."""
    if at == 10:
        str(optimizer.report())
    elif at in (15, 25):  # a step without the gradients of some tensors; they come back with the next one
        optimizer.zero_grad()
        model[3](torch.ones(1, 6, 3, 3, dtype=model[3].weight.dtype)).sum().backward()
        optimizer.step()
    elif at in (30, 40):
        group["damping"], group["weight_decay"] = (0.1, 0.01) if at == 30 else (0.3, 0.0)
    elif at in (45, 55):
        group["graft"] = None if at == 45 else "adam"
    elif at in (60, 70):
        group["nesterov"] = at == 70
    elif at == 80:
        optimizer.load_state_dict(optimizer.state_dict())


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made is not counted
    train(int(sys.argv[1]), getattr(torch, sys.argv[2]), json.loads(sys.argv[3]))
