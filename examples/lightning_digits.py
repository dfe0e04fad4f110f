"""MBF under PyTorch Lightning: a schedule, accumulation, clipping, mixed precision, and a resumed run.

pip install pytorch-lightning "mbf-kernels[demo]"
python examples/lightning_digits.py --precision bf16-mixed
"""

import argparse
import tempfile

import pytorch_lightning as pl
import torch
from digits import accuracy, digits, network, same_weights
from mbf_optim import MBF
from torch.utils.data import DataLoader

EPOCHS = 10


class Digits(pl.LightningModule):
    def __init__(self, seed: int):
        super().__init__()
        self.network = network(seed)
        self.losses = []

    def training_step(self, batch, index):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = MBF(self.named_parameters(), lr=1e-2, weight_decay=1e-2)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(data, precision: str, folder: str, seed: int, checkpoint: str | None = None) -> tuple[Digits, pl.Trainer]:
    """A model after ten epochs, of which ``checkpoint`` has the first five."""
    model = Digits(seed)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, "{epoch}", every_n_epochs=EPOCHS // 2, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=36), ckpt_path=checkpoint)  # not shuffled: both runs see the same
    return model, trainer


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    precision = arguments.parse_args().precision
    data, test = digits()
    with tempfile.TemporaryDirectory() as folder:
        model, trainer = trained(data, precision, folder, seed=0)
        print(trainer.optimizers[0].report())
        print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}, accuracy {accuracy(model.network, test):.3f}")
        halfway = f"{folder}/epoch={EPOCHS // 2 - 1}.ckpt"
        resumed, _ = trained(data, precision, folder, seed=1, checkpoint=halfway)
        print("resumed:", same_weights(model, resumed))


if __name__ == "__main__":
    main()
