"""Run the suite with `pytest tests`. The fixtures run a test once per backend that works on this machine."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; on small problems threads only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

import mbf_kernels  # noqa: E402

torch.set_num_threads(1)  # test_bits.py sets its own

AVAILABLE = [name for name, reason in mbf_kernels.backends().items() if reason == "available"]
NATIVE = [name for name in AVAILABLE if name != "reference"]


@pytest.fixture(params=AVAILABLE)
def backend(request):
    """Every backend that works here, in use during the test."""
    with mbf_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE or [pytest.param("none", marks=pytest.mark.skip(reason="no native backend"))])
def native(request):
    """Every backend that promises bits, not only figures, in use during the test."""
    with mbf_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(request):
    """The device that the test's backend serves."""
    name = request.getfixturevalue("native" if "native" in request.fixturenames else "backend")
    return "cuda" if name in ("cuda", "triton") else "cpu"
