"""MBF by the options of timm's training script, layer decay among them; and a resumed run.

pip install timm "mbf-kernels[demo]"
python examples/timm_digits.py --opt mbf --lr 6e-3 --opt-kwargs decay=0.95 --amp-dtype bfloat16
"""

import argparse
import tempfile

import timm
import torch
from digits import accuracy, digits, same_weights
from mbf_optim import MBF
from timm.models import resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2, optimizer_kwargs
from timm.optim._optim_factory import default_registry  # timm gives it no public name
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ParseKwargs, dispatch_clip_grad
from torch.utils.data import DataLoader

EPOCHS, ACCUMULATED = 10, 2
default_registry.register(OptimInfo("mbf", MBF, "Mini-Block Fisher", has_momentum=True))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opt", default="mbf")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--layer-decay", type=float, default=0.8)
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--amp-dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def trained(data, args: argparse.Namespace, folder: str, seed: int, checkpoint: str | None = None):
    """A model after ten epochs, of which ``checkpoint`` has the first five, and its losses."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", img_size=8, patch_size=2, in_chans=1, num_classes=10, depth=2)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    first = resume_checkpoint(model, checkpoint, optimizer) if checkpoint else 0
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=args.lr / 10)
    schedule.step(first)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder)
    losses = []
    for epoch in range(first, EPOCHS):
        for index, (images, labels) in enumerate(DataLoader(data, batch_size=36)):  # not shuffled: the same for both
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp_dtype == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            (loss / ACCUMULATED).backward()
            if (index + 1) % ACCUMULATED == 0:
                dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        schedule.step(epoch + 1)
        if not checkpoint:
            saver.save_checkpoint(epoch)
    return model, losses


def main():
    args = options()
    data, test = digits()
    with tempfile.TemporaryDirectory() as folder:
        model, losses = trained(data, args, folder, seed=0)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy(model, test):.3f}")
        resumed, _ = trained(data, args, folder, seed=1, checkpoint=f"{folder}/checkpoint-{EPOCHS // 2 - 1}.pth.tar")
        print("resumed:", same_weights(model, resumed))


if __name__ == "__main__":
    main()
