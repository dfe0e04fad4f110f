"""What only the Triton backend has: a largest size, programs, a compiler that needs no GPU, and a gate."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import OPTIONS

from mbf_kernels import SymmetricBlocks, backends, triton_ops
from mbf_kernels.testing import assert_bitwise, assert_padding_zero, randn, spd_blocks

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float64)

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or sys.platform != "linux", reason="no triton to compile with"
)


@pytest.fixture
def place():
    """The device that the backend serves here."""
    if backends()["triton"] != "available":
        pytest.skip(backends()["triton"])
    return "cpu" if triton_ops.is_interpreted() else "cuda"


class Problem:
    def __init__(self, count, size, dtype, device):
        self.w, self.g, self.m, self.rhs = (randn(count, size, dtype=dtype, device=device, seed=s) for s in range(4))
        self.fisher = SymmetricBlocks.from_dense(spd_blocks("well", count, size, dtype, device))
        self.skipped = torch.tensor(0, device=device)

    def results(self, number=float):
        """Every op once, with ``number`` making what may live on the device of a float."""
        triton_ops.accumulate_(self.fisher, self.g[None], 0.9)
        lower, info = triton_ops.factor(self.fisher, number(0.125), True)
        x = triton_ops.solve(lower, torch.stack([self.rhs, self.g, self.w], -1))
        y, info_y = triton_ops.accumulate_factor_solve_(self.fisher, self.g, self.rhs, 0.9, number(0.125), False)
        options = replace(OPTIONS, lr=number(0.25), damping=number(0.125), weight_decay=0.1)
        info_w = triton_ops.mbf_step_(
            [self.w], [self.g], [self.m], [self.fisher], [lower], [self.skipped], [number(0.5)], [number(0.75)], options
        )
        for s, h in ((self.rhs[:, 0], self.rhs[0]), (None, None)):
            triton_ops.rank_one_step_([self.w], [self.g], [self.m], [s], [h], [number(0.5)], options)
        assert_padding_zero(lower)
        assert_padding_zero(self.fisher)
        return [lower.data, info, x, y, info_y, self.w, self.m, self.fisher.data, info_w, self.skipped]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalar_dtype", DTYPES, ids=str)
def test_numbers_on_the_device(place, dtype, scalar_dtype):
    """0-d tensors give the bits of floats (all of them exact in both dtypes)."""
    on_device = Problem(33, 5, dtype, place).results(lambda x: torch.tensor(x, dtype=scalar_dtype, device=place))
    assert_same(on_device, Problem(33, 5, dtype, place).results())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [63, 64, 65, 129])
def test_programs_change_no_bit(place, monkeypatch, dtype, count):
    """A batch over several programs, the last one in part, is the batch in one."""
    expected = Problem(count, 3, dtype, place).results()
    if triton_ops.is_interpreted():
        monkeypatch.setattr(triton_ops, "_INTERPRETED_BLOCKS", 64)
    else:
        monkeypatch.setattr(triton_ops, "WARPS", 2)
    assert_same(Problem(count, 3, dtype, place).results(), expected)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 17])
def test_programs_share_the_columns(place, columns):
    lower, _ = triton_ops.factor(Problem(33, 4, torch.float64, place).fisher, 0.1, True)
    rhs = randn(33, 4, columns, device=place)
    alone = [triton_ops.solve(lower, rhs[:, :, [c]]) for c in range(columns)]
    assert_bitwise(triton_ops.solve(lower, rhs), torch.cat(alone, -1))


@pytest.mark.parametrize("op", ["accumulate_", "factor", "solve", "accumulate_factor_solve_", "mbf_step_"])
def test_larger_blocks_name_the_backends_that_serve_them(op):
    f, g = SymmetricBlocks.zeros(3, 21), torch.zeros(3, 21)
    arguments = {
        "accumulate_": (f, torch.zeros(2, 3, 21), 0.9),
        "factor": (f, 0.1, False),
        "solve": (f, g[..., None]),
        "accumulate_factor_solve_": (f, g, g, 0.9, 0.1, False),
        "mbf_step_": ([g], [g], [g], [f], [], [], [1.0], [1.0], OPTIONS),
    }
    with pytest.raises(ValueError, match=f"^{op}: .*'triton' .*20x20, got 21x21; 'cuda' and 'cpu' .*128.*'reference'"):
        getattr(triton_ops, op)(*arguments[op])


def test_numbers_travel_as_bits():
    assert triton_ops._numbers(torch.float32, 1.0, 0.1) == (0x3F800000, 0x3DCCCCCD)
    assert triton_ops._numbers(torch.float64, -2.0) == (-0x4000000000000000,)
    scalar = torch.tensor(0.5)
    assert triton_ops._numbers(torch.float32, scalar)[0] is scalar


# ---- without a GPU: ahead of time


def python(*arguments, path=()):
    """The standard output of a Python that does not interpret Triton."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MBF_BACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *map(str, path), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@needs_compiler
@pytest.mark.parametrize("target", ["cuda 90 32", "hip gfx942 64"])
def test_calls_reach_the_device(tmp_path, monkeypatch, target):
    """Every op compiles and launches as many programs as its blocks need; other numbers and counts compile nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    printed = python(str(ROOT / "tests" / "fake_gpu.py"), *target.split()).splitlines()
    programs = {"cuda": 8, "hip": 4}[target.split()[0]]
    kernels = ("accumulate", "factor", "solve", "accumulate_factor_solve", "mbf_step", "rank_one_step")
    sides = {name: 2 if name == "solve" else 1 for name in kernels}  # 9 columns take two rows of programs

    def launches(count):
        return [f"{name} {count} {sides[name]}" for name in kernels]

    expected = 2 * (2 * launches(programs) + launches(1))
    assert [line for line in printed if not line.startswith("compiled")] == expected
    compiled = [line.split()[1] for line in printed if line.startswith("compiled")]
    with_numbers_on_device = ("factor", "accumulate_factor_solve", "mbf_step", "rank_one_step")
    assert sorted(compiled) == sorted(2 * [*kernels, *with_numbers_on_device])


@pytest.fixture
def gate(monkeypatch):
    """The module tools/triton_gate.py."""
    pytest.importorskip("triton")
    if triton_ops.is_interpreted():
        pytest.skip("interpreted kernels do not compile")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import triton_gate

    return triton_gate


def test_the_gate_bites(gate):
    good = {"cuda:90, factor, float32, n = 9": dict(registers=56, spilled=0, shared=0, instructions=538)}
    spills = {name: kernel | dict(spilled=8) for name, kernel in good.items()}
    assert gate.complaints(good, {}) == gate.complaints(good, good) == []
    assert len(gate.complaints(spills, {})) == 1 and len(gate.complaints(spills, good)) == 2
    assert len(gate.complaints(good, {})) == 0 and len(gate.complaints({}, good)) == 1
    allowed = {f"cuda:90, {gate._name(*case)}": dict(spilled=8) for case in gate.SPILLS_ALLOWED}
    assert gate.complaints(allowed, {}) == []


def test_pinned_tables_are_clean_and_whole():
    pinned = json.loads((ROOT / "tools" / "triton_gate.json").read_text())
    assert {"3.6.0", "3.8.0"} <= pinned.keys()
    for table in pinned.values():
        assert len(table) == 3 * 21 and {name.split(",")[0] for name in table} == {"cuda:80", "cuda:90", "hip:gfx942"}
        assert all(not kernel["spilled"] or name.endswith("float64, n = 20") for name, kernel in table.items())


@needs_compiler
def test_a_kernel_compiles_to_its_pinned_figures(gate):
    import triton

    table = json.loads(gate.PINNED.read_text()).get(triton.__version__)
    if table is None:
        pytest.skip(f"no table for triton {triton.__version__}")
    for target in gate.TARGETS:
        name = f"{target}, {gate._name('accumulate', 'float32', 9)}"
        assert gate.figures("accumulate", "float32", 9, target) == table[name]
