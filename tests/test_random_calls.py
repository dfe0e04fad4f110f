"""Random calls of every public function neither crash nor give wrong results in silence: see random_calls/.

Each group of functions has its share of RANDOM_CALLS calls, in a process of its own: where that dies, its last call is
known.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = int(os.environ.get("RANDOM_CALLS", 20_000))  # `make reliability`: 100,000
SHARES = {"storage": 0.15, "ops": 0.35, "steps": 0.3, "optimizer": 0.2}


@pytest.mark.parametrize("group", SHARES)
def test_random_calls(group, tmp_path):
    log = tmp_path / "last_call"
    command = [sys.executable, "-m", "random_calls", group, str(round(SHARES[group] * CALLS)), log]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.returncode} after\n{log.read_text().rstrip()}\n{run.stderr[-8000:]}"
    assert int(run.stdout) >= SHARES[group] * CALLS
