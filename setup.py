"""Builds mbf_kernels/_C with CMake. Environment: MBF_NATIVE=AUTO|0|1, and the options of CMakeLists.txt.

MBF_NATIVE=AUTO (the default) builds the native kernels when the tools are there, 0 never does, 1 fails
without them. Without native kernels the package works through its torch.linalg reference.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_OPTIONS = (
    "MBF_CUDA", "MBF_CUDA_ARCHITECTURES", "MBF_EMULATOR", "MBF_OPENMP", "MBF_WERROR", "CMAKE_BUILD_TYPE",
)  # fmt: skip


def missing_tools() -> list[str]:
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = {
        "pybind11": importlib.util.find_spec("pybind11") is not None,
        "cmake": shutil.which("cmake") is not None,
        "ninja": shutil.which("ninja") is not None,
        "a C++ compiler (" + ", ".join(compilers) + ")": any(map(shutil.which, compilers)),
    }
    return [tool for tool, present in found.items() if not present]


def wants_native() -> bool:
    choice = os.environ.get("MBF_NATIVE", "AUTO").upper()
    if choice not in ("AUTO", "0", "1"):
        raise SystemExit(f"MBF_NATIVE: expected AUTO, 0 or 1, got {choice!r}")
    missing = missing_tools() if choice != "0" else []
    if missing and choice == "1":
        raise SystemExit("MBF_NATIVE=1 needs " + ", ".join(missing))
    if missing:
        print("mbf-kernels: no native kernels, because these are missing: " + ", ".join(missing), file=sys.stderr)
    return choice != "0" and not missing


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        options = [f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ]
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        subprocess.run(configure + options, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("mbf_kernels._C", sources=[])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
