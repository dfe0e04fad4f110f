"""The CUDA kernels compiled for one architecture at a time, as CMakeLists.txt compiles them, and kept by content.

An object is compiled again only when the sources of csrc/cuda, the command or the compiler have changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "gates"
TOOLKIT = Path("/usr/local/cuda/bin")
ARCHITECTURES = (80, 90, 100)

RANK_ONE = re.compile(r"rank_one_kernelI(?P<scalar>[fd])E")
KERNEL = re.compile(
    r"(?P<entry>op|step)_kernelI\w*?(?P<mapping>Thread|Team)KernelI(?P<scalar>[fd])(?P<numbers>(?:Li\d+E)+)E"
)


class Problem(Exception):
    """Something that this machine lacks or that failed, in words for whoever ran the tool."""


@dataclass(frozen=True)
class Object:
    name: str  # "thread float"
    architecture: int
    path: Path
    log: str  # what ptxas -v said


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvcc_version() -> str:
    """The release and the build, as 13.0.88."""
    text = run([nvcc(), "--version"])
    return re.search(r"\bV(\d+\.\d+\.\d+)", text)[1]


def disassembler() -> str:
    """cuobjdump from the PATH, the toolkit, or triton's wheel."""
    folders = [os.environ["PATH"], TOOLKIT]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if not found:
        raise Problem(
            "cuobjdump was not found: put the CUDA toolkit's on the PATH, or pip install triton, which has it"
        )
    return found


def disassemble(path: Path) -> str:
    folder = Path(disassembler()).parent  # where its nvdisasm is
    return run([disassembler(), "-sass", str(path)], env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"})


def resource_usage(path: Path) -> str:
    return run([disassembler(), "-res-usage", str(path)])


def machine_code(path: Path) -> list[int]:
    """The architectures that an object holds machine code for."""
    return [int(a) for a in re.findall(r"\.sm_(\d+)[af]?\.cubin", run([disassembler(), "-lelf", str(path)]))]


@functools.cache
def commands() -> dict[str, list[str]]:
    """How CMake, this Python's own if it has one, compiles each object of kernels, for all of ARCHITECTURES at once:
    {"thread float": [nvcc, ...]}."""
    try:
        import pybind11
    except ImportError:
        raise Problem("CMakeLists.txt needs pybind11 (pip install pybind11 cmake ninja)") from None
    folder = BUILD / "configured"
    run([
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        "-DMBF_CUDA=ON",
        "-DMBF_CUDA_ARCHITECTURES=" + ";".join(map(str, ARCHITECTURES)), f"-DCMAKE_CUDA_COMPILER={nvcc()}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    ], env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})  # fmt: skip
    return kernels_of(json.loads((folder / "compile_commands.json").read_text()))


def kernels_of(entries: Iterable[dict]) -> dict[str, list[str]]:
    found = {}
    for entry in entries:
        words = shlex.split(entry["command"])
        if entry["file"].endswith(".cu"):
            mapping, scalar = (
                next(w for w in words if w.startswith("-DMBF_ENTRY=")).removeprefix("-DMBF_ENTRY=").rsplit("_", 1)
            )
            found[f"{mapping} {scalar}"] = words
    return found


def for_architecture(words: list[str], architecture: int, to: Path) -> list[str]:
    """The command for one architecture alone, reporting the registers of every kernel."""
    kept = [w for w in words if not w.startswith("--generate-code") or f"compute_{architecture}," in w]
    kept[kept.index("-o") + 1] = str(to)
    return [*kept, "-Xptxas", "-v"]


def compile_kernels(architectures: Iterable[int] = ARCHITECTURES, names: Iterable[str] | None = None) -> list[Object]:
    """All objects (or those named), as many at a time as there are processors."""
    every = commands()
    jobs = [(name, a) for a in architectures for name in names or every]
    version = nvcc_version()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_one(*job, every[job[0]], version), jobs))


def compile_one(name: str, architecture: int, words: list[str], version: str) -> Object:
    key = content_key(for_architecture(words, architecture, Path("object")), version)
    path, log = BUILD / f"{key}.o", BUILD / f"{key}.log"
    if not log.exists():
        partial = path.with_suffix(f".{os.getpid()}.o")
        text = run(for_architecture(words, architecture, partial), stderr=True)
        if key != content_key(for_architecture(words, architecture, Path("object")), version):
            raise Problem("the sources changed while they were compiled: run this again")
        partial.replace(path)
        log.write_text(text)
    return Object(name, architecture, path, log.read_text())


def digest(architecture: int) -> str:
    """Of all that an architecture's machine code depends on: one string for all its objects."""
    version = nvcc_version()
    keys = [
        content_key(for_architecture(words, architecture, Path("object")), version) for words in commands().values()
    ]
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:24]


def content_key(words: list[str], version: str) -> str:
    """Of all that the object depends on: the files of csrc but those of other backends, the command, the compiler."""
    digest = hashlib.sha256("\n".join([version, *words]).replace(str(ROOT), "").encode())
    for path in [*sorted(CSRC.glob("*.*")), *sorted((CSRC / "cuda").iterdir())]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def readable(mangled: str) -> str | None:
    """ "step thread float n=9", "op group double N=32 4x2x8", "rank_one float"; None for what is no kernel of ours."""
    found = KERNEL.search(mangled) or RANK_ONE.search(mangled)
    if not found:
        return None
    scalar = {"f": "float", "d": "double"}[found["scalar"]]
    if found.re is RANK_ONE:
        return f"rank_one {scalar}"
    numbers = [int(number) for number in re.findall(r"\d+", found["numbers"])]
    if found["mapping"] == "Thread":
        return f"{found['entry']} thread {scalar} n={numbers[0]}"
    n, rows, columns, teams = numbers
    mapping = "block" if teams == 1 else "group"
    return f"{found['entry']} {mapping} {scalar} N={n} {rows}x{columns}x{teams}"


def run(command: list[str], stderr: bool = False, env: dict | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise Problem(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stderr if stderr else done.stdout
