"""MBF under Hugging Face Accelerate: a schedule, accumulation, clipping, mixed precision, and a resumed run.

pip install accelerate "mbf-kernels[demo]"
python examples/accelerate_digits.py --precision bf16
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from digits import accuracy, digits, network, same_weights
from mbf_optim import MBF
from torch.utils.data import DataLoader

EPOCHS, ACCUMULATED = 10, 2


def trained(data, precision: str, folder: str, seed: int, resume: bool) -> tuple[torch.nn.Module, list[float]]:
    """A model after ten epochs and its losses. Halfway there is a checkpoint: written, or resumed from."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATED)
    model = network(seed)
    optimizer = MBF(model.named_parameters(), lr=1e-2, weight_decay=1e-2)
    loader = DataLoader(data, batch_size=36)  # not shuffled: both runs see the same
    steps = EPOCHS * -(-len(loader) // ACCUMULATED)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resume:
        accelerator.load_state(folder)
    losses = []
    for epoch in range(EPOCHS // 2 if resume else 0, EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if epoch + 1 == EPOCHS // 2 and not resume:
            accelerator.save_state(folder)
    return accelerator.unwrap_model(model), losses


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--precision", default="no", choices=["no", "bf16"])
    precision = arguments.parse_args().precision
    data, test = digits()
    with tempfile.TemporaryDirectory() as folder:
        model, losses = trained(data, precision, folder, seed=0, resume=False)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy(model, test):.3f}")
        resumed, _ = trained(data, precision, folder, seed=1, resume=True)
        print("resumed:", same_weights(model, resumed))


if __name__ == "__main__":
    main()
