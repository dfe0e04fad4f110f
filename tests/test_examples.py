"""The examples train, and a run resumed halfway ends in the same bits.

``make test`` installs the engines; elsewhere the examples of those that are absent are skipped.
"""

import os
import re
import subprocess
import sys
import textwrap
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMM = Path(sys.prefix) / "timm"  # where `make` puts timm with a torchvision that the other engines must not find
ENGINES = {
    "lightning": (["pytorch_lightning"], ["--precision", "bf16-mixed"]),
    "accelerate": (["accelerate"], ["--precision", "bf16"]),
    "transformers": (["transformers", "accelerate"], ["--bf16"]),
    "timm": (["timm", "torchvision"], ["--amp-dtype", "bfloat16"]),
}  # the packages of an engine, and what its example takes for mixed precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains_and_resumes(engine, precision, tmp_path):
    packages, mixed = ENGINES[engine]
    path = [str(TIMM)] if engine == "timm" else []
    for package in packages:
        if PathFinder.find_spec(package, path + sys.path) is None:
            pytest.skip(f"{package} is not installed")
    example = str(ROOT / "examples" / f"{engine}_digits.py")
    runs = 2 if engine == "transformers" else 1
    check_runs([example, *(mixed if precision == "bfloat16" else [])], runs, tmp_path, path)


def test_fully_shard(tmp_path):
    """On two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    check_runs([*launcher, str(ROOT / "examples" / "fully_shard_digits.py")], 1, tmp_path)


def check_runs(command, count, folder, path=()):
    """What Python prints of ``count`` runs."""
    path = [*path, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    runs = re.findall(r"^loss (\S+) -> (\S+), accuracy (\S+)$", done.stdout, re.MULTILINE)
    assert re.findall(r"^resumed: (.+)$", done.stdout, re.MULTILINE) == ["the same weights"] * count, done.stdout
    assert len(runs) == count
    for first, last, accuracy in runs:
        assert float(last) < 0.3 * float(first)
        assert float(accuracy) > 0.7  # of ten classes


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_shows_the_example(engine):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engines" / f"{engine}.md").read_text(), re.DOTALL)
    example = (ROOT / "examples" / f"{engine}_digits.py").read_text()
    assert blocks
    for block in blocks:
        depths = [textwrap.indent(block, " " * depth, str.strip) for depth in (0, 4, 8, 12)]
        assert any(f"\n{indented}" in example for indented in depths), block
