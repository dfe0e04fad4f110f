"""The README's first Python block runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_python_block_runs(tmp_path):
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block, "the README has no Python block"
    command = [sys.executable, "-W", "error", "-c", block[1]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
