"""The training problems: reproducible data, and the command line trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parent.parent


def test_curves_are_images_and_the_same_every_time():
    from benchmarks.curves import curves

    first, again = curves(50, 20), curves(50, 20)
    for images, same, count in zip(first, again, (50, 20), strict=True):
        assert images.shape == (count, 784)
        assert torch.equal(images, same)
        assert images.min() >= 0 and images.max() <= 1
        assert (images.sum(1) > 1).all()  # every image shows a curve


@pytest.mark.parametrize("optimizer", ["mbf", "mbf-paper", "adam"])
def test_one_epoch_from_the_command_line(optimizer, tmp_path):
    out = tmp_path / "history.json"
    command = [sys.executable, "-m", "benchmarks.train", "--problem", "digits", "--optimizer", optimizer]
    command += ["--epochs", "1", "--seed", "1", "--threads", "1", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fresh, trained = json.loads(out.read_text())["history"]
    assert trained["train_loss"] < fresh["train_loss"]
