"""Run the suite with `pytest tests`. The fixtures run a test once per backend that works on this machine."""

import contextlib
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; on small problems threads only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

import mbf_kernels  # noqa: E402
from mbf_kernels import triton_ops  # noqa: E402

torch.set_num_threads(1)  # test_bits.py sets its own

AVAILABLE = [name for name, reason in mbf_kernels.backends().items() if reason == "available"]
NATIVE = [name for name in AVAILABLE if name != "reference"]


def device_of(backend: str) -> str:
    """Where a backend's tensors live: on a GPU, unless Triton is interpreted."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


def pytest_collection_modifyitems(items):
    """Triton serves small blocks alone; tests/test_triton.py has its error. Interpreted, it takes seconds for the
    matrices of a shared step, whose other parts are torch's: few sizes."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend, size = parameters.get("backend", parameters.get("native")), parameters.get("size", 0)
        if backend == "triton" and size > triton_ops.MAX_SIZE:
            item.add_marker(pytest.mark.skip(reason="larger than the triton backend serves"))
        elif (
            backend == "triton" and device_of(backend) == "cpu" and "shared_step" in item.nodeid and size not in (1, 9)
        ):
            item.add_marker(pytest.mark.skip(reason="slow when interpreted"))


@contextlib.contextmanager
def using(backend: str):
    """The backend in use, and its device where tensors are made."""
    with mbf_kernels.use_backend(backend), torch.device(device_of(backend)):
        yield backend


@pytest.fixture(params=AVAILABLE)
def backend(request):
    """Every backend that works here, in use during the test."""
    with using(request.param) as name:
        yield name


@pytest.fixture(params=NATIVE or [pytest.param("none", marks=pytest.mark.skip(reason="no native backend"))])
def native(request):
    """Every backend that promises bits, not only figures, in use during the test."""
    with using(request.param) as name:
        yield name


@pytest.fixture
def cpu():
    """The native CPU backend alone, in use during the test."""
    if "cpu" not in AVAILABLE:
        pytest.skip("no native CPU backend")
    with using("cpu") as name:
        yield name


@pytest.fixture
def device(request):
    """The device that the test's backend serves."""
    return device_of(request.getfixturevalue("native" if "native" in request.fixturenames else "backend"))
