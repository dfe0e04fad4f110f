"""MBF under the Trainer of Hugging Face Transformers, which makes the optimizer or is given one; and a resumed run.

pip install "transformers[torch]" "mbf-kernels[demo]"
python examples/transformers_digits.py --bf16
"""

import argparse
import tempfile

import torch
from digits import digits, same_weights
from mbf_optim import MBF
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

EPOCHS, STEPS = 10, 200
CONFIG = BertConfig(
    vocab_size=256, max_position_embeddings=8, num_labels=10,
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
)  # fmt: skip


def sentences(dataset) -> list[dict]:
    """A digit as eight words: which pixels of a row are dark."""
    images, labels = dataset.tensors
    words = ((images[:, 0] > 0.5) * 2 ** torch.arange(8)).sum(-1)
    return [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]


def accuracy_of(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


def trainer_of(train, test, bf16: bool, folder: str, named: bool, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(CONFIG)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=36,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        weight_decay=1e-2,
        lr_scheduler_type="cosine",
        bf16=bf16,
        use_cpu=True,
        save_steps=STEPS // 2,
        logging_steps=STEPS // EPOCHS,
        report_to="none",
        disable_tqdm=True,
    )
    if named:  # made here: biases join their weights
        chosen = {"optimizers": (MBF(model.named_parameters(), lr=1e-2, weight_decay=1e-2), None)}
    else:  # made by the Trainer, which decays matrices and leaves biases and norms out
        chosen = {"optimizer_cls_and_kwargs": (MBF, {"lr": 1e-2})}
    return Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy_of, **chosen)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--bf16", action="store_true")
    bf16 = arguments.parse_args().bf16
    train, test = map(sentences, digits())
    for named in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(train, test, bf16, folder, named, seed=0)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            accuracy = trainer.evaluate()["eval_accuracy"]
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.3f}")
            resumed = trainer_of(train, test, bf16, folder, named, seed=1)
            resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
            print("resumed:", same_weights(trainer.model, resumed.model))


if __name__ == "__main__":
    main()
