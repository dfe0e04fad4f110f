"""A training run that tells where it is, writes checkpoints, and goes on from the newest one."""

import os
from pathlib import Path

import torch
from mbf_optim import MBF
from torch import nn

WORDS, LENGTH, CLASSES = 40, 36, 5
EXAMPLES, BATCH = 48, 8
PHASES = ("forward", "backward", "step", "write")  # what a run can be doing when it dies
CHECKPOINT = "checkpoint.pt"


class Network(nn.Module):
    """Of every kind of parameter, with random numbers in the forward pass and buffers that it changes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.convolution = nn.Conv2d(6, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(8 * 16, 12)
        self.last = nn.Linear(12, CLASSES, dtype=torch.bfloat16)

    def forward(self, words):
        image = self.embedding(words).transpose(1, 2).unflatten(2, (6, 6))
        hidden = self.linear(self.dropout(self.norm(self.convolution(image)).relu()).flatten(1))
        return self.last(hidden.relu().bfloat16()).float()


class Run:
    """All that a checkpoint has to hold."""

    def __init__(self):
        torch.manual_seed(0)
        self.data = torch.Generator().manual_seed(1)
        self.words = torch.randint(WORDS, (EXAMPLES, LENGTH), generator=self.data)
        self.labels = torch.randint(CLASSES, (EXAMPLES,), generator=self.data)
        self.network = Network()
        groups = [{"params": list(module.named_parameters(name))} for name, module in self.network.named_children()]
        # The bias joins, and what is solved with is older than the newest F: a resumed run needs its cached factors.
        groups[-2] |= {"segment": 48, "update_interval": 2, "factor_interval": 3}
        groups[-1] |= {"stochastic_rounding": True}
        self.optimizer = MBF([group for group in groups if group["params"]], lr=3e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=50)
        self.order, self.position, self.steps = torch.empty(0, dtype=torch.int64), 0, 0

    def step(self, tell):
        if self.position == len(self.order):
            self.order, self.position = torch.randperm(EXAMPLES, generator=self.data), 0
        batch = self.order[self.position : self.position + BATCH]
        self.optimizer.zero_grad()
        tell("forward", self.steps)
        loss = nn.functional.cross_entropy(self.network(self.words[batch]), self.labels[batch])
        tell("backward", self.steps)
        loss.backward()
        tell("step", self.steps)
        self.optimizer.step()
        self.scheduler.step()
        self.position += BATCH
        self.steps += 1

    def state(self):
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "scheduler")}
        generators = {"data": self.data.get_state(), "torch": torch.get_rng_state()}
        return parts | generators | {"order": self.order, "position": self.position, "steps": self.steps}

    def load_state(self, state):
        for name in ("network", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.data.set_state(state["data"])
        torch.set_rng_state(state["torch"])
        self.order, self.position, self.steps = state["order"], state["position"], state["steps"]


class ToldFile:
    """A file that tells of every write."""

    def __init__(self, file, tell):
        self._file, self._tell = file, tell

    def write(self, data):
        self._tell()
        return self._file.write(data)

    def flush(self):
        self._file.flush()


def save(run, folder, tell):
    """As one act: the newest checkpoint is whole at any time."""
    unfinished = folder / f"{os.getpid()}.unfinished"
    with open(unfinished, "wb") as file:
        torch.save(run.state(), ToldFile(file, lambda: tell("write", run.steps)))
    os.replace(unfinished, folder / CHECKPOINT)


def train(folder, connection=None, until=None, every=4):
    """Trains to step ``until`` (None: for ever), from the checkpoint in ``folder`` if there is one, writing another
    ``every`` so many steps, and tells ``connection`` what it is about to do and at which step."""
    torch.set_num_threads(1)
    folder = Path(folder)
    tell = (lambda *where: None) if connection is None else (lambda *where: connection.send(where))
    run = Run()
    if (folder / CHECKPOINT).exists():
        run.load_state(torch.load(folder / CHECKPOINT, weights_only=True))
    tell("start", run.steps)
    while run.steps != until:
        run.step(tell)
        if run.steps % every == 0 or run.steps == until:
            save(run, folder, tell)
