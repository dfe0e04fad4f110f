"""Training holds no more memory at its end than when it was warm: bytes, objects of Python's, tensors."""

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from soak import CYCLE

SOAKS = {  # steps, 20 times a whole number of cycles; dtype, options
    "float32": (20_000, "float32", {}),
    "capturable": (40 * CYCLE, "float64", {"capturable": True}),
    "bfloat16, master weights": (20 * CYCLE, "bfloat16", {"master_weights": True}),
    "bfloat16, stochastic rounding": (20 * CYCLE, "bfloat16", {"stochastic_rounding": True}),
}
WARM = 4  # of the 20 measurements


def soaked(steps, dtype, options):
    """What a process held, measurement by measurement."""
    command = [sys.executable, Path(__file__).with_name("soak.py"), str(steps), dtype, json.dumps(options)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = [json.loads(line) for line in output.splitlines()]
    assert [held["step"] for held in measured] == list(range(steps // 20, steps + 1, steps // 20))
    return {name: [held[name] for held in measured] for name in measured[0]}


@pytest.mark.parametrize("steps, dtype, options", SOAKS.values(), ids=SOAKS)
def test_memory_does_not_grow(steps, dtype, options):
    """No tensor is left behind, nor an object in each cycle of all that happens. The memory that Python does not count
    grows by less than 100 bytes a step, a fraction of the smallest tensor, but for a leap of the allocator's."""
    held = soaked(steps, dtype, options)
    for name, allowed in (("tensors", 0), ("objects", (steps - held["step"][WARM]) // CYCLE - 1)):
        assert max(held[name][WARM:]) - held[name][WARM] <= allowed, f"{name}: {held[name]}"
    growth = [after - before for before, after in pairwise(held["resident"][WARM:])]
    assert statistics.median(growth) <= 100 * steps / 20, f"resident: {growth}"
