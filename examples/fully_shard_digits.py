"""MBF on several processes with sharded parameters: torch's fully_shard, a distributed checkpoint, a resumed run.

pip install "mbf-kernels[demo]"
torchrun --nproc-per-node 2 examples/fully_shard_digits.py
"""

import tempfile

import torch
from digits import accuracy, digits, network, same_weights
from mbf_optim import MBF
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

EPOCHS = 10


def state_of(model: torch.nn.Module, optimizer: MBF) -> dict:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def trained(data, folder: str, seed: int, resume: bool) -> tuple[torch.nn.Module, list[float]]:
    """A model after ten epochs and its losses here. Halfway there is a checkpoint: written, or resumed from."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = network(seed)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = MBF(model.named_parameters(), lr=1e-2, weight_decay=1e-2)
    if resume:
        state = state_of(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loader = DataLoader(data, batch_size=36, sampler=DistributedSampler(data, shuffle=False))
    losses = []
    for epoch in range(EPOCHS // 2 if resume else 0, EPOCHS):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch + 1 == EPOCHS // 2 and not resume:
            checkpoint.save(state_of(model, optimizer), checkpoint_id=folder)
    return model, losses


def gathered(model: torch.nn.Module) -> torch.nn.Module:
    """The whole model, on every process."""
    whole = network(seed=0)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return whole


def main():
    distributed.init_process_group("gloo")
    first = distributed.get_rank() == 0
    data, test = digits()
    folder = [tempfile.mkdtemp() if first else None]
    distributed.broadcast_object_list(folder)
    model, losses = trained(data, folder[0], seed=0, resume=False)
    resumed, _ = trained(data, folder[0], seed=1, resume=True)
    model, resumed = gathered(model), gathered(resumed)
    if first:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy(model, test):.3f}")
        print("resumed:", same_weights(model, resumed))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
