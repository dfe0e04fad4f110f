"""The walls of the repository: who may import or include whom, and what is defined in one place only."""

import ast
import re
import sys
from pathlib import Path

import pytest

import mbf_kernels
from mbf_kernels import blocks, native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".def"))


def imports(path):
    """(module, name) of every import, with relative ones made absolute: (package, name)."""
    package = ".".join(path.relative_to(ROOT / "python" if "python" in path.parts else ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def outside(folder, *allowed):
    """Imports of the modules in `folder` that are neither standard nor from the allowed packages."""
    allowed = {*sys.stdlib_module_names, *allowed}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module, name in imports(path):
            if module.split(".")[0] not in allowed:
                yield f"{path.name}: {module} {name or ''}"


def test_mbf_kernels_imports_only_torch():
    assert not list(outside("mbf_kernels", "torch", "mbf_kernels", "triton"))


def test_mbf_optim_imports_only_public_names_of_mbf_kernels():
    assert not list(outside("python/mbf_optim", "torch", "mbf_kernels", "mbf_optim"))
    for path in (ROOT / "python/mbf_optim").rglob("*.py"):
        for module, name in imports(path):
            if module.startswith("mbf_kernels"):
                assert module == "mbf_kernels" and (name is None or name in mbf_kernels.__all__), (
                    f"{path.name}: {module} {name}"
                )


def test_nothing_imports_benchmarks_or_tests():
    for folder in ("mbf_kernels", "python/mbf_optim", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            roots = {module.split(".")[0] for module, _ in imports(path)}
            forbidden = {"tests"} if folder == "benchmarks" else {"tests", "benchmarks"}
            assert not roots & forbidden, path


def test_testing_uses_public_names():
    used = [name for module, name in imports(ROOT / "mbf_kernels/testing.py") if module.startswith("mbf_kernels")]
    assert set(used) <= set(mbf_kernels.__all__)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


def closure(path):
    """Every header that a file includes, directly or not: (local paths, names of system headers)."""
    local, system, todo = set(), set(), [path]
    while todo:
        current = todo.pop()
        for name in includes(current):
            target = (current.parent / name).resolve()
            if not target.exists():
                system.add(name)
            elif target not in local:
                local.add(target)
                todo.append(target)
    return local, system


def test_numerics_includes_nothing():
    assert includes(CSRC / "numerics.h") == []


@pytest.mark.parametrize("name", ["layout.h", "types.h"])
def test_the_plain_headers_know_neither_backends_nor_libraries(name):
    local, system = closure(CSRC / name)
    assert local <= {CSRC / other for other in ("block_sizes.def", "host_device.h", "layout.h", "types.h")}
    assert system <= {"stdint.h", "stddef.h"}


def test_only_the_bindings_know_python_and_nothing_knows_torch():
    for path in SOURCES:
        named = " ".join(includes(path))
        assert "torch" not in named and "ATen" not in named and "c10" not in named, path
        if path.name not in ("bindings.cpp", "tensor_memory.h"):
            assert "pybind11" not in named and "Python.h" not in named and "bindings" not in named, path


def test_the_kernels_include_no_code_of_the_standard_library():
    """They are compiled once per instruction set, and the linker would merge inline functions of C++."""
    compile_time_only = {"type_traits", "utility"}
    for path in CSRC.rglob("kernels.cpp"):
        local, system = closure(path)
        assert all(name.endswith(".h") or name in compile_time_only for name in system), system
        assert not any(p.name in ("dispatch.h", "parallel.h") for p in local)


def test_the_gpu_kernels_are_plain_enough_to_be_emulated():
    """No launch syntax, no inline assembly; of the toolkit only the headers that the emulator has too."""
    for path in (CSRC / "cuda").iterdir():
        text = path.read_text()
        assert "<<<" not in text and "asm" not in text, path
        toolkit = {name for name in includes(path) if name.startswith("cuda")}
        assert all((CSRC / "emulator" / name).exists() for name in toolkit), toolkit


def test_every_source_includes_its_own_header_first():
    for path in SOURCES:
        if path.suffix in (".cpp", ".cu") and path.with_suffix(".h").exists():
            assert includes(path)[0] == path.with_suffix(".h").name


def test_one_cholesky():
    """Factor arithmetic is defined in numerics.h and nowhere else."""
    definition = re.compile(r"^[^/\n]*\b\w+\s+\w*cholesky\w*\s*\(", re.IGNORECASE | re.MULTILINE)
    pivot = re.compile(r"\bsqrt\s*\(\s*(pivot|diagonal|a\[)", re.IGNORECASE)
    for path in SOURCES:
        if path != CSRC / "numerics.h":
            assert not definition.search(path.read_text()) and not pivot.search(path.read_text()), path


def test_compiled_sizes_come_from_one_list():
    """No other file names a size: no numeric case label, no explicit instantiation, no second list."""
    listed = re.search(r"#define MBF_FOR_EACH_SIZE\(X\)(.*?)\n#", (CSRC / "block_sizes.def").read_text(), re.DOTALL)
    sizes = [int(n) for n in re.findall(r"X\((\d+)\)", listed[1])]
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    for path in SOURCES:
        text = path.read_text()
        if path.name != "block_sizes.def":
            assert not re.search(r"\bcase\s+\d+\s*:", text), path
            assert not re.search(r"#define MBF_(FOR_EACH_SIZE|MAX_TILED_SIZE|MAX_SIZE)", text), path
            assert not re.search(r"^\s*template\s+\w.*<\s*\d+", text, re.MULTILINE), path
    limits = dict(re.findall(r"#define (MBF_MAX\w+) (\d+)", (CSRC / "block_sizes.def").read_text()))
    assert int(limits["MBF_MAX_TILED_SIZE"]) == blocks.MAX_TILED_SIZE
    if native.UNAVAILABLE is None:
        assert int(limits["MBF_MAX_SIZE"]) == native.MAX_SIZE


@pytest.mark.parametrize("name", ["CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile"])
def test_no_relaxed_arithmetic(name):
    text = (ROOT / name).read_text()
    for flag in (
        "-ffast-math",
        "-Ofast",
        "use_fast_math",
        "-funsafe-math",
        "-fassociative-math",
        "-ffinite-math",
        "-march=native",
    ):
        assert flag not in text


def test_sources_are_listed_not_globbed():
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert "GLOB" not in text
