"""Which implementation runs: backends(), use_backend, MBF_BACKEND, MBF_CPU_ISA; and life without _C."""

import os
import subprocess
import sys

import pytest
import torch

import mbf_kernels
from mbf_kernels import SymmetricBlocks, backends, factor, native, use_backend
from mbf_kernels.testing import assert_bitwise, spd_blocks

NAMES = ["reference", "cpu", "cuda", "triton", "emulated"]
needs_cpu = pytest.mark.skipif(backends()["cpu"] != "available", reason="no native CPU backend")


def python(code, *args, **environment):
    """Runs code in a fresh interpreter: its completed process."""
    command = [sys.executable, *(args or ("-c", code))]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_every_backend_is_listed_with_a_reason():
    status = backends()
    assert list(status) == NAMES
    assert status["reference"] == "available"
    assert all(isinstance(reason, str) and reason for reason in status.values())


def test_an_unknown_name_is_a_value_error():
    with pytest.raises(ValueError, match="reference.*'gpu'"), use_backend("gpu"):
        pass


def test_an_unavailable_backend_says_why():
    for name, reason in backends().items():
        if reason != "available":
            with pytest.raises(RuntimeError) as error, use_backend(name):
                pass
            assert reason in str(error.value) and name in str(error.value)


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that factored, in order."""
    log = []
    for name, backend in {"cpu": native.CPU, "emulated": native.EMULATED, "reference": mbf_kernels.reference}.items():

        def spy(*args, _name=name, _factor=backend.factor):
            log.append(_name)
            return _factor(*args)

        monkeypatch.setattr(backend, "factor", spy)
    return log


def run(size=9):
    factor(SymmetricBlocks.from_dense(spd_blocks("well", 3, size)), damping=0.1)


@needs_cpu
def test_use_backend_chooses_nests_and_ends(served, monkeypatch):
    monkeypatch.delenv("MBF_BACKEND", raising=False)
    run()
    with use_backend("reference"):
        run()
        with use_backend("cpu"):
            run()
        run()
    run()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    run()
    assert served == ["cpu", "reference", "cpu", "reference", "cpu", "cpu"]


@needs_cpu
def test_sizes_above_128_go_to_torch_linalg(served):
    with use_backend("cpu"):
        run(128)
        run(129)
    assert served == ["cpu", "reference"]


@needs_cpu
def test_the_environment_variable_chooses(served, monkeypatch):
    monkeypatch.setenv("MBF_BACKEND", "reference")
    run()
    with use_backend("cpu"):  # the narrower choice wins
        run()
    monkeypatch.setenv("MBF_BACKEND", "cpu")
    run()
    monkeypatch.setenv("MBF_BACKEND", "")
    run()
    assert served == ["reference", "cpu", "cpu", "cpu"]
    monkeypatch.setenv("MBF_BACKEND", "gpu")
    with pytest.raises(ValueError, match="gpu"):
        run()
    unavailable = [name for name, reason in backends().items() if reason != "available"]
    for name in unavailable:
        monkeypatch.setenv("MBF_BACKEND", name)
        with pytest.raises(RuntimeError, match=name):
            run()


WITHOUT_NATIVE = """
import sys, warnings
sys.modules["mbf_kernels._C"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mbf_kernels
    assert not caught, "a warning at import"
    from mbf_kernels import *
    print(mbf_kernels.backends()["cpu"])
    for _ in range(2):
        f = SymmetricBlocks.from_dense(torch.eye(9).repeat(3, 1, 1))
        x, info = accumulate_factor_solve_(f, torch.zeros(3, 9), torch.ones(3, 9), decay=0.5, damping=0.5)
        assert torch.allclose(x, torch.ones(3, 9)) and not info.any()
        lower, info = factor(f, damping=0.5)
        assert torch.allclose(solve(lower, torch.ones(3, 9)), torch.ones(3, 9))
try:
    with use_backend("cpu"):
        pass
except RuntimeError as error:
    print(error)
print(len(caught), *(w.message for w in caught))
"""


def test_without_the_extension_the_reference_serves_and_says_so_once():
    done = python(WITHOUT_NATIVE, MBF_BACKEND="")
    assert done.returncode == 0, done.stderr
    reason, refusal, warned = done.stdout.splitlines()
    assert reason != "available" and reason in refusal
    assert warned.startswith("1 ") and "mbf_kernels" in warned


def test_the_main_page_without_the_extension():
    code = (
        "import sys, runpy; sys.modules['mbf_kernels._C'] = None;runpy.run_module('mbf_kernels', run_name='__main__')"
    )
    done = python(code, MBF_BACKEND="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu" in done.stdout


@needs_cpu
@pytest.mark.parametrize("name", native.cpu_isas() if backends()["cpu"] == "available" else [])
def test_the_environment_variable_forces_an_instruction_set(name):
    done = python("from mbf_kernels import native; print(native.cpu_isa())", MBF_CPU_ISA=name)
    assert done.stdout.strip() == name, done.stderr


@needs_cpu
def test_an_unknown_instruction_set_in_the_environment():
    code = "import torch; from mbf_kernels import *; factor(SymmetricBlocks.zeros(1, 9), damping=1.0)"
    done = python(code, MBF_CPU_ISA="avx1024")
    assert done.returncode != 0 and "avx1024" in done.stderr and "ValueError" in done.stderr


def test_importing_starts_nothing():
    """No device query, no compilation, no optimizer, no triton: torch and the ops."""
    code = (
        "import sys, torch; before = set(sys.modules); import mbf_kernels;"
        "unwanted = {'triton', 'mbf_optim', 'numpy.testing', 'scipy'} & (set(sys.modules) - before);"
        "print(torch.cuda.is_initialized(), sorted(unwanted))"
    )
    assert python(code).stdout.strip() == "False []"


@needs_cpu
def test_ops_work_in_other_threads():
    """use_backend is the calling thread's own; a new thread takes the default and gives the same bits."""
    from concurrent.futures import ThreadPoolExecutor

    f = SymmetricBlocks.from_dense(spd_blocks("well", 100, 9, torch.float32))
    expected, _ = factor(f, damping=0.1)
    with ThreadPoolExecutor(4) as pool:
        for lower, info in pool.map(lambda _: factor(f, damping=0.1), range(16)):
            assert not info.any()
            assert_bitwise(lower.data, expected.data)
